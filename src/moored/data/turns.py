"""What the turns of a chat may be: roles and their order, words, calls, and what is not learned.

Those that other trainers write (ShareGPT's, Alpaca's) become ours. Which column holds them is
`layouts.py`'s matter, how a template lays them out `chat.py`'s.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moored.data.layouts import (
    FLAGS,
    UNKNOWN_FLAGS,
    NotJsonError,
    from_json,
    kind_of,
    missing_problem,
    not_json,
    text_problem,
)

ROLES = ("system", "user", "assistant", "tool")
# ShareGPT's `from`, as our role.
SHAREGPT_ROLES: Mapping[str, str] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "assistant",
}
_MEANT = {**SHAREGPT_ROLES, "developer": "system"}  # by a role that is none of ours
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
        given = from_json(tools, list)
    except NotJsonError as error:
        return f"{name}: {error} of JSON schemas, or remove the column"
    if given is not None and not isinstance(given, list):
        return f"{name}: holds {kind_of(given)}: write a list of JSON schemas, or remove the column"
    schemas: list[dict[str, Any]] = []
    for number, tool in enumerate(given or ()):
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
        meant = _MEANT.get(str(role).lower()) or (near[0] if near else None)
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
        decoded = from_json(value, dict)
    except NotJsonError as error:
        raise _ProblemError(f"{place}: {error}") from error
    if not isinstance(decoded, dict):
        raise _ProblemError(f"{place}: holds {kind_of(decoded)}: write an object")
    return dict(decoded)


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


# ---------------------------------------------------------------- as other trainers have them


def is_sharegpt(turns: Any) -> bool:
    """Whether all turns have `from` and `value`, and none a role."""
    return (
        isinstance(turns, list)
        and bool(turns)
        and all(
            isinstance(turn, dict) and {"from", "value"} <= turn.keys() and "role" not in turn
            for turn in turns
        )
    )


def sharegpt_turns(turns: Sequence[dict[str, Any]], name: str) -> list[Any] | list[str]:
    """ShareGPT's turns with roles and content, in a list of objects; else problems, in words.

    Args:
        turns: for which `is_sharegpt` holds.
        name: of their column.
    """
    ours: list[Any] = []
    problems: list[str] = []
    for index, turn in enumerate(turns):
        place = f"{name}[{index}]"
        role = SHAREGPT_ROLES.get(str(turn["from"]).lower())
        if role is None:
            problems.append(
                f"{place}.from: {turn['from']!r} is unknown: use one of {', '.join(SHAREGPT_ROLES)}"
            )
            continue
        rest = {key: value for key, value in turn.items() if key not in ("from", "value")}
        if str(turn["from"]).lower() != "function_call":
            ours.append({"role": role, "content": turn["value"]} | rest)
            continue
        calls = _calls(turn["value"])
        if isinstance(calls, str):
            problems.append(f"{place}.value: {calls}")
        else:
            ours.append({"role": role, "tool_calls": calls} | rest)
    return problems or ours


def _calls(value: Any) -> list[dict[str, Any]] | str:
    """The calls of a `function_call` turn: one, or a list of them."""
    fix = 'write {"name": ..., "arguments": {...}}, or a list of such'
    try:
        wanted = list if str(value).lstrip().startswith("[") else dict
        given = from_json(value, wanted)
    except NotJsonError as error:
        return f"{error}: {fix}"
    calls = given if isinstance(given, list) else [given]
    for call in calls:
        if not isinstance(call, dict) or not {"name", "arguments"} <= call.keys():
            what = kind_of(call) if not isinstance(call, dict) else "an object without them"
            return f"a function_call has a name and arguments, this is {what}: {fix}"
    return [{"type": "function", "function": dict(call)} for call in calls]


def alpaca_history(history: Any) -> list[dict[str, Any]] | str:
    """The turns before Alpaca's instruction; else what is wrong with them, in words."""
    try:
        pairs = from_json(history or [], list)
    except NotJsonError as error:
        return str(error)
    fix = "write a list of [instruction, output] pairs"
    if not isinstance(pairs, list):
        return f"holds {kind_of(pairs)}: {fix}"
    turns: list[dict[str, Any]] = []
    for index, pair in enumerate(pairs):
        if not isinstance(pair, list) or len(pair) != 2:
            return f"entry {index} is {kind_of(pair)}: {fix}"
        roles = ("user", "assistant")
        turns += [{"role": r, "content": text} for r, text in zip(roles, pair, strict=True)]
    return turns


def alpaca_prompt(instruction: str, given: str) -> str:
    """Alpaca's instruction, and after an empty line what it is about, where there is that."""
    return f"{instruction}\n\n{given}" if given.strip() else instruction
