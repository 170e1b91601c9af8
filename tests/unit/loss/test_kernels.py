"""The Triton kernels against the fp64 dense reference: on a GPU, or by Triton's interpreter."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moored.loss.chunks
import moored.loss.logits
from dense_reference import dense_logits, dense_loss, per_row
from moored.loss import triton_loss
from moored.loss.divergence import Objective, Scales
from moored.loss.head import Head, LossSums, linear_tmkl_loss

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # conftest.py has the interpreter on there
DIRECTIONS = ("forward", "reverse", "jsd")


def rel(a: Tensor, b: Tensor) -> float:
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm().clamp_min(1e-300))


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels for every head, in blocks of which a row has several."""
    monkeypatch.setattr(moored.loss.chunks, "kernels_run", lambda *_: True)
    monkeypatch.setattr(triton_loss, "SUMMARY_BLOCK", 64)
    monkeypatch.setattr(triton_loss, "GRADIENT_BLOCK", 128)


def make(t: int, d: int, v: int, noise: float = 0.3, std: float = 4.0) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(t + v)
    h = torch.randn(t, d, generator=g)
    h0 = h + noise / std * torch.randn(t, d, generator=g)
    weight = std / d**0.5 * torch.randn(v, d, generator=g)
    y = torch.randint(0, v, (t,), generator=g)
    y[1] = -100
    return h, h0, weight, y


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("mask_target", [True, False], ids=["masked", "plain"])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("noise", [8.0, 0.3, 0.003])
@pytest.mark.parametrize("extra", [{}, {"logit_softcap": 6.0, "logit_scale": 0.7, "bias": True}])
def test_values_and_gradients(
    direction: Any, mask_target: bool, temperature: float, noise: float, extra: dict[str, Any]
) -> None:
    h, h0, weight, y = (x.to(DEVICE) for x in make(5, 24, 203, noise))
    h = h.detach().requires_grad_()
    how = dict(extra)
    if "bias" in how:
        how["bias"] = torch.randn(len(weight), device=DEVICE)
    options = {"direction": direction, "mask_target": mask_target, "temperature": temperature}
    out = linear_tmkl_loss(h, h0, weight, y, kl_weight=3.0, chunk_tokens=4, **options, **how)
    (grad,) = torch.autograd.grad(out.loss, h)
    exact = h.detach().double().requires_grad_()
    s, t = (dense_logits(x, weight, **how) for x in (exact, h0))
    loss, ce, kl = dense_loss(s, t, y, kl_weight=3.0, **options)
    (want,) = torch.autograd.grad(loss, exact)
    assert rel(out.ce, ce) < 1e-6
    assert rel(out.kl, kl) < 1e-5
    assert rel(grad, want) < 1e-5


@pytest.mark.parametrize("mask_target", [True, False], ids=["masked", "plain"])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("offset", [-300.0, -110.0, 110.0])
def test_logits_that_differ_by_a_common_offset(
    offset: float, direction: Any, mask_target: bool
) -> None:
    """It changes no distribution, but the mass of either model underflows beside the other's."""
    h, h0, weight, y = (x.to(DEVICE) for x in make(4, 24, 203))
    ones = torch.ones_like(h[:, :1])
    h, h0 = torch.cat([h, 0 * ones], 1), torch.cat([h0, offset * ones], 1)
    weight = torch.cat([weight, torch.ones_like(weight[:, :1])], 1)
    h[:, -1] = 0.0
    options = {"direction": direction, "mask_target": mask_target, "kl_weight": 3.0}
    h.requires_grad_()
    out = linear_tmkl_loss(h, h0, weight, y, **options)
    (grad,) = torch.autograd.grad(out.loss, h)
    exact = h.detach().double().requires_grad_()
    loss, _, kl = dense_loss(dense_logits(exact, weight), dense_logits(h0, weight), y, **options)
    (want,) = torch.autograd.grad(loss, exact)
    assert rel(out.kl, kl) < 2e-4  # fp32 logits of some hundred, off by up to 1.5e-5
    assert rel(grad, want) < 2e-4


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_a_small_kl_of_large_logits(direction: Any) -> None:
    """Log masses near 1000 are off by 3e-5, and so is the log ratio until it is set right.

    Left in, or taken out with the wrong sign, that would be off by its square: 1 % of this KL.
    """
    h, h0, weight, y = (x.to(DEVICE) for x in make(6, 24, 203, noise=5e-4))
    bias = torch.full((len(weight),), 1000.0, device=DEVICE)
    out = linear_tmkl_loss(h, h0, weight, y, bias=bias, direction=direction)
    s, t = (dense_logits(x, weight) for x in (h, h0))
    _, _, kl = dense_loss(s, t, y, direction=direction)
    assert 1e-8 < float(kl) < 1e-6
    assert rel(out.kl, kl) < 2e-4  # fp32 logits of 1000, off by up to 3e-5


def test_a_target_with_all_of_the_mass() -> None:
    """Without a mask: what is left of the policy beside the target underflows, the base's not."""
    weight = torch.eye(70, 8, device=DEVICE)
    h, h0 = torch.zeros(2, 8, device=DEVICE), torch.zeros(2, 8, device=DEVICE)
    h[:, 3], h0[:, 3] = 130.0, -130.0
    y = torch.full((2,), 3, device=DEVICE)
    h.requires_grad_()
    for direction in ("forward", "jsd"):
        options = {"direction": direction, "mask_target": False, "kl_weight": 1.0}
        out = linear_tmkl_loss(h, h0, weight, y, **options)
        (grad,) = torch.autograd.grad(out.loss, h)
        exact = h.detach().double().requires_grad_()
        both = (dense_logits(x, weight) for x in (exact, h0))
        loss, _, kl = dense_loss(*both, y, **options)
        (want,) = torch.autograd.grad(loss, exact)
        assert rel(out.kl, kl) < 1e-5
        assert float((grad - want).abs().max()) < 1e-6  # forward: about 1; jsd: below fp32's reach


@pytest.mark.parametrize("noise", [1.0, 0.03, 1e-3])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(
    direction: Any, noise: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The KL alone, its gradient scaled by row and rounded to fp16 once; products as on CUDA.

    At the least noise the KL is 1e-7, and most entries of its gradient would underflow.
    """
    h, h0, weight, y = (x.to(DEVICE) for x in make(7, 24, 331))
    h, weight, y = h.to(dtype), weight.to(dtype), y.clamp_min(0)
    h0 = (h.float() * (1 + noise * h.float().sign())).to(dtype)
    h0 = torch.where(h0 == h, torch.nextafter(h, 2 * h), h0)
    if DEVICE == "cpu":
        monkeypatch.setattr(moored.loss.logits.Logits, "native", lambda *_: True)
        monkeypatch.setattr(torch, "mm", cuda_mm)
    head = Head(nn.Parameter(weight, requires_grad=False))
    how = {"objective": Objective(direction), "scales": Scales(0.0, 0.01)}
    grad, sums = head(h, h0, y, use=Head.loss, **how)
    exact = h.double().requires_grad_()
    s, t = dense_logits(exact, weight), dense_logits(h0, weight)
    _, _, kl = dense_loss(s, t, y, kl_weight=1.0, direction=direction, reduction="sum")
    (want,) = torch.autograd.grad(0.01 * kl, exact)
    assert rel(sums.kl_sum, kl) < 2e-4
    assert rel(grad, want) < 4e-4


def cuda_mm(a: Tensor, b: Tensor, *, out_dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """torch.mm of half-precision operands into fp32, which only CUDA has."""
    assert a.dtype == b.dtype
    product = (a.double() @ b.double()).to(out_dtype)
    return product if out is None else out.copy_(product)


def test_cross_entropy_alone_and_rows_without_a_kl() -> None:
    h, h0, weight, y = (x.to(DEVICE) for x in make(9, 24, 331))
    kl_mask = torch.arange(9, device=DEVICE) % 3 > 0
    for reference, options in ((None, {"kl_weight": 0.0}), (h0, {"kl_mask": kl_mask})):
        h = h.detach().requires_grad_()
        out = linear_tmkl_loss(h, reference, weight, y, **options)
        (grad,) = torch.autograd.grad(out.loss, h)
        exact = h.detach().double().requires_grad_()
        s = dense_logits(exact, weight)
        t = None if reference is None else dense_logits(reference, weight)
        loss, _, _ = dense_loss(s, t, y, **options)
        (want,) = torch.autograd.grad(loss, exact)
        assert rel(out.loss, loss) < 1e-6
        assert rel(grad, want) < 2e-6


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_equal_models_a_weight_of_zero_and_what_is_not_finite(direction: Any) -> None:
    h, h0, weight, y = (x.to(DEVICE) for x in make(5, 24, 331))
    y = y.clamp_min(0)
    head = Head(nn.Parameter(weight, requires_grad=False))
    how = {"use": Head.loss, "objective": Objective(direction)}
    grad, sums = head(h, h, y, scales=Scales(0.0, 1.0), **how)
    assert float(sums.kl_sum) == 0
    assert not grad.any()
    alone, _ = head(h, h, y, scales=Scales(0.2, 0.0), **how)
    h0[2] = math.inf  # the KL of a row is not finite, and its weight is 0
    grad, _ = head(h, h0, y, scales=Scales(0.2, 0.0), **how)
    assert torch.equal(grad[[0, 1, 3, 4]], alone[[0, 1, 3, 4]])
    assert rel(grad, alone) < 1e-6
    grad, _ = head(h, h0, y, scales=Scales(0.2, 1.0), **how)
    assert grad.isnan().any(1).tolist() == [False, False, True, False, False]


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_rows_of_different_weight(direction: Any) -> None:
    h, h0, weight, y = (x.to(DEVICE) for x in make(6, 24, 203))
    y = y.clamp_min(0)
    by_row = torch.tensor([0.0, 1.0, 5.0, 0.3, 2.0, 1.0], device=DEVICE)
    head = Head(torch.nn.Parameter(weight, requires_grad=False), chunk_tokens=4)
    how = {"objective": Objective(direction), "scales": Scales(0.5, 0.7)}
    found = head(h, h0, y, use=Head.loss, kl_weights=by_row, **how)
    exact = h.double().requires_grad_()
    s, t = (dense_logits(x, weight) for x in (exact, h0))
    ce, kl = per_row(s, t, y, direction=direction)
    loss = 0.5 * ce.sum() + 0.7 * (by_row * kl).sum()
    (want,) = torch.autograd.grad(loss, exact)
    assert isinstance(found, tuple)
    assert isinstance(found[1], LossSums)
    assert rel(found[0], want) < 1e-5
    assert rel(found[1].loss, loss) < 1e-6
