"""The frontier plot of several seeds and its recommendation, and the curves of the budget."""

from __future__ import annotations

import io
import math

import pytest
from matplotlib.image import imread

from moored.evaluation.report import Report
from moored.evaluation.report.choosing import recommendations
from moored.evaluation.report.curves import panel
from moored.evaluation.report.figures import arm_numbers, frontier, styles, whiskers
from moored.evaluation.report.page import html
from moored.evaluation.report.picture import BETTER, FONT, HEAD, HEIGHT, WIDTH, frontier_png
from pagekit import check
from report_cases import arm, base, measured, report_of, three


def seeded() -> Report:
    arms = {}
    for seed in (0, 1, 2):
        arms[f"none-seed{seed}"] = measured("none", 1.05 + seed / 50, 60.0 + seed, 4.4, seed=seed)
        arms[f"tmkl-seed{seed}"] = measured("tmkl", 1.06 + seed / 50, 27.0 + seed, 4.3, seed=seed)
    return Report(base=base(), arms=arms)


def drawn(report: Report):
    choice = recommendations(report)[0]
    plot = frontier(report, width=960, height=470, font=14, choice=choice)
    assert plot is not None
    return plot


def test_seeds_are_one_mark_with_whiskers_and_faint_dots():
    plot = drawn(seeded())
    assert [mark.label.lines[0] for mark in plot.marks] == ["none", "tmkl"]
    for mark in plot.marks:
        assert len(mark.runs) == 3
        # x is the geometric mean of perplexities: the mean of pixels, since they are in nats; y is
        # linear here.
        assert mark.x == pytest.approx(sum(x for x, _ in mark.runs) / 3)
        assert mark.y == pytest.approx(sum(y for _, y in mark.runs) / 3)
        assert mark.across is not None
        assert mark.along is not None
        assert min(mark.across) < mark.x < max(mark.across)
        assert min(mark.along) < mark.y < max(mark.along)
        for end in (*mark.across, *(x for x, _ in mark.runs)):
            assert plot.frame.left <= end <= plot.frame.right
        for end in (*mark.along, *(y for _, y in mark.runs)):
            assert plot.frame.top <= end <= plot.frame.bottom
    assert "none (mean of 3 seeds): adaptation perplexity 1.070 [" in plot.marks[0].tip
    # The edge joins means, not the luckiest run.
    assert plot.base is not None
    assert set(plot.edge) == {(m.x, m.y) for m in (*plot.marks, plot.base)}


def test_one_run_has_whiskers_of_its_own_texts():
    plot = drawn(report_of(measured("tmkl", 1.05, 27.0, 4.25), arm("none", 1.05, 60.0, 4.4)))
    tmkl, none = plot.marks
    assert tmkl.runs == none.runs == []
    assert len(whiskers(tmkl, 3.0)) == 6  # a stroke and two caps in each direction
    assert whiskers(none, 3.0) == []
    assert (none.across, none.along) == (None, None)


def test_a_base_that_is_far_off_stands_beyond_a_break_of_the_axis():
    arms = [arm("none", 1.04, 30.0, 4.4), arm("tmkl", 1.06, 27.0, 4.25)]
    plot = drawn(report_of(*arms))
    assert plot.base is not None
    assert plot.broken is not None
    assert plot.frame.left < plot.base.x < plot.broken < min(mark.x for mark in plot.marks)
    assert plot.base.tip.endswith("not to scale")
    # A fiftieth of the perplexity stays a small part of the width.
    apart = plot.marks[0].x - plot.marks[1].x
    assert 0 < apart < 0.12 * (plot.frame.right - plot.frame.left)
    page = check(html(report_of(*arms)))
    assert "it stands left of the break" in page.words
    assert any(a.get("class") == "break" for tag, a in page.tags if tag == "line")
    frontier_png(report_of(*arms))


def test_a_base_that_is_near_stands_on_the_scale():
    plot = drawn(report_of(arm("none", 9.0, 30.0, 4.4), arm("tmkl", 11.0, 27.0, 4.25)))
    assert plot.base is not None
    assert plot.broken is None
    none, tmkl = plot.marks
    nats = math.log(11 / 9), math.log(13.5 / 11)
    apart = none.x - tmkl.x, tmkl.x - plot.base.x
    assert apart[0] / apart[1] == pytest.approx(nats[0] / nats[1])
    assert "break" not in html(report_of(arm("none", 9.0, 30.0, 4.4))).split("<svg")[2]


def test_recommended_setting_is_marked_in_page_and_picture():
    report = seeded()
    plot = drawn(report)
    assert [mark.is_recommended for mark in plot.marks] == [False, True]
    page = check(html(report))
    rings = [a for tag, a in page.tags if tag == "circle" and a.get("class") == "ring"]
    assert len(rings) == 2  # in the wide and in the narrow plot
    assert "Ring: tmkl-seed1 is recommended, the knee" in page.words
    big = frontier(report, width=WIDTH, height=HEIGHT, font=FONT, head=HEAD)
    assert big is not None
    mark = big.marks[1]
    picture = imread(io.BytesIO(frontier_png(report)))
    # The ring: half of its 1.15 font sizes (in points of 1/72 of 100 pixels) from the middle.
    radius = FONT * 1.15 / 2 * 100 / 72
    angle = math.radians(45)
    x, y = mark.x + radius * math.cos(angle), mark.y + radius * math.sin(angle)
    pixel = picture[round(y * 1.5), round(x * 1.5), :3]
    ring = [int(BETTER[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    assert pixel == pytest.approx(ring, abs=0.05)


def test_a_broken_seed_leaves_the_others_drawn_alone():
    report = seeded()
    arms = dict(report.arms)
    arms["tmkl-seed1"] = measured("tmkl", 1.08, 28.0, 4.3, seed=1, adaptation_ppl=math.nan)
    plot = drawn(Report(base=report.base, arms=arms))
    names = [mark.label.lines[0] for mark in plot.marks]
    assert names == ["none", "tmkl-seed0", "tmkl-seed2"]
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
    kinds = ("none", "kl", "tmkl", "asft", "eaft", "l2", "replay")
    looks = styles(report_of(*(arm(kind, 1.05, 27.0, 4.2) for kind in kinds)))
    assert len({(looks[kind].index, looks[kind].shape) for kind in kinds}) == len(kinds)
    page = check(html(report_of(*(arm(kind, 1.05, 27.0, 4.2) for kind in kinds))))
    for name in ("plain fine-tuning", "unmasked KL", "TMKL", "ASFT", "EAFT", "L2 penalty"):
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
    limits = [a for tag, a in page.tags if tag == "polyline" and a["class"] == "limit k2"]
    assert len(limits) == 1
    drift = {name.replace("retention_increase_pct", "drift_nats_per_token"): curve
             for name, curve in BUDGET.items()}  # fmt: skip
    assert "Budget: how far the probe drifted" in check(html(three(), {"tmkl": drift})).words


def test_limits_are_on_the_scale_and_not_counted_as_points():
    style = styles(three())["tmkl"]
    curve, limit = [(0, 9.0), (20, 4.0), (30, math.nan)], [(0, 50.0), (20, 50.0)]
    found = panel("t", "u", {"tmkl": (style, curve)}, limits={"tmkl": (style, limit)})
    assert found is not None
    assert found.num_not_finite == 1
    (line,) = found.limits
    first, last = line.pieces[0]
    assert first[1] == last[1]
    assert found.frame.top <= line.pieces[0][0][1] < min(y for _, y in found.lines[0].pieces[0])


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
