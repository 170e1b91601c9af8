"""Curves over the steps laid out in pixels, one panel per metric.

Which metrics are shown, and in what colours, is the page's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.ticker import MaxNLocator

from moored.evaluation.report import words
from moored.evaluation.report.figures import Style
from moored.evaluation.report.geometry import Box, Point, Scale, Tick, plain, ticks

# Arm -> its style and (step, value).
Curves = Mapping[str, tuple[Style, Sequence[tuple[int, float]]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class CurveLine:
    """A curve of one arm: pieces without gaps, as pixels."""

    name: str
    style: Style
    pieces: list[list[Point]]
    last: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One metric over the steps, for all arms; `limits` are what it may reach."""

    title: str
    unit: str
    width: float
    height: float
    font: float
    frame: Box
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    lines: list[CurveLine]
    limits: list[CurveLine]
    logarithmic: bool
    num_not_finite: int


def panel(
    title: str,
    unit: str,
    curves: Curves,
    *,
    limits: Curves | None = None,
    width: float = 300,
    height: float = 190,
    font: float = 12,
) -> Panel | None:
    """Lay out one metric's curves, and what they may reach; None without a finite point.

    Values that are not finite leave a gap and are counted. The scale is logarithmic where positive
    values span more than two decades.
    """
    finite = [(s, v) for _, curve in curves.values() for s, v in curve if _drawable(v)]
    if not finite:
        return None
    num_finite = len(finite)
    finite += [(s, v) for _, curve in (limits or {}).values() for s, v in curve if _drawable(v)]
    values = [value for _, value in finite]
    low, high = min(values), max(values)
    logarithmic = low > 0 and high / low > 100
    frame = Box(left=font * 3.6, top=font * 0.8, right=width - font, bottom=height - font * 2)
    first, last = min(step for step, _ in finite), max(step for step, _ in finite)
    x_scale = Scale(first, max(last, first + 1), frame.left, frame.right)
    x_values = MaxNLocator(5, integer=True).tick_values(x_scale.low, x_scale.high)
    if logarithmic:
        low, high = math.log(low), math.log(high)
        y_scale = Scale(low - 0.2, high + 0.2, frame.bottom, frame.top, math.log)
        step = max(1, round((high - low) / math.log(10) / 5))
        y_values = [10.0**e for e in range(-300, 300, step)]
    else:
        pad = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
        floor = 0.0 if 0 <= low < 0.3 * high else low - pad
        y_scale = Scale(floor, high + pad, frame.bottom, frame.top)
        y_values = [float(v) for v in MaxNLocator(5).tick_values(y_scale.low, y_scale.high)]
    return Panel(
        title=title,
        unit=unit,
        width=width,
        height=height,
        font=font,
        frame=frame,
        x_ticks=ticks(x_scale, [float(v) for v in x_values], plain, font * 3.5),
        y_ticks=ticks(y_scale, y_values, _tick, font * 1.6),
        lines=_lines(curves, x_scale, y_scale),
        limits=_lines(limits or {}, x_scale, y_scale),
        logarithmic=logarithmic,
        num_not_finite=sum(len(curve) for _, curve in curves.values()) - num_finite,
    )


def _lines(curves: Curves, x_scale: Scale, y_scale: Scale) -> list[CurveLine]:
    return [
        CurveLine(
            name=name,
            style=style,
            pieces=_pieces(curve, x_scale, y_scale),
            last=words.nats(curve[-1][1]) if curve else words.MISSING,
        )
        for name, (style, curve) in curves.items()
    ]


def _drawable(value: float) -> bool:
    # Beyond this, differences and squares of values may not be numbers any more.
    return math.isfinite(value) and abs(value) < 1e100


def _tick(value: float) -> str:
    if 0 < abs(value) < 1e-3:
        return f"{value:.0e}".replace("e-0", "e-").replace("-", words.MINUS)
    return f"{value:.4g}".replace("e+0", "e").replace("-", words.MINUS)


def _pieces(
    curve: Sequence[tuple[int, float]], x_scale: Scale, y_scale: Scale, most: int = 300
) -> list[list[Point]]:
    """Pixels of a curve, cut where it is not finite; spikes survive the thinning."""
    bucket = max(1, math.ceil(2 * len(curve) / most))
    kept: list[tuple[int, float]] = []
    for start in range(0, len(curve), bucket):
        part = list(curve[start : start + bucket])
        finite = [item for item in part if _drawable(item[1])]
        if len(finite) < len(part):
            kept.append((part[0][0], math.nan))
        extremes = {min(finite, key=_value), max(finite, key=_value)} if finite else set()
        kept += sorted(extremes)
    pieces: list[list[Point]] = [[]]
    for step, value in kept:
        if math.isfinite(value):
            pieces[-1].append((x_scale(step), y_scale(value)))
        elif pieces[-1]:
            pieces.append([])
    return [piece for piece in pieces if piece]


def _value(item: tuple[int, float]) -> float:
    return item[1]
