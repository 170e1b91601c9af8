"""Drawings of matplotlib that serve the page (as SVG in its colours) and the PNG alike.

The curves over the steps are here, too; learning against forgetting is `frontier.py`'s.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import math
import re
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.markers import MarkerStyle
from matplotlib.ticker import MaxNLocator

from moored.evaluation.report import words
from moored.evaluation.report.results import Report

# Every colour by its name, on light and on dark ground; the PNG is light. Those of the kinds are
# Okabe and Ito's, which stay apart for every kind of colour vision; the green is darkened to stand
# out on white.
COLOURS = {
    "paper": ("#f7f8f8", "#0e151c"),
    "card": ("#ffffff", "#151f29"),
    "ink": ("#16212e", "#e8eef3"),
    "soft": ("#566270", "#9fadba"),
    "rule": ("#dde2e6", "#2a3744"),
    "grid": ("#e6eaed", "#25313c"),
    "good": ("#00795f", "#45d3ad"),
    "bad": ("#b3460a", "#ff9a57"),
    "accent": ("#0b4f6c", "#7cc4e4"),
    "track": ("#eef1f3", "#202c37"),
    "k0": ("#d55e00", "#ff8b3d"),
    "k1": ("#0072b2", "#5db5f2"),
    "k2": ("#00876a", "#3ccfa8"),
    "k3": ("#aa4499", "#dd9ae6"),
    "k4": ("#8a6d00", "#e0c04c"),
    "k5": ("#b0305c", "#ff8fb0"),
    "k6": ("#5a5fb8", "#a9a5f5"),
    "k7": ("#7a4b2a", "#d9a27c"),
    "k8": ("#3d6b00", "#a3d65c"),
    "alt": ("#4a7fa5", "#6aa9d4"),
    "shift": ("#d0902f", "#e0ac4c"),
}
CARD, INK, SOFT, GRID, GOOD = (COLOURS[n][0] for n in ("card", "ink", "soft", "grid", "good"))
_NAMES = {light: name for name, (light, _) in COLOURS.items()}

Point = tuple[float, float]


class Style(NamedTuple):
    """How a kind is told apart: colour, matplotlib's marker, its size over a circle's, dashes."""

    colour: str
    marker: str
    size: float
    dash: Sequence[float] = ()

    @property
    def hex(self) -> str:
        """Its colour on light ground."""
        return COLOURS[self.colour][0]

    @property
    def outline(self) -> str:
        """The marker as an SVG path of about 10 pixels around (0, 0)."""
        marker = MarkerStyle(self.marker)
        path = marker.get_path().transformed(marker.get_transform())
        points = np.asarray(path.to_polygons()[0]) * 10.8 * self.size
        return "M" + "L".join(f"{x:.1f} {-y:.1f}" for x, y in points) + "Z"


BASE_STYLE = Style("ink", "D", 0.9)
_KINDS = {
    "none": Style("k0", "^", 1.15, (6, 3)),
    "kl": Style("k1", "s", 0.9, (2, 2.5)),
    "tmkl": Style("k2", "o", 1.0),
    "asft": Style("k3", "p", 1.15, (8, 3, 2, 3)),
    "eaft": Style("k4", "v", 1.15, (1, 3)),
    "l2": Style("k5", "h", 1.1, (10, 4)),
    "replay": Style("k6", "*", 1.65, (4, 2, 1, 2)),
    "stm": Style("k7", "X", 1.15, (2, 5)),
    "mol": Style("k8", "P", 1.15, (12, 3)),
}
_NUM_FIXED = 3  # of these, whose look is theirs alone


def styles(report: Report) -> dict[str, Style]:
    """One style per kind; the built-in kinds always look the same, others take turns."""
    spare = list(_KINDS.values())[_NUM_FIXED:]
    others = dict.fromkeys(arm.kind for arm in report.arms.values() if arm.kind not in _KINDS)
    return _KINDS | {kind: spare[i % len(spare)] for i, kind in enumerate(others)}


class Box(NamedTuple):
    """A rectangle in pixels."""

    left: float
    low: float
    right: float
    high: float

    def overlap(self, others_N4: np.ndarray) -> float:
        """The area that it shares with others."""
        sides = np.minimum(self[2:], others_N4[:, 2:]) - np.maximum(self[:2], others_N4[:, :2])
        return float(np.maximum(sides, 0.0).prod(1).sum())

    def outside(self, frame: Box) -> float:
        """How far it reaches out of a frame."""
        across = max(0.0, frame.left - self.left, self.right - frame.right)
        return across + max(0.0, frame.low - self.low, self.high - frame.high)


def text_width(text: str, size: float) -> float:
    """A width that the text does not exceed in common sans-serif fonts, in pixels."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return size * (0.6 * (len(text) - wide) + 1.1 * wide)


def plain(value: float) -> str:
    """A tick's number."""
    shown = f"{value:,.10g}" if abs(value) < 1e5 else f"{value:.0e}".replace("e+0", "e")
    return shown.replace("e+", "e").replace("-", "−")


# East first: labels read best to the right of their mark.
_DIRECTIONS = [
    (math.cos(math.radians(angle)), -math.sin(math.radians(angle)))
    for angle in (0, 180, 270, 90, 315, 225, 45, 135, 338, 202, 22, 158, 292, 248, 68, 112)
]


class Drawing:
    """Axes in a figure of a size in pixels.

    Attributes:
        figure: of matplotlib.
        axes: in it.
        font: size of the text, in pixels.
        frame: the axes in pixels, upwards.
        about: all of it in words, for those who cannot see it.
        notes: what a caption must say of it.
    """

    def __init__(self, width: float, height: float, font: float, frame: Box):
        # A pixel is a point of matplotlib's, in which it measures fonts and strokes.
        self.figure = Figure(figsize=(width / 72, height / 72), dpi=72, facecolor=CARD)
        left, low, right, high = frame
        sides = left / width, low / height, (right - left) / width, (high - low) / height
        self.axes = self.figure.add_axes(sides, facecolor="none", axisbelow=True)
        self.axes.spines[:].set_visible(False)
        self.axes.tick_params(length=0, labelsize=font * 0.9, labelcolor=SOFT, pad=font * 0.5)
        self.size, self.font, self.frame = (width, height), font, frame
        self.about, self.notes = "", list[str]()

    def ticks(
        self,
        axis: Axis,
        values: Iterable[float],
        apart: float,
        show: Callable[[float], str] = plain,
        place: Callable[[float], float] = float,
    ) -> None:
        """Number an axis, with gridlines; values that are too near to earlier ones are left out.

        Args:
            axis: of the axes.
            values: to show.
            apart: least distance, in font sizes.
            show: a value as text.
            place: where it is on the axis.
        """
        across, (low, high) = axis is self.axes.xaxis, axis.get_view_interval()
        pixels = (self.frame.right, self.frame.high)[not across] - self.frame[not across]
        kept: dict[float, str] = {}
        for value in values:
            at = place(value)
            near = apart * self.font * (high - low) / pixels
            if low <= at <= high and all(abs(at - other) >= near for other in kept):
                kept[at] = show(value)
        axis.set_ticks(list(kept), list(kept.values()))
        axis.grid(visible=True, color=GRID, linewidth=1)

    def tint(self, colour: str) -> None:
        """Fill the axes with a colour that grows towards the lower right corner."""
        across, down = np.meshgrid(np.linspace(0, 1, 64), np.linspace(0, 1, 64))
        shade = np.full((64, 64, 4), to_rgba(colour))
        shade[..., 3] = 0.17 * np.clip((across + down - 0.9) / 1.1, 0, 1)
        extent = *self.axes.get_xlim(), *self.axes.get_ylim()
        self.axes.imshow(shade, extent=extent, aspect="auto", interpolation="none", zorder=0)

    def line(self, points: Sequence[Point], tip: str = "", **look: Any) -> None:
        """Add a line through points of the axes, or marks at them, with a tooltip."""
        look = {"mew": 0, "clip_on": False, "solid_capstyle": "butt", **look}
        self.axes.plot(*np.transpose(points), gid=f"tip:{tip}" if tip else None, **look)

    def text(self, x: float, y: float, text: str, size: float = 1.0, **look: Any) -> None:
        """Add text at pixels of the figure, from above; its size in font sizes."""
        look = {"color": INK, "fontsize": size * self.font, "parse_math": False, **look}
        at = x / self.size[0], 1 - y / self.size[1]
        self.axes.text(*at, text, transform=self.figure.transFigure, **look)

    def obstacles(self) -> tuple[np.ndarray, np.ndarray]:
        """Boxes of the marks, which must not be covered, and along lines, which should not be."""
        solid, thin = [np.empty((0, 4))], [np.empty((0, 4))]
        for line in self.axes.lines:
            points = line.get_transform().transform(np.asarray(line.get_xydata()))
            if line.get_marker() not in ("", "None"):
                reach = line.get_markersize() * 0.55
                solid.append(np.hstack([points - reach, points + reach]))
            for one, other in itertools.pairwise(points) if line.get_linestyle() != "None" else ():
                along = np.linspace(one, other, 2 + int(math.dist(one, other) / self.font))
                thin.append(np.hstack([along - 1.5, along + 1.5]))
        return np.vstack(solid), np.vstack(thin)

    def label(
        self, spot: Point, lines: Sequence[str], solid_N4: np.ndarray, thin_N4: np.ndarray
    ) -> Box:
        """Add lines beside a mark, the first one bold, at the nearest place that covers nothing.

        Args:
            spot: the mark, on the axes.
            lines: of text.
            solid_N4: what they must not cover.
            thin_N4: what they should not cover.

        Returns:
            What the label may cover; where there is no room, the least bad place.
        """
        font, (x0, y0) = self.font, self.axes.transData.transform(spot)
        wide, high = max(text_width(line, font) for line in lines), len(lines) * font * 1.25
        least, gap, side, box = math.inf, 0.0, 0.0, self.frame
        for ring in (0.85, 1.4, 2.0, 2.9, 3.9, 5.1, 6.5, 8.0, 9.8, 11.9, 14.5, 17.0):
            if 0.6 * ring * font >= least:
                break  # further out is worse whatever it covers
            for turn, (right, up) in enumerate(_DIRECTIONS):
                # The side, corner or any point between that faces the mark touches the ring.
                x = x0 + right * ring * font - wide * (1 - right) / 2
                y = y0 + up * ring * font - high * (1 - up) / 2
                tried = Box(x, y, x + wide, y + high)
                covered, crossed = tried.overlap(solid_N4), tried.overlap(thin_N4)
                cost = 0.6 * ring * font + 0.3 * turn + 200 * tried.outside(self.frame)
                cost += 4 * (covered + crossed) + (1000 if covered else 0)
                if cost < least:
                    least, gap, side, box = cost, ring, right, tried
        if gap > 1.5:
            near = min(max(x0, box.left), box.right), min(max(y0, box.low), box.high)
            leader = [spot, self.axes.transData.inverted().transform(near)]
            self.line(leader, color=SOFT, linewidth=0.7, zorder=1.5)
        anchor, share = ("left", 0) if side > 0 else ("right", 1)
        anchor, share = ("center", 0.5) if abs(side) < 0.5 else (anchor, share)
        for i, line in enumerate(lines):
            look: dict[str, Any] = {"size": 0.93, "color": SOFT} if i else {"weight": "bold"}
            y = self.size[1] - box.high + font * (0.97 + 1.25 * i)
            self.text(box.left + share * wide, y, line, ha=anchor, **look)
        return box

    def svg(self, name: str) -> Markup:
        """The drawing for a page: in the colours of its style sheet, with tooltips.

        Args:
            name: that no other drawing of the page has.
        """
        buffer = io.StringIO()
        self.figure.patch.set_visible(False)
        with _without_warnings(), rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
            nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
            FigureCanvasSVG(self.figure).print_svg(buffer, metadata=nothing)
        text = " ".join(buffer.getvalue().split())
        text = text[text.index("<g ") : text.rindex("</svg>")]
        text = re.sub("<[^>]*>", lambda tag: _for_page(tag[0], name), text)
        head = '<svg class="plot {}" viewBox="0 0 {:g} {:g}" role="img" aria-label="{}">'
        return Markup(head).format(name, *self.size, self.about) + Markup(f"{text}</svg>")

    def png(self) -> bytes:
        """The drawing in light colours, without a display, at one and a half times its size."""
        buffer = io.BytesIO()
        self.figure.set_dpi(108)
        with _without_warnings():
            FigureCanvasAgg(self.figure).print_png(buffer, metadata={"Software": "moored"})
        return buffer.getvalue()


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        # A name may have characters that the font lacks; it is still drawn, as boxes.
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        yield


# What matplotlib writes that a page does not need.
_NEEDLESS = re.compile(
    r' id="(?:figure|axes|image|patch|text|line2d|[xy]tick|matplotlib)[^"]*"'
    r'| transform="rotate\(-0[^"]*"| ?font-family: [^;"]*;'
)


def _for_page(tag: str, name: str) -> str:
    """A tag of matplotlib's SVG: names that are the page's own, its colours, and tooltips."""
    if tip := re.match(r"<g id=([\"'])tip:(.*)\1>", tag):
        return f"<g><title>{tip[2]}</title>"
    tag = re.sub(r'( id="| xlink:href="#|url\(#)', rf"\g<1>{name}-", _NEEDLESS.sub("", tag))
    return re.sub("#[0-9a-f]{6}", lambda colour: f"var(--{_NAMES[colour[0]]})", tag)


# ---------------------------------------------------------------- curves over the steps

Curve = Sequence[tuple[int, float]]  # (step, value)
Curves = Mapping[str, Mapping[str, Curve]]  # arm -> metric -> curve

WIDTH, HEIGHT, FONT = 300, 190, 12
MOST_POINTS = 300  # of a curve

# Their own term is no divergence from the base.
_NOT_DIVERGENT = ("none", "eaft", "stm", "mol", "l2", "replay")


def panels(report: Report, curves: Curves) -> list[tuple[str, Drawing]]:
    """What the journals have of learning, divergence, the budget and evaluations, with titles."""
    nats = "nats per token"
    kinds = dict.fromkeys(arm.kind for arm in report.arms.values())
    divergences = [f"train/{kind}_nats_per_token" for kind in kinds if kind not in _NOT_DIVERGENT]
    # Title, unit, and metrics of which an arm's longest is taken.
    plans = [
        ("Cross-entropy", nats, ["train/ce_nats_per_token"]),
        ("Divergence from the base", nats, divergences),
        ("Divergence where nothing is learned", nats, ["train/kl_prompt_nats_per_token"]),
        ("Divergence on the anchors", nats, ["train/kl_anchors_nats_per_token"]),
        ("Replayed text", nats, ["train/replay_nats_per_token"]),
        ("L2 penalty", "squared norm", ["train/l2_squared_norm"]),
        ("Loss", nats, ["train/loss"]),
        ("Budget: what the probe lost", "percent of perplexity", ["budget/retention_increase_pct"]),
        ("Budget: how far the probe drifted", nats, ["budget/drift_nats_per_token"]),
        ("Weight of the regulariser", "factor", ["budget/weight", "train/regularizer_weight"]),
        ("Adaptation, held out", "perplexity", ["eval/adaptation_perplexity"]),
    ]
    for corpus in report.corpora[:5]:
        title, metric = f"Retention, {words.clean(corpus, 28)}", f"retention/{corpus}/perplexity"
        plans.append((title, "perplexity", [metric]))
    result: list[tuple[str, Drawing]] = []
    for title, unit, metrics in plans:
        least = 3 if unit == "perplexity" else 2  # before and after alone are in the tables already
        lines: dict[str, Curve] = {}
        for name in report.arms:
            known = [curves.get(name, {}).get(metric, ()) for metric in metrics]
            if len(curve := max(known, key=len, default=())) >= least:
                lines[name] = curve
        limit = f"budget/limit_{''.join(metrics[:1]).removeprefix('budget/')}"
        limits = {name: at for name in lines if (at := curves[name].get(limit))}
        if drawing := panel(report, title, unit, lines, limits):
            result.append((title, drawing))
    return result


def panel(
    report: Report, title: str, unit: str, lines: Mapping[str, Curve], limits: Mapping[str, Curve]
) -> Drawing | None:
    """Draw one metric's curves by arm, and what they may reach; None without a finite point.

    Values that are not finite leave a gap and are counted. The scale is logarithmic where positive
    values span more than two decades.
    """
    points = [point for curve in lines.values() for point in curve]
    known = [point for point in points if _drawable(point[1])]
    if not known:
        return None
    num_odd = len(points) - len(known)
    known += [point for curve in limits.values() for point in curve if _drawable(point[1])]
    plot = Drawing(
        WIDTH, HEIGHT, FONT, Box(FONT * 3.6, FONT * 2, WIDTH - FONT, HEIGHT - FONT * 0.8)
    )
    values = [value for _, value in known]
    low, high = min(values), max(values)
    is_log = low > 0 and high / low > 100
    if is_log:
        low, high = math.log(low) - 0.2, math.log(high) + 0.2
        step = max(1, round((high - low) / math.log(10) / 5))
        ticks = [10.0**e for e in range(-300, 300, step)]
    else:
        pad = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
        low, high = 0.0 if 0 <= low < 0.3 * high else low - pad, high + pad
        ticks = list(MaxNLocator(5).tick_values(low, high))
    bend = math.log if is_log else float
    first, last = min(known)[0], max(known)[0]
    last = max(last, first + 1)
    plot.axes.set(xlim=(first, last), ylim=(low, high))
    plot.ticks(plot.axes.yaxis, ticks, 1.6, _number, bend)
    steps = MaxNLocator(5, integer=True).tick_values(first, last)
    plot.ticks(plot.axes.xaxis, steps, 3.5)
    plot.axes.xaxis.grid(visible=False)
    plot.line([(first, low), (last, low)], color=SOFT, linewidth=1.2)
    plot.notes = [f"{unit}, by step", *(["dashed: at most"] if limits else [])]
    plot.notes += ["log scale"] if is_log else []
    plot.notes += [f"{num_odd} points not finite, left out"] if num_odd else []
    kinds, ends = styles(report), list[str]()
    for name, curve in lines.items():
        style, shown, end = kinds[report.arms[name].kind], words.clean(name), curve[-1][1]
        ends.append(f"{words.clean(name, 40)} {words.nats(end)}")
        look = {"color": style.hex, "linewidth": 1.7}
        look |= {"dashes": [size / 1.7 for size in style.dash]} if style.dash else {}
        plot.line(_thinned(curve, bend), f"{shown}: {words.nats(end)} at the end", **look)
        if limit := limits.get(name):
            look |= {"linewidth": 1.3, "dashes": (4, 3)}
            plot.line(_thinned(limit, bend), f"{shown}: at most {words.nats(limit[-1][1])}", **look)
    plot.about = f"{title}, {unit}, by step; at the end: {', '.join(ends)}"
    return plot


def _drawable(value: float) -> bool:
    # Beyond this, differences and squares of values may not be numbers any more.
    return math.isfinite(value) and abs(value) < 1e100


def _number(value: float) -> str:
    if 0 < abs(value) < 1e-3:
        return f"{value:.0e}".replace("e-0", "e-").replace("-", words.MINUS)
    return f"{value:.4g}".replace("e+0", "e").replace("-", words.MINUS)


def _thinned(curve: Curve, bend: Callable[[float], float]) -> list[Point]:
    """Points of a curve, NaN where it is not finite; spikes survive."""
    bucket = max(1, math.ceil(2 * len(curve) / MOST_POINTS))
    points: list[Point] = []
    for start in range(0, len(curve), bucket):
        part = curve[start : start + bucket]
        finite = [(value, step) for step, value in part if _drawable(value)]
        if len(finite) < len(part):
            points.append((part[0][0], math.nan))
        extremes = sorted({min(finite)[::-1], max(finite)[::-1]}) if finite else []
        points += [(step, bend(value)) for step, value in extremes]
    return points
