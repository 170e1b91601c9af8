"""Weights of tokens by what the models say, against a dense reference with its own formulas.

The reference takes its gradient by autograd, with the weights as constants.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dense_reference import dense_logits, per_row
from moored.data.batch import answer_offsets
from moored.loss.divergence import Objective, Scales
from moored.loss.head import Head, LossSums


def top_entropy(logits: Tensor, k: int = 20) -> Tensor:
    """Entropy of the softmax over each row's k largest logits, over log(k)."""
    rows = []
    for row in logits.double():
        p = torch.softmax(torch.sort(row, descending=True).values[:k], 0)
        rows.append(-(p * torch.log(p)).sum() / math.log(k))
    return torch.stack(rows)


def dense(
    hidden: Tensor,
    reference: Tensor | None,
    weight: Tensor,
    targets: Tensor,
    *,
    ce: str,
    kl: str,
    kl_weights: Tensor | None,
    kl_mask: Tensor | None,
    scales: tuple[float, float],
    **options: object,
) -> tuple[Tensor, Tensor]:
    h = hidden.double().requires_grad_()
    s = dense_logits(h, weight)
    t = None if reference is None else dense_logits(reference.double(), weight)
    ces, kls = per_row(s, t, targets, kl_mask=kl_mask, **options)  # type: ignore[arg-type]
    ce_factor, kl_factor = torch.ones_like(ces), torch.ones_like(kls)
    if ce == "probability":
        ce_factor = torch.softmax(s, 1).gather(1, targets[:, None]).squeeze(1).detach()
    elif ce == "entropy":
        ce_factor = top_entropy(s).detach()
    if kl == "entropy":
        assert t is not None
        kl_factor = top_entropy(t).detach()
    if kl_weights is not None:
        kl_factor = kl_factor * kl_weights
    loss = scales[0] * (ce_factor * ces).sum() + scales[1] * (kl_factor * kls).sum()
    loss.backward()
    assert h.grad is not None
    return loss.detach(), h.grad


def close(ours: Tensor, theirs: Tensor, limit: float) -> None:
    size = theirs.detach().abs().max().clamp_min(1e-30)
    assert float((ours.detach().double() - theirs.detach()).abs().max() / size) <= limit


# fp32: some tens of roundings of 6e-8 in sums over V and D; fp64 likewise of 1e-16.
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
@pytest.mark.parametrize("direction", ["forward", "reverse", "jsd"])
@pytest.mark.parametrize(
    ("ce", "kl", "by_row", "masked"),
    [
        ("probability", "uniform", False, False),  # ASFT
        ("entropy", "uniform", False, False),  # EAFT, here with a KL
        ("uniform", "entropy", False, True),
        ("uniform", "uniform", True, True),
        ("entropy", "entropy", True, False),
    ],
)
@pytest.mark.parametrize("num_columns", [37, 11])  # more and fewer than the 20 first choices
def test_weighted_tokens_are_those_of_the_dense_reference(
    dtype: torch.dtype, limit: float, direction: str, ce: str, kl: str, by_row: bool, masked: bool,
    num_columns: int,
) -> None:  # fmt: skip
    g = torch.Generator().manual_seed(5)
    n, d = 13, 6
    hidden = torch.randn(n, d, generator=g).to(dtype)
    reference = hidden + 0.3 * torch.randn(n, d, generator=g).to(dtype)
    weight = torch.randn(num_columns, d, generator=g).to(dtype)
    targets = torch.randint(num_columns, (n,), generator=g)
    kl_mask = torch.rand(n, generator=g) < 0.7
    kl_weights = torch.rand(n, generator=g) * 3 if by_row else None
    head = Head(torch.nn.Parameter(weight, requires_grad=False), chunk_tokens=5)
    options = {"direction": direction, "mask_target": masked, "temperature": 1.3}
    objective = Objective(ce_weighting=ce, kl_weighting=kl, **options)  # type: ignore[arg-type]
    found = head(
        hidden, reference, targets, use=Head.loss, objective=objective, scales=Scales(0.7, 0.4),
        kl_mask=kl_mask, kl_weights=kl_weights,
    )  # fmt: skip
    assert isinstance(found, tuple)
    grad, sums = found
    assert isinstance(sums, LossSums)
    loss, expected = dense(
        hidden, reference, weight, targets, ce=ce, kl=kl, kl_weights=kl_weights, kl_mask=kl_mask,
        scales=(0.7, 0.4), **options,
    )  # fmt: skip
    close(grad, expected, limit)
    close(sums.loss, loss, limit)
    # The figures that are logged stay those of the plain loss.
    ces, kls = per_row(
        dense_logits(hidden.double(), weight), dense_logits(reference.double(), weight), targets,
        kl_mask=kl_mask, **options,  # type: ignore[arg-type]
    )  # fmt: skip
    close(sums.ce_sum, ces.sum(), limit)
    close(sums.kl_sum, kls.sum(), limit)


def test_eaft_without_a_reference() -> None:
    g = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(9, 5, generator=g).double(), torch.randn(50, 5, generator=g)
    targets = torch.randint(50, (9,), generator=g)
    head = Head(torch.nn.Parameter(weight, requires_grad=False))
    how = {"objective": Objective(ce_weighting="entropy"), "scales": Scales(1 / 9)}
    found = head(hidden, None, targets, use=Head.loss, **how)
    assert isinstance(found, tuple)
    loss, expected = dense(
        hidden, None, weight, targets, ce="entropy", kl="uniform", kl_weights=None, kl_mask=None,
        scales=(1 / 9, 0.0),
    )  # fmt: skip
    close(found[0], expected, 1e-12)
    assert isinstance(found[1], LossSums)
    close(found[1].loss, loss, 1e-12)


def test_places_in_an_answer_start_anew_behind_every_gap() -> None:
    index = torch.tensor([3, 4, 5, 9, 10, 20, 22, 23])
    learned = torch.ones_like(index)
    assert answer_offsets(index, learned).tolist() == [0, 1, 2, 0, 1, 0, 0, 1]
    assert answer_offsets(index[:0], learned[:0]).tolist() == []
    assert answer_offsets(index[:1], learned[:1]).tolist() == [0]


def test_what_is_not_learned_has_no_place_in_an_answer() -> None:
    index, none = torch.arange(7), torch.iinfo(torch.int64).max
    targets = torch.tensor([-100, 5, 6, -100, -100, 7, 8])
    assert answer_offsets(index, targets).tolist() == [none, 0, 1, none, none, 0, 1]
    weights = Objective(first_tokens=1, first_tokens_factor=5.0).kl_weights(
        answer_offsets(index, targets)
    )
    assert weights is not None
    assert weights.tolist() == [1, 5, 1, 1, 1, 5, 1]
