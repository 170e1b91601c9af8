"""report.html: one self-contained page, from headline to caveats.

Rows come from `tables.py`, drawings from `frontier.py` and `drawing.py`; the templates that are
handed them give them their looks, put them in words and escape all text.
"""

from __future__ import annotations

import base64
import json

from moored import __version__
from moored.evaluation.report import bootstrap, tables, words
from moored.evaluation.report.comparing import (
    Setting,
    increase_interval,
    recommendations,
    settings,
    shared_corpora,
)
from moored.evaluation.report.drawing import BASE_STYLE, COLOURS, Curves, panels, styles
from moored.evaluation.report.frontier import arm_numbers, frontier, undrawn
from moored.evaluation.report.headline import SAME_INCREASE_POINTS, SAME_PPL_PCT, headline
from moored.evaluation.report.results import Report


def html(report: Report, curves: Curves | None = None) -> str:
    """The whole page.

    Args:
        report: the figures.
        curves: arm -> metric -> (step, value), as the journal has them.
    """
    data = json.dumps(report.to_json(), separators=(",", ":"), allow_nan=False).encode()
    choice = recommendations(report)[0]
    page = words.render(
        "report.html.j2",
        report=report,
        headline=headline(report),
        styles=styles(report),
        base_style=BASE_STYLE,
        colours=COLOURS,
        rows=[tables.row(report, name, arm) for name, arm in report.arms.items()],
        wide=frontier(report, width=960, height=470, font=14, choice=choice),
        narrow=frontier(report, width=360, height=400, font=12, choice=choice),
        choice=choice,
        undrawn=undrawn(report),
        numbers=arm_numbers(report),
        bars=tables.bars(report),
        versus=tables.versus(report),
        forgetting=tables.forgetting(report, choice),
        panels=panels(report, curves or {}),
        harness=tables.harness(report),
        suite=tables.suite(report),
        same_ppl=SAME_PPL_PCT,
        same_increase=SAME_INCREASE_POINTS,
        caveats=caveats(report),
        data=base64.b64encode(data).decode(),
        version=__version__,
        choices=tables.choices,
        interval=increase_interval,
        drift_interval=lambda blocks: bootstrap.interval([blocks], bootstrap.drift),
        rise=tables.rise,
        share_change=tables.share_change,
    )
    # Half a surrogate pair cannot be encoded; JSON can smuggle one in.
    return page.encode("utf-8", "replace").decode("utf-8")


def caveats(report: Report) -> list[str]:
    """What the figures of a report do not show, a line each."""
    groups, shared = settings(report), shared_corpora(report)
    watched = [corpus for arm in report.arms.values() for corpus in arm.budget_watched]
    return words.lines(
        "caveats.txt.j2",
        report=report,
        base=report.base,
        bootstrap=bootstrap,
        groups=groups,
        lacking=[name for group in groups if not _is_measured(group) for name in group.arms],
        measured=any(map(_is_measured, groups)),
        shared=shared,
        apart=[corpus for corpus in report.corpora if corpus not in shared],
        watched=list(dict.fromkeys(watched)),
    )


def _is_measured(group: Setting) -> bool:
    """Whether any of its texts has an interval."""
    return any(
        len(blocks[0].num_tokens) >= bootstrap.FEWEST_BLOCKS
        for corpus in (None, *group.increases)
        if (blocks := group.blocks(corpus))
    )
