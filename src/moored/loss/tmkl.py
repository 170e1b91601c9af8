"""The loss on logits: cross-entropy plus target-masked KL to a reference, `tmkl_loss`.

A chunk's arithmetic is in divergence.py and softmax_pair.py, what is done with rows in rows.py. The
four import torch alone, and know no model and no config: together they can be pasted into another
trainer.

    p~_v = exp(s_v) / sum_{u != y} exp(s_u),  q~_v likewise from t,  v != y
    loss = CE(s, y) + kl_weight * KL(q~ || p~)            ("Mask the Target", arXiv 2605.29498)

Legend: T tokens, C the tokens of one chunk, V vocabulary, v this rank's columns.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moored.loss.divergence import (
    NO_TARGET,
    Direction,
    Objective,
    RestFactor,
    VocabShard,
    chunk_loss_,
)
from moored.loss.rows import (
    Reduction,
    RowPlan,
    TMKLOutput,
    check_rows,
    compute_dtype,
    default_chunk_tokens,
    precomputed,
    wants_gradient,
)

__all__ = ["Objective", "TMKLOutput", "VocabShard", "tmkl_loss"]

# Where only a reference logit is -inf, the log-ratio is held at this, so that 0 * inf never arises:
# forward and jsd are finite then. Reverse is not, and comes out as nan.
_LOWEST = {"forward": -1e30, "jsd": -1e30, "reverse": -math.inf}


def tmkl_loss(
    policy_logits: Tensor,
    reference_logits: Tensor | None,
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
    prompt_weight: float | None = None,
    target_weight: float = 0.0,
    rest_factor: RestFactor = "one",
) -> TMKLOutput:
    """Cross-entropy plus `kl_weight` times the (target-masked) KL to a reference.

    The gradient is formed in this call, in the dtype of `policy_logits`, chunk by chunk; arithmetic
    is fp32 (fp64 for fp64 logits). The backward hands that buffer over, so it works once.

    Args:
        policy_logits: [T, V], or [T, stop - start] under `shard`. Anything is allowed in padding,
            and -inf elsewhere where the reference has it too.
        reference_logits: same shape, gets no gradient; -inf means probability 0 (reverse is nan
            then, unless the policy has it too). None only when
            `kl_weight` is 0; when given with weight 0, the KL is still reported.
        targets: int64 [T], global ids aligned with the rows; `ignore_index` where nothing applies.
        kl_weight: finite, >= 0.
        direction: "forward" KL(q || p), "reverse" KL(p || q), or "jsd", p being the policy.
        mask_target: remove the target from both distributions and renormalise.
        temperature: divides the logits in the KL, which is multiplied by its square.
        ignore_index: the target that marks a row as ignored.
        kl_mask: bool [T], rows where the KL applies (all by default); ignored rows count only
            with `prompt_weight`.
        shard: this rank's columns of the vocabulary.
        reduction: "mean": ce_sum / num_targets + kl_weight * kl_sum / num_kl; "sum"; or "none",
            per row and 0 where ignored.
        prompt_weight: of a plain KL, over the whole vocabulary, at rows of `kl_mask` whose target
            is `ignore_index` (prompts, which nothing is learned of): finite, >= 0, and added as
            prompt_weight * kl_prompt_sum / num_prompt. Needs `kl_mask`, since padding is to have
            none. None: such rows are ignored.
        target_weight: KL(q || p) is the KL between (target, rest) plus 1 - q_y times that within
            the rest, which is the masked one; this weighs the first. Forward and masked only.
        rest_factor: "base" keeps the factor 1 - q_y of the second, "one" leaves it out.

    Returns:
        TMKLOutput, the same on every rank of the shard's group.

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
    if policy_logits.dim() != 2:
        raise ValueError(f"policy_logits has shape {tuple(policy_logits.shape)}: [T, V] is needed")
    width = policy_logits.shape[1]
    shard = VocabShard(0, width, width) if shard is None else shard
    if width != shard.width:
        raise ValueError(
            f"policy_logits has shape {tuple(policy_logits.shape)}, but shard [{shard.start}, "
            f"{shard.stop}) holds {shard.width} columns"
        )
    named = ("policy_logits", policy_logits), ("reference_logits", reference_logits)
    kl_weight, held = check_rows(named, targets, kl_mask, kl_weight, prompt_weight, reduction)
    plan = RowPlan.of(
        targets,
        kl_mask,
        ignore_index,
        shard.vocab_size,
        with_kl=reference_logits is not None,
        with_prompt=prompt_weight is not None,
    )
    ce_scale, kl_scale, prompt_scale = plan.scales(kl_weight, held, reduction)
    if plan.prompt_N is not None:
        targets = targets.masked_fill(plan.prompt_N, NO_TARGET)
    # Stored over a row's largest scale: so a fp16 gradient does not underflow until the backward.
    unit_T = torch.full(targets.shape, ce_scale, dtype=torch.float64, device=targets.device)
    policy_TV, with_gradient = policy_logits.detach(), wants_gradient(policy_logits)
    grad_TV = torch.zeros_like(policy_TV) if with_gradient else None
    dtype = compute_dtype(policy_logits, reference_logits)
    ce_T, kl_T = plan.new_values(policy_TV.device)
    size = default_chunk_tokens(plan.num_computed, shard, on_gpu=policy_TV.is_cuda)
    for rows, with_kl in plan.chunks(size):
        s_Cv = policy_TV[rows, : shard.num_valid].to(dtype, copy=True)
        e_Cv = None
        if with_kl and reference_logits is not None:
            t_Cv = reference_logits.detach()[rows, : shard.num_valid].to(dtype)
            e_Cv = _difference(t_Cv, s_Cv, _LOWEST[direction])
        unit, kl_part = max(ce_scale, kl_scale) if with_kl else ce_scale, kl_scale
        if with_kl and plan.prompt_N is not None:
            prompt_C = plan.prompt_N[rows]
            kl_part = torch.where(prompt_C, unit_T.new_tensor(prompt_scale), kl_scale)
            unit = torch.where(prompt_C, unit_T.new_tensor(prompt_scale or 1.0), unit)
        unit_T[rows] = unit
        found = chunk_loss_(
            s_Cv, e_Cv, targets[rows], objective, shard, ce_scale / unit, kl_part / unit
        )
        ce_T[rows] = found.ce_C
        if found.kl_C is not None:
            kl_T[rows] = found.kl_C
        if grad_TV is not None:
            grad_TV[rows, : shard.num_valid] = s_Cv.to(grad_TV.dtype)
    out = plan.output(ce_T, kl_T, kl_weight, held, reduction, dtype)
    if grad_TV is None:
        return out
    return out._replace(loss=precomputed(policy_logits, out.loss, grad_TV, unit_T, consume=True))


def _difference(t_Cv: Tensor, s_Cv: Tensor, lowest: float) -> Tensor:
    """The log-ratio t - s, with 0 where both are -inf and no less than `lowest`."""
    e_Cv = t_Cv - s_Cv
    if e_Cv.is_cuda or not bool(torch.isfinite(e_Cv.sum())):
        e_Cv = torch.where(t_Cv == s_Cv, 0.0, e_Cv).clamp_(min=lowest)
    return e_Cv
