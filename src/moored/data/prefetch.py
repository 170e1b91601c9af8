"""The next step's batches, made in a thread while this step is computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from moored.data.batch import Batch
from moored.data.stream import TrainStream


class Prefetcher:
    """A stream that is one step ahead of its reader; its cursor is the reader's.

    Args:
        stream: whose steps are given in order; only this object may move it.
        num_steps: of the run; none is made beyond them.
        prepare: is given each step's batches, in the thread, as soon as they are made.
    """

    def __init__(
        self,
        stream: TrainStream,
        num_steps: int,
        prepare: Callable[[Sequence[Batch]], object] = len,
    ):
        self._stream, self._num_steps, self._prepare = stream, num_steps, prepare
        self._state = stream.state_dict()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._next: Future[tuple[list[Batch], dict[str, Any]]] | None = None

    def next_step(self, *, dp_rank: int, dp_size: int) -> list[Batch]:
        """See `TrainStream.next_step`, whose errors come out here, at the step that they are of."""
        share = {"dp_rank": dp_rank, "dp_size": dp_size}
        ahead = self._next or self._thread.submit(self._make, share)
        self._next = None
        batches, self._state = ahead.result()
        if self._state["step"] < self._num_steps:
            self._next = self._thread.submit(self._make, share)
        return batches

    def state_dict(self) -> dict[str, Any]:
        """The cursor after the last step that was given out."""
        return self._state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `TrainStream.load_state_dict`; before the first step."""
        assert self._next is None
        self._stream.load_state_dict(state)
        self._state = state

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(cancel_futures=True)

    def _make(self, share: dict[str, int]) -> tuple[list[Batch], dict[str, Any]]:
        batches = self._stream.next_step(**share)
        state = self._stream.state_dict()
        self._prepare(batches)
        return batches, state
