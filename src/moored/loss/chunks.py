"""Rows of hidden states to losses and a gradient, chunk by chunk: by torch, or by Triton's kernels.

Knows no module, no autograd and no reduction; head.py makes the public functions of it.

Legend: N rows, C the rows of one chunk, D hidden size, V vocabulary, v this rank's columns without
padding. h the policy's and h0 the reference's hidden states, y the targets.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib.util import find_spec
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from moored.loss.divergence import ChunkLoss, Objective, Scales, chunk_loss_
from moored.loss.logits import Logits
from moored.loss.rows import RowPlan, compute_dtype, default_chunk_tokens


def run_chunks(
    logits: Logits,
    h_ND: Tensor,
    h0_ND: Tensor | None,
    targets_N: Tensor,
    plan: RowPlan,
    objective: Objective,
    scales: Scales,
    chunk_tokens: int | None,
    *,
    with_gradient: bool,
    kl_weights_N: Tensor | None = None,
) -> Chunked:
    """Per-row cross-entropy and KL, and the gradient of their weighted sum.

    Args:
        logits: the head.
        h_ND: the policy's hidden states, detached.
        h0_ND: the reference's, detached; None for cross-entropy alone.
        targets_N: global ids; negative where a row has a KL alone.
        plan: which rows, in which groups.
        objective: what is descended.
        scales: factors of the sums of cross-entropies and of KLs.
        chunk_tokens: rows at a time; None: `default_chunk_tokens`.
        with_gradient: whether it is wanted.
        kl_weights_N: weight of each row's KL; None: 1.
    """
    dtype = compute_dtype(h_ND, h0_ND, logits.weight_vD)
    ce_N, kl_N = plan.new_values(h_ND.device)
    weighted_N = torch.zeros_like(ce_N)
    grad_ND = torch.zeros(h_ND.shape, dtype=dtype, device=h_ND.device) if with_gradient else None
    # Weights of about 1 on the logits' gradient, and the scale on the product: 1 / (targets of the
    # global batch) times a probability would underflow in half precision.
    ce_scale, kl_scale, prompt_scale = (_scalar(x, dtype, h_ND.device) for x in scales)
    largest = ce_scale.abs().max(kl_scale.abs())
    if plan.prompt_N is not None:
        largest = largest.max(prompt_scale.abs())
    units = {False: _not_0(ce_scale.abs()), True: _not_0(largest)}
    acting = scales.kl, (0.0 if plan.prompt_N is None else scales.prompt)
    kl_acts = any(isinstance(scale, Tensor) or scale != 0 for scale in acting)
    size = chunk_size(chunk_tokens, plan.num_computed, logits)
    with torch.no_grad(), torch.autocast(h_ND.device.type, enabled=False):
        by_kernels = kernels_run(logits, dtype) and not objective.weighs_by_models
        how = _by_kernels if by_kernels else _by_torch
        half = logits.native(h_ND.dtype) and with_gradient
        room = min(size, plan.num_computed), 1 if h0_ND is None else 2
        chunk = how(logits, objective, dtype, room, half)
        for rows, with_kl in plan.chunks(size):
            h0_CD = h0_ND[rows] if with_kl and h0_ND is not None else None
            unit = units[with_kl]
            ce_weight, kl_weight = ce_scale / unit, kl_scale / unit if kl_acts else 0.0
            if with_kl and kl_acts and plan.prompt_N is not None:
                kl_weight = torch.where(plan.prompt_N[rows], prompt_scale / unit, kl_weight)
            if kl_weights_N is not None:
                kl_weight = kl_weight * kl_weights_N[rows].to(dtype)
            found, dh_CD = chunk(h_ND[rows], h0_CD, targets_N[rows], ce_weight, kl_weight)
            ce_N[rows] = found.ce_C
            weighted_N[rows] = scales.ce * found.ce_factor_C * found.ce_C
            if found.kl_C is not None:
                kl_N[rows] = found.kl_C
                if kl_acts:
                    by_row = 1.0 if kl_weights_N is None else kl_weights_N[rows].to(kl_N)
                    scale = scales.kl
                    if plan.prompt_N is not None:
                        wide = (_scalar(x, kl_N.dtype, kl_N.device) for x in acting)
                        at_target, elsewhere = wide
                        scale = torch.where(plan.prompt_N[rows], elsewhere, at_target)
                    weighted_N[rows] += scale * by_row * found.kl_factor_C * found.kl_C
            if grad_ND is not None:
                grad_ND[rows] = dh_CD(unit)
        if grad_ND is not None and logits.shard.world_size > 1 and plan.num_computed:
            dist.all_reduce(grad_ND, group=logits.shard.group)  # pyright: ignore
    return Chunked(ce_N, kl_N, weighted_N, grad_ND)


class Chunked(NamedTuple):
    """Rows of losses, fp64 [N], and their gradient."""

    ce_N: Tensor
    kl_N: Tensor
    weighted_N: Tensor  # the scaled and weighted sum of both, whose gradient it is
    grad_ND: Tensor | None  # in at least fp32, summed over ranks; None if it was not wanted


# (h [C, D], h0 or None, targets [C], weights of both parts: numbers, or the KL's per row) -> the
# losses, and the gradient of h times a number, computed when it is called for.
_Gradient = Callable[[Tensor], Tensor]
_Chunk = Callable[
    [Tensor, Tensor | None, Tensor, Tensor, Tensor | float], tuple[ChunkLoss, _Gradient]
]


def _by_torch(
    logits: Logits, objective: Objective, dtype: torch.dtype, room: tuple[int, int], half: bool
) -> _Chunk:
    """Chunks by torch alone.

    Args:
        logits: the head.
        objective: what is descended.
        dtype: to compute in.
        room: rows of the largest chunk, and of how many models there are logits.
        half: whether the gradient's product is in the weight's half precision.
    """
    buffer = logits.new_buffer(math.prod(room), dtype)
    weight_vD = logits.weight_vD if half else None

    def chunk(
        h_CD: Tensor, h0_CD: Tensor | None, y_C: Tensor, ce: Tensor, kl: Tensor | float
    ) -> tuple[ChunkLoss, _Gradient]:
        s_Cv, e_Cv, slope_Cv = logits.project(h_CD, h0_CD, dtype, buffer)
        found = chunk_loss_(s_Cv, e_Cv, y_C, objective, logits.shard, ce, kl)
        return found, lambda unit: logits.pull_back(s_Cv, slope_Cv, weight_vD).mul_(unit)

    return chunk


def _by_kernels(
    logits: Logits, objective: Objective, dtype: torch.dtype, room: tuple[int, int], half: bool
) -> _Chunk:
    """Chunks by Triton's kernels, which read and write every logit twice."""
    from moored.loss import triton_loss

    buffer, weight_vD, gradient = logits.new_buffer(math.prod(room), dtype), None, None
    if half:
        # fp16's 11 bits round the gradient to 0.02 %, bf16's 8 to 0.17 %.
        weight_vD = triton_loss.to_half(logits.weight_vD)
        gradient = buffer.new_empty((room[0], buffer.shape[1]), dtype=weight_vD.dtype)

    def chunk(
        h_CD: Tensor, h0_CD: Tensor | None, y_C: Tensor, ce: Tensor, kl: Tensor | float
    ) -> tuple[ChunkLoss, _Gradient]:
        both_v, is_difference = logits.products(h_CD, h0_CD, dtype, buffer)
        s_Cv, t_Cv = both_v[: len(h_CD)], both_v[len(h_CD) :] if h0_CD is not None else None
        g_Cv = s_Cv if gradient is None else gradient[: len(h_CD)]
        parts = ce.expand(len(h_CD)), _scalar(kl, dtype, h_CD.device).expand(len(h_CD))
        weights_2C = torch.stack(parts)
        ce_C, kl_C, unscale_C = triton_loss.chunk_loss_(
            s_Cv, t_Cv, y_C, objective, logits, weights_2C, g_Cv, t_is_difference=is_difference
        )
        found = ChunkLoss(ce_C, kl_C)

        def dh_CD(unit: Tensor) -> Tensor:
            return logits.pull_back(g_Cv, None, weight_vD).mul_((unscale_C * unit)[:, None])

        return found, dh_CD

    return chunk


def kernels_run(logits: Logits, dtype: torch.dtype) -> bool:
    """Whether Triton can take over: on a GPU, in fp32."""
    found = logits.weight_vD.is_cuda and find_spec("triton") is not None
    return found and dtype == torch.float32


def _scalar(x: float | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A number on the device, without a copy that the host waits for."""
    if isinstance(x, Tensor):
        return x.to(device, dtype)
    return torch.full((), x, dtype=dtype, device=device)


def _not_0(x: Tensor) -> Tensor:
    return torch.where(x == 0, 1.0, x)


def chunk_size(chunk_tokens: int | None, num_tokens: int, logits: Logits) -> int:
    """Rows at a time; raises ValueError for a number below 1."""
    if chunk_tokens is None:
        on_gpu = logits.weight_vD.is_cuda
        return default_chunk_tokens(num_tokens, logits.shard, on_gpu=on_gpu)
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens={chunk_tokens}: at least 1 is needed")
    return chunk_tokens
