"""The samples of a recipe: all its sources, tokenised, with counts and fingerprints.

The order in which training meets them is `stream.py`'s matter; a streamed source is tokenised block
by block, the others at once.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moored.data.encode import Encoder, build
from moored.data.files import Row
from moored.data.reading import DataReader, RecordSource
from moored.data.records import Record, parse
from moored.data.token_arrays import Drops, HeldSource, Sample
from moored.data.token_cache import source_tokens
from moored.utils.errors import UserError, UserErrors
from moored.utils.progress import Phase

if TYPE_CHECKING:
    from moored.config import DataConfig, Source
    from moored.data.overlap import Digests

logger = logging.getLogger(__name__)

BLOCK = 2048  # rows of a streamed source that are shuffled together and held in memory
MIN_JUDGED = 100  # rows of a later block of a stream, below which its drops are not judged


class StreamedSource:
    """A source that is read as training goes: blocks of BLOCK rows, in the order of the file.

    Every row is validated once at the start if it is local, only the first block of a hub dataset;
    what proves unusable later is dropped and counted.

    Attributes:
        first: the samples of its first block.
    """

    def __init__(self, records: RecordSource, encoder: Encoder, problems: list[str]):
        self.name = records.name
        self.reader = records.reader
        self.source = records.source
        self.encoder = encoder
        self.num_rows: int | None = self.source.limit
        self._rows: Iterator[Row] = iter(())
        self._next = -1
        self._digest: str | None = None
        count = len(problems)
        if self.reader.hub is None:
            summary = records.summary or records.check(problems)
            self.num_rows = summary.num_records
        if len(problems) > count:
            return
        first, drops = self._block(0, problems)
        if len(problems) > count:
            return
        if first is None:
            problems.append(f"{self.reader.label}: holds no sample: fill it or take it out")
            return
        drops.check(self.reader.label, encoder.data)
        self.first = first

    def block(self, number: int) -> HeldSource | None:
        """The samples of rows [number * BLOCK, ...), None past the end; cheap in sequence.

        Raises:
            UserError: too many of them cannot be used.
        """
        if number == 0:
            return self.first
        problems: list[str] = []
        samples, drops = self._block(number, problems)
        for problem in problems[:10]:
            logger.warning("dropped: %s", problem)
        drops.unreadable += len(problems)
        drops.met += len(problems)
        if samples is not None and drops.dropped and (drops.met >= MIN_JUDGED or not samples):
            first = number * BLOCK + 1
            drops.check(f"{self.reader.label}, rows from {first}", self.encoder.data)
        return samples

    def _block(self, number: int, problems: list[str]) -> tuple[HeldSource | None, Drops]:
        if number != self._next:
            self._rows = self.reader.rows(skip=number * BLOCK)
        rows = list(itertools.islice(self._rows, BLOCK))
        self._next = number + 1
        drops = Drops()
        if not rows:
            return None, drops
        records = []
        for row in rows:
            record = parse(row, self.source, self.reader.label)
            if isinstance(record, Record):
                records.append(record)
            else:
                problems += [f"{row.where}: {problem}" for problem in record]
        return build(self.name, records, self.encoder, problems, drops), drops

    def digest(self) -> str:
        """SHA-256 of the files, or of a hub dataset's name, revision and first block."""
        if self._digest is None:
            sha = hashlib.sha256(f"{self.reader.hub}@{self.reader.revision}".encode())
            sha.update(self.first.digest().encode())
            for path, name in self.reader.files:
                with path.open("rb") as file:
                    sha.update(name.encode() + hashlib.file_digest(file, "sha256").digest())
            self._digest = sha.hexdigest()
        return self._digest


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleSet:
    """All sources of a section of the recipe, tokenised.

    Attributes:
        section: `data.train` or `data.eval`.
        sources: in the recipe's order.
        weights: of each: passes over it in one epoch.
        vocab_size: rows of the model's embedding, against which token ids are checked.
    """

    section: str
    sources: tuple[HeldSource | StreamedSource, ...]
    weights: tuple[float, ...]
    vocab_size: int | None = None

    @property
    def held(self) -> list[HeldSource]:
        """The sources held in memory: all but the streamed ones."""
        return [source for source in self.sources if isinstance(source, HeldSource)]

    @property
    def name(self) -> str:
        """The names of all sources, for tracking."""
        return ", ".join(source.name for source in self.sources)

    @property
    def num_samples(self) -> int:
        """Samples held; those of streamed sources are not counted."""
        return sum(len(source) for source in self.held)

    @property
    def num_tokens(self) -> int:
        """Tokens held; those of streamed sources are not counted."""
        return sum(source.num_tokens for source in self.held)

    def at_hand(self) -> list[HeldSource]:
        """All that is in memory: of each streamed source, the first block."""
        return [s if isinstance(s, HeldSource) else s.first for s in self.sources]

    def __len__(self) -> int:
        return self.num_samples

    def __iter__(self) -> Iterator[Sample]:
        return itertools.chain.from_iterable(self.held)

    def fingerprint(self) -> str:
        """SHA-256 of everything that will be learned; equal on all ranks, or they differ."""
        sha = hashlib.sha256()
        for source, weight in zip(self.sources, self.weights, strict=True):
            sha.update(f"{source.name}\0{weight!r}\0{source.digest()}\0".encode())
        return sha.hexdigest()

    def describe(self) -> list[Mapping[str, str | int | float | None]]:
        """Name, counts and digest of each source, for tracking."""
        return [
            {
                "name": source.name,
                "weight": weight,
                "num_samples": len(source) if isinstance(source, HeldSource) else source.num_rows,
                "num_tokens": source.num_tokens if isinstance(source, HeldSource) else None,
                "num_targets": source.num_targets if isinstance(source, HeldSource) else None,
                "num_dropped": source.drops.dropped if isinstance(source, HeldSource) else None,
                "num_truncated": source.drops.truncated if isinstance(source, HeldSource) else None,
                "digest": source.digest(),
            }
            for source, weight in zip(self.sources, self.weights, strict=True)
        ]


def load_samples(
    sources: Sequence[Source],
    tokenizer: Any,
    data: DataConfig,
    vocab_size: int | None = None,
    *,
    section: str = "data.train",
    keep: bool = False,
    reader: DataReader | None = None,
) -> SampleSet:
    """Reads, validates and tokenises the sources of a section; or reads the tokens that are kept.

    Args:
        sources: of the recipe.
        tokenizer: a fast Hugging Face tokenizer, the model's.
        data: lengths, template, and how much may be dropped.
        vocab_size: rows of the model's embedding.
        section: where the sources stand in the recipe, for messages.
        keep: keep the tokens of every source that is not streamed, not of large ones alone.
        reader: has read the sources, or reads them for others, too.

    Raises:
        UserErrors: every problem of every source, `file:line: field: what and how to mend it`.
        UserError: too many samples are too long or have nothing to learn.
    """
    encoder = Encoder(tokenizer, data, vocab_size)
    problems: list[str] = []
    loaded: list[HeldSource | StreamedSource] = []
    total = Drops()
    for records in (reader or DataReader(hold=False)).sources(sources, section, problems):
        if records.source.streaming:
            loaded.append(StreamedSource(records, encoder, problems))
            continue
        held = _held(records, encoder, problems, keep=keep)
        loaded.append(held)
        total.add(held.drops)
    if problems:
        raise UserErrors(problems)
    if any(isinstance(source, HeldSource) for source in loaded):
        total.check(section, data)
    for source in loaded:
        if isinstance(source, HeldSource) and not len(source):
            raise UserError(f"{section}: no sample of {source.name} is left: raise data.max_length")
    weights = tuple(source.weight for source in sources)
    return SampleSet(section=section, sources=tuple(loaded), weights=weights, vocab_size=vocab_size)


def _held(
    records: RecordSource, encoder: Encoder, problems: list[str], *, keep: bool
) -> HeldSource:
    """A source's tokens, out of the cache if they are there."""

    def make(digests: Digests | None) -> HeldSource:
        with Phase(f"tokenising {records.name}", records.reader.count, "rows") as phase:
            valid = phase.over(records.records(problems))
            if digests is not None:
                valid = digests.over(valid)
            return build(records.name, valid, encoder, problems, Drops())

    return source_tokens(records, encoder, make, problems, keep=keep)


def pad_token_id(tokenizer: Any) -> int:
    """The id that fills rows; which one does not matter, since padding is known by its place."""
    pad = tokenizer.pad_token_id
    return int(tokenizer.eos_token_id if pad is None else pad)
