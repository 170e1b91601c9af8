"""Geometry in pixels, y downwards: boxes, scales, ticks, outlines, labels that do not overlap.

Nothing about reports is known here.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Point = tuple[float, float]


def _polygon(corners: int, turn: float, size: float = 1.0) -> tuple[Point, ...]:
    angles = [2 * math.pi * (i + turn) / corners for i in range(corners)]
    return tuple((size * math.sin(a), -size * math.cos(a)) for a in angles)


# Outlines of about equal area around (0, 0), y down; kinds differ by shape as well as by colour.
SHAPES: dict[str, tuple[Point, ...]] = {
    "circle": _polygon(32, 0.5, 1.0),
    "square": _polygon(4, 0.5, 1.25),
    "triangle": _polygon(3, 0, 1.4),
    "pentagon": _polygon(5, 0, 1.15),
    "wedge": _polygon(3, 0.5, 1.4),
    "hexagon": _polygon(6, 0.5, 1.1),
    "diamond": _polygon(4, 0, 1.3),
    "star": tuple(
        (x * (1.45 if i % 2 == 0 else 0.65), y * (1.45 if i % 2 == 0 else 0.65))
        for i, (x, y) in enumerate(_polygon(10, 0))
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    """A rectangle; y grows downwards."""

    left: float
    top: float
    right: float
    bottom: float

    def overlap(self, other: Box) -> float:
        """The shared area."""
        wide = min(self.right, other.right) - max(self.left, other.left)
        high = min(self.bottom, other.bottom) - max(self.top, other.top)
        return max(0.0, wide) * max(0.0, high)

    def outside(self, frame: Box) -> float:
        """How far it reaches out of a frame."""
        return max(0.0, frame.left - self.left, self.right - frame.right) + max(
            0.0, frame.top - self.top, self.bottom - frame.bottom
        )


@dataclass(frozen=True, slots=True)
class Scale:
    """Values to pixels by way of `bend`; `low` and `high` are bent already, so none overflows."""

    low: float
    high: float
    start: float
    stop: float
    bend: Callable[[float], float] = float

    def __call__(self, value: float) -> float:
        """The pixel of a value."""
        share = (self.bend(value) - self.low) / (self.high - self.low)
        return self.start + share * (self.stop - self.start)

    def holds(self, value: float) -> bool:
        """Whether a value lies on the scale."""
        return self.low <= self.bend(value) <= self.high


@dataclass(frozen=True, slots=True, kw_only=True)
class Tick:
    """A gridline: where, and what it says."""

    at: float
    text: str


def text_width(text: str, size: float) -> float:
    """A width that the text does not exceed in common sans-serif fonts, in pixels."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return size * (0.6 * (len(text) - wide) + 1.1 * wide)


@dataclass(frozen=True, slots=True, kw_only=True)
class Label:
    """Text at a place, with a leader to its mark where it stands apart from it.

    Attributes:
        lines: of text.
        x: where each line starts, has its middle or ends, as `anchor` says.
        y: upper edge.
        anchor: start, middle or end: the side towards the mark is kept.
        box: what the text may cover.
        leader: from the mark to the label.
    """

    lines: tuple[str, ...]
    x: float
    y: float
    anchor: str
    box: Box
    leader: tuple[Point, Point] | None


def plain(value: float) -> str:
    """A tick's number."""
    if abs(value) < 1e5:
        return f"{value:,.10g}".replace("-", "−")
    return f"{value:.0e}".replace("e+0", "e").replace("e+", "e").replace("-", "−")


def ticks(
    scale: Scale, values: Sequence[float], show: Callable[[float], str], apart: float
) -> list[Tick]:
    """Those on the scale that keep their distance; the earlier ones have precedence."""
    result: list[Tick] = []
    for value in filter(scale.holds, values):
        at = scale(value)
        if all(abs(at - tick.at) >= apart for tick in result):
            result.append(Tick(at=at, text=show(value)))
    return result


def around(x: float, y: float, radius: float) -> Box:
    """The square around a point."""
    return Box(left=x - radius, top=y - radius, right=x + radius, bottom=y + radius)


def place(
    spot: Point,
    lines: Sequence[str],
    *,
    font: float,
    radius: float,
    frame: Box,
    taken: Sequence[Box],
    strokes: Sequence[Box] = (),
) -> Label:
    """The nearest place beside a mark where a label covers nothing, else the least bad one.

    Args:
        spot: the mark's centre.
        lines: of the label.
        font: its size.
        radius: of the mark.
        frame: where labels should stay.
        taken: what they must not cover.
        strokes: thin lines that they should not cover.
    """
    wide = max(text_width(line, font) for line in lines)
    high = len(lines) * font * 1.25
    best: tuple[float, Label] | None = None
    for ring in (1.0, 1.6, 2.4, 3.4, 4.6, 6.0, 7.6, 9.4, 11.5, 14.0, 17.0, 20.0):
        gap = radius * 1.7 * ring
        if best is not None and 0.6 * gap >= best[0]:
            break  # further out is worse whatever it covers
        for turn, (dx, dy) in enumerate(_DIRECTIONS):
            # The side, corner or any point between that faces the mark touches the ring.
            x = spot[0] + dx * gap - wide * (1 - dx) / 2
            y = spot[1] + dy * gap - high * (1 - dy) / 2
            box = Box(left=x, top=y, right=x + wide, bottom=y + high)
            covered = sum(box.overlap(other) for other in taken)
            crossed = sum(box.overlap(other) for other in strokes)
            cost = 0.6 * gap + 0.3 * turn + 200 * box.outside(frame) + 4 * (covered + crossed)
            cost += 1000 if covered else 0
            if best is None or cost < best[0]:
                near = (
                    min(max(spot[0], box.left), box.right),
                    min(max(spot[1], box.top), box.bottom),
                )
                leader = (spot, near) if ring > 2 else None
                anchor = "middle" if abs(dx) < 0.5 else "start" if dx > 0 else "end"
                best = (
                    cost,
                    Label(
                        lines=tuple(lines),
                        x=x + {"start": 0.0, "middle": wide / 2, "end": wide}[anchor],
                        y=y,
                        anchor=anchor,
                        box=box,
                        leader=leader,
                    ),
                )
    assert best is not None
    return best[1]


# East first: labels read best to the right of their mark.
_DIRECTIONS: tuple[Point, ...] = tuple(
    (math.cos(math.radians(angle)), math.sin(math.radians(angle)))
    for angle in (0, 180, 270, 90, 315, 225, 45, 135, 338, 202, 22, 158, 292, 248, 68, 112)
)
