"""The headline: what was learned and what was forgotten, in one sentence computed from the figures.

It says as readily that nothing was learned, that the regulariser did harm, or that two runs cannot
be told apart. The sentences are `headline.txt.j2`'s, how runs are compared is `comparing.py`'s.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from moored.evaluation.report import words
from moored.evaluation.report.bootstrap import FEWEST_SEEDS, Interval
from moored.evaluation.report.comparing import (
    Setting,
    forgot_more_at_worst,
    learned_more,
    on_shared_corpora,
    recommendations,
    settings,
)
from moored.evaluation.report.results import ArmResult, Report

# Within these, two arms are said to be about the same; the report states both.
SAME_PPL_PCT = 3.0
SAME_INCREASE_POINTS = 1.0

MOST_BUDGETS = 4  # that are named

Span = tuple[float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Headline:
    """What the figures say: one sentence, and the numbers behind it."""

    title: str
    details: tuple[str, ...]


def headline(report: Report) -> Headline:
    """What was learned and what was forgotten, as the figures have it.

    TMKL (else the first regulariser there is) is compared with plain fine-tuning where both are
    there: by the intervals of their differences where each is one setting and its texts' sums are
    known. Several settings of one kind are compared by their whole ranges, so that one lucky arm of
    many cannot make the headline. Which setting to take stands in a line of its own.
    """
    report = on_shared_corpora(report)
    focus, plain, rest = compared(report)
    shown = [focus, *([plain] if plain else [])]
    title, *details = words.lines(
        "headline.txt.j2",
        before=report.base.adaptation_ppl,
        same_pct=SAME_PPL_PCT,
        broken=next((group for group in shown if group.broken), None),
        focus=focus,
        pair=Pair(focus, plain) if plain else None,
        shown=[*shown, *(rest if len(rest) <= 2 else [])],
        num_rest=len(rest) if len(rest) > 2 else 0,
        budgets=budgets(report),
        recommended=recommendations(report)[1],
    )
    return Headline(title=title, details=tuple(details))


def budgets(report: Report) -> list[str]:
    """A line for each budget; of many, one on those that were held, and the broken ones by name."""
    arms = {name: arm for name, arm in report.arms.items() if arm.budget_held is not None}
    return words.lines("budgets.txt.j2", arms=arms, most=MOST_BUDGETS)


def compared(report: Report) -> tuple[ArmGroup, ArmGroup | None, list[ArmGroup]]:
    """The kind in focus, plain fine-tuning beside it, and the others."""
    every = settings(report)
    chosen = [setting for setting in every if setting.first.scale is None] or every
    groups = [
        ArmGroup(kind, [setting for setting in chosen if setting.first.kind == kind])
        for kind in dict.fromkeys(setting.first.kind for setting in chosen)
    ]
    regularised = [group for group in groups if group.kind != "none"]
    focus = next((g for g in regularised if g.kind == "tmkl"), (regularised or groups)[0])
    plain = next((g for g in groups if g.kind == "none" and g is not focus), None)
    return focus, plain, [group for group in groups if group not in (focus, plain)]


@dataclass(frozen=True, eq=False)
class ArmGroup:
    """The arms of one kind, taken together."""

    kind: str
    settings: Sequence[Setting]

    @property
    def arms(self) -> list[ArmResult]:
        """Every run of it."""
        return [arm for setting in self.settings for arm in setting.runs]

    @property
    def single(self) -> Setting | None:
        """Its setting, if it has but one."""
        return self.settings[0] if len(self.settings) == 1 else None

    @property
    def broken(self) -> bool:
        """Whether a perplexity is not finite."""
        values = [v for arm in self.arms for v in (arm.adaptation_ppl, *arm.retention_ppl.values())]
        return any(value is not None and not math.isfinite(value) for value in values)

    @cached_property
    def learned_change(self) -> Interval | None:
        """Change of adaptation perplexity in percent, of one setting."""
        return self.single.interval(None) if self.single else None

    @cached_property
    def forgot_interval(self) -> Interval | None:
        """Rise of the worst corpus, of one setting."""
        worst = self.single.worst if self.single else None
        return self.single.interval(worst[0]) if self.single and worst else None

    @cached_property
    def learned(self) -> Span | None:
        """Adaptation perplexity: the mean of one setting with intervals, else the range."""
        if self.single and self.learned_change and self.single.learned is not None:
            return (self.single.learned, self.single.learned)
        return _range([arm.adaptation_ppl for arm in self.arms])

    @cached_property
    def forgot(self) -> Span | None:
        """Rise of an arm's worst corpus: the mean of one setting, else the range."""
        if self.single and self.single.worst and self.forgot_interval:
            return (self.single.worst[1], self.single.worst[1])
        return _range([worst and worst[1] for worst in (arm.worst() for arm in self.arms)])

    @property
    def worst(self) -> list[str]:
        """The corpora that its arms lost most on."""
        if self.single and self.single.worst and self.forgot_interval:
            return [self.single.worst[0]]
        return list(dict.fromkeys(worst[0] for arm in self.arms if (worst := arm.worst())))

    @property
    def forgot_little(self) -> bool:
        """Whether its worst rise is next to nothing, and surely so."""
        ends = self.forgot_interval
        little = self.forgot is not None and self.forgot[1] <= SAME_INCREASE_POINTS
        return little and not (ends and ends.high > SAME_INCREASE_POINTS)


@dataclass(frozen=True, eq=False)
class Pair:
    """Two groups side by side, and where each is one setting the differences between them."""

    focus: ArmGroup
    plain: ArmGroup

    @property
    def singles(self) -> tuple[Setting, Setting] | None:
        """Both settings, if there is one on either side."""
        one, other = self.focus.single, self.plain.single
        return (one, other) if one and other else None

    @cached_property
    def learned(self) -> Interval | None:
        """Percent by which the focus's adaptation perplexity is above the other's."""
        return learned_more(*self.singles) if self.singles else None

    @cached_property
    def forgot(self) -> Interval | None:
        """Points by which the focus's worst corpus rose more than the other's."""
        return forgot_more_at_worst(*self.singles) if self.singles else None

    @cached_property
    def learned_order(self) -> str | None:
        """How the focus's adaptation perplexity lies to the other's; None: not known."""
        factor = 1 + SAME_PPL_PCT / 100
        least = 100 * math.expm1(-math.log1p(SAME_PPL_PCT / 100))  # as far below as above: in nats
        spans = self.focus.learned, self.plain.learned
        return _order(spans, self.learned, (least, SAME_PPL_PCT), lambda a, b: a > b * factor)

    @cached_property
    def forgot_order(self) -> str | None:
        """The same of the rises of their worst corpora."""
        most, spans = SAME_INCREASE_POINTS, (self.focus.forgot, self.plain.forgot)
        return _order(spans, self.forgot, (-most, most), lambda a, b: a > b + most)

    @property
    def is_unsure(self) -> bool:
        """Whether one setting is said to be above or below another by the bare figures."""
        bare = (self.learned_order and not self.learned) or (self.forgot_order and not self.forgot)
        return bool(
            self.singles and bare and {self.learned_order, self.forgot_order} & {"more", "less"}
        )

    @property
    def has_seeds(self) -> bool:
        """Whether the intervals of its differences are over seeds as well."""
        return min(len(self.focus.arms), len(self.plain.arms)) >= FEWEST_SEEDS


def _range(values: Sequence[float | None]) -> Span | None:
    known = [value for value in values if value is not None and math.isfinite(value)]
    return (min(known), max(known)) if known and len(known) == len(values) else None


def _order(
    spans: tuple[Span | None, Span | None],
    difference: Interval | None,
    same: Span,
    above: Callable[[float, float], bool],
) -> str | None:
    """How one range lies to another: more, less, same, overlap or unclear; None: not known.

    Args:
        spans: the two.
        difference: between them; None: the ranges are compared.
        same: an interval within these bounds says that they are about the same.
        above: whether one figure is more than about the same as another.
    """
    one, other = spans
    if one is None or other is None:
        return None
    if difference:
        if difference.low >= same[0] and difference.high <= same[1]:
            return "same"
        sign = "more" if difference.value > 0 else "less"
        return sign if difference.is_clear else "unclear"
    if not any(above(x, y) or above(y, x) for x in one for y in other):
        return "same"
    if above(one[0], other[1]):
        return "more"
    return "less" if above(other[0], one[1]) else "overlap"
