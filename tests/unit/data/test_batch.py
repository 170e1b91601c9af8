"""Collation, packing and dealing, against plain loops."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moored.data.batch import (
    IGNORE_INDEX,
    Sample,
    batches_of,
    collate,
    deal,
    empty_batch,
    pack,
    row_tokens,
)

PAD = 0  # also a real token of the samples below: padding must not be known by its id


def sample(name: str, ids: list[int], targets: str, kl: str | None = None) -> Sample:
    """Targets and KL positions as strings of 0 and 1."""
    as_mask = lambda bits: np.array([bit == "1" for bit in bits])  # noqa: E731
    return Sample(
        sample_id=name,
        input_ids=np.array(ids, dtype=np.int32),
        label_mask=as_mask(targets),
        kl_mask=None if kl is None else as_mask(kl),
    )


@st.composite
def samples(draw, max_size: int = 12) -> list[Sample]:
    out = []
    for index in range(draw(st.integers(0, max_size))):
        length = draw(st.integers(1, 9))
        bits = st.lists(st.sampled_from("01"), min_size=length, max_size=length).map("".join)
        ids = draw(st.lists(st.integers(0, 30), min_size=length, max_size=length))
        out.append(sample(f"s{index}", ids, draw(bits), draw(st.none() | bits)))
    return out


def test_all_positions_by_hand():
    a = sample("a", [5, 6, 0, 9], "0011", "0101")
    b = sample("b", [7, 8], "00")
    batch = collate([[a, b], [b]], PAD, all_positions=True)
    # Of each sample every token but the first is seen from the one before it.
    assert batch.target_index.tolist() == [0, 1, 2, 4, 6]
    assert batch.targets.tolist() == [IGNORE_INDEX, 0, 9, IGNORE_INDEX, IGNORE_INDEX]
    assert batch.kl_mask.tolist() == [True, False, True, True, True]
    assert (batch.num_targets, batch.num_kl, batch.num_prompt) == (2, 1, 3)


@given(st.lists(samples(max_size=4), max_size=4))
def test_all_positions_are_the_targets_and_what_is_between(rows):
    few, every = collate(rows, PAD), collate(rows, PAD, all_positions=True)
    learned = every.targets != IGNORE_INDEX
    for name in ("target_index", "targets", "kl_mask"):
        assert torch.equal(getattr(every, name)[learned], getattr(few, name)), name
    assert torch.equal(every.input_ids, few.input_ids)
    assert (every.num_targets, every.num_kl) == (few.num_targets, few.num_kl)
    assert few.num_prompt == 0
    expected, drawn = [], 0
    width = every.input_ids.shape[1]
    for index, row in enumerate(rows):
        start = index * width
        for one in row:
            expected += range(start, start + len(one) - 1)
            start += len(one)
            kl = np.ones(len(one), dtype=bool) if one.kl_mask is None else one.kl_mask
            drawn += int((kl & ~one.label_mask)[1:].sum())
    assert every.target_index.tolist() == expected
    assert every.num_prompt == drawn


def test_one_row_by_hand():
    a = sample("a", [5, 6, 0], "011", "001")
    b = sample("b", [7, 8], "11")
    batch = collate([[a, b], [b]], PAD)
    assert batch.input_ids.tolist() == [[5, 6, 0, 7, 8], [7, 8, 0, 0, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 1, 2]]
    # The row predicts 6 and 0 (a real token with the padding's id) from a, 8 from each b.
    assert batch.target_index.tolist() == [0, 1, 3, 5]
    assert batch.targets.tolist() == [6, 0, 8, 8]
    assert batch.kl_mask.tolist() == [False, True, True, True]
    assert (batch.num_targets, batch.num_kl, batch.num_tokens) == (4, 3, 7)
    assert batch.sample_ids == ("a", "b", "b")


def test_positions_run_on_into_padding_without_packing():
    batch = collate([[sample("a", [1, 2, 3], "111")], [sample("b", [4], "1")]], PAD)
    assert batch.position_ids.tolist() == [[0, 1, 2], [0, 1, 2]]


@settings(deadline=None)
@given(samples(), st.integers(1, 4), st.integers(0, 5))
def test_collate_against_a_loop(all_samples, per_row, extra):
    rows = [all_samples[i : i + per_row] for i in range(0, len(all_samples), per_row)]
    length = max([1, *map(row_tokens, rows)]) + extra
    batch = collate(rows, PAD, length)
    index, targets, kl = [], [], []
    for r, row in enumerate(rows):
        place = r * length
        for one in row:
            for i in range(len(one)):
                assert batch.input_ids.reshape(-1)[place + i] == one.input_ids[i]
                assert batch.position_ids.reshape(-1)[place + i] == i
                if i > 0 and one.label_mask[i]:
                    index.append(place + i - 1)
                    targets.append(int(one.input_ids[i]))
                    kl.append(True if one.kl_mask is None else bool(one.kl_mask[i]))
            place += len(one)
    assert batch.target_index.tolist() == index
    assert batch.targets.tolist() == targets
    assert batch.kl_mask.tolist() == kl
    assert batch.num_targets == len(targets) == sum(one.num_targets for one in all_samples)
    assert batch.num_kl == sum(kl)
    assert batch.num_tokens == sum(map(len, all_samples))
    assert batch.input_ids.shape == (max(1, len(rows)), length)
    assert batch.input_ids.dtype == batch.target_index.dtype == batch.targets.dtype == torch.int64


def test_empty_batches_have_no_targets():
    for batch in (empty_batch(3), collate([[], []], 3, 4)):
        assert batch.num_targets == batch.num_kl == batch.num_tokens == 0
        assert len(batch.targets) == len(batch.target_index) == len(batch.kl_mask) == 0
        assert batch.sample_ids == ()
        assert (batch.input_ids == 3).all()
    assert empty_batch(3).input_ids.shape == (1, 1)


def test_to_keeps_everything():
    batch = collate([[sample("a", [1, 2], "11")]], PAD)
    moved = batch.to("cpu")
    assert moved.sample_ids == batch.sample_ids
    assert torch.equal(moved.targets, batch.targets)


@pytest.mark.parametrize("bad", [-1, 31])
def test_ids_outside_the_vocabulary_are_refused_by_name(bad):
    rows = [[sample("fine", [1, 30], "11"), sample("t.jsonl:7", [2, bad], "01")]]
    with pytest.raises(ValueError, match=rf"t\.jsonl:7: token id {bad} is outside .* 31"):
        collate(rows, PAD, vocab_size=31)
    collate([[sample("fine", [0, 30], "11")]], PAD, vocab_size=31)


def test_wrong_shapes_are_refused_by_name():
    with pytest.raises(ValueError, match="x: label_mask has 2 entries for 3 tokens"):
        collate([[sample("x", [1, 2, 3], "11")]], PAD)
    with pytest.raises(ValueError, match="x: kl_mask has 1 entries for 2 tokens"):
        collate([[sample("x", [1, 2], "11", "1")]], PAD)
    with pytest.raises(ValueError, match=r"pad_to=1 is shorter than a row of 2 tokens \(x\)"):
        collate([[sample("x", [1, 2], "11")]], PAD, 1)
    with pytest.raises(ValueError, match="x has 3 tokens, more than max_length=2"):
        pack([sample("x", [1, 2, 3], "111")], 2)


@settings(deadline=None)
@given(samples(max_size=30), st.integers(9, 20))
def test_packing_loses_nothing_and_fits(all_samples, max_length):
    rows = pack(all_samples, max_length)
    flat = [one.sample_id for row in rows for one in row]
    assert sorted(flat) == sorted(one.sample_id for one in all_samples)
    assert all(0 < row_tokens(row) <= max_length for row in rows)
    assert [one.sample_id for row in pack(all_samples, max_length) for one in row] == flat
    order = {one.sample_id: i for i, one in enumerate(all_samples)}
    assert all(
        [order[s.sample_id] for s in row] == sorted(order[s.sample_id] for s in row) for row in rows
    )
    # First fit: no two rows would have fitted into one.
    sums = sorted(map(row_tokens, rows))
    assert len(sums) < 2 or sums[0] + sums[1] > max_length


def test_packing_fills_rows_well():
    generator = np.random.default_rng(0)
    lengths = generator.integers(10, 120, size=512)
    many = [sample(f"{i}", [1] * int(n), "1" * int(n)) for i, n in enumerate(lengths)]
    rows = pack(many, 256)
    assert sum(lengths) / (256 * len(rows)) > 0.97


@settings(deadline=None)
@given(samples(max_size=25), st.integers(1, 5), st.integers(1, 6))
def test_dealing_covers_the_global_batch(all_samples, micro_batch_size, dp_size):
    rows = [[one] for one in all_samples]
    shares = [
        deal(rows, micro_batch_size=micro_batch_size, dp_rank=rank, dp_size=dp_size)
        for rank in range(dp_size)
    ]
    dealt = Counter(row[0].sample_id for share in shares for run in share for row in run)
    assert dealt == Counter(one.sample_id for one in all_samples)
    counts = {len(share) for share in shares}
    assert counts == {-(-len(rows) // (micro_batch_size * dp_size))}
    sizes = [len(run) for share in shares for run in share]
    assert all(size <= micro_batch_size for size in sizes)
    assert not sizes or max(sizes) - min(sizes) <= 1
    # Like lengths together: in the order of dealing, lengths never rise.
    runs = [shares[r][i] for i in range(counts.pop()) for r in range(dp_size)]
    lengths = [len(row[0]) for run in runs for row in run]
    assert lengths == sorted(lengths, reverse=True)


def test_dealing_refuses_impossible_ranks():
    with pytest.raises(ValueError, match="dp_rank=2, dp_size=2"):
        deal([], micro_batch_size=1, dp_rank=2, dp_size=2)


def test_flattened_batches_have_one_row_and_no_padding():
    rows = [[sample("a", [1, 2, 3], "011")], [sample("b", [4, 5], "01")], [sample("c", [6], "1")]]
    (flat,) = batches_of(
        rows, micro_batch_size=3, dp_rank=0, dp_size=1, pad_token_id=PAD, flatten=True
    )
    assert flat.input_ids.tolist() == [[1, 2, 3, 4, 5, 6]]
    assert flat.position_ids.tolist() == [[0, 1, 2, 0, 1, 0]]
    (padded,) = batches_of(rows, micro_batch_size=3, dp_rank=0, dp_size=1, pad_token_id=PAD)
    assert padded.input_ids.shape == (3, 3)
    assert padded.targets.tolist() == flat.targets.tolist() == [2, 3, 5]
