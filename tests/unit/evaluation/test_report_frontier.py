"""The frontier plot of several seeds and its recommendation, and the curves of the budget."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
from matplotlib.image import imread

from moored.evaluation.report import Report
from moored.evaluation.report.comparing import recommendations
from moored.evaluation.report.drawing import GOOD, Drawing, panel, styles
from moored.evaluation.report.frontier import (
    FONT,
    HEAD,
    HEIGHT,
    WIDTH,
    arm_numbers,
    frontier,
    frontier_png,
)
from moored.evaluation.report.page import html
from pagekit import check
from report_cases import arm, base, measured, points_of, report_of, spots, three


def seeded() -> Report:
    arms = {}
    for seed in (0, 1, 2):
        arms[f"none-seed{seed}"] = measured("none", 1.05 + seed / 50, 60.0 + seed, 4.4, seed=seed)
        arms[f"tmkl-seed{seed}"] = measured("tmkl", 1.06 + seed / 50, 27.0 + seed, 4.3, seed=seed)
    return Report(base=base(), arms=arms)


def drawn(report: Report) -> Drawing:
    choice = recommendations(report)[0]
    plot = frontier(report, width=960, height=470, font=14, choice=choice)
    assert plot is not None
    return plot


def tips(plot: Drawing) -> list[str]:
    """The tooltips, each once."""
    gids = dict.fromkeys(str(line.get_gid()) for line in plot.axes.lines)
    return [gid.removeprefix("tip:") for gid in gids if gid.startswith("tip:")]


def labels(plot: Drawing) -> set[str]:
    """The names beside the marks."""
    bold = [text for text in plot.axes.texts if text.get_fontweight() == "bold"]
    return {text.get_text() for text in bold} - {"base", "better"}


def whiskers(plot: Drawing, marker: str) -> list[np.ndarray]:
    """The ends of the intervals along (_) or across (|)."""
    return [points_of(line) for line in plot.axes.lines if line.get_marker() == marker]


def test_seeds_are_one_mark_with_whiskers_and_faint_dots():
    plot = drawn(seeded())
    assert labels(plot) == {"none", "tmkl"}
    faint = [points_of(line) for line in plot.axes.lines if line.get_alpha() == 0.4]
    places = [spots(plot)[name] for name in ("none", "tmkl")]
    low, high = plot.axes.get_ylim()
    left, right = plot.axes.get_xlim()
    for place, runs, along, across in zip(
        places, faint, whiskers(plot, "_"), whiskers(plot, "|"), strict=True
    ):
        # x is the geometric mean of perplexities: the mean of nats; y is linear here.
        assert len(runs) == 3
        assert place == pytest.approx(runs.mean(0))
        assert along[0][1] < place[1] < along[1][1]
        assert across[0][0] < place[0] < across[1][0]
        for x, y in (*runs, *along, *across):
            assert left <= x <= right
            assert low <= y <= high
    assert "none (mean of 3 seeds): adaptation perplexity 1.070 [" in tips(plot)[0]
    # The edge joins means, not the luckiest run.
    (edge,) = (points_of(line) for line in plot.axes.lines if line.is_dashed())
    assert {(x, y) for x, y in edge} == set(spots(plot).values())


def test_one_run_has_whiskers_of_its_own_texts():
    plot = drawn(report_of(measured("tmkl", 1.05, 27.0, 4.25), arm("none", 1.05, 60.0, 4.4)))
    assert not [line for line in plot.axes.lines if line.get_alpha() == 0.4]
    (along,), (across,) = whiskers(plot, "_"), whiskers(plot, "|")
    x, y = spots(plot)["tmkl0"]
    assert (along[0][0], across[0][1]) == (x, y)


def test_a_base_that_is_far_off_stands_beyond_a_break_of_the_axis():
    arms = [arm("none", 1.04, 30.0, 4.4), arm("tmkl", 1.06, 27.0, 4.25)]
    plot = drawn(report_of(*arms))
    at, (left, right) = spots(plot), plot.axes.get_xlim()
    broken = [
        points_of(line)[0][0] for line in plot.axes.lines if not isinstance(line.get_marker(), str)
    ]
    assert len(broken) == 2  # strokes
    assert left < at["base"][0] < min(broken) < max(broken) < at["tmkl1"][0]
    assert tips(plot)[-1].endswith("not to scale")
    # A fiftieth of the perplexity stays a small part of the width.
    assert 0 < at["none0"][0] - at["tmkl1"][0] < 0.12 * (right - left)
    page = check(html(report_of(*arms)))
    assert "it stands left of the break" in page.words
    frontier_png(report_of(*arms))


def test_a_base_that_is_near_stands_on_the_scale():
    report = report_of(arm("none", 9.0, 30.0, 4.4), arm("tmkl", 11.0, 27.0, 4.25))
    plot = drawn(report)
    at = spots(plot)
    assert plot.notes == []
    nats = math.log(11 / 9), math.log(13.5 / 11)
    apart = at["none0"][0] - at["tmkl1"][0], at["tmkl1"][0] - at["base"][0]
    assert apart[0] / apart[1] == pytest.approx(nats[0] / nats[1])
    assert "left of the break" not in html(report)


def test_recommended_setting_is_marked_in_page_and_picture():
    report = seeded()
    plot = drawn(report)
    (ring,) = (line for line in plot.axes.lines if line.get_fillstyle() == "none")
    assert tuple(points_of(ring)[0]) == spots(plot)["tmkl"]
    page = check(html(report))
    assert "Ring: tmkl-seed1 is recommended, the knee" in page.words
    big = frontier(report, width=WIDTH, height=HEIGHT, font=FONT, head=HEAD)
    assert big is not None
    x, y = big.axes.transData.transform(spots(big)["tmkl"])
    picture = imread(io.BytesIO(frontier_png(report)))
    x, y = (part + 0.85 * FONT * math.sqrt(0.5) for part in (x, HEIGHT - y))
    pixel = picture[round(y * 1.5), round(x * 1.5), :3]
    green = [int(GOOD[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    assert pixel == pytest.approx(green, abs=0.05)


def test_a_broken_seed_leaves_the_others_drawn_alone():
    report = seeded()
    arms = dict(report.arms)
    arms["tmkl-seed1"] = measured("tmkl", 1.08, 28.0, 4.3, seed=1, adaptation_ppl=math.nan)
    plot = drawn(Report(base=report.base, arms=arms))
    assert labels(plot) == {"none", "tmkl-seed0", "tmkl-seed2"}
    check(html(Report(base=report.base, arms=arms)))


def test_seeds_of_a_setting_share_a_number():
    arms = {}
    for weight in range(10):
        for seed in (0, 1):
            name = f"tmkl-weight{weight}-seed{seed}"
            arms[name] = arm("tmkl", 1.05 + weight / 50, 27.0, 4.2, weight=float(weight), seed=seed)
    report = Report(base=base(), arms=arms)
    numbers = arm_numbers(report)
    assert list(numbers) == list(arms)
    assert [numbers[f"tmkl-weight{w}-seed{s}"] for w in (0, 9) for s in (0, 1)] == [
        "1",
        "1",
        "10",
        "10",
    ]
    check(html(report))
    frontier_png(report)


def test_every_built_in_kind_looks_different():
    kinds = ("none", "kl", "tmkl", "asft", "eaft", "stm", "mol", "l2", "replay")
    looks = styles(report_of(*(arm(kind, 1.05, 27.0, 4.2) for kind in kinds)))
    for what in ("colour", "marker", "dash"):
        assert len({getattr(looks[kind], what) for kind in kinds}) == len(kinds)
    page = check(html(report_of(*(arm(kind, 1.05, 27.0, 4.2) for kind in kinds))))
    for name in (
        "plain fine-tuning",
        "unmasked KL",
        "TMKL",
        "ASFT",
        "EAFT",
        "STM",
        "MoL",
        "L2 penalty",
    ):
        assert name in page.words


BUDGET = {
    "budget/retention_increase_pct": [(0, 9.0), (10, 6.0), (20, 4.0)],
    "budget/limit_retention_increase_pct": [(0, 50.0), (10, 50.0), (20, 50.0)],
    "budget/weight": [(0, 0.1), (10, 0.4), (20, 0.3)],
}


def test_budget_is_a_curve_with_its_limit():
    page = check(html(three(), {"tmkl": BUDGET, "none": {}}))
    assert "Budget: what the probe lost" in page.words
    assert "percent of perplexity, by step; dashed: at most" in page.words
    assert "tmkl: at most 50.0000" in page.words
    assert "Weight of the regulariser" in page.words
    assert "how far the probe drifted" not in page.words
    drift = {name.replace("retention_increase_pct", "drift_nats_per_token"): curve
             for name, curve in BUDGET.items()}  # fmt: skip
    assert "Budget: how far the probe drifted" in check(html(three(), {"tmkl": drift})).words


def test_limits_are_on_the_scale_and_not_counted_as_points():
    curve, limit = [(0, 9.0), (20, 4.0), (30, math.nan)], [(0, 50.0), (20, 50.0)]
    found = panel(three(), "t", "u", {"tmkl": curve}, {"tmkl": limit})
    assert found is not None
    assert "1 points not finite, left out" in found.notes
    line, most = (line for line in found.axes.lines if line.get_gid())
    assert most.is_dashed()
    assert [y for _, y in points_of(most)] == [50.0, 50.0]
    assert max(y for _, y in points_of(line)[:2]) < 50.0 <= found.axes.get_ylim()[1]


def test_terms_that_are_no_divergence_have_panels_of_their_own():
    report = report_of(arm("replay", 1.05, 27.0, 4.2), arm("l2", 1.05, 27.0, 4.2))
    curve = [(1, 1.0), (2, 0.5)]
    page = check(
        html(
            report,
            {
                "replay0": {"train/replay_nats_per_token": curve},
                "l21": {"train/l2_squared_norm": curve},
            },
        )
    )
    assert "Replayed text" in page.words
    assert "L2 penalty squared norm, by step" in page.words
    assert "Divergence from the base" not in page.words
