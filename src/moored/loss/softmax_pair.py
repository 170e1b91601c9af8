"""Two softmax distributions over the same columns, compared without cancellation.

Holds the elementwise arithmetic of one set of columns; knows no target, no shard and no weight
(divergence.py), and imports torch alone. Derivations, and the equations that comments number:
docs/loss.md.

Legend: C rows, v columns, `_C1` one number per row. x the policy's logits, x + e the reference's;
p and q their probabilities, d = log q - log p, k = q - p.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

NEG_INF = float("-inf")

# Largest spread of e within a row for which exp(e - mean) can neither overflow nor matter where
# p has underflowed: exp(40) * 1e-38 < 1e-20.
_NARROW = 40.0


class Contrast(NamedTuple):
    """What p and q over some columns come to; each [C, 1], the probabilities normalised there."""

    log_mass: Tensor  # log sum exp(s)
    log_ratio: Tensor  # log sum exp(s + e) - log_mass
    kl_forward: Tensor  # KL(q || p)
    kl_reverse: Tensor  # KL(p || q)


def _top(x_Cv: Tensor) -> Tensor:
    top_C1 = x_Cv.amax(-1, keepdim=True)
    return torch.where(top_C1 == NEG_INF, 0.0, top_C1)


def softmax_(x_Cv: Tensor) -> Tensor:
    """Overwrite x with its softmax (0 where all is -inf) and return log sum exp(x) in fp64."""
    if x_Cv.shape[-1] == 0:
        return x_Cv.new_full((*x_Cv.shape[:-1], 1), NEG_INF, dtype=exact_dtype(x_Cv))
    top_C1 = x_Cv.amax(-1, keepdim=True)
    absent_C1 = top_C1 == NEG_INF
    if x_Cv.device.type == "cpu":
        # One kernel with an exp of its own takes half the time. Its largest p is 1 / the mass.
        torch.softmax(x_Cv, -1, out=x_Cv)
        if bool(absent_C1.any()):
            x_Cv.masked_fill_(absent_C1, 0.0)
        mass_C1 = 1 / x_Cv.amax(-1, keepdim=True).to(exact_dtype(x_Cv))
    else:
        mass_C1 = x_Cv.sub_(top_C1.masked_fill(absent_C1, 0.0)).exp_().sum(-1, keepdim=True)
        x_Cv.mul_(torch.where(absent_C1, 0.0, 1 / mass_C1))
    log_mass_C1 = mass_C1.to(exact_dtype(x_Cv)).log_().add_(top_C1)
    return log_mass_C1.masked_fill_(absent_C1, NEG_INF)


def contrast_(
    x_Cv: Tensor, e_Cv: Tensor, scratch_4Cv: Tensor | None = None
) -> tuple[Tensor, Contrast]:
    """Compare p = softmax(x) with q = softmax(x + e) without cancellation.

    Overwrites x with p and e with k = q - p, and returns d = log q - log p (in the scratch, if
    that is given: fresh memory costs a CPU more than the sums). Columns where x is -inf count as
    absent. Every result keeps its relative accuracy as e goes to 0: k = p expm1(d) (eq. 8), and the
    KLs are Bregman sums of terms >= 0 (eq. 9).
    """
    if x_Cv.shape[-1] == 0:
        zero_C1 = x_Cv.new_zeros((*x_Cv.shape[:-1], 1), dtype=exact_dtype(x_Cv))
        return e_Cv, Contrast(zero_C1 + NEG_INF, zero_C1, zero_C1, zero_C1)
    if scratch_4Cv is None:
        scratch_4Cv = x_Cv.new_empty((4, *x_Cv.shape))
    d_Cv, a_Cv, b_Cv, ph_Cv = scratch_4Cv[:, : len(x_Cv)].unbind()
    # The wide way needs no look at the data, which on a GPU would make the host wait.
    wide = x_Cv.is_cuda or not bool((e_Cv.amax(-1) - e_Cv.amin(-1)).amax() <= _NARROW)
    p_Cv, k_Cv, q_Cv = x_Cv, e_Cv, None
    # First a centre c near the log-ratio of the masses, then the rest of it by log1p (eq. 7): the
    # difference of two log masses is off by a rounding of their size, which is then in every d.
    if not wide:
        log_mass_C1 = softmax_(p_Cv)
        centre_C1 = torch.mul(p_Cv, e_Cv, out=a_Cv).sum(-1, keepdim=True)
        torch.sub(e_Cv, centre_C1, out=d_Cv)
        torch.expm1(d_Cv, out=k_Cv).mul_(p_Cv)
    else:
        top_C1 = _top(p_Cv)
        q_Cv = p_Cv.sub_(top_C1) + e_Cv
        log_mass_C1, log_mass_q_C1 = softmax_(p_Cv), softmax_(q_Cv)
        centre_C1 = torch.where(log_mass_C1 == NEG_INF, 0.0, log_mass_q_C1 - log_mass_C1)
        log_mass_C1 = log_mass_C1 + top_C1
        centre_C1 = centre_C1.to(e_Cv.dtype)
        torch.sub(e_Cv, centre_C1, out=d_Cv)
        # q - p is left without digits where the two are near, the product overflows where d is
        # large: each where it is exact (eq. 8).
        near_Cv = torch.expm1(d_Cv.clamp(-1, 1)).mul_(p_Cv)
        torch.where(d_Cv.abs() <= 1, near_Cv, q_Cv - p_Cv, out=k_Cv)
    off_C1 = torch.log1p(k_Cv.sum(-1, keepdim=True))
    log_ratio_C1 = off_C1.to(exact_dtype(x_Cv)) + centre_C1
    d_Cv.sub_(off_C1)
    # p expm1(d - off) of p expm1(d), likewise as a sum of products (eq. 8).
    k_Cv.mul_(torch.exp(-off_C1)).addcmul_(p_Cv, torch.expm1(-off_C1))

    # p h(d) (eq. 9), see _h: k - p d, but where d is small, so that the two are nearly equal, the
    # series. hardshrink and sign sort these apart, on a CPU many times faster than a boolean mask.
    torch.ops.aten.hardshrink.out(d_Cv, _tiny(d_Cv), out=a_Cv)
    torch.sub(d_Cv, a_Cv, out=b_Cv)
    torch.add(d_Cv.new_tensor(1 / 6), b_Cv, alpha=1 / 24, out=ph_Cv)
    torch.addcmul(d_Cv.new_tensor(0.5), b_Cv, ph_Cv, out=ph_Cv)
    ph_Cv.mul_(b_Cv).mul_(b_Cv).mul_(p_Cv)
    ph_Cv.add_(torch.sign(a_Cv, out=b_Cv).abs_().mul_(k_Cv)).sub_(a_Cv.mul_(p_Cv))
    reverse_C1 = ph_Cv.sum(-1, keepdim=True)
    # Not sum q d, whose terms cancel but for the KL: sum k d less the reverse KL (eq. 9).
    kd_Cv = torch.mul(k_Cv, d_Cv, out=b_Cv)
    if q_Cv is not None:  # q d - k for k d - p h, of which nothing is left where q = 0, d = -1e30
        qd_Cv = q_Cv.mul_(torch.exp(-off_C1)).mul_(d_Cv)
        kd_Cv = torch.where(d_Cv.abs() <= 1, kd_Cv - ph_Cv, qd_Cv - k_Cv)
        forward_C1 = kd_Cv.sum(-1, keepdim=True)
    else:
        forward_C1 = kd_Cv.sum(-1, keepdim=True) - reverse_C1
    return d_Cv, Contrast(
        log_mass_C1, log_ratio_C1, forward_C1.clamp_min(0), reverse_C1.clamp_min(0)
    )


def jsd_terms(p: Tensor, q: Tensor, d: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Terms >= 0 whose sums are KL(p || m) and KL(q || m), and p log(m / p), m = (p + q) / 2."""
    # Near: phi(d) (eq. 10), of order d^2, where p log(p / m) is of order d and cancels in the sum.
    near = d.abs() <= 1
    x = torch.where(near, d, 0.0)
    log_cosh = torch.log1p(2 * torch.sinh(x / 4).square())  # of d / 2; cosh itself rounds to 1
    zero, log_2 = torch.zeros_like(d), math.log(2)
    far, far_q = torch.logaddexp(d, zero) - log_2, torch.logaddexp(-d, zero) - log_2
    to_p = torch.where(near, p * (_h(x) / 2 - log_cosh), (q - p) / 2 - p * far)
    to_q = torch.where(near, q * (_h(-x) / 2 - log_cosh), (p - q) / 2 - q * far_q)
    return to_p, to_q, p * torch.where(near, d / 2 + log_cosh, far)


def _h(x: Tensor) -> Tensor:
    """h(x) = expm1(x) - x (eq. 9), by its series where the two are nearly equal."""
    series = x.square() * (0.5 + x * (1 / 6 + x * (1 / 24)))
    return torch.where(x.abs() <= _tiny(x), series, torch.expm1(x) - x)


def _tiny(x: Tensor) -> float:
    """Where three terms of the series of h and its closed form lose about as much, 2u / |x|."""
    return 3e-4 if x.dtype == torch.float64 else 0.02


def exact_dtype(x: Tensor) -> torch.dtype:
    """The dtype of numbers per row: fp64 where the device has it."""
    return torch.float32 if x.device.type == "mps" else torch.float64
