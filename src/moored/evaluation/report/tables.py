"""The rows of the page's tables and bars: figures beside their changes, intervals and meanings.

How a row looks, and what is said of it, is the template's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from moored.evaluation.report import bootstrap, words
from moored.evaluation.report.bootstrap import Interval, more_right, share_difference
from moored.evaluation.report.comparing import (
    Recommendation,
    Setting,
    forgot_more,
    increase_interval,
    learned_more,
    settings,
    yardstick,
)
from moored.evaluation.report.headline import compared
from moored.evaluation.report.results import (
    ArmResult,
    Report,
    Tally,
    TaskScore,
    TokenChoice,
    TokenExample,
    Where,
    rise_pct,
)
from moored.evaluation.report.suite_scores import asked_alike, task_change

# A page must stay one that a person reads: what is beyond is counted, and is in report.json.
MOST_ARMS = 8
MOST_TEXTS_OPEN, MOST_TEXTS = 4, 1  # corpora taken apart: of arms that stand open, of others
MOST_SPOTS_WORST, MOST_SPOTS = 8, 3  # examples: of an arm's worst corpus, of others
MOST_TOKENS = 10
MOST_CHOICES = 3  # of each model

# Bars become logarithmic above this: linear near zero, logarithmic beyond BEND_AT_PCT.
BENT_BARS_ABOVE_PCT = 1000.0
BEND_AT_PCT = 10.0

# Settings and corpora beyond these are not compared with plain fine-tuning, and the table says so.
MOST_VERSUS = 40
MOST_VERSUS_CORPORA = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A difference: its direction as an arrow, its meaning as a word."""

    text: str  # by how much
    arrow: str  # up, down or equal
    # Better, worse or same; unclear where the interval holds 0, and no interval where there is none
    # to claim anything by.
    word: str
    interval: str = ""  # its ends; empty where there is none


def change(
    value: float | None,
    interval: Interval | None = None,
    *,
    show: Callable[[float], str] = words.percent,
    more_is_better: bool = False,
) -> Change | None:
    """A difference in words; better or worse is one whose interval leaves out 0."""
    if value is None or math.isnan(value):
        return None
    text = show(value)
    ends = words.bounds(interval.low, interval.high) if interval else ""
    if value == 0 or text.split()[0] == "0":
        return Change(text=text, arrow="=", word="same", interval=ends)
    if interval is None or not interval.is_clear:
        word = "unclear" if interval else "no interval"
    else:
        word = "better" if (value > 0) == more_is_better else "worse"
    return Change(text=text, arrow="▲" if value > 0 else "▼", word=word, interval=ends)


def rise(arm: ArmResult, corpus: str) -> Change | None:
    """What a corpus lost, in percent."""
    return change(arm.retention_increase_pct.get(corpus), increase_interval(arm, corpus))


def share_change(
    before: float | None,
    after: float | None,
    tallies: tuple[Tally | None, Tally | None] = (None, None),
    num: int | None = None,
) -> Change | None:
    """Points between two shares.

    Args:
        before: 0 to 1.
        after: the same.
        tallies: what they are of, for a paired interval.
        num: independent things that were asked, where there is no tally.
    """
    if before is None or after is None:
        return None
    interval = share_difference(before, after, num) if num else None
    if tallies[0] is not None and tallies[1] is not None:
        interval = more_right(tallies[0], tallies[1])
    return change(100 * (after - before), interval, show=_points, more_is_better=True)


def _points(value: float) -> str:
    sign = words.MINUS if value < 0 else "+"
    return f"{sign}{abs(value):.1f} points" if round(value, 1) else "0 points"


def row(report: Report, name: str, arm: ArmResult) -> dict[str, Any]:
    """An arm in the summary table."""
    base, worst, blocks = report.base, arm.worst(), arm.adaptation_blocks
    return {
        "name": name,
        "arm": arm,
        "learned": change(
            rise_pct(base.adaptation_ppl, arm.adaptation_ppl),
            bootstrap.interval([blocks]) if blocks else None,
        ),
        "match": share_change(
            base.adaptation_exact_match,
            arm.adaptation_exact_match,
            (base.exact_match_tally, arm.exact_match_tally),
            base.num_adaptation_prompts,
        ),
        # Constraints of one prompt are no independent draws: prompts are counted.
        "followed": share_change(
            base.instruction_following,
            arm.instruction_following,
            (base.instruction_tally, arm.instruction_tally),
            base.num_instruction_prompts,
        ),
        "worst": worst,
        "forgot": rise(arm, worst[0]) if worst else None,
    }


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
            "learned": change(
                rise_pct(against.learned, group.learned), learned_more(group, against)
            ),
            "forgot": [_forgot(group, against, corpus) for corpus in corpora],
        }
        for group in others[:MOST_VERSUS]
    ]
    return {
        "against": against.name,
        "plain": against.first.kind == "none",
        "rows": rows,
        "corpora": corpora,
        "more_rows": len(others) - len(rows),
        "more_corpora": len(report.corpora) - len(corpora),
    }


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
    arms = report.arms.values()
    return [
        {
            "task": task,
            "metric": metric,
            "base": words.with_error(figures, metric),
            "arms": [words.with_error(arm.lm_eval.get(task, {}), metric) for arm in arms],
        }
        for task, figures in report.base.lm_eval.items()
        for metric in figures
        if "_stderr" not in metric
    ]


def suite(report: Report) -> dict[str, Any] | None:
    """The suite of tasks: a row per task, base and arms beside each other, and the mean of all.

    Changes are those of the score above a guess, paired by question. None without a suite.
    """
    base, arms = report.base, report.arms.values()
    if not base.suite and not any(arm.suite for arm in arms):
        return None
    names = list(dict.fromkeys([*base.suite, *(name for arm in arms for name in arm.suite)]))
    rows = []
    for name in names:
        first = next(r.suite[name] for r in (base, *arms) if name in r.suite)
        cells = [_of_task(base.suite.get(name), arm.suite.get(name)) for arm in arms]
        before = base.suite[name].share if name in base.suite else None
        rows.append(
            {"task": name, "like": first, "num": len(first.scores), "base": before, "arms": cells}
        )
    mean = {
        "base": (base.suite_mean, _ends(base.suite_mean_interval)),
        "arms": [
            (arm.suite_mean, _ends(arm.suite_mean_interval), suite_change(arm)) for arm in arms
        ],
    }
    return {"rows": rows, "mean": mean}


def suite_change(arm: ArmResult) -> Change | None:
    """What became of the mean over the suite's tasks, in points."""
    value, ends = arm.suite_change, arm.suite_change_interval
    if value is None:
        return None
    interval = Interval(value=100 * value, low=100 * ends[0], high=100 * ends[1]) if ends else None
    return change(100 * value, interval, show=_points, more_is_better=True)


def _of_task(
    before: TaskScore | None, after: TaskScore | None
) -> tuple[float | None, Change | None]:
    if after is None:
        return None, None
    if before is None or not asked_alike(before, after):
        return after.share, None
    by = task_change(before, after)
    points = Interval(value=100 * by.value, low=100 * by.low, high=100 * by.high)
    return after.share, change(points.value, points, show=_points, more_is_better=True)


def _ends(interval: Sequence[float]) -> str:
    return words.bounds(*(100 * end for end in interval)) if interval else ""


def bent(pct: float) -> float:
    """Linear near zero, logarithmic beyond `BEND_AT_PCT`."""
    return math.asinh(pct / BEND_AT_PCT)


def bars(report: Report) -> dict[str, Any]:
    """Where the bars of retention stand: one scale for all, in percent of the track's width."""
    every = [pct for arm in report.arms.values() for pct in arm.retention_increase_pct.values()]
    known = [0.0, *(pct for pct in every if pct is not None and math.isfinite(pct))]
    is_bent = max(known) > BENT_BARS_ABOVE_PCT
    scale = bent if is_bent else float
    low, high = scale(min(known)), scale(max(known))
    span = max(high - low, scale(1.0))  # a percent at least: a flat picture must not shout
    zero = -100 * low / span
    ends: dict[float, tuple[str, str]] = {}
    for pct in known:
        length = 100 * scale(pct) / span
        ends[pct] = f"{zero + min(0.0, length):.2f}", f"{abs(length):.2f}"
    return {"ends": ends, "zero": f"{zero:.2f}", "bent": is_bent}


@dataclass(frozen=True, slots=True, kw_only=True)
class Forgotten:
    """What one arm forgot."""

    name: str
    arm: ArmResult
    open: bool  # whether its details stand open
    corpora: list[str]  # the worst first, then by how far they drifted
    # Those taken apart, with the most telling tokens and worst examples, and how many are left out.
    apart: list[tuple[str, Where, int]]
    num_texts_left: int  # corpora that could be taken apart and are not

    @property
    def most_drift(self) -> float:
        """Its greatest drift on a corpus, nats per token."""
        return max(map(words.finite, self.arm.drift_nats_per_token.values()), default=0.0)


def forgetting(report: Report, choice: Recommendation | None = None) -> tuple[list[Forgotten], int]:
    """What the arms forgot, those of the headline first, and how many arms are left out.

    Args:
        report: the figures.
        choice: the recommended setting, which stands for its kind.
    """
    focus, plain, _ = compared(report)
    wanted = [group.settings[0].median() for group in (focus, plain) if group]
    if choice and choice.setting in focus.settings:
        wanted[0] = choice.adapter
    # Of several seeds first the median of each setting.
    medians = [group.median() for group in settings(report)]
    order = list(dict.fromkeys([*wanted, *medians, *report.arms]))
    shown = order[:MOST_ARMS]
    return [_forgotten(report, name, name in wanted) for name in shown], len(order) - len(shown)


def _forgotten(report: Report, name: str, is_open: bool) -> Forgotten:
    arm = report.arms[name]
    worst = arm.worst()
    first = worst[0] if worst else None
    drift = {
        corpus: words.finite(arm.drift_nats_per_token.get(corpus)) for corpus in report.corpora
    }
    corpora = sorted(drift, key=lambda corpus: (corpus != first, -drift[corpus]))
    known = [corpus for corpus in corpora if corpus in arm.where]
    kept = known[: MOST_TEXTS_OPEN if is_open else MOST_TEXTS]
    apart: list[tuple[str, Where, int]] = []
    for i, corpus in enumerate(kept):
        where = arm.where[corpus]
        tokens = [item for item in where.tokens if math.isfinite(item.share)]
        tokens = sorted(tokens, key=lambda item: -item.share)[:MOST_TOKENS]
        spots = sorted(where.spots, key=lambda spot: -words.finite(spot.drift))
        most = MOST_SPOTS if i else MOST_SPOTS_WORST
        where = replace(where, tokens=tokens, spots=spots[:most])
        apart.append((corpus, where, max(0, len(spots) - most)))
    return Forgotten(
        name=name,
        arm=arm,
        open=is_open,
        corpora=corpora,
        apart=apart,
        num_texts_left=len(known) - len(kept),
    )


def choices(spot: TokenExample) -> list[dict[str, Any]]:
    """The rows of an example: either model's first choices, and the true token in any case."""
    # A token that both prefer may stand there twice.
    known = list(dict.fromkeys(spot.choices))
    by_base = sorted(known, key=lambda one: -words.finite(one.base))
    by_adapted = sorted(known, key=lambda one: -words.finite(one.adapted))
    missing = TokenChoice(token=spot.target, base=spot.base, adapted=spot.adapted)
    true = next((one for one in by_base if _is_true(one, spot)), missing)
    wanted = {*by_base[:MOST_CHOICES], *by_adapted[:MOST_CHOICES]}
    rows = [one for one in by_base if one in wanted]
    return [
        {
            "choice": one,
            "is_true": one is true,
            "base_first": one is by_base[0] if by_base else False,
            "adapted_first": one is by_adapted[0] if by_adapted else False,
        }
        for one in [*rows, *([] if true in rows else [true])]
    ]


def _is_true(one: TokenChoice, spot: TokenExample) -> bool:
    # Several tokens may be one text; probabilities come by two ways, so they are equal but for
    # rounding.
    near = math.isclose(one.base, spot.base, rel_tol=0.01, abs_tol=1e-6)
    return near and one.token == spot.target
