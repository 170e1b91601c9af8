"""report.html: one self-contained page, from headline to caveats.

Words come from `words.py` and `headline.py`, places from `figures.py` and `curves.py`; this file
puts them in order and the template gives them their looks. All text is escaped by the template.
"""

from __future__ import annotations

import base64
import functools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import jinja2

from moored.report import words
from moored.report.curves import Panel, panel
from moored.report.figures import (
    X_TITLE,
    Y_TITLE,
    Style,
    arm_numbers,
    bent,
    frontier,
    styles,
    undrawn,
)
from moored.report.geometry import SHAPES
from moored.report.headline import SAME_INCREASE_POINTS, SAME_PPL_PCT, headline
from moored.report.results import ArmResult, Report

Curves = Mapping[str, Mapping[str, Sequence[tuple[int, float]]]]

# Bars become logarithmic above this.
BENT_BARS_ABOVE_PCT = 1000.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A difference to the base: its direction as an arrow, its meaning as a word."""

    text: str
    arrow: str
    word: str


def html(report: Report, curves: Curves | None = None) -> str:
    """The whole page.

    Args:
        report: the figures.
        curves: arm -> metric -> (step, value), as the journal has them.
    """
    data = json.dumps(report.to_json(), indent=1, allow_nan=False).encode()
    page = _template().render(
        report=report,
        headline=headline(report),
        styles=styles(report),
        kind_name=words.kind_name,
        rows=[_row(report, name, arm) for name, arm in report.arms.items()],
        wide=frontier(report, width=960, height=470, font=14),
        narrow=frontier(report, width=360, height=400, font=12),
        undrawn=undrawn(report),
        numbers=arm_numbers(report),
        x_title=X_TITLE,
        y_title=Y_TITLE,
        bars=_bars(report),
        panels=_panels(report, curves or {}),
        harness=_harness(report),
        has_drift=any(arm.drift_nats_per_token for arm in report.arms.values()),
        same_ppl=f"{SAME_PPL_PCT:g}",
        same_increase=f"{SAME_INCREASE_POINTS:g}",
        caveats=words.caveats(report),
        data=base64.b64encode(data).decode(),
        version=_version(),
    )
    # Half a surrogate pair cannot be encoded; JSON can smuggle one in.
    return page.encode("utf-8", "replace").decode("utf-8")


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("moored", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "px": lambda value: f"{value:.1f}",
        "clean": words.clean,
        "outline": _outline,
        "path": _path,
    }
    for show in (words.ppl, words.percent, words.nats, words.fraction, words.count):
        environment.filters[show.__name__] = show
    environment.filters |= {"duration": words.duration, "memory": words.memory}
    return environment.get_template("report.html.j2")


def _version() -> str:
    try:
        return version("moored")
    except PackageNotFoundError:  # imported from a source tree
        return ""


def _row(report: Report, name: str, arm: ArmResult) -> dict[str, Any]:
    """An arm in the summary table."""
    base, worst = report.base, arm.worst()
    learned = match = followed = None
    if base.adaptation_ppl and arm.adaptation_ppl is not None:
        learned = _change(100 * (arm.adaptation_ppl / base.adaptation_ppl - 1), words.percent)
    if base.adaptation_exact_match is not None and arm.adaptation_exact_match is not None:
        points = 100 * (arm.adaptation_exact_match - base.adaptation_exact_match)
        match = _change(points, _points, more_is_better=True)
    if base.instruction_following is not None and arm.instruction_following is not None:
        points = 100 * (arm.instruction_following - base.instruction_following)
        followed = _change(points, _points, more_is_better=True)
    return {
        "name": name,
        "arm": arm,
        "learned": learned,
        "match": match,
        "followed": followed,
        "worst": worst,
        "forgot": None if worst is None else _change(worst[1], words.percent),
    }


def _harness(report: Report) -> list[dict[str, Any]]:
    """The evaluation harness's figures: a row per task and metric, base and arms beside each other.

    Its metrics have no common unit, and whether more is better is the task's matter: so differences
    are given as they are, with the standard errors of both sides.
    """
    rows: list[dict[str, Any]] = []
    for task, figures in report.base.lm_eval.items():
        for metric in figures:
            if "_stderr" in metric:
                continue
            before = words.with_error(figures, metric)
            after = [
                words.with_error(a.lm_eval.get(task, {}), metric) for a in report.arms.values()
            ]
            rows.append({"task": task, "metric": metric, "base": before, "arms": after})
    return rows


def _points(value: float) -> str:
    sign = words.MINUS if value < 0 else "+"
    return f"{sign}{abs(value):.1f} points" if round(value, 1) else "0 points"


def _change(value: float, show: Any, *, more_is_better: bool = False) -> Change | None:
    if math.isnan(value):
        return None
    text = show(value)
    if value == 0 or text.split()[0] == "0":
        return Change(text=text, arrow="=", word="same")
    better = (value > 0) == more_is_better
    return Change(text=text, arrow="▲" if value > 0 else "▼", word="better" if better else "worse")


def _bars(report: Report) -> dict[str, Any]:
    """The retention of every corpus; all bars share one scale, in percent of the track's width."""
    values = [0.0] + [
        pct
        for arm in report.arms.values()
        for pct in arm.retention_increase_pct.values()
        if pct is not None and math.isfinite(pct)
    ]
    is_bent = max(values) > BENT_BARS_ABOVE_PCT
    scale = bent if is_bent else float
    low, high = scale(min(values)), scale(max(values))
    span = max(high - low, scale(1.0))  # a percent at least: a flat picture must not shout
    zero = -100 * low / span
    corpora = []
    for corpus in report.corpora:
        rows = []
        for name, arm in report.arms.items():
            pct = arm.retention_increase_pct.get(corpus)
            length = 100 * scale(pct) / span if pct is not None and math.isfinite(pct) else None
            rows.append(
                {
                    "name": name,
                    "arm": arm,
                    "ppl": arm.retention_ppl.get(corpus),
                    "pct": pct,
                    "left": None if length is None else f"{zero + min(0.0, length):.2f}",
                    "width": None if length is None else f"{abs(length):.2f}",
                    "change": None if pct is None else _change(pct, words.percent),
                }
            )
        corpora.append({"name": corpus, "rows": rows})
    return {"corpora": corpora, "zero": f"{zero:.2f}", "bent": is_bent}


def _panels(report: Report, curves: Curves) -> list[Panel]:
    """Learning and divergence over the steps, and evaluations where they were made on the way."""
    kinds = styles(report)
    divergences = [f"train/{kind}_nats_per_token" for kind in kinds if kind != "none"]
    chosen = [
        ("Cross-entropy", "nats per token", ["train/ce_nats_per_token"], 2),
        ("Divergence from the base", "nats per token", divergences, 2),
        ("Loss", "nats per token", ["train/loss"], 2),
        # Before and after alone are in the tables already.
        ("Adaptation, held out", "perplexity", ["eval/adaptation_perplexity"], 3),
    ]
    for corpus in report.corpora[:5]:
        metric = f"retention/{corpus}/perplexity"
        chosen.append((f"Retention, {words.clean(corpus, 28)}", "perplexity", [metric], 3))
    result: list[Panel] = []
    for title, unit, metrics, least in chosen:
        lines: dict[str, tuple[Style, Sequence[tuple[int, float]]]] = {}
        for name, arm in report.arms.items():
            found = [curves.get(name, {}).get(metric, ()) for metric in metrics]
            curve = max(found, key=len)
            if len(curve) >= least:
                lines[name] = (kinds[arm.kind], curve)
        drawn = panel(title, unit, lines)
        if drawn:
            result.append(drawn)
    return result


def _outline(shape: str, x: float, y: float, radius: float) -> str:
    """A mark as the points of an SVG polygon."""
    return " ".join(f"{x + radius * dx:.1f},{y + radius * dy:.1f}" for dx, dy in SHAPES[shape])


def _path(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
