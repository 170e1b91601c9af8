"""The rows of the page's tables and bars: figures beside their changes, intervals and meanings.

How a row looks is the template's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from moored.evaluation.report import bootstrap, words
from moored.evaluation.report.blocks import Tally
from moored.evaluation.report.bootstrap import Interval
from moored.evaluation.report.comparing import (
    Setting,
    forgot_more,
    increase_interval,
    learned_more,
    more_right,
    settings,
    share_difference,
    yardstick,
)
from moored.evaluation.report.figures import bent
from moored.evaluation.report.results import ArmResult, Report, rise_pct

# Bars become logarithmic above this.
BENT_BARS_ABOVE_PCT = 1000.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A difference: its direction as an arrow, its meaning as a word.

    Attributes:
        text: by how much.
        arrow: up, down or equal.
        word: better, worse or same; unclear where the interval holds 0, and no interval where there
            is none to claim anything by.
        interval: its ends; empty where there is none.
    """

    text: str
    arrow: str
    word: str
    interval: str = ""


def row(report: Report, name: str, arm: ArmResult) -> dict[str, Any]:
    """An arm in the summary table."""
    base, worst = report.base, arm.worst()
    learned = forgot = None
    rise = rise_pct(base.adaptation_ppl, arm.adaptation_ppl)
    if rise is not None:
        found = bootstrap.interval([arm.adaptation_blocks]) if arm.adaptation_blocks else None
        learned = change(rise, found)
    if worst is not None:
        forgot = change(worst[1], increase_interval(arm, worst[0]))
    return {
        "name": name,
        "arm": arm,
        "learned": learned,
        "match": share_change(
            (base.adaptation_exact_match, arm.adaptation_exact_match),
            (base.exact_match_tally, arm.exact_match_tally),
            base.num_adaptation_prompts,
        ),
        # Constraints of one prompt are no independent draws: prompts are counted.
        "followed": share_change(
            (base.instruction_following, arm.instruction_following),
            (base.instruction_tally, arm.instruction_tally),
            base.num_instruction_prompts,
        ),
        "worst": worst,
        "forgot": forgot,
    }


# Settings and corpora beyond these are left out, and the table says so.
MOST_VERSUS = 40
MOST_VERSUS_CORPORA = 12


def versus(report: Report) -> dict[str, Any] | None:
    """Every setting against plain fine-tuning: differences with their paired intervals."""
    groups = settings(report)
    if len(groups) < 2:
        return None
    against = yardstick(groups)
    corpora = report.corpora[:MOST_VERSUS_CORPORA]
    others = [group for group in groups if group is not against]
    rows = [
        {
            "name": group.name,
            "arm": group.first,
            "first": next(iter(group.arms)),
            "seeds": len(group.arms),
            "learned": _learned(group, against),
            "forgot": [_forgot(group, against, corpus) for corpus in corpora],
        }
        for group in others[:MOST_VERSUS]
    ]
    return {
        "against": against.name,
        "plain": against.first.kind == "none",
        "rows": rows,
        "corpora": corpora,
        "more_rows": max(0, len(others) - MOST_VERSUS),
        "more_corpora": max(0, len(report.corpora) - len(corpora)),
    }


def _learned(ours: Setting, theirs: Setting) -> Change | None:
    rise = rise_pct(theirs.learned, ours.learned)
    return None if rise is None else change(rise, learned_more(ours, theirs))


def _forgot(ours: Setting, theirs: Setting, corpus: str) -> Change | None:
    mine, other = ours.increases.get(corpus), theirs.increases.get(corpus)
    if mine is None or other is None:
        return None
    return change(mine - other, forgot_more(ours, theirs, corpus), show=words.points)


def harness(report: Report) -> list[dict[str, Any]]:
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


def share_change(
    shares: tuple[float | None, float | None],
    tallies: tuple[Tally | None, Tally | None] = (None, None),
    num: int | None = None,
) -> Change | None:
    """Points between two shares, before and after.

    Args:
        shares: 0 to 1.
        tallies: what they are of, for a paired interval.
        num: independent things that were asked, where there is no tally.
    """
    (before, after), (counted, recounted) = shares, tallies
    if before is None or after is None:
        return None
    if counted is not None and recounted is not None:
        found = more_right(counted, recounted)
    else:
        found = share_difference(before, after, num) if num else None
    return change(100 * (after - before), found, show=_points, more_is_better=True)


def _points(value: float) -> str:
    sign = words.MINUS if value < 0 else "+"
    return f"{sign}{abs(value):.1f} points" if round(value, 1) else "0 points"


def change(
    value: float,
    interval: Interval | None = None,
    *,
    show: Callable[[float], str] = words.percent,
    more_is_better: bool = False,
) -> Change | None:
    """A difference in words; better or worse is one whose interval leaves out 0."""
    if math.isnan(value):
        return None
    text = show(value)
    ends = words.bounds(interval.low, interval.high) if interval else ""
    if value == 0 or text.split()[0] == "0":
        return Change(text=text, arrow="=", word="same", interval=ends)
    arrow = "▲" if value > 0 else "▼"
    if interval is None or not interval.is_clear:
        word = "unclear" if interval else "no interval"
        return Change(text=text, arrow=arrow, word=word, interval=ends)
    better = (value > 0) == more_is_better
    return Change(text=text, arrow=arrow, word="better" if better else "worse", interval=ends)


def bars(report: Report) -> dict[str, Any]:
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
                    "change": None if pct is None else change(pct, increase_interval(arm, corpus)),
                }
            )
        corpora.append({"name": corpus, "rows": rows})
    return {"corpora": corpora, "zero": f"{zero:.2f}", "bent": is_bent}
