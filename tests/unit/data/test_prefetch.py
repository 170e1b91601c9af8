"""One step in store: the steps of the stream, its cursor at the reader, its errors in time."""

from __future__ import annotations

import threading

import pytest

from moored.data import Prefetcher
from moored.data.batch import Batch
from unit.data.test_stream import make_stream

ALONE = {"dp_rank": 0, "dp_size": 1}


def stream():
    return make_stream([[5, 9, 3, 7, 20, 2, 11]], epochs=2, global_batch_sequences=3)


def ids(batches: list[Batch]) -> list[str]:
    return [name for batch in batches for name in batch.sample_ids]


def test_it_gives_the_steps_and_the_cursors_of_the_stream() -> None:
    plain, total = stream(), stream().total_steps()
    ahead = Prefetcher(stream(), total)
    assert ahead.state_dict() == plain.state_dict()
    for _ in range(total):
        assert ids(ahead.next_step(**ALONE)) == ids(plain.next_step(**ALONE))
        assert ahead.state_dict() == plain.state_dict()
    with pytest.raises(ValueError, match="no step after the last one"):
        ahead.next_step(**ALONE)
    ahead.close()


def test_it_goes_on_from_a_cursor() -> None:
    plain, total = stream(), stream().total_steps()
    first = Prefetcher(stream(), total)
    for _ in range(2):
        first.next_step(**ALONE)
        plain.next_step(**ALONE)
    first.close()  # with its third step in store
    second = Prefetcher(stream(), total)
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

    total = stream().total_steps()
    ahead = Prefetcher(stream(), total, prepare)
    first = ids(ahead.next_step(**ALONE))
    assert second_is_there.wait(600), "nobody asked for it yet"
    assert made[0] == first
    given = [ids(ahead.next_step(**ALONE)) for _ in range(total - 1)]
    ahead.close()
    assert made == [first, *given], "none beyond the last one"


def test_an_error_comes_at_the_step_that_it_is_of() -> None:
    one = stream()
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
