"""Chat templates and what is learned of a conversation: the assistant's turns, and their end.

No file is read and no sample dropped here. The span of an answer is found in the rendered *text*
(from the template's generation markers, or by rendering what came before it), then carried over to
tokens, and checked there: the tokens before an answer must be what the model will be given when it
has to answer.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moored.data.template import ChatTemplate, TemplateError
from moored.errors import UserError

_SENTINEL = "\ue000"  # private use: no text has it
_FIX = (
    "give data.chat_template a copy of the template with {% generation %} markers around the "
    "assistant's words"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Rendered text and the character spans [start, stop) in it that are to be learned."""

    text: str
    spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """Token ids (int32) and which of them are targets (bool)."""

    input_ids: np.ndarray
    label_mask: np.ndarray


class ChatEncoder:
    """Renders, tokenises and masks conversations and texts for one tokenizer.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        template: Jinja text to use instead of the tokenizer's own.

    Raises:
        UserError: the tokenizer is slow or has no end-of-sequence token, or the template's markers
            cannot be parsed.
    """

    def __init__(self, tokenizer: Any, template: str | None = None):
        name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        if not getattr(tokenizer, "is_fast", False):
            raise UserError(
                f"tokenizer of {name}: has no fast version, so answers cannot be located in its "
                "tokens: use a model whose repository has a tokenizer.json"
            )
        if tokenizer.eos_token_id is None:
            raise UserError(
                f"tokenizer of {name}: has no end-of-sequence token, so the model could not learn "
                "to stop: set eos_token in its tokenizer_config.json"
            )
        self.tokenizer = tokenizer
        self.eos: int = tokenizer.eos_token_id
        self._template = ChatTemplate(tokenizer, template)
        start = list(tokenizer("", verbose=False)["input_ids"])
        bos = tokenizer.bos_token_id
        self.prefix: list[int] = start[:1] if bos is not None and start[:1] == [bos] else []
        self._special = {
            index for index, token in tokenizer.added_tokens_decoder.items() if token.special
        } | {self.eos}

    @property
    def template(self) -> str | None:
        """The chat template, or None."""
        return self._template.text

    def layout(
        self, messages: Sequence[dict[str, Any]], tools: list[dict[str, Any]] | None = None
    ) -> Layout:
        """The rendered conversation and where the answers are in it.

        Raises:
            TemplateError: they cannot be located, or the template leaves something out.
        """
        if self._template.marked:
            text, spans = self._template.render_marked(messages, tools)
        else:
            text, spans = self._template.render(messages, tools), []
        if tools and self._template.render(messages) == text:
            raise TemplateError(
                "the chat template leaves the tools out: remove them or set data.chat_template"
            )
        for index, message in enumerate(messages):
            if not _holds(text, message):
                raise TemplateError(
                    f"the chat template leaves out or rewrites messages[{index}] "
                    f"({message['role']}): remove this turn or set data.chat_template"
                )
        if self._template.marked:
            covered = "\n".join(text[start:stop] for start, stop in spans)
            turns = [m for m in messages if m["role"] == "assistant"]
            if not _in_order(covered, turns, turns[-1]) or not covered.strip():
                raise TemplateError(
                    "the chat template's {% generation %} markers do not cover every assistant "
                    "turn: put them around the assistant's words in data.chat_template"
                )
            return Layout(text=text, spans=tuple(spans))
        for index, message in enumerate(messages):
            if message["role"] == "assistant":
                spans.append(self._span(text, messages, index, tools))
        return Layout(text=text, spans=tuple(spans))

    def _span(
        self,
        text: str,
        messages: Sequence[dict[str, Any]],
        index: int,
        tools: list[dict[str, Any]] | None,
    ) -> tuple[int, int]:
        """Where turn `index` is: after what the model is given to answer, up to the turn's end."""
        given = self._template.render(messages[:index], tools, generation_prompt=True)
        if not text.startswith(given):
            before = self._template.render(messages[:index], tools)
            if text.startswith(before) and given.startswith(before):
                same = os.path.commonprefix([given, text])  # noqa: RUF071 - of characters
                raise TemplateError(
                    f"the chat template opens an answer with {given[len(same) :]!r}, as "
                    f"messages[{index}] does not in this conversation: begin the answer like that, "
                    f"or {_FIX}"
                )
            raise TemplateError(
                f"the chat template rewrites what comes before messages[{index}], so this answer "
                f"cannot be located in the conversation: {_FIX}, or split it into one sample an "
                "answer"
            )
        until = (
            text
            if index == len(messages) - 1
            else self._template.render(messages[: index + 1], tools)
        )
        if text.startswith(until):
            stop = len(until)
        else:
            stop = self._end_of_words(text, messages, index, tools)
        turn, last = messages[index], messages[-1]
        if stop > len(given) and _in_order(text[len(given) : stop], [turn], last):
            return len(given), stop
        # What the model is given may open the answer, which then says it too.
        before = self._template.render(messages[:index], tools)
        said = text[len(before) if given.startswith(before) else len(given) : stop]
        if stop <= len(given) or _content(turn) not in said:
            raise TemplateError(
                f"the end of messages[{index}] cannot be located after the chat template: {_FIX}"
            )
        if _in_order(said, [turn], last):
            return len(given), stop
        if _in_order(text[len(given) :], [turn], last):  # the words end before the calls do
            raise TemplateError(
                f"the end of messages[{index}] cannot be located after the chat template: {_FIX}"
            )
        what = "tool_calls" if turn.get("tool_calls") else "reasoning_content"
        raise TemplateError(
            f"the chat template leaves out messages[{index}].{what}: write it into the content, "
            "remove it, or set data.chat_template"
        )

    def _end_of_words(
        self,
        text: str,
        messages: Sequence[dict[str, Any]],
        index: int,
        tools: list[dict[str, Any]] | None,
    ) -> int:
        """For templates that lay a last turn out otherwise than an earlier one: -1 if nowhere.

        A mark after the turn's last word shows where the words end in the whole conversation.
        """
        words = messages[index].get("content") or ""
        for end in dict.fromkeys((words, words.rstrip())):  # as it is, or for one that trims
            if not end:
                continue
            marked = [dict(message) for message in messages]
            marked[index]["content"] = end + _SENTINEL
            other = self._template.render(marked, tools)
            if other.count(_SENTINEL) == 1 and other.replace(_SENTINEL, "") == text:
                return other.index(_SENTINEL)
        return -1

    def encode(self, layouts: Sequence[Layout], *, chat: bool = True) -> list[Tokens | str]:
        """Tokenises layouts; in the place of one that cannot be masked exactly, says why.

        Args:
            layouts: what to tokenise.
            chat: rendered by the template, which writes special tokens itself. Otherwise the
                tokenizer's own start token is put first.
        """
        if not layouts:
            return []
        whole = self.tokenizer(
            [layout.text for layout in layouts],
            add_special_tokens=False,
            return_offsets_mapping=True,
            verbose=False,
        )
        before = [layout.text[:start] for layout in layouts for start, _ in layout.spans]
        given = iter(self._ids(before))
        out: list[Tokens | str] = []
        for index, layout in enumerate(layouts):
            ids, offsets = whole["input_ids"][index], whole["offset_mapping"][index]
            prefixes = [next(given) for _ in layout.spans]
            broken = [
                start
                for (start, _), prefix in zip(layout.spans, prefixes, strict=True)
                if ids[: len(prefix)] != prefix
            ]
            if broken:
                pieces = self._piecewise(layout.text, broken)
                if self._decode(pieces[0]) != self._decode(ids):
                    out.append(
                        "the tokenizer joins the first character of an answer with what comes "
                        "before it: let prompts end, or answers begin, with a space or line break"
                    )
                    continue
                ids, offsets = pieces
            out.append(self._mask(layout, ids, offsets, [] if chat else self.prefix))
        return out

    def prompt_ids(
        self, messages: Sequence[dict[str, Any]], tools: list[dict[str, Any]] | None = None
    ) -> list[int]:
        """What the model is given to answer `messages`: the assistant's header included.

        Raises:
            TemplateError: the template refuses the conversation.
        """
        return self._ids([self._template.render(messages, tools, generation_prompt=True)])[0]

    def text_ids(self, text: str) -> list[int]:
        """Tokens of a plain text, with the start token where the tokenizer puts one."""
        return [*self.prefix, *self._ids([text])[0]]

    def _ids(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        return self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    def _piecewise(self, text: str, cuts: Sequence[int]) -> tuple[list[int], list[tuple[int, int]]]:
        """Tokenises so that no token lies across a cut: as when the model goes on from there."""
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        for start, stop in zip([0, *cuts], [*cuts, len(text)], strict=True):
            piece = self.tokenizer(
                text[start:stop],
                add_special_tokens=False,
                return_offsets_mapping=True,
                verbose=False,
            )
            ids += piece["input_ids"]
            offsets += [(start + left, start + right) for left, right in piece["offset_mapping"]]
        return ids, offsets

    def _mask(
        self, layout: Layout, ids: list[int], offsets: list[tuple[int, int]], prefix: list[int]
    ) -> Tokens:
        mask = np.zeros(len(ids), dtype=bool)
        starts = np.array([start for start, _ in offsets], dtype=np.int64)
        stops = np.array([stop for _, stop in offsets], dtype=np.int64)
        ends = [self.eos]  # of a turn
        for number, (start, stop) in enumerate(reversed(layout.spans)):
            first = int(np.searchsorted(starts, start))
            past = int(np.searchsorted(stops, stop, side="right"))
            is_last = number == 0
            closing = self._closing(
                layout.text, ids, stops, range(first, past), stop, is_last, ends
            )
            if closing is not None:
                past = closing + 1
            mask[first:past] = True
            if not is_last:
                continue
            ids, mask = ids[:past], mask[:past]  # nothing is learned of what may follow
            if closing is not None:
                ends.append(ids[closing])
            else:  # the template lets the answer end with nothing to stop at
                ids, mask = [*ids, self.eos], np.append(mask, True)
        return Tokens(
            input_ids=np.array([*prefix, *ids], dtype=np.int32),
            label_mask=np.concatenate([np.zeros(len(prefix), dtype=bool), mask]),
        )

    def _closing(
        self,
        text: str,
        ids: list[int],
        stops: np.ndarray,
        turn: range,
        stop: int,
        is_last: bool,
        ends: list[int],
    ) -> int | None:
        """The index of the special token that ends a turn, inside its span or right after it.

        What follows it in the span (often a line break) is the template's: a model that stops at
        the token is never asked for it.
        """
        for index in reversed(turn):
            if ids[index] in self._special:
                if not text[stops[index] : stop].strip():
                    return index
                break
        index = turn.stop
        if is_last:
            while index < len(ids) and not text[stop : stops[index]].strip():
                index += 1
            return index if index < len(ids) and ids[index] in self._special else None
        return index if index < len(ids) and ids[index] in ends else None


def _content(message: dict[str, Any]) -> str:
    return (message.get("content") or "").strip()


def _in_order(text: str, turns: Sequence[dict[str, Any]], last: dict[str, Any]) -> bool:
    """Whether the text has what each turn says, calls and reasons, one turn after the other.

    Reasoning is asked for in the `last` turn alone: many templates drop an earlier one's by design.
    """
    position = 0
    for turn in turns:
        words = [_content(turn)]
        for call in turn.get("tool_calls") or ():
            words.append(str((call.get("function") or call).get("name", "")))
        if turn is last:
            words.append((turn.get("reasoning_content") or "").strip())
        found = [text.find(word, position) for word in words]
        if -1 in found:
            return False
        position = max(at + len(word) for at, word in zip(found, words, strict=True))
    return True


def _holds(text: str, message: dict[str, Any]) -> bool:
    """Whether the rendered text has the turn's words; some templates quote a tool's as JSON."""
    content = _content(message)
    if content in text:
        return True
    quoted = json.dumps(content, ensure_ascii=False)[1:-1]
    return message["role"] == "tool" and quoted in text
