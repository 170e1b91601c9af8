"""frontier.png: the frontier plot for slides and READMEs, drawn without a display.

Where everything stands is decided in `figures.py`.
"""

from __future__ import annotations

import io
import warnings
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from moored.evaluation.report import words
from moored.evaluation.report.choosing import recommendations
from moored.evaluation.report.comparing import settings
from moored.evaluation.report.figures import (
    X_TITLE,
    Y_TITLE,
    Frontier,
    Mark,
    arm_numbers,
    break_strokes,
    frontier,
    styles,
    undrawn,
    whiskers,
)
from moored.evaluation.report.geometry import SHAPES, Label
from moored.evaluation.report.results import Report

WIDTH, HEIGHT, FONT, HEAD, KEY = 960, 600, 15, 62, 236
DPI = 150

INK, MUTED, GRID, PAPER, BETTER = "#16212e", "#5b6775", "#e3e6ea", "#ffffff", "#00876a"
# Okabe and Ito's colours, which stay apart for every kind of colour vision; the green is darkened
# to stand out on white.
COLOURS = ("#d55e00", "#0072b2", "#00876a", "#aa4499", "#8a6d00", "#b0305c", "#5a5fb8")


def frontier_png(report: Report) -> bytes:
    """The frontier plot as a PNG of 1440 x 900 pixels; says so where nothing can be drawn."""
    # A pixel of the layout is a hundredth of an inch: fonts are given in points.
    figure = Figure(figsize=(WIDTH / 100, HEIGHT / 100), dpi=DPI, facecolor=PAPER)
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, WIDTH)
    axes.set_ylim(HEIGHT, 0)
    axes.set_axis_off()
    numbers = arm_numbers(report)
    wide = WIDTH - (KEY if numbers else 0)
    choice = recommendations(report)[0]
    plot = frontier(report, width=wide, height=HEIGHT, font=FONT, head=HEAD, choice=choice)
    _text(axes, 24, 34, "Learning against forgetting", size=20, weight="bold")
    quantised = f", {report.base.quantization}" if report.base.quantization != "none" else ""
    subtitle = words.clean(f"{report.base.model.rstrip('/').split('/')[-1]}{quantised}", 90)
    _text(axes, 24, 56, subtitle, size=13.5, color=MUTED)
    if plot is None:
        message = "Nothing to draw: no arm has finite adaptation and retention figures"
        _text(axes, WIDTH / 2, HEIGHT / 2, message, size=15, color=MUTED, ha="center")
    else:
        _draw(axes, plot)
        _key(axes, report, numbers)
        if any(mark.is_recommended for mark in plot.marks):
            ring = "whiskers: 95 % intervals; ring: recommended"
            _text(axes, wide - 24, 56, ring, size=13, color=MUTED, ha="right")
    if missing := undrawn(report):
        text = words.clean(f"not drawn: {'; '.join(missing)}", 130)
        _text(axes, 24, HEIGHT - 10, text, size=12, color=MUTED)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # A name may have characters that the font lacks; it is still drawn, as boxes.
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        canvas.print_png(buffer, metadata={"Software": "moored"})
    return buffer.getvalue()


def _draw(axes: Axes, plot: Frontier) -> None:
    frame = plot.frame
    _shade(axes, plot)
    for tick in plot.y_ticks:
        axes.plot([frame.left, frame.right], [tick.at, tick.at], color=GRID, lw=0.7, zorder=1)
        _text(axes, frame.left - 9, tick.at + 5, tick.text, size=13, color=MUTED, ha="right")
    for tick in plot.x_ticks:
        axes.plot([tick.at, tick.at], [frame.top, frame.bottom], color=GRID, lw=0.7, zorder=1)
        _text(axes, tick.at, frame.bottom + 20, tick.text, size=13, color=MUTED, ha="center")
    zero = [plot.zero, plot.zero]
    axes.plot([frame.left, frame.right], zero, color=MUTED, lw=1.1, zorder=2)
    for (x1, y1), (x2, y2) in break_strokes(plot, plot.font * 0.5):
        axes.plot([x1, x2], [y1, y2], color=MUTED, lw=1.3, zorder=4)
    _text(axes, frame.left, frame.top - 12, Y_TITLE, size=13.5, color=INK)
    _text(axes, frame.right, frame.bottom + 43, X_TITLE, size=13.5, color=INK, ha="right")
    xs, ys = zip(*plot.edge, strict=True)
    axes.plot(xs, ys, color=MUTED, lw=1.2, dashes=(4, 3), zorder=3)
    for mark in plot.marks:
        _mark(axes, mark, COLOURS[mark.style.index], plot.font)
    if plot.base:
        _mark(axes, plot.base, INK, plot.font)
    box = plot.better.box
    arrow: dict[str, Any] = {"arrowstyle": "-|>", "color": BETTER, "lw": 1.8, "mutation_scale": 13}
    start, end = (box.left + 4, box.top + 6), (box.left + 32, box.top + 34)
    axes.annotate("", xy=end, xytext=start, arrowprops=arrow, zorder=4)
    first, second = plot.better.lines
    left = box.left + plot.font * 2.9
    _text(axes, left, box.top + 18, first, size=14, color=BETTER, weight="bold")
    _text(axes, left, box.top + 36, second, size=13, color=MUTED)


def _key(axes: Axes, report: Report, numbers: dict[str, str]) -> None:
    """Whose the numbers are, at the right; as many lines as there is room for."""
    room = int((HEIGHT - HEAD - 40) / 18)
    left = WIDTH - KEY + 10
    kinds = styles(report)
    groups = settings(report) if numbers else []
    for i, group in enumerate(groups):
        y = HEAD + 30 + 18 * i
        if i == room - 1 and len(groups) > room:
            more = f"and {len(groups) - i} more in report.html"
            _text(axes, left, y, more, size=12, color=MUTED)
            break
        style = kinds[group.first.kind]
        xs, ys = zip(
            *((left + 5 + 5 * dx, y - 4 + 5 * dy) for dx, dy in SHAPES[style.shape]), strict=True
        )
        axes.fill(xs, ys, facecolor=COLOURS[style.index], zorder=6)
        number = numbers[next(iter(group.arms))]
        _text(axes, left + 32, y, number, size=12, ha="right", weight="bold")
        _text(axes, left + 38, y, words.clean(group.name, 25), size=12)


def _shade(axes: Axes, plot: Frontier) -> None:
    """A tint that grows towards the corner where more is learned and less forgotten."""
    frame = plot.frame
    across, down = np.meshgrid(np.linspace(0, 1, 64), np.linspace(0, 1, 64))
    tint = np.zeros((64, 64, 4))
    tint[..., :3] = [int(BETTER[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    tint[..., 3] = 0.16 * np.clip((across + down - 0.9) / 1.1, 0, 1)
    extent = (frame.left, frame.right, frame.bottom, frame.top)
    axes.imshow(tint, extent=extent, aspect="auto", interpolation="bilinear", zorder=0)
    # imshow moves the limits.
    axes.set_xlim(0, WIDTH)
    axes.set_ylim(HEIGHT, 0)


def _mark(axes: Axes, mark: Mark, colour: str, font: float) -> None:
    radius = font * 0.5
    if mark.corpora:
        ends = [min(mark.corpora.values()), max(mark.corpora.values())]
        axes.plot([mark.x, mark.x], ends, color=colour, lw=1, alpha=0.35, zorder=4)
        for y in mark.corpora.values():
            axes.plot([mark.x], [y], "o", ms=4, color=colour, mec=PAPER, mew=0.6, zorder=5)
    for x, y in mark.runs:
        axes.plot([x], [y], "o", ms=5.5, color=colour, mew=0, alpha=0.4, zorder=5)
    for (x1, y1), (x2, y2) in whiskers(mark, font * 0.28):
        axes.plot([x1, x2], [y1, y2], color=colour, lw=1.6, zorder=5)
    if mark.is_recommended:
        axes.plot([mark.x], [mark.y], "o", ms=font * 1.15, mfc="none", mec=BETTER, mew=2, zorder=6)
    if mark.label.leader:
        (x1, y1), (x2, y2) = mark.label.leader
        axes.plot([x1, x2], [y1, y2], color=MUTED, lw=0.7, zorder=3)
    outline = [(mark.x + radius * dx, mark.y + radius * dy) for dx, dy in SHAPES[mark.style.shape]]
    xs, ys = zip(*outline, strict=True)
    axes.fill(xs, ys, facecolor=colour, edgecolor=PAPER, lw=1.2, zorder=6)
    _label(axes, mark.label, font)


def _label(axes: Axes, label: Label, font: float) -> None:
    for i, line in enumerate(label.lines):
        y = label.y + font * (0.98 + 1.25 * i)
        style = {"color": MUTED} if i else {"weight": "bold"}
        side = {"start": "left", "middle": "center", "end": "right"}[label.anchor]
        _text(axes, label.x, y, line, size=font - i, ha=side, **style)


def _text(axes: Axes, x: float, y: float, text: str, **style: Any) -> None:
    style = {"size": 14, "color": INK, "ha": "left", **style}
    style["size"] *= 0.72  # layout pixels to points
    axes.text(x, y, text, va="baseline", parse_math=False, zorder=7, **style)
