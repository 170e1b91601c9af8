"""One chunk of logits by Triton's kernels: what divergence.py does, on a GPU in two passes.

Legend: C tokens of the chunk, P ranks, v this rank's columns without padding, R what is known of a
row (kernels.py); s and t the products of the policy and the reference with the head.
"""

# Triton's launches are not typed.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import torch
import triton
from torch import Tensor

from moored.loss import kernels
from moored.loss.divergence import Objective, all_gather
from moored.loss.logits import Logits
from moored.loss.softmax_pair import exact_dtype, jsd_terms

# Columns at a time, the warps that share them, and the programs that share an unsharded row.
SUMMARY_BLOCK, SUMMARY_WARPS, SUMMARY_PARTS = 1024, 1, 4
GRADIENT_BLOCK, GRADIENT_WARPS = 1024, 4
CAST_BLOCK = 8192
CE, KL, MEAN, GRAD_Y = (getattr(kernels, x).value for x in ("CE", "KL", "MEAN", "GRAD_Y"))
SCALE, P_Y, K_Y, D_Y = (getattr(kernels, x).value for x in ("SCALE", "P_Y", "K_Y", "D_Y"))
DIRECTIONS = {"forward": 0, "reverse": 1, "jsd": 2}


def chunk_loss_(
    s_Cv: Tensor,
    t_Cv: Tensor | None,
    targets_C: Tensor,
    objective: Objective,
    logits: Logits,
    weights_2C: Tensor,
    out_Cv: Tensor,
    *,
    t_is_difference: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Per-token cross-entropy and KL (fp64 [C]) of one chunk, and its gradient in `out_Cv`.

    Args:
        s_Cv: products h W^T of the policy, fp32: bias, scale and cap are applied here.
        t_Cv: products of the reference, fp32; None for cross-entropy alone.
        targets_C: global ids; negative where there is none, so that there is a KL alone.
        objective: what is descended.
        logits: whose products these are.
        weights_2C: weights of the cross-entropy and of the KL in the gradient per row, fp32,
            about 1.
        out_Cv: receives the gradient of h W^T over the scale, in its own dtype; may be `s_Cv`.
        t_is_difference: `t_Cv` holds (h0 - h) W^T instead.

    Returns:
        The cross-entropies, the KLs, and what each row of the gradient is still to be multiplied
        with [C]: rows in fp16 are scaled by a power of two, so that small ones do not underflow.
    """
    shard, warm = logits.shard, objective.temperature != 1.0
    num_rows, num_columns = s_Cv.shape
    with_kl, is_jsd = t_Cv is not None, objective.direction == "jsd"
    is_split = with_kl and objective.is_split
    t_Cv = s_Cv if t_Cv is None else t_Cv
    y_C = targets_C - shard.start
    chunk = s_Cv, t_Cv, s_Cv if logits.bias_v is None else logits.bias_v, y_C, s_Cv.stride(0)
    shared = {
        "num_columns": num_columns,
        "scale": logits.scale,
        "cap": logits.softcap or 1.0,
        "cold": 1 / objective.temperature,
        "HAS_BIAS": logits.bias_v is not None,
        "CAPPED": logits.softcap is not None,
        "DIFFERENCE": t_is_difference,
        "WITH_KL": with_kl,
    }
    direction, at = DIRECTIONS[objective.direction], (num_rows,)
    blocks = {"BLOCK": SUMMARY_BLOCK, "num_warps": SUMMARY_WARPS} | shared
    num_stats = kernels.NUM_STATS if with_kl else 2
    num_parts = SUMMARY_PARTS if shard.world_size == 1 else 1  # the more ranks, the more rows
    stats_SKC = s_Cv.new_empty((num_parts, num_stats, num_rows))
    kernels.summary[num_rows, num_parts](
        *chunk, stats_SKC, WARM=warm, DIRECTION=direction, **blocks
    )
    stats_PKC = all_gather(stats_SKC, shard).view(-1, num_stats, num_rows)
    rows_RC = s_Cv.new_empty((kernels.NUM_ROWS.value, num_rows))
    has_target_C = targets_C >= 0
    weights_2C[0].mul_(has_target_C)
    kernels.join[at](
        stats_PKC, weights_2C, rows_RC, objective.temperature, len(stats_PKC),
        objective.target_weight, WITH_KL=with_kl, MASKED=objective.mask_target, DIRECTION=direction,
        SCALED=out_Cv.dtype == torch.float16, SPLIT=is_split,
        BY_BASE=objective.rest_factor == "base",
        SLOTS=triton.next_power_of_2(len(stats_PKC)), num_warps=1,
    )  # fmt: skip
    if with_kl and is_jsd:
        sums_S2C = s_Cv.new_empty((num_parts, 2, num_rows))
        kernels.halfway[num_rows, num_parts](*chunk, rows_RC, sums_S2C, **blocks)
        sums_2C = all_gather(sums_S2C, shard).double().sum((0, 1))
        _finish_jsd(rows_RC, sums_2C, weights_2C, objective)
    if num_columns:
        grid = (num_rows, triton.cdiv(num_columns, GRADIENT_BLOCK))
        kernels.gradient[grid](
            *chunk, rows_RC, out_Cv, out_Cv.stride(0), WARM=warm, MASKED=objective.mask_target,
            DIRECTION=direction, SPLIT=is_split, BLOCK=GRADIENT_BLOCK, num_warps=GRADIENT_WARPS,
            **shared,
        )  # fmt: skip
    ce_C, kl_C, scale_C = (rows_RC[i] for i in (CE, KL, SCALE))
    wide = exact_dtype(s_Cv)
    ce_C = torch.where(has_target_C, ce_C, 0.0)
    return ce_C.to(wide), kl_C.to(wide) if with_kl else None, 1 / scale_C


def to_half(weight_vD: Tensor) -> Tensor:
    """A weight in fp16, in half the time that torch takes to cast one."""
    out_vD = torch.empty(weight_vD.shape, dtype=torch.float16, device=weight_vD.device)
    weight_vD = weight_vD.contiguous()
    grid = (triton.cdiv(weight_vD.numel(), CAST_BLOCK),)
    kernels.cast[grid](weight_vD, out_vD, weight_vD.numel(), BLOCK=CAST_BLOCK, num_warps=8)
    return out_vD


def _finish_jsd(rows_RC: Tensor, sums_2C: Tensor, weights_2C: Tensor, objective: Objective) -> None:
    """What of a row is known only after the second collective of JSD."""
    if not objective.mask_target:
        p_C, k_C, d_C = (rows_RC[i].double() for i in (P_Y, K_Y, D_Y))
        to_p, to_q, log_m_C = jsd_terms(p_C, p_C + k_C, d_C)
        sums_2C = sums_2C + torch.stack([to_p, to_q])
        at_y_C = -0.5 * (log_m_C + p_C * sums_2C[0])
        rows_RC[GRAD_Y] += rows_RC[SCALE] * weights_2C[1] * objective.temperature * at_y_C
    rows_RC[KL] = 0.5 * sums_2C.sum(0) * objective.temperature**2
    rows_RC[MEAN] = sums_2C[0]
