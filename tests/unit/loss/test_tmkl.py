"""tmkl_loss against the fp64 dense reference of tests/dense_reference.py, values and gradients.

Tolerances. u = 2^-24 (fp32; 2^-53 for fp64) is the rounding of one operation. A probability is
exp(s - L) with an argument of size up to R, the range of the logits, so it is off by at most
(R + c) u relatively, c counting the other roundings (sums are pairwise, hence of log2 V + a few);
d = e - D is off by 3 u max|e|. Both of them bound every term of the gradient, so its norm is off
by at most (R + 3 max|e| + 32) u, which `bound` is. Values add the step between series and closed
form of h(d) = expm1(d) - d at |d| = 0.02, where h loses 2u / 0.02 = 100 u. Stored in half
precision, a gradient is rounded twice (stored, then scaled by the backward): 2 u_half more.
Derived at length in docs/loss.md.
"""

from __future__ import annotations

import itertools
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import moored.loss.divergence
import moored.loss.softmax_pair
from dense_reference import dense_loss, many_digits
from moored.loss.tmkl import VocabShard, tmkl_loss

U = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.bfloat16: 2.0**-8,
    torch.float16: 2.0**-11,
}
DIRECTIONS = ("forward", "reverse", "jsd")


def arithmetic(dtype: torch.dtype) -> float:
    return U[torch.float64 if dtype == torch.float64 else torch.float32]


def spread(s: Tensor, t: Tensor) -> float:
    s, t = s.detach().double(), t.detach().double()
    return float((s.amax(-1) - s.amin(-1)).amax() + 3 * (t - s).abs().amax())


def bound(s: Tensor, t: Tensor) -> float:
    half = 2 * U[s.dtype] if s.dtype in (torch.bfloat16, torch.float16) else 0.0
    return (spread(s, t) + 32) * arithmetic(s.dtype) + half


def value_bound(s: Tensor, t: Tensor) -> float:
    return (spread(s, t) + 132) * arithmetic(s.dtype)


def reference_floor(s: Tensor, t: Tensor) -> float:
    """What the fp64 reference is off by, absolutely: it forms p_y - 1, p - q and log q - log p."""
    size = float(s.detach().double().abs().max()) if s.numel() else 0.0
    return (spread(s, t) + size + 32) * U[torch.float64] * math.sqrt(max(1, s.shape[0]))


def rel(a: Tensor, b: Tensor) -> float:
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm().clamp_min(1e-300))


def make(
    t: int, v: int, dtype: torch.dtype, *, noise: float = 0.5, scale: float = 4.0, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of both models, and targets of which one is ignored where t > 2."""
    g = torch.Generator().manual_seed(seed)
    s = (scale * torch.randn(t, v, generator=g, dtype=torch.float64)).to(dtype)
    ref = (s.double() + noise * torch.randn(t, v, generator=g, dtype=torch.float64)).to(dtype)
    y = torch.randint(0, v, (t,), generator=g)
    if t > 2:
        y[1] = -100
    return s.requires_grad_(), ref, y


def check(s: Tensor, t: Tensor, y: Tensor, **options: Any) -> None:
    out = tmkl_loss(s, t, y, **options)
    exact_s = s.detach().double().requires_grad_()
    loss, ce, kl = dense_loss(exact_s, t, y, **options)
    upstream = torch.linspace(-1, 2, out.loss.numel()).reshape(out.loss.shape)
    (grad,) = torch.autograd.grad(out.loss, s, upstream.to(out.loss.dtype))
    (exact,) = torch.autograd.grad(loss, exact_s, upstream.double())
    floor = reference_floor(s, t) * float(upstream.abs().max() if len(y) else 0.0)
    if s.dtype == torch.float16:  # below 2^-14 rounded to multiples of 2^-24, stored and scaled
        floor += 2.0**-24 * math.sqrt(grad.numel())
    assert (grad.double() - exact).norm() <= bound(s, t) * exact.norm() + floor
    for found, want in ((out.loss, loss), (out.ce, ce), (out.kl, kl)):
        error = (found.detach().double() - want).norm()
        assert error <= value_bound(s, t) * want.norm() + reference_floor(s, t) * len(y)
    assert grad.dtype == s.dtype
    assert not out.ce.requires_grad
    assert not out.kl.requires_grad
    valid = y != -100
    mask = options.get("kl_mask")
    assert out.num_targets.item() == int(valid.sum())
    assert out.num_kl.item() == int((valid if mask is None else valid & mask).sum())


@pytest.mark.parametrize("wide", [False, True], ids=["narrow", "wide"])
@pytest.mark.parametrize("dtype", U, ids=str)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("mask_target", [True, False], ids=["masked", "plain"])
def test_values_and_gradients(
    direction: str, mask_target: bool, dtype: torch.dtype, wide: bool, monkeypatch: Any
) -> None:
    if wide:  # the way that CUDA always takes
        monkeypatch.setattr(moored.loss.softmax_pair, "_NARROW", -1.0)
    shapes = [(1, 2), (3, 7), (9, 37), (2, 1031)]
    cases = itertools.product((1.0, 2.0, 0.7), (3.0, 0.05), shapes)
    for i, (temperature, noise, (t, v)) in enumerate(cases):
        s, ref, y = make(t, v, dtype, noise=noise, seed=i)
        if noise < 0.1 and dtype in (torch.bfloat16, torch.float16) and v == 2:
            continue  # masked, V = 2 has KL 0 whatever the logits; the rest is covered above
        check(
            s,
            ref,
            y,
            direction=direction,
            mask_target=mask_target,
            temperature=temperature,
            reduction=("mean", "sum", "none")[i % 3],
            kl_weight=(1.0, 0.3)[i % 2],
            kl_mask=torch.arange(t) % 4 != 2 if i % 5 else None,
        )


def test_values_and_gradients_of_cross_entropy_alone() -> None:
    for i, (dtype, reduction) in enumerate(itertools.product(U, ("mean", "sum", "none"))):
        s, ref, y = make(7, 29, dtype, seed=i)
        check(s, ref, y, kl_weight=0.0, reduction=reduction)
        (first,) = torch.autograd.grad(tmkl_loss(s, ref, y, kl_weight=0.0).loss, s)
        out = tmkl_loss(s, None, y, kl_weight=0.0)
        (second,) = torch.autograd.grad(out.loss, s)
        assert rel(first, second) <= bound(s, s)
        assert out.kl.item() == 0.0


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(
    t=st.integers(1, 6),
    v=st.integers(3, 70),
    seed=st.integers(0, 10_000),
    scale=st.sampled_from([0.0, 0.1, 3.0, 20.0]),
    noise=st.sampled_from([1e-3, 0.1, 2.0, 30.0]),
    offset=st.sampled_from([0.0, -3.0, 50.0]),
    direction=st.sampled_from(DIRECTIONS),
    mask_target=st.booleans(),
    temperature=st.floats(0.25, 8.0),
    kl_weight=st.floats(0.0, 10.0),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    reduction=st.sampled_from(["mean", "sum", "none"]),
)
def test_values_and_gradients_of_anything(
    t: int, v: int, seed: int, scale: float, noise: float, offset: float, **options: Any
) -> None:
    dtype = options.pop("dtype")
    s, ref, y = make(t, v, dtype, noise=noise, scale=scale, seed=seed)
    ref = (ref.double() + offset).to(dtype)
    options["kl_mask"] = torch.rand(t, generator=torch.Generator().manual_seed(seed)) < 0.8
    out = tmkl_loss(s, ref, y, **options)
    (grad,) = torch.autograd.grad(out.loss.sum(), s)
    exact_s = s.detach().double().requires_grad_()
    loss, ce, kl = dense_loss(exact_s, ref, y, **options)
    parts = [torch.autograd.grad(x.sum(), exact_s, retain_graph=True)[0] for x in (loss, ce, kl)]
    # The logits of the KL are those over the temperature, its gradient and value carry T and T^2.
    # The two gradients may cancel, so the error is relative to their sizes, not to the sum's.
    weight, tau = options["kl_weight"], options["temperature"]
    size = spread(s, ref) / min(1.0, tau) + 32
    floor = 8 * reference_floor(s, ref) / min(1.0, tau)
    # A log-ratio of size e is off by u e, which a KL far smaller than e^2 (few columns) feels.
    felt = weight * tau * arithmetic(dtype) * 3 * float((ref - s.detach()).abs().max())
    limit = size * arithmetic(dtype)
    error = (grad.double() - parts[0]).norm()
    sizes = parts[1].norm() + weight * parts[2].norm()
    assert error <= limit * sizes + felt * t + floor * (1 + weight * tau) * t
    assert ((out.ce.double() - ce).abs() <= limit * ce + floor * t).all()
    slack = tau * 3 * float((ref - s.detach()).abs().max()) * limit + floor * t * tau**2
    assert ((out.kl.double() - kl).abs() <= (limit + 100 * arithmetic(dtype)) * kl + slack).all()


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("mask_target", [True, False], ids=["masked", "plain"])
@pytest.mark.parametrize("kl", [1.0, 1e-2, 1e-4, 1e-6, 1e-8])
def test_the_kl_alone_keeps_its_accuracy_as_it_vanishes(
    kl: float, mask_target: bool, direction: str
) -> None:
    """With weight 1e12 the gradient is the KL's to 7 digits or more, and so is the loss.

    KL = noise^2 / 2, or an eighth of noise^2 for jsd. The fp32 logits are the inputs as they are:
    rounding them once more would move this gradient by u R / noise, at KL 1e-8 by a percent.
    """
    s, ref, y = make(3, 257, torch.float32, noise=math.sqrt(2 * kl), scale=5.0, seed=3)
    y[1] = 5
    options: dict[str, Any] = {"direction": direction, "mask_target": mask_target}
    out = tmkl_loss(s, ref, y, kl_weight=1e12, **options)
    (grad,) = torch.autograd.grad(out.loss, s)
    ce, want, ce_grad, kl_grad = many_digits(s.detach(), ref, y, **options)
    exact = (ce_grad + 1e12 * kl_grad) / 3
    assert 0.01 * kl < want.mean() < 3 * kl
    assert rel(grad, exact) <= min(bound(s, ref), 1e-5)
    assert rel(out.kl, want.mean()) <= value_bound(s, ref)
    assert rel(out.loss, (ce + 1e12 * want).mean()) <= value_bound(s, ref)
    each = tmkl_loss(s, ref, y, reduction="none", **options)
    assert ((each.kl.double() - want).abs() <= value_bound(s, ref) * want).all()


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("mask_target", [True, False], ids=["masked", "plain"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("miss", [1e-2, 1e-4, 1e-8, 1e-12])
def test_a_target_of_probability_near_one(
    miss: float, dtype: torch.dtype, mask_target: bool, direction: str
) -> None:
    """1 - p_y is not 1 minus p_y: each entry of CE's gradient is exact to (R + c) u by itself."""
    s, ref, y = make(5, 41, dtype, noise=0.1, scale=1.0, seed=2)
    y[1] = 3
    with torch.no_grad():
        rest = s.scatter(1, y[:, None], -math.inf).logsumexp(-1, keepdim=True)
        lead = math.log(1 / miss)
        s.scatter_(1, y[:, None], rest + lead)
        ref.scatter_(1, y[:, None], rest + lead + 0.2)
    options: dict[str, Any] = {"direction": direction, "mask_target": mask_target}
    ce, kl, ce_grad, kl_grad = many_digits(s.detach(), ref, y, **options)
    assert (ce / miss - 1).abs().max() < 0.01
    limit, value_limit = bound(s, ref), value_bound(s, ref)
    for kl_weight in (0.0, 1.0, 1e12):
        out = tmkl_loss(s, ref, y, kl_weight=kl_weight, reduction="none", **options)
        (grad,) = torch.autograd.grad(out.loss.sum(), s)
        exact = ce_grad + kl_weight * kl_grad
        assert rel(grad, exact) <= limit
        if kl_weight == 0.0:
            assert ((grad.double() - exact).abs() <= limit * exact.abs()).all()
        assert ((out.ce.double() - ce).abs() <= limit * ce).all()
        assert ((out.kl.double() - kl).abs() <= value_limit * kl).all()


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("mask_target", [True, False], ids=["masked", "plain"])
def test_equal_models_have_a_kl_and_kl_gradient_of_exactly_zero(
    direction: str, mask_target: bool
) -> None:
    for i, dtype in enumerate(U):
        s, _, y = make(5, 33, dtype, seed=i)
        options: dict[str, Any] = {"direction": direction, "mask_target": mask_target}
        out = tmkl_loss(s, s.detach(), y, kl_weight=1e6, temperature=1.7, **options)
        without = tmkl_loss(s, s.detach(), y, kl_weight=0.0, temperature=1.7, **options)
        assert out.kl.item() == 0.0
        assert torch.equal(out.loss, without.loss)
        heavy, light = (torch.autograd.grad(x.loss, s)[0] for x in (out, without))
        # Stored over the larger scale, then multiplied by it: two roundings more.
        limit = (3 if dtype in (torch.bfloat16, torch.float16) else 2) * U[dtype]
        if dtype != torch.float16:  # at weight 1e6 fp16 cannot hold a CE gradient 1e-6 of the unit
            assert rel(heavy, light) <= limit
        # The KL's own part, bitwise:
        s_Cv = s.detach().to(torch.float64 if dtype == torch.float64 else torch.float32).clone()
        goal = moored.loss.divergence.Objective(direction, mask_target, 1.7)  # type: ignore[arg-type]
        shard = VocabShard(0, 33, 33)
        kl_C = moored.loss.divergence.chunk_loss_(
            s_Cv, torch.zeros_like(s_Cv), y.clamp_min(0), goal, shard, 0.0, 1.0
        ).kl_C
        assert kl_C is not None
        assert torch.count_nonzero(kl_C) == 0
        assert torch.count_nonzero(s_Cv) == 0


def test_ignored_rows_take_part_in_nothing() -> None:
    s, ref, y = make(6, 11, torch.float32)
    y[4] = -100
    keep = y != -100
    few = tmkl_loss(s.detach()[keep].requires_grad_(), ref[keep], y[keep])
    with torch.no_grad():
        s[~keep], ref[~keep] = math.nan, math.inf
    out = tmkl_loss(s, ref, y)
    assert torch.equal(out.loss, few.loss)
    (grad,) = torch.autograd.grad(out.loss, s)
    assert torch.count_nonzero(grad[~keep]) == 0
    assert grad[keep].isfinite().all()
    each = tmkl_loss(s, ref, y, reduction="none")
    assert torch.count_nonzero(each.loss[~keep]) == 0
    custom = torch.where(y == -100, 5, y)
    custom[0] = y[0]
    assert tmkl_loss(s, ref, y.where(keep, -7), ignore_index=-7).loss == out.loss


def test_rows_outside_the_kl_mask_do_not_read_the_reference() -> None:
    s, ref, y = make(6, 11, torch.float32)
    kl_mask = torch.tensor([True, True, False, True, False, True])
    ref[~kl_mask] = math.nan
    out = tmkl_loss(s, ref, y, kl_mask=kl_mask)
    (grad,) = torch.autograd.grad(out.loss, s)
    assert out.loss.isfinite()
    assert grad.isfinite().all()
    check(s, torch.where(kl_mask[:, None], ref, 0.0), y, kl_mask=kl_mask)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_valid_target_gives_a_connected_zero(reduction: Any) -> None:
    for rows in (0, 4):
        for dtype in U:
            s = torch.randn(rows, 9).to(dtype).requires_grad_()
            y = torch.full((rows,), -100)
            out = tmkl_loss(s, s.detach() + 1, y, reduction=reduction)
            assert torch.count_nonzero(out.loss) == 0
            out.loss.sum().backward()
            assert s.grad is not None
            assert torch.count_nonzero(s.grad) == 0
            assert out.num_targets.item() == out.num_kl.item() == 0
            assert out.ce.shape == out.loss.shape == ((rows,) if reduction == "none" else ())


def test_no_row_with_a_kl() -> None:
    s, ref, y = make(6, 11, torch.float32)
    check(s, ref, y, kl_mask=torch.zeros(6, dtype=torch.bool))


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("mask_target", [True, False], ids=["masked", "plain"])
def test_padding_is_left_out_and_gets_gradient_zero(direction: Any, mask_target: bool) -> None:
    s, ref, y = make(5, 13, torch.float32)
    for fill in (0.0, 1e4, -math.inf, math.inf, math.nan):
        wide_s = torch.cat([s.detach(), torch.full((5, 3), fill)], 1).requires_grad_()
        wide_ref = torch.cat([ref, torch.full((5, 3), fill)], 1)
        options: dict[str, Any] = {"direction": direction, "mask_target": mask_target}
        out = tmkl_loss(wide_s, wide_ref, y, shard=VocabShard(0, 16, 13), **options)
        bare = tmkl_loss(s, ref, y, **options)
        assert torch.equal(out.loss, bare.loss)
        (grad,) = torch.autograd.grad(out.loss, wide_s)
        assert torch.equal(grad[:, :13], torch.autograd.grad(bare.loss, s)[0])
        assert torch.count_nonzero(grad[:, 13:]) == 0


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("mask_target", [True, False], ids=["masked", "plain"])
def test_columns_that_both_models_exclude(direction: Any, mask_target: bool) -> None:
    """Logits of -inf in both: as if the column did not exist (probability 0 in p and in q)."""
    s, ref, _ = make(4, 12, torch.float32)
    gone, kept = [0, 5, 11], [1, 2, 3, 4, 6, 7, 8, 9, 10]
    y = torch.tensor([0, 8, 3, 4])  # positions among the kept
    options: dict[str, Any] = {"direction": direction, "mask_target": mask_target}
    bare_s = s.detach()[:, kept].requires_grad_()
    bare = tmkl_loss(bare_s, ref[:, kept], y, **options)
    with torch.no_grad():
        s[:, gone] = -math.inf
        ref[:, gone] = -math.inf
    out = tmkl_loss(s, ref, torch.tensor(kept)[y], **options)
    assert rel(out.loss, bare.loss) <= value_bound(bare_s, ref[:, kept])
    (grad,) = torch.autograd.grad(out.loss, s)
    (want,) = torch.autograd.grad(bare.loss, bare_s)
    assert rel(grad[:, kept], want) <= bound(bare_s, ref[:, kept])
    assert torch.count_nonzero(grad[:, gone]) == 0
    with torch.no_grad():  # nothing left but the target
        s[:] = ref[:] = s.new_full((4, 12), -math.inf).scatter(1, y[:, None], 2.0)
    out = tmkl_loss(s, ref, y, **options)
    assert out.loss.item() == out.kl.item() == 0.0
    assert torch.count_nonzero(torch.autograd.grad(out.loss, s)[0]) == 0


@pytest.mark.parametrize("direction", ["forward", "jsd"])
@pytest.mark.parametrize("mask_target", [True, False], ids=["masked", "plain"])
def test_columns_that_only_the_reference_excludes(direction: Any, mask_target: bool) -> None:
    """Probability 0 in q and not in p: forward and jsd are finite; -1e4 stands for it in fp64."""
    s, ref, _ = make(4, 12, torch.float32)
    y = torch.tensor([1, 8, 3, 4])
    ref[:, [0, 5, 11]] = -math.inf
    out = tmkl_loss(s, ref, y, direction=direction, mask_target=mask_target)
    (grad,) = torch.autograd.grad(out.loss, s)
    exact_s = s.detach().double().requires_grad_()
    lowest = ref.double().clamp_min(-1e4)
    loss, _, kl = dense_loss(exact_s, lowest, y, direction=direction, mask_target=mask_target)
    (exact,) = torch.autograd.grad(loss, exact_s)
    kept = torch.where(ref.isinf(), s.detach(), ref)
    assert rel(out.kl, kl) <= value_bound(s, kept)
    assert rel(grad, exact) <= bound(s, kept)
    infinite = tmkl_loss(s, ref, y, direction="reverse", mask_target=mask_target)
    assert not infinite.kl.isfinite()


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("mask_target", [True, False], ids=["masked", "plain"])
@pytest.mark.parametrize("size", [30.0, 300.0, 1e4])
def test_huge_logits(direction: Any, mask_target: bool, size: float) -> None:
    """Logits of 1e4, models far apart: finite, and right to (R + c) u, R = 1e4 and more."""
    for dtype in (torch.float32, torch.float64):
        s, ref, y = make(6, 19, dtype, scale=size, noise=size)
        check(s, ref, y, direction=direction, mask_target=mask_target)
        constant = torch.full((6, 19), -size, dtype=dtype).requires_grad_()
        check(constant, constant.detach() + 1, y, direction=direction, mask_target=mask_target)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_masked_vocabulary_of_two_has_no_kl(direction: Any) -> None:
    """One column is left of two, so p = q = 1: the KL and its gradient are exactly 0."""
    s, ref, y = make(5, 2, torch.float32, noise=3.0)
    out = tmkl_loss(s, ref, y, direction=direction)
    assert out.kl.item() == 0.0
    alone = tmkl_loss(s, None, y, kl_weight=0.0)
    assert torch.equal(*(torch.autograd.grad(x.loss, s)[0] for x in (out, alone)))
    check(s, ref, y, direction=direction, mask_target=False)


def test_non_finite_inputs_show_in_the_loss() -> None:
    for value, which in itertools.product((math.nan, math.inf), (0, 1)):
        s, ref, y = make(3, 11, torch.float32)
        with torch.no_grad():
            (s, ref)[which][0, 4] = value
        y[0] = 2
        assert not tmkl_loss(s, ref, y).loss.isfinite()


def test_fp16_does_not_underflow_under_the_mean() -> None:
    """1024 tokens, upstream 2^16 as a gradient scaler gives: p / 1024 alone would be 0 in fp16."""
    g = torch.Generator().manual_seed(0)
    s = torch.randn(1024, 64, generator=g).half()
    s[:, :8] -= 8.0  # probabilities of 4e-6 and less, over 1024: 2^-28
    s.requires_grad_()
    ref = (s.detach().double() + 0.1 * torch.randn(1024, 64, generator=g)).half()
    y = torch.randint(8, 64, (1024,), generator=g)
    (grad,) = torch.autograd.grad(tmkl_loss(s, ref, y).loss * 2.0**16, s)
    exact_s = s.detach().double().requires_grad_()
    (exact,) = torch.autograd.grad(dense_loss(exact_s, ref, y)[0] * 2.0**16, exact_s)
    small, want = grad[:, :8].double(), exact[:, :8]
    # 2 u_half relatively, and half of the smallest fp16 number, 2^-24, times the factor 2^16/2^10.
    assert want.abs().min() / 2.0**16 < 2.0**-26
    assert ((small - want).abs() <= 3 * U[torch.float16] * want.abs() + 2.0**-24 * 64).all()
    assert rel(grad, exact) <= bound(s, ref)


def test_long_sums_keep_their_accuracy() -> None:
    """The rows' values are summed in fp64: 40,000 of them cost nothing beyond their own error."""
    s, ref, y = make(40_000, 3, torch.float32, noise=0.3)
    out = tmkl_loss(s.detach(), ref, y, reduction="sum")
    exact = torch.nn.functional.cross_entropy(s.detach().double(), y, reduction="sum")
    # Errors of single rows, u each, are random: 2 u for the sum is generous. fp32 adds 1 u.
    assert rel(out.ce, exact) <= 3 * U[torch.float32]


def test_inputs_of_any_layout_and_a_graph_above() -> None:
    s, ref, y = make(7, 23, torch.float32)
    want = tmkl_loss(s, ref, y)
    (grad,) = torch.autograd.grad(want.loss, s)
    strided = s.detach().t().contiguous().t().requires_grad_()
    out = tmkl_loss(strided, torch.cat([ref, ref], 1)[:, ::1][:, :23], y.repeat_interleave(2)[::2])
    assert torch.equal(out.loss, want.loss)
    assert torch.equal(torch.autograd.grad(out.loss, strided)[0], grad)
    leaf = s.detach().clone().requires_grad_()
    (tmkl_loss(leaf * 2 / 2, ref, y).loss * 3).backward()
    assert leaf.grad is not None
    assert rel(leaf.grad, 3 * grad) <= 2 * U[torch.float32]


def test_logits_of_two_dtypes() -> None:
    s, ref, y = make(7, 23, torch.float32)
    for mixed in (ref.double(), ref.bfloat16()):
        out = tmkl_loss(s, mixed, y)
        want = dense_loss(s.detach().double(), mixed, y)[0]
        assert rel(out.loss, want) <= value_bound(s, mixed)


def test_under_autocast() -> None:
    for dtype in U:
        s, ref, y = make(7, 23, dtype)
        want = tmkl_loss(s, ref, y)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = tmkl_loss(s, ref, y)
        assert torch.equal(out.loss, want.loss)
        assert torch.equal(*(torch.autograd.grad(x.loss, s)[0] for x in (out, want)))


def test_only_the_loss_is_differentiable_and_only_once() -> None:
    s, ref, y = make(4, 9, torch.float32)
    ref.requires_grad_()
    out = tmkl_loss(s, ref, y)
    upstream = torch.ones((), requires_grad=True)
    (grad,) = torch.autograd.grad(out.loss, s, upstream, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
    with pytest.raises(RuntimeError, match="differentiable once"):
        out.loss.backward()
    out = tmkl_loss(s, ref, y)
    out.loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        out.loss.backward()
    assert ref.grad is None
    with torch.no_grad():
        assert not tmkl_loss(s, ref, y).loss.requires_grad
    assert not tmkl_loss(s.detach(), ref, y).loss.requires_grad


class LargestTensor(TorchDispatchMode):
    """Remembers the largest storage that any operation makes."""

    def __init__(self, *given: Tensor) -> None:
        super().__init__()
        self.nbytes = 0
        self.given = {x.untyped_storage().data_ptr() for x in given}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in self.given:
                self.nbytes = max(self.nbytes, x.untyped_storage().nbytes())
        return out


def test_no_copy_of_the_logits_but_the_gradient(monkeypatch: Any) -> None:
    import moored.loss.tmkl

    monkeypatch.setattr(moored.loss.tmkl, "default_chunk_tokens", lambda *_a, **_k: 64)
    s, ref, y = make(4096, 400, torch.bfloat16)
    s.requires_grad_(False)
    with LargestTensor(s, ref, y) as seen:
        tmkl_loss(s, ref, y)  # no gradient: chunks of 64 rows in fp32, and blocks of 2^17
    assert seen.nbytes < s.nbytes / 4
    with LargestTensor(s, ref, y) as seen:
        tmkl_loss(s.requires_grad_(), ref, y).loss.backward()
    assert seen.nbytes == s.nbytes


def test_four_files_can_be_pasted_into_another_package(tmp_path: Path) -> None:
    """What tmkl.py imports, all the way down, with torch beside it and nothing else."""
    home, pasted = Path(moored.loss.divergence.__file__).parent, tmp_path / "pasted"
    names, waiting = set[str](), {"tmkl"}
    while waiting:
        name = waiting.pop()
        names.add(name)
        text = (home / f"{name}.py").read_text()
        waiting |= {*re.findall(r"moored\.loss\.(\w+) import", text)} - names
        pasted.mkdir(exist_ok=True)
        (pasted / f"{name}.py").write_text(text.replace("moored.loss.", "pasted."))
    assert names == {"tmkl", "rows", "divergence", "softmax_pair"}
    program = """
import sys, torch
before = set(sys.modules)
from pasted.tmkl import tmkl_loss
s = torch.linspace(-1, 2, 21).view(3, 7).requires_grad_()
tmkl_loss(s, s.detach().flip(1), torch.tensor([0, 3, -100])).loss.backward()
loaded = {name.split(".")[0] for name in set(sys.modules) - before}
print(s.grad.abs().sum().item(), loaded - {*sys.stdlib_module_names, "torch", "pasted"})
"""
    ran = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    s = torch.linspace(-1, 2, 21).view(3, 7).requires_grad_()
    tmkl_loss(s, s.detach().flip(1), torch.tensor([0, 3, -100])).loss.backward()
    assert s.grad is not None
    assert ran.stdout == f"{s.grad.abs().sum().item()} set()\n"


ROWS = torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"policy_logits": torch.zeros(4)}, ["policy_logits", "(4,)"]),
        ({"policy_logits": torch.zeros(4, 7).long()}, ["policy_logits", "int64"]),
        ({"reference_logits": torch.zeros(4, 8)}, ["reference_logits", "(4, 8)", "(4, 7)"]),
        ({"reference_logits": None}, ["reference_logits", "kl_weight"]),
        ({"targets": ROWS[:3]}, ["targets", "(3,)", "(4, 7)"]),
        ({"targets": ROWS.int()}, ["targets", "int32"]),
        ({"targets": ROWS + 7}, ["targets[0] = 7", "vocab_size=7"]),
        ({"targets": ROWS - 1}, ["targets[0] = -1", "vocab_size=7"]),
        ({"kl_mask": torch.ones(3, dtype=torch.bool)}, ["kl_mask", "(3,)", "(4, 7)"]),
        ({"kl_mask": torch.ones(4)}, ["kl_mask", "float32"]),
        ({"kl_weight": -1.0}, ["kl_weight=-1.0"]),
        ({"kl_weight": math.nan}, ["kl_weight=nan"]),
        ({"temperature": 0.0}, ["temperature=0.0"]),
        ({"direction": "backward"}, ["direction='backward'", "jsd"]),
        ({"reduction": "max"}, ["reduction='max'", "none"]),
        ({"shard": VocabShard(0, 9, 7)}, ["policy_logits", "(4, 7)", "9 columns"]),
    ],
)
def test_what_does_not_fit_is_named(changes: dict[str, Any], words: list[str]) -> None:
    arguments: dict[str, Any] = {
        "policy_logits": torch.zeros(4, 7),
        "reference_logits": torch.zeros(4, 7),
        "targets": ROWS,
    }
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the words below are the match)
        tmkl_loss(**arguments | changes)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((0, 1, 1), "vocab_size=1"),
        ((-1, 5, 5), r"\[-1, 5\)"),
        ((5, 4, 5), r"\[5, 4\)"),
        ((0, 3, 5), "must cover"),
        ((1, 5, 5), "must cover"),
    ],
)
def test_impossible_shards_are_refused(args: tuple[int, int, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        VocabShard(*args)


def test_a_vocabulary_of_one_is_refused() -> None:
    with pytest.raises(ValueError, match="vocab_size=1"):
        tmkl_loss(torch.zeros(4, 1), torch.zeros(4, 1), ROWS)


@pytest.mark.parametrize("mask_target", [True, False])
@pytest.mark.parametrize("direction", ["reverse", "jsd"])
@pytest.mark.parametrize(("lead", "reference_lead"), [(20, 10), (20, 0), (24, 20), (28, 5)])
def test_a_dominant_column_costs_no_digit(
    direction: str, mask_target: bool, lead: float, reference_lead: float
) -> None:
    """p (f - E f) cancels where p is nearly 1; but such a gradient sums to 0."""
    g = torch.Generator().manual_seed(int(lead + reference_lead))
    s, ref = torch.randn(24, 12, generator=g), torch.randn(24, 12, generator=g)
    s[:, 4] += lead
    ref[:, 4] += reference_lead
    s[::2, 6] += lead / 3
    y = torch.full((24,), 7 if mask_target else 4)
    options: dict[str, Any] = {"direction": direction, "mask_target": mask_target}
    s.requires_grad_()
    (grad,) = torch.autograd.grad(tmkl_loss(s, ref, y, reduction="sum", **options).loss, s)
    _, _, ce_grad, kl_grad = many_digits(s.detach().double(), ref.double(), y, **options)
    exact = ce_grad + kl_grad
    errors = (grad.double() - exact).norm(dim=1) / exact.norm(dim=1)
    assert float(errors.max()) <= bound(s, ref), "of the worst row alone"


def test_a_few_rows_with_a_heavy_kl_do_not_make_the_others_underflow() -> None:
    """Each group of rows is stored over its own scale; no row with a KL, no scale of it."""
    g = torch.Generator().manual_seed(0)
    s = (torch.randn(2048, 32, generator=g) * 2).half()
    ref, y = s + 0.1 * torch.randn(2048, 32, generator=g).half(), torch.randint(0, 32, (2048,))
    for num_kl in (0, 1):
        kl_mask = torch.arange(2048) < num_kl
        x = s.clone().requires_grad_()
        out = tmkl_loss(x, ref, y, kl_mask=kl_mask, kl_weight=100.0)
        (grad,) = torch.autograd.grad(out.loss * 2.0**16, x)
        exact_x = s.double().requires_grad_()
        exact_loss = dense_loss(exact_x, ref, y, kl_mask=kl_mask, kl_weight=100.0)[0]
        (exact,) = torch.autograd.grad(exact_loss * 2.0**16, exact_x)
        assert rel(grad[1:], exact[1:]) <= bound(s, ref)


def test_a_weight_of_zero_is_cross_entropy_alone_whatever_the_kl() -> None:
    s, ref, y = make(5, 9, torch.float32)
    broken = ref.clone()
    broken[:, 3], broken[1] = -math.inf, math.nan
    for temperature in (1.0, 2.0):
        options: dict[str, Any] = {"kl_weight": 0, "temperature": temperature}
        out = tmkl_loss(s, broken, y, direction="reverse", **options)
        (grad,) = torch.autograd.grad(out.loss, s)
        (exact,) = torch.autograd.grad(tmkl_loss(s, None, y, kl_weight=0).loss, s)
        assert rel(grad, exact) <= bound(s, s)


def test_the_weight_may_be_a_tensor_of_one_number() -> None:
    s, ref, y = make(5, 9, torch.float64)
    for weight in (torch.tensor(0.7), torch.tensor([0.7], requires_grad=True)):
        out = tmkl_loss(s, ref, y, kl_weight=weight)  # pyright: ignore
        same = tmkl_loss(s, ref, y, kl_weight=float(weight))
        assert out.loss.shape == ()
        assert torch.equal(out.loss, same.loss)
        grads = [torch.autograd.grad(x.loss, s)[0] for x in (out, same)]
        assert torch.equal(*grads)
    for weight in (None, "x", torch.ones(3)):
        with pytest.raises(ValueError, match="kl_weight"):
            tmkl_loss(s, ref, y, kl_weight=weight)  # pyright: ignore
