"""Instructions without a judge: what meets each constraint, and what nearly does."""

from __future__ import annotations

import re

import pytest

from moored.evaluation.instructions import TASKS, checks

# (constraint, answers that meet it, answers that do not); white space at the ends never matters.
CASES = [
    (checks.lowercase(), ["all small.", " 3 frogs\n"], ["All small.", "3 4", "small é É"]),
    (checks.uppercase(), ["KEEP OUT", "ÉTÉ 3!"], ["KEEP out", "123"]),
    (checks.without(","), ["salt and pepper"], ["salt, pepper"]),
    (checks.no_digits(), ["forty-two"], ["42", "a ２ b"]),
    (checks.capital_words(2), ["WET paint: DON'T touch"], ["WET paint", "A B C", "W3T P4INT"]),
    (checks.contains("sea", 2), ["The sea. Sea!"], ["The sea and the season", "sea"]),
    (checks.contains("full moon"), ["a Full Moon."], ["full moons", "full, moon"]),
    (checks.contains_exactly("green", 1), ["Green grass"], ["green, green", "greenish"]),
    (checks.avoids("the", "ice"), ["then nice"], ["ask The cat", "ice."]),
    (checks.words_at_least(3), ["one two three"], ["one two", "one-two-three"]),
    (checks.words_at_most(2), ["one two"], ["one two three"]),
    (checks.one_of("Yes.", "No."), ["Yes.", "No.\n"], ["yes.", "Yes", "Yes. It is."]),
    (checks.begins_with("Well,"), ["Well, yes"], ["well, yes", "So: Well,"]),
    (checks.ends_with("Enjoy!"), ["So. Enjoy!\n"], ["Enjoy! Bye", "enjoy!"]),
    (checks.quoted(), ['"a motto"'], ["a motto", '"a" motto', '"', '""', "“a motto”"]),
    (
        checks.bullets(2),
        ["Here:\n* a\n* b", "- a\n  - b"],
        ["* a", "* a\n* b\n* c", "*a*\n**b**", "1. a\n2. b"],
    ),
    (checks.bullets(0), ["a - b"], ["- a"]),
    (checks.only_bullets(), ["* a\n\n* b"], ["Here:\n* a\n* b"]),
    (
        checks.numbered(2),
        ["1. a\n2. b", "Steps:\n 1. a 3\n 2. b"],
        ["1. a", "1. a\n3. b", "1) a\n2) b", "1. a\n2. b\n3. c"],
    ),
    (checks.lines(2), ["a\n\nb"], ["a", "a\nb\nc"]),
    (checks.paragraphs(2), ["a\nb\n\nc", "a\n \n\nb"], ["a\nb", "a\n\nb\n\nc"]),
    (
        checks.sections(2),
        ["a\n***\nb", "a\n\n *** \n\nb"],
        ["a *** b", "a\n***", "***\na\n***\nb", "a\n****\nb"],
    ),
    (checks.heading(), ["# Title\ntext", "## T\n"], ["Title\n# T", "#Title", "#"]),
    (checks.bold(2), ["**a b** and **c**"], ["**a** *b*", "**a\nb** **c**"]),
    (checks.placeholders(2), ["[name], [day]"], ["[name]", "[] []", "(name) [a]"]),
    (
        checks.table(2),
        ["| a | b |\n|---|:-:|\n| c | d |", "a|b\n-|-\nc|d"],
        ["| a | b |\n| c | d |", "|a|b|\n|-|-|", "|a|b|c|\n|-|-|-|\n|d|e|f|", "|a|b|\n|-|-|\n|c|"],
    ),
    (
        checks.json_object("a", "b"),
        ['{"a": 1, "b": [2]}', '```json\n{"b": 1, "a": 2}\n```'],
        ['{"a": 1}', '{"a": 1, "b": 2, "c": 3}', 'Here: {"a": 1, "b": 2}', "{'a': 1, 'b': 2}", "["],
    ),
    (checks.json_list(2), ['["a", "b"]'], ['["a"]', "[1, 2]", '{"a": "b"}', "a, b"]),
]


@pytest.mark.parametrize(
    ("check", "good", "bad"), CASES, ids=lambda value: getattr(value, "kind", "")
)
def test_what_meets_a_constraint_and_what_does_not(check, good, bad):
    assert [check.met_by(answer) for answer in good] == [True] * len(good)
    assert [check.met_by(answer) for answer in bad] == [False] * len(bad)
    assert not check.met_by("")
    assert not check.met_by(" \n ")


def test_every_kind_of_constraint_is_tested_and_asked_for():
    kinds = {case[0].kind for case in CASES}
    made = {
        name
        for name, value in vars(checks).items()
        if callable(value) and getattr(value, "__module__", "") == checks.__name__
        if not name.startswith("_") and name != "Check"
    }
    assert kinds == made
    assert {check.kind for task in TASKS.values() for check in task.checks} == kinds


def test_the_prompts_are_many_short_and_different():
    assert 40 <= len(TASKS) <= 60
    prompts = [task.prompt for task in TASKS.values()]
    assert len(set(prompts)) == len(prompts)
    assert all(task.checks and len(task.prompt) < 300 for task in TASKS.values())
    assert all(re.fullmatch(r"[a-z-]+", name) for name in TASKS)


# What a careful person would answer: the constraints of a prompt can be met together.
ANSWERS = {
    "rain-email": "no picnic today, it rains. see you at the office!",
    "slogan": "WE KEEP YOU ROLLING",
    "week": "A week has seven days and one hundred and sixty-eight hours.",
    "five-bullets": "- flour\n- water\n- salt\n- yeast\n- time",
    "two-bullets": "- Tea is mild.\n- Coffee is strong.",
    "three-steps": "1. Pack it.\n2. Write the address on it.\n3. Take it to the post office.",
    "river": " ".join(["It runs down to the sea."] * 9),
    "between": " ".join(["I like autumn most of all."] * 5),
    "copper-wind": "A copper bell rang in the wind, seven times.",
    "short-answer": "In short: it shows where north is.",
    "frame": "Well, try to fold paper cranes. Enjoy!",
    "quoted-lower": '"better late than never"',
    "pro-contra": "People like it.\n***\nStaff need rest.",
    "three-lines": "Fog\non the hill\nat noon",
    "four-lines": "Nile\nRhine\nVolga\nAmazon",
}


def test_constraints_of_one_prompt_can_be_met_together():
    several = {name for name, task in TASKS.items() if len(task.checks) > 1}
    assert set(ANSWERS) == several
    for name, answer in ANSWERS.items():
        assert all(check.met_by(answer) for check in TASKS[name].checks), name
