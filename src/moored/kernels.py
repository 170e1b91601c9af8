"""Triton kernels: products of both models to the loss and its gradient, in two passes.

The arithmetic of divergence.py and contrast.py for one chunk in fp32, in registers: the first pass
reads each logit once and leaves K numbers per token, the second reads each once more and writes the
gradient. A block of columns is to its row what a shard is to the vocabulary, so blocks are joined
by the same chain rule as shards, and all that is kept of a row is five numbers. Triton's
interpreter runs the kernels on a CPU, for the tests. fused.py launches them.

Legend: C tokens of the chunk, v this rank's columns without padding; s the policy's logits, e the
reference's minus the policy's (both over the temperature inside a KL); y the target's column here;
p and q the probabilities, d = log q - log p.
"""

# Triton is typed in part only, and its kernels are not Python.
# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

NUM_STATS = 6
# What is known of a row before its gradient: the loss; log mass at temperature 1 and the weights of
# both parts; log mass and log ratio of the KL, and its mean term; the gradient at y and the scale
# of all of it; p, k and d of y.
CE, KL, REST, A, W, MASS, RATIO, MEAN, GRAD_Y, SCALE, P_Y, K_Y, D_Y = map(tl.constexpr, range(13))
NUM_ROWS = 13


# ---------------------------------------------------------------- arithmetic of one number


@triton.jit
def _h(x):
    """e^x - 1 - x for |x| <= 0.5, to full relative accuracy: the series to x^8, off by < 5e-8."""
    series = 1 / 720 + x * (1 / 5040 + x * (1 / 40320))
    return x * x * (0.5 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x * series))))


@triton.jit
def _log1p(x):
    """log(1 + x): by its argument's own rounding (Higham, Accuracy and Stability, 1.14.1)."""
    u = 1 + x
    near = u == 1
    return tl.where(near, x, tl.log(u) * x / tl.where(near, 1.0, u - 1))


@triton.jit
def _log_cosh_half(d):
    """The log of cosh(d / 2), for |d| <= 0.5."""
    z = d * d * 0.25
    return z * (0.5 - z * (1 / 12 - z * (1 / 45 - z * (17 / 2520))))


@triton.jit
def _contrast_terms(p, q, d):
    """Differences k = q - p, and the terms >= 0 of KL(q || p) and KL(p || q), if both sum to 1."""
    near = tl.abs(d) <= 0.5
    h = _h(tl.where(near, d, 0.0))
    k = tl.where(near, p * (d + h), q - p)
    reverse = tl.where(near, p * h, k - p * d)
    forward = tl.where(near, p * (d * (d + h) - h), q * d - k)
    return k, forward, reverse


@triton.jit
def _log_mean_ratio(d):
    """log(m / p) with m = (p + q) / 2."""
    near = tl.abs(d) <= 0.5
    small = tl.where(near, d, 0.0)
    far = tl.maximum(d, 0.0) + tl.log(1 + tl.exp(-tl.abs(d))) - 0.6931471805599453
    return tl.where(near, small / 2 + _log_cosh_half(small), far)


@triton.jit
def _sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def _log_add(a, b):
    high, low = tl.maximum(a, b), tl.minimum(a, b)
    base = tl.where(high == float("-inf"), 0.0, high)
    return tl.where(high == float("-inf"), high, base + _log1p(tl.exp(low - base)))


@triton.jit
def _both_sums(a, b):
    return tl.split(tl.sum(tl.join(a, b), 0))


@triton.jit
def _chain(mass, ratio, kl, mass_b, ratio_b, kl_b, DIRECTION: tl.constexpr):
    """Two sets of columns as one: log mass, log ratio, KL, and the second's p, q and d.

    KL(q || p) = sum_i Q_i KL_i + KL(Q || P) over the sets' masses P and Q.
    """
    some, gap = mass_b > float("-inf"), mass_b - mass
    ratio = tl.where(mass > float("-inf"), ratio, ratio_b)  # of nothing: as the second's
    gap = tl.where(mass > float("-inf"), gap, float("inf"))
    gap = tl.where(some, gap, float("-inf"))
    step = tl.where(some, ratio_b - ratio, 0.0)
    p_b, p_a = _sigmoid(gap), _sigmoid(-gap)
    q_b, q_a = _sigmoid(gap + step), _sigmoid(-gap - step)
    near = tl.abs(step) <= 0.5
    small = tl.where(near, step, 0.0)
    # log(P_a + P_b e^step), by logarithms: either share may underflow.
    log_both = _log1p(tl.exp(-tl.abs(gap)))
    wide = _log_add(-tl.maximum(gap, 0.0) - log_both, -tl.maximum(-gap, 0.0) - log_both + step)
    shift = tl.where(near, _log1p(p_b * (small + _h(small))), wide)
    d_b = step - shift
    _, forward_a, reverse_a = _contrast_terms(p_a, q_a, -shift)
    _, forward_b, reverse_b = _contrast_terms(p_b, q_b, d_b)
    if DIRECTION == 1:
        kl = p_a * kl + p_b * kl_b + (reverse_a + reverse_b)
    else:
        kl = q_a * kl + q_b * kl_b + (forward_a + forward_b)
    return _log_add(mass, mass_b), ratio + shift, kl, p_b, q_b, d_b


# ---------------------------------------------------------------- blocks of columns


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
        # tanh x = 2 sigma(2x) - 1, and tanh(x + z) - tanh x = 2 sigma(2x) sigma(-2x - 2z) expm1(2z)
        x, z = 2 * s_b / cap, 2 * e_b / cap
        up, down = _sigmoid(x), _sigmoid(-x)
        slope = 4 * up * down
        s_b = cap * (up - down)
        if WITH_KL:
            small = tl.where(tl.abs(z) <= 0.5, z, 0.0)
            near = 2 * up * _sigmoid(-x - z) * (small + _h(small))
            e_b = cap * tl.where(tl.abs(z) <= 0.5, near, 2 * (_sigmoid(x + z) - up))
    return s_b, e_b, slope


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
    part, num_parts = tl.program_id(1), tl.num_programs(1)
    width = tl.cdiv(tl.cdiv(num_columns, BLOCK), num_parts) * BLOCK
    first = part * width
    last = tl.minimum(first + width, num_columns)
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
        if (start + BLOCK > num_columns) | ((y >= start) & (y < start + BLOCK)):
            keep = (columns < num_columns) & (columns != y)
            x, u = tl.where(keep, s_b, absent), tl.where(keep, e_b, 0.0)
        if WARM or not WITH_KL:
            new = tl.maximum(mass_1, tl.max(x, 0))
            base = tl.where(new == absent, 0.0, new)
            mass_1 = base + tl.log(tl.exp(mass_1 - base) + tl.sum(tl.exp(x - base), 0))
        if WITH_KL:
            x, u = x * cold, u * cold
            top, top_q = tl.split(tl.max(tl.join(x, x + u), 0))
            some = top > absent
            top, top_q = tl.where(some, top, 0.0), tl.where(some, top_q, 0.0)
            p, q = tl.exp(x - top), tl.exp(x + u - top_q)
            sum_p, sum_q = _both_sums(p, q)
            sum_p, sum_q = tl.where(some, sum_p, 1.0), tl.where(some, sum_q, 1.0)
            ratio_b = (top_q - top) + tl.log(sum_q) - tl.log(sum_p)
            p, q = p * (1 / sum_p), q * (1 / sum_q)
            k, forward, reverse = _contrast_terms(p, q, u - ratio_b)
            # The ratio turns out to be off by log(1 + off), and so does the KL.
            if DIRECTION == 0:
                off, kl_b = _both_sums(k, forward)
                kl_b = kl_b / (1 + off) - off * off * (0.5 - off * (2 / 3))
            elif DIRECTION == 1:
                off, kl_b = _both_sums(k, reverse)
                kl_b += off * off * (0.5 - off * (1 / 3))
            else:
                off, kl_b = tl.sum(k, 0), 0.0
            mass_b = tl.where(some, top + tl.log(sum_p), absent)
            mass, ratio, kl, _, _, _ = _chain(
                mass, ratio, kl, mass_b, ratio_b + _log1p(off), kl_b, DIRECTION
            )
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
        tl.store(out + 5 * num_rows + row, tl.maximum(kl, 0.0))
        if not WARM:
            mass_1 = mass
    tl.store(out + num_rows + row, mass_1)


@triton.jit
def join(
    stats, weights, rows, temperature,
    P: tl.constexpr, WITH_KL: tl.constexpr, MASKED: tl.constexpr,
    DIRECTION: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """One row: all shards' numbers to what the gradient needs, and the loss."""
    row, num_rows = tl.program_id(0), tl.num_programs(0)
    absent = float("-inf")
    s_y, rest, e_y, mass, ratio, kl = absent, absent, 0.0, absent, 0.0, 0.0
    for r in range(P):
        at = stats + r * (6 if WITH_KL else 2) * num_rows + row
        s_y = tl.maximum(s_y, tl.load(at))
        rest = _log_add(rest, tl.load(at + num_rows))
        if WITH_KL:
            e_y += tl.load(at + 2 * num_rows)
            mass, ratio, kl, _, _, _ = _chain(
                mass, ratio, kl,
                tl.load(at + 3 * num_rows), tl.load(at + 4 * num_rows), tl.load(at + 5 * num_rows),
                DIRECTION,
            )  # fmt: skip
    gap = rest - s_y
    miss = _sigmoid(gap)
    ce_weight = tl.load(weights + row)
    a = ce_weight * miss
    grad_y, size = -a, tl.abs(a)
    tl.store(rows + CE * num_rows + row, tl.maximum(gap, 0.0) + _log1p(tl.exp(-tl.abs(gap))))
    tl.store(rows + REST * num_rows + row, rest)
    if WITH_KL:
        w = tl.load(weights + num_rows + row) * temperature
        if not MASKED:
            mass, ratio, kl, p, q, d = _chain(
                mass, ratio, kl, s_y / temperature, e_y, 0.0, DIRECTION
            )
            k, _, _ = _contrast_terms(p, q, d)
            if DIRECTION == 0:
                grad_y += tl.where(w == 0, 0.0, -w * k)
            elif DIRECTION == 1:
                grad_y += tl.where(w == 0, 0.0, -w * p * (d + kl))
            tl.store(rows + P_Y * num_rows + row, p)
            tl.store(rows + K_Y * num_rows + row, k)
            tl.store(rows + D_Y * num_rows + row, d)
        # Entries of the gradient: |k| <= sqrt(KL / 2) (Pinsker), p |d| <= 2 sqrt(KL) + 2 KL.
        size += w * (1.0 if DIRECTION == 2 else 2 * tl.sqrt(kl) + 2 * kl)
        tl.store(rows + KL * num_rows + row, kl * temperature * temperature)
        tl.store(rows + MASS * num_rows + row, mass)
        tl.store(rows + RATIO * num_rows + row, ratio)
        tl.store(rows + MEAN * num_rows + row, kl)
    scale = 1.0
    if SCALED:
        scale = tl.where(size > 0, tl.exp2(12 - tl.ceil(tl.log2(size))), 1.0)
        scale = tl.minimum(scale, 1e30)
    if WITH_KL:
        tl.store(rows + W * num_rows + row, w * scale)
    tl.store(rows + A * num_rows + row, a * scale)
    tl.store(rows + GRAD_Y * num_rows + row, grad_y * scale)
    tl.store(rows + SCALE * num_rows + row, scale)


@triton.jit
def halfway(
    s, t, bias, targets, stride, rows, out, num_columns,
    scale: tl.constexpr, cap: tl.constexpr, cold: tl.constexpr,
    HAS_BIAS: tl.constexpr, CAPPED: tl.constexpr, DIFFERENCE: tl.constexpr, WITH_KL: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One row: this shard's parts of KL(p || m) and KL(q || m), m = (p + q) / 2, without y."""
    row, num_rows = tl.program_id(0), tl.num_programs(0)
    y = tl.load(targets + row)
    mass = tl.load(rows + MASS * num_rows + row)
    ratio = tl.load(rows + RATIO * num_rows + row)
    row_start = row.to(tl.int64) * stride
    to_p, to_q = 0.0, 0.0
    for start in range(0, num_columns, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        s_b, e_b, _ = _load(
            s, t, bias, row_start, columns, num_columns, scale, cap,
            HAS_BIAS, CAPPED, DIFFERENCE, WITH_KL,
        )  # fmt: skip
        keep = (columns < num_columns) & (columns != y)
        x = tl.where(keep, s_b * cold, float("-inf"))
        u = tl.where(keep, e_b * cold, 0.0)
        p, q, d = tl.exp(x - mass), tl.exp(x + u - (mass + ratio)), u - ratio
        near = tl.abs(d) <= 0.5
        small = tl.where(near, d, 0.0)
        c, far = _log_cosh_half(small), _log_mean_ratio(d)
        half = (q - p) / 2
        in_p = tl.where(near, p * (_h(small) / 2 - c), half - p * far)
        in_q = tl.where(near, q * (_h(-small) / 2 - c), -half - q * (far - d))
        sum_p, sum_q = _both_sums(in_p, in_q)
        to_p += sum_p
        to_q += sum_q
    tl.store(out + row, to_p)
    tl.store(out + num_rows + row, to_q)


@triton.jit
def gradient(
    s, t, bias, targets, stride, rows, out, out_stride, num_columns,
    scale: tl.constexpr, cap: tl.constexpr, cold: tl.constexpr,
    HAS_BIAS: tl.constexpr, CAPPED: tl.constexpr, DIFFERENCE: tl.constexpr, WITH_KL: tl.constexpr,
    DIRECTION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of a row: the weighted gradient of both parts of the loss."""
    row, num_rows = tl.program_id(0), tl.num_programs(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    s_b, e_b, slope = _load(
        s, t, bias, row.to(tl.int64) * stride, columns, num_columns, scale, cap,
        HAS_BIAS, CAPPED, DIFFERENCE, WITH_KL,
    )  # fmt: skip
    y = tl.load(targets + row)
    rest = tl.load(rows + REST * num_rows + row)
    g = tl.load(rows + A * num_rows + row) * tl.exp(s_b - rest)
    if WITH_KL:
        mass = tl.load(rows + MASS * num_rows + row)
        ratio = tl.load(rows + RATIO * num_rows + row)
        mean = tl.load(rows + MEAN * num_rows + row)
        w = tl.load(rows + W * num_rows + row)
        x, u = s_b * cold, e_b * cold
        p, d = tl.exp(x - mass), u - ratio
        if DIRECTION == 0:
            k, _, _ = _contrast_terms(p, tl.exp(x + u - (mass + ratio)), d)
        elif DIRECTION == 1:
            k = p * (d + mean)
        else:
            k = 0.5 * p * (_log_mean_ratio(d) + mean)
        g -= tl.where(w == 0, 0.0, w * k)  # a KL that is not finite would give 0 * nan
    g = tl.where(columns == y, tl.load(rows + GRAD_Y * num_rows + row), g)
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
