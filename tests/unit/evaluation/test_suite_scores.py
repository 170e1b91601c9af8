"""One figure for a suite of tasks: its intervals, and what report, page and card say of it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from moored.evaluation.report import Report, TaskScore, merge
from moored.evaluation.report.page import html
from moored.evaluation.report.suite_scores import suite_change, suite_mean, task_interval
from moored.evaluation.report.terminal import plain
from moored.export.card.facts import Figures
from moored.utils.errors import UserErrors
from report_cases import arm, base, strict_json

EVIL = "<script>|`*x"


def score(*values: float, chance: float = 0.25, metric: str = "acc") -> TaskScore:
    return TaskScore(metric=metric, chance=chance, scores=list(values))


def with_suite(before: dict[str, TaskScore], after: dict[str, TaskScore]) -> Report:
    """A report whose fields are what a run would write."""
    fields: list[dict[str, Any]] = []
    for scores in (before, after):
        mean = suite_mean(scores)
        assert mean is not None
        fields.append({"suite": scores, "suite_mean": mean.value})
        fields[-1]["suite_mean_interval"] = [mean.low, mean.high]
    change = suite_change(before, after)
    if change is not None:
        fields[1] |= {"suite_change": change.value}
        fields[1]["suite_change_interval"] = [change.low, change.high]
    return Report(
        base=replace(base(), **fields[0]),
        arms={"tmkl": arm("tmkl", 1.018, 26.8, 4.25, **fields[1])},
    )


BEFORE = {"arc": score(1, 0, 1, 1, 0, 1, 1, 1), "written": score(0, 1, 0, 1, 0, 0, chance=0.0)}
AFTER = {"arc": score(1, 0, 0, 1, 0, 0, 1, 0), "written": score(0, 1, 0, 0, 0, 0, chance=0.0)}


def test_guessing_is_0_and_all_right_is_1_whatever_the_number_of_choices():
    right = {"two": score(1, 1, 1, chance=0.5), "ten": score(1, 1, chance=0.1)}
    mean = suite_mean(right)
    assert mean is not None
    assert mean.value == 1
    guessed = {"two": score(1, 0, chance=0.5), "four": score(1, 0, 0, 0)}
    mean = suite_mean(guessed)
    assert mean is not None
    assert mean.value == pytest.approx(0)
    # What is below a guess is not cut off: it would lift the mean.
    assert task_interval(score(0, 0, 0, 0)).value == pytest.approx(-1 / 3)
    assert suite_mean({}) is None
    assert suite_change({}, right) is None


def test_intervals_hold_the_truth_as_often_as_they_say():
    """1,000 draws of three tasks, whose answers are kept, gained or lost with known chances."""
    rng = np.random.default_rng(0)
    chances = {"a": 0.25, "b": 0.5, "c": 0.0}
    kept, lost, gained = 0.6, 0.12, 0.05
    truth_before = np.mean([(kept + lost - c) / (1 - c) for c in chances.values()])
    truth_change = np.mean([(gained - lost) / (1 - c) for c in chances.values()])
    held = np.zeros(2)
    for _ in range(1000):
        before, after = {}, {}
        for name, chance in chances.items():
            kind = rng.choice(4, size=100, p=[kept, lost, gained, 1 - kept - lost - gained])
            before[name] = score(*np.isin(kind, [0, 1]).astype(float), chance=chance)
            after[name] = score(*np.isin(kind, [0, 2]).astype(float), chance=chance)
        mean, change = suite_mean(before), suite_change(before, after)
        assert mean is not None
        assert change is not None
        held += mean.low <= truth_before <= mean.high, change.low <= truth_change <= change.high
    # 0.95 with a standard error of 0.007: three of them, and as much for what is approximate.
    assert np.all(np.abs(held / 1000 - 0.95) < 0.035), held


def test_pairing_makes_a_change_surer_and_no_change_is_not_certain():
    rng = np.random.default_rng(1)
    same = score(*rng.integers(0, 2, 200).astype(float))
    change, mean = suite_change({"a": same}, {"a": same}), suite_mean({"a": same})
    assert change is not None
    assert mean is not None
    assert change.value == 0
    assert 0 < change.high < (mean.high - mean.value) / 4
    assert not change.is_clear


@pytest.mark.parametrize(
    "other", [score(1, 0), score(1, 0, 1, metric="acc_norm"), score(1, 0, 1, chance=0.5)]
)
def test_what_was_asked_otherwise_is_not_compared(other):
    assert suite_change({"a": score(1, 0, 1)}, {"a": other}) is None
    assert "General tasks" in html(with_suite({"a": score(1, 0, 1)}, {"a": other}))


def test_report_page_table_and_card_show_before_after_and_change():
    report = with_suite(BEFORE, AFTER)
    text = json.dumps(report.to_json(), allow_nan=False)
    assert Report.from_json(strict_json(text)) == report
    page = html(report)
    assert "General tasks" in page
    assert "mean above a guess" in page
    row = page[page.index('<th scope="row">arc</th>') :].split("</tr>")[0]
    assert ["75.0" in row, "37.5" in row, "25.0" in row, "−50.0 points" in row] == [True] * 4
    shown = plain(report, 80)
    assert "general" in shown
    assert max(map(len, shown.splitlines())) <= 80
    figures = Figures.of(report, "tmkl", {})
    assert figures.suite_tasks == ("arc", "written")
    assert figures.num_suite_questions == 14
    assert figures.suite_mean_before == pytest.approx((2 / 3 + 1 / 3) / 2)
    assert figures.suite_mean_after == pytest.approx((1 / 6 + 1 / 6) / 2)
    assert figures.suite_change == pytest.approx(-1 / 3)
    without = html(Report(base=base(), arms={"tmkl": arm("tmkl", 1.018, 26.8, 4.25)}))
    assert "General tasks" not in without


def test_reports_are_merged_with_their_suites_and_hostile_names_do_nothing():
    one = with_suite(BEFORE, AFTER)
    other = with_suite({EVIL: score(1, 0, metric=EVIL)}, {EVIL: score(0, 0, metric=EVIL)})
    joined = merge([one, replace(other, arms={"kl": other.arms["tmkl"]})])
    assert list(joined.base.suite) == ["arc", "written", EVIL]
    page = html(joined)
    assert "<script>" not in page
    assert page.count("mean above a guess") == 1


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("suite_mean_interval", [0.4, 0.1], "suite_mean_interval: .* is no interval"),
        ("suite_change_interval", [0.1], "suite_change_interval: .* is no interval"),
        ("suite", {"a": {"metric": "acc", "chance": 1, "scores": [1]}}, "chance: 1 is no score of"),
        ("suite", {"a": {"metric": "acc", "chance": 0, "scores": []}}, "scores: empty"),
        ("suite", {"a": {"metric": "acc", "chance": 0, "scores": [2]}}, "2 is no fraction"),
        ("suite", {"a": {"metric": "acc", "chance": 0}}, "scores: missing"),
    ],
)
def test_figures_that_cannot_be_are_refused(key, value, says):
    data = with_suite(BEFORE, AFTER).to_json()
    data["arms"]["tmkl"][key] = value
    with pytest.raises(UserErrors, match=says):
        Report.from_json(data)


def test_figures_that_are_not_finite_make_a_page():
    report = with_suite(BEFORE, AFTER)
    odd = replace(report.arms["tmkl"], suite_mean=math.nan, suite_change=math.inf)
    assert "General tasks" in html(replace(report, arms={"tmkl": odd}))
