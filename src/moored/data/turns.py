"""What the turns of a chat may be: roles and their order, words, calls, and what is not learned.

Which column holds them is `records.py`'s matter, how a template lays them out `chat.py`'s.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moored.data.files import missing_problem, text_problem
from moored.data.formats import kind_of

ROLES = ("system", "user", "assistant", "tool")
ROLE_ALIASES: Mapping[str, str] = {
    "human": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "developer": "system",
}
# What the field calls "learn this turn, or do not": OpenAI (weight), axolotl (train, training),
# LLaMA-Factory, ms-swift and slime (loss, loss_mask).
FLAGS = ("loss", "loss_mask", "train", "training", "trainable", "weight")
# Likewise about learning, but of a part of a turn, by a fraction, or the other way round.
UNKNOWN_FLAGS = (
    "ignore_loss",
    "loss_scale",
    "loss_weight",
    "mask",
    "masked",
    "no_loss",
    "train_detail",
    "training_detail",
    "train_on_turn",
)
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
    if not isinstance(messages, list):
        return [
            f'{name}: holds {kind_of(messages)}, not a list: write [{{"role": "user", '
            '"content": "..."}, ...]'
        ]
    if not messages:
        return [f"{name}: is empty: write at least a user and an assistant turn"]
    problems = [
        f"{name}[{index}]{problem}"
        for index, message in enumerate(messages)
        if (problem := _turn_problem(message))
    ]
    if not problems and (problem := _order_problem([m["role"] for m in messages])):
        problems.append(f"{name}{problem}")
    if problems:
        return problems
    turns = tuple(
        {key: value for key, value in turn.items() if value is not None and key not in FLAGS}
        for turn in messages
    )
    learned = tuple(turn["role"] == "assistant" and _flag(turn) is not False for turn in messages)
    everything = all(learned[i] for i, turn in enumerate(turns) if turn["role"] == "assistant")
    return Turns(messages=turns, learned=None if everything else learned)


def _turn_problem(message: Any) -> str | None:
    if not isinstance(message, dict):
        return f': holds {kind_of(message)}, not an object: write {{"role": ..., "content": ...}}'
    if "role" not in message or "content" not in message:
        if {"from", "value"} <= message.keys():
            return ": has from and value (ShareGPT): rename them to role and content"
        lacking = "role" if "role" not in message else "content"
        if lacking == "role" or not message.get("tool_calls"):
            return ": " + missing_problem(lacking, message, f"the key {lacking!r} in each turn")
    role = message["role"]
    if role not in ROLES:
        near = difflib.get_close_matches(str(role), ROLES, 1)
        meant = ROLE_ALIASES.get(str(role).lower()) or (near[0] if near else None)
        hint = f"; did you mean {meant!r}?" if meant else f": use one of {', '.join(ROLES)}"
        return f".role: {role!r} is unknown{hint}"
    if problem := _flag_problem(message):
        return problem
    if message.get("tool_calls") is not None:
        if role != "assistant" or not isinstance(message["tool_calls"], list):
            return ".tool_calls: must be a list, in an assistant turn: move or remove it"
        for number, call in enumerate(message["tool_calls"]):
            inner = (call.get("function") or call) if isinstance(call, dict) else None
            if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
                return (
                    f".tool_calls[{number}]: names no function: write "
                    '{"function": {"name": ..., "arguments": ...}}'
                )
        if message["tool_calls"] and not message.get("content"):
            return _deep_problem(message)  # a call needs no words
    if isinstance(message["content"], list):
        return ".content: holds a list (of parts), not text: join the parts to one string"
    if problem := text_problem(message["content"], "content"):
        return f".{problem}"
    return _deep_problem(message)


def _flag(turn: Mapping[str, Any]) -> bool | None:
    """Whether a turn that has no problem is to be learned; None where it does not say."""
    given = [_YES_NO[turn[name]] for name in FLAGS if turn.get(name) is not None]
    return given[0] if given else None


def _flag_problem(turn: Mapping[str, Any]) -> str | None:
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


def _deep_problem(message: dict[str, Any]) -> str | None:
    """Other keys reach the chat template too."""
    rest = {key: value for key, value in message.items() if key != "content"}
    try:
        problem = text_problem(json.dumps(rest, ensure_ascii=False), "keys")
    except (TypeError, ValueError):
        return ": holds values that are not JSON: remove them"
    return f".{problem}" if problem else None


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
