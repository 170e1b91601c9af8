"""The order of training: samples to global batches, deterministic and resumable, one step ahead.

What a sample is and how it was tokenised is `samples.py`'s matter. Everything here is a pure
function of the recipe, the data and a small cursor: nothing depends on how many ranks there are,
which one this is, or how large its micro-batches are.
"""

from __future__ import annotations

import copy
import hashlib
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from moored.data.batch import Batch, Row, batches_of, pack, row_tokens
from moored.data.reading import DataReader
from moored.data.samples import SampleSet, StreamedSource, load_samples, pad_token_id
from moored.data.token_arrays import Drops, HeldSource, Sample, Tokens
from moored.utils.errors import UserError

if TYPE_CHECKING:
    from moored.config import Config

log = logging.getLogger(__name__)

PACK_WINDOW = 512  # consecutive samples that are packed together
REPLAY_TOLERANCE = 0.1  # by which a share may differ from the recipe's without a word
_VERSION = 1  # of the cursor


class _Feed(Protocol):
    """One source's samples without end, pass after pass, each pass in its own order."""

    count: int  # samples drawn so far

    def next(self) -> Sample: ...
    def state(self) -> list[int]: ...
    def restore(self, state: Sequence[int]) -> None: ...


class _HeldFeed:
    """A source held in memory: one permutation a pass."""

    def __init__(self, samples: HeldSource, seed: int):
        self.samples = samples
        self.seed = seed
        self.count = 0
        self._hashes = _hashes(samples.sample_ids)
        self._order: tuple[int, np.ndarray] = (-1, np.zeros(0, dtype=np.int64))

    def next(self) -> Sample:
        number, index = divmod(self.count, len(self.samples))
        if self._order[0] != number:
            self._order = (number, _permutation(self._hashes, self.seed, number))
        self.count += 1
        return self.samples[int(self._order[1][index])]

    def state(self) -> list[int]:
        return [self.count]

    def restore(self, state: Sequence[int]) -> None:
        (self.count,) = state


class _StreamedFeed:
    """A source read as it goes: blocks in the file's order, one permutation a block and pass."""

    def __init__(self, source: StreamedSource, seed: int):
        self.source = source
        self.seed = seed
        self.count = 0
        self._at = (0, 0, 0)  # pass, block, samples taken of the block
        self._block: tuple[int, int, HeldSource, np.ndarray] | None = None

    def next(self) -> Sample:
        while True:
            number, block, taken = self._at
            samples, order = self._load(number, block)
            if samples is None:
                self._at = (number + 1, 0, 0)
            elif taken == len(samples):
                self._at = (number, block + 1, 0)
            else:
                self._at = (number, block, taken + 1)
                self.count += 1
                return samples[int(order[taken])]

    def _load(self, number: int, block: int) -> tuple[HeldSource | None, np.ndarray]:
        if self._block is None or self._block[:2] != (number, block):
            samples = self.source.block(block)
            if samples is None:
                return None, np.zeros(0, dtype=np.int64)
            order = _permutation(_hashes(samples.sample_ids), self.seed, number)
            self._block = (number, block, samples, order)
        return self._block[2], self._block[3]

    def state(self) -> list[int]:
        return [self.count, *self._at]

    def restore(self, state: Sequence[int]) -> None:
        self.count, *at = state
        number, block, taken = at
        self._at = (number, block, taken)


def _hashes(sample_ids: Sequence[str]) -> np.ndarray:
    """64 bits of each id; equal ids are told apart by their index in the sort after."""
    digests = b"".join(hashlib.blake2b(s.encode(), digest_size=8).digest() for s in sample_ids)
    return np.frombuffer(digests, dtype="<u8").astype(np.uint64)


def _permutation(hashes: np.ndarray, seed: int, number: int) -> np.ndarray:
    """Order of pass `number`: by a hash of (seed, pass, sample id).

    Samples added to or taken from the data leave the others in their order.
    """
    key = hashlib.blake2b(f"{seed}:{number}".encode(), digest_size=8).digest()
    mixed = hashes ^ np.uint64(int.from_bytes(key, "little"))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # splitmix64
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return np.argsort(mixed ^ (mixed >> np.uint64(31)), kind="stable")


class TrainStream:
    """Global batches in order, and this rank's share of each.

    An epoch draws each source `weight` times over: with weight 1 every sample once, with 2 twice,
    with 0.5 half of them (the next half in the next epoch). Sources are interleaved evenly, each in
    its own passes. A global batch is `global_batch_sequences` rows, or as many rows as fit into
    `global_batch_tokens` real tokens (at least one). A row is a sample, or with packing the samples
    that share `max_length`.

    Args:
        config: of the run.
        tokenizer: of the model; only its padding token is used.
        samples: of data.train.

    Raises:
        UserError: a source too small for its weight, or of unknown size beside others.
    """

    def __init__(self, config: Config, tokenizer: Any, samples: SampleSet):
        self._train = config.train
        self._data = config.data
        self._kl_fraction = config.regularizer.token_fraction
        self._all_positions = config.regularizer.holds_prompt
        self._flatten = config.model.attention == "flash_attention_2"
        self._pad = pad_token_id(tokenizer)
        self.samples = samples
        seed = config.train.seed
        self._feeds: list[_Feed] = [
            _HeldFeed(source, seed)
            if isinstance(source, HeldSource)
            else _StreamedFeed(source, seed)
            for source in samples.sources
        ]
        self._rates = _rates(samples, config.train.epochs)
        # Drawn up to here: the samples of the window below. `_window` starts at `_start`.
        self._start: list[list[int]] = [feed.state() for feed in self._feeds]
        self._window: list[Row] = []
        self._row = 0
        self.step = 0
        self._total_steps: int | None = None

    @staticmethod
    def of_replay(
        config: Config,
        tokenizer: Any,
        vocab_size: int,
        num_steps: int,
        reader: DataReader | None = None,
    ) -> TrainStream:
        """The stream of `regularizer.replay`: its share of rows (or tokens) beside each batch.

        Args:
            config: of the run.
            tokenizer: of the model.
            vocab_size: rows of the model's embedding.
            num_steps: of the run.
            reader: has read the sources, or reads them for others, too.
        """
        regularizer = config.regularizer
        fraction = regularizer.replay_fraction
        beside = _beside(config, "regularizer.replay_fraction", fraction, num_steps)
        samples = load_samples(
            regularizer.replay,
            tokenizer,
            config.data,
            vocab_size,
            section="regularizer.replay",
            reader=reader,
        )
        return TrainStream(beside, tokenizer, samples)

    @staticmethod
    def of_anchors(
        config: Config, tokenizer: Any, samples: Sequence[Sample], num_steps: int
    ) -> TrainStream:
        """The stream of `regularizer.anchors`: rows beside each batch, of which nothing is learned.

        Args:
            config: of the run.
            tokenizer: of the model.
            samples: the anchors' windows; which of their tokens are scored is passed over.
            num_steps: of the run, at most.
        """
        anchors = config.regularizer.anchors
        assert anchors is not None
        parts = [
            (
                sample.sample_id,
                Tokens(
                    input_ids=sample.input_ids,
                    label_mask=np.zeros(len(sample), dtype=bool),
                ),
            )
            for sample in samples
        ]
        source = HeldSource("anchors", parts, Drops(met=len(parts)))
        found = SampleSet(section="regularizer.anchors", sources=(source,), weights=(1.0,))
        fraction = anchors.fraction
        beside = _beside(config, "regularizer.anchors.fraction", fraction, num_steps)
        stream = TrainStream(beside, tokenizer, found)
        stream._all_positions = True
        return stream

    def fingerprint(self) -> str:
        """SHA-256 of the tokenised data; equal on all ranks, or they read different files."""
        return self.samples.fingerprint()

    @property
    def num_samples(self) -> int | None:
        """Samples of one epoch, or None where a source's size is not known."""
        if any(rate is None for rate in self._rates):
            return None
        return max(1, round(sum(rate for rate in self._rates if rate is not None)))

    @property
    def num_draws(self) -> int | None:
        """Samples of the whole run, or None where `train.steps` ends it."""
        streamed = any(isinstance(source, StreamedSource) for source in self.samples.sources)
        if self._train.epochs is None or self.num_samples is None or streamed:
            return None
        return max(1, round(self._train.epochs * self.num_samples))

    @property
    def steps_per_epoch(self) -> float | None:
        """Steps of one epoch; an estimate with packing or a budget in tokens."""
        if self.num_samples is None:
            return None
        if self._train.epochs is not None:
            return self.total_steps() / self._train.epochs
        if self._train.global_batch_sequences and not self._data.packing:
            return self.num_samples / self._train.global_batch_sequences
        held = self.samples.held
        if len(held) < len(self.samples.sources):
            return None
        tokens = sum(s.num_tokens * w for s, w in zip(held, self.samples.weights, strict=True))
        rows = self._train.global_batch_sequences
        return tokens / (rows * self._data.max_length if rows else self._budget())

    def total_steps(self) -> int:
        """Updates of the whole run; exact."""
        if self._train.steps is not None:
            return self._train.steps
        if self._total_steps is None:
            draws = self.num_draws
            if draws is None:
                raise UserError(
                    "train.epochs: the end of an epoch is not known in a streamed source: set "
                    "train.steps instead"
                )
            if self._train.global_batch_sequences and not self._data.packing:
                self._total_steps = -(-draws // self._train.global_batch_sequences)
            else:
                walker = copy.copy(self)
                walker._feeds = [copy.copy(feed) for feed in self._feeds]
                walker._rewind([[0] for _ in self._feeds], 0)
                steps = 0
                while walker._next_rows():
                    steps += 1
                self._total_steps = steps
        return self._total_steps

    def next_step(self, *, dp_rank: int, dp_size: int) -> list[Batch]:
        """This rank's micro-batches of the next global batch.

        Every rank gets the same number of them, some perhaps without targets. Their union over the
        ranks is the global batch, whatever `dp_size` and `micro_batch_size`.

        Raises:
            ValueError: the run's last step has been given.
        """
        rows = [] if self._is_over() else self._next_rows()
        if not rows:
            raise ValueError(f"no step after the last one ({self.step})")
        self.step += 1
        if self._kl_fraction < 1:
            rows = [[self._thinned(sample) for sample in row] for row in rows]
        return batches_of(
            rows,
            micro_batch_size=self._train.micro_batch_size,
            dp_rank=dp_rank,
            dp_size=dp_size,
            pad_token_id=self._pad,
            vocab_size=self.samples.vocab_size,
            flatten=self._flatten,
            all_positions=self._all_positions,
        )

    def largest(self, *, dp_size: int) -> Batch:
        """A micro-batch as large as any of the run's, of ids without meaning, all to be learned."""
        longest, held = self._data.max_length, self.samples.held
        if len(held) == len(self.samples.sources):
            if self._data.packing:
                longest = min(longest, sum(source.num_tokens for source in held))
            else:
                longest = max(int(np.diff(source.flat.offsets).max(initial=1)) for source in held)
        lengths = [longest]
        if self._data.packing and longest > 1:  # so that it is seen to be packed
            lengths = [longest // 2, longest - longest // 2]
        row = [
            Sample(
                sample_id="rehearsal",
                input_ids=(np.arange(length) % (self.samples.vocab_size or 1)).astype(np.int32),
                label_mask=np.ones(length, dtype=bool),
            )
            for length in lengths
        ]
        size, rows = self._train.micro_batch_size, self._train.global_batch_sequences
        if rows is not None:
            size = min(size, -(-rows // dp_size))
        [batch] = batches_of(
            [row] * size,
            micro_batch_size=size,
            dp_rank=0,
            dp_size=1,
            pad_token_id=self._pad,
            flatten=self._flatten,
        )
        return batch

    def _thinned(self, sample: Sample) -> Sample:
        """The sample with the divergence on a part of its tokens, drawn for this step."""
        text = f"{self._train.seed}:{self.step}:{sample.sample_id}"
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        drawn = np.random.default_rng(int.from_bytes(digest, "big")).random(len(sample))
        return replace(sample, kl_mask=drawn < self._kl_fraction)

    def state_dict(self) -> dict[str, Any]:
        """The cursor, as JSON values: `load_state_dict` on a fresh stream goes on from here."""
        return {
            "version": _VERSION,
            "step": self.step,
            "data": self.fingerprint(),
            "sources": {
                source.name: list(state)
                for source, state in zip(self.samples.sources, self._start, strict=True)
            },
            "row": self._row,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to a cursor of `state_dict`, of the same recipe and data.

        Raises:
            UserError: the cursor is of other sources, other data or another version.
        """
        names = [source.name for source in self.samples.sources]
        if state.get("version") != _VERSION or list(state["sources"]) != names:
            raise UserError(
                f"the checkpoint's data cursor is of the sources {list(state.get('sources', []))}, "
                f"the recipe has {names}: resume with the recipe of the run, or start a new run"
            )
        if state.get("data", self.fingerprint()) != self.fingerprint():
            raise UserError(
                f"the data of {', '.join(names)} (or the template or tokenizer) are not those that "
                "the run began with, so samples would be repeated or lost: restore them, start a "
                "new run with another name=..., or start over with --restart"
            )
        self._rewind(list(state["sources"].values()), int(state["row"]))
        self.step = int(state["step"])

    def _is_over(self) -> bool:
        return self._train.steps is not None and self.step >= self._train.steps

    def _rewind(self, start: list[list[int]], row: int) -> None:
        for feed, state in zip(self._feeds, start, strict=True):
            feed.restore(state)
        self._start = [list(state) for state in start]
        self._window, self._row = [], 0
        if row:
            self._fill()
            self._row = row

    def _budget(self) -> int:
        budget = self._train.global_batch_tokens
        assert budget is not None
        return budget

    def _next_rows(self) -> list[Row]:
        """The rows of the next global batch; none when the epochs are through."""
        rows: list[Row] = []
        tokens, limit = 0, self._train.global_batch_sequences
        while limit is None or len(rows) < limit:
            if self._row == len(self._window) and not self._fill():
                break
            row = self._window[self._row]
            if limit is None and rows and tokens + row_tokens(row) > self._budget():
                break  # it opens the next batch
            rows.append(row)
            tokens += row_tokens(row)
            self._row += 1
        return rows

    def _fill(self) -> bool:
        """Draws the next window of samples and makes rows of them; False when none is left."""
        self._start = [feed.state() for feed in self._feeds]
        self._row = 0
        size, draws = (PACK_WINDOW if self._data.packing else 1), self.num_draws
        if draws is not None:
            size = min(size, draws - sum(feed.count for feed in self._feeds))
        drawn = [self._draw() for _ in range(size)]
        packing = self._data.packing
        self._window = pack(drawn, self._data.max_length) if packing else [[s] for s in drawn]
        return bool(self._window)

    def _draw(self) -> Sample:
        if len(self._feeds) == 1:
            return self._feeds[0].next()
        # The source that lags most behind its share (Webster's method): after any number of draws
        # each source has its share to within one or so, and after an epoch exactly.
        lags = [
            (2 * feed.count + 1) / rate
            for feed, rate in zip(self._feeds, self._rates, strict=True)
            if rate is not None
        ]
        return self._feeds[lags.index(min(lags))].next()


def _beside(config: Config, option: str, fraction: float, num_steps: int) -> Config:
    """A recipe of `num_steps` batches of a fraction of the size; says so where it is not quite."""
    train = config.train
    sizes = {
        name: max(1, round(fraction * size))
        for name in ("global_batch_sequences", "global_batch_tokens")
        if (size := getattr(train, name)) is not None
    }
    for name, size in sizes.items():
        real = size / getattr(train, name)
        if abs(real / fraction - 1) > REPLAY_TOLERANCE:
            log.warning(
                "%s=%g is %d beside train.%s=%d, a fraction of %.3g",
                option, fraction, size, name, getattr(train, name), real,
            )  # fmt: skip
    length = {"steps": num_steps, "epochs": None}
    return config.model_copy(update={"train": train.model_copy(update=sizes | length)})


def _rates(samples: SampleSet, epochs: float | None) -> list[float | None]:
    """Draws of each source in an epoch: its size times its weight."""
    rates: list[float | None] = []
    for index, (source, weight) in enumerate(zip(samples.sources, samples.weights, strict=True)):
        size = len(source) if isinstance(source, HeldSource) else source.num_rows
        if size is None and len(samples.sources) > 1:
            raise UserError(
                f"{samples.section}.{index}.streaming: beside other sources its size must be "
                f"known, to weigh it: set {samples.section}.{index}.limit"
            )
        if size is not None and epochs is not None and size * weight * epochs < 0.1:
            raise UserError(
                f"{samples.section}.{index}.weight={weight:g}: less than one of its {size} samples "
                f"in the whole run: raise it to {1 / (size * epochs):.2g}, or take the source out"
            )
        rates.append(None if size is None else size * weight)
    return rates


class Prefetcher:
    """A stream of which a thread makes the next step's batches while this one is computed.

    Its cursor is that of the steps that were given out.

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

    def largest(self, *, dp_size: int) -> Batch:
        """See `TrainStream.largest`."""
        return self._stream.largest(dp_size=dp_size)

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
