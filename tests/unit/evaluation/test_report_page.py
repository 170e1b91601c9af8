"""The page and the picture of a report: self-contained, escaped, drawn where the figures are."""

from __future__ import annotations

import io
import json
import math
import re
from base64 import b64decode
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.image import imread
from matplotlib.text import Text

from moored.evaluation.report import Report, increase_pct
from moored.evaluation.report.drawing import COLOURS, Box, Drawing, panel, styles, text_width
from moored.evaluation.report.frontier import (
    FONT,
    HEAD,
    HEIGHT,
    WIDTH,
    frontier,
    frontier_png,
    undrawn,
)
from moored.evaluation.report.page import html
from pagekit import check
from report_cases import arm, base, measured, points_of, report_of, spots, three

NAN, INF = math.nan, math.inf


def curves(*, bad: bool = False) -> dict[str, dict[str, list[tuple[int, float]]]]:
    values = [(step, 2.0 / step) for step in range(1, 81)]
    if bad:
        values[40] = (41, NAN)
    return {
        "none": {"train/ce_nats_per_token": values, "train/loss": values},
        "tmkl": {"train/ce_nats_per_token": values, "train/tmkl_nats_per_token": values},
        "gone": {"train/loss": values},
    }


def test_page_answers_what_was_learned_and_forgotten():
    page = check(html(three()))
    words = page.words.replace("\u00a0", " ")
    assert "TMKL learned about as much as plain fine-tuning and forgot less" in words
    for figure in ("13.50", "1.018", "1.541", "+136 %", "+2.7 %", "61.60", "5,000 tokens"):
        assert figure in words, figure
    # Better and worse are words, not colours alone.
    assert "▼ −92.5 % no interval" in words
    known = report_of(measured("none", 1.05, 30.0, 4.6), measured("tmkl", 1.06, 27.0, 4.25))
    words_of_known = check(html(known)).words.replace("\u00a0", " ")
    assert "▼ −92.2 % better" in words_of_known
    assert "▲ +3.4 % worse" in words_of_known
    assert "nothing here is a claim of significance" in words
    assert "nats per token" in words


def test_page_carries_its_own_report_json():
    report = three(settings={"recipe": "quickstart"})
    page = check(html(report))
    link = next(a["href"] for t, a in page.tags if t == "a" and a["href"].startswith("data:"))
    assert Report.from_json(json.loads(b64decode(link.split(",")[1]))) == report


def test_page_has_dark_colours_for_every_light_one():
    text = html(three())
    light, dark = re.findall(r":root \{(.*?)\}", text, re.DOTALL)
    names = re.compile(r"--[\w]+")
    assert set(names.findall(light)) == set(names.findall(dark))
    used = set(re.findall(r"var\((--\w+)\)", text)) - {"--c"}
    assert used <= set(names.findall(dark))
    assert "prefers-color-scheme: dark" in text


EVIL = '<script>alert("x")</script>\'"&amp;<img src=http://e.example/x onerror=a()> {{7*7}} $\\x$'


def evil() -> Report:
    texts = {"long": "語彙" * 200, "direction": "a\u202eb\x1b[31mc\x00", "half": "\ud800half"}
    before = base(
        model="</title></style><script>alert(1)</script>",
        revision=EVIL,
        quantization=EVIL,
        retention_ppl={EVIL: 26.1, texts["long"]: 4.2, texts["direction"]: None},
        num_tokens={EVIL: 100},
    )
    after = {EVIL: 30.0, texts["long"]: 4.1}
    result = arm(
        EVIL,
        2.0,
        retention_ppl=after,
        retention_increase_pct=increase_pct(before.retention_ppl, after),
        drift_nats_per_token={EVIL: 0.1},
        status=EVIL,
        direction=EVIL,
        adapter=EVIL,
    )
    names = (EVIL, "x" * 400, texts["half"], texts["direction"], "مرحبا")
    return Report(base=before, arms=dict.fromkeys(names, result), settings={EVIL: EVIL})


def test_hostile_text_is_shown_and_does_nothing():
    text = html(evil(), {EVIL: {"train/loss": [(1, 1.0), (2, 0.5)]}})
    page = check(text)
    assert "<script>alert" in page.words
    assert "{{7*7}}" in page.words
    assert not any(c in text for c in "\u202e\x1b\x00\ud800")
    assert "x" * 100 not in page.words
    frontier_png(evil())


def test_text_of_drawings_is_not_taken_for_their_colours_and_ids():
    def shown(name: str) -> int:
        report = Report(base=base(), arms={name: arm("tmkl", 2.0, 30.0, 4.3)})
        return check(html(report)).text.count(name)

    assert shown('#00795f id="a" url(#b)') == shown("plain") > 2


@pytest.mark.parametrize(
    "report",
    [
        report_of(arm("tmkl", 1.018, 26.8, 4.25)),
        report_of(arm("none", 1.0), arm("tmkl", 1.1)),
        report_of(arm("none", None), retention_ppl={}, num_tokens={}),
        report_of(arm("none", NAN, INF, NAN), arm("tmkl", INF, None, None)),
        report_of(arm("none", 13.5, 26.1, 4.2), arm("tmkl", 13.5, 26.1, 4.2)),
        report_of(arm("none", 1.0, 20.0, 3.0), arm("tmkl", 2.0, 25.0, 4.0)),
        report_of(arm("none", 1.2, 2.6e7, 4e300), arm("tmkl", 1e6, 27.0, 4.2)),
        report_of(arm("tmkl", 1.018, 26.8, 4.25), adaptation_ppl=None, revision=None),
        report_of(arm("tmkl", 1.018, 26.8, 4.25), adaptation_ppl=INF),
        report_of(*(arm("tmkl", 1.018, 26.8, 4.25, seed=i) for i in range(20))),
    ],
    ids=[
        "one",
        "no retention",
        "nothing",
        "nan",
        "flat",
        "gain",
        "huge",
        "no base",
        "inf",
        "twenty",
    ],
)
def test_page_and_picture_of_odd_figures(report):
    check(html(report))
    assert imread(io.BytesIO(frontier_png(report))).shape == (900, 1440, 4)


def test_page_says_what_is_not_drawn():
    report = report_of(arm("none", NAN, 26.0, 4.0), arm("tmkl", 1.0), arm("kl", 2.0, 26.0, 4.0))
    assert undrawn(report) == [
        "none0: adaptation perplexity is not finite",
        "tmkl1: retention was not measured",
    ]
    assert "Not drawn: none0: adaptation perplexity is not finite" in check(html(report)).words


def test_curves_are_drawn_and_gaps_are_told():
    page = check(html(three(), curves()))
    assert "Cross-entropy" in page.words
    assert "Divergence from the base" in page.words
    assert "not finite, left out" not in page.words
    broken = check(html(three(), curves(bad=True)))
    assert "2 points not finite, left out" in broken.words
    cut = [
        [a.get("d", "").count("M") for tag, a in p.tags if tag == "path"] for p in (page, broken)
    ]
    assert [pieces.count(2) for pieces in cut] == [0, 4]


def test_panel_keeps_spikes_and_spans_decades():
    curve = [(step, 1.0) for step in range(10_000)]
    curve[4321] = (4321, 500.0)
    drawn = panel(three(), "t", "u", {"tmkl": curve}, {})
    assert drawn is not None
    assert drawn.notes == ["u, by step", "log scale"]
    (line,) = (line for line in drawn.axes.lines if line.get_gid())
    points = points_of(line)
    assert len(points) < 400
    assert max(y for _, y in points) == pytest.approx(math.log(500))
    assert panel(three(), "t", "u", {"tmkl": [(1, NAN)]}, {}) is None


def drawn(report: Report, **size: float) -> Drawing:
    plot = frontier(report, **{"width": 960, "height": 470, "font": 14, **size})
    assert plot is not None
    return plot


def edge(plot: Drawing) -> list[tuple[float, float]]:
    (line,) = (line for line in plot.axes.lines if line.is_dashed())
    return [(x, y) for x, y in points_of(line)]


def test_frontier_is_to_the_right_and_low():
    plot = drawn(three())
    at = spots(plot)
    assert at["base"][0] < at["kl"][0] < at["tmkl"][0] < at["none"][0]
    assert at["none"][1] > at["tmkl"][1] > at["kl"][1] > at["base"][1] == 0
    # Equal nats, equal distances: none has a perplexity of 1.
    nats = math.log(1.541), math.log(1.018)
    apart = [at["none"][0] - at[name][0] for name in ("kl", "tmkl")]
    assert apart[0] / apart[1] == pytest.approx(nats[0] / nats[1])
    assert edge(plot) == [at[name] for name in ("base", "kl", "tmkl", "none")]


def test_frontier_leaves_out_what_is_beaten():
    report = report_of(
        arm("none", 2.0, 40.0, 4.2), arm("tmkl", 1.5, 27.0, 4.2), arm("kl", 1.6, 30.0, 4.2)
    )
    at = spots(drawn(report))
    assert edge(drawn(report)) == [at["base"], at["tmkl1"]]


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.floats(1.0, 13.0), st.floats(26.0, 60.0)), min_size=1, max_size=8),
    st.sampled_from([(960, 470, 14), (360, 400, 12)]),
)
def test_labels_cover_neither_each_other_nor_marks(figures, size):
    arms = [arm("tmkl", learned, ppl, 4.2) for learned, ppl in figures]
    width, height, font = size
    plot = drawn(report_of(*arms), width=width, height=height, font=font)
    boxes = [text_box(text) for text in plot.axes.texts]
    labels = [box for box in boxes if box.outside(plot.frame) <= font]
    # Of every mark and the base, one or two lines, and of the arrow.
    assert len(labels) >= len(arms) + 1 + 2
    for one, other in combinations(labels, 2):
        assert one.overlap(np.array([other])) == 0
    for x, y in plot.axes.transData.transform(list(spots(plot).values())):
        assert not any(b.left < x < b.right and b.low < y < b.high for b in labels)


def text_box(text: Text) -> Box:
    """What a line of text may cover, in pixels."""
    x, y = text.get_transform().transform(text.get_position())
    size = float(text.get_fontsize())
    wide = text_width(text.get_text(), size)
    left = x - wide * {"left": 0.0, "center": 0.5, "right": 1.0}[text.get_horizontalalignment()]
    return Box(left, y - 0.2 * size, left + wide, y + 0.75 * size)


number = st.one_of(st.none(), st.floats(min_value=1.0), st.sampled_from([NAN, INF]))
name = st.text(min_size=1, max_size=30).filter(str.strip)


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(name, number, max_size=4),
    st.dictionaries(name, st.tuples(name, number, st.lists(number, min_size=4)), min_size=1),
    number,
    st.lists(st.tuples(st.integers(0, 2**40), st.floats()), max_size=9),
)
def test_any_figures_make_a_page(corpora, arms, adaptation, curve):
    before = base(retention_ppl=corpora, adaptation_ppl=adaptation, num_tokens={})
    made: dict[str, Any] = {}
    for key, (kind, learned, after) in arms.items():
        retention = dict(zip(corpora, after, strict=False))
        made[key] = arm(
            kind,
            learned,
            retention_ppl=retention,
            retention_increase_pct=increase_pct(corpora, retention),
        )
    report = Report(base=before, arms=made)
    check(html(report, {key: {"train/loss": sorted(curve)} for key in arms}))
    again = Report.from_json(json.loads(json.dumps(report.to_json(), allow_nan=False)))
    assert repr(again) == repr(report)


def rgb(colour: str) -> np.ndarray:
    return np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255


def test_picture_shows_each_arm_where_its_figures_are():
    picture = imread(io.BytesIO(frontier_png(three())))
    assert picture.shape == (900, 1440, 4)
    plot = drawn(three(), width=WIDTH, height=HEIGHT, font=FONT, head=HEAD)
    for name in ("none", "kl", "tmkl"):
        x, y = plot.axes.transData.transform(spots(plot)[name])
        pixel = picture[round((HEIGHT - y) * 1.5), round(x * 1.5), :3]
        assert pixel == pytest.approx(rgb(styles(three())[name].hex), abs=0.02)
    # Paper, not transparency: it must be readable on a dark page too.
    assert picture[..., 3].min() == 1
    assert picture[2, 2, :3] == pytest.approx(np.ones(3))


def test_picture_changes_with_the_figures():
    moved = three()
    moved = replace(moved, arms=moved.arms | {"tmkl": arm("tmkl", 1.3, 30.0, 4.25)})
    assert frontier_png(three()) == frontier_png(three())
    assert frontier_png(moved) != frontier_png(three())


def test_picture_of_many_arms_has_a_key():
    arms = [arm("tmkl", 1.0 + i / 50, 26.5 + i, 4.2, weight=float(i)) for i in range(12)]
    picture = imread(io.BytesIO(frontier_png(report_of(*arms))))
    key = picture[:, 1100:, :3]
    assert (np.abs(key - rgb(COLOURS["k2"][0])).max(-1) < 0.02).sum() > 12 * 60
