"""Where in a rendered conversation the answers are, what ends each, and whether a text has a turn.

Text alone: tokens are `chat.py`'s matter. Nothing is known of any template beforehand. What it
does is seen by rendering: the conversation up to an answer is what the model is given; up to and
with it, what it is to write; and where later turns are added, how an earlier one is written then.

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

from moored.data.layouts import REASONING_KEYS
from moored.data.stop_tokens import StopStrings
from moored.data.template import ChatTemplate, Message, TemplateError, Tools

MARK = "\ue000"  # private use: no text has it


def said_more(turn: Message) -> dict[str, Any]:
    """The turn with a mark after its words, and in the arguments of its calls."""
    more = dict(turn)
    if turn.get("content"):
        more["content"] = turn["content"] + MARK
    if turn.get("tool_calls"):
        more["tool_calls"] = [_called_with_more(call) for call in turn["tool_calls"]]
    return more


def said_before(turn: Message) -> dict[str, Any]:
    """The turn with a mark before its words, or before the names of its calls."""
    more = dict(turn)
    for key in ("content", *REASONING_KEYS):
        if isinstance(turn.get(key), str) and turn[key]:
            more[key] = MARK + turn[key]
    if turn.get("tool_calls"):
        more["tool_calls"] = [_named_with_more(call) for call in turn["tool_calls"]]
    return more


def _named_with_more(call: Mapping[str, Any]) -> dict[str, Any]:
    inner = dict(call.get("function") or call)
    inner["name"] = f"{MARK}{inner.get('name', '')}"
    return {**call, "function": inner} if call.get("function") else inner


def _called_with_more(call: Mapping[str, Any]) -> dict[str, Any]:
    inner = dict(call.get("function") or call)
    arguments = inner.get("arguments")
    if isinstance(arguments, Mapping):
        inner["arguments"] = {**arguments, MARK: MARK}
    elif isinstance(arguments, str) and arguments.rstrip().endswith("}"):
        given = arguments.rstrip()[:-1].rstrip()
        comma = "" if given.endswith("{") else ", "
        inner["arguments"] = f'{given}{comma}"{MARK}": "{MARK}"}}'
    else:
        inner["name"] = f"{inner.get('name', '')}{MARK}"
    return {**call, "function": inner} if call.get("function") else inner


def content_of(turn: Message) -> str:
    """Its content without the blanks around it; empty if it has none."""
    return (turn.get("content") or "").strip()


def words_of(turn: Message) -> dict[str, str]:
    """What the turn says itself, by key: its content and its reasoning."""
    reasoning = {key: turn.get(key) for key in REASONING_KEYS}
    words = {"content": content_of(turn)}
    words |= {key: value.strip() for key, value in reasoning.items() if isinstance(value, str)}
    return {key: value for key, value in words.items() if value}


def unsaid(text: str, turn: Message) -> str | None:
    """The key of the turn whose words the text lacks, None if it says all."""
    left = text
    for key, words in sorted(words_of(turn).items(), key=lambda item: -len(item[1])):
        if words not in left:
            return key
        left = left.replace(words, MARK, 1)  # the same words may be said twice
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


def holds(text: str, message: Message) -> bool:
    """Whether the rendered text has the turn's words; some templates quote a tool's as JSON."""
    content = content_of(message)
    if content in text:
        return True
    quoted = json.dumps(content, ensure_ascii=False)[1:-1]
    return message["role"] == "tool" and quoted in text


_EMPTY_REASONING = re.compile(
    r"<(think|thinking|thought|reasoning)>\s*</\1>|\[THINK\]\s*\[/THINK\]"
    r"|<\|channel\|>analysis<\|message\|>\s*<\|end\|>"
)
_OPENED = 64  # characters before an answer in which a generation prompt may open its reasoning


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatLayout:
    """One sample as text.

    Attributes:
        text: as rendered, up to the end of what is learned.
        spans: the characters [start, stop) of it that are learned, ends of turns included.
        is_closed: the last span ends with a token to stop at; otherwise one is to be put there.
        turn: which of the messages is the last that is laid out.
        notes: what should be looked at: `empty_reasoning` (a block of reasoning without a word is
            learned), `open_turns` (an answer before the last has no token to stop at).
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    is_closed: bool = False
    turn: int = 0
    notes: tuple[str, ...] = ()


def plain_layout(text: str, start: int, stops: StopStrings) -> ChatLayout:
    """A text that no template lays out, learned from `start` on."""
    end = stops.closing(text, start)
    stop = len(text) if end is None else end
    return ChatLayout(text=text[:stop], spans=((start, stop),), is_closed=end is not None)


def chat_layouts(
    template: ChatTemplate,
    messages: Sequence[Message],
    tools: Tools,
    stops: StopStrings,
    *,
    learned: Sequence[bool] | None = None,
    split: bool = False,
) -> list[ChatLayout]:
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
    waiting = [
        index
        for index, message in enumerate(messages)
        if message["role"] == "assistant" and (learned is None or learned[index])
    ]
    layouts: list[ChatLayout] = []
    last = len(messages) - 1
    while waiting:
        by_turn = {index: chat.answer(index, last) for index in reversed(waiting)}
        newest = by_turn.get(last)
        if newest is not None and newest.text is not None:
            by_turn = {last: newest}
        answers = [answer for index in waiting if (answer := by_turn.get(index)) is not None]
        if answers:
            layouts.append(_layout(chat.until(last).text, answers, last))
            chat.check(layouts[-1].text, max(i for i in by_turn if by_turn[i] is not None))
        waiting = [index for index in waiting if by_turn.get(index) is None]
        last = max(waiting, default=-1)
    return layouts


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rendered:
    """Text, and for a marked template the spans of each assistant turn."""

    text: str
    marks: Mapping[int, Sequence[tuple[int, int]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Answer:
    """Where one turn is to be learned.

    Attributes:
        text: in which; None for the conversation as rendered.
    """

    spans: Sequence[tuple[int, int]]
    is_closed: bool
    has_empty_reasoning: bool
    text: str | None = None


def _layout(text: str, answers: Sequence[_Answer], last: int) -> ChatLayout:
    text = answers[-1].text or text
    spans = tuple(span for answer in answers for span in answer.spans)
    noted = {
        "empty_reasoning": any(answer.has_empty_reasoning for answer in answers),
        "open_turns": not all(answer.is_closed for answer in answers[:-1]),
    }
    return ChatLayout(
        text=text[: spans[-1][1]],
        spans=spans,
        is_closed=answers[-1].is_closed,
        turn=last,
        notes=tuple(name for name, is_so in noted.items() if is_so),
    )


class _Chat:
    """One conversation, rendered up to any of its turns."""

    def __init__(
        self,
        template: ChatTemplate,
        messages: Sequence[Message],
        tools: Tools,
        stops: StopStrings,
        split: bool,
    ):
        self.template, self.messages, self.tools = template, messages, tools
        self.stops, self.split = stops, split
        self.is_marked = template.is_marked(tools)
        self._text: dict[int, str] = {}
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
                self._text[last] = text  # where words end in it is asked for next
                marks = self._of_turns(text, [s for s in spans if text[slice(*s)].strip()], last)
            else:
                text, marks = self.template.render(messages, self.tools), {}
                self._text[last] = text
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
        more[index] = said_more(more[index])
        text = self._text[last]
        try:
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
        by_turn: dict[int, list[tuple[int, int]]] = {}
        for span in spans:
            for turn in turns:
                end = self.words_end(turn, last)
                if turn == turns[-1] or (end is not None and span[0] < end):
                    by_turn.setdefault(turn, []).append(span)
                    break
        return by_turn

    # ------------------------------------------------------------ what must hold

    def check(self, text: str, last: int) -> None:
        """Raises TemplateError where a sample lacks the tools, or what was said before `last`."""
        if self.tools and self._leaves_tools_out(text):
            raise TemplateError(
                "the chat template leaves the tools out: remove them or set data.chat_template"
            )
        for index, message in enumerate(self.messages[:last]):
            if message["role"] != "assistant" and not holds(text, message):
                raise TemplateError(
                    f"the chat template leaves out or rewrites messages[{index}] "
                    f"({message['role']}): remove this turn or set data.chat_template"
                )

    def _leaves_tools_out(self, text: str) -> bool:
        names = [str((tool.get("function") or tool).get("name", "")) for tool in self.tools or ()]
        if not all(name in text for name in names):
            return True
        try:
            return self.until(len(self.messages) - 1).text == self.template.render(self.messages)
        except TemplateError:
            return False

    # ------------------------------------------------------------ one answer

    def answer(self, index: int, last: int) -> _Answer | None:
        """Turn `index` in the conversation up to `last`; None if it is not to be learned there.

        Raises:
            TemplateError: it cannot be located where it is the last turn, or words of it are cut.
        """
        text = self.until(last).text
        begins = self._begins(index, last)
        if self.is_marked:
            spans = self._marked(index, last, begins)
        else:
            spans = None if begins is None else [(begins, len(text))]
        if spans is None or begins is None:
            return None
        start, stop = spans[0][0], spans[-1][1]
        end = self._end(index, last, start)
        if end is None:
            return None
        closed_at, words = end
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
        moved, given = None, self.given(index)
        if not text.startswith(given):  # asked anew
            moved = given + text[begins:]
            by = len(given) - begins
            spans = [(start + by, stop + by) for start, stop in spans]
        return _Answer(spans=spans, is_closed=is_closed, has_empty_reasoning=empty, text=moved)

    def _marked(self, index: int, last: int, start: int | None) -> list[tuple[int, int]] | None:
        """The template's own marks, where what comes before them is what the model is given.

        Args:
            index: of the turn.
            last: of the conversation.
            start: where the turn begins there.
        """
        here, own = self.until(last), self.until(index)
        spans, own_spans = here.marks.get(index, ()), own.marks.get(index)
        if not own_spans or (not spans and here.text.startswith(own.text)):
            raise _uncovered()
        if start is None or not spans:
            return None  # marked as the last turn alone, in which it is written otherwise
        # What the model is given is not learned, whether it is marked or not.
        spans = [(max(at, start), stop) for at, stop in spans if stop > start]
        if not spans:
            raise _uncovered()
        if index == last:
            return spans
        before, own_before = here.text[start : spans[0][0]], own.text[start : own_spans[0][0]]
        return spans if own_before.endswith(before) else None  # a last turn's empty block apart

    def _begins(self, index: int, last: int) -> int | None:
        """Where turn `index` begins: after what the model is given to write it.

        None where that is not what stands before it in the conversation up to `last`.

        Raises:
            TemplateError: it is the last turn, and where it begins cannot be told.
        """
        text, given = self.until(last).text, self.given(index)
        if text.startswith(given):
            return len(given)
        if index < last:
            return None
        begins = self._asked_anew(index)
        if begins is not None:
            return begins
        before = self.before(index)
        if text.startswith(before) and given.startswith(before):
            same = _common_start(given, text)
            raise TemplateError(
                f"the chat template opens an answer with {given[len(same) :]!r}, as "
                f"messages[{index}] does not in this conversation: begin the answer like that, "
                "or set data.chat_template to a template that does not"
            )
        raise TemplateError(
            f"the chat template rewrites what comes before messages[{index}] once it is answered, "
            "and where the answer begins cannot be told: set data.chat_template to a template that "
            "writes the same before and after"
        )

    def _asked_anew(self, index: int) -> int | None:
        """Where turn `index` begins in a text whose start is not what the model was given.

        Some templates write what was asked otherwise as soon as it is answered (a system text that
        stands before the last question only while nothing follows it). Then no rendering is what
        the model sees; it is what it was given, and what it said. None where the turn's beginning
        cannot be told.
        """
        own, given = self.until(index).text, self.given(index)
        asked, said = [dict(m) for m in self.messages[:index]], dict(self.messages[index])
        asked[-1] = said_more(asked[-1])
        try:
            other = self.template.render(asked, self.tools, generation_prompt=True)
            more = self.template.render([*self.messages[:index], said_before(said)], self.tools)
        except TemplateError:
            return None
        header = given[len(given) - len(_common_start(given[::-1], other[::-1])) :]
        words = len(_common_start(own, more))
        at = own.rfind(header, 0, words) if header.strip() and more != own else -1
        return None if at < 0 else at + len(header)

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
            end = None if words is None else self.stops.first(text, words)
            if end is None and index < last:
                end = self.stops.first(text, len(own))
            return end, len(own)
        words, own_words = self.words_end(index, last), self.words_end(index, index)
        if words is None or own_words is None or words < start:
            return (None, len(text)) if self.is_marked else None
        own_start = self.until(index).marks[index][0][0] if self.is_marked else start
        body, own_body = text[start:words], own[own_start:own_words]
        # A template may give a last turn an empty block of reasoning; more must not be missing.
        dropped = _EMPTY_REASONING.sub("", own_body.removesuffix(body))
        reasons = [v for key, v in words_of(self.messages[index]).items() if key != "content"]
        if not own_body.endswith(body) or any(reason in dropped for reason in reasons):
            return None
        same = words + len(_common_start(text[words:], own[own_words:]))
        if closing is not None:  # of what both write, the last; else what comes next
            end = self.stops.last(text, words, same)
            if end is None:
                end = self.stops.first(text, self.stops.whole(text, words, same))
        else:
            end = self.stops.first(text, words)
        return end, same

    def _says_all(self, index: int, last: int, spans: Sequence[tuple[int, int]]) -> bool:
        """Whether all that the turn says is learned; False if it is so only as the last turn.

        Raises:
            TemplateError: it is not so then, either; or its content is cut once others follow.
        """
        text, turn = self.until(last).text, self.messages[index]
        covered = "\n".join(text[slice(*span)] for span in spans)
        missing = unsaid(covered, turn)
        if missing == "content" and text.startswith(self.given(index)):
            # What the model is given may open the answer, which then says it too.
            before, given = self.before(index), self.given(index)
            opens = given.startswith(before) and spans[0][0] <= len(given)
            if opens and content_of(turn) in text[len(before) : spans[-1][1]]:
                missing = unsaid(covered, {**turn, "content": ""})
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
