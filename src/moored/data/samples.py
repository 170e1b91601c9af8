"""The samples of a recipe: all its sources, tokenised, with counts and fingerprints.

Holds lengths, windows of whole documents and what is dropped; templates and masks are `chat.py`'s.
The order in which training meets them is `stream.py`'s matter; a streamed source is tokenised block
by block, the others at once.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from moored.data.chat import ChatEncoder
from moored.data.chat_layout import ChatLayout
from moored.data.files import Row
from moored.data.reading import DataReader, RecordSource, read_template
from moored.data.records import Record, parse
from moored.data.template import TemplateError
from moored.data.token_arrays import Drops, HeldSource, Sample, Tokens
from moored.data.token_cache import source_tokens
from moored.utils.errors import UserError, UserErrors
from moored.utils.progress import Phase

if TYPE_CHECKING:
    from moored.config import DataConfig, Source
    from moored.data.records import Digests, Record


CHUNK = 256  # records tokenised together


class Encoder:
    """Records to tokens, by the recipe's lengths and the tokenizer's template.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        data: of the recipe.
        vocab_size: rows of the model's embedding; token ids past it are refused.
    """

    def __init__(self, tokenizer: Any, data: DataConfig, vocab_size: int | None = None):
        problems: list[str] = []
        template = read_template(data.chat_template, problems)
        if problems:
            raise UserErrors(problems)
        self.chat = ChatEncoder(tokenizer, template)
        self.data = data
        self.vocab_size = vocab_size

    def encode(self, records: Sequence[Record]) -> Iterator[tuple[str, Record, Tokens | str]]:
        """(sample id, record, tokens or what is wrong) of each.

        Documents give several, and so do conversations of which the template writes earlier turns
        otherwise than it did when they were last: of these the whole one comes first, by the
        record's own id.
        """
        layouts = [self._layouts(record) for record in records]
        encoded: dict[bool, Iterator[Tokens | str]] = {
            chat: iter(
                self.chat.encode(
                    [layout for laid, of in layouts if of is chat for layout in _those(laid)],
                    chat=chat,
                )
            )
            for chat in (True, False)
        }
        for record, (laid, chat) in zip(records, layouts, strict=True):
            if isinstance(laid, str):
                yield record.sample_id, record, laid
            elif not laid:
                yield record.sample_id, record, NOTHING
            elif record.document:
                tokens = next(encoded[chat])
                assert isinstance(tokens, Tokens), "all of a text is learned, so nothing is cut"
                for number, window in enumerate(self._windows(tokens)):
                    yield f"{record.sample_id}.{number}", record, window
            else:
                for layout in laid:
                    is_whole = not record.messages or layout.turn == len(record.messages) - 1
                    part = "" if is_whole else f".{layout.turn}"
                    yield f"{record.sample_id}{part}", record, next(encoded[chat])

    def _layouts(self, record: Record) -> tuple[list[ChatLayout] | str, bool]:
        """A record's samples as text or what is wrong, and whether the template wrote them."""
        if record.kind == "text":
            return [self.chat.plain_layout("", record.text)], False
        if self.chat.templates and not record.rendered:
            if record.kind == "prompt_completion" and (problem := self._rendered(record)):
                return problem, True
            try:
                layouts = self.chat.layouts(
                    record.messages,
                    record.tools,
                    learned=record.learned,
                    split=self.data.rewritten_turns == "split",
                )
            except TemplateError as error:
                return str(error), True
            return layouts, True
        if record.kind == "messages":
            return "the tokenizer has no chat template: set data.chat_template to a file", True
        prompt, completion = (message["content"] for message in record.messages)
        if record.rendered:
            completion = self.chat.with_end(completion)
        layout = self.chat.plain_layout(prompt, completion)
        return [dataclasses.replace(layout, turn=1)], False

    def holds_turn_tokens(self, record: Record) -> bool:
        """Whether words of a text or chat hold marks of turns, as only rendered rows may."""
        words = [record.text, *(message.get("content") or "" for message in record.messages)]
        tokens = () if record.rendered else self.chat.turn_tokens
        return any(token in text for token in tokens for text in words)

    def _rendered(self, record: Record) -> str | None:
        """Says that a pair has the marks of turns which the template is about to write again."""
        for name, message in zip(("prompt", "completion"), record.messages, strict=True):
            for token in self.chat.turn_tokens:
                if token in message["content"]:
                    return (
                        f"{name}: holds {token!r}, which the chat template writes itself: give "
                        "plain words, or set rendered: true for this source if its rows are in the "
                        "model's format already"
                    )
        return None

    def _windows(self, tokens: Tokens) -> Iterator[Tokens]:
        """A whole file has no samples of its own: it is cut at max_length, nothing is lost."""
        prefix = self.chat.prefix
        ids, learned = tokens.input_ids[len(prefix) :], tokens.label_mask[len(prefix) :]
        size = self.data.max_length - len(prefix)
        for start in range(0, len(ids), size):
            there = len(prefix) * (ids[start : start + 1].tolist() == prefix)  # of the next text
            piece = slice(start + there, start + size)
            window = np.concatenate([np.array(prefix, np.int32), ids[piece]])
            if len(window) > 1:
                mask = np.concatenate([np.ones(len(prefix), dtype=bool), learned[piece]])
                yield Tokens(input_ids=window, label_mask=mask)


NOTHING = Tokens(input_ids=np.zeros(0, np.int32), label_mask=np.zeros(0, bool))  # to learn


def _those(laid: list[ChatLayout] | str) -> list[ChatLayout]:
    return [] if isinstance(laid, str) else laid


def build(
    name: str, records: Iterable[Record], encoder: Encoder, problems: list[str], drops: Drops
) -> HeldSource:
    """Tokenises records; those that cannot be go to `problems`, those not to be used to `drops`."""
    data, parts = encoder.data, []
    records = iter(records)
    while chunk := list(itertools.islice(records, CHUNK)):
        for sample_id, record, tokens in encoder.encode(chunk):
            if isinstance(tokens, str):
                problems.append(f"{record.where}: {tokens}")
                continue
            problem = _vocabulary_problem(tokens, encoder)
            if problem:
                problems.append(f"{record.where}: {problem}")
                continue
            drops.met += 1
            drops.split += record.kind == "messages" and sample_id != record.sample_id
            drops.empty_reasoning += "empty_reasoning" in tokens.notes
            drops.open_turns += "open_turns" in tokens.notes
            drops.turn_tokens += encoder.holds_turn_tokens(record)
            length = len(tokens.input_ids)
            drops.lengths.append(length)
            if length > data.max_length:
                if data.too_long == "drop":
                    drops.too_long += 1
                    continue
                drops.truncated += 1
                tokens = Tokens(
                    input_ids=tokens.input_ids[: data.max_length],
                    label_mask=tokens.label_mask[: data.max_length],
                )
            if not tokens.label_mask[1:].any():
                drops.no_target += 1
                continue
            parts.append((sample_id, tokens))
    return HeldSource(name, parts, drops)


def _vocabulary_problem(tokens: Tokens, encoder: Encoder) -> str | None:
    size, highest = encoder.vocab_size, int(tokens.input_ids.max(initial=0))
    if size is None or highest < size:
        return None
    token = encoder.chat.tokenizer.convert_ids_to_tokens(highest)
    return (
        f"token {token!r} has id {highest}, outside the model's vocabulary of {size}: use the "
        "tokenizer that belongs to the model"
    )


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
