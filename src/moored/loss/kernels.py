"""Triton kernels: products of both models to the loss and its gradient, in two passes.

One chunk in fp32, in registers: the first pass reads each logit and leaves K numbers per token,
the second reads each once more and writes the gradient; all that is kept of a row is five numbers.
kernel_math.py has the arithmetic, and triton_loss.py launches the kernels; Triton's interpreter
runs them on a CPU, for the tests. Equations are numbered in docs/loss.md.

Legend: C tokens of the chunk, v this rank's columns without padding; s the policy's logits, e the
reference's minus the policy's; y the target's column here; p and q the probabilities.
"""

# Triton is typed in part only, and its kernels are not Python.
# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from moored.loss.kernel_math import (
    as_one,
    both_sums,
    chain,
    exp,
    expm1_rest,
    joined,
    log_cosh_half,
    log_mean_ratio,
    log_sum,
    loss_slope,
    settled,
    sigmoid,
)

NUM_STATS = 6
# What is known of a row before its gradient: the loss; log mass at temperature 1 and the weights of
# both parts; log mass and log ratio of the KL, and its mean term; the gradient at y and the scale
# of all of it; p, k and d of y; what p is multiplied with beside them, for target against rest.
CE, KL, REST, A, W, MASS, RATIO, MEAN, GRAD_Y, SCALE, P_Y, K_Y, D_Y = map(tl.constexpr, range(13))
PULL, NUM_ROWS = tl.constexpr(13), tl.constexpr(14)


@triton.jit
def _load(
    s, t, bias, row_start, columns, num_columns, scale: tl.constexpr, cap: tl.constexpr,
    HAS_BIAS: tl.constexpr, CAPPED: tl.constexpr, DIFFERENCE: tl.constexpr, WITH_KL: tl.constexpr,
):  # fmt: skip
    """A block of logits s, of e, and of the cap's slope at s; 0 where there is no column."""
    here = (columns >= 0) & (columns < num_columns)
    s_b = tl.load(s + row_start + columns, mask=here, other=0.0)
    e_b, slope = tl.zeros_like(s_b), s_b
    if WITH_KL:
        e_b = tl.load(t + row_start + columns, mask=here, other=0.0)
        e_b = (e_b if DIFFERENCE else e_b - s_b) * scale
    if HAS_BIAS:
        s_b += tl.load(bias + columns, mask=here, other=0.0).to(tl.float32)
    s_b = s_b * scale
    if CAPPED:
        # tanh x = sigma(2x) - sigma(-2x), and the difference of two that are near as a product
        # (eq. 11), here with x and z for 2x and 2z.
        x, z = 2 * s_b / cap, 2 * e_b / cap
        up, down = sigmoid(x), sigmoid(-x)
        slope = 4 * up * down
        s_b = cap * (up - down)
        if WITH_KL:
            small = tl.where(tl.abs(z) <= 0.5, z, 0.0)
            near = 2 * up * sigmoid(-x - z) * (small + expm1_rest(small))
            e_b = cap * tl.where(tl.abs(z) <= 0.5, near, 2 * (sigmoid(x + z) - up))
    return s_b, e_b, slope


@triton.jit
def _part(num_columns, BLOCK: tl.constexpr):
    """Which part of a row this program has, and its first column and the one after its last."""
    part, num_parts = tl.program_id(1), tl.num_programs(1)
    width = tl.cdiv(tl.cdiv(num_columns, BLOCK), num_parts) * BLOCK
    return part, part * width, tl.minimum(part * width + width, num_columns)


@triton.jit
def summary(
    s, t, bias, targets, stride, out, num_columns,
    scale: tl.constexpr, cap: tl.constexpr, cold: tl.constexpr,
    HAS_BIAS: tl.constexpr, CAPPED: tl.constexpr, DIFFERENCE: tl.constexpr, WITH_KL: tl.constexpr,
    WARM: tl.constexpr, DIRECTION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A part of a row: what its rank sends, without y: s_y, log mass at temperature 1; e_y, log
    mass, log ratio and KL of the objective's temperature and direction (none for jsd)."""  # noqa: D205, D209
    row, num_rows = tl.program_id(0), tl.num_programs(0)
    part, first, last = _part(num_columns, BLOCK)
    y = tl.load(targets + row)
    out += part * (6 if WITH_KL else 2) * num_rows
    row_start = row.to(tl.int64) * stride
    absent = float("-inf")
    mass_1, mass, ratio, kl = absent, absent, 0.0, 0.0
    for start in range(first, last, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        s_b, e_b, _ = _load(
            s, t, bias, row_start, columns, num_columns, scale, cap,
            HAS_BIAS, CAPPED, DIFFERENCE, WITH_KL,
        )  # fmt: skip
        x, u = s_b, e_b
        # The masking: y is in no sum, as in `mask_target_` (eq. 5).
        if (start + BLOCK > num_columns) | ((y >= start) & (y < start + BLOCK)):
            keep = (columns < num_columns) & (columns != y)
            x, u = tl.where(keep, s_b, absent), tl.where(keep, e_b, 0.0)
        if WARM or not WITH_KL:
            new = tl.maximum(mass_1, tl.max(x, 0))
            base = tl.where(new == absent, 0.0, new)
            mass_1 = base + tl.log(exp(mass_1 - base) + tl.sum(exp(x - base), 0))
        if WITH_KL:
            mass_b, ratio_b, kl_b, _, _ = as_one(x * cold, u * cold, DIRECTION)
            mass, ratio, kl, _, _, _ = chain(mass, ratio, kl, mass_b, ratio_b, kl_b, DIRECTION)
    own = (y >= first) & (y < last)
    s_y, e_y, _ = _load(
        s, t, bias, row_start, y + tl.arange(0, 1), num_columns, scale, cap,
        HAS_BIAS, CAPPED, DIFFERENCE, WITH_KL,
    )  # fmt: skip
    tl.store(out + row, tl.where(own, tl.sum(s_y, 0), absent))
    if WITH_KL:
        tl.store(out + 2 * num_rows + row, tl.where(own, tl.sum(e_y, 0) * cold, 0.0))
        tl.store(out + 3 * num_rows + row, mass)
        tl.store(out + 4 * num_rows + row, ratio)
        tl.store(out + 5 * num_rows + row, kl)
        if not WARM:
            mass_1 = mass
    tl.store(out + num_rows + row, mass_1)


@triton.jit
def join(
    stats, weights, rows, temperature, num_parts, target_weight: tl.constexpr,
    WITH_KL: tl.constexpr, MASKED: tl.constexpr, DIRECTION: tl.constexpr, SCALED: tl.constexpr,
    SPLIT: tl.constexpr, BY_BASE: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """One row: all shards' numbers to what the gradient needs, and the loss."""
    row, num_rows = tl.program_id(0), tl.num_programs(0)
    absent = float("-inf")
    part = tl.arange(0, SLOTS)
    here = part < num_parts
    at = stats + part * (6 if WITH_KL else 2) * num_rows + row
    s_y = tl.max(tl.load(at, mask=here, other=absent), 0)
    rest = log_sum(tl.load(at + num_rows, mask=here, other=absent))
    e_y, mass, ratio, kl, kl_weight = 0.0, absent, 0.0, 0.0, 0.0
    if WITH_KL:
        e_y = tl.sum(tl.load(at + 2 * num_rows, mask=here, other=0.0), 0)
        mass, ratio, kl = joined(
            tl.load(at + 3 * num_rows, mask=here, other=absent),
            tl.load(at + 4 * num_rows, mask=here, other=0.0),
            tl.load(at + 5 * num_rows, mask=here, other=0.0),
            DIRECTION,
        )  # fmt: skip
        kl_weight = tl.load(weights + num_rows + row)
    found = settled(
        s_y, rest, e_y, mass, ratio, kl, tl.load(weights + row), kl_weight, temperature,
        target_weight, WITH_KL, MASKED, DIRECTION, SCALED, SPLIT, BY_BASE,
    )  # fmt: skip
    for i in tl.static_range(NUM_ROWS):
        tl.store(rows + i * num_rows + row, found[i])


@triton.jit
def halfway(
    s, t, bias, targets, stride, rows, out, num_columns,
    scale: tl.constexpr, cap: tl.constexpr, cold: tl.constexpr,
    HAS_BIAS: tl.constexpr, CAPPED: tl.constexpr, DIFFERENCE: tl.constexpr, WITH_KL: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A part of a row: its share of KL(p || m) and KL(q || m), m = (p + q) / 2, without y."""
    row, num_rows = tl.program_id(0), tl.num_programs(0)
    part, first, last = _part(num_columns, BLOCK)
    y = tl.load(targets + row)
    out += part * 2 * num_rows
    mass = tl.load(rows + MASS * num_rows + row)
    ratio = tl.load(rows + RATIO * num_rows + row)
    row_start = row.to(tl.int64) * stride
    to_p, to_q = 0.0, 0.0
    for start in range(first, last, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        s_b, e_b, _ = _load(
            s, t, bias, row_start, columns, num_columns, scale, cap,
            HAS_BIAS, CAPPED, DIFFERENCE, WITH_KL,
        )  # fmt: skip
        keep = (columns < num_columns) & (columns != y)
        x = tl.where(keep, s_b * cold, float("-inf"))
        u = tl.where(keep, e_b * cold, 0.0)
        p, q, d = exp(x - mass), exp(x + u - (mass + ratio)), u - ratio
        # Near each other phi(d) (eq. 10), of order d^2; p log(p / m) is of order d, and cancels.
        near = tl.abs(d) <= 0.5
        small = tl.where(near, d, 0.0)
        c, far = log_cosh_half(small), log_mean_ratio(d)
        half = (q - p) / 2
        in_p = tl.where(near, p * (expm1_rest(small) / 2 - c), half - p * far)
        in_q = tl.where(near, q * (expm1_rest(-small) / 2 - c), -half - q * (far - d))
        sum_p, sum_q = both_sums(in_p, in_q)
        to_p += sum_p
        to_q += sum_q
    tl.store(out + row, to_p)
    tl.store(out + num_rows + row, to_q)


@triton.jit
def gradient(
    s, t, bias, targets, stride, rows, out, out_stride, num_columns,
    scale: tl.constexpr, cap: tl.constexpr, cold: tl.constexpr,
    HAS_BIAS: tl.constexpr, CAPPED: tl.constexpr, DIFFERENCE: tl.constexpr, WITH_KL: tl.constexpr,
    WARM: tl.constexpr, MASKED: tl.constexpr, DIRECTION: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of a row: the weighted gradient of both parts of the loss."""
    row, num_rows = tl.program_id(0), tl.num_programs(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    s_b, e_b, slope = _load(
        s, t, bias, row.to(tl.int64) * stride, columns, num_columns, scale, cap,
        HAS_BIAS, CAPPED, DIFFERENCE, WITH_KL,
    )  # fmt: skip
    y = tl.load(targets + row)
    kept = rows + row
    pull = 0.0
    if SPLIT:
        pull = tl.load(kept + PULL * num_rows)
    g = loss_slope(
        s_b, e_b,
        tl.load(kept + REST * num_rows), tl.load(kept + A * num_rows),
        tl.load(kept + W * num_rows), tl.load(kept + MASS * num_rows),
        tl.load(kept + RATIO * num_rows), tl.load(kept + MEAN * num_rows), pull,
        cold, WITH_KL, DIRECTION, WITH_KL and MASKED and not WARM, SPLIT,
    )  # fmt: skip
    g = tl.where(columns == y, tl.load(kept + GRAD_Y * num_rows), g)
    if CAPPED:
        g = g * slope
    g = g.to(out.dtype.element_ty)
    at = out + row.to(tl.int64) * out_stride + columns
    tl.store(at, g, mask=columns < num_columns)


@triton.jit
def cast(x, out, count, BLOCK: tl.constexpr):
    """Numbers in fp16."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at, mask=at < count).to(tl.float16), mask=at < count)
