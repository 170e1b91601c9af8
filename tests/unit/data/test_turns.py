"""The turns of a chat: which are learned, what their calls hold, what is refused and how."""

from __future__ import annotations

from typing import Any

import pytest

from datakit import jsonl, records, turn
from moored.data.turns import FLAGS, UNKNOWN_FLAGS
from moored.utils.errors import UserErrors

U, A = turn("user", "q"), turn("assistant", "a")
SYSTEM = turn("system", "s")


def problem(tmp_path, row: dict[str, Any]) -> str:
    """The one line about a row."""
    with pytest.raises(UserErrors) as caught:
        records(jsonl(tmp_path / "a.jsonl", [row]))
    (line,) = caught.value.problems
    assert "\n" not in line
    return line


@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize(
    ("first", "second", "learned"),
    [
        (False, True, (False, False, True)),
        (0, None, (False, False, True)),
        (0.0, 1.0, (False, False, True)),
        (1, False, (True, False, False)),
        (False, 0, (False, False, False)),
        (True, 1, None),
        (None, None, None),
    ],
)
def test_a_turn_that_is_marked_is_not_learned_and_the_mark_is_gone(
    tmp_path, flag, first, second, learned
):
    row = {"messages": [SYSTEM, U, A | {flag: first}, U, A | {flag: second}]}
    (record,) = records(jsonl(tmp_path / "a.jsonl", [row]))
    expected = None if learned is None else (False, False, learned[0], False, learned[2])
    assert record.learned == expected
    assert record.messages == (SYSTEM, U, A, U, A)


def test_what_is_no_answer_may_be_marked_as_not_learned(tmp_path):
    row = {"messages": [SYSTEM | {"loss": False}, U | {"weight": 0}, A]}
    (record,) = records(jsonl(tmp_path / "a.jsonl", [row]))
    assert (record.messages, record.learned) == ((SYSTEM, U, A), None)


@pytest.mark.parametrize("value", [0.5, 2, -1, "no", "true", "", [0, 1], {"a": 1}])
@pytest.mark.parametrize("flag", FLAGS)
def test_a_mark_says_yes_or_no(tmp_path, flag, value):
    line = problem(tmp_path, {"messages": [U, A | {flag: value}]})
    assert f"a.jsonl:1: messages[1].{flag}: holds " in line
    assert "write one of them, or remove it" in line


@pytest.mark.parametrize("flag", UNKNOWN_FLAGS)
def test_marks_that_are_not_understood_are_refused(tmp_path, flag):
    line = problem(tmp_path, {"messages": [U, A | {flag: [{"begin_offset": 0, "train": False}]}]})
    assert f"messages[1].{flag}: is not read: mark a whole turn" in line
    (record,) = records(jsonl(tmp_path / "b.jsonl", [{"messages": [U, A | {flag: None}]}]))
    assert record.messages == (U, A)


def test_marks_that_contradict_each_other_are_refused(tmp_path):
    line = problem(tmp_path, {"messages": [U, A | {"loss": False, "weight": 1}]})
    assert "messages[1]: loss=false and weight=1 contradict each other: keep one" in line
    row = {"messages": [U, A | {"loss": False, "weight": 0, "train": None}]}
    (record,) = records(jsonl(tmp_path / "b.jsonl", [row]))
    assert record.learned == (False, False)


@pytest.mark.parametrize("role", ["user", "system"])
def test_only_answers_can_be_learned(tmp_path, role):
    chat = [SYSTEM, U, A]
    index = 0 if role == "system" else 1
    chat[index] = chat[index] | {"training": True}
    line = problem(tmp_path, {"messages": chat})
    assert f"messages[{index}].training: asks to learn a turn of role '{role}'" in line
    assert "write false, or remove it" in line
