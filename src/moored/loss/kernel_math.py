"""The arithmetic of divergence.py and softmax_pair.py inside Triton's kernels: fp32, in registers.

Functions of numbers, and of sets of columns or of parts of a row. A part is to its row what a shard
is to the vocabulary, so that all are joined by the same chain rule. kernels.py applies them;
equations are numbered in docs/loss.md.

Legend: s the policy's logits, e the reference's minus the policy's (both over the temperature
inside a KL); y the target's column; p and q the probabilities, d = log q - log p, k = q - p.
"""

# Triton is typed in part only, and its kernels are not Python.
# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

# ---------------------------------------------------------------- arithmetic of one number


@triton.jit
def exp(x):
    """e^x, what would be subnormal 0: tl.exp takes three instructions more to keep it."""
    return tl.exp2(x * 1.4426950408889634)


@triton.jit
def expm1_rest(x):
    """h(x) = e^x - 1 - x (eq. 9) for |x| <= 0.5, where that cancels: its series, off by < 5e-8."""
    series = 1 / 720 + x * (1 / 5040 + x * (1 / 40320))
    return x * x * (0.5 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x * series))))


@triton.jit
def log1p(x):
    """log(1 + x): by its argument's own rounding (Higham, Accuracy and Stability, 1.14.1)."""
    u = 1 + x
    near = u == 1
    return tl.where(near, x, tl.log(u) * x / tl.where(near, 1.0, u - 1))


@triton.jit
def log_cosh_half(d):
    """The log of cosh(d / 2) (eq. 10) for |d| <= 0.5, a series: cosh itself rounds to 1."""
    z = d * d * 0.25
    return z * (0.5 - z * (1 / 12 - z * (1 / 45 - z * (17 / 2520))))


@triton.jit
def contrast_terms(p, q, d):
    """Differences k = q - p, and the terms >= 0 of KL(q || p) and KL(p || q), if both sum to 1."""
    # Near each other all three would cancel as differences: products with expm1(d) = d + h and h
    # (eq. 8, eq. 9). Far apart nothing does, and q d is 0 where q is, however large p d.
    near = tl.abs(d) <= 0.5
    h = expm1_rest(tl.where(near, d, 0.0))
    k = tl.where(near, p * (d + h), q - p)
    reverse = tl.where(near, p * h, k - p * d)
    forward = tl.where(near, p * (d * (d + h) - h), q * d - k)
    return k, forward, reverse


@triton.jit
def log_mean_ratio(d):
    """log(m / p) with m = (p + q) / 2."""
    near = tl.abs(d) <= 0.5
    small = tl.where(near, d, 0.0)  # log 2 would be taken off a number near it (eq. 10)
    far = tl.maximum(d, 0.0) + tl.log(1 + exp(-tl.abs(d))) - 0.6931471805599453
    return tl.where(near, small / 2 + log_cosh_half(small), far)


@triton.jit
def sigmoid(x):
    """1 / (1 + e^-x)."""
    return 1 / (1 + exp(-x))


@triton.jit
def _log_add(a, b):
    high, low = tl.maximum(a, b), tl.minimum(a, b)
    base = tl.where(high == float("-inf"), 0.0, high)
    return tl.where(high == float("-inf"), high, base + log1p(exp(low - base)))


@triton.jit
def both_sums(a, b):
    """Two sums in one reduction."""
    return tl.split(tl.sum(tl.join(a, b), 0))


@triton.jit
def chain(mass, ratio, kl, mass_b, ratio_b, kl_b, DIRECTION: tl.constexpr):
    """Two sets of columns as one: log mass, log ratio, KL, and the second's p, q and d.

    KL(q || p) = sum_i Q_i KL_i + KL(Q || P) over the sets' masses P and Q (eq. 14).
    """
    some, gap = mass_b > float("-inf"), mass_b - mass
    ratio = tl.where(mass > float("-inf"), ratio, ratio_b)  # of nothing: as the second's
    gap = tl.where(mass > float("-inf"), gap, float("inf"))
    gap = tl.where(some, gap, float("-inf"))
    step = tl.where(some, ratio_b - ratio, 0.0)
    p_b, p_a = sigmoid(gap), sigmoid(-gap)  # not 1 - p_b, which is 0 as soon as p_b rounds to 1
    q_b, q_a = sigmoid(gap + step), sigmoid(-gap - step)
    near = tl.abs(step) <= 0.5
    small = tl.where(near, step, 0.0)
    # log(P_a + P_b e^step) as log1p(P_b expm1(step)) (eq. 7); for a large step by logarithms, as
    # either share may underflow.
    log_both = log1p(exp(-tl.abs(gap)))
    wide = _log_add(-tl.maximum(gap, 0.0) - log_both, -tl.maximum(-gap, 0.0) - log_both + step)
    shift = tl.where(near, log1p(p_b * (small + expm1_rest(small))), wide)
    d_b = step - shift
    _, forward_a, reverse_a = contrast_terms(p_a, q_a, -shift)
    _, forward_b, reverse_b = contrast_terms(p_b, q_b, d_b)
    if DIRECTION == 1:
        kl = p_a * kl + p_b * kl_b + (reverse_a + reverse_b)
    else:
        kl = q_a * kl + q_b * kl_b + (forward_a + forward_b)
    return _log_add(mass, mass_b), ratio + shift, kl, p_b, q_b, d_b


# ---------------------------------------------------------------- sets of columns


@triton.jit
def as_one(x, u, DIRECTION: tl.constexpr):
    """Columns as one: their log mass, log ratio and KL (none for jsd), and each one's p and q.

    Given are x, log masses, -inf for a column that is not there; and u, log ratios, 0 there.
    """
    absent = float("-inf")
    top, top_q = tl.split(tl.max(tl.join(x, x + u), 0))
    some = top > absent
    top, top_q = tl.where(some, top, 0.0), tl.where(some, top_q, 0.0)
    p, q = exp(x - top), exp(x + u - top_q)
    sum_p, sum_q = both_sums(p, q)
    sum_p, sum_q = tl.where(some, sum_p, 1.0), tl.where(some, sum_q, 1.0)
    ratio = (top_q - top) + tl.log(sum_q) - tl.log(sum_p)
    p, q = p * (1 / sum_p), q * (1 / sum_q)
    k, forward, reverse = contrast_terms(p, q, u - ratio)
    # The ratio, a difference of two log masses, is off by their rounding: by how much is known from
    # the sum of k, which should be 0, and taken out of ratio and KL (eq. 20).
    if DIRECTION == 0:
        off, kl = both_sums(k, forward)
        kl = kl / (1 + off) - off * off * (0.5 - off * (2 / 3))
    elif DIRECTION == 1:
        off, kl = both_sums(k, reverse)
        kl -= off * off * (0.5 - off * (1 / 3))
    else:
        off, kl = tl.sum(k, 0), 0.0
    return tl.where(some, top + tl.log(sum_p), absent), ratio + log1p(off), kl, p, q


@triton.jit
def log_sum(x):
    """Log sum e^x; -inf of nothing."""
    top = tl.max(x, 0)
    base = tl.where(top == float("-inf"), 0.0, top)
    return base + tl.log(tl.sum(exp(x - base), 0))


@triton.jit
def joined(mass, ratio, kl, DIRECTION: tl.constexpr):
    """Sets of columns as one, each with its log mass (-inf if empty), log ratio and KL.

    KL(q || p) = sum_i Q_i KL_i + KL(Q || P) over the sets' masses P and Q (eq. 14).
    """
    mass, ratio, between, p, q = as_one(mass, ratio, DIRECTION)
    within = tl.sum((p if DIRECTION == 1 else q) * kl, 0)
    kl = within + between
    return mass, ratio, tl.where(kl < 0, 0.0, kl)


@triton.jit
def settled(
    s_y, rest, e_y, mass, ratio, kl, ce_weight, kl_weight, temperature,
    target_weight: tl.constexpr,
    WITH_KL: tl.constexpr, MASKED: tl.constexpr, DIRECTION: tl.constexpr, SCALED: tl.constexpr,
    SPLIT: tl.constexpr, BY_BASE: tl.constexpr,
):  # fmt: skip
    """A row's numbers to what its loss and gradient need, in the order of kernels.py."""
    # From g (eq. 5), as log p_y and 1 - p_y keep no digit of a p_y near 1.
    gap = rest - s_y
    a = ce_weight * sigmoid(gap)
    ce = tl.maximum(gap, 0.0) + log1p(exp(-tl.abs(gap)))
    grad_y, size = -a, tl.abs(a)
    w, p, k, d, pull = 0.0, 0.0, 0.0, 0.0, 0.0
    if WITH_KL:
        w = kl_weight * temperature
        if SPLIT:  # target against rest, and its factor for the rest (eq. 21, eq. 22)
            _, ratio_all, between, p_y, q_y, d_y = chain(
                mass, ratio, 0.0, s_y / temperature, e_y, 0.0, DIRECTION
            )
            odds = mass - s_y / temperature
            p_rest, q_rest = sigmoid(odds), sigmoid(odds + (ratio - e_y))
            k_y, _, _ = contrast_terms(p_y, q_y, d_y)
            k_rest, _, _ = contrast_terms(p_rest, q_rest, ratio - ratio_all)
            # Each is minus the other; the more probable's d, a difference, has no digits (eq. 12).
            k_y = tl.where(p_y <= p_rest, k_y, -k_rest)
            pull = tl.where(w == 0, 0.0, w * target_weight * k_y)
            grad_y -= pull
            size += w * target_weight * (2 * tl.sqrt(between) + 2 * between)
            if BY_BASE:
                w, kl = w * q_rest, q_rest * kl
            kl += target_weight * between
        if not MASKED:  # y joins as a set of its own
            mass, ratio, kl, p, q, d = chain(
                mass, ratio, kl, s_y / temperature, e_y, 0.0, DIRECTION
            )
            k, _, _ = contrast_terms(p, q, d)
            if DIRECTION == 0:
                grad_y += tl.where(w == 0, 0.0, -w * k)
            elif DIRECTION == 1:
                grad_y += tl.where(w == 0, 0.0, -w * p * (d + kl))
        # The size of the gradient's largest entry (eq. 19), jsd's at most w.
        size += w * (1.0 if DIRECTION == 2 else 2 * tl.sqrt(kl) + 2 * kl)
    scale = 1.0
    if SCALED:
        scale = tl.where(size > 0, tl.exp2(12 - tl.ceil(tl.log2(size))), 1.0)
        scale = tl.minimum(scale, 1e30)
    scaled_kl = kl * temperature * temperature
    return (
        ce, scaled_kl, rest, a * scale, w * scale, mass, ratio, kl, grad_y * scale, scale, p, k, d,
        pull * scale,
    )  # fmt: skip


@triton.jit
def loss_slope(
    s, e, rest, a, w, mass, ratio, mean, pull, cold: tl.constexpr, WITH_KL: tl.constexpr,
    DIRECTION: tl.constexpr, SAME: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """The weighted gradient of both parts of the loss at columns other than the target's."""
    x, u = s * cold, e * cold
    p = exp(x - mass)
    g = a * (p if SAME else exp(s - rest))
    if WITH_KL:
        d = u - ratio
        if DIRECTION == 0:
            k, _, _ = contrast_terms(p, exp(x + u - (mass + ratio)), d)
        elif DIRECTION == 1:
            k = p * (d + mean)
        else:
            k = 0.5 * p * (log_mean_ratio(d) + mean)
        g -= tl.where(w == 0, 0.0, w * k)  # a KL that is not finite would give 0 * nan
        if SPLIT:
            g += tl.where(pull == 0, 0.0, pull * p)
    return g
