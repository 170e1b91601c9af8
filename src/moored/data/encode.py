"""Records to tokens: lengths, windows of whole documents, what is dropped and why.

Which sources there are is `samples.py`'s matter, templates and masks are `chat.py`'s.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import logging
import math
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from moored.data.batch import Sample
from moored.data.chat import ChatEncoder, Tokens
from moored.data.chat_layout import ChatLayout
from moored.data.records import Record, read_template
from moored.data.template import TemplateError
from moored.utils.errors import UserError, UserErrors

if TYPE_CHECKING:
    from moored.config import DataConfig

logger = logging.getLogger(__name__)

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
                    [layout for found, of in layouts if of is chat for layout in _laid(found)],
                    chat=chat,
                )
            )
            for chat in (True, False)
        }
        for record, (found, chat) in zip(records, layouts, strict=True):
            if isinstance(found, str):
                yield record.sample_id, record, found
            elif not found:
                yield record.sample_id, record, NOTHING
            elif record.document:
                tokens = next(encoded[chat])
                assert isinstance(tokens, Tokens), "all of a text is learned, so nothing is cut"
                for number, window in enumerate(self._windows(tokens)):
                    yield f"{record.sample_id}.{number}", record, window
            else:
                for layout in found:
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
        """Whether words of a text or chat hold marks of turns; rendered rows may."""
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


def _laid(found: list[ChatLayout] | str) -> list[ChatLayout]:
    return [] if isinstance(found, str) else found


@dataclass(slots=True, kw_only=True)
class Drops:
    """Samples that were met but are not used (truncated ones are used).

    Attributes:
        split: samples besides the first of a conversation that had to become several.
        empty_reasoning: samples in which a block of reasoning without a word is learned.
        open_turns: samples in which an answer before the last ends with no token to stop at.
        turn_tokens: samples whose words hold the chat template's own marks of turns.
        lengths: in tokens, of every sample that was met, before it was cut.
    """

    met: int = 0
    too_long: int = 0
    no_target: int = 0
    truncated: int = 0
    unreadable: int = 0
    split: int = 0
    empty_reasoning: int = 0
    open_turns: int = 0
    turn_tokens: int = 0
    lengths: array[int] = dataclasses.field(default_factory=lambda: array("i"))

    def counts(self) -> dict[str, int]:
        """All but the lengths, by name."""
        names = [field.name for field in dataclasses.fields(self) if field.name != "lengths"]
        return {name: getattr(self, name) for name in names}

    def add(self, other: Drops) -> None:
        """Counts what was met in another source, too."""
        for name in (*self.counts(), "lengths"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    @property
    def dropped(self) -> int:
        """How many are not used."""
        return self.too_long + self.no_target + self.unreadable

    def reasons(self, data: DataConfig) -> list[str]:
        """How many were dropped and why, in words."""
        return [
            f"{count} {reason}"
            for count, reason in (
                (self.too_long, f"longer than data.max_length={data.max_length}"),
                (self.no_target, "without a token to learn"),
                (self.unreadable, "not as they must be"),
            )
            if count
        ]

    def notes(self) -> list[str]:
        """What is learned, but should be looked at, in words."""
        return [
            f"{count} of {self.met} samples {what}"
            for count, what in (
                (
                    self.empty_reasoning,
                    "learn a block of reasoning without a word, as the chat template writes it: "
                    "the model learns not to think; give reasoning_content, or a template "
                    "without it",
                ),
                (
                    self.open_turns,
                    "have an answer that the chat template ends with no token to stop at, before "
                    "the last: there the model learns no end",
                ),
                (
                    self.turn_tokens,
                    "hold the chat template's own marks of turns among their words, which are "
                    "read as such: clean them, or give chats as messages",
                ),
            )
            if count
        ]

    @property
    def split_note(self) -> str:
        """That chats became several samples, in words."""
        return (
            f"{self.split} samples more than rows, since the chat template writes earlier turns "
            "otherwise once others follow"
        )

    def check(self, where: str, data: DataConfig) -> None:
        """Says what was dropped.

        Raises:
            UserError: too many, or all.
        """
        if self.truncated:
            logger.info("%s: %d samples cut to %d tokens", where, self.truncated, data.max_length)
        for note in self.notes():
            logger.warning("%s: %s", where, note)
        if self.split:
            logger.info("%s: %s", where, self.split_note)
        if not self.dropped and self.met:
            return
        reasons = self.reasons(data)
        line = f"{where}: {self.dropped} of {self.met} samples dropped ({', '.join(reasons)})"
        fraction = self.dropped / max(1, self.met)
        if fraction <= data.max_dropped_fraction and self.dropped < self.met:
            logger.warning("%s", line)
            return
        raise UserError(
            f"{line}, more than data.max_dropped_fraction={data.max_dropped_fraction:g} allows: "
            f"{self._fix(data)}"
        )

    def _fix(self, data: DataConfig) -> str:
        if self.too_long + self.no_target == 0:
            return "mend the data"
        lengths = sorted(self.lengths)
        keep = max(1, math.ceil(len(lengths) * (1 - data.max_dropped_fraction)))
        longer = f"set data.max_length={lengths[keep - 1]} or more" if lengths else "mend the data"
        return longer if data.too_long == "truncate" else f"{longer}, or data.too_long=truncate"


@dataclass(frozen=True, slots=True, kw_only=True)
class Flat:
    """The tokens of many samples, one after the other.

    Attributes:
        offsets: int64 [samples + 1]; sample i is tokens [offsets[i], offsets[i + 1]).
        input_ids: int32 [tokens].
        label_mask: bool [tokens].
    """

    offsets: np.ndarray
    input_ids: np.ndarray
    label_mask: np.ndarray


class HeldSource(Sequence[Sample]):
    """The samples of one source (or of one block of a stream), held in flat arrays.

    Attributes:
        kept_in: the folder of the cache that they were read from, or None.
    """

    def __init__(self, name: str, parts: Sequence[tuple[str, Tokens]], drops: Drops):
        lengths = [len(tokens.input_ids) for _, tokens in parts]
        empty = [np.zeros(0, dtype=np.int32)]
        flat = Flat(
            offsets=np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64),
            input_ids=np.concatenate(empty + [tokens.input_ids for _, tokens in parts]),
            label_mask=np.concatenate(
                [m.astype(bool) for m in empty] + [t.label_mask for _, t in parts]
            ),
        )
        flat.input_ids.flags.writeable = flat.label_mask.flags.writeable = False
        self._fill(name, [sample_id for sample_id, _ in parts], flat, drops)

    @classmethod
    def kept(
        cls,
        name: str,
        sample_ids: Sequence[str],
        flat: Flat,
        drops: Drops,
        *,
        digest: str,
        folder: Path,
    ) -> Self:
        """The same from arrays that were kept in `folder`; nothing is copied."""
        source = cls.__new__(cls)
        source._fill(name, sample_ids, flat, drops, digest, folder)
        return source

    def _fill(
        self,
        name: str,
        sample_ids: Sequence[str],
        flat: Flat,
        drops: Drops,
        digest: str | None = None,
        kept_in: Path | None = None,
    ) -> None:
        self.name = name
        self.drops = drops
        self.sample_ids = sample_ids
        self.flat = flat
        self.kept_in = kept_in
        self._digest = digest

    def __len__(self) -> int:
        return len(self.sample_ids)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if index < 0:
            index += len(self)
        start, stop = self.flat.offsets[index], self.flat.offsets[index + 1]
        return Sample(
            sample_id=self.sample_ids[int(index)],
            input_ids=self.flat.input_ids[start:stop],
            label_mask=self.flat.label_mask[start:stop],
        )

    @property
    def num_tokens(self) -> int:
        """Of all samples."""
        return len(self.flat.input_ids)

    @property
    def num_targets(self) -> int:
        """Tokens that are predicted and learned."""
        mask = self.flat.label_mask
        return int(np.count_nonzero(mask) - np.count_nonzero(mask[self.flat.offsets[:-1]]))

    def digest(self) -> str:
        """SHA-256 of ids, tokens and masks."""
        if self._digest is None:
            sha = hashlib.sha256("\0".join(self.sample_ids).encode())
            for values in (self.flat.offsets, self.flat.input_ids, self.flat.label_mask):
                sha.update(values.tobytes())
            self._digest = sha.hexdigest()
        return self._digest


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
