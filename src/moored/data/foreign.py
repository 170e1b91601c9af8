"""Turns and rows as other trainers have them, as ours: ShareGPT's and Alpaca's.

Which of them a row is, is `layouts.py`'s matter; that a turn is as it must be, `turns.py`'s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moored.data.nested import NotJsonError, from_json, kind_of

_ROLES: Mapping[str, str] = {
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
    found: list[Any] = []
    problems: list[str] = []
    for index, turn in enumerate(turns):
        place = f"{name}[{index}]"
        role = _ROLES.get(str(turn["from"]).lower())
        if role is None:
            problems.append(
                f"{place}.from: {turn['from']!r} is unknown: use one of {', '.join(_ROLES)}"
            )
            continue
        rest = {key: value for key, value in turn.items() if key not in ("from", "value")}
        if str(turn["from"]).lower() != "function_call":
            found.append({"role": role, "content": turn["value"]} | rest)
            continue
        calls = _calls(turn["value"])
        if isinstance(calls, str):
            problems.append(f"{place}.value: {calls}")
        else:
            found.append({"role": role, "tool_calls": calls} | rest)
    return problems or found


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
