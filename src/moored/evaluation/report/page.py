"""report.html: one self-contained page, from headline to caveats.

Words come from `words.py`, `headline.py` and `forgetting.py`, rows from `tables.py`, places from
`figures.py` and `curves.py`; this file puts them in order, and the template gives
them their looks and escapes all text.
"""

from __future__ import annotations

import base64
import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jinja2

from moored import __version__
from moored.evaluation.report import words
from moored.evaluation.report.caveats import caveats
from moored.evaluation.report.choosing import Recommendation, recommendations
from moored.evaluation.report.curves import Panel, panel
from moored.evaluation.report.figures import (
    X_TITLE,
    Y_TITLE,
    Style,
    arm_numbers,
    break_strokes,
    frontier,
    styles,
    undrawn,
    whiskers,
)
from moored.evaluation.report.forgetting import forgetting
from moored.evaluation.report.geometry import SHAPES
from moored.evaluation.report.headline import SAME_INCREASE_POINTS, SAME_PPL_PCT, headline
from moored.evaluation.report.results import Report
from moored.evaluation.report.tables import bars, harness, row, versus

Curves = Mapping[str, Mapping[str, Sequence[tuple[int, float]]]]


def html(report: Report, curves: Curves | None = None) -> str:
    """The whole page.

    Args:
        report: the figures.
        curves: arm -> metric -> (step, value), as the journal has them.
    """
    data = json.dumps(report.to_json(), separators=(",", ":"), allow_nan=False).encode()
    choice = recommendations(report)[0]
    forgotten, arms_left = forgetting(report, choice)
    page = _template().render(
        report=report,
        headline=headline(report),
        styles=styles(report),
        kind_name=words.kind_name,
        rows=[row(report, name, arm) for name, arm in report.arms.items()],
        wide=frontier(report, width=960, height=470, font=14, choice=choice),
        narrow=frontier(report, width=360, height=400, font=12, choice=choice),
        recommended=_recommended(choice),
        undrawn=undrawn(report),
        numbers=arm_numbers(report),
        x_title=X_TITLE,
        y_title=Y_TITLE,
        bars=bars(report),
        versus=versus(report),
        forgotten=forgotten,
        arms_left=arms_left,
        panels=_panels(report, curves or {}),
        harness=harness(report),
        has_drift=any(arm.drift_nats_per_token for arm in report.arms.values()),
        same_ppl=f"{SAME_PPL_PCT:g}",
        same_increase=f"{SAME_INCREASE_POINTS:g}",
        caveats=caveats(report),
        data=base64.b64encode(data).decode(),
        version=__version__,
    )
    # Half a surrogate pair cannot be encoded; JSON can smuggle one in.
    return page.encode("utf-8", "replace").decode("utf-8")


def _recommended(choice: Recommendation | None) -> str:
    if choice is None:
        return ""
    why = "the knee" if choice.is_knee else "which learned most"
    return f"{words.clean(choice.adapter, 60)} is recommended, {why} (see the top of the page)."


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("moored.evaluation.report"),
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
        "whiskers": whiskers,
        "breaks": break_strokes,
    }
    for show in (
        words.ppl,
        words.percent,
        words.nats,
        words.fraction,
        words.count,
        words.probability,
    ):
        environment.filters[show.__name__] = show
    environment.filters |= {"duration": words.duration, "memory": words.memory}
    return environment.get_template("report.html.j2")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """A panel to draw: the first of the metrics that an arm has most of, from `least` points on."""

    title: str
    unit: str
    metrics: Sequence[str]
    least: int = 2
    limit: str | None = None


# Their own term is no divergence from the base.
_NOT_DIVERGENT = ("none", "eaft", "l2", "replay")


def _plans(report: Report) -> list[_Plan]:
    """Learning and divergence over the steps, the budget, and evaluations made on the way."""
    kinds = dict.fromkeys(arm.kind for arm in report.arms.values())
    divergences = [f"train/{kind}_nats_per_token" for kind in kinds if kind not in _NOT_DIVERGENT]
    nats, lost, drift = "nats per token", "retention_increase_pct", "drift_nats_per_token"
    plans = [
        _Plan(title="Cross-entropy", unit=nats, metrics=["train/ce_nats_per_token"]),
        _Plan(title="Divergence from the base", unit=nats, metrics=divergences),
        _Plan(title="Replayed text", unit=nats, metrics=["train/replay_nats_per_token"]),
        _Plan(title="L2 penalty", unit="squared norm", metrics=["train/l2_squared_norm"]),
        _Plan(title="Loss", unit=nats, metrics=["train/loss"]),
        _Plan(
            title="Budget: what the probe lost",
            unit="percent of perplexity",
            metrics=[f"budget/{lost}"],
            limit=f"budget/limit_{lost}",
        ),
        _Plan(
            title="Budget: how far the probe drifted",
            unit=nats,
            metrics=[f"budget/{drift}"],
            limit=f"budget/limit_{drift}",
        ),
        _Plan(
            title="Weight of the regulariser",
            unit="factor",
            metrics=["budget/weight", "train/regularizer_weight"],
        ),
        # Before and after alone are in the tables already.
        _Plan(
            title="Adaptation, held out",
            unit="perplexity",
            metrics=["eval/adaptation_perplexity"],
            least=3,
        ),
    ]
    for corpus in report.corpora[:5]:
        title = f"Retention, {words.clean(corpus, 28)}"
        metric = f"retention/{corpus}/perplexity"
        plans.append(_Plan(title=title, unit="perplexity", metrics=[metric], least=3))
    return plans


def _panels(report: Report, curves: Curves) -> list[Panel]:
    """What the journals have of the plans."""
    kinds = styles(report)
    result: list[Panel] = []
    for plan in _plans(report):
        lines: dict[str, tuple[Style, Sequence[tuple[int, float]]]] = {}
        limits: dict[str, tuple[Style, Sequence[tuple[int, float]]]] = {}
        for name, arm in report.arms.items():
            found = curves.get(name, {})
            curve = max((found.get(metric, ()) for metric in plan.metrics), key=len, default=())
            if len(curve) >= plan.least:
                lines[name] = (kinds[arm.kind], curve)
                if limit := found.get(plan.limit or "", ()):
                    limits[name] = (kinds[arm.kind], limit)
        drawn = panel(plan.title, plan.unit, lines, limits=limits)
        if drawn:
            result.append(drawn)
    return result


def _outline(shape: str, x: float, y: float, radius: float) -> str:
    """A mark as the points of an SVG polygon."""
    return " ".join(f"{x + radius * dx:.1f},{y + radius * dy:.1f}" for dx, dy in SHAPES[shape])


def _path(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
