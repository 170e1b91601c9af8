"""What of a report can be placed in the frontier plot: each setting's figures and intervals.

Pixels are `figures.py`'s.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from moored.evaluation.report import words
from moored.evaluation.report.comparing import Setting, on_shared_corpora, settings, shared_corpora
from moored.evaluation.report.results import Report

Span = tuple[float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """What of a setting can be drawn.

    Attributes:
        name: of the setting.
        first: the name of its first run.
        kind: its regulariser.
        learned: adaptation perplexity.
        worst: rise of its worst corpus in percent.
        increases: of every corpus.
        across: interval of `learned`; None where there is none.
        along: interval of `worst`.
        runs: both figures of each run, where there are several.
        tip: all of it in words.
    """

    name: str
    first: str
    kind: str
    learned: float
    worst: float
    increases: dict[str, float]
    across: Span | None
    along: Span | None
    runs: list[Span]
    tip: str

    @property
    def perplexities(self) -> list[float]:
        """Everything that stands on the horizontal axis."""
        return [self.learned, *(self.across or ()), *(run[0] for run in self.runs)]

    @property
    def rises(self) -> list[float]:
        """Everything that stands on the vertical axis."""
        return [*self.increases.values(), *(self.along or ()), *(run[1] for run in self.runs)]


def spots_of(report: Report) -> list[Placed]:
    """The settings that can be drawn; of one with a broken run, its other runs alone."""
    result: list[Placed] = []
    # Without a text in common each stands at its own worst: the caveats say so.
    for group in settings(on_shared_corpora(report) if shared_corpora(report) else report):
        whole = _placed(group)
        alone = [_placed(Setting(arms={name: arm})) for name, arm in group.arms.items()]
        result += [spot for spot in ([whole] if whole else alone) if spot]
    return result


def _placed(group: Setting) -> Placed | None:
    worst, learned = group.worst, group.learned
    if worst is None or learned is None or not math.isfinite(worst[1]):
        return None
    increases = {corpus: pct for corpus, pct in group.increases.items() if math.isfinite(pct)}
    across, along = group.learned_interval(), group.increase(worst[0])
    each = ", ".join(f"{words.clean(c, 40)} {words.percent(p)}" for c, p in increases.items())
    many = f" (mean of {len(group.arms)} seeds)" if len(group.arms) > 1 else ""
    one = words.ppl(learned)
    if across:
        one += f" [{words.ppl(across.low)}, {words.ppl(across.high)}]"
    two = (
        f", at worst {words.percent(worst[1])} {words.bounds(along.low, along.high)}"
        if along
        else ""
    )
    runs: list[Span] = []
    if len(group.arms) > 1:
        pairs = [(arm.adaptation_ppl, arm.worst()) for arm in group.runs]
        runs = [(ppl, pair[1]) for ppl, pair in pairs if ppl is not None and pair is not None]
    return Placed(
        name=group.name,
        first=next(iter(group.arms)),
        kind=group.first.kind,
        learned=learned,
        worst=worst[1],
        increases=increases,
        across=(across.low, across.high) if across else None,
        along=(along.low, along.high) if along else None,
        runs=runs,
        tip=(
            f"{words.clean(group.name, 80)}{many}: adaptation perplexity {one}; retention "
            f"{each}{two}"
        ),
    )
