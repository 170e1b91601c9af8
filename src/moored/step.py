"""One optimizer update, from micro-batches to new adapters.

No logging and no files: what happened is returned as StepStats.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moored.batch import Batch
from moored.config import OptimConfig, Regularizer
from moored.engine import Engine
from moored.mesh import Mesh
from moored.model import LossArguments


@dataclass(frozen=True, slots=True, kw_only=True)
class StepStats:
    """What one update saw and did; means are over the global batch.

    Attributes:
        loss: ce + weight * kl, nats per token.
        ce: cross-entropy, nats per target token.
        kl: the regulariser's divergence, nats per KL position; None when the step needs none.
        num_targets: target tokens of the global batch.
        num_tokens: real (unpadded) tokens of the global batch.
        grad_norm: global gradient norm before clipping; not finite if the update was refused.
        learning_rate: of this update.
        applied: whether the adapters were changed.
    """

    loss: float
    ce: float
    kl: float | None
    num_targets: int
    num_tokens: int
    grad_norm: float
    learning_rate: float
    applied: bool


def learning_rate_at(step: int, num_steps: int, optim: OptimConfig) -> float:
    """The learning rate of update `step` (from 0) of `num_steps`; a pure function."""
    if step < optim.warmup_steps:
        return optim.learning_rate * (step + 1) / optim.warmup_steps
    progress = (step - optim.warmup_steps) / max(1, num_steps - optim.warmup_steps)
    if optim.schedule == "constant":
        factor = 1.0
    elif optim.schedule == "linear":
        factor = 1.0 - progress
    else:
        factor = 0.5 * (1.0 + math.cos(math.pi * progress))
    return optim.learning_rate * (optim.min_lr_ratio + (1.0 - optim.min_lr_ratio) * factor)


def needs_kl(step: int, regularizer: Regularizer) -> bool:
    """Whether update `step` (from 0) computes the regulariser; the same on every rank."""
    return regularizer.kind != "none" and step % regularizer.every == 0


def dropout_seed(seed: int, step: int, batch: Batch) -> int:
    """The seed of a micro-batch's adapter dropout: a function of what it holds, not of its rank."""
    text = f"{seed}:{step}:{'|'.join(batch.sample_ids)}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")


def train_step(
    engine: Engine,
    batches: Sequence[Batch],
    mesh: Mesh,
    *,
    step: int,
    regularizer: Regularizer,
    learning_rate: float,
    seed: int,
) -> StepStats:
    """Forward, backward and update over this rank's micro-batches of one global batch.

    Args:
        engine: the policy under ZeRO.
        batches: this rank's micro-batches; every rank has the same number of them.
        mesh: the processes.
        step: the update's number, from 0.
        regularizer: kind, weight, direction and temperature of the KL.
        learning_rate: of this update.
        seed: of the adapter's dropout.
    """
    # 1. Denominators over the whole global batch, before any forward.
    counts = torch.tensor(
        [
            sum(batch.num_targets for batch in batches),
            sum(batch.num_kl for batch in batches),
            sum(batch.num_tokens for batch in batches),
        ],
        dtype=torch.float64,
        device=mesh.device,
    )
    num_targets, num_kl, num_tokens = (int(n) for n in mesh.dp.sum(counts).tolist())
    with_kl = needs_kl(step, regularizer)
    # A KL on every k-th step with k times the weight has the same expectation.
    kl_weight = regularizer.weight * regularizer.every if with_kl else 0.0
    loss_arguments = LossArguments(
        ce_scale=1.0 / max(1, num_targets),
        kl_scale=kl_weight / max(1, num_kl),
        direction=regularizer.direction,
        mask_target=regularizer.kind == "tmkl",
        temperature=regularizer.temperature,
    )
    totals = torch.zeros(2, dtype=torch.float64, device=mesh.device)
    for i, host_batch in enumerate(batches):
        batch = host_batch.to(mesh.device)
        # 2. The reference: the same frozen weights, adapters and dropout off, no gradient.
        reference_hidden = engine.reference(batch) if with_kl else None
        # 3. Policy and head in one module forward; the gradient is formed there.
        torch.manual_seed(dropout_seed(seed, step, batch))
        loss, sums = engine.forward(batch, reference_hidden, loss_arguments)
        engine.backward(loss, last=i == len(batches) - 1)
        totals += torch.stack([sums.ce_sum, sums.kl_sum]).to(totals)
    # 4. A poisoned update is refused on every rank alike.
    ce_sum, kl_sum = mesh.dp.sum(totals).tolist()
    grad_norm = engine.step(learning_rate)
    ce = ce_sum / max(1, num_targets)
    kl = kl_sum / max(1, num_kl) if with_kl else None
    return StepStats(
        loss=ce + kl_weight * (kl or 0.0),
        ce=ce,
        kl=kl,
        num_targets=num_targets,
        num_tokens=num_tokens,
        grad_norm=grad_norm,
        learning_rate=learning_rate,
        applied=math.isfinite(grad_norm),
    )
