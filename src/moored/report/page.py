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
from importlib.metadata import PackageNotFoundError, version

import jinja2

from moored.report import words
from moored.report.caveats import caveats
from moored.report.curves import Panel, panel
from moored.report.figures import (
    X_TITLE,
    Y_TITLE,
    Style,
    arm_numbers,
    frontier,
    styles,
    undrawn,
)
from moored.report.forgetting import forgetting
from moored.report.geometry import SHAPES
from moored.report.headline import SAME_INCREASE_POINTS, SAME_PPL_PCT, headline
from moored.report.results import Report
from moored.report.tables import bars, harness, row, versus

Curves = Mapping[str, Mapping[str, Sequence[tuple[int, float]]]]


def html(report: Report, curves: Curves | None = None) -> str:
    """The whole page.

    Args:
        report: the figures.
        curves: arm -> metric -> (step, value), as the journal has them.
    """
    data = json.dumps(report.to_json(), indent=1, allow_nan=False).encode()
    forgotten, arms_left = forgetting(report)
    page = _template().render(
        report=report,
        headline=headline(report),
        styles=styles(report),
        kind_name=words.kind_name,
        rows=[row(report, name, arm) for name, arm in report.arms.items()],
        wide=frontier(report, width=960, height=470, font=14),
        narrow=frontier(report, width=360, height=400, font=12),
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


def _version() -> str:
    try:
        return version("moored")
    except PackageNotFoundError:  # imported from a source tree
        return ""


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
