"""Hidden states to loss: the frozen output head and the loss in one, chunked, memory-flat, sharded.

Holds the public function and the module that takes lm_head's place; the loop over chunks is in
chunks.py, the projections in logits.py, the arithmetic on logits in divergence.py. No option of the
loss is read here: `Objective` is handed on. The gradient with respect to `hidden` is formed in the
forward, so no [T, V] tensor exists and the backward needs neither the weight nor a collective.

Legend: N rows, C the rows of one chunk, D hidden size, V vocabulary, v this rank's columns without
padding. logits = softcap(logit_scale * (h W^T + bias)).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moored.loss.chunks import chunk_size, kernels_run, run_chunks
from moored.loss.divergence import (
    NO_TARGET,
    Direction,
    Objective,
    RestFactor,
    Scales,
    VocabShard,
    all_gather,
)
from moored.loss.drift import DriftSums, drift
from moored.loss.logits import Logits
from moored.loss.rows import (
    Reduction,
    RowPlan,
    TMKLOutput,
    check_dtypes,
    check_rows,
    compute_dtype,
    precomputed,
    wants_gradient,
)

__all__ = ["Head", "LossSums", "attach_gradient", "linear_tmkl_loss"]


def linear_tmkl_loss(
    policy_hidden: Tensor,
    reference_hidden: Tensor | None,
    lm_head_weight: Tensor,
    targets: Tensor,
    *,
    kl_weight: float = 1.0,
    direction: Direction = "forward",
    mask_target: bool = True,
    temperature: float = 1.0,
    ignore_index: int = -100,
    kl_mask: Tensor | None = None,
    shard: VocabShard | None = None,
    reduction: Reduction = "mean",
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    chunk_tokens: int | None = None,
    prompt_weight: float | None = None,
    target_weight: float = 0.0,
    rest_factor: RestFactor = "one",
) -> TMKLOutput:
    """`tmkl_loss` from hidden states and a frozen head, without ever holding [T, V].

    Args:
        policy_hidden: [T, D].
        reference_hidden: [T, D], gets no gradient. None only when `kl_weight` is 0; when given
            with weight 0, the KL is still reported.
        lm_head_weight: [V, D], or this rank's rows [stop - start, D]; must not require grad.
        targets: int64 [T], global ids aligned with the rows.
        kl_weight: as in `tmkl_loss`, like the next seven.
        direction: "forward", "reverse" or "jsd".
        mask_target: remove the target from both distributions.
        temperature: divides the logits in the KL.
        ignore_index: marks ignored rows; they are dropped before the matrix products.
        kl_mask: bool [T], rows where the KL applies.
        shard: this rank's rows of the head.
        reduction: "mean", "sum" or "none".
        bias: [V], or this rank's part; must not require grad.
        logit_scale: multiplies the logits.
        logit_softcap: c in c * tanh(logits / c), after the scale.
        chunk_tokens: rows at a time; the same on every rank. None: `default_chunk_tokens`.
        prompt_weight: of a plain KL at rows of `kl_mask` without a target, as in `tmkl_loss`, like
            the next two.
        target_weight: of the KL between the target and the rest.
        rest_factor: of the KL within the rest: "one" or "base".

    Returns:
        TMKLOutput, the same on every rank; the gradient of `policy_hidden` is summed over ranks.

    Raises:
        ValueError: shapes, dtypes, ranges or options do not fit; names the argument.
    """
    objective = Objective(
        direction,
        mask_target,
        temperature,
        target_weight=target_weight,
        rest_factor=rest_factor,
    )
    if policy_hidden.dim() != 2:
        raise ValueError(f"policy_hidden has shape {tuple(policy_hidden.shape)}: [T, D] is needed")
    named = ("policy_hidden", policy_hidden), ("reference_hidden", reference_hidden)
    kl_weight, held = check_rows(named, targets, kl_mask, kl_weight, prompt_weight, reduction)
    check_dtypes(("lm_head_weight", lm_head_weight), ("bias", bias))
    if lm_head_weight.dim() != 2 or lm_head_weight.shape[1] != policy_hidden.shape[1]:
        raise ValueError(
            f"lm_head_weight has shape {tuple(lm_head_weight.shape)}, but policy_hidden has shape "
            f"{tuple(policy_hidden.shape)}: [V, D] and [T, D] are needed"
        )
    for name, tensor in (("lm_head_weight", lm_head_weight), ("bias", bias)):
        if tensor is not None and tensor.requires_grad:
            raise ValueError(f"{name} requires grad, but the head is frozen: detach it")
    logits = Logits.of(lm_head_weight, bias, logit_scale, logit_softcap, shard)
    plan = RowPlan.of(
        targets,
        kl_mask,
        ignore_index,
        logits.shard.vocab_size,
        with_kl=reference_hidden is not None,
        with_prompt=prompt_weight is not None,
    )
    if plan.prompt_N is not None:
        targets = targets.masked_fill(plan.prompt_N, NO_TARGET)
    ce_T, kl_T, _, grad_TD = run_chunks(
        logits,
        policy_hidden.detach(),
        None if reference_hidden is None else reference_hidden.detach(),
        targets,
        plan,
        objective,
        Scales(*plan.scales(kl_weight, held, reduction)),
        chunk_tokens,
        with_gradient=wants_gradient(policy_hidden),
    )
    dtype = compute_dtype(policy_hidden, reference_hidden, lm_head_weight)
    out = plan.output(ce_T, kl_T, kl_weight, held, reduction, dtype)
    if grad_TD is None:
        return out
    return out._replace(loss=precomputed(policy_hidden, out.loss, grad_TD))


# ---------------------------------------------------------------- the module


@dataclass(frozen=True, slots=True)
class LossSums:
    """Detached sums over rows, in nats; `loss` is the scaled and weighted sum of them all.

    `kl_sum` is over the `num_kl` rows with a target, `kl_prompt_sum` over the `num_prompt` without.
    """

    loss: Tensor
    ce_sum: Tensor
    kl_sum: Tensor
    kl_prompt_sum: Tensor
    num_targets: int
    num_kl: int
    num_prompt: int


class Head(nn.Module):
    """Takes lm_head's place. Owns lm_head's own (frozen, possibly tied) Parameter.

    Args:
        weight: [V, D], or this rank's rows.
        bias: [V], or this rank's part.
        logit_scale: multiplies the logits of the loss (not of the plain call).
        logit_softcap: soft cap of the logits of the loss (not of the plain call).
        shard: this rank's rows of the head.
        chunk_tokens: rows at a time, the same on every rank.
        reference: the base's head, where this one is the policy's alone; such a pair is compared
            (`drift`), not trained.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter | None = None,
        *,
        logit_scale: float = 1.0,
        logit_softcap: float | None = None,
        shard: VocabShard | None = None,
        chunk_tokens: int | None = None,
        reference: Head | None = None,
    ) -> None:
        super().__init__()
        self.weight = weight
        self.register_parameter("bias", bias)
        self.out_features, self.in_features = weight.shape
        self.logit_scale = logit_scale
        self.logit_softcap = logit_softcap
        self.shard = shard
        self.chunk_tokens = chunk_tokens
        self.reference = reference
        self._widths: list[int] | None = None  # columns of every rank

    def with_own(self, weight: Tensor, bias: Tensor | None) -> Head:
        """A policy's head of its own, [V, D] and [V], with this one as its reference."""
        parts = (None if t is None else nn.Parameter(t.detach(), False) for t in (weight, bias))
        own_weight, own_bias = parts
        assert own_weight is not None
        return Head(
            own_weight,
            own_bias,
            logit_scale=self.logit_scale,
            logit_softcap=self.logit_softcap,
            chunk_tokens=self.chunk_tokens,
            reference=self,
        )

    def forward(self, *inputs: Any, use: Callable[..., Any] | None = None, **options: Any) -> Any:
        """Whatever the method `use` of this class makes of its arguments: `logits`, if it is None.

        Every use goes through here, so that ZeRO-3's hooks gather the weight.
        """
        return (use or Head.logits)(self, *inputs, **options)

    def logits(self, hidden: Tensor) -> Tensor:
        """Plain `hidden @ weight.T + bias` of the whole vocabulary, [..., V].

        No cap and no scale: a Hugging Face forward applies its own. A shard's columns are gathered,
        as generation needs them.
        """
        return self._all_columns(nn.functional.linear(hidden, self.weight, self.bias))

    def loss(
        self,
        hidden: Tensor,
        reference_hidden: Tensor | None,
        targets: Tensor,
        *,
        objective: Objective,
        scales: Scales,
        kl_mask: Tensor | None = None,
        kl_weights: Tensor | None = None,
        num_targets: int | None = None,
        num_kl: int | None = None,
        num_prompt: int | None = None,
    ) -> tuple[Tensor, LossSums]:
        """The loss and its gradient, neither with a graph.

        So ZeRO-3 has no backward for which to gather the weight again.

        Args:
            hidden: [N, D], rows already selected.
            reference_hidden: [N, D]; None for cross-entropy alone.
            targets: int64 [N], global ids, range-checked by the caller (at collation); negative
                where a row has a KL alone.
            objective: what is descended.
            scales: factors of the sums of cross-entropies and of KLs.
            kl_mask: bool [N], rows where the KL applies.
            kl_weights: [N], a further weight of each row's KL.
            num_targets: rows that have a target; None: all of them.
            num_kl: rows of `kl_mask` that have one; None: the device is asked, like for the next.
            num_prompt: rows of `kl_mask` that have none.

        Returns:
            The gradient of `hidden`, [N, D] in at least fp32, and the sums.
        """
        if self.reference is not None:
            raise ValueError("a head of the policy's own can be compared, not trained")
        with_kl = reference_hidden is not None
        plan = RowPlan.of_batch(
            targets,
            kl_mask,
            with_kl=with_kl,
            num_targets=num_targets,
            num_kl=num_kl,
            num_prompt=num_prompt,
        )
        ce_N, kl_N, weighted_N, grad_ND = run_chunks(
            self._logits(),
            hidden.detach(),
            None if reference_hidden is None else reference_hidden.detach(),
            targets,
            plan,
            objective,
            scales,
            self.chunk_tokens,
            with_gradient=True,
            kl_weights_N=kl_weights,
        )
        assert grad_ND is not None
        kl_sum, kl_prompt_sum = (part_N.sum() for part_N in plan.by_kind(kl_N))
        sums = weighted_N.sum(), ce_N.sum(), kl_sum, kl_prompt_sum
        return grad_ND, LossSums(*sums, plan.num_targets, plan.num_kl, plan.num_prompt)

    @torch.no_grad()
    def cross_entropy(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Each row's cross-entropy, [N] in nats and fp64, the same on every rank.

        Args:
            hidden: [N, D], rows already selected.
            targets: int64 [N], global ids.
        """
        plan = RowPlan.of_batch(targets, None, with_kl=False)
        return run_chunks(
            self._logits(),
            hidden,
            None,
            targets,
            plan,
            Objective(),
            Scales(),
            self.chunk_tokens,
            with_gradient=False,
        ).ce_N

    @torch.no_grad()
    def drift(
        self,
        hidden: Tensor,
        reference_hidden: Tensor,
        targets: Tensor,
        *,
        num_spots: int = 0,
        spot_groups: Tensor | None = None,
    ) -> DriftSums:
        """How far the policy is from the reference, row by row.

        Args:
            hidden: [N, D], rows already selected.
            reference_hidden: [N, D].
            targets: int64 [N], global ids.
            num_spots: look at as many rows that drift most.
            spot_groups: [N], of which each has few of these rows.
        """
        return drift(
            self._logits(),
            hidden,
            reference_hidden,
            targets,
            self.chunk_tokens,
            num_spots,
            spot_groups,
            None if self.reference is None else self.reference._logits(),
        )

    def _all_columns(self, logits_v: Tensor) -> Tensor:
        """Every rank's columns, [..., V], without padding; no gradient where there are several."""
        shard = self.shard
        if shard is None or shard.world_size == 1:
            return logits_v
        if self._widths is None:
            mine = torch.tensor([shard.num_valid], device=logits_v.device)
            self._widths = [int(width) for width in all_gather(mine, shard)]
        widest = max(self._widths)
        valid_v = logits_v.detach()[..., : shard.num_valid]
        parts = all_gather(nn.functional.pad(valid_v, (0, widest - shard.num_valid)), shard)
        return torch.cat([p[..., :w] for p, w in zip(parts, self._widths, strict=True)], dim=-1)

    def chunk_tokens_for(self, num_tokens: int) -> int:
        """Rows that are under way at a time, of `num_tokens`."""
        return chunk_size(self.chunk_tokens, num_tokens, self._logits())

    @property
    def has_kernels(self) -> bool:
        """Whether Triton's kernels compute its rows where their weights let them."""
        return kernels_run(self._logits(), torch.float32)

    def _logits(self) -> Logits:
        return Logits.of(self.weight, self.bias, self.logit_scale, self.logit_softcap, self.shard)


def attach_gradient(hidden: Tensor, grad_hidden: Tensor, sums: LossSums) -> Tensor:
    """A 0-dim loss of value `sums.loss` whose backward hands `grad_hidden` to `hidden`, once.

    Runs outside the Head module, so that no backward hook of that module is set up.
    """
    loss = sums.loss.to(grad_hidden.dtype)
    return precomputed(hidden, loss, grad_hidden)
