"""The conversations of the table: turns, a system text, calls of tools, reasoning.

How a family writes them is in the files beside.
"""

from __future__ import annotations

from typing import Any

Talk = tuple[list[dict[str, Any]], list[dict[str, Any]] | None]

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "How the weather is in a city.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}},
                "required": ["city"],
            },
        },
    }
]


def _user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def _says(text: str, *called: dict[str, Any], because: str | None = None) -> dict[str, Any]:
    turn: dict[str, Any] = {"role": "assistant", "content": text}
    if called:
        turn["tool_calls"] = list(called)
    if because:
        turn["reasoning_content"] = because
    return turn


def _call(city: str, number: int) -> dict[str, Any]:
    function = {"name": "weather", "arguments": {"city": city}}
    return {"id": f"call{number:05}", "type": "function", "function": function}


def _result(text: str, number: int) -> dict[str, Any]:
    return {
        "role": "tool",
        "name": "weather",
        "tool_call_id": f"call{number:05}",
        "content": text,
    }


_SYSTEM = {"role": "system", "content": "Be brief."}
_ASK = _user("How is it in Rome?")
TALKS: dict[str, Talk] = {
    "one": ([_user("2+2?"), _says("4")], None),
    "three": (
        [
            _user("2+2?"),
            _says("4"),
            _user("And 3+3?"),
            _says("6,\nof course"),
            _user("Thanks"),
            _says("At your service"),
        ],
        None,
    ),
    "edges": ([_user(" 2+2? "), _says(" four "), _user("so?\n"), _says("done\n")], None),
    "same_words": ([_user("ping"), _says("ping"), _user("ping"), _says("ping")], None),
    "system": ([_SYSTEM, _user("2+2?"), _says("4"), _user("And 3+3?"), _says("6")], None),
    "call": (
        [_ASK, _says("", _call("Rome", 1)), _result("sunny", 1), _says("It is sunny.")],
        TOOLS,
    ),
    "call_with_words": (
        [_ASK, _says("I look.", _call("Rome", 1)), _result("sunny", 1), _says("It is sunny.")],
        TOOLS,
    ),
    "call_last": ([_ASK, _says("", _call("Rome", 1))], TOOLS),
    "parallel": (
        [
            _user("Rome or Oslo?"),
            _says("", _call("Rome", 1), _call("Oslo", 2)),
            _result("sunny", 1),
            _result("snow", 2),
            _says("Rome."),
        ],
        TOOLS,
    ),
    "steps": (
        [
            _SYSTEM,
            _user("Rome, then Oslo?"),
            _says("", _call("Rome", 1)),
            _result("sunny", 1),
            _says("", _call("Oslo", 2)),
            _result("snow", 2),
            _says("Sun, then snow."),
            _user("Thanks"),
            _says("Any time."),
        ],
        TOOLS,
    ),
    "tools_unused": ([_user("2+2?"), _says("4"), _user("And 3+3?"), _says("6")], TOOLS),
    "reasoning": ([_user("2+2?"), _says("4", because="Two and two.")], None),
    "reasoning_three": (
        [
            _user("2+2?"),
            _says("4", because="Two and two."),
            _user("And 3+3?"),
            _says("6", because="Three and three."),
            _user("Thanks"),
            _says("At your service", because="Polite."),
        ],
        None,
    ),
    "reasoning_steps": (
        [
            _ASK,
            _says("", _call("Rome", 1), because="I have to look."),
            _result("sunny", 1),
            _says("It is sunny.", because="So it says."),
            _user("Thanks"),
            _says("Any time.", because="Polite."),
        ],
        TOOLS,
    ),
}
