"""The headline: what was learned and what was forgotten, in one sentence computed from the figures.

It says as readily that nothing was learned or that the regulariser did harm. How numbers are shown
is `words.py`'s.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from moored.report.results import ArmResult, Report
from moored.report.words import clean, kind_name, percent, ppl

# Within these, two arms are said to be about the same; the report states both.
SAME_PPL_PCT = 3.0
SAME_INCREASE_POINTS = 1.0

UNKNOWN, NOT_FINITE = "not known", "not finite"

Span = tuple[float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Headline:
    """What the figures say: one sentence, and the numbers behind it."""

    title: str
    details: tuple[str, ...]


def headline(report: Report) -> Headline:
    """What was learned and what was forgotten, as the figures have it.

    TMKL (else the first regulariser there is) is compared with plain fine-tuning where both are
    there. Several arms of one kind are compared by their whole ranges, so that one lucky arm of
    many cannot make the headline. Adapters at other scales than they were trained at stand in a
    line of their own.
    """
    trained = [arm for arm in report.arms.values() if arm.scale is None]
    arms = trained or list(report.arms.values())
    groups = [
        _Group(kind, [arm for arm in arms if arm.kind == kind])
        for kind in dict.fromkeys(arm.kind for arm in arms)
    ]
    regularised = [group for group in groups if group.kind != "none"]
    focus = next((g for g in regularised if g.kind == "tmkl"), (regularised or groups)[0])
    plain = next((g for g in groups if g.kind == "none" and g is not focus), None)
    shown = [focus, *([plain] if plain else [])]
    rest = [group for group in groups if group not in shown]
    before = report.base.adaptation_ppl
    broken = next((group for group in shown if group.broken), None)
    if broken:
        title = f"{broken.subject} broke down: a perplexity is not finite."
    elif plain:
        title = _compared(focus, plain, before)
    else:
        title = _alone(focus, before)
    details = [group.detail(before) for group in [*shown, *(rest if len(rest) <= 2 else [])]]
    if len(rest) > 2:
        details.append(f"{len(rest)} other regularisers: see the table.")
    return Headline(title=title, details=(*details, *_scales(report)))


@dataclass(frozen=True, slots=True)
class _Group:
    """The arms of one kind, taken together."""

    kind: str
    arms: Sequence[ArmResult]

    @property
    def name(self) -> str:
        return kind_name(self.kind)

    @property
    def subject(self) -> str:
        """The name at the start of a sentence."""
        many = f" ({len(self.arms)} arms)" if len(self.arms) > 1 else ""
        return f"{self.name[0].upper()}{self.name[1:]}{many}"

    @property
    def broken(self) -> bool:
        values = [arm.adaptation_ppl for arm in self.arms]
        values += [value for arm in self.arms for value in arm.retention_ppl.values()]
        return any(value is not None and not math.isfinite(value) for value in values)

    @property
    def learned(self) -> Span | None:
        """Least and greatest adaptation perplexity, if every arm has one."""
        return _range([arm.adaptation_ppl for arm in self.arms])

    @property
    def forgot(self) -> Span | None:
        """Least and greatest increase on an arm's worst corpus, if every arm has one."""
        worst = [arm.worst() for arm in self.arms]
        return _range([None if pair is None else pair[1] for pair in worst])

    def detail(self, before: float | None) -> str:
        """The group's figures in one line."""
        learned, forgot = self.learned, self.forgot
        start = f"{ppl(before)} → " if before is not None else ""
        corpora = {pair[0] for arm in self.arms if (pair := arm.worst())}
        where = f" ({clean(min(corpora), 32)})" if len(corpora) == 1 else ""
        unknown = NOT_FINITE if self.broken else UNKNOWN
        one = f"{start}{_shown(learned, ppl)}" if learned else unknown
        two = f"{_shown(forgot, percent)} at worst{where}" if forgot else unknown
        return f"{self.subject}: adaptation perplexity {one}; retention perplexity {two}."


def _scales(report: Report) -> list[str]:
    """For every adapter that was measured at several scales, which one to deploy, and why."""
    families: dict[tuple[object, ...], list[ArmResult]] = {}
    for arm in report.arms.values():
        key = (arm.kind, arm.weight, arm.direction, arm.temperature, arm.seed, arm.adapter)
        families.setdefault(key, []).append(arm)
    return [
        line
        for arms in families.values()
        if any(arm.scale is not None for arm in arms)
        and (line := _recommended(arms, report.base.adaptation_ppl)) is not None
    ]


def _recommended(arms: Sequence[ArmResult], before: float | None) -> str | None:
    """The knee: where the share of the learning exceeds that of the forgetting by most.

    Shares are of the most that any scale learned (in nats per token) and forgot (in percent on the
    worst corpus).
    """
    points: list[tuple[float, float, float]] = []
    for arm in arms:
        worst = arm.worst()
        if before is None or arm.adaptation_ppl is None or worst is None:
            return None
        learned = math.log(before / arm.adaptation_ppl) if arm.adaptation_ppl > 0 else math.nan
        points.append((1.0 if arm.scale is None else arm.scale, learned, worst[1]))
    points = sorted(point for point in points if all(map(math.isfinite, point)))
    most_learned = max((learned for _, learned, _ in points), default=0.0)
    most_forgot = max((forgot for _, _, forgot in points), default=0.0)
    if len(points) < 2 or most_learned <= 0:
        return None
    name = kind_name(arms[0].kind)
    if most_forgot <= SAME_INCREASE_POINTS:
        best = max(points, key=lambda point: point[1])
        return (
            f"Of {len(points)} scales of the adapter ({name}), {best[0]:g} learned most; none "
            f"forgot more than {percent(most_forgot)}."
        )
    best = max(points, key=lambda p: p[1] / most_learned - max(0.0, p[2]) / most_forgot)
    return (
        f"Of {len(points)} scales of the adapter ({name}), {best[0]:g} is the knee: "
        f"{best[1] / most_learned:.0%} of what was learned at most, with {percent(best[2])} of "
        f"retention perplexity at worst, against {percent(most_forgot)} at most."
    )


def _range(values: Sequence[float | None]) -> Span | None:
    known = [value for value in values if value is not None and math.isfinite(value)]
    return (min(known), max(known)) if known and len(known) == len(values) else None


def _shown(span: Span, show: Callable[[float], str]) -> str:
    low, high = map(show, span)
    return low if low == high else f"{low} to {high}"


def _nothing(before: float | None, learned: Span | None) -> str | None:
    """How to say that no arm learned; None where one did, or it is not known."""
    if before is None or learned is None or learned[0] < before * (1 - SAME_PPL_PCT / 100):
        return None
    worse = learned[0] > before * (1 + SAME_PPL_PCT / 100)
    return "learned nothing and got worse at the task" if worse else "learned next to nothing"


def _alone(group: _Group, before: float | None) -> str:
    learned, forgot = group.learned, group.forgot
    nothing = _nothing(before, learned)
    if learned is None:
        learning = "what it learned was not measured"
    elif before is None:
        learning = f"reached adaptation perplexity {_shown(learned, ppl)}"
    else:
        change = f"adaptation perplexity {ppl(before)} → {_shown(learned, ppl)}"
        learning = f"{nothing or 'learned'} ({change})"
    if forgot is None:
        forgetting = "what it forgot was not measured"
    elif forgot[1] <= SAME_INCREASE_POINTS:
        little = "nothing" if forgot[1] <= 0 else "next to nothing"
        forgetting = f"forgot {little} (retention perplexity {_shown(forgot, percent)} at worst)"
    else:
        forgetting = f"forgot (retention perplexity {_shown(forgot, percent)} at worst)"
    if learned is None:
        return f"{group.subject} {forgetting}; {learning}."
    if forgot is None:
        return f"{group.subject} {learning}; {forgetting}."
    joint = "and" if bool(nothing) == (forgot[1] > SAME_INCREASE_POINTS) else "but"
    return f"{group.subject} {learning} {joint} {forgetting}."


# A group's range against another's: below, about the same, above, or overlapping.
_LEARNED = {-1: "more than", 0: "about as much as", 1: "less than", None: "in the same range as"}
_FORGOT = {-1: "less", 0: "about as much", 1: "more", None: "in the same range"}


def _compared(focus: _Group, plain: _Group, before: float | None) -> str:
    """One sentence on two groups."""
    learned, forgot = (focus.learned, plain.learned), (focus.forgot, plain.forgot)
    nothing = [_nothing(before, span) for span in learned]
    figures = learning = forgetting = ""
    bad_learning = bad_forgetting = False
    order: int | None = None
    if learned[0] and learned[1]:
        order = _order(learned[0], learned[1], lambda a, b: a > b * (1 + SAME_PPL_PCT / 100))
        learning = f"learned {_LEARNED[order]} {plain.name}"
        bad_learning = order == 1
        if nothing[0] and nothing[1]:
            return f"Neither {focus.name} nor {plain.name} learned: {_drops(before, learned)}."
        if nothing[0]:
            learning, bad_learning = f"{nothing[0]} where {plain.name} learned", True
    if forgot[0] and forgot[1]:
        order = _order(forgot[0], forgot[1], lambda a, b: a > b + SAME_INCREASE_POINTS)
        forgetting = f"forgot {_FORGOT[order]}"
        bad_forgetting = order == 1
        both = f"{_shown(forgot[0], percent)} against {_shown(forgot[1], percent)} at worst"
        figures = f": retention perplexity {both}"
        if forgot[1][1] <= SAME_INCREASE_POINTS and order != 1:
            figures += "; there was next to nothing to protect"
    if learning and forgetting:
        joint = "and" if bad_learning == bad_forgetting else "but"
        return f"{focus.subject} {learning} {joint} {forgetting}{figures}."
    if learning:
        return f"{focus.subject} {learning}; what was forgotten was not measured."
    if forgetting:
        link = "as" if order in (0, None) else "than"
        lost = f"{forgetting} {link} {plain.name}{figures}"
        return f"{focus.subject} {lost}; what was learned was not measured."
    return f"{focus.subject} and {plain.name}: too little was measured to compare them."


def _drops(before: float | None, learned: Sequence[Span | None]) -> str:
    reached = " and ".join(_shown(span, ppl) for span in learned if span)
    return f"adaptation perplexity {ppl(before)} → {reached}"


def _order(a: Span, b: Span, above: Callable[[float, float], bool]) -> int | None:
    """Where range a lies to range b: 1 above, -1 below, 0 about the same, None overlapping."""
    if not any(above(x, y) or above(y, x) for x in a for y in b):
        return 0
    if above(a[0], b[1]):
        return 1
    return -1 if above(b[0], a[1]) else None
