"""What a benchmark leaves behind: its figures as JSON, and a picture of them."""

from __future__ import annotations

import argparse
import json
import statistics
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OURS, OTHERS, INK, MUTED = "#0072b2", "#b8bfc8", "#16212e", "#5b6775"


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One measured quantity.

    Attributes:
        name: whose it is.
        value: in the panel's unit; None where it could not be measured.
        low, high: where the samples' spread begins and ends, if there are several.
        is_ours: Moored's.
    """

    name: str
    value: float | None
    low: float | None = None
    high: float | None = None
    is_ours: bool = False


@dataclass(frozen=True)
class Panel:
    """Bars side by side, of one unit; `mark` is a value that they are compared with."""

    title: str
    bars: Sequence[Bar]
    mark: float | None = None
    form: str = ",.2f"


def spread(ratios: Sequence[float]) -> tuple[float, float, float]:
    """The 20th percentile, the median and the 80th."""
    ordered = sorted(ratios)
    low, high = (ordered[round(q * (len(ordered) - 1))] for q in (0.2, 0.8))
    return low, statistics.median(ordered), high


def add_option(parser: argparse.ArgumentParser) -> None:
    """`--out NAME`."""
    parser.add_argument("--out", type=Path, help="write NAME.json, and NAME.png with a picture")


def write(out: Path | None, figures: Any, title: str, panels: Sequence[Panel]) -> None:
    """Write `figures` and draw the panels, if `--out` was given.

    Args:
        out: the option's value.
        figures: whatever JSON can hold.
        title: of the picture.
        panels: from left to right; each has its bars in the same order.
    """
    if out is None:
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_name(out.name + ".json").write_text(json.dumps(figures, indent=1, default=str) + "\n")
    _draw(out.with_name(out.name + ".png"), title, panels)


def _draw(path: Path, title: str, panels: Sequence[Panel]) -> None:
    from matplotlib.figure import Figure  # not on every machine with a GPU

    rows = max(len(panel.bars) for panel in panels)
    figure = Figure(figsize=(4.6 * len(panels) + 1.5, 1.5 + 0.34 * rows), layout="constrained")
    figure.get_layout_engine().set(wspace=0.04)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold", color=INK)
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        axes.set_title(textwrap.fill(panel.title, 44), loc="left", fontsize=9.5, color=MUTED)
        known = [bar for bar in panel.bars if bar.value is not None]
        reach = max((bar.high or bar.value or 0.0 for bar in known), default=1.0)
        for y, bar in enumerate(panel.bars):
            if bar.value is None:
                axes.text(0, y, " not measured", va="center", fontsize=8.5, color=MUTED)
                continue
            axes.barh(y, bar.value, height=0.66, color=OURS if bar.is_ours else OTHERS)
            end = bar.value
            if bar.low is not None and bar.high is not None:
                axes.plot([bar.low, bar.high], [y, y], color=INK, lw=1.2)
                end = max(end, bar.high)
            text = format(bar.value, panel.form)
            # On the paper's colour, where the line runs through it.
            box = {"facecolor": "white", "edgecolor": "none", "pad": 1.2}
            axes.text(
                end + 0.015 * reach,
                y,
                text,
                va="center",
                fontsize=8.5,
                color=INK,
                bbox=box,
                zorder=3,
            )
        if panel.mark is not None:
            axes.axvline(panel.mark, color=MUTED, lw=1, dashes=(4, 3), zorder=2.5)
        axes.set_yticks(range(len(panel.bars)), [bar.name for bar in panel.bars], fontsize=9)
        axes.set_xlim(0, 1.16 * reach)
        axes.invert_yaxis()
        axes.tick_params(axis="x", labelsize=8, colors=MUTED)
        axes.tick_params(axis="y", length=0, colors=INK)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(OTHERS)
    figure.savefig(path, dpi=150)
