"""One optimizer update, from micro-batches to new adapters.

No logging and no files: what happened is returned as StepStats.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

from moored.config import OptimConfig, Regularizer
from moored.data.batch import Batch
from moored.distributed.mesh import Mesh
from moored.loss.divergence import Objective, Scales
from moored.models.engine import Engine
from moored.utils.ramp import scheduled


@dataclass(frozen=True, slots=True, kw_only=True)
class StepStats:
    """What one update saw and did; means are over the global batch.

    Attributes:
        loss: what was descended, nats per token: weighted ce + weight * (kl or penalty), and
            kl_prompt and kl_anchors by their own.
        ce: cross-entropy, nats per target token.
        kl: the regulariser's divergence, nats per KL position with a target; None when the step
            needs none, or the recipe.
        kl_prompt: that from the base at positions without a target, nats per position; None when
            the step needs none, or the recipe.
        kl_anchors: that on the anchors, nats per position; None when there are none.
        learned_fraction: share of the targets that the base let be learned (stm); None where all
            are.
        penalty: a baseline's term: squared norm of the adapter's product (l2), cross-entropy of
            the replayed text, nats per token (replay); None without one.
        weight: of the divergence or penalty in this update.
        num_targets: target tokens of the global batch that were learned.
        num_tokens: real (unpadded) tokens of the global batch.
        grad_norm: global gradient norm before clipping; not finite if the update was refused.
        learning_rate: of this update.
        applied: whether the adapters were changed.
    """

    loss: float
    ce: float
    kl: float | None
    kl_prompt: float | None
    kl_anchors: float | None
    learned_fraction: float | None
    penalty: float | None
    weight: float
    num_targets: int
    num_tokens: int
    grad_norm: float
    learning_rate: float
    applied: bool


def learning_rate_at(step: int, num_steps: int, optim: OptimConfig) -> float:
    """The learning rate of update `step` (from 0) of `num_steps`; a pure function."""
    peak, rise = optim.learning_rate, optim.warmup_steps
    return scheduled(step, num_steps, peak, optim.schedule, rise, end_ratio=0.0)


def needs_kl(step: int, regularizer: Regularizer) -> bool:
    """Whether update `step` (from 0) computes the regulariser; the same on every rank.

    The last of every k: at the very first there is nothing to hold, policy and base are equal.
    """
    return regularizer.has_divergence and (step + 1) % regularizer.every == 0


def weight_at(step: int, num_steps: int, regularizer: Regularizer) -> float:
    """The regulariser's weight in update `step` (from 0) of `num_steps`; a pure function."""
    peak, rise, end = regularizer.peak_weight, regularizer.warmup_steps, regularizer.end_ratio
    return scheduled(step, num_steps, peak, regularizer.schedule, rise, end)


def objective_of(regularizer: Regularizer) -> Objective:
    """What a run descends: the recipe has every option of the loss by the name it has there."""
    names = [option.name for option in fields(Objective)]
    return Objective(**{name: getattr(regularizer, name) for name in names})


def dropout_seed(seed: int, step: int, batch: Batch) -> int:
    """The seed of a micro-batch's adapter dropout: a function of what it holds, not of its rank."""
    text = f"{seed}:{step}:{'|'.join(batch.sample_ids)}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")


def _learned(
    engine: Engine, batches: Sequence[Batch], mesh: Mesh, max_perplexity: float
) -> list[Batch]:
    """The micro-batches with only those targets whose perplexity under the base is at most this."""
    surprise = [
        engine.base_cross_entropy(batch.to(mesh.device), reference)
        for batch, reference in zip(batches, engine.references_of(batches), strict=True)
    ]
    # The host waits here and not above: how many are learned is the denominator of them all.
    kept = [(ce <= math.log(max_perplexity)).to(batch.targets.device)
            for ce, batch in zip(surprise, batches, strict=True)]  # fmt: skip
    return [batch.learning(rows) for batch, rows in zip(batches, kept, strict=True)]


def train_step(
    engine: Engine,
    batches: Sequence[Batch],
    mesh: Mesh,
    *,
    step: int,
    regularizer: Regularizer,
    learning_rate: float,
    seed: int,
    weight: float | None = None,
    replayed: Sequence[Batch] = (),
    anchored: Sequence[Batch] = (),
) -> StepStats:
    """Forward, backward and update over this rank's micro-batches of one global batch.

    Args:
        engine: the policy under ZeRO.
        batches: micro-batches of `mesh.share`; every rank has the same number of them, and takes
            its tokens of their rows.
        mesh: the processes.
        step: the update's number, from 0.
        regularizer: what is added to the cross-entropy.
        learning_rate: of this update.
        seed: of the adapter's dropout.
        weight: of the regulariser in this update; None: the recipe's.
        replayed: this rank's micro-batches of replayed text, of which the same holds.
        anchored: likewise, of text on which the policy is held near the base; passed over in a
            step without a divergence.
    """
    with_kl, is_l2 = needs_kl(step, regularizer), regularizer.kind == "l2"
    anchored = anchored if with_kl else ()
    batches, anchored, replayed = (
        [batch.part(mesh.cp.rank, mesh.cp.size) for batch in given]
        for given in (batches, anchored, replayed)
    )
    num_given = sum(batch.num_targets for batch in batches)
    if regularizer.selects_targets:
        batches = _learned(engine, batches, mesh, regularizer.max_perplexity)
    compares_task = with_kl and regularizer.is_divergent
    # 1. What is kept of the base's hidden states, and the denominators over the whole global batch:
    # the ranks meet before the first forward, and the host waits for no device until the update.
    compared = [*(batches if compares_task else ()), *anchored]
    references = iter(engine.references_of(compared))
    counts = torch.tensor(
        [
            sum(batch.num_targets for batch in batches),
            sum(batch.num_kl for batch in batches),
            sum(batch.num_tokens for batch in batches),
            sum(batch.num_targets for batch in replayed),
            sum(batch.num_prompt for batch in batches),
            sum(batch.num_prompt for batch in anchored),
            num_given,
        ],
        dtype=torch.float64,
        device=mesh.device,
    )
    num_targets, num_kl, num_tokens, num_replayed, num_prompt, num_anchored, num_given = (
        int(n) for n in mesh.dp.sum(counts).tolist()
    )
    selects = regularizer.selects_targets
    weight = regularizer.peak_weight if weight is None else weight
    # A KL on every k-th step with k times the weight has the same expectation.
    kl_weight = weight * regularizer.every if with_kl else 0.0
    objective = objective_of(regularizer)
    of_task = Scales(
        ce=1.0 / max(1, num_targets),
        kl=kl_weight / max(1, num_kl) if compares_task else 0.0,
        prompt=regularizer.prompt_weight_beside(kl_weight) / max(1, num_prompt),
    )
    of_replay = Scales(ce=weight / max(1, num_replayed))
    anchors_weight = regularizer.anchors_weight_beside(kl_weight)
    of_anchors = Scales(ce=0.0, prompt=anchors_weight / max(1, num_anchored))
    l2_scale = weight / (len(batches) * mesh.dp.size) if is_l2 else 0.0
    work = [(batch, of_task) for batch in batches]
    work += [(batch, of_anchors) for batch in anchored]
    work += [(batch, of_replay) for batch in replayed]
    totals = torch.zeros(6, dtype=torch.float64, device=mesh.device)
    for i, (host_batch, scales) in enumerate(work):
        batch = host_batch.to(mesh.device)
        # 2. The reference: the same frozen weights, adapters and dropout off, no gradient.
        is_compared = compares_task if scales is of_task else scales is of_anchors
        reference_hidden = next(references) if is_compared else None
        # 3. Policy and head in one module forward; the gradient is formed there.
        torch.manual_seed(dropout_seed(seed, step, batch))
        loss, sums = engine.forward(batch, reference_hidden, objective, scales, l2_scale)
        engine.backward(loss, last=i == len(work) - 1)
        found = torch.stack([sums.loss, sums.ce_sum, sums.kl_sum, sums.kl_prompt_sum]).to(totals)
        if scales is of_task:
            totals[:4] += found
        else:
            totals[0] += found[0]
            totals[4 if scales is of_replay else 5] += found[1 if scales is of_replay else 3]
    penalty = engine.policy.product_norm() if is_l2 else None
    # 4. A poisoned update is refused on every rank alike.
    loss_sum, ce_sum, kl_sum, kl_prompt_sum, replay_sum, anchors_sum = mesh.dp.sum(totals).tolist()
    grad_norm = engine.step(learning_rate)
    if replayed:
        penalty = replay_sum / max(1, num_replayed)
    return StepStats(
        loss=loss_sum + (weight * penalty if is_l2 and penalty is not None else 0.0),
        ce=ce_sum / max(1, num_targets),
        kl=kl_sum / max(1, num_kl) if compares_task else None,
        kl_prompt=kl_prompt_sum / max(1, num_prompt) if with_kl and num_prompt else None,
        kl_anchors=anchors_sum / num_anchored if num_anchored else None,
        learned_fraction=num_targets / max(1, num_given) if selects else None,
        penalty=penalty,
        weight=kl_weight if regularizer.has_divergence else weight,
        num_targets=num_targets,
        num_tokens=num_tokens,
        grad_norm=grad_norm,
        learning_rate=learning_rate,
        applied=math.isfinite(grad_norm),
    )
