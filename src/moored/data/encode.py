"""Records to tokens: lengths, windows of whole documents, what is dropped.

Which sources there are is `samples.py`'s matter, templates and masks are `chat.py`'s.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from moored.data.chat import ChatEncoder
from moored.data.chat_layout import ChatLayout
from moored.data.reading import read_template
from moored.data.template import TemplateError
from moored.data.token_arrays import Drops, HeldSource, Tokens
from moored.utils.errors import UserErrors

if TYPE_CHECKING:
    from moored.config import DataConfig
    from moored.data.records import Record

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
