"""The order of training: weights, epochs, ranks, resume, packing, streamed sources, prefetching."""

from __future__ import annotations

import json
import re
import threading
import tracemalloc
from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datakit import CHAT, TOKENIZER, config, jsonl, load
from moored import data
from moored.config import Source
from moored.data import samples, stream
from moored.data.batch import Batch
from moored.data.samples import SampleSet, load_samples
from moored.data.stream import Prefetcher, TrainStream
from moored.data.token_arrays import Drops, HeldSource, Tokens
from moored.utils.errors import UserError


def held(name: str, lengths: list[int]) -> HeldSource:
    parts = [
        (
            f"{name}:{i}",
            Tokens(
                input_ids=np.arange(i, i + n, dtype=np.int32) % 50,
                label_mask=np.arange(n) % 3 != 1,
            ),
        )
        for i, n in enumerate(lengths)
    ]
    return HeldSource(name, parts, Drops(met=len(parts)))


def make_stream(
    sizes: list[list[int]], weights: list[float] | None = None, packing: bool = False, **train: Any
) -> TrainStream:
    weights = weights or [1.0] * len(sizes)
    sources = tuple(held(f"s{i}", lengths) for i, lengths in enumerate(sizes))
    if "epochs" in train:
        train.setdefault("steps", None)
    if "global_batch_tokens" in train:
        train.setdefault("global_batch_sequences", None)
    recipe = config([{"path": "unused"}], data={"packing": packing, "max_length": 20}, train=train)
    found = SampleSet(section="data.train", sources=sources, weights=tuple(weights))
    return TrainStream(recipe, TOKENIZER, found)


def drawn(one: TrainStream, steps: int) -> list[list[str]]:
    """Sample ids of each global step, in the order of one rank with one micro-batch a row."""
    return [
        sorted(i for batch in one.next_step(dp_rank=0, dp_size=1) for i in batch.sample_ids)
        for _ in range(steps)
    ]


def all_steps(one: TrainStream) -> list[list[str]]:
    return drawn(one, one.total_steps())


def test_positions_are_drawn_by_seed_step_and_sample_alone():
    regularizer = {"token_fraction": 0.4}
    recipe = {"data": {"max_length": 20}, "train": {"steps": 30, "global_batch_sequences": 4}}
    sources = (held("s", [20, 17, 19, 20, 18]),)
    found = SampleSet(section="data.train", sources=sources, weights=(1.0,))

    def stream(positions: str, micro_batch_size: int = 1) -> TrainStream:
        train = recipe["train"] | {"micro_batch_size": micro_batch_size}
        given = config(
            [{"path": "unused"}],
            data=recipe["data"],
            train=train,
            regularizer=regularizer | {"positions": positions},
        )
        return TrainStream(given, TOKENIZER, found)

    def rows_of(batches: list[Batch]) -> Counter:
        rows = Counter()
        for b in batches:
            tokens = b.input_ids.reshape(-1)[b.target_index].tolist()
            rows += Counter(zip(tokens, b.targets.tolist(), b.kl_mask.tolist(), strict=True))
        return rows

    few, every, ranks = stream("targets"), stream("all"), [stream("all", 3) for _ in range(2)]
    drawn = seen = 0
    for _ in range(30):
        one, whole = (s.next_step(dp_rank=0, dp_size=1) for s in (few, every))
        shares = [r.next_step(dp_rank=i, dp_size=2) for i, r in enumerate(ranks)]
        assert rows_of([b for share in shares for b in share]) == rows_of(whole)
        learned = Counter({row: n for row, n in rows_of(whole).items() if row[1] != -100})
        assert learned == rows_of(one), "the targets drawn are those that are drawn without"
        drawn += sum(b.num_prompt for b in whole)
        seen += sum(len(b.targets) - b.num_targets for b in whole)
    assert seen > 600
    assert abs(drawn / seen - 0.4) < 0.08  # four standard deviations of 600 draws


LENGTHS = st.lists(st.integers(2, 20), min_size=1, max_size=25)


@st.composite
def streams(draw):
    """A function that makes the same stream again, for any micro-batch size."""
    sizes = draw(st.lists(LENGTHS, min_size=1, max_size=3))
    weights = [draw(st.sampled_from([0.5, 1.0, 1.7, 3.0])) for _ in sizes]
    size = draw(
        st.one_of(
            st.fixed_dictionaries({"global_batch_sequences": st.integers(5, 9)}),
            st.fixed_dictionaries({"global_batch_tokens": st.integers(20, 90)}),
        )
    )
    seed, packing = draw(st.integers(0, 3)), draw(st.booleans())
    epochs = draw(st.sampled_from([0.4, 1.0, 2.5]))
    return lambda micro_batch_size=1: make_stream(
        sizes, weights, packing, epochs=epochs, seed=seed, micro_batch_size=micro_batch_size, **size
    )


def signature(batches: list[Batch]) -> Counter:
    """What a global step computes, whatever its layout: its samples, tokens and targets."""
    samples_seen = Counter(i for batch in batches for i in batch.sample_ids)
    targets = Counter()
    for batch in batches:
        flat = batch.input_ids.reshape(-1)
        pairs = zip(flat[batch.target_index].tolist(), batch.targets.tolist(), strict=True)
        targets += Counter(pairs)
    return samples_seen + targets + Counter({"tokens": sum(b.num_tokens for b in batches)})


@settings(deadline=None, max_examples=40)
@given(streams(), st.integers(1, 5), st.integers(1, 5))
def test_ranks_and_micro_batches_do_not_change_the_global_batch(make, dp_size, micro_batch_size):
    one, ranks = make(), [make(micro_batch_size) for _ in range(dp_size)]
    for _ in range(min(6, one.total_steps())):
        whole = one.next_step(dp_rank=0, dp_size=1)
        shares = [r.next_step(dp_rank=i, dp_size=dp_size) for i, r in enumerate(ranks)]
        assert len({len(share) for share in shares}) == 1
        assert all(len(batch.input_ids) <= micro_batch_size for share in shares for batch in share)
        assert signature([b for share in shares for b in share]) == signature(whole)


@settings(deadline=None, max_examples=60)
@given(streams(), st.data())
def test_interrupted_anywhere_it_goes_on_the_same(make, random):
    straight = make()
    total = straight.total_steps()
    expected = all_steps(straight)
    cut = random.draw(st.integers(0, total))
    first = make()
    before = drawn(first, cut)
    cursor = json.loads(json.dumps(first.state_dict()))
    fresh = make()
    fresh.load_state_dict(cursor)
    assert fresh.state_dict() == first.state_dict()
    assert before + drawn(fresh, total - cut) == expected
    with pytest.raises(ValueError, match="no step after the last"):
        fresh.next_step(dp_rank=0, dp_size=1)


@settings(deadline=None, max_examples=40)
@given(streams())
def test_an_epoch_draws_what_the_weights_say(make):
    one = make()
    seen = Counter(i for step in all_steps(one) for i in step)
    assert sum(seen.values()) == one.num_draws
    for source, rate in zip(one.samples.sources, one._rates, strict=True):
        counts = [seen[i] for i in source.sample_ids]
        assert max(counts) - min(counts) <= 1  # each source in passes of its own
        share = one.num_draws * rate / sum(one._rates)
        # Webster: no source is further than one from its share, with the rounding of the total.
        assert abs(sum(counts) - share) <= 1.5


def test_a_cursor_is_of_its_data_alone():
    one = make_stream([[5] * 8], epochs=1, global_batch_sequences=2)
    drawn(one, 2)
    cursor = one.state_dict()
    changed = make_stream([[5] * 9], epochs=1, global_batch_sequences=2)
    with pytest.raises(UserError, match=r"the data of s0 .* not those that the run began with"):
        changed.load_state_dict(cursor)


def test_a_source_that_would_never_be_drawn_is_refused():
    with pytest.raises(UserError, match=r"data\.train\.0\.weight=0\.001: less than one"):
        make_stream([[5] * 10, [5] * 90], [0.001, 1.0], epochs=1, global_batch_sequences=2)
    one = make_stream([[5] * 10, [5] * 90], [0.01, 1.0], epochs=1, global_batch_sequences=2)
    assert one.num_draws == 90  # not one more for the small one: none of the other comes twice


def test_default_weights_are_the_files_joined():
    one = make_stream([[5] * 40, [5] * 3], epochs=2, global_batch_sequences=1)
    order = [i for step in all_steps(one) for i in step]
    assert Counter(order[:43]) == Counter(order[43:])
    assert set(Counter(order[:43]).values()) == {1}
    assert order[:43] != order[43:]
    # The small source is spread out, not left to the end.
    places = [k for k, i in enumerate(order[:43]) if i.startswith("s1")]
    assert places[0] < 10 < 16 < places[1] < 26 < 32 < places[2]


def test_weights_are_passes_over_a_source():
    one = make_stream([[5] * 10, [5] * 4], [1.0, 3.0], epochs=1, global_batch_sequences=1)
    seen = Counter(i for step in all_steps(one) for i in step)
    assert {seen[f"s0:{i}"] for i in range(10)} == {1}
    assert {seen[f"s1:{i}"] for i in range(4)} == {3}
    assert one.num_samples == one.total_steps() == 22


def test_the_order_depends_on_seed_epoch_and_sample_id_alone():
    def order(sizes, seed=0, epochs=1):
        one = make_stream([sizes], epochs=epochs, seed=seed, global_batch_sequences=1)
        return [i for step in all_steps(one) for i in step]

    many = order([5] * 30)
    assert many != order([5] * 30, seed=1)
    assert many != sorted(many)
    # With ten samples more, the others stay in their order.
    assert [i for i in order([7] * 40) if int(i[3:]) < 30] == many
    two = order([5] * 30, epochs=2)
    assert two[:30] == many
    assert two[30:] != many
    assert sorted(two[30:]) == sorted(many)


def test_the_last_step_is_kept_and_the_end_is_known():
    one = make_stream([[5] * 10], epochs=1, global_batch_sequences=4)
    assert one.total_steps() == 3
    assert one.steps_per_epoch == 3
    assert [len(step) for step in all_steps(one)] == [4, 4, 2]
    by_steps = make_stream([[5] * 10], steps=7, global_batch_sequences=4)
    assert by_steps.total_steps() == 7
    assert by_steps.steps_per_epoch == 2.5
    drawn(by_steps, 7)
    with pytest.raises(ValueError, match=r"no step after the last one \(7\)"):
        by_steps.next_step(dp_rank=0, dp_size=1)


@pytest.mark.parametrize("packing", [False, True])
def test_token_batches_are_filled_up_to_the_budget(packing):
    generator = np.random.default_rng(0)
    lengths = generator.integers(2, 20, size=200).tolist()
    one = make_stream([lengths], packing=packing, epochs=1, global_batch_tokens=64)
    sums, rows = [], 0
    for _ in range(one.total_steps()):
        batches = one.next_step(dp_rank=0, dp_size=1)
        sums.append(sum(batch.num_tokens for batch in batches))
        rows += len(batches)
        assert all(len(batch.input_ids) == 1 for batch in batches)
    assert sum(sums) == sum(lengths)
    assert max(sums) <= 64
    assert min(sums[:-1]) > 64 - 20  # else the next row would have fitted
    assert rows < 200 if packing else rows == 200
    by_rows = make_stream([lengths], packing=True, epochs=1, global_batch_sequences=4)
    assert by_rows.total_steps() == -(-len(pack_all(by_rows)) // 4)


def pack_all(one: TrainStream) -> list[Any]:
    fresh = make_stream(
        [[len(s) for s in one.samples]], packing=True, epochs=1, global_batch_sequences=1
    )
    return all_steps(fresh)


def test_a_budget_is_filled_exactly_and_holds_at_least_one_sample():
    one = make_stream([[20, 20, 20]], epochs=1, global_batch_tokens=20)
    assert [len(step) for step in all_steps(one)] == [1, 1, 1]
    exactly = make_stream([[20, 20, 20]], epochs=1, global_batch_tokens=40)
    assert [len(step) for step in all_steps(exactly)] == [2, 1]


def test_packing_windows_are_resumed_in_their_middle(monkeypatch):
    monkeypatch.setattr(stream, "PACK_WINDOW", 16)
    lengths = np.random.default_rng(1).integers(2, 20, size=50).tolist()
    make = lambda: make_stream([lengths], packing=True, epochs=3, global_batch_sequences=3)  # noqa: E731
    expected = all_steps(make())
    assert sorted(Counter(i for s in expected for i in s).values()) == [3] * 50
    rows_used = set()
    for cut in range(len(expected)):
        first, fresh = make(), make()
        drawn(first, cut)
        rows_used.add(first.state_dict()["row"])
        fresh.load_state_dict(first.state_dict())
        assert drawn(fresh, len(expected) - cut) == expected[cut:]
    assert len(rows_used) > 3


def test_flash_attention_gets_one_row_a_micro_batch():
    one = make_stream([[5] * 8], steps=1, global_batch_sequences=8, micro_batch_size=4)
    one._flatten = True
    batches = one.next_step(dp_rank=0, dp_size=1)
    assert [batch.input_ids.shape for batch in batches] == [(1, 20), (1, 20)]
    assert batches[0].position_ids[0].tolist() == [0, 1, 2, 3, 4] * 4


def test_a_cursor_of_other_data_is_refused():
    one, other = make_stream([[5]]), make_stream([[5], [5]])
    with pytest.raises(UserError, match=r"cursor is of the sources \['s0', 's1'\]"):
        one.load_state_dict(other.state_dict())


def streamed(path: str, *others: dict[str, Any], steps: int = 12, **options: Any) -> TrainStream:
    recipe = config(
        [{"path": path, "streaming": True}, *others],
        data={"max_length": 64} | options,
        train={"steps": steps, "global_batch_sequences": 3},
    )
    found = load_samples(recipe.data.train, TOKENIZER, recipe.data, len(TOKENIZER))
    return TrainStream(recipe, TOKENIZER, found)


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(samples, "BLOCK", 4)


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "hub"])
def test_a_streamed_source_goes_on_where_it_was(tmp_path, small_blocks, kind):
    rows = [{"text": f"hello {i}"} for i in range(11)]
    jsonl(tmp_path / "a.jsonl", rows)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    (tmp_path / "hub").mkdir()
    jsonl(tmp_path / "hub" / "train.jsonl", rows)

    def make() -> TrainStream:
        if kind != "hub":
            return streamed(str(tmp_path / f"a.{kind}"))
        source = {"hub": str(tmp_path / "hub"), "streaming": True}
        recipe = config([source], train={"steps": 12, "global_batch_sequences": 3})
        return TrainStream(
            recipe, TOKENIZER, load_samples(recipe.data.train, TOKENIZER, recipe.data)
        )

    expected = drawn(make(), 12)
    flat = [i for step in expected for i in step]
    assert set(Counter(flat[:33]).values()) == {3}  # three passes of eleven
    for cut in range(12):
        first, fresh = make(), make()
        drawn(first, cut)
        fresh.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert drawn(fresh, 12 - cut) == expected[cut:]


def test_a_stream_is_shuffled_within_blocks_anew_each_pass(tmp_path, monkeypatch):
    monkeypatch.setattr(samples, "BLOCK", 50)
    path = jsonl(tmp_path / "a.jsonl", [{"text": f"hello {i}"} for i in range(100)])
    feed = streamed(path)._feeds[0]
    order = [int(feed.next().sample_id.rsplit(":", 1)[1]) for _ in range(200)]
    for start in (0, 50, 100, 150):
        block = order[start : start + 50]
        assert sorted(block) == list(range(start % 100 + 1, start % 100 + 51))
        assert block != sorted(block)
    assert order[:100] != order[100:]


def test_a_stream_beside_other_sources_is_weighed_by_its_size(tmp_path, small_blocks):
    path = jsonl(tmp_path / "a.jsonl", [{"text": f"hello {i}"} for i in range(20)])
    other = jsonl(tmp_path / "b.jsonl", [{"text": "there"}] * 10)
    one = streamed(path, {"path": other})
    assert one.num_samples == 30
    assert one.steps_per_epoch == 10
    seen = Counter(i.split(":")[0] for step in drawn(one, 10) for i in step)
    assert seen == {"a.jsonl": 20, "b.jsonl": 10}
    hub = tmp_path / "hub"
    hub.mkdir()
    jsonl(hub / "train.jsonl", [{"text": "hello"}])
    both = [{"hub": str(hub), "streaming": True}, {"path": other}]
    recipe = config(both)
    message = r"data\.train\.0\.streaming: beside other .* known.*: set data\.train\.0\.limit"
    with pytest.raises(UserError, match=message):
        data.check_data(recipe)
    with pytest.raises(UserError, match=message):
        TrainStream(recipe, TOKENIZER, load_samples(recipe.data.train, TOKENIZER, recipe.data))


def test_a_stream_holds_one_block(tmp_path, monkeypatch):
    """8 MB of text, of which never more than a block of 80 KB may be alive."""
    monkeypatch.setattr(samples, "BLOCK", 64)
    path = tmp_path / "a.jsonl"
    with path.open("w") as file:
        for i in range(8000):
            file.write(json.dumps({"text": f"hello {i}", "filler": "x" * 1000}) + "\n")
    tracemalloc.start()
    try:
        one = streamed(str(path), steps=200)
        drawn(one, 60)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2 * 2**20


def test_bad_rows_far_into_a_local_stream_are_found_at_the_start(tmp_path, small_blocks):
    path = jsonl(tmp_path / "a.jsonl", [{"text": "hello"}] * 30 + [{"text": 5}])
    with pytest.raises(UserError, match=r"a\.jsonl:31: text: holds the number 5"):
        streamed(path)


def test_drops_in_a_stream_are_judged_block_by_block(tmp_path, small_blocks, caplog, monkeypatch):
    rows = [{"text": "hello"}] * 4 + [{"text": "hello " * 90}] + [{"text": "hello"}] * 3
    one = streamed(jsonl(tmp_path / "a.jsonl", rows))
    drawn(one, 3)
    assert "rows from 5: 1 of 4 samples dropped" not in caplog.text  # too few to judge
    monkeypatch.setattr(samples, "MIN_JUDGED", 4)
    with pytest.raises(UserError, match=r"data\.train\.0, rows from 5: 1 of 4 samples dropped"):
        drawn(streamed(str(tmp_path / "a.jsonl")), 3)
    first = streamed(str(tmp_path / "a.jsonl"), max_dropped_fraction=0.3)
    assert len(drawn(first, 12)) == 12
    bad_start = jsonl(tmp_path / "b.jsonl", [{"text": "hello " * 90}] * 4)
    with pytest.raises(UserError, match=r"data\.train\.0: 4 of 4 samples dropped"):
        streamed(bad_start)


def test_bad_rows_later_in_a_streamed_hub_dataset_are_dropped_and_said(
    tmp_path, small_blocks, caplog
):
    hub = tmp_path / "hub"
    hub.mkdir()
    jsonl(hub / "train.jsonl", [{"text": "hello"}] * 5 + [{"text": ""}] + [{"text": "hello"}] * 2)
    recipe = config(
        [{"hub": str(hub), "streaming": True}],
        data={"max_dropped_fraction": 0.3},
        train={"steps": 4, "global_batch_sequences": 2},
    )
    found = load_samples(recipe.data.train, TOKENIZER, recipe.data)
    seen = [i for step in drawn(TrainStream(recipe, TOKENIZER, found), 4) for i in step]
    assert "hub/train:6" not in seen
    assert re.search(r"dropped: .*hub\[train\]:6: text: is empty", caplog.text)
    hub_bad = tmp_path / "bad"
    hub_bad.mkdir()
    jsonl(hub_bad / "train.jsonl", [{"text": ""}])
    with pytest.raises(UserError, match=r"bad\[train\]:1: text: is empty"):
        load_samples([Source(hub=str(hub_bad), streaming=True)], TOKENIZER, recipe.data)


def test_a_stream_has_a_fingerprint_of_all_its_bytes(tmp_path, small_blocks):
    rows = [{"text": "hello"}] * 9
    first = streamed(jsonl(tmp_path / "a.jsonl", rows)).fingerprint()
    assert first == streamed(str(tmp_path / "a.jsonl")).fingerprint()
    assert first != streamed(jsonl(tmp_path / "a.jsonl", [*rows, rows[0]])).fingerprint()


def test_what_is_told_to_the_tracker(tmp_path):
    found = load(jsonl(tmp_path / "a.jsonl", [{"messages": CHAT}, {"text": "hello"}]))
    (one,) = found.describe()
    assert one["name"] == found.name == "a.jsonl"
    assert one["num_samples"] == found.num_samples == 2
    assert one["num_tokens"] == found.num_tokens == sum(len(s) for s in found)
    assert one["num_targets"] == sum(s.num_targets for s in found)
    assert len(str(one["digest"])) == 64


# ---------------------------------------------------------------- one step ahead

ALONE = {"dp_rank": 0, "dp_size": 1}


def short_stream() -> TrainStream:
    return make_stream([[5, 9, 3, 7, 20, 2, 11]], epochs=2, global_batch_sequences=3)


def ids(batches: list[Batch]) -> list[str]:
    return [name for batch in batches for name in batch.sample_ids]


def test_it_gives_the_steps_and_the_cursors_of_the_stream() -> None:
    plain, total = short_stream(), short_stream().total_steps()
    ahead = Prefetcher(short_stream(), total)
    assert ahead.state_dict() == plain.state_dict()
    for _ in range(total):
        assert ids(ahead.next_step(**ALONE)) == ids(plain.next_step(**ALONE))
        assert ahead.state_dict() == plain.state_dict()
    with pytest.raises(ValueError, match="no step after the last one"):
        ahead.next_step(**ALONE)
    ahead.close()


def test_it_goes_on_from_a_cursor() -> None:
    plain, total = short_stream(), short_stream().total_steps()
    first = Prefetcher(short_stream(), total)
    for _ in range(2):
        first.next_step(**ALONE)
        plain.next_step(**ALONE)
    first.close()  # with its third step in store
    second = Prefetcher(short_stream(), total)
    second.load_state_dict(first.state_dict())
    assert second.state_dict() == plain.state_dict()
    assert ids(second.next_step(**ALONE)) == ids(plain.next_step(**ALONE))
    second.close()


def test_the_next_step_is_made_while_this_one_is_computed() -> None:
    made: list[list[str]] = []
    second_is_there = threading.Event()

    def prepare(batches: list[Batch]) -> None:
        made.append(ids(batches))
        if len(made) == 2:
            second_is_there.set()

    total = short_stream().total_steps()
    ahead = Prefetcher(short_stream(), total, prepare)
    first = ids(ahead.next_step(**ALONE))
    assert second_is_there.wait(600), "nobody asked for it yet"
    assert made[0] == first
    given = [ids(ahead.next_step(**ALONE)) for _ in range(total - 1)]
    ahead.close()
    assert made == [first, *given], "none beyond the last one"


def test_an_error_comes_at_the_step_that_it_is_of() -> None:
    one = short_stream()
    original, calls = one.next_step, [0]

    def failing(**share: int) -> list[Batch]:
        calls[0] += 1
        if calls[0] == 2:
            raise OSError("the disk is gone")
        return original(**share)

    one.next_step = failing  # type: ignore[method-assign]
    ahead = Prefetcher(one, 5)
    ahead.next_step(**ALONE)
    state = ahead.state_dict()
    with pytest.raises(OSError, match="the disk is gone"):
        ahead.next_step(**ALONE)
    assert ahead.state_dict() == state
    ahead.close()
