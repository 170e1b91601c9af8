"""The frontier plot, learning against forgetting, for the page and as frontier.png.

Which setting is recommended is `comparing.py`'s; how lines become pictures is `drawing.py`'s.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator

from moored.evaluation.report import words
from moored.evaluation.report.bootstrap import log_perplexity
from moored.evaluation.report.comparing import (
    Recommendation,
    Setting,
    on_shared_corpora,
    recommendations,
    settings,
    shared_corpora,
)
from moored.evaluation.report.drawing import (
    BASE_STYLE,
    CARD,
    GOOD,
    SOFT,
    Box,
    Drawing,
    Point,
    Style,
    plain,
    styles,
    text_width,
)
from moored.evaluation.report.results import Report
from moored.evaluation.report.tables import bent

TITLE = "Learning against forgetting"
X_TITLE = "Learned: adaptation perplexity, falling →"
Y_TITLE = "Forgotten: rise of retention perplexity, worst corpus"
WIDTH, HEIGHT, FONT, HEAD, KEY = 960, 600, 15, 62, 236  # of the PNG

# With more settings than this the plot shows numbers, and a key says whose they are.
MOST_NAMES = 8

# Above this many percent the scale bends: linear near zero, logarithmic far from it.
BEND_ABOVE_PCT = 500.0

# A base so many times as far from the settings as they are from each other stands beyond a break of
# the x axis, that they be told apart. Their distances are not magnified beyond LEAST_NATS.
FAR = 2.0
LEAST_NATS = 0.2
# Of the frame's width, where the base stands and where the axis breaks.
BASE_AT, BREAK_AT = 0.06, 0.13


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
        figures = {"adaptation perplexity": arm.adaptation_ppl, "retention": worst and worst[1]}
        reasons = [
            f"{what} {'was not measured' if value is None else 'is not finite'}"
            for what, value in figures.items()
            if value is None or not math.isfinite(value)
        ]
        if reasons:
            result.append(f"{words.clean(name, 40)}: {' and '.join(reasons)}")
    return result


@dataclass(frozen=True, slots=True, kw_only=True)
class _Spot:
    """The base or a setting to draw; places are perplexities in nats, falling, and percent."""

    first: str = ""  # the name of its first run
    lines: list[str]  # its name and its figures
    tip: str  # all of it in words
    style: Style = BASE_STYLE
    at: Point
    dots: list[Point] = field(default_factory=list)  # every corpus
    runs: list[Point] = field(default_factory=list)  # each of several seeds
    along: list[Point] = field(default_factory=list)  # the ends of its rise's interval, if any
    across: list[Point] = field(default_factory=list)  # the ends of its perplexity's


def _spot(setting: Setting, style: Style) -> _Spot | None:
    """A setting, if its figures are known and finite."""
    worst, learned = setting.worst, setting.learned
    if worst is None or learned is None or not math.isfinite(worst[1]):
        return None
    at = -math.log(learned), worst[1]
    increases = {c: pct for c, pct in setting.increases.items() if math.isfinite(pct)}
    along, across = setting.interval(worst[0]), setting.interval(None, log_perplexity)
    pairs = [(arm.adaptation_ppl, arm.worst()) for arm in setting.runs]
    runs = [(-math.log(ppl), pair[1]) for ppl, pair in pairs if ppl and pair]
    shown = f"adaptation perplexity {words.ppl(learned)}"
    if across:
        shown += f" [{words.ppl(math.exp(across.low))}, {words.ppl(math.exp(across.high))}]"
    each = [f"{words.clean(c, 40)} {words.percent(pct)}" for c, pct in increases.items()]
    if along:
        each.append(f"at worst {words.percent(worst[1])} {words.bounds(along.low, along.high)}")
    name, many = words.clean(setting.name, 80), len(runs) > 1
    seeds = f" (mean of {len(runs)} seeds)" if many else ""
    return _Spot(
        first=next(iter(setting.arms)),
        lines=[words.clean(setting.name, 26), f"{words.ppl(learned)}, {words.percent(worst[1])}"],
        tip=f"{name}{seeds}: {shown}; retention {', '.join(each)}",
        style=style,
        at=at,
        dots=[(at[0], pct) for pct in increases.values()],
        runs=runs if many else [],
        along=[(at[0], along.low), (at[0], along.high)] if along else [],
        across=[(-across.high, at[1]), (-across.low, at[1])] if across else [],
    )


def _spots(report: Report) -> list[_Spot]:
    """The settings that can be drawn; of one with a broken run, its other runs alone."""
    kinds, result = styles(report), list[_Spot | None]()
    # Without a text in common each stands at its own worst: the caveats say so.
    for group in settings(on_shared_corpora(report) if shared_corpora(report) else report):
        style = kinds[group.first.kind]
        alone = [Setting(arms={name: arm}) for name, arm in group.arms.items()]
        whole = _spot(group, style)
        result += [whole] if whole else [_spot(one, style) for one in alone]
    return [spot for spot in result if spot]


def frontier(
    report: Report,
    *,
    width: float,
    height: float,
    font: float,
    head: float = 0.0,
    key: float = 0.0,
    choice: Recommendation | None = None,
) -> Drawing | None:
    """Draw the frontier plot; None where no setting can be placed.

    x is the logarithm of the adaptation perplexity, falling to the right, so that equal distances
    are equal nats, but for a base that is far off, which stands beyond a break; y is the rise of
    the worst corpus, with every corpus as a small dot. Settings are means over their seeds, with
    their intervals as whiskers.

    Args:
        report: what to draw.
        width: of the picture, in pixels.
        height: of the picture.
        font: size of its text.
        head: room above for a title.
        key: room at the right for a key.
        choice: the setting to mark as recommended.
    """
    spots = _spots(report)
    if not spots:
        return None
    # Runs and the ends of intervals too: nothing may lie outside.
    points = [p for s in spots for p in (s.at, *s.dots, *s.runs, *s.along, *s.across)]
    rises = [0.0, *(pct for _, pct in points)]
    bend = bent if max(map(abs, rises)) > BEND_ABOVE_PCT else float
    low, high = bend(min(rises)), bend(max(rises))
    high = max(high, low + bend(1.0))  # a flat picture must not magnify noise
    low, high = low - 0.09 * (high - low), high + 0.09 * (high - low)
    percents = _y_ticks(low, high, bend)
    left = max(font * 3, *(text_width(_percent(v), font) + font * 1.3 for v in percents))
    frame = Box(left, font * 3.8, width - key - font * 1.2, height - head - font * 2.4)
    plot = Drawing(width, height, font, frame)

    before, tip = report.base.adaptation_ppl, "base: adaptation perplexity "
    known = before is not None and math.isfinite(before) and before > 0
    start = -math.log(before) if before and known else None
    start, broken, (first, last) = _x_axis([x for x, _ in points], start)
    plot.axes.set(xlim=(first, last), ylim=(low, high))
    plot.tint(GOOD)
    plot.ticks(plot.axes.yaxis, percents, 1.9, _percent, bend)
    ppls = _x_ticks(first if broken is None else broken, last)
    plot.ticks(plot.axes.xaxis, ppls, 4.2, place=lambda ppl: -math.log(ppl))
    plot.text(left if width > 500 else 4, head + font * 1.5, Y_TITLE, 0.95)
    plot.text(frame.right, height - font * 0.7, X_TITLE, 0.95, ha="right")
    plot.line([(first, 0), (last, 0)], color=SOFT, linewidth=1.2)
    if bend is bent:
        plot.notes.append("The vertical axis is linear near zero and logarithmic beyond 10 %.")
    if broken is not None:
        plot.notes.append("The base is far off: it stands left of the break, not to scale.")
        look = {"marker": [(-1, -2), (1, 2)], "ms": font, "mew": 1.4, "linestyle": "none"}
        for at in (broken - 0.003 * (last - first), broken + 0.003 * (last - first)):
            plot.line([(at, 0), (at, low)], color=SOFT, **look)
    if start is not None:
        tip += words.ppl(before) + (", not to scale" if broken is not None else "")
        spots.append(_Spot(lines=["base", words.ppl(before)], tip=tip, at=(start, 0.0)))
    plot.about = f"{TITLE}. {'. '.join(spot.tip for spot in spots)}."
    edge = [(x, bend(pct)) for x, pct in _edge([spot.at for spot in spots])]
    plot.line(edge, color=SOFT, linewidth=1.5, dashes=(4, 3))
    for spot in spots:
        _mark(plot, spot, bend, ring=choice is not None and spot.first in choice.setting.arms)

    solid, thin = plot.obstacles()
    numbers = arm_numbers(report)
    # The base last, and of settings first those that are far from the others.
    for spot in sorted(spots, key=lambda spot: (spot.style is BASE_STYLE, -spot.at[1])):
        lines = [numbers[spot.first]] if numbers and spot.first else spot.lines
        short = spot.first and (len(spots) > 7 or width < 500)
        at = spot.at[0], bend(spot.at[1])
        box = plot.label(at, lines[:1] if short else lines, solid, thin)
        solid = np.vstack([solid, box])
    _better(plot, np.vstack([solid, thin]))
    return plot


def _percent(value: float) -> str:
    return f"{plain(value)} %"


def _mark(plot: Drawing, spot: _Spot, bend: Callable[[float], float], *, ring: bool) -> None:
    """A setting's dots and whiskers, and over them its mark."""
    font, colour = plot.font, spot.style.hex

    def draw(points: Sequence[Point], **look: Any) -> None:
        if points:
            look = {"color": colour, "marker": "o", "linestyle": "none", "linewidth": 2, **look}
            plot.line([(x, bend(pct)) for x, pct in points], spot.tip, **look)

    draw(spot.dots, linestyle="-", marker="", alpha=0.35, linewidth=1)
    draw(spot.dots, ms=font * 0.4, mec=CARD, mew=0.7)
    draw(spot.runs, ms=font * 0.6, alpha=0.4)
    draw(spot.along, linestyle="-", marker="_", ms=font * 0.56, mew=2)
    draw(spot.across, linestyle="-", marker="|", ms=font * 0.56, mew=2)
    if ring:
        draw([spot.at], fillstyle="none", mec=GOOD, mew=2, ms=font * 1.7)
    draw([spot.at], marker=spot.style.marker, ms=font * spot.style.size, mec=CARD, mew=1.6)


def _x_axis(
    xs: Sequence[float], start: float | None
) -> tuple[float | None, float | None, tuple[float, float]]:
    """Where the base stands, where the axis breaks, and its ends: nats, falling perplexity."""
    low, high = min(xs), max(xs)
    least = max(high - low, LEAST_NATS)
    if start is None or low - start <= FAR * least:
        low, high = (low, high) if start is None else (min(low, start), max(high, start))
        pad = max(0.07 * (high - low), 0.02)
        return start, None, (low - pad, high + pad)
    broken, high = high - 1.07 * least, high + 0.07 * least
    first = high - (high - broken) / (1 - BREAK_AT)
    return first + BASE_AT * (high - first), broken, (first, high)


def _x_ticks(low: float, high: float) -> list[float]:
    decades = (high - low) / math.log(10)
    if decades > 2:
        return [10.0**e for e in range(0, 300, max(1, round(decades / 8)))]
    if decades > 0.6:
        return [m * 10.0**e for e in range(-1, 12) for m in (1, 1.5, 2, 3, 5, 7)]
    ends = math.exp(-high), math.exp(min(-low, 700))
    return [float(v) for v in MaxNLocator(7).tick_values(*ends) if 0 < v <= ends[1]]


def _y_ticks(low: float, high: float, bend: Callable[[float], float]) -> list[float]:
    if bend is bent:
        decades = max(abs(low), abs(high)) / math.log(10)
        step = max(1, math.ceil(decades / 10))
        return [0.0, *(s * 10.0**e for e in range(step, 300, step) for s in (1, -1))]
    values = [float(v) for v in MaxNLocator(6).tick_values(low, high) if low <= v <= high]
    return sorted(values, key=abs)


def _better(plot: Drawing, taken_N4: np.ndarray) -> None:
    """An arrow towards `better`, where it disturbs least: it points down and to the right."""
    font, (left, low, right, high) = plot.font, plot.frame
    wide, tall = text_width("learned more, forgot less", font * 0.9) + font * 3.2, font * 3
    least, best = math.inf, plot.frame
    for i, j in itertools.product(range(13), range(13)):
        x = left + font + (right - left - wide - 2 * font) * i / 12
        y = high - font - (high - low - tall - 2 * font) * j / 12
        box = Box(x, y - tall, x + wide, y)
        # As near to the corner it points to as there is room.
        cost = box.overlap(taken_N4) * 8 - (i + j) * font
        if cost < least:
            least, best = cost, box
    x, y, tip = best.left + 4, best.high - 6, font * 1.9
    arrow = {"arrowstyle": "-|>", "color": GOOD, "lw": 2.2, "mutation_scale": font}
    plot.axes.annotate("", (x + tip, y - tip), (x, y), "figure points", arrowprops=arrow)
    x, y = best.left + font * 2.9, plot.size[1] - best.high + font * 1.2
    plot.text(x, y, "better", 0.95, color=GOOD, weight="bold")
    plot.text(x, y + font * 1.2, "learned more, forgot less", 0.9, color=SOFT)


def _edge(spots: Sequence[Point]) -> list[Point]:
    """The frontier: spots that no other one beats in both learning (right) and forgetting (low)."""
    result: list[Point] = []
    for x, pct in sorted(set(spots), key=lambda spot: (spot[1], -spot[0])):
        # From the lowest upwards, only what lies further right than all before.
        if not result or x > result[-1][0]:
            result.append((x, pct))
    return result


def frontier_png(report: Report) -> bytes:
    """The frontier plot as a PNG of 1440 x 900 pixels; says so where nothing can be drawn."""
    numbers, choice = arm_numbers(report), recommendations(report)[0]
    size = {"width": WIDTH, "height": HEIGHT, "font": FONT}
    key = KEY if numbers else 0
    plot = frontier(report, **size, head=HEAD, key=key, choice=choice)
    if plot is None:
        plot = Drawing(**size, frame=Box(0, 0, WIDTH, HEIGHT))
        plot.axes.set_axis_off()
        message = "Nothing to draw: no arm has finite adaptation and retention figures"
        plot.text(WIDTH / 2, HEIGHT / 2, message, color=SOFT, ha="center")
    else:
        ring = "whiskers: 95 % intervals" + ("; ring: recommended" if choice else "")
        plot.text(WIDTH - key - 24, 56, ring, 0.87, color=SOFT, ha="right")
        _key(plot, report, numbers)
    plot.text(24, 34, TITLE, 1.33, weight="bold")
    quantised = f", {report.base.quantization}" if report.base.quantization != "none" else ""
    model = words.clean(f"{report.base.model.rstrip('/').split('/')[-1]}{quantised}", 90)
    plot.text(24, 56, model, 0.9, color=SOFT)
    if missing := undrawn(report):
        text = words.clean(f"not drawn: {'; '.join(missing)}", 130)
        plot.text(24, HEIGHT - 10, text, 0.8, color=SOFT)
    return plot.png()


def _key(plot: Drawing, report: Report, numbers: dict[str, str]) -> None:
    """Whose the numbers are, at the right; as many lines as there is room for."""
    left, room = WIDTH - KEY + 10, int((HEIGHT - HEAD - 40) / 18)
    kinds, groups = styles(report), settings(report) if numbers else []
    for i, group in enumerate(groups):
        y = HEAD + 30 + 18 * i
        if i == room - 1 and len(groups) > room:
            plot.text(left, y, f"and {len(groups) - i} more in report.html", 0.8, color=SOFT)
            break
        style = kinds[group.first.kind]
        x, up = plot.axes.transData.inverted().transform((left + 5, HEIGHT - y + 5))
        plot.line([(x, up)], color=style.hex, marker=style.marker, ms=10 * style.size)
        plot.text(left + 32, y, numbers[next(iter(group.arms))], 0.8, ha="right", weight="bold")
        plot.text(left + 38, y, words.clean(group.name, 25), 0.8)
