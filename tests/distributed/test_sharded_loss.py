"""The loss on shards of the vocabulary equals the loss on the whole: values, gradients, traffic.

Each test spawns one group of gloo processes; every rank compares its own part with the fp64 dense
reference, and the parent compares the ranks' values bit by bit. Bounds as in loss/test_head.py:
the arithmetic's own, the same as unsharded, since rows are put together in fp64.
"""

from __future__ import annotations

import collections
import itertools
import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dense_reference import dense_logits, dense_loss, dense_with_prompt, many_digits, per_row
from distributed.runner import mostly_long, run_distributed
from moored.loss.divergence import Objective, Scales
from moored.loss.head import Head, attach_gradient, linear_tmkl_loss
from moored.loss.tmkl import VocabShard, tmkl_loss

DIRECTIONS = ("forward", "reverse", "jsd")
U32, U64 = 2.0**-24, 2.0**-53

# (vocab_size, cuts): rank r owns [cuts[r], cuts[r + 1]). Padding follows vocab_size.
LAYOUTS = {
    1: [(7, [0, 7]), (7, [0, 16]), (507, [0, 512])],
    2: [
        (7, [0, 3, 8]),
        (7, [0, 7, 12]),  # the second rank holds padding alone
        (7, [0, 0, 7]),  # the first holds nothing
        (507, [0, 500, 512]),
        (50257, [0, 25152, 50304]),
    ],
    3: [
        (7, [0, 1, 6, 9]),  # ids 0 and 6 are alone: targets in row 0 and 3
        (507, [0, 169, 338, 507]),
        (50257, [0, 16768, 33536, 50304]),
    ],
    4: [
        (7, [0, 2, 4, 6, 8]),
        (7, [0, 1, 1, 7, 10]),
        (507, [0, 128, 256, 384, 512]),
        (507, [0, 3, 4, 506, 507]),
        (50257, [0, 12576, 25152, 37728, 50304]),
    ],
}


def rel(a: Tensor, b: Tensor) -> float:
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm().clamp_min(1e-300))


def make(
    v: int, padded: int, dtype: torch.dtype, *, t: int = 6, d: int = 8, noise: float = 0.5
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """h [t, d], h0, W [padded, d] with absurd padding, targets at both ends and one ignored."""
    g = torch.Generator().manual_seed(v + t)
    h = torch.randn(t, d, generator=g, dtype=torch.float64)
    h0 = (h + noise / 4 * torch.randn(t, d, generator=g, dtype=torch.float64)).to(dtype)
    weight = 4 / math.sqrt(d) * torch.randn(padded, d, generator=g, dtype=torch.float64)
    weight[v:] = 1e3
    y = torch.randint(0, v, (t,), generator=g)
    y[0], y[1], y[3 % t] = 0, -100, v - 1
    return h.to(dtype), h0, weight.to(dtype), y


def bound(h: Tensor, h0: Tensor, weight: Tensor) -> float:
    """As in unit/loss/test_head.py, in units of u."""
    h, h0, weight = h.double(), h0.double(), weight.double()
    logits = h @ weight.T
    spread = (logits.amax(1) - logits.amin(1)).amax() + 3 * ((h0 - h) @ weight.T).abs().amax()
    products = h.norm(dim=1).max() * weight.norm(dim=1).max()
    return float(2 * products + spread + 32 + math.sqrt(len(weight)))


def compare(
    rank: int,
    world_size: int,
    dtypes: tuple[torch.dtype, ...] = (torch.float64, torch.float32),
    largest: int = 10**6,
) -> list[Tensor]:
    """Every layout, direction, mask and dtype; returns the values, equal on every rank."""
    values = []
    for (v, cuts), direction, mask_target, dtype in itertools.product(
        LAYOUTS[world_size], DIRECTIONS, (True, False), dtypes
    ):
        if v > largest or (v > 1000 and (dtype == torch.float64) != (direction == "forward")):
            continue
        mine = slice(cuts[rank], cuts[rank + 1])
        shard = VocabShard(mine.start, mine.stop, v, dist.group.WORLD)
        h, h0, weight, y = make(v, cuts[-1], dtype, t=6 if v < 1000 else 4)
        kl_mask = torch.arange(len(y)) != 2
        options: dict[str, Any] = {
            "direction": direction,
            "mask_target": mask_target,
            "kl_weight": 0.7,
            "kl_mask": kl_mask,
            "temperature": 1.0 if v == 7 else 2.0,
            "reduction": ("mean", "sum", "none")[len(values) % 3],
        }
        how: dict[str, Any] = {"bias": torch.linspace(-1, 1, v, dtype=dtype), "logit_scale": 0.5}
        how["logit_softcap"] = None if v == 507 else 6.0
        u = U64 if dtype == torch.float64 else U32
        limit = bound(h, h0, weight[:v]) * u

        # From hidden states: the whole gradient on every rank.
        bias = torch.cat([how["bias"], torch.full((cuts[-1] - v,), 1e3, dtype=dtype)])
        local_h = h.clone().requires_grad_()
        out = linear_tmkl_loss(
            local_h,
            h0,
            weight[mine],
            y,
            shard=shard,
            chunk_tokens=2,
            **options,
            **how | {"bias": bias[mine]},
        )
        upstream = torch.linspace(1, 2, out.loss.numel(), dtype=dtype).reshape(out.loss.shape)
        (grad,) = torch.autograd.grad(out.loss, local_h, upstream)
        exact_h = h.double().requires_grad_()
        s, t = dense_logits(exact_h, weight[:v], **how), dense_logits(h0, weight[:v], **how)
        want, ce, kl = dense_loss(s, t, y, **options)
        (exact,) = torch.autograd.grad(want, exact_h, upstream.double())
        case = (v, cuts, direction, mask_target, dtype)
        assert rel(grad, exact) <= limit + 1e-13, case
        for found, expected in ((out.loss, want), (out.ce, ce), (out.kl, kl)):
            assert rel(found, expected) <= limit + 100 * u + 1e-12, case
        assert out.num_targets.item() == len(y) - 1
        assert out.num_kl.item() == len(y) - 2
        values += [out.loss.detach(), out.ce, out.kl, grad]

        # From logits: this rank's columns, padding exactly 0.
        full = torch.cat([s.detach(), torch.full((len(y), cuts[-1] - v), math.nan)], 1)
        full_t = torch.cat([t, torch.full((len(y), cuts[-1] - v), -math.inf)], 1)
        local_s = full[:, mine].to(dtype).requires_grad_()
        out = tmkl_loss(local_s, full_t[:, mine].to(dtype), y, shard=shard, **options)
        (grad,) = torch.autograd.grad(out.loss, local_s, upstream)
        exact_s = full[:, :v].to(dtype).double().requires_grad_()
        want, ce, kl = dense_loss(exact_s, full_t[:, :v].to(dtype), y, **options)
        (exact,) = torch.autograd.grad(want, exact_s, upstream.double())
        num_valid = max(0, min(mine.stop, v) - mine.start)
        assert torch.count_nonzero(grad[:, num_valid:]) == 0, case
        # Relative to the whole gradient, as a shard's own part may be next to nothing.
        part = exact[:, mine.start : mine.start + num_valid]
        error = (grad[:, :num_valid].double() - part).norm()
        assert error <= (limit + 1e-13) * exact.norm(), case
        for found, expected in ((out.loss, want), (out.ce, ce), (out.kl, kl)):
            assert rel(found, expected) <= limit + 100 * u + 1e-12, case
        values += [out.loss.detach(), out.ce, out.kl]
    return values


@pytest.mark.parametrize("world_size", mostly_long([1, 2, 3, 4], 2))
def test_shards_equal_the_whole(world_size: int) -> None:
    first, *others = run_distributed(compare, world_size)
    assert len(first) >= 7 * 24
    for other in others:
        for a, b in zip(first, other, strict=True):
            assert torch.equal(a, b)  # bit by bit: a rank that disagrees would decide otherwise


def compare_kernels(rank: int, world_size: int) -> list[Tensor]:
    """The same by Triton's kernels, in its interpreter; a row has several blocks."""
    import moored.loss.chunks
    from moored.loss import triton_loss

    moored.loss.chunks.kernels_run = lambda logits, dtype: dtype == torch.float32
    triton_loss.SUMMARY_BLOCK = triton_loss.GRADIENT_BLOCK = 128
    return compare(rank, world_size, (torch.float32,), 1000)


@pytest.mark.long
@pytest.mark.parametrize("world_size", [2, 3])
def test_shards_equal_the_whole_by_kernels(world_size: int) -> None:
    first, *others = run_distributed(compare_kernels, world_size)
    assert len(first) >= 7 * 12
    for other in others:
        for a, b in zip(first, other, strict=True):
            assert torch.equal(a, b)


def compare_selection(rank: int, world_size: int) -> list[Tensor]:
    """The policy learns targets that the base is sure enough of: some, all and none of them."""
    values = []
    for (v, cuts), dtype in itertools.product(LAYOUTS[world_size], (torch.float64, torch.float32)):
        if v > 1000:
            continue
        mine = slice(cuts[rank], cuts[rank + 1])
        shard = VocabShard(mine.start, mine.stop, v, dist.group.WORLD)
        h, h0, weight, y = make(v, cuts[-1], dtype, t=9)
        y = torch.where(y < 0, 2, y)
        how: dict[str, Any] = {"logit_scale": 0.5, "logit_softcap": None if v == 507 else 6.0}
        own = torch.nn.Parameter(weight[mine], requires_grad=False)
        head = Head(own, shard=shard, chunk_tokens=4, **how)
        u = U64 if dtype == torch.float64 else U32
        limit = (bound(h, h0, weight[:v]) + 100) * u + 1e-12
        p = torch.softmax(dense_logits(h0, weight[:v], **how), 1)
        perplexity = 1 / p.gather(1, y[:, None]).squeeze(1)
        ce = head(h0, y, use=Head.cross_entropy)
        assert rel(ce, perplexity.log()) <= limit, (v, cuts, dtype)
        known = perplexity.sort().values
        for most in ((known[4] * known[5]).sqrt(), 2 * known[-1], known[0] / 2):
            kept = ce <= most.log()
            assert torch.equal(kept, perplexity <= most)
            number = max(1, int(kept.sum()))
            grad, sums = head(
                h[kept],
                None,
                y[kept],
                use=Head.loss,
                objective=Objective(mask_target=False),
                scales=Scales(1 / number),
            )
            exact_h = h.double().requires_grad_()
            log_p = torch.log_softmax(dense_logits(exact_h, weight[:v], **how), 1)
            want = -(log_p.gather(1, y[:, None]).squeeze(1) * (perplexity <= most)).sum() / number
            (exact,) = torch.autograd.grad(want, exact_h)
            assert grad.shape == h[kept].shape
            assert sums.num_targets == int(kept.sum())
            if kept.any():
                assert rel(grad, exact[kept]) <= limit, (v, cuts, dtype)
                assert rel(sums.loss, want) <= limit
            else:
                assert (float(sums.loss), float(want)) == (0.0, 0.0)
            values += [ce, sums.loss, grad]
    return values


@pytest.mark.parametrize("world_size", mostly_long([1, 2, 3, 4], 2))
def test_targets_are_selected_alike_on_shards(world_size: int) -> None:
    first, *others = run_distributed(compare_selection, world_size)
    assert len(first) >= 2 * 9
    for other in others:
        for a, b in zip(first, other, strict=True):
            assert torch.equal(a, b)


def compare_prompt(
    rank: int, world_size: int, dtypes: tuple[torch.dtype, ...] = (torch.float64, torch.float32)
) -> list[Tensor]:
    """Rows without a target among the others, and a KL of parts; of hidden states and logits."""
    values = []
    kinds: list[dict[str, Any]] = [
        {"direction": direction, "mask_target": mask_target}
        for direction, mask_target in itertools.product(DIRECTIONS, (True, False))
    ]
    kinds.append({"target_weight": 0.4, "rest_factor": "base"})
    for (v, cuts), kind, dtype in itertools.product(LAYOUTS[world_size], kinds, dtypes):
        if v > 1000:
            continue
        mine = slice(cuts[rank], cuts[rank + 1])
        shard = VocabShard(mine.start, mine.stop, v, dist.group.WORLD)
        h, h0, weight, y = make(v, cuts[-1], dtype, t=9)
        y[[5, 6]] = -100
        options: dict[str, Any] = {
            **kind,
            "kl_weight": 0.3,
            "prompt_weight": 1.7,
            "kl_mask": torch.arange(len(y)) % 4 != 2,  # without a target and a KL is row 6
            "temperature": 1.0 if v == 7 else 2.0,
            "reduction": ("mean", "sum", "none")[len(values) % 3],
        }
        u = U64 if dtype == torch.float64 else U32
        limit = (bound(h, h0, weight[:v]) + 100) * u + 1e-12
        local_h = h.clone().requires_grad_()
        how: dict[str, Any] = {"shard": shard, "chunk_tokens": 4}
        out = linear_tmkl_loss(local_h, h0, weight[mine], y, **how, **options)
        upstream = torch.linspace(1, 2, out.loss.numel(), dtype=dtype).reshape(out.loss.shape)
        (grad,) = torch.autograd.grad(out.loss, local_h, upstream)
        exact_h = h.double().requires_grad_()
        s, t = dense_logits(exact_h, weight[:v]), dense_logits(h0, weight[:v])
        want = dense_with_prompt(s, t, y, **options)
        (exact,) = torch.autograd.grad(want[0], exact_h, upstream.double())
        case = (v, cuts, kind, dtype)
        assert rel(grad, exact) <= limit, case
        for found, expected in zip((out.loss, out.ce, out.kl, out.kl_prompt), want, strict=True):
            assert rel(found, expected) <= limit, case
        assert int(out.num_prompt) == 2
        values += [out.loss.detach(), out.ce, out.kl, out.kl_prompt, grad]

        full = torch.nn.functional.pad(s.detach(), (0, cuts[-1] - v), value=math.nan)
        full_t = torch.nn.functional.pad(t, (0, cuts[-1] - v), value=-math.inf)
        local_s = full[:, mine].to(dtype).requires_grad_()
        out = tmkl_loss(local_s, full_t[:, mine].to(dtype), y, shard=shard, **options)
        (grad,) = torch.autograd.grad(out.loss, local_s, upstream)
        exact_s = full[:, :v].to(dtype).double().requires_grad_()
        want = dense_with_prompt(exact_s, full_t[:, :v].to(dtype), y, **options)
        (exact,) = torch.autograd.grad(want[0], exact_s, upstream.double())
        num_valid = max(0, min(mine.stop, v) - mine.start)
        assert torch.count_nonzero(grad[:, num_valid:]) == 0, case
        part = exact[:, mine.start : mine.start + num_valid]
        assert (grad[:, :num_valid].double() - part).norm() <= limit * exact.norm(), case
        for found, expected in zip((out.loss, out.ce, out.kl, out.kl_prompt), want, strict=True):
            assert rel(found, expected) <= limit, case
        values += [out.loss.detach(), out.kl_prompt]
    return values


@pytest.mark.parametrize("world_size", mostly_long([1, 2, 3, 4], 3))
def test_rows_without_a_target_on_shards(world_size: int) -> None:
    first, *others = run_distributed(compare_prompt, world_size)
    assert len(first) >= 7 * 24
    for other in others:
        for a, b in zip(first, other, strict=True):
            assert torch.equal(a, b)


def compare_prompt_by_kernels(rank: int, world_size: int) -> list[Tensor]:
    import moored.loss.chunks
    from moored.loss import triton_loss

    moored.loss.chunks.kernels_run = lambda logits, dtype: dtype == torch.float32
    triton_loss.SUMMARY_BLOCK = triton_loss.GRADIENT_BLOCK = 128
    return compare_prompt(rank, world_size, (torch.float32,))


@pytest.mark.long
def test_rows_without_a_target_on_shards_by_kernels() -> None:
    first, *others = run_distributed(compare_prompt_by_kernels, 2)
    for other in others:
        for a, b in zip(first, other, strict=True):
            assert torch.equal(a, b)


def small_kl(rank: int, world_size: int) -> None:
    """The KL and its gradient from KL 1e-2 to 1e-8, summed by the chain rule over the shards."""
    cuts = [0, 20, 21, 61]
    shard = VocabShard(cuts[rank], cuts[rank + 1], 61, dist.group.WORLD)
    mine = slice(cuts[rank], cuts[rank + 1])
    for kl, direction, mask_target, dtype in itertools.product(
        (1e-2, 1e-4, 1e-6, 1e-8), DIRECTIONS, (True, False), (torch.float32, torch.bfloat16)
    ):
        h, h0, weight, y = make(61, 61, dtype, noise=math.sqrt(2 * kl))
        h0 = h + (h0.double() - h.double()).to(dtype)
        y[1] = 20  # all that its shard holds
        if dtype == torch.bfloat16:  # whose steps are larger than such differences
            h0 = h.double()
            h0[:, 0] *= 1 + math.sqrt(kl)
            h0 = h0.float()
        options: dict[str, Any] = {"direction": direction, "mask_target": mask_target}
        head = Head(nn.Parameter(weight[mine], requires_grad=False), shard=shard, chunk_tokens=4)
        how = {"objective": Objective(**options), "scales": Scales(0.0, 1.0)}
        grad, sums = head(h, h0, y, use=Head.loss, **how)
        s, t = dense_logits(h, weight), dense_logits(h0, weight)
        _, want, _, kl_grad = many_digits(s, t, y, **options)
        limit = 2 * bound(h, h0, weight) * U32
        case = (kl, direction, mask_target, dtype, float(want.mean()))
        assert want.mean() < 30 * kl, case
        assert rel(grad, kl_grad @ weight.double()) <= limit, case
        assert rel(sums.kl_sum, want.sum()) <= limit + 132 * U32, case


def test_a_small_kl_keeps_its_accuracy_over_shards() -> None:
    run_distributed(small_kl, 3)


class Traffic(TorchDispatchMode):
    """Counts the collectives below any Python interface, and the elements of each input."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func.overloadpacket.__name__
            tensors = args[1] if "gather" in name else args[0]
            tensors = tensors if isinstance(tensors, (list, tuple)) else [tensors]
            self.seen.append((name, sum(x.numel() for x in tensors)))
        return func(*args, **(kwargs or {}))

    def counts(self) -> dict[str, int]:
        return dict(collections.Counter(name for name, _ in self.seen))


def count(rank: int, world_size: int) -> dict[str, Any]:
    """Collectives of forward and backward for 7 valid tokens in chunks of 3."""
    h, h0, weight, y = make(12, 12, torch.float32, t=8)
    mine = slice(0, 5) if rank == 0 else slice(5, 12)
    shard = VocabShard(mine.start, mine.stop, 12, dist.group.WORLD)
    out: dict[str, Any] = {}
    for direction, temperature in itertools.product(DIRECTIONS, (1.0, 2.0)):
        h.requires_grad_()
        with Traffic() as traffic:
            loss = linear_tmkl_loss(
                h,
                h0,
                weight[mine],
                y,
                shard=shard,
                chunk_tokens=3,
                direction=direction,  # type: ignore[arg-type]
                temperature=temperature,
            ).loss
        forward, gathered = traffic.counts(), max(n for name, n in traffic.seen if "gather" in name)
        with Traffic() as traffic:
            loss.backward()
        out[f"{direction} {temperature}"] = forward, gathered, traffic.counts()
    with Traffic() as traffic:
        linear_tmkl_loss(h, None, weight[mine], y, shard=shard, chunk_tokens=3, kl_weight=0.0)
    out["ce alone"] = traffic.counts(), max(n for name, n in traffic.seen if "gather" in name), {}
    with torch.no_grad(), Traffic() as traffic:
        linear_tmkl_loss(h, h0, weight[mine], y, shard=shard, chunk_tokens=3)
    out["no gradient"] = traffic.counts(), 18, {}
    logits, logits0 = (h @ weight[mine].T).detach().requires_grad_(), h0 @ weight[mine].T
    with Traffic() as traffic:
        tmkl_loss(logits, logits0, y, shard=shard).loss.backward()
    out["logits"] = traffic.counts(), max(n for _, n in traffic.seen) * 3 // 7, {}
    head = Head(nn.Parameter(weight[mine], requires_grad=False), shard=shard, chunk_tokens=3)
    with Traffic() as traffic:
        head(h, h0, y.clamp_min(0), use=Head.drift)
    out["drift"] = traffic.counts(), 30, {}
    with_prompt = {"kl_mask": torch.ones_like(y, dtype=torch.bool), "prompt_weight": 1.0}
    with Traffic() as traffic:
        linear_tmkl_loss(h, h0, weight[mine], y, shard=shard, chunk_tokens=3, **with_prompt)
    out["with a prompt"] = traffic.counts(), 18, {}
    with Traffic() as traffic:
        linear_tmkl_loss(h, h0, weight[mine], torch.full_like(y, -100), shard=shard)
    out["nothing valid"] = traffic.counts(), 0, {}
    return out


def test_one_collective_per_chunk_and_one_for_the_gradient(two_ranks: Any) -> None:
    gather, reduce = "_allgather_base_", "allreduce_"
    for found, _ in two_ranks:
        # Three chunks; 6 numbers per token, 7 with a temperature; jsd two collectives per chunk.
        for direction, gathers in (("forward", 3), ("reverse", 3), ("jsd", 6)):
            once = {gather: gathers, reduce: 1}
            assert found[f"{direction} 1.0"] == (once, 18, {})
            assert found[f"{direction} 2.0"] == (once, 21, {})
        assert found["ce alone"] == ({gather: 3, reduce: 1}, 6, {})
        assert found["no gradient"] == ({gather: 3}, 18, {})
        assert found["logits"] == ({gather: 1}, 18, {})
        # The row without a target is in a chunk of the others: no collective more.
        assert found["with a prompt"] == ({gather: 3, reduce: 1}, 18, {})
        assert found["drift"] == ({gather: 3}, 30, {})
        assert found["nothing valid"] == ({}, 0, {})


def sharded_head(rank: int, world_size: int) -> list[Tensor]:
    """Head in training and in evaluation, over a tied, padded, capped vocabulary."""
    h, h0, weight, y = make(29, 34, torch.float32, t=40, noise=3.0)
    y[1] = 5
    cuts = [0, 15, 34]
    mine = slice(cuts[rank], cuts[rank + 1])
    options: dict[str, Any] = {"logit_softcap": 5.0, "chunk_tokens": 9}
    whole = Head(nn.Parameter(weight, requires_grad=False), shard=VocabShard(0, 34, 29), **options)
    head = Head(
        nn.Parameter(weight[mine], requires_grad=False),
        shard=VocabShard(mine.start, mine.stop, 29, dist.group.WORLD),
        **options,
    )
    rows, want = (one(h, h0, y, use=Head.drift, num_spots=4) for one in (head, whole))
    assert torch.equal(rows.spots.rows, want.spots.rows)
    assert torch.equal(rows.spots.tokens, want.spots.tokens)
    for name in ("log_p_policy", "log_p_reference"):
        assert rel(getattr(rows.spots, name), getattr(want.spots, name)) <= 132 * U32
    for name in ("ce_policy", "ce_reference", "kl", "tmkl"):
        assert rel(getattr(rows, name), getattr(want, name)) <= 132 * U32
    assert torch.equal(rows.top1_agree, want.top1_agree)
    assert torch.equal(rows.top1_correct, want.top1_correct)
    assert 0 < want.top1_agree.sum() < 40
    ce, kl = per_row(
        dense_logits(h, weight[:29], logit_softcap=5.0),
        dense_logits(h0, weight[:29], logit_softcap=5.0),
        y,
    )
    assert rel(rows.ce_policy, ce) <= bound(h, h0, weight[:29]) * U32
    assert rel(rows.tmkl, kl) <= (bound(h, h0, weight[:29]) + 132) * U32
    how: dict[str, Any] = {"use": Head.loss, "scales": Scales(1 / 40, 1 / 40)}
    grad, sums = head(h, h0, y, objective=Objective(), **how)
    want_grad, want_sums = whole(h, h0, y, objective=Objective(), **how)
    assert rel(grad, want_grad) <= bound(h, h0, weight[:29]) * U32
    assert rel(sums.loss, want_sums.loss) <= 132 * U32
    local = h.clone().requires_grad_()
    attach_gradient(local, grad, sums).backward()
    assert local.grad is not None
    assert torch.equal(local.grad, grad)
    how["objective"] = Objective(ce_weighting="entropy", kl_weighting="entropy")
    how["kl_weights"] = torch.arange(40.0) / 20
    by_token, by_token_sums = head(h, h0, y, **how)
    want_grad, want_sums = whole(h, h0, y, **how)
    assert rel(by_token, want_grad) <= bound(h, h0, weight[:29]) * U32
    assert rel(by_token_sums.loss, want_sums.loss) <= 132 * U32
    assert rel(by_token, grad) > 0.1
    both = [grad, sums.loss, by_token, by_token_sums.loss]
    return [*both, rows.kl, rows.tmkl, rows.ce_policy, rows.ce_reference]


def test_the_sharded_head(two_ranks: Any) -> None:
    (_, first), (_, second) = two_ranks
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def bad_shard(rank: int) -> None:
    """Errors are raised on every rank alike, before any collective."""
    h, h0, weight, y = make(7, 8, torch.float32)
    shard = VocabShard(4 * rank, 4 * rank + 4, 7, dist.group.WORLD)
    with pytest.raises(ValueError, match=r"lm_head_weight has shape \(8, 8\).* 4 rows"):
        linear_tmkl_loss(h, h0, weight, y, shard=shard)
    with pytest.raises(ValueError, match=r"targets\[0\] = 7 is outside \[0, vocab_size=7\)"):
        linear_tmkl_loss(h, h0, weight[4 * rank : 4 * rank + 4], y.fill_(7), shard=shard)


def on_two_ranks(rank: int, world_size: int) -> tuple[dict[str, Any], list[Tensor]]:
    bad_shard(rank)
    return count(rank, world_size), sharded_head(rank, world_size)


@pytest.fixture(scope="module")
def two_ranks() -> list[tuple[dict[str, Any], list[Tensor]]]:
    """One group of processes for the short tests: starting it takes longer than they do."""
    return run_distributed(on_two_ranks, 2)
