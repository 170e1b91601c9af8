"""The headline: what was learned and what was forgotten, in one sentence computed from the figures.

It says as readily that nothing was learned, that the regulariser did harm, or that two runs cannot
be told apart. How numbers are shown is `words.py`'s, how runs are compared `comparing.py`'s.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from moored.evaluation.report.bootstrap import FEWEST_SEEDS, Interval
from moored.evaluation.report.choosing import recommendations
from moored.evaluation.report.comparing import (
    Setting,
    forgot_more_at_worst,
    learned_more,
    on_shared_corpora,
    settings,
)
from moored.evaluation.report.results import ArmResult, Report
from moored.evaluation.report.words import bounds, clean, kind_name, percent, points, ppl

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
    before = report.base.adaptation_ppl
    broken = next((group for group in shown if group.broken), None)
    details = [group.detail(before) for group in [*shown, *(rest if len(rest) <= 2 else [])]]
    if len(rest) > 2:
        details.append(f"{len(rest)} other regularisers: see the table.")
    if broken:
        title = f"{broken.subject} broke down: a perplexity is not finite."
    elif plain:
        pair = Pair(focus, plain)
        title = pair.title(before)
        details += pair.details()
    else:
        title = focus.title(before)
    details += budgets(report)
    return Headline(title=title, details=(*details, *recommendations(report)[1]))


def budgets(report: Report) -> list[str]:
    """A line for each budget; of many, one on those that were held, and the broken ones by name."""
    known = {name: arm for name, arm in report.arms.items() if arm.budget_held is not None}
    if len(known) <= MOST_BUDGETS:
        return [_budget(name, arm) for name, arm in known.items()]
    broken = [(name, arm) for name, arm in known.items() if not arm.budget_held]
    lines = [f"{len(known) - len(broken)} of {len(known)} forgetting budgets were held."]
    lines += [_budget(name, arm) for name, arm in broken[:MOST_BUDGETS]]
    if len(broken) > MOST_BUDGETS:
        lines.append(f"{len(broken) - MOST_BUDGETS} more were broken: see report.json.")
    return lines


def _budget(name: str, arm: ArmResult) -> str:
    lost = "not known" if arm.budget_lost is None else f"{arm.budget_lost:.3g}"
    verdict = "held" if arm.budget_held else "BROKEN"
    what = clean(arm.budget or "", 80)
    return f"The budget of {clean(name, 40)} ({what}) was {verdict}: the probe lost {lost}."


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
    def name(self) -> str:
        """As prose names it."""
        return kind_name(self.kind)

    @property
    def single(self) -> Setting | None:
        """Its setting, if it has but one."""
        return self.settings[0] if len(self.settings) == 1 else None

    @property
    def subject(self) -> str:
        """The name at the start of a sentence."""
        what = "seeds" if self.single else "arms"
        many = f" ({len(self.arms)} {what})" if len(self.arms) > 1 else ""
        return f"{self.name[0].upper()}{self.name[1:]}{many}"

    @property
    def broken(self) -> bool:
        """Whether a perplexity is not finite."""
        values = [v for arm in self.arms for v in (arm.adaptation_ppl, *arm.retention_ppl.values())]
        return any(value is not None and not math.isfinite(value) for value in values)

    @cached_property
    def learned_change(self) -> Interval | None:
        """Change of adaptation perplexity in percent, of one setting."""
        return self.single.change_interval() if self.single else None

    @cached_property
    def forgot_interval(self) -> Interval | None:
        """Rise of the worst corpus, of one setting."""
        worst = self.single.worst if self.single else None
        return self.single.increase(worst[0]) if self.single and worst else None

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
    def forgot_text(self) -> str:
        """The rise in words, with its interval where there is one."""
        assert self.forgot is not None
        ends = self.forgot_interval
        return _shown(self.forgot, percent) + (f" {bounds(ends.low, ends.high)}" if ends else "")

    @property
    def forgot_little(self) -> bool:
        """Whether its worst rise is next to nothing, and surely so."""
        ends = self.forgot_interval
        little = self.forgot is not None and self.forgot[1] <= SAME_INCREASE_POINTS
        return little and not (ends and ends.high > SAME_INCREASE_POINTS)

    def detail(self, before: float | None) -> str:
        """The group's figures in one line."""
        start = f"{ppl(before)} → " if before is not None else ""
        corpora = {worst[0] for arm in self.arms if (worst := arm.worst())}
        if self.single and self.single.worst and self.forgot_interval:
            corpora = {self.single.worst[0]}
        where = f" ({clean(min(corpora), 32)})" if len(corpora) == 1 else ""
        unknown = "not finite" if self.broken else "not known"
        one = f"{start}{_shown(self.learned, ppl)}" if self.learned else unknown
        two = f"{self.forgot_text} at worst{where}" if self.forgot else unknown
        ranges = ""
        if len(self.settings) > 1:
            ranges = f" (ranges over {len(self.settings)} arms that differ in more than the seed)"
        return f"{self.subject}: adaptation perplexity {one}; retention perplexity {two}{ranges}."

    def nothing(self, before: float | None) -> str | None:
        """How to say that no arm learned; None where one did, or it is not known."""
        learned, change = self.learned, self.learned_change
        if before is None or learned is None:
            return None
        unclear = change is not None and not change.is_clear
        if learned[0] >= before * (1 - SAME_PPL_PCT / 100):
            if learned[0] > before * (1 + SAME_PPL_PCT / 100) and not unclear:
                return "learned nothing and got worse at the task"
            wide = change and (change.low < -SAME_PPL_PCT or change.high > SAME_PPL_PCT)
            if not (unclear and wide):
                return "learned next to nothing"
        return "learned nothing that can be told from chance" if unclear else None

    def title(self, before: float | None) -> str:
        """One sentence on it alone."""
        nothing = self.nothing(before)
        if self.learned is None:
            learning = "what it learned was not measured"
        elif before is None:
            learning = f"reached adaptation perplexity {_shown(self.learned, ppl)}"
        else:
            change = f"adaptation perplexity {ppl(before)} → {_shown(self.learned, ppl)}"
            learning = f"{nothing or 'learned'} ({change})"
        little, ends = "", self.forgot_interval
        if self.forgot is None:
            forgetting = "what it forgot was not measured"
        else:
            if self.forgot_little:
                little = " nothing" if self.forgot[1] <= 0 else " next to nothing"
            elif ends and not ends.is_clear:
                little = " nothing that can be told from chance"
            forgetting = f"forgot{little} (retention perplexity {self.forgot_text} at worst)"
        if self.learned is None:
            return f"{self.subject} {forgetting}; {learning}."
        if self.forgot is None:
            return f"{self.subject} {learning}; {forgetting}."
        joint = "and" if bool(nothing) != bool(little) else "but"
        return f"{self.subject} {learning} {joint} {forgetting}."


# A group against another: below, about the same, above, ranges overlapping, or not told apart.
_UNCLEAR = 9
_LEARNED = {-1: "more than", 0: "about as much as", 1: "less than", None: "in the same range as"}
_FORGOT = {-1: "less", 0: "about as much", 1: "more", None: "in the same range"}


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

    def title(self, before: float | None) -> str:
        """One sentence on both."""
        focus, plain = self.focus, self.plain
        learned, forgot = (focus.learned, plain.learned), (focus.forgot, plain.forgot)
        nothing = focus.nothing(before)
        figures = learning = forgetting = ""
        learned_order = forgot_order = None
        if learned[0] and learned[1]:
            if nothing and plain.nothing(before):
                reached = " and ".join(_shown(span, ppl) for span in learned if span)
                drops = f"adaptation perplexity {ppl(before)} → {reached}"
                return f"Neither {focus.name} nor {plain.name} learned: {drops}."
            # As far below as above: in nats.
            least = 100 * math.expm1(-math.log1p(SAME_PPL_PCT / 100))
            factor = 1 + SAME_PPL_PCT / 100
            learned_order = _order(
                self.learned,
                least,
                SAME_PPL_PCT,
                learned[0],
                learned[1],
                lambda a, b: a > b * factor,
            )
            if nothing and learned_order == 1:
                learning = f"{nothing} where {plain.name} learned"
            elif learned_order == _UNCLEAR:
                learning = f"cannot be told apart from {plain.name} in what it learned"
            else:
                learning = f"learned {_LEARNED[learned_order]} {plain.name}"
        if forgot[0] and forgot[1]:
            most = SAME_INCREASE_POINTS
            forgot_order = _order(
                self.forgot, -most, most, forgot[0], forgot[1], lambda a, b: a > b + most
            )
            if forgot_order == _UNCLEAR:
                apart = "from it" if learning else f"from {plain.name}"
                forgetting = f"cannot be told apart {apart} in what it forgot"
            else:
                forgetting = f"forgot {_FORGOT[forgot_order]}"
            both = f"{_shown(forgot[0], percent)} against {_shown(forgot[1], percent)} at worst"
            figures = f": retention perplexity {both}"
            if plain.forgot_little and forgot_order != 1:
                figures += "; there was next to nothing to protect"
        # One setting is said to be above or below another by the bare figures.
        bare = bool(learning and not self.learned) or bool(forgetting and not self.forgot)
        if self.singles and bare and {learned_order, forgot_order} & {1, -1}:
            figures += "; no interval says how sure that is"
        if learning and forgetting:
            if learned_order == forgot_order == _UNCLEAR:
                neither = "neither in what it learned nor in what it forgot"
                return (
                    f"{focus.subject} cannot be told apart from {plain.name}, {neither}{figures}."
                )
            unclear = _UNCLEAR in (learned_order, forgot_order)
            joint = "and" if (learned_order == 1) == (forgot_order == 1) and not unclear else "but"
            return f"{focus.subject} {learning} {joint} {forgetting}{figures}."
        if learning:
            return f"{focus.subject} {learning}; what was forgotten was not measured."
        if forgetting:
            link = "as" if forgot_order in (0, None) else "than"
            versus = "" if forgot_order == _UNCLEAR else f" {link} {plain.name}"
            unknown = "what was learned was not measured"
            return f"{focus.subject} {forgetting}{versus}{figures}; {unknown}."
        return f"{focus.subject} and {plain.name}: too little was measured to compare them."

    def details(self) -> list[str]:
        """The differences behind the sentence, with their intervals; why there are none."""
        if not self.singles:
            return ["Several settings of a kind are compared by their ranges, without an interval."]
        said: list[str] = []
        intervals = "Paired 95 % intervals"
        if ends := self.learned:
            said.append(
                f"adaptation perplexity {percent(ends.value)} {bounds(ends.low, ends.high)}"
            )
        if ends := self.forgot:
            where = list(dict.fromkeys(clean(s.worst[0], 32) for s in self.singles if s.worst))
            if len(where) > 1:
                where[-1] += ", not paired"
                intervals = "95 % intervals, else paired,"
            by = f"{points(ends.value)} {bounds(ends.low, ends.high)}"
            said.append(f"retention perplexity at worst {by} ({' against '.join(where)})")
        if not said:
            return []
        seeds = min(len(self.focus.arms), len(self.plain.arms)) >= FEWEST_SEEDS
        over = "texts and seeds" if seeds else "texts"
        groups = f"{self.focus.subject} against {self.plain.name}"
        return [f"{groups}: {'; '.join(said)}. {intervals} over {over}."]


def _range(values: Sequence[float | None]) -> Span | None:
    known = [value for value in values if value is not None and math.isfinite(value)]
    return (min(known), max(known)) if known and len(known) == len(values) else None


def _shown(span: Span, show: Callable[[float], str]) -> str:
    low, high = map(show, span)
    return low if low == high else f"{low} to {high}"


def _order(
    difference: Interval | None,
    least: float,
    most: float,
    a: Span,
    b: Span,
    above: Callable[[float, float], bool],
) -> int | None:
    """Where a lies to b: 1 above, -1 below, 0 about the same, None overlapping, or not told apart.

    Args:
        difference: of a to b; None: ranges are compared.
        least: from here on a difference is about the same,
        most: up to here.
        a: a range.
        b: another.
        above: whether one figure is more than about the same as another.
    """
    if difference:
        if difference.low >= least and difference.high <= most:
            return 0
        sign = 1 if difference.value > 0 else -1
        return sign if difference.is_clear else _UNCLEAR
    if not any(above(x, y) or above(y, x) for x in a for y in b):
        return 0
    if above(a[0], b[1]):
        return 1
    return -1 if above(b[0], a[1]) else None
