"""The KL of its two parts: target against rest, and within the rest (`target_weight`)."""

from __future__ import annotations

import itertools
import math
from typing import Any

import mpmath
import pytest
import torch
from torch import Tensor

import moored.loss.chunks
from dense_reference import dense_logits, dense_loss, dense_with_prompt, gradient_bound
from moored.loss import triton_loss
from moored.loss.divergence import Objective
from moored.loss.head import linear_tmkl_loss
from moored.loss.tmkl import tmkl_loss

U = {torch.float64: 2.0**-53, torch.float32: 2.0**-24}
SPLITS = [(0.5, "one"), (0.0, "base"), (1.0, "base"), (2.0, "base")]
split = pytest.mark.parametrize(("target_weight", "rest_factor"), SPLITS)


def rel(a: Tensor, b: Tensor) -> float:
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm().clamp_min(1e-300))


def make(v: int, dtype: torch.dtype, noise: float) -> tuple[Tensor, ...]:
    """h, h0 [9, 8], W [v, 8]; targets, of which row 1 has none."""
    g = torch.Generator().manual_seed(v)
    h = torch.randn(9, 8, generator=g, dtype=torch.float64)
    h0 = h + noise / 4 * torch.randn(9, 8, generator=g, dtype=torch.float64)
    weight = 4 / math.sqrt(8) * torch.randn(v, 8, generator=g, dtype=torch.float64)
    y = torch.randint(0, v, (9,), generator=g)
    y[5:] = (h @ weight.T)[5:].argmax(1)  # targets that the policy is sure of
    y[1] = -100
    return h.to(dtype).requires_grad_(), h0.to(dtype), weight.to(dtype), y


@pytest.mark.parametrize("dtype", U, ids=str)
@split
def test_both_losses_equal_the_dense_reference(
    target_weight: float, rest_factor: Any, dtype: torch.dtype
) -> None:
    parts: dict[str, Any] = {"target_weight": target_weight, "rest_factor": rest_factor}
    for v, temperature, noise in itertools.product((2, 41, 300), (1.0, 2.5), (0.1, 3.0)):
        h, h0, weight, y = make(v, dtype, noise)
        options = {"kl_weight": 0.8, "temperature": temperature, **parts}
        limit = 2 * (gradient_bound(h, h0, weight) + 100) * U[dtype] + 1e-12
        out = linear_tmkl_loss(h, h0, weight, y, chunk_tokens=4, **options)
        (grad,) = torch.autograd.grad(out.loss, h)
        exact = h.detach().double().requires_grad_()
        loss, _, kl = dense_loss(*(dense_logits(x, weight) for x in (exact, h0)), y, **options)
        (want,) = torch.autograd.grad(loss, exact)
        assert rel(grad, want) <= limit, (v, temperature, noise)
        assert rel(out.loss, loss) <= limit
        assert float((out.kl - kl).detach().abs()) <= limit * float(kl.detach() + noise)
        s, t = (dense_logits(x.detach(), weight).to(dtype) for x in (h, h0))
        s.requires_grad_()
        out = tmkl_loss(s, t, y, **options)
        (grad,) = torch.autograd.grad(out.loss, s)
        exact = s.detach().double().requires_grad_()
        loss, _, kl = dense_loss(exact, t, y, **options)
        assert rel(grad, torch.autograd.grad(loss, exact)[0]) <= limit
        assert rel(out.kl, kl) <= limit


@split
def test_the_kernels_equal_the_dense_reference(
    target_weight: float, rest_factor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moored.loss.chunks, "kernels_run", lambda *_: True)
    monkeypatch.setattr(triton_loss, "SUMMARY_BLOCK", 64)
    monkeypatch.setattr(triton_loss, "GRADIENT_BLOCK", 128)
    parts: dict[str, Any] = {"target_weight": target_weight, "rest_factor": rest_factor}
    for temperature, noise in ((1.0, 0.1), (2.5, 3.0)):
        h, h0, weight, y = make(203, torch.float32, noise)
        options = {"kl_weight": 3.0, "temperature": temperature, "prompt_weight": 0.7, **parts}
        options["kl_mask"] = torch.arange(9) != 3
        out = linear_tmkl_loss(h, h0, weight, y, chunk_tokens=4, **options)
        (grad,) = torch.autograd.grad(out.loss, h)
        exact = h.detach().double().requires_grad_()
        both = (dense_logits(x, weight) for x in (exact, h0))
        loss, _, kl, kl_prompt = dense_with_prompt(*both, y, **options)
        (want,) = torch.autograd.grad(loss, exact)
        assert rel(out.kl, kl) < 1e-5
        assert rel(out.kl_prompt, kl_prompt) < 1e-5
        assert rel(grad, want) < 1e-5


def test_both_parts_whole_are_the_plain_kl() -> None:
    """To the rounding of fp64: a KL from 1e-8 to 10."""
    for noise, temperature in itertools.product((1e-4, 0.1, 8.0), (1.0, 3.0)):
        h, h0, weight, y = make(61, torch.float64, noise)
        s, t = (dense_logits(x.detach(), weight) for x in (h, h0))
        whole = {"target_weight": 1.0, "rest_factor": "base"}
        found = []
        for kind in (whole, {"mask_target": False}):
            local = s.clone().requires_grad_()
            out = tmkl_loss(local, t, y, temperature=temperature, reduction="sum", **kind)  # type: ignore[arg-type]
            ce = tmkl_loss(local, None, y, kl_weight=0.0, reduction="sum").loss
            (grad,) = torch.autograd.grad(out.loss - ce, local)
            found.append((out.kl, grad))
        (kl, grad), (plain_kl, plain_grad) = found
        assert rel(kl, plain_kl) < 1e-13
        # The cross-entropy was taken off: its own rounding, of order 1, is left.
        assert float((grad - plain_grad).abs().max()) < 1e-15 * (1 + float(plain_grad.abs().max()))


@pytest.mark.parametrize("lead", [30.0, -30.0])
@pytest.mark.parametrize("target_weight", [1.0, 0.3])
def test_a_target_of_nearly_all_or_no_probability_costs_no_digit(
    lead: float, target_weight: float
) -> None:
    """Against 60 digits: 1 - q_y and q_y - p_y of 1e-13 and their gradient."""
    v, y = 7, 3
    s = torch.linspace(-1, 1, v, dtype=torch.float64)
    s[y] = lead
    t = s + 0.3 * torch.sin(torch.arange(v, dtype=torch.float64))
    with mpmath.workdps(60):
        p, q = (
            [mpmath.exp(mpmath.mpf(float(x))) / sum(mpmath.exp(mpmath.mpf(float(u))) for u in row)
             for x in row]
            for row in (s, t)
        )  # fmt: skip
        rest_p, rest_q = (sum(x for i, x in enumerate(row) if i != y) for row in (p, q))
        between = q[y] * mpmath.log(q[y] / p[y]) + rest_q * mpmath.log(rest_q / rest_p)
        inner = sum(
            q[i] / rest_q * mpmath.log(q[i] / rest_q * rest_p / p[i]) for i in range(v) if i != y
        )
        kl = target_weight * between + rest_q * inner
        pull = target_weight * (q[y] - p[y])
        grad = [
            -pull if i == y else pull * p[i] / rest_p + rest_q * (p[i] / rest_p - q[i] / rest_q)
            for i in range(v)
        ]
        want_kl, want = float(kl), torch.tensor([float(g) for g in grad], dtype=torch.float64)
    local = s[None].clone().requires_grad_()
    rows = torch.tensor([y])
    options: dict[str, Any] = {"target_weight": target_weight, "rest_factor": "base"}
    out = tmkl_loss(local, t[None], rows, kl_weight=1e6, **options)
    (found,) = torch.autograd.grad(out.loss, local)
    (ce,) = torch.autograd.grad(tmkl_loss(local, None, rows, kl_weight=0.0).loss, local)
    assert float(out.kl) == pytest.approx(want_kl, rel=1e-12)
    assert rel((found - ce)[0] / 1e6, want) < 1e-12


@split
@pytest.mark.parametrize("lead", [30.0, -30.0])
def test_nor_in_the_kernels(
    lead: float, target_weight: float, rest_factor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moored.loss.chunks, "kernels_run", lambda *_: True)
    monkeypatch.setattr(triton_loss, "SUMMARY_BLOCK", 64)
    monkeypatch.setattr(triton_loss, "GRADIENT_BLOCK", 128)
    h, h0, weight, y = make(203, torch.float32, 0.3)
    y[:] = 7
    bias = torch.zeros(203)
    bias[7] = lead
    options = {"target_weight": target_weight, "rest_factor": rest_factor, "kl_weight": 1e3}
    out = linear_tmkl_loss(h, h0, weight, y, bias=bias, **options)
    (grad,) = torch.autograd.grad(out.loss, h)
    exact = h.detach().double().requires_grad_()
    both = (dense_logits(x, weight, bias=bias) for x in (exact, h0))
    loss, _, kl = dense_loss(*both, y, **options)
    (want,) = torch.autograd.grad(loss, exact)
    assert rel(out.kl, kl) < 3e-5  # logits of some 30 in fp32
    assert rel(grad, want) < 3e-5


def test_refused() -> None:
    for options in ({"direction": "reverse"}, {"direction": "jsd"}, {"mask_target": False}):
        for parts in ({"target_weight": 0.5}, {"rest_factor": "base"}):
            with pytest.raises(ValueError, match="they are parts of the forward KL with a mask"):
                Objective(**options, **parts)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"target_weight=-1.0: a finite number >= 0"):
        Objective(target_weight=-1.0)
    with pytest.raises(ValueError, match="rest_factor='policy': expected one or base"):
        Objective(rest_factor="policy")  # type: ignore[arg-type]
