"""linear_tmkl_loss and Head against the fp64 dense reference, values and gradients.

Tolerances. Two kinds of bounds are used, both derived in docs/loss.md.

`bound`: the arithmetic's own. A logit is a sum of D products, off by at most u D |h| |W| (the
sizes taken per product) and in practice by the square root of D; e = (h0 - h) W^T is off by the
same with |h0 - h| for |h|; then everything that test_tmkl.py states; then dh = G W, a sum of V
products, off by u sqrt(V) |G| |W|. The matrix products' part is taken from the tensors at hand.

`input_rounding`: no worse than rounding the inputs explains. The fp64 reference is run again on
inputs of which every element is moved by one rounding of its dtype, up or down at random, three
times; the largest change of the gradient is what a caller who rounded the inputs would have to
expect. Ours may be off by no more than that, or than 1e-5 where that is more.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dense_reference import dense_logits, dense_loss, gradient_bound, many_digits, per_row
from moored.loss.divergence import Objective, Scales
from moored.loss.drift import DriftSums
from moored.loss.head import Head, LossSums, attach_gradient, linear_tmkl_loss
from moored.loss.rows import default_chunk_tokens
from moored.loss.tmkl import VocabShard, tmkl_loss

U = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.bfloat16: 2.0**-8,
    torch.float16: 2.0**-11,
}
HALF = (torch.bfloat16, torch.float16)
DIRECTIONS = ("forward", "reverse", "jsd")
MASKS = pytest.mark.parametrize("mask_target", [True, False], ids=["masked", "plain"])
LOGIT_OPTIONS = ("bias", "logit_scale", "logit_softcap")


def rel(a: Tensor, b: Tensor) -> float:
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm().clamp_min(1e-300))


def make(
    t: int,
    d: int,
    v: int,
    dtype: torch.dtype,
    *,
    noise: float = 0.3,
    std: float = 4.0,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """h [t, d], h0, W [v, d] with logits of size `std` that differ by `noise`, and targets."""
    g = torch.Generator().manual_seed(seed)
    h = torch.randn(t, d, generator=g, dtype=torch.float64)
    h0 = (h + noise / std * torch.randn(t, d, generator=g, dtype=torch.float64)).to(dtype)
    weight = std / math.sqrt(d) * torch.randn(v, d, generator=g, dtype=torch.float64)
    y = torch.randint(0, v, (t,), generator=g)
    if t > 2:
        y[1] = -100
    return h.to(dtype).requires_grad_(), h0, weight.to(dtype), y


def dense(
    h: Tensor, h0: Tensor | None, weight: Tensor, y: Tensor, **options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, cross-entropy, KL and the gradient of h, all fp64."""
    how = {name: options.pop(name) for name in LOGIT_OPTIONS if name in options}
    exact_h = h.detach().double().requires_grad_()
    s = dense_logits(exact_h, weight, **how)
    t = None if h0 is None else dense_logits(h0, weight, **how)
    loss, ce, kl = dense_loss(s, t, y, **options)
    if not len(y):
        return loss, ce, kl, torch.zeros_like(exact_h)
    upstream = torch.linspace(-1, 2, loss.numel(), dtype=torch.float64).reshape(loss.shape)
    (grad,) = torch.autograd.grad(loss, exact_h, upstream)
    return loss, ce, kl, grad


def ours(
    h: Tensor, h0: Tensor | None, weight: Tensor, y: Tensor, **options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out = linear_tmkl_loss(h, h0, weight, y, **options)
    upstream = torch.linspace(-1, 2, out.loss.numel()).reshape(out.loss.shape).to(out.loss.dtype)
    (grad,) = torch.autograd.grad(out.loss, h, upstream)
    assert grad.dtype == h.dtype
    return out.loss, out.ce, out.kl, grad


@pytest.mark.parametrize("dtype", U, ids=str)
@pytest.mark.parametrize("direction", DIRECTIONS)
@MASKS
def test_values_and_gradients(direction: str, mask_target: bool, dtype: torch.dtype) -> None:
    shapes = [(1, 1, 2), (3, 5, 7), (9, 16, 37), (4, 33, 1031)]
    cases = itertools.product((1.0, 2.0), (2.0, 0.05), shapes)
    u = U[torch.float64 if dtype == torch.float64 else torch.float32]
    for i, (temperature, noise, (t, d, v)) in enumerate(cases):
        h, h0, weight, y = make(t, d, v, dtype, noise=noise, seed=i)
        options: dict[str, Any] = {
            "direction": direction,
            "mask_target": mask_target,
            "temperature": temperature,
            "reduction": ("mean", "sum", "none")[i % 3],
            "kl_weight": (1.0, 0.3)[i % 2],
            "kl_mask": torch.arange(t) % 4 != 2 if i % 5 else None,
        }
        chunk = {"chunk_tokens": (None, 1, 2, 100, 3)[i % 5]}
        loss, ce, kl, grad = ours(h, h0, weight, y, **options, **chunk)
        want_loss, want_ce, want_kl, want = dense(h, h0, weight, y, **options)
        limit = gradient_bound(h, h0, weight) * u
        floor = 1e3 * U[torch.float64] * (1 + float(weight.double().norm()))  # the reference's own
        if dtype in HALF:  # stored in fp32, so rounded once
            limit += U[dtype]
            floor += 2.0**-25 * math.sqrt(grad.numel()) * (dtype == torch.float16)
        assert (grad.double() - want).norm() <= limit * want.norm() + floor
        if dtype == torch.float32:
            assert rel(grad, want) <= 1e-5
        for found, exact in ((loss, want_loss), (ce, want_ce), (kl, want_kl)):
            error = (found.detach().double() - exact).norm()
            slack = (gradient_bound(h, h0, weight) + 100) * u
            # A logit off by u |h| |W| moves the loss of a row by as much.
            assert error <= slack * (exact.norm() + len(y)) * (
                1.0 if exact is not want_kl else noise
            )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("noise", [2.0, 0.2, 0.02, 0.002])
@pytest.mark.parametrize("direction", DIRECTIONS)
@MASKS
def test_the_kl_alone_is_no_worse_than_rounding_the_inputs_explains(
    direction: Any, mask_target: bool, noise: float, dtype: torch.dtype
) -> None:
    """KL from 2 down to 2e-6, the cross-entropy's scale 0: the regulariser's gradient by itself."""
    h, h0, weight, y = make(6, 64, 257, dtype, noise=noise, std=5.0, seed=5)
    y[1] = 7
    options: dict[str, Any] = {"direction": direction, "mask_target": mask_target}
    grad, sums = Head(nn.Parameter(weight, requires_grad=False))(
        h, h0, y, use=Head.loss, objective=Objective(**options), scales=Scales(0.0, 1.0)
    )
    s, t = dense_logits(h.detach(), weight), dense_logits(h0, weight)
    _, kl, _, kl_grad = many_digits(s, t, y, **options)
    exact = kl_grad @ weight.double()
    explained = 0.0
    g = torch.Generator().manual_seed(1)
    for _ in range(3):  # every element of the inputs rounded once more, up or down at random
        moved = [
            x.detach().double()
            * (1 + U[dtype] * (torch.randint(0, 2, x.shape, generator=g) * 2 - 1))
            for x in (h, h0, weight)
        ]
        moved_s, moved_t = dense_logits(moved[0], moved[2]), dense_logits(moved[1], moved[2])
        exact_s = moved_s.requires_grad_()
        moved_kl = per_row(exact_s, moved_t, y, **options)[1]
        (moved_grad,) = torch.autograd.grad(moved_kl.sum(), exact_s)
        explained = max(explained, rel(moved_grad @ moved[2], exact))
    assert rel(grad, exact) <= max(explained, 1e-5)
    # And better by far than that: the delta product's own rounding, not that of the logits.
    u = U[torch.float32]
    assert rel(grad, exact) <= (2 * gradient_bound(h, h0, weight)) * u
    assert rel(sums.kl_sum, kl.sum()) <= (2 * gradient_bound(h, h0, weight) + 132) * u


@pytest.mark.parametrize("softcap", [None, 8.0])
@pytest.mark.parametrize("direction", DIRECTIONS)
@MASKS
def test_bias_scale_and_soft_cap(direction: str, mask_target: bool, softcap: float | None) -> None:
    """A cap of 8 on logits of 4 and more: from hardly felt to saturated."""
    for i, (dtype, scale) in enumerate(itertools.product(U, (1.0, 0.25, 3.0))):
        h, h0, weight, y = make(7, 16, 41, dtype, noise=(0.05, 3.0)[i % 2], seed=i)
        bias = torch.linspace(-2, 2, 41).to(dtype)
        options: dict[str, Any] = {
            "direction": direction,
            "mask_target": mask_target,
            "bias": bias,
            "logit_scale": scale,
            "logit_softcap": softcap,
        }
        loss, ce, kl, grad = ours(h, h0, weight, y, **options)
        want_loss, want_ce, want_kl, want = dense(h, h0, weight, y, **options)
        u = U[torch.float64 if dtype == torch.float64 else torch.float32]
        limit = max(1.0, scale) * gradient_bound(h, h0, weight) * u
        assert rel(grad, want) <= limit + (U[dtype] if dtype in HALF else 0.0) + 1e-13
        assert rel(ce, want_ce) <= limit
        assert rel(kl, want_kl) <= limit + 100 * u + 1e-11
        assert rel(loss, want_loss) <= limit + 100 * u


def test_a_soft_cap_keeps_small_differences() -> None:
    """At KL 1e-6 the capped log-ratio is not a difference of two hyperbolic tangents."""
    h, h0, weight, y = make(6, 32, 101, torch.float32, noise=1e-3, std=10.0)
    y[1] = 7
    grad, sums = Head(nn.Parameter(weight, requires_grad=False), logit_softcap=10.0)(
        h, h0, y, use=Head.loss, objective=Objective(), scales=Scales(0.0, 1.0)
    )
    raw = dense_logits(h.detach(), weight)
    s, t = (dense_logits(x, weight, logit_softcap=10.0) for x in (h.detach(), h0))
    _, kl, _, kl_grad = many_digits(s, t, y, direction="forward", mask_target=True)
    exact = (kl_grad / torch.cosh(raw / 10.0) ** 2) @ weight.double()
    assert 1e-8 < kl.mean() < 1e-5
    limit = 2 * gradient_bound(h, h0, weight) * U[torch.float32]
    assert rel(grad, exact) <= limit
    assert rel(sums.kl_sum, kl.sum()) <= limit + 132 * U[torch.float32]


@settings(
    max_examples=50,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(
    t=st.integers(0, 7),
    d=st.integers(1, 20),
    v=st.integers(3, 60),
    seed=st.integers(0, 10_000),
    noise=st.sampled_from([1e-2, 0.5, 5.0]),
    chunk_tokens=st.integers(1, 8),
    softcap=st.sampled_from([None, 3.0, 30.0]),
    with_bias=st.booleans(),
    direction=st.sampled_from(DIRECTIONS),
    mask_target=st.booleans(),
    temperature=st.floats(0.5, 4.0),
    kl_weight=st.floats(0.0, 5.0),
    dtypes=st.tuples(*[st.sampled_from([torch.float64, torch.float32, torch.bfloat16])] * 3),
)
def test_values_and_gradients_of_anything(
    t: int, d: int, v: int, seed: int, noise: float, chunk_tokens: int, **options: Any
) -> None:
    """Also with hidden states, reference and weight of three dtypes."""
    h, h0, weight, y = make(t, d, v, torch.float64, noise=noise, seed=seed)
    dtypes = options.pop("dtypes")
    h = h.detach().to(dtypes[0]).requires_grad_()
    h0, weight = h0.to(dtypes[1]), weight.to(dtypes[2])
    options["bias"] = torch.linspace(-1, 1, v) if options.pop("with_bias") else None
    options["logit_softcap"] = options.pop("softcap")
    options["kl_mask"] = torch.rand(t, generator=torch.Generator().manual_seed(seed)) < 0.7
    loss, ce, kl, grad = ours(h, h0, weight, y, **options, chunk_tokens=chunk_tokens)
    want_loss, want_ce, want_kl, want = dense(h, h0, weight, y, **options)
    u = U[torch.float64 if torch.float64 in dtypes else torch.float32]
    size = (gradient_bound(h, h0, weight) if t else 1.0) / min(1.0, options["temperature"]) + 100
    weights = 1 + options["kl_weight"] * options["temperature"] ** 2 * (1 + 5 * noise)
    absolute = weights * size * u * max(1, t) * (1 + float(weight.double().abs().max()))
    scale = 1 + float(weight.double().norm())
    # The gradient comes back in the dtype of h: rounded once more.
    assert (grad.double() - want).norm() <= absolute * scale + U[dtypes[0]] * want.norm()
    for found, exact in ((loss, want_loss), (ce, want_ce), (kl, want_kl)):
        assert (found.detach().double() - exact).norm() <= absolute + size * u * exact.norm()


def test_equal_models_have_a_kl_and_kl_gradient_of_exactly_zero() -> None:
    for dtype, softcap in itertools.product(U, (None, 5.0)):
        h, _, weight, y = make(6, 24, 65, dtype)
        y[1] = 3
        head = Head(nn.Parameter(weight, requires_grad=False), logit_softcap=softcap)
        for direction, mask_target in itertools.product(DIRECTIONS, (True, False)):
            objective = Objective(direction, mask_target)
            same, scales = h.detach().clone(), Scales(0.0, 1.0)
            grad, sums = head(h, same, y, use=Head.loss, objective=objective, scales=scales)
            assert sums.kl_sum.item() == 0.0
            assert torch.count_nonzero(grad) == 0


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_threads_share_the_blocks(direction: Any, monkeypatch: Any) -> None:
    """Bit for bit what one thread computes, and the caller's settings are as they were."""
    import moored.loss.divergence

    monkeypatch.setattr(
        moored.loss.divergence,
        "row_blocks",
        lambda x: (slice(i, i + 2) for i in range(0, x.shape[0], 2)),
    )
    h, h0, weight, y = make(23, 16, 67, torch.float32)
    options: dict[str, Any] = {"direction": direction, "temperature": 2.0, "logit_softcap": 5.0}
    want = ours(h, h0, weight, y, **options)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        for a, b in zip(ours(h, h0, weight, y, **options), want, strict=True):
            assert torch.equal(a, b)
        with torch.inference_mode():
            loss = linear_tmkl_loss(h, h0, weight, y, **options).loss
        assert torch.equal(loss, want[0])
        assert torch.get_num_threads() == 3

        def fail(rows: slice) -> None:
            raise ArithmeticError("in a thread")

        with pytest.raises(ArithmeticError, match="in a thread"):
            moored.loss.divergence.each_block(weight, fail)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(num_threads)


def test_linear_and_plain_loss_agree() -> None:
    h, h0, weight, y = make(9, 16, 37, torch.float64)
    for direction, mask_target in itertools.product(DIRECTIONS, (True, False)):
        options: dict[str, Any] = {"direction": direction, "mask_target": mask_target}
        linear = linear_tmkl_loss(h, h0, weight, y, **options)
        plain = tmkl_loss(h @ weight.T, h0 @ weight.T, y, **options)
        for a, b in zip(linear, plain, strict=True):
            assert rel(a, b) <= 1e-12
        grads = [torch.autograd.grad(x.loss, h)[0] for x in (linear, plain)]
        assert rel(*grads) <= 1e-12


def test_the_chunk_size_changes_nothing_but_roundings() -> None:
    h, h0, weight, y = make(23, 16, 67, torch.float32)
    whole = ours(h, h0, weight, y, chunk_tokens=1000)
    for size in (1, 5, 22):
        for a, b in zip(ours(h, h0, weight, y, chunk_tokens=size), whole, strict=True):
            assert rel(a, b) <= 2 * gradient_bound(h, h0, weight) * U[torch.float32]


def test_ignored_rows_are_dropped_before_the_products() -> None:
    h, h0, weight, y = make(64, 8, 50, torch.float32)
    y[:] = -100
    y[::16] = 3
    with torch.no_grad():
        h[1], h0[1] = math.nan, math.inf
    with Products() as seen:
        out = linear_tmkl_loss(h, h0, weight, y)
    assert seen.rows == [8, 4]  # [h; h0 - h] for the 4 valid rows, then their dh
    (grad,) = torch.autograd.grad(out.loss, h)
    assert torch.count_nonzero(grad[y == -100]) == 0
    assert grad.isfinite().all()
    mask = torch.zeros(64, dtype=torch.bool)
    mask[0] = True
    with Products() as seen:
        linear_tmkl_loss(h, h0, weight, y, kl_mask=mask)
    assert seen.rows == [2, 1, 3, 3]  # the reference is projected where the KL applies, only


class Products(TorchDispatchMode):
    """Notes the rows of every matrix product, and the largest storage made."""

    def __init__(self, *given: Tensor) -> None:
        super().__init__()
        self.rows: list[int] = []
        self.nbytes = 0
        self.given = {x.untyped_storage().data_ptr() for x in given}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm_", "addmm"):
            self.rows.append(args[-2].shape[0])
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in self.given:
                self.nbytes = max(self.nbytes, x.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_does_not_grow_with_the_tokens(dtype: torch.dtype) -> None:
    """Nothing is larger than four buffers of a chunk, whatever T is; W is never copied."""
    for direction in DIRECTIONS:
        largest = []
        for t in (64, 512):
            h, h0, weight, y = make(t, 16, 4096, dtype)
            with Products(h, h0, weight, y) as seen:
                out = linear_tmkl_loss(h, h0, weight, y, chunk_tokens=16, direction=direction)
                out.loss.backward()
            largest.append(seen.nbytes)
        assert largest[0] == largest[1] <= 4 * 16 * 4096 * 4


def test_a_half_precision_weight_is_upcast_in_blocks(monkeypatch: Any) -> None:
    import moored.loss.logits

    monkeypatch.setattr(moored.loss.logits, "_BLOCK_ELEMENTS", 1)  # the least: 256 columns
    for dtype in HALF:
        h, h0, weight, y = make(5, 64, 1000, dtype)
        with Products(h, h0, weight, y) as seen:
            loss, _, _, grad = ours(h, h0, weight, y, chunk_tokens=1)
        assert seen.nbytes <= 256 * 64 * 4  # a block; W in fp32 would be 1000 * 64 * 4
        want_loss, _, _, want = dense(h, h0, weight, y)
        assert rel(loss, want_loss) <= gradient_bound(h, h0, weight) * U[torch.float32]
        assert rel(grad, want) <= gradient_bound(h, h0, weight) * U[torch.float32] + U[dtype]


@pytest.mark.parametrize("noise", [1.0, 0.01])
def test_half_precision_products_with_an_fp32_accumulator(noise: float, monkeypatch: Any) -> None:
    """The way that CUDA takes, with torch.mm's out_dtype stood in for by a product in fp32.

    h0 - h and G are rounded to the weight's dtype, u_half each, whatever the size of the KL.
    """
    import moored.loss.logits

    calls = []

    def mm(a: Tensor, b: Tensor, *, out_dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        assert a.dtype == b.dtype == dtype
        calls.append(out_dtype)
        product = a.float() @ b.float()
        return product if out is None else out.copy_(product)

    monkeypatch.setattr(moored.loss.logits.Logits, "native", lambda *_: True)
    for dtype in HALF:
        h, _, weight, y = make(6, 64, 257, dtype)
        h0 = h.detach().clone()
        h0[:, 0] += 4 * noise * h0[:, 0].sign()  # differences that half precision can hold
        y[1] = 7
        s, t = dense_logits(h.detach(), weight), dense_logits(h0, weight)
        _, kl, _, kl_grad = many_digits(s, t, y, direction="forward", mask_target=True)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "mm", mm)
            grad, sums = Head(nn.Parameter(weight, requires_grad=False))(
                h, h0, y, use=Head.loss, objective=Objective(), scales=Scales(0.0, 1.0)
            )
        limit = 2 * gradient_bound(h, h0, weight) * U[torch.float32] + 2 * U[dtype]
        assert rel(grad, kl_grad @ weight.double()) <= limit
        assert rel(sums.kl_sum, kl.sum()) <= limit
    assert calls == 4 * [torch.float32]


def test_under_autocast() -> None:
    for dtype in U:
        h, h0, weight, y = make(6, 16, 37, dtype)
        want = linear_tmkl_loss(h, h0, weight, y)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = linear_tmkl_loss(h, h0, weight, y)
        assert torch.equal(out.loss, want.loss)
        assert torch.equal(*(torch.autograd.grad(x.loss, h)[0] for x in (out, want)))
        head = Head(nn.Parameter(weight, requires_grad=False))
        y = y.clamp_min(0)
        how = {"use": Head.loss, "objective": Objective(), "scales": Scales(1.0, 1.0)}
        want_grad, _ = head(h, h0, y, **how)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            grad, _ = head(h, h0, y, **how)
        assert torch.equal(grad, want_grad)


def test_layouts_graphs_and_gradients_that_stop() -> None:
    h, h0, weight, y = make(7, 12, 29, torch.float32)
    want = linear_tmkl_loss(h, h0, weight, y)
    (grad,) = torch.autograd.grad(want.loss, h)
    strided = h.detach().t().contiguous().t().requires_grad_()
    weight_t = weight.t().contiguous().t()
    out = linear_tmkl_loss(strided, torch.stack([h0, h0], 1)[:, 1], weight_t, y)
    assert rel(out.loss, want.loss) <= 1e-6
    assert rel(torch.autograd.grad(out.loss, strided)[0], grad) <= 1e-5
    base = h0.clone().requires_grad_()
    out = linear_tmkl_loss(h, base, weight, y)
    (out.loss * 3).backward()
    assert base.grad is None
    assert h.grad is not None
    assert rel(h.grad, 3 * grad) <= 2 * U[torch.float32]
    with pytest.raises(RuntimeError, match="second time"):
        out.loss.backward()
    with torch.no_grad(), Products() as seen:
        assert not linear_tmkl_loss(h, h0, weight, y).loss.requires_grad
    assert len(seen.rows) == 1  # no gradient wanted, none formed


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_valid_target_gives_a_connected_zero(reduction: Any) -> None:
    for rows, dtype in itertools.product((0, 4), U):
        h, h0, weight, _ = make(rows, 8, 11, dtype)
        y = torch.full((rows,), -100)
        out = linear_tmkl_loss(h, h0, weight, y, reduction=reduction)
        assert torch.count_nonzero(out.loss) == 0
        out.loss.sum().backward()
        assert h.grad is not None
        assert torch.count_nonzero(h.grad) == 0
        assert out.num_targets.item() == out.num_kl.item() == 0


def test_fp16_does_not_underflow_under_the_mean() -> None:
    """Rows of a gradient of 1e-4 over 8192 tokens are 0 in fp16 until the scaler has spoken."""
    g = torch.Generator().manual_seed(0)
    h = (0.1 * torch.randn(8192, 4, generator=g)).half().requires_grad_()
    weight = (1e-4 * torch.randn(16, 4, generator=g)).half()
    y = torch.randint(0, 16, (8192,), generator=g)
    out = linear_tmkl_loss(h, None, weight, y, kl_weight=0.0)
    (grad,) = torch.autograd.grad(out.loss * 2.0**16, h)
    p = torch.softmax(h.detach().double() @ weight.double().T, -1)
    exact = (p - nn.functional.one_hot(y, 16)) @ weight.double() / 8192 * 2.0**16
    assert exact.abs().max() / 2.0**16 < 2.0**-24
    assert rel(grad, exact) <= 2 * U[torch.float16]


def test_the_default_chunk_is_a_pure_function() -> None:
    shard = VocabShard(0, 32768, 32768)
    assert default_chunk_tokens(2048, shard) == 512
    assert default_chunk_tokens(100, shard) == 100
    assert default_chunk_tokens(0, shard) == 1
    assert default_chunk_tokens(10**6, VocabShard(0, 256_000, 256_000)) == 256
    assert default_chunk_tokens(10**6, VocabShard(0, 2, 2)) == 4096
    assert default_chunk_tokens(8192, VocabShard(0, 128_256, 128_256), on_gpu=True) == 1024


VALID = torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"policy_hidden": torch.zeros(4)}, ["policy_hidden", "(4,)"]),
        ({"reference_hidden": torch.zeros(4, 5)}, ["reference_hidden", "(4, 5)", "(4, 3)"]),
        ({"reference_hidden": None}, ["reference_hidden", "kl_weight"]),
        ({"lm_head_weight": torch.zeros(7, 5)}, ["lm_head_weight", "(7, 5)", "(4, 3)"]),
        ({"lm_head_weight": torch.zeros(7)}, ["lm_head_weight", "(7,)", "(4, 3)"]),
        (
            {"lm_head_weight": torch.zeros(7, 3, requires_grad=True)},
            ["lm_head_weight", "requires grad"],
        ),
        ({"lm_head_weight": torch.zeros(1, 3)}, ["vocab_size=1"]),
        ({"bias": torch.zeros(7, requires_grad=True)}, ["bias", "requires grad"]),
        ({"bias": torch.zeros(6)}, ["bias", "(6,)", "(7, 3)"]),
        ({"shard": VocabShard(0, 9, 7)}, ["lm_head_weight", "(7, 3)", "9 rows"]),
        ({"logit_softcap": 0.0}, ["logit_softcap=0.0"]),
        ({"chunk_tokens": 0}, ["chunk_tokens=0"]),
        ({"targets": VALID + 7}, ["targets[0] = 7", "vocab_size=7"]),
        ({"targets": VALID[:2]}, ["targets", "(2,)", "(4, 3)"]),
        ({"kl_mask": VALID.bool()[:3]}, ["kl_mask", "(3,)", "(4, 3)"]),
        ({"direction": "up"}, ["direction='up'"]),
        ({"temperature": -1.0}, ["temperature=-1.0"]),
        ({"reduction": "max"}, ["reduction='max'"]),
    ],
)
def test_what_does_not_fit_is_named(changes: dict[str, Any], words: list[str]) -> None:
    arguments: dict[str, Any] = {
        "policy_hidden": torch.zeros(4, 3),
        "reference_hidden": torch.zeros(4, 3),
        "lm_head_weight": torch.zeros(7, 3),
        "targets": VALID,
    }
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the words below are the match)
        linear_tmkl_loss(**arguments | changes)
    for word in words:
        assert word in str(caught.value)


# ---------------------------------------------------------------- the module


def test_the_head_is_lm_head_when_called_with_hidden_states_alone() -> None:
    linear = nn.Linear(6, 11)
    linear.requires_grad_(False)
    assert linear.bias is not None
    head = Head(linear.weight, linear.bias, logit_scale=3.0, logit_softcap=2.0)
    x = torch.randn(2, 3, 6, requires_grad=True)
    assert torch.equal(head(x), linear(x))
    assert head(x).requires_grad
    assert head.weight is linear.weight
    assert dict(head.named_parameters()).keys() == {"weight", "bias"}
    assert dict(Head(linear.weight).named_parameters()).keys() == {"weight"}
    assert (head.in_features, head.out_features) == (6, 11)


def test_the_head_gives_the_loss_and_its_gradient_without_a_graph() -> None:
    for dtype in U:
        h, h0, weight, y = make(9, 16, 37, dtype)
        y[1] = 4
        kl_mask = torch.arange(9) % 3 != 0
        head = Head(nn.Parameter(weight, requires_grad=False), chunk_tokens=4)
        how = {
            "objective": Objective(temperature=2.0),
            "scales": Scales(torch.tensor(1 / 9), 0.5 / 6),
        }
        grad, sums = head(h, h0, y, use=Head.loss, kl_mask=kl_mask, **how)
        assert isinstance(sums, LossSums)
        tensors = (grad, sums.loss, sums.ce_sum, sums.kl_sum)
        assert not any(x.requires_grad or x.grad_fn for x in tensors)
        assert grad.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        out = linear_tmkl_loss(
            h, h0, weight, y, kl_mask=kl_mask, kl_weight=0.5, temperature=2.0, chunk_tokens=4
        )
        u = U[torch.float64 if dtype == torch.float64 else torch.float32]
        assert rel(sums.loss, out.loss) <= 8 * U[torch.float32]  # 1 / 9 is an fp32 tensor here
        assert rel(sums.ce_sum / 9, out.ce) <= 2 * u
        assert rel(sums.kl_sum / 6, out.kl) <= 2 * u
        assert (int(sums.num_targets), int(sums.num_kl)) == (9, 6)
        loss = attach_gradient(h, grad, sums)
        assert loss.dim() == 0
        assert rel(loss, sums.loss) <= u
        before = grad.clone()
        (attached,) = torch.autograd.grad(loss * 4, h)
        assert torch.equal(grad, before)
        (want,) = torch.autograd.grad(out.loss * 4, h)
        assert rel(attached, want) <= 8 * U[torch.float32] + (2 * U[dtype] if dtype in HALF else 0)
        assert attached.dtype == dtype


def test_the_head_without_a_reference_and_without_rows() -> None:
    h, h0, weight, y = make(6, 8, 21, torch.float32)
    y[1] = 4
    head = Head(nn.Parameter(weight, requires_grad=False))
    how = {"use": Head.loss, "objective": Objective()}
    grad, sums = head(h, None, y, scales=Scales(1 / 6), **how)
    out = linear_tmkl_loss(h, None, weight, y, kl_weight=0.0)
    assert rel(sums.loss, out.loss) <= 2 * U[torch.float32]
    assert rel(grad, torch.autograd.grad(out.loss, h)[0]) <= 8 * U[torch.float32]
    assert (sums.kl_sum.item(), sums.num_kl) == (0.0, 0)
    with Products() as seen:
        head(h, None, y, scales=Scales(), **how)
    assert seen.rows == [6, 6]
    grad, sums = head(h[:0], h0[:0], y[:0], scales=Scales(1.0, 1.0), **how)
    assert grad.shape == (0, 8)
    assert (sums.loss.item(), int(sums.num_targets)) == (0.0, 0)
    loss = attach_gradient(h[:0], grad, sums)
    loss.backward()


def test_a_shared_scale_of_zero_gives_no_gradient() -> None:
    h, h0, weight, y = make(6, 8, 21, torch.float32)
    y[1] = 4
    head = Head(nn.Parameter(weight, requires_grad=False))
    grad, sums = head(h, h0, y, use=Head.loss, objective=Objective(), scales=Scales(0.0))
    assert torch.count_nonzero(grad) == 0
    assert sums.loss.item() == 0.0
    assert sums.ce_sum > 0
    assert sums.kl_sum > 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_drift(dtype: torch.dtype) -> None:
    """Padding never wins, and rows are compared one by one with the dense reference."""
    h, h0, weight, y = make(40, 16, 9, dtype, noise=2.0, seed=1)
    y[1] = 4
    bias = torch.linspace(-1, 1, 12)
    padded = torch.cat([weight, 100 * torch.ones(3, 16, dtype=dtype)])
    head = Head(
        nn.Parameter(padded, requires_grad=False),
        nn.Parameter(bias, requires_grad=False),
        logit_scale=0.5,
        logit_softcap=4.0,
        shard=VocabShard(0, 12, 9),
        chunk_tokens=7,
    )
    rows = head(h, h0, y, use=Head.drift)
    assert isinstance(rows, DriftSums)
    how: dict[str, Any] = {"bias": bias[:9], "logit_scale": 0.5, "logit_softcap": 4.0}
    s, t = dense_logits(h.detach(), weight, **how), dense_logits(h0, weight, **how)
    limit = (gradient_bound(h, h0, weight) + 132) * U[
        torch.float64 if dtype == torch.float64 else torch.float32
    ]
    ce, kl = per_row(s, t, y, mask_target=False)
    _, tmkl = per_row(s, t, y)
    ce_reference, _ = per_row(t, None, y)
    for found, want in (
        (rows.ce_policy, ce),
        (rows.ce_reference, ce_reference),
        (rows.kl, kl),
        (rows.tmkl, tmkl),
    ):
        assert found.shape == (40,)
        assert ((found - want).abs() <= limit * (want + 1)).all()
    assert torch.equal(rows.top1_agree, s.argmax(-1) == t.argmax(-1))
    assert torch.equal(rows.top1_correct, s.argmax(-1) == y)
    assert 0 < rows.top1_agree.sum() < 40
    assert 0 < rows.top1_correct.sum() < 40
    most = head(h, h0, y, use=Head.drift, num_spots=6).spots
    assert torch.equal(most.rows, kl.topk(6).indices)
    log_p, log_q = s.log_softmax(-1)[most.rows], t.log_softmax(-1)[most.rows]
    assert torch.equal(most.tokens[:, :5], log_p.topk(5).indices)
    assert torch.equal(most.tokens[:, 5:], log_q.topk(5).indices)
    for found, want in ((most.log_p_policy, log_p), (most.log_p_reference, log_q)):
        assert ((found - want.gather(1, most.tokens)).abs() <= limit * (want.abs().max() + 1)).all()
    groups = torch.arange(40) // 10
    spread = head(h, h0, y, use=Head.drift, num_spots=7, spot_groups=groups).spots.rows
    best = torch.cat([10 * g + kl[groups == g].topk(2).indices for g in range(4)])
    assert torch.equal(spread, best[kl[best].topk(7).indices])
    empty = head(h[:0], h0[:0], y[:0], use=Head.drift)
    assert empty.kl.shape == empty.top1_agree.shape == (0,)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_inside_a_checkpointed_segment(use_reentrant: bool) -> None:
    """Its hooks hand a saved tensor out once."""
    hidden, reference, weight = torch.randn(6, 8), torch.randn(6, 8), torch.randn(11, 8)
    targets = torch.arange(6)
    grads = []
    for wrapped in (True, False):
        h = hidden.clone().requires_grad_()

        def segment(x: Tensor) -> Tensor:
            return linear_tmkl_loss(x, reference, weight, targets).loss

        checkpointed = torch.utils.checkpoint.checkpoint
        loss = checkpointed(segment, h, use_reentrant=use_reentrant) if wrapped else segment(h)
        loss.backward()
        grads.append(h.grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"logit_softcap": math.inf}, "logit_softcap=inf"),
        ({"logit_scale": math.nan}, "logit_scale=nan"),
        ({"reference_hidden": torch.zeros(6, 8, dtype=torch.int64)}, "reference_hidden has dtype"),
        ({"lm_head_weight": torch.zeros(11, 8, dtype=torch.int8)}, "lm_head_weight has dtype"),
    ],
)
def test_numbers_that_are_none(changes: dict[str, Any], says: str) -> None:
    arguments: dict[str, Any] = {
        "policy_hidden": torch.randn(6, 8),
        "reference_hidden": torch.randn(6, 8),
        "lm_head_weight": torch.randn(11, 8),
        "targets": torch.arange(6),
    }
    with pytest.raises(ValueError, match=says):
        linear_tmkl_loss(**arguments | changes)
