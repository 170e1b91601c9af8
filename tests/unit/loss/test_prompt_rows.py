"""Rows without a target: a KL over the whole vocabulary, no cross-entropy, a sum of their own.

Against the fp64 dense reference; the bound is that of test_head.py (docs/loss.md), since a row
without a target takes the same path as one that has one.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import moored.loss.chunks
from dense_reference import dense_logits, dense_loss, dense_with_prompt, gradient_bound
from moored.loss import triton_loss
from moored.loss.divergence import Objective, Scales
from moored.loss.head import Head, linear_tmkl_loss
from moored.loss.tmkl import tmkl_loss

U = {torch.float64: 2.0**-53, torch.float32: 2.0**-24}
DIRECTIONS = ("forward", "reverse", "jsd")
MASKS = pytest.mark.parametrize("mask_target", [True, False], ids=["masked", "plain"])
N, D = 11, 8


def rel(a: Tensor, b: Tensor) -> float:
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm().clamp_min(1e-300))


def make(v: int, dtype: torch.dtype, noise: float = 0.3) -> tuple[Tensor, ...]:
    """h, h0 [N, D], W [v, D], targets of which some are none, and a mask that both kinds share."""
    g = torch.Generator().manual_seed(v)
    h = torch.randn(N, D, generator=g, dtype=torch.float64)
    h0 = h + noise / 4 * torch.randn(N, D, generator=g, dtype=torch.float64)
    weight = 4 / math.sqrt(D) * torch.randn(v, D, generator=g, dtype=torch.float64)
    y = torch.randint(0, v, (N,), generator=g)
    y[[0, 3, 4, 8]] = -100
    kl_mask = torch.arange(N) % 5 != 0  # leaves out targets, and a row without one
    return h.to(dtype).requires_grad_(), h0.to(dtype), weight.to(dtype), y, kl_mask


def upstream_of(loss: Tensor) -> Tensor:
    return torch.linspace(1, 2, loss.numel(), dtype=loss.dtype).reshape(loss.shape)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", U, ids=str)
@pytest.mark.parametrize("direction", DIRECTIONS)
@MASKS
def test_both_losses_equal_the_dense_reference(
    direction: Any, mask_target: bool, dtype: torch.dtype, reduction: Any
) -> None:
    for v, temperature, ignore_index in ((2, 1.0, -100), (41, 2.5, 3), (300, 1.0, -1)):
        h, h0, weight, y, kl_mask = make(v, dtype)
        ignored = y == -100
        if ignore_index >= 0:  # an id that exists: its targets are none
            y = torch.where(y == ignore_index, 0, y)
        y = torch.where(ignored, ignore_index, y)
        options: dict[str, Any] = {
            "kl_weight": 0.3,
            "prompt_weight": 1.7,
            "direction": direction,
            "mask_target": mask_target,
            "temperature": temperature,
            "reduction": reduction,
            "kl_mask": kl_mask,
            "ignore_index": ignore_index,
        }
        limit = (gradient_bound(h, h0, weight) + 100) * U[dtype] + 1e-12
        out = linear_tmkl_loss(h, h0, weight, y, chunk_tokens=4, **options)
        (grad,) = torch.autograd.grad(out.loss, h, upstream_of(out.loss))
        exact_h = h.detach().double().requires_grad_()
        s, t = dense_logits(exact_h, weight), dense_logits(h0, weight)
        want = dense_with_prompt(s, t, y, **options)
        (exact,) = torch.autograd.grad(want[0], exact_h, upstream_of(want[0]))
        assert rel(grad, exact) <= limit
        for found, expected in zip((out.loss, out.ce, out.kl, out.kl_prompt), want, strict=True):
            assert rel(found, expected) <= limit
        counts = [int(n) for n in (out.num_targets, out.num_kl, out.num_prompt)]
        assert counts == [7, 5, 3]

        local = s.detach().to(dtype).requires_grad_()
        out = tmkl_loss(local, t.to(dtype), y, **options)
        (grad,) = torch.autograd.grad(out.loss, local, upstream_of(out.loss))
        exact_s = local.detach().double().requires_grad_()
        want = dense_with_prompt(exact_s, t.to(dtype), y, **options)
        (exact,) = torch.autograd.grad(want[0], exact_s, upstream_of(want[0]))
        assert rel(grad, exact) <= limit
        for found, expected in zip((out.loss, out.ce, out.kl, out.kl_prompt), want, strict=True):
            assert rel(found, expected) <= limit


@pytest.mark.parametrize("direction", DIRECTIONS)
@MASKS
def test_the_kernels_equal_the_dense_reference(
    direction: Any, mask_target: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moored.loss.chunks, "kernels_run", lambda *_: True)
    monkeypatch.setattr(triton_loss, "SUMMARY_BLOCK", 64)
    monkeypatch.setattr(triton_loss, "GRADIENT_BLOCK", 128)
    for temperature, noise in ((1.0, 0.3), (2.5, 8.0)):
        h, h0, weight, y, kl_mask = make(203, torch.float32, noise)
        options: dict[str, Any] = {
            "kl_weight": 0.3,
            "prompt_weight": 1.7,
            "direction": direction,
            "mask_target": mask_target,
            "temperature": temperature,
            "kl_mask": kl_mask,
        }
        out = linear_tmkl_loss(h, h0, weight, y, chunk_tokens=4, **options)
        (grad,) = torch.autograd.grad(out.loss, h)
        exact_h = h.detach().double().requires_grad_()
        s, t = dense_logits(exact_h, weight), dense_logits(h0, weight)
        want = dense_with_prompt(s, t, y, **options)
        (exact,) = torch.autograd.grad(want[0], exact_h)
        assert rel(grad, exact) < 1e-5
        for found, expected in zip((out.loss, out.ce, out.kl, out.kl_prompt), want, strict=True):
            assert rel(found, expected) < 1e-5


def test_half_precision_logits_keep_a_small_weight() -> None:
    """A gradient of 1e-7 of its row underflows in fp16, unless it is stored over its own scale."""
    h, h0, weight, y, kl_mask = make(41, torch.float32)
    s, t = (dense_logits(x.detach(), weight).half() for x in (h, h0))
    options: dict[str, Any] = {"kl_weight": 1e-7, "prompt_weight": 1e-7, "kl_mask": kl_mask}
    local = s.clone().requires_grad_()
    out = tmkl_loss(local, t, y, reduction="sum", **options)
    (grad,) = torch.autograd.grad(out.loss * 2**20, local)
    exact_s = s.double().requires_grad_()
    want = dense_with_prompt(exact_s, t, y, reduction="sum", **options)
    (exact,) = torch.autograd.grad(want[0] * 2**20, exact_s)
    prompt = (y == -100) & kl_mask
    assert rel(grad[prompt], exact[prompt]) <= 4 * 2.0**-11


@pytest.mark.parametrize("ce", ["uniform", "probability", "entropy"])
@pytest.mark.parametrize("kl", ["uniform", "entropy"])
def test_the_head_with_weighted_tokens(ce: Any, kl: Any) -> None:
    """Rows without a target are weighed by the base's entropy and by row, as the others are."""
    h, h0, weight, y, kl_mask = make(41, torch.float64)
    by_row = torch.linspace(0.5, 2.0, N, dtype=torch.float64)
    head = Head(nn.Parameter(weight, requires_grad=False), chunk_tokens=4)
    grad, sums = head(
        h,
        h0,
        y,
        use=Head.loss,
        objective=Objective(ce_weighting=ce, kl_weighting=kl),
        scales=Scales(0.7, 0.2, 1.3),
        kl_mask=kl_mask,
        kl_weights=by_row,
        num_targets=7,
    )
    exact_h = h.detach().double().requires_grad_()
    s, t = dense_logits(exact_h, weight), dense_logits(h0, weight)

    def entropy(x: Tensor) -> Tensor:
        p = torch.softmax(x.detach().sort(1, descending=True).values[:, :20], 1)
        return -(p * p.log()).sum(1) / math.log(20)

    factors = by_row * entropy(t) if kl == "entropy" else by_row
    zero = {"reduction": "none", "kl_mask": kl_mask, "kl_weights": factors}
    held, ces, kls, alone = dense_with_prompt(s, t, y, kl_weight=0.2, prompt_weight=1.3, **zero)
    held = held - ces
    factor = {"uniform": 1.0, "probability": (-ces).exp().detach(), "entropy": entropy(s)}[ce]
    loss = 0.7 * (factor * ces).sum() + held.sum()
    (want,) = torch.autograd.grad(loss, exact_h)
    assert rel(grad, want) < 1e-12
    found = sums.loss, sums.ce_sum, sums.kl_sum, sums.kl_prompt_sum
    for ours, theirs in zip(found, (loss, ces.sum(), kls.sum(), alone.sum()), strict=True):
        assert rel(ours, theirs) < 1e-12
    assert (sums.num_targets, sums.num_kl, sums.num_prompt) == (7, 5, 3)


def test_rows_without_either_cost_nothing_and_get_no_gradient() -> None:
    """Such as are not drawn in a step with `token_fraction`: no row of the head is computed."""
    h, h0, weight, y, kl_mask = make(41, torch.float64)
    h = h.detach()
    h0[0] = h[0] = math.nan  # of no target, and not in the mask
    head = Head(nn.Parameter(weight, requires_grad=False))
    how: dict[str, Any] = {"use": Head.loss, "objective": Objective(), "num_targets": 7}
    grad, sums = head(h, h0, y, scales=Scales(0.7, 0.2, 1.3), kl_mask=kl_mask, **how)
    assert not grad[0].any()
    assert grad.isfinite().all()
    assert sums.loss.isfinite()
    # A step without a KL: the targets alone.
    grad, sums = head(h, None, y, scales=Scales(0.7, 0.0, 0.0), kl_mask=kl_mask, **how)
    assert grad.any(1).tolist() == (y >= 0).tolist()
    assert (sums.num_kl, sums.num_prompt, float(sums.kl_prompt_sum)) == (0, 0, 0.0)


class Work(TorchDispatchMode):
    """Notes the rows of every matrix product, and the largest tensor made."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.largest = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in ("mm", "addmm_"):
            self.rows += args[-2].shape[0]
        if isinstance(out, Tensor):
            self.largest = max(self.largest, out.numel())
        return out


def test_work_grows_with_what_is_drawn_and_memory_not_at_all() -> None:
    """Of three products a row with a KL: h W and (h0 - h) W in one, and G W."""
    v, chunk, largest = 4096, 16, []
    weight = torch.randn(v, D)
    head = Head(nn.Parameter(weight, requires_grad=False), chunk_tokens=chunk)
    for n, share in ((64, 1.0), (512, 1.0), (512, 0.25)):
        h, y = torch.randn(n, D), torch.full((n,), -100)
        y[: n // 8] = 5
        kl_mask = torch.rand(n, generator=torch.Generator().manual_seed(0)) < share
        how: dict[str, Any] = {"objective": Objective(), "scales": Scales(1.0, 1.0, 1.0)}
        with Work() as work:
            head(h, h, y, use=Head.loss, kl_mask=kl_mask, num_targets=n // 8, **how)
        num_kl = int(kl_mask.sum())
        assert work.rows == 3 * num_kl + 2 * int((~kl_mask & (y >= 0)).sum())
        largest.append(work.largest)
    assert largest[0] == largest[1] == largest[2] <= 4 * chunk * v


def test_prompts_alone_and_nothing_at_all() -> None:
    h, h0, weight, y, kl_mask = make(41, torch.float64)
    none = torch.full_like(y, -100)
    options: dict[str, Any] = {"kl_mask": kl_mask, "prompt_weight": 2.0}
    out = linear_tmkl_loss(h, h0, weight, none, **options)
    (grad,) = torch.autograd.grad(out.loss, h)
    exact = h.detach().requires_grad_()
    s, t = dense_logits(exact, weight), dense_logits(h0, weight)
    want = dense_with_prompt(s, t, none, kl_weight=1.0, **options)
    assert rel(grad, torch.autograd.grad(want[0], exact)[0]) < 1e-12
    assert rel(out.loss, want[0]) < 1e-12
    assert float(out.ce) == 0
    no_rows = torch.zeros(N, dtype=torch.bool)
    out = linear_tmkl_loss(h, h0, weight, none, kl_mask=no_rows, prompt_weight=2.0)
    assert float(out.loss.detach()) == 0
    assert not torch.autograd.grad(out.loss, h)[0].any()


def test_without_a_weight_such_rows_are_ignored_and_with_0_they_are_reported() -> None:
    h, h0, weight, y, kl_mask = make(41, torch.float64)
    s, t = dense_logits(h.detach(), weight), dense_logits(h0, weight)
    for loss, inputs in ((linear_tmkl_loss, (h, h0, weight)), (tmkl_loss, (s, t))):
        ignored = loss(*inputs, y, kl_mask=kl_mask)
        want, _, _ = dense_loss(s, t, y, kl_mask=kl_mask)
        assert rel(ignored.loss, want) < 1e-12
        assert (int(ignored.num_prompt), float(ignored.kl_prompt)) == (0, 0.0)
        reported = loss(*inputs, y, kl_mask=kl_mask, prompt_weight=0.0)
        assert torch.equal(reported.loss, ignored.loss)
        assert int(reported.num_prompt) == 3
        assert float(reported.kl_prompt) > 0


def test_equal_models_have_a_kl_of_exactly_0() -> None:
    h, _, weight, _, kl_mask = make(41, torch.float32)
    none = torch.full((N,), -100)
    for direction in DIRECTIONS:
        options: dict[str, Any] = {"direction": direction, "kl_mask": kl_mask}
        out = linear_tmkl_loss(h, h.detach(), weight, none, prompt_weight=1.0, **options)
        assert float(out.kl_prompt) == 0
        assert not torch.autograd.grad(out.loss, h)[0].any()


def test_refused() -> None:
    h, h0, weight, y, kl_mask = make(41, torch.float64)
    with pytest.raises(ValueError, match=r"prompt_weight=1.0, but kl_mask is None"):
        linear_tmkl_loss(h, h0, weight, y, prompt_weight=1.0)
    for bad in (-1.0, math.inf, "x"):
        with pytest.raises(ValueError, match=r"prompt_weight=.*: a finite number >= 0 is needed"):
            linear_tmkl_loss(h, h0, weight, y, kl_mask=kl_mask, prompt_weight=bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"None: needed unless prompt_weight is 0"):
        linear_tmkl_loss(h, None, weight, y, kl_weight=0.0, kl_mask=kl_mask, prompt_weight=1.0)
