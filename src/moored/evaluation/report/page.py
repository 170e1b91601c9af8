"""report.html: one self-contained page, from headline to caveats.

Rows come from `tables.py`, drawings from `frontier.py` and `curves.py`; this file hands them to the
templates, which give them their looks, put them in words and escape all text.
"""

from __future__ import annotations

import base64
import functools
import json
import math

import jinja2

from moored import __version__
from moored.evaluation.report import bootstrap, words
from moored.evaluation.report.choosing import recommendations
from moored.evaluation.report.comparing import Setting, increase_interval, settings, shared_corpora
from moored.evaluation.report.curves import Curves, panels
from moored.evaluation.report.drawing import BASE_STYLE, COLOURS, styles
from moored.evaluation.report.forgetting import choices, finite, forgetting
from moored.evaluation.report.frontier import arm_numbers, frontier, undrawn
from moored.evaluation.report.headline import SAME_INCREASE_POINTS, SAME_PPL_PCT, headline
from moored.evaluation.report.results import Report
from moored.evaluation.report.tables import bars, harness, rise, row, share_change, versus


def html(report: Report, curves: Curves | None = None) -> str:
    """The whole page.

    Args:
        report: the figures.
        curves: arm -> metric -> (step, value), as the journal has them.
    """
    data = json.dumps(report.to_json(), separators=(",", ":"), allow_nan=False).encode()
    choice = recommendations(report)[0]
    page = (
        _templates()
        .get_template("report.html.j2")
        .render(
            report=report,
            headline=headline(report),
            styles=styles(report),
            base_style=BASE_STYLE,
            colours=COLOURS,
            kind_name=words.kind_name,
            rows=[row(report, name, arm) for name, arm in report.arms.items()],
            wide=frontier(report, width=960, height=470, font=14, choice=choice),
            narrow=frontier(report, width=360, height=400, font=12, choice=choice),
            choice=choice,
            undrawn=undrawn(report),
            numbers=arm_numbers(report),
            bars=bars(report),
            versus=versus(report),
            forgetting=forgetting(report, choice),
            panels=panels(report, curves or {}),
            harness=harness(report),
            same_ppl=SAME_PPL_PCT,
            same_increase=SAME_INCREASE_POINTS,
            caveats=caveats(report),
            data=base64.b64encode(data).decode(),
            version=__version__,
            bounds=words.bounds,
            choices=choices,
            interval=increase_interval,
            drift_interval=lambda blocks: bootstrap.interval([blocks], bootstrap.drift),
            rise=rise,
            share_change=share_change,
        )
    )
    # Half a surrogate pair cannot be encoded; JSON can smuggle one in.
    return page.encode("utf-8", "replace").decode("utf-8")


def caveats(report: Report) -> list[str]:
    """What the figures of a report do not show, a line each."""
    groups, tokens = settings(report), report.base.num_tokens
    shared, watched = shared_corpora(report), [arm.budget_watched for arm in report.arms.values()]
    text = (
        _templates(escape=False)
        .get_template("caveats.txt.j2")
        .render(
            report=report,
            base=report.base,
            arms=report.arms,
            measured=any(map(_is_measured, groups)),
            lacking=[name for group in groups if not _is_measured(group) for name in group.arms],
            most_seeds=max((len(group.arms) for group in groups), default=0),
            some_few=any(len(group.arms) < bootstrap.FEWEST_SEEDS for group in groups),
            fewest_seeds=bootstrap.FEWEST_SEEDS,
            fewest_blocks=bootstrap.FEWEST_BLOCKS,
            num_resamples=bootstrap.NUM_RESAMPLES,
            num_comparisons=(len(groups) - 1) * (1 + len(report.corpora)),
            sizes={name: tokens[name] for name in report.corpora if name in tokens},
            shared=shared,
            apart=[corpus for corpus in report.corpora if corpus not in shared],
            watched=list(dict.fromkeys(corpus for corpora in watched for corpus in corpora)),
        )
    )
    return text.split("\n")


def _is_measured(group: Setting) -> bool:
    """Whether any of its texts has an interval."""
    return any(
        len(blocks[0].num_tokens) >= bootstrap.FEWEST_BLOCKS
        for corpus in (None, *group.increases)
        if (blocks := group.blocks(corpus))
    )


@functools.cache
def _templates(*, escape: bool = True) -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("moored.evaluation.report"),
        autoescape=escape,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    shown = ("clean", "count", "duration", "fraction", "memory", "nats", "passage", "percent")
    for name in (*shown, "ppl", "probability", "token"):
        environment.filters[name] = getattr(words, name)
    environment.filters["width"] = _width
    environment.tests["finite"] = lambda value: value is not None and math.isfinite(value)
    return environment


def _width(value: float | None, most: float) -> str:
    """A bar's length, in percent of its track."""
    return f"{100 * min(1.0, max(0.0, finite(value) / most if most > 0 else 0.0)):.1f}"
