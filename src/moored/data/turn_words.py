"""What the turns of a chat say: is it in a text, and what if they said more.

Where a template puts it is `chat_layout.py`'s matter.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from moored.data.layouts import REASONING_KEYS
from moored.data.template import Message

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
