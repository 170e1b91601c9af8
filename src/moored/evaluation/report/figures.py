"""The pictures laid out: learning against forgetting, and curves over the steps.

One layout serves the SVG in the page and the PNG; colours and file formats are theirs, scales and
the placing of labels are `geometry.py`'s.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.ticker import MaxNLocator

from moored.evaluation.report import words
from moored.evaluation.report.choosing import Recommendation
from moored.evaluation.report.comparing import settings
from moored.evaluation.report.frontier_points import Span, spots_of
from moored.evaluation.report.geometry import (
    Box,
    Label,
    Point,
    Scale,
    Tick,
    around,
    place,
    plain,
    text_width,
    ticks,
)
from moored.evaluation.report.results import Report

X_TITLE = "Learned: adaptation perplexity, falling →"
Y_TITLE = "Forgotten: rise of retention perplexity, worst corpus"

# With more arms than this the plot shows numbers, and a key says whose they are.
MOST_NAMES = 8

# Above this many percent the scale bends: linear near zero, logarithmic far from it.
BEND_ABOVE_PCT = 500.0
BEND_AT_PCT = 10.0

# A base so many times as far from the settings as they are from each other stands beyond a break of
# the x axis, that they be told apart. Their distances are not magnified beyond LEAST_NATS.
FAR = 2.0
LEAST_NATS = 0.2
# Of the frame's width, where the base stands and where the axis breaks.
BASE_AT, BREAK_AT = 0.06, 0.13

_KIND_SHAPES = {
    "none": "triangle",
    "kl": "square",
    "tmkl": "circle",
    "asft": "pentagon",
    "eaft": "wedge",
    "l2": "hexagon",
    "replay": "star",
}
_NUM_FIXED = 3  # of these, whose look is theirs alone


@dataclass(frozen=True, slots=True)
class Style:
    """How a kind is told apart: `index` picks its colour and strokes, `shape` its marks."""

    index: int
    shape: str


def styles(report: Report) -> dict[str, Style]:
    """One style per kind; the built-in kinds always look the same, others take turns."""
    known = {kind: Style(i, shape) for i, (kind, shape) in enumerate(_KIND_SHAPES.items())}
    spare = list(known.values())[_NUM_FIXED:]
    others = dict.fromkeys(arm.kind for arm in report.arms.values() if arm.kind not in known)
    return known | {kind: spare[i % len(spare)] for i, kind in enumerate(others)}


def bent(pct: float) -> float:
    """Linear near zero, logarithmic beyond `BEND_AT_PCT`."""
    return math.asinh(pct / BEND_AT_PCT)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """A setting in the frontier plot: one run, or the mean of its seeds.

    Attributes:
        style: of its kind.
        x: pixel of its adaptation perplexity.
        y: pixel of its worst corpus's increase.
        across: pixels of the ends of the interval of x; None where there is none.
        along: the same of y.
        corpora: pixel of every corpus's increase, by name.
        runs: each run of several seeds, in pixels.
        is_recommended: whether it is the one to take.
        tip: all of it in words.
        label: its name beside it.
    """

    style: Style
    x: float
    y: float
    across: tuple[float, float] | None
    along: tuple[float, float] | None
    corpora: dict[str, float]
    runs: list[Point]
    is_recommended: bool
    tip: str
    label: Label


@dataclass(frozen=True, slots=True, kw_only=True)
class Frontier:
    """Learning (to the right) against forgetting (upwards), laid out."""

    width: float
    height: float
    font: float
    frame: Box
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    zero: float
    base: Mark | None
    marks: list[Mark]
    edge: list[Point]
    better: Label
    bent: bool
    broken: float | None


def arm_numbers(report: Report) -> dict[str, str]:
    """A number for each arm where names would be too many for the plot; empty otherwise.

    Seeds of one setting share a mark, and so a number.
    """
    groups = settings(report)
    if len(groups) <= MOST_NAMES:
        return {}
    numbers = {name: str(i + 1) for i, group in enumerate(groups) for name in group.arms}
    return {name: numbers[name] for name in report.arms}


def undrawn(report: Report) -> list[str]:
    """Why arms are missing from the frontier plot, a line each."""
    result: list[str] = []
    for name, arm in report.arms.items():
        worst = arm.worst()
        reasons = [
            f"{what} {'was not measured' if value is None else 'is not finite'}"
            for what, value in (
                ("adaptation perplexity", arm.adaptation_ppl),
                ("retention", None if worst is None else worst[1]),
            )
            if value is None or not math.isfinite(value)
        ]
        if reasons:
            result.append(f"{words.clean(name, 40)}: {' and '.join(reasons)}")
    return result


def frontier(
    report: Report,
    *,
    width: float,
    height: float,
    font: float,
    head: float = 0.0,
    choice: Recommendation | None = None,
) -> Frontier | None:
    """Lay the frontier plot out; None where no setting can be placed.

    x is the logarithm of the adaptation perplexity, falling to the right, so that equal distances
    are equal nats, but for a base that is far off, which stands beyond a break (`broken`, a pixel);
    y is the rise of the worst corpus, with every corpus as a small dot. Settings are means over
    their seeds, with their intervals as whiskers.

    Args:
        report: what to draw.
        width: of the picture, in pixels.
        height: of the picture.
        font: size of its text.
        head: room above for a title.
        choice: the setting to mark as recommended.
    """
    spots = spots_of(report)
    if not spots:
        return None
    before = report.base.adaptation_ppl
    before = before if before is not None and math.isfinite(before) and before > 0 else None
    # Runs and the ends of intervals too: nothing may lie outside.
    rises = [0.0, *(pct for spot in spots for pct in spot.rises)]
    is_bent = max(map(abs, rises)) > BEND_ABOVE_PCT
    top, bottom = head + font * 2.4, height - font * 3.8
    y_scale = _y_scale(rises, top, bottom, is_bent)
    y_ticks = _y_ticks(y_scale, is_bent, font)
    left = max(font * 3, *(text_width(tick.text, font) + font * 1.3 for tick in y_ticks))
    frame = Box(left=left, top=top, right=width - font * 1.2, bottom=bottom)
    learned = [ppl for spot in spots for ppl in spot.perplexities]
    x_scale, broken = _x_scale(learned, before, frame)
    radius = font * 0.5
    places = [(x_scale(spot.learned), y_scale(spot.worst)) for spot in spots]
    start = (_base_x(before, x_scale, broken, frame), y_scale(0.0)) if before else None
    # Marks and dots first: no label may cover them.
    taken = [around(x, y, radius * 1.3) for x, y in places]
    for (x, _), spot in zip(places, spots, strict=True):
        taken += [around(x, y_scale(pct), radius * 0.6) for pct in spot.increases.values()]
    if start:
        taken.append(around(*start, radius * 1.5))
    edge = _edge([*places, *([start] if start else [])])
    strokes = [
        around(x1 + (x2 - x1) * i / 24, y1 + (y2 - y1) * i / 24, font * 0.15)
        for (x1, y1), (x2, y2) in itertools.pairwise(edge)
        for i in range(25)
    ]
    for (x, y), spot in zip(places, spots, strict=True):
        ys = [y_scale(pct) for pct in (*spot.increases.values(), *(spot.along or ()))]
        strokes.append(Box(left=x - 1, top=min(ys), right=x + 1, bottom=max(ys)))
        if spot.across:
            xs = [x_scale(ppl) for ppl in spot.across]
            strokes.append(Box(left=min(xs), top=y - 1, right=max(xs), bottom=y + 1))
    strokes.append(
        Box(left=frame.left, top=y_scale(0.0) - 1, right=frame.right, bottom=y_scale(0.0) + 1)
    )
    labels: dict[int, Label] = {}
    numbers = arm_numbers(report)
    for i in sorted(range(len(spots)), key=lambda i: -spots[i].worst):
        spot = spots[i]
        lines = [numbers[spot.first] if numbers else words.clean(spot.name, 26)]
        if len(spots) <= 6 and width >= 500:
            lines.append(f"{words.ppl(spot.learned)}, {words.percent(spot.worst)}")
        labels[i] = place(
            places[i], lines, font=font, radius=radius, frame=frame, taken=taken, strokes=strokes
        )
        taken.append(labels[i].box)
    base = None
    if start and before:
        lines = ["base", words.ppl(before)]
        label = place(
            start, lines, font=font, radius=radius, frame=frame, taken=taken, strokes=strokes
        )
        taken.append(label.box)
        base = Mark(
            style=Style(-1, "diamond"),
            x=start[0],
            y=start[1],
            across=None,
            along=None,
            corpora={},
            runs=[],
            is_recommended=False,
            tip=f"base: adaptation perplexity {words.ppl(before)}"
            + (", not to scale" if broken else ""),
            label=label,
        )
    kinds = styles(report)
    marks = [
        Mark(
            style=kinds[spot.kind],
            x=places[i][0],
            y=places[i][1],
            across=_ends(spot.across, x_scale),
            along=_ends(spot.along, y_scale),
            corpora={name: y_scale(pct) for name, pct in spot.increases.items()},
            runs=[(x_scale(ppl), y_scale(pct)) for ppl, pct in spot.runs],
            is_recommended=choice is not None and spot.first in choice.setting.arms,
            tip=spot.tip,
            label=labels[i],
        )
        for i, spot in enumerate(spots)
    ]
    return Frontier(
        width=width,
        height=height,
        font=font,
        frame=frame,
        x_ticks=_x_ticks(x_scale, font),
        y_ticks=y_ticks,
        zero=y_scale(0.0),
        base=base,
        marks=marks,
        edge=edge,
        better=_better(frame, font, taken + strokes),
        bent=is_bent,
        broken=broken,
    )


def whiskers(mark: Mark, cap: float) -> list[tuple[Point, Point]]:
    """The strokes of a mark's intervals, with caps of half the length `cap`."""
    lines: list[tuple[Point, Point]] = []
    if mark.along:
        lines.append(((mark.x, mark.along[0]), (mark.x, mark.along[1])))
        lines += [((mark.x - cap, y), (mark.x + cap, y)) for y in mark.along]
    if mark.across:
        lines.append(((mark.across[0], mark.y), (mark.across[1], mark.y)))
        lines += [((x, mark.y - cap), (x, mark.y + cap)) for x in mark.across]
    return lines


def break_strokes(plot: Frontier, size: float) -> list[tuple[Point, Point]]:
    """Two slanted strokes through the lower edge and the line of zero, where the x axis breaks."""
    if plot.broken is None:
        return []
    return [
        ((x - size / 2, y + size), (x + size / 2, y - size))
        for y in dict.fromkeys((plot.zero, plot.frame.bottom))
        for x in (plot.broken - size * 0.4, plot.broken + size * 0.4)
    ]


def _ends(bounds: Span | None, scale: Scale) -> Span | None:
    return None if bounds is None else (scale(bounds[0]), scale(bounds[1]))


def _x_scale(
    learned: Sequence[float], before: float | None, frame: Box
) -> tuple[Scale, float | None]:
    """Falling perplexity to the right, equal nats at equal distances; where the axis breaks."""
    low, high = math.log(min(learned)), math.log(max(learned))
    left, broken = frame.left, None
    if before is not None:
        least = max(high - low, LEAST_NATS)
        if math.log(before) - high > FAR * least:
            left = broken = frame.left + BREAK_AT * (frame.right - frame.left)
            high = low + least
        else:
            low, high = min(low, math.log(before)), max(high, math.log(before))
    pad = max(0.07 * (high - low), 0.02)
    return Scale(-high - pad, -low + pad, left, frame.right, lambda v: -math.log(v)), broken


def _base_x(before: float, scale: Scale, broken: float | None, frame: Box) -> float:
    if broken is None:
        return scale(before)
    return frame.left + BASE_AT * (frame.right - frame.left)


def _y_scale(values: Sequence[float], top: float, bottom: float, is_bent: bool) -> Scale:
    bend = bent if is_bent else float
    low, high = bend(min(values)), bend(max(values))
    high = max(high, low + bend(1.0))  # a flat picture must not magnify noise
    pad = 0.09 * (high - low)
    return Scale(low - pad, high + pad, bottom, top, bend)


def _x_ticks(scale: Scale, font: float) -> list[Tick]:
    decades = (scale.high - scale.low) / math.log(10)
    if decades > 2:
        values = [10.0**e for e in range(0, 300, max(1, round(decades / 8)))]
    elif decades > 0.6:
        values = [m * 10.0**e for e in range(-1, 12) for m in (1, 1.5, 2, 3, 5, 7)]
    else:
        ends = math.exp(-scale.high), math.exp(min(-scale.low, 700))
        values = [float(v) for v in MaxNLocator(7).tick_values(*ends)]
    return ticks(scale, [v for v in values if v > 0], plain, font * 4.2)


def _y_ticks(scale: Scale, is_bent: bool, font: float) -> list[Tick]:
    if is_bent:
        decades = max(abs(scale.low), abs(scale.high)) / math.log(10)
        step = max(1, math.ceil(decades / 10))
        values = [0.0, *(s * 10.0**e for e in range(step, 300, step) for s in (1, -1))]
    else:
        values = [float(v) for v in MaxNLocator(6).tick_values(scale.low, scale.high)]
    return ticks(scale, sorted(values, key=abs), lambda v: f"{plain(v)} %", font * 1.9)


def _better(frame: Box, font: float, taken: Sequence[Box]) -> Label:
    """Where the arrow towards `better` disturbs least: it points down and to the right."""
    lines = ("better", "learned more, forgot less")
    wide = text_width(lines[1], font * 0.9) + font * 3.2
    high = font * 3
    best: tuple[float, Box] | None = None
    for i in range(13):
        for j in range(13):
            x = frame.left + font + (frame.right - frame.left - wide - 2 * font) * i / 12
            y = frame.top + font + (frame.bottom - frame.top - high - 2 * font) * j / 12
            box = Box(left=x, top=y, right=x + wide, bottom=y + high)
            # As near to the corner it points to as there is room.
            cost = sum(box.overlap(other) for other in taken) * 8 - (i + j) * font
            if best is None or cost < best[0]:
                best = (cost, box)
    assert best is not None
    box = best[1]
    return Label(lines=lines, x=box.left, y=box.top, anchor="start", box=box, leader=None)


def _edge(spots: Sequence[Point]) -> list[Point]:
    """The frontier: spots that no other one beats in both learning (right) and forgetting (low)."""
    result: list[Point] = []
    for x, y in sorted(set(spots), key=lambda spot: (-spot[1], -spot[0])):
        # From the lowest upwards, only what lies further right than all before.
        if not result or x > result[-1][0]:
            result.append((x, y))
    return result
