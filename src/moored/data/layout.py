"""Where in a rendered conversation the answers are, and the token that ends each.

Text alone: tokens are `chat.py`'s matter. Nothing is known of any template beforehand. What it does
is seen by rendering: the conversation up to an answer is what the model is given; up to and with it,
what it is to write; and where later turns are added, what a template writes of an earlier one then.

A template may write an earlier turn otherwise than when it was the last (its reasoning is dropped,
a system text moves). No model sees both at once: such a conversation becomes several samples, in
each of which what is learned stands as the model will have it before it and is to write it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moored.data.template import ChatTemplate, Message, TemplateError, Tools

_SENTINEL = "\ue000"  # private use: no text has it
_FIX = (
    "give data.chat_template a copy of the template with {% generation %} markers around the "
    "assistant's words"
)
# Under which a turn's reasoning is given, beside its content.
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking", "thought")
_EMPTY_REASONING = re.compile(
    r"<(think|thinking|thought|reasoning)>\s*</\1>|\[THINK\]\s*\[/THINK\]"
    r"|<\|channel\|>analysis<\|message\|>\s*<\|end\|>"
)
_OPENED = 64  # characters before an answer in which a generation prompt may open its reasoning


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """One sample as text.

    Attributes:
        text: as rendered, up to the end of what is learned.
        spans: the characters [start, stop) of it that are learned, ends of turns included.
        is_closed: the last span ends with a token to stop at; otherwise one is to be put there.
        turn: which of the messages is the last that is laid out.
        has_empty_reasoning: a block of reasoning without a word is learned.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    is_closed: bool = False
    turn: int = 0
    has_empty_reasoning: bool = False


class Stops:
    """The tokens at which a model can be made to stop, found in text.

    Args:
        special: texts of the special tokens, the end of sequence among them.
        added: texts of other tokens that are never split; at these a turn may end, too, where
            its template writes no special one.
    """

    def __init__(self, special: Sequence[str], added: Sequence[str] = ()):
        self._special = _any_of(special)
        other = [text for text in added if text.strip() and not text.startswith(("</", "[/"))]
        self._all = _any_of([*special, *other])

    def closing(self, text: str, start: int = 0) -> int | None:
        """Past the special token that ends the text, blanks apart; None if none does."""
        last = None
        for match in self._special.finditer(text, start):
            last = match
        return last.end() if last and not text[last.end() :].strip() else None

    def first(self, text: str, start: int, stop: int | None = None) -> int | None:
        """Past the token that comes next, blanks apart; None if words do."""
        match = self._all.search(text, start, len(text) if stop is None else stop)
        return match.end() if match and not text[start : match.start()].strip() else None

    def last(self, text: str, start: int, stop: int) -> int | None:
        """Past the last token that lies in text[start:stop] whole."""
        ends = [match.end() for match in self._all.finditer(text, start) if match.end() <= stop]
        return ends[-1] if ends else None

    def whole(self, text: str, start: int, at: int) -> int:
        """`at`, or the start of the token that it would cut."""
        for match in self._all.finditer(text, start):
            if match.start() < at < match.end():
                return match.start()
        return at

    def only(self, text: str) -> bool:
        """Whether there are nothing but such tokens and blanks."""
        return not self._all.sub("", text).strip()


def _any_of(texts: Sequence[str]) -> re.Pattern[str]:
    longest_first = sorted(dict.fromkeys(texts), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def plain_layout(text: str, start: int, stops: Stops) -> Layout:
    """A text that no template lays out, learned from `start` on."""
    end = stops.closing(text, start)
    stop = len(text) if end is None else end
    return Layout(text=text[:stop], spans=((start, stop),), is_closed=end is not None)


def chat_layouts(
    template: ChatTemplate,
    messages: Sequence[Message],
    tools: Tools,
    stops: Stops,
    *,
    learned: Sequence[bool] | None = None,
    split: bool = False,
) -> list[Layout]:
    """A conversation as samples in which every learned answer is learned once.

    Args:
        template: lays it out.
        messages: the conversation, which ends with an answer.
        tools: JSON schemas for the template.
        stops: tokens at which turns may end.
        learned: per message, whether an answer is to be learned; None: all are.
        split: learn an answer of which the template cuts words once other turns follow in a
            sample of its own, instead of refusing it.

    Returns:
        The whole conversation first, then, for answers that the template writes otherwise there,
        shorter ones, longest first. None at all where nothing is to be learned.

    Raises:
        TemplateError: an answer cannot be located, or the template leaves something out.
    """
    chat = _Chat(template, template.suited(messages, tools), tools, stops, split)
    chat.check()
    waiting = [
        index
        for index, message in enumerate(messages)
        if message["role"] == "assistant" and (learned is None or learned[index])
    ]
    layouts: list[Layout] = []
    last = len(messages) - 1
    while waiting:
        found = {index: chat.answer(index, last) for index in waiting if index <= last}
        answers = [answer for answer in found.values() if answer is not None]
        if answers:
            layouts.append(_layout(chat.until(last).text, answers, last))
        waiting = [index for index in waiting if found.get(index) is None]
        last = max(waiting, default=-1)
    return layouts


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rendered:
    """Text, and for a marked template the spans of each assistant turn."""

    text: str
    marks: Mapping[int, Sequence[tuple[int, int]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Answer:
    """Where one turn is to be learned."""

    spans: Sequence[tuple[int, int]]
    is_closed: bool
    has_empty_reasoning: bool


def _layout(text: str, answers: Sequence[_Answer], last: int) -> Layout:
    spans = tuple(span for answer in answers for span in answer.spans)
    return Layout(
        text=text[: spans[-1][1]],
        spans=spans,
        is_closed=answers[-1].is_closed,
        turn=last,
        has_empty_reasoning=any(answer.has_empty_reasoning for answer in answers),
    )


class _Chat:
    """One conversation, rendered up to any of its turns."""

    def __init__(
        self,
        template: ChatTemplate,
        messages: Sequence[Message],
        tools: Tools,
        stops: Stops,
        split: bool,
    ):
        self.template, self.messages, self.tools = template, messages, tools
        self.stops, self.split = stops, split
        self.is_marked = template.is_marked(tools)
        self._until: dict[int, _Rendered] = {}
        self._given: dict[int, str] = {}
        self._words_end: dict[tuple[int, int], int | None] = {}

    # ------------------------------------------------------------ what the template writes

    def until(self, last: int) -> _Rendered:
        """The conversation up to and with turn `last`."""
        if last not in self._until:
            messages = self.messages[: last + 1]
            if self.is_marked:
                text, spans = self.template.render_marked(messages, self.tools)
                marks = self._of_turns(text, [s for s in spans if text[slice(*s)].strip()], last)
            else:
                text, marks = self.template.render(messages, self.tools), {}
            self._until[last] = _Rendered(text=text, marks=marks)
        return self._until[last]

    def given(self, index: int) -> str:
        """What the model is given to write turn `index`."""
        if index not in self._given:
            self._given[index] = self.template.render(
                self.messages[:index], self.tools, generation_prompt=True
            )
        return self._given[index]

    def before(self, index: int) -> str:
        """The same without the header that asks for an answer."""
        return self.template.render(self.messages[:index], self.tools)

    def words_end(self, index: int, last: int) -> int | None:
        """Where the words of turn `index` end in the conversation up to `last`.

        Seen by saying more: what follows the turn's last words stays, from there to the end.
        None where the template refuses that, or nothing of it can be seen.
        """
        if (index, last) not in self._words_end:
            self._words_end[index, last] = self._find_words_end(index, last)
        return self._words_end[index, last]

    def _find_words_end(self, index: int, last: int) -> int | None:
        more = [dict(message) for message in self.messages[: last + 1]]
        more[index] = _said_more(more[index])
        plain = self.messages[: last + 1]
        try:
            text = self.template.render(plain, self.tools)
            other = self.template.render(more, self.tools)
        except TemplateError:
            return None
        if text == other:
            return None
        return len(text) - len(_common_start(text[::-1], other[::-1]))

    def _of_turns(
        self, text: str, spans: Sequence[tuple[int, int]], last: int
    ) -> dict[int, list[tuple[int, int]]]:
        """The marked spans by assistant turn: one each, else by where the turns' words end."""
        turns = [i for i in range(last + 1) if self.messages[i]["role"] == "assistant"]
        if len(spans) == len(turns):
            return {turn: [span] for turn, span in zip(turns, spans, strict=True)}
        found: dict[int, list[tuple[int, int]]] = {}
        for span in spans:
            for turn in turns:
                end = self.words_end(turn, last)
                if turn == turns[-1] or (end is not None and span[0] < end):
                    found.setdefault(turn, []).append(span)
                    break
        return found

    # ------------------------------------------------------------ what must hold

    def check(self) -> None:
        """Raises TemplateError where the template leaves out tools, or what others say."""
        text = self.until(len(self.messages) - 1).text
        if self.tools and self._leaves_tools_out(text):
            raise TemplateError(
                "the chat template leaves the tools out: remove them or set data.chat_template"
            )
        for index, message in enumerate(self.messages):
            if message["role"] != "assistant" and not _holds(text, message):
                raise TemplateError(
                    f"the chat template leaves out or rewrites messages[{index}] "
                    f"({message['role']}): remove this turn or set data.chat_template"
                )

    def _leaves_tools_out(self, text: str) -> bool:
        names = [str((tool.get("function") or tool).get("name", "")) for tool in self.tools or ()]
        if not all(name in text for name in names):
            return True
        try:
            return text == self.template.render(self.messages)
        except TemplateError:
            return False

    # ------------------------------------------------------------ one answer

    def answer(self, index: int, last: int) -> _Answer | None:
        """Turn `index` in the conversation up to `last`; None if it is not to be learned there.

        Raises:
            TemplateError: it cannot be located where it is the last turn, or words of it are cut.
        """
        text = self.until(last).text
        spans = self._marked(index, last) if self.is_marked else self._derived(index, last)
        if spans is None:
            return None
        start, stop = spans[0][0], spans[-1][1]
        end = self._end(index, last, start)
        if end is None and not self.is_marked:
            return None  # written in another way than as the last turn
        closed_at, words = end or (None, stop)
        is_closed = closed_at is not None
        if not self.is_marked:
            spans = [(start, words if closed_at is None else closed_at)]
        elif closed_at is not None and self.stops.only(
            text[min(stop, closed_at) : max(stop, closed_at)]
        ):
            spans = [*spans[:-1], (spans[-1][0], closed_at)]
        else:
            is_closed = False
        if not self._says_all(index, last, spans):
            return None
        blocks = _EMPTY_REASONING.finditer(text, max(0, start - _OPENED), spans[-1][1])
        content = self.messages[index].get("content") or ""
        empty = any(m.end() > start and m.group() not in content for m in blocks)
        return _Answer(spans=spans, is_closed=is_closed, has_empty_reasoning=empty)

    def _marked(self, index: int, last: int) -> list[tuple[int, int]] | None:
        """The template's own marks, where what comes before them is what the model is given."""
        here, own = self.until(last), self.until(index)
        spans, own_spans = list(here.marks.get(index, ())), own.marks.get(index)
        if not own_spans:
            raise _uncovered()
        if index == last:
            return spans
        if not spans:
            if here.text.startswith(own.text):
                raise _uncovered()
            return None  # marked as the last turn alone, which is another text
        before, own_before = here.text[: spans[0][0]], own.text[: own_spans[0][0]]
        if before == own_before:
            return spans
        given = self.given(index)  # between which and the words a last turn may have an empty block
        is_same = before.startswith(given) and own_before.startswith(given)
        return spans if is_same and own_before.endswith(before[len(given) :]) else None

    def _derived(self, index: int, last: int) -> list[tuple[int, int]] | None:
        """From what the model is given, on; the end is found later."""
        text, given = self.until(last).text, self.given(index)
        if text.startswith(given):
            return [(len(given), len(text))]
        if index < last:
            return None
        before = self.before(index)
        if text.startswith(before) and given.startswith(before):
            same = _common_start(given, text)
            raise TemplateError(
                f"the chat template opens an answer with {given[len(same) :]!r}, as "
                f"messages[{index}] does not in this conversation: begin the answer like that, "
                f"or {_FIX}"
            )
        raise TemplateError(
            f"the chat template rewrites what comes before messages[{index}] once it is answered, "
            f"so this answer cannot be located in the conversation: {_FIX}"
        )

    def _end(self, index: int, last: int, start: int) -> tuple[int | None, int] | None:
        """Past the token that ends turn `index` (None: it has none), and past its words.

        None where that cannot be told, or the turn is written otherwise than as the last one.
        """
        text, own = self.until(last).text, self.until(index).text
        closing = self.stops.closing(own, min(start, len(own)))
        if text.startswith(own):
            if closing is not None:
                return closing, closing
            # Nothing that is special ends the turn itself: what comes next may be the stop.
            words = self.words_end(index, last)
            found = None if words is None else self.stops.first(text, words)
            if found is None and index < last:
                found = self.stops.first(text, len(own))
            return found, len(own)
        words, own_words = self.words_end(index, last), self.words_end(index, index)
        if words is None or own_words is None or words < start:
            return None
        if not self.is_marked and not own[start:own_words].endswith(text[start:words]):
            return None
        same = words + len(_common_start(text[words:], own[own_words:]))
        if closing is not None:  # of what both write, the last; else what comes next
            found = self.stops.last(text, words, same)
            if found is None:
                found = self.stops.first(text, self.stops.whole(text, words, same))
        else:
            found = self.stops.first(text, words)
        return found, same

    def _says_all(self, index: int, last: int, spans: Sequence[tuple[int, int]]) -> bool:
        """Whether all that the turn says is learned; False if it is so only as the last turn.

        Raises:
            TemplateError: it is not so then, either; or its content is cut once others follow.
        """
        text, turn = self.until(last).text, self.messages[index]
        covered = "\n".join(text[slice(*span)] for span in spans)
        missing = _unsaid(covered, turn)
        if missing == "content" and not self.is_marked:
            # What the model is given may open the answer, which then says it too.
            before = self.before(index)
            opened = text[len(before) : spans[-1][1]] if text.startswith(before) else ""
            if _content(turn) in opened:
                missing = _unsaid(covered, {**turn, "content": ""})
        if missing is None and covered.strip():
            return True
        if index < last:
            if missing == "content" and not self.split:
                raise TemplateError(
                    f"the chat template leaves out or rewrites messages[{index}] (assistant) once "
                    "other turns follow: give its reasoning as reasoning_content, set "
                    "data.rewritten_turns=split to learn such turns in samples of their own, or "
                    "set data.chat_template"
                )
            return False
        if self.is_marked:
            raise _uncovered()
        if missing in (None, "content"):
            raise TemplateError(
                f"the chat template leaves out or rewrites messages[{index}] (assistant): remove "
                "this turn or set data.chat_template"
            )
        raise TemplateError(
            f"the chat template leaves out messages[{index}].{missing}: write it into the content, "
            "remove it, or set data.chat_template"
        )


def _uncovered() -> TemplateError:
    return TemplateError(
        "the chat template's {% generation %} markers do not cover every assistant turn: put them "
        "around the assistant's words in data.chat_template"
    )


def _common_start(first: str, second: str) -> str:
    return os.path.commonprefix([first, second])  # noqa: RUF071 - of characters


def _said_more(turn: Message) -> dict[str, Any]:
    """The turn with a mark after its words, and in the arguments of its calls."""
    more = dict(turn)
    if turn.get("content"):
        more["content"] = turn["content"] + _SENTINEL
    if turn.get("tool_calls"):
        more["tool_calls"] = [_called_with_more(call) for call in turn["tool_calls"]]
    return more


def _called_with_more(call: Mapping[str, Any]) -> dict[str, Any]:
    inner = dict(call.get("function") or call)
    arguments = inner.get("arguments")
    if isinstance(arguments, Mapping):
        inner["arguments"] = {**arguments, _SENTINEL: _SENTINEL}
    elif isinstance(arguments, str) and arguments.rstrip().endswith("}"):
        given = arguments.rstrip()[:-1].rstrip()
        comma = "" if given.endswith("{") else ", "
        inner["arguments"] = f'{given}{comma}"{_SENTINEL}": "{_SENTINEL}"}}'
    else:
        inner["name"] = f"{inner.get('name', '')}{_SENTINEL}"
    return {**call, "function": inner} if call.get("function") else inner


def _content(turn: Message) -> str:
    return (turn.get("content") or "").strip()


def _unsaid(text: str, turn: Message) -> str | None:
    """The key of the turn whose words the text lacks, None if it says all."""
    if _content(turn) not in text:
        return "content"
    for key in REASONING_KEYS:
        value = turn.get(key)
        if isinstance(value, str) and value.strip() not in text:
            return key
    for number, call in enumerate(turn.get("tool_calls") or ()):
        inner = call.get("function") or call
        if str(inner.get("name", "")) not in text:
            return f"tool_calls[{number}]"
        if not all(_is_said(text, leaf) for leaf in _leaves(inner.get("arguments"))):
            return f"tool_calls[{number}].function.arguments"
    return None


def _leaves(value: Any) -> Iterator[Any]:
    """Every key and value of arguments, those of JSON text too."""
    if isinstance(value, str):
        try:
            decoded = json.loads(value)
        except ValueError:
            decoded = None
        if isinstance(decoded, dict | list):
            value = decoded
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield str(key)
            yield from _leaves(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _leaves(inner)
    else:
        yield value


def _is_said(text: str, leaf: Any) -> bool:
    """Whether a value stands in the text, as it is or as JSON writes it."""
    if leaf is None or isinstance(leaf, bool):
        return True  # true, True, or a flag of the template's own
    if not isinstance(leaf, str):
        return str(leaf) in text or json.dumps(leaf) in text
    forms = (leaf.strip(), json.dumps(leaf, ensure_ascii=False)[1:-1], json.dumps(leaf)[1:-1])
    return any(form in text for form in forms)


def _holds(text: str, message: Message) -> bool:
    """Whether the rendered text has the turn's words; some templates quote a tool's as JSON."""
    content = _content(message)
    if content in text:
        return True
    quoted = json.dumps(content, ensure_ascii=False)[1:-1]
    return message["role"] == "tool" and quoted in text
