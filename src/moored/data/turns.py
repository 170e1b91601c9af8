"""What the turns of a chat may be: roles and their order, words, calls, and what is not learned.

Which column holds them is `records.py`'s matter, how a template lays them out `chat.py`'s.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moored.data.columns import FLAGS, UNKNOWN_FLAGS
from moored.data.files import missing_problem, text_problem
from moored.data.foreign import is_sharegpt, sharegpt_turns
from moored.data.nested import NotJsonError, from_json, kind_of, not_json

ROLES = ("system", "user", "assistant", "tool")
ROLE_ALIASES: Mapping[str, str] = {
    "human": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "developer": "system",
}
_MARKS = frozenset((*FLAGS, *UNKNOWN_FLAGS))
_YES_NO = {0: False, 1: True}  # True, False, 0.0 and 1.0 are keys of it, too


@dataclass(frozen=True, slots=True, kw_only=True)
class Turns:
    """A chat that is as it must be.

    Attributes:
        messages: without the flags, and without keys that hold null.
        learned: of each message; None if every turn of the assistant is.
    """

    messages: tuple[dict[str, Any], ...]
    learned: tuple[bool, ...] | None = None


def read_turns(messages: Any, name: str) -> Turns | list[str]:
    """The turns of a column, or what is wrong with them, in words.

    Args:
        messages: what the column holds.
        name: of the column.
    """
    if isinstance(messages, str) and messages.lstrip().startswith("["):
        try:
            messages = from_json(messages, list)
        except NotJsonError as error:
            return [f"{name}: {error} of turns"]
    if not isinstance(messages, list):
        return [
            f'{name}: holds {kind_of(messages)}, not a list: write [{{"role": "user", '
            '"content": "..."}, ...]'
        ]
    if not messages:
        return [f"{name}: is empty: write at least a user and an assistant turn"]
    if is_sharegpt(messages):
        messages = sharegpt_turns(messages, name)
        if any(isinstance(turn, str) for turn in messages):
            return messages
    turns: list[dict[str, Any]] = []
    problems: list[str] = []
    for index, message in enumerate(messages):
        try:
            turns.append(_read_turn(message))
        except _ProblemError as error:
            problems.append(f"{name}[{index}]{error}")
    if not problems and (problem := _order_problem([turn["role"] for turn in turns])):
        problems.append(f"{name}{problem}")
    if problems:
        return problems
    learned = tuple(turn["role"] == "assistant" and _flag(turn) is not False for turn in turns)
    everything = all(learned[i] for i, turn in enumerate(turns) if turn["role"] == "assistant")
    return Turns(
        messages=tuple(
            {key: value for key, value in turn.items() if value is not None and key not in FLAGS}
            for turn in turns
        ),
        learned=None if everything else learned,
    )


def read_tools(tools: Any, name: str) -> list[dict[str, Any]] | str | None:
    """The schemas of a row's tools, None if it has none, or what is wrong with them, in words."""
    if isinstance(tools, str) and tools.strip() in ("", "null"):
        return None
    try:
        found = from_json(tools, list)
    except NotJsonError as error:
        return f"{name}: {error} of JSON schemas, or remove the column"
    if found is not None and not isinstance(found, list):
        return f"{name}: holds {kind_of(found)}: write a list of JSON schemas, or remove the column"
    schemas: list[dict[str, Any]] = []
    for number, tool in enumerate(found or ()):
        try:
            schema = _object(tool, "")
            for key in ("function", "parameters"):
                if isinstance(schema.get(key), str):
                    schema[key] = _object(schema[key], f".{key}")
            function = schema.get("function")
            if isinstance(function, dict) and isinstance(function.get("parameters"), str):
                parameters = _object(function["parameters"], ".function.parameters")
                schema["function"] = function | {"parameters": parameters}
            _require_json(schema)
        except _ProblemError as error:
            return f"{name}[{number}]{error}"
        schemas.append(schema)
    return schemas or None


class _ProblemError(Exception):
    """What is wrong with a turn or a tool: the place in it, and words."""


def _read_turn(message: Any) -> dict[str, Any]:
    """A turn with its JSON text decoded, flags included."""
    if _looks_like_object(message):
        message = _object(message, "")
    if not isinstance(message, dict):
        raise _ProblemError(
            f': holds {kind_of(message)}, not an object: write {{"role": ..., "content": ...}}'
        )
    if "role" not in message or "content" not in message:
        if {"from", "value"} <= message.keys():
            raise _ProblemError(": has from and value (ShareGPT): rename them to role and content")
        lacking = "role" if "role" not in message else "content"
        if lacking == "role" or not message.get("tool_calls"):
            fix = f"the key {lacking!r} in each turn"
            raise _ProblemError(": " + missing_problem(lacking, message, fix))
    role = message["role"]
    if role not in ROLES:
        near = difflib.get_close_matches(str(role), ROLES, 1)
        meant = ROLE_ALIASES.get(str(role).lower()) or (near[0] if near else None)
        hint = f"; did you mean {meant!r}?" if meant else f": use one of {', '.join(ROLES)}"
        raise _ProblemError(f".role: {role!r} is unknown{hint}")
    if problem := _flag_problem(message):
        raise _ProblemError(problem)
    turn = dict(message)
    if turn.get("tool_calls") is not None:
        turn["tool_calls"] = _read_calls(turn["tool_calls"], role)
    words = turn.get("content")
    if words or not turn.get("tool_calls"):  # a call needs no words
        if isinstance(words, list):
            raise _ProblemError(
                ".content: holds a list (of parts), not text: join the parts to one string"
            )
        if problem := text_problem(words, "content"):
            raise _ProblemError(f".{problem}")
    if rest := {key: turn[key] for key in turn if key not in ("role", "content")}:
        _require_json(rest)
    return turn


def _read_calls(given: Any, role: str) -> list[dict[str, Any]] | None:
    """The calls of a turn, with their arguments as objects."""
    if isinstance(given, str) and given.strip() in ("", "null"):
        return None
    try:
        given = from_json(given, list)
    except NotJsonError as error:
        raise _ProblemError(f".tool_calls: {error} of calls") from error
    if role != "assistant" or not isinstance(given, list):
        raise _ProblemError(".tool_calls: must be a list, in an assistant turn: move or remove it")
    return [_read_call(call, f".tool_calls[{number}]") for number, call in enumerate(given)]


def _read_call(given: Any, place: str) -> dict[str, Any]:
    call = _object(given, place) if _looks_like_object(given) else given
    function: Any = None
    if isinstance(call, dict):
        function = call.get("function") or call
        if _looks_like_object(function):
            function = _object(function, f"{place}.function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise _ProblemError(
            f'{place}: names no function: write {{"function": {{"name": ..., "arguments": ...}}}}'
        )
    if "arguments" in function:
        arguments = function["arguments"]
        # OpenAI's API has empty text where a function takes nothing.
        none = isinstance(arguments, str) and not arguments.strip()
        arguments = {} if none else _object(arguments, f"{place}.arguments")
        function = function | {"arguments": arguments}
    return call | {"function": function} if call.get("function") else function


def _looks_like_object(value: Any) -> bool:
    return isinstance(value, str) and value.lstrip().startswith("{")


def _object(value: Any, place: str) -> dict[str, Any]:
    """An object, if need be out of JSON text."""
    try:
        found = from_json(value, dict)
    except NotJsonError as error:
        raise _ProblemError(f"{place}: {error}") from error
    if not isinstance(found, dict):
        raise _ProblemError(f"{place}: holds {kind_of(found)}: write an object")
    return dict(found)


def _require_json(value: dict[str, Any]) -> None:
    """All that a template is given is JSON, and text that can be encoded."""
    if problem := not_json(value):
        place, _, words = problem.partition(": ")
        raise _ProblemError(f"{place if len(place) < 100 else f'{place[:90]}...'}: {words}")
    if problem := text_problem(json.dumps(value, ensure_ascii=False), "keys"):
        raise _ProblemError(f".{problem}")


def _flag(turn: Mapping[str, Any]) -> bool | None:
    """Whether a turn that has no problem is to be learned; None where it does not say."""
    given = [_YES_NO[turn[name]] for name in FLAGS if turn.get(name) is not None]
    return given[0] if given else None


def _flag_problem(turn: Mapping[str, Any]) -> str | None:
    if _MARKS.isdisjoint(turn):
        return None
    for name in UNKNOWN_FLAGS:
        if turn.get(name) is not None:
            return (
                f".{name}: is not read: mark a whole turn, as {FLAGS[0]}: true or false, or "
                f"remove {name}"
            )
    given: dict[str, bool] = {}
    for name in FLAGS:
        value = turn.get(name)
        if value is None:
            continue
        if not isinstance(value, int | float) or value not in _YES_NO:
            return (
                f".{name}: holds {kind_of(value)}: a turn is learned (true or 1) or not (false or "
                "0): write one of them, or remove it"
            )
        given[name] = _YES_NO[value]
    if len(set(given.values())) > 1:
        shown = " and ".join(f"{name}={str(turn[name]).lower()}" for name in given)
        return f": {shown} contradict each other: keep one"
    if True in given.values() and turn["role"] != "assistant":
        name = next(iter(given))
        return (
            f".{name}: asks to learn a turn of role {turn['role']!r}, and only the assistant's "
            "are learned: write false, or remove it"
        )
    return None


def _order_problem(roles: list[str]) -> str | None:
    """System first if at all, then user and assistant in turn, tools after an assistant."""
    last = len(roles) - 1
    for index, role in enumerate(roles):
        before = roles[index - 1] if index else None
        allowed = {
            None: ("system", "user"),
            "system": ("user",),
            "user": ("assistant",),
            "assistant": ("user", "tool"),
            "tool": ("tool", "assistant"),
        }[before]
        if role not in allowed:
            after = f"after {before}" if before else "first"
            return (
                f"[{index}].role: {role!r} comes {after}, where {' or '.join(allowed)} is "
                "expected: merge or reorder the turns"
            )
    if roles[last] != "assistant":
        return f"[{last}].role: the last turn is {roles[last]!r}: end with the assistant's answer"
    return None
