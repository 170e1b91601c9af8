"""Curves over the steps, from the journals: a small drawing for each metric.

How lines become pictures is `drawing.py`'s.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from matplotlib.ticker import MaxNLocator

from moored.evaluation.report import words
from moored.evaluation.report.drawing import SOFT, Box, Drawing, Point, styles
from moored.evaluation.report.results import Report

Curve = Sequence[tuple[int, float]]  # (step, value)
Curves = Mapping[str, Mapping[str, Curve]]  # arm -> metric -> curve

WIDTH, HEIGHT, FONT = 300, 190, 12
MOST_POINTS = 300  # of a curve

# Their own term is no divergence from the base.
_NOT_DIVERGENT = ("none", "eaft", "l2", "replay")


def panels(report: Report, curves: Curves) -> list[tuple[str, Drawing]]:
    """What the journals have of learning, divergence, the budget and evaluations, with titles."""
    nats, lost, drift = "nats per token", "retention_increase_pct", "drift_nats_per_token"
    kinds = dict.fromkeys(arm.kind for arm in report.arms.values())
    divergences = [f"train/{kind}_nats_per_token" for kind in kinds if kind not in _NOT_DIVERGENT]
    # Unit, metrics of which an arm's longest is taken, and what limits it.
    plans = {
        "Cross-entropy": (nats, ["train/ce_nats_per_token"], ""),
        "Divergence from the base": (nats, divergences, ""),
        "Replayed text": (nats, ["train/replay_nats_per_token"], ""),
        "L2 penalty": ("squared norm", ["train/l2_squared_norm"], ""),
        "Loss": (nats, ["train/loss"], ""),
        "Budget: what the probe lost": (
            "percent of perplexity",
            [f"budget/{lost}"],
            f"budget/limit_{lost}",
        ),
        "Budget: how far the probe drifted": (nats, [f"budget/{drift}"], f"budget/limit_{drift}"),
        "Weight of the regulariser": (
            "factor",
            ["budget/weight", "train/regularizer_weight"],
            "",
        ),
        "Adaptation, held out": ("perplexity", ["eval/adaptation_perplexity"], ""),
    }
    for corpus in report.corpora[:5]:
        title = f"Retention, {words.clean(corpus, 28)}"
        plans[title] = "perplexity", [f"retention/{corpus}/perplexity"], ""
    result: list[tuple[str, Drawing]] = []
    for title, (unit, metrics, limit) in plans.items():
        least = 3 if unit == "perplexity" else 2  # before and after alone are in the tables already
        lines: dict[str, Curve] = {}
        for name in report.arms:
            known = [curves.get(name, {}).get(metric, ()) for metric in metrics]
            if len(curve := max(known, key=len, default=())) >= least:
                lines[name] = curve
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
