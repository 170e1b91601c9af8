"""Runs taken together: the seeds of one setting, how settings differ, and which one to take.

What is said of it is `headline.py`'s; how resampling works is `bootstrap.py`'s.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from moored.evaluation.report import bootstrap
from moored.evaluation.report.bootstrap import Interval, Statistic, increase_pct
from moored.evaluation.report.results import ArmResult, Blocks, Report, badness

# What two runs share that differ in nothing but their seed, as far as a report without a digest of
# their recipes knows.
SETTING = ("kind", "weight", "direction", "temperature", "adapter", "scale", "num_steps")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The runs of one setting, by their names in the order of their seeds; mostly there is one.

    Figures of several runs are means: geometric of perplexities, arithmetic of increases.
    """

    arms: dict[str, ArmResult]

    @property
    def runs(self) -> list[ArmResult]:
        """The runs alone."""
        return list(self.arms.values())

    @property
    def first(self) -> ArmResult:
        """One of the runs, for what they have in common."""
        return self.runs[0]

    @cached_property
    def name(self) -> str:
        """The run's, or what the names of all runs have in common."""
        without = {re.sub(r"-seed-?\d+", "", name) for name in self.arms}
        common = without.pop() if len(self.arms) > 1 and len(without) == 1 else ""
        return common or next(iter(self.arms))

    @property
    def seeds(self) -> list[int | None]:
        """The runs' seeds: runs of two settings with the same ones are pairs."""
        return [arm.seed for arm in self.runs]

    @property
    def learned(self) -> float | None:
        """Adaptation perplexity, if every run has a finite one."""
        known = [ppl for arm in self.runs if (ppl := arm.adaptation_ppl) and math.isfinite(ppl)]
        if len(known) < len(self.runs) or min(known) <= 0:
            return None
        return known[0] if len(known) == 1 else math.exp(_mean([math.log(ppl) for ppl in known]))

    @cached_property
    def increases(self) -> dict[str, float]:
        """Rise of each corpus in percent, where every run has one."""
        rises = {
            corpus: [arm.retention_increase_pct.get(corpus) for arm in self.runs]
            for corpus in self.first.retention_increase_pct
        }
        known = {corpus: [v for v in each if v is not None] for corpus, each in rises.items()}
        return {corpus: _mean(v) for corpus, v in known.items() if len(v) == len(self.runs)}

    @property
    def worst(self) -> tuple[str, float] | None:
        """The corpus that rose most, and by how many percent; NaN counts as most."""
        return max(self.increases.items(), key=lambda item: badness(item[1]), default=None)

    def blocks(self, corpus: str | None) -> list[Blocks]:
        """Every run's sums on a corpus (None: the new task's text); empty where one lacks them."""
        each = [
            arm.adaptation_blocks if corpus is None else arm.retention_blocks.get(corpus)
            for arm in self.runs
        ]
        known = [blocks for blocks in each if blocks is not None]
        return known if len(known) == len(each) else []

    def interval(self, corpus: str | None, of: Statistic = increase_pct) -> Interval | None:
        """A figure of a text (None: the new task's), with its interval; by default its rise."""
        return bootstrap.interval(self.blocks(corpus), of)

    def median(self) -> str:
        """The run whose worst corpus is the median: the one to take of several seeds."""
        worst = {
            name: pair[1] if (pair := a.worst()) else math.inf for name, a in self.arms.items()
        }
        return sorted(worst, key=lambda name: badness(worst[name]))[(len(worst) - 1) // 2]


def settings(report: Report) -> list[Setting]:
    """The arms by setting, in their order. Runs without a seed of their own stand alone."""
    groups: dict[tuple[object, ...], dict[str, ArmResult]] = {}
    for name, arm in report.arms.items():
        known = (arm.setting, arm.scale) if arm.setting is not None else ()
        key = known or tuple(getattr(arm, each) for each in SETTING)
        groups.setdefault(key, {})[name] = arm
    result: list[Setting] = []
    for arms in groups.values():
        seeds = [arm.seed for arm in arms.values()]
        if None in seeds or len(set(seeds)) < len(seeds):
            # Not seeds of one setting: they differ in what the report does not know.
            result += [Setting(arms={name: arm}) for name, arm in arms.items()]
        else:
            ordered = sorted(arms.items(), key=lambda item: item[1].seed or 0)
            result.append(Setting(arms=dict(ordered)))
    order = list(report.arms)
    return sorted(result, key=lambda setting: min(order.index(name) for name in setting.arms))


def shared_corpora(report: Report) -> list[str]:
    """The retention corpora of every arm that has any: only on these are they compared."""
    known = [list(a.retention_increase_pct) for a in report.arms.values() if a.retention_ppl]
    return [name for name in known[0] if all(name in other for other in known)] if known else []


def on_shared_corpora(report: Report) -> Report:
    """The report with the rises of `shared_corpora` alone, so that `worst` is of the same texts."""
    shared = shared_corpora(report)
    arms = {
        name: replace(
            arm,
            retention_increase_pct={
                corpus: rise
                for corpus, rise in arm.retention_increase_pct.items()
                if corpus in shared
            },
        )
        for name, arm in report.arms.items()
    }
    return replace(report, arms=arms)


def increase_interval(arm: ArmResult, corpus: str) -> Interval | None:
    """The interval of one run's rise of a corpus: from its sums, else as it was reported."""
    value = arm.retention_increase_pct.get(corpus)
    if value is None or not math.isfinite(value):
        return None
    blocks = arm.retention_blocks.get(corpus)
    resampled = bootstrap.interval([blocks]) if blocks else None
    ends = arm.retention_increase_interval_pct.get(corpus)
    if resampled is None and ends is not None:
        return Interval(value=value, low=ends[0], high=ends[1])
    return resampled


def learned_more(ours: Setting, theirs: Setting) -> Interval | None:
    """Percent by which our adaptation perplexity is above theirs; less is better."""
    return bootstrap.ratio_pct(
        ours.blocks(None), theirs.blocks(None), same_seeds=ours.seeds == theirs.seeds
    )


def forgot_more(ours: Setting, theirs: Setting, corpus: str, other: str = "") -> Interval | None:
    """Points by which our rise of a corpus is above theirs (of the other one); less is better."""
    return bootstrap.difference(
        ours.blocks(corpus),
        theirs.blocks(other or corpus),
        same_text=other in ("", corpus),
        same_seeds=ours.seeds == theirs.seeds,
    )


def forgot_more_at_worst(ours: Setting, theirs: Setting) -> Interval | None:
    """Points by which our worst corpus rose more than theirs, which may be another one."""
    mine, other = ours.worst, theirs.worst
    return forgot_more(ours, theirs, mine[0], other[0]) if mine and other else None


def yardstick(groups: Sequence[Setting]) -> Setting:
    """What the others are compared with: plain fine-tuning as trained, else the first."""
    plain = [group for group in groups if group.first.kind == "none"]
    as_trained = [group for group in plain if group.first.scale is None]
    return [*as_trained, *plain, *groups][0]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


# ---------------------------------------------------------------- which setting to take

# Forgetting below this is nothing to weigh against.
NEXT_TO_NOTHING_PCT = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Recommendation:
    """The setting to take of several."""

    setting: Setting
    adapter: str  # its arm to take: of several seeds the one with the median worst corpus
    num_settings: int  # that it was chosen of
    learned: float  # its share of the most that any of them learned, 0 to 1
    forgot: float  # percent on its worst corpus
    most_forgot: float  # percent on the worst corpus of the one that forgot most
    agreement: float | None  # share of resamples in which it is chosen as well; None: no blocks
    of_scales: bool  # whether the settings are scales of one adapter

    @property
    def is_knee(self) -> bool:
        """Whether there was forgetting to weigh learning against."""
        return self.most_forgot > NEXT_TO_NOTHING_PCT


def choose(
    groups: Sequence[Setting], before: float | None, *, of_scales: bool = False
) -> Recommendation | None:
    """The knee: where the share of the learning exceeds that of the forgetting by most.

    Shares are of the most that any setting learned (in nats per token) and forgot (in percent on
    the worst corpus). Where nothing was forgotten it is the setting that learned most.

    Returns:
        None where there is nothing to choose from: fewer than two settings with both figures, or
        none that learned.
    """
    if before is None or not math.isfinite(before) or before <= 0:
        return None
    points = [
        (group, math.log(before / group.learned), worst[1])
        for group in groups
        if (worst := group.worst) and math.isfinite(worst[1]) and group.learned is not None
    ]
    if len(points) < 2:
        return None
    learned = np.array([point[1] for point in points])
    forgot = np.array([point[2] for point in points])
    if learned.max() <= 0:
        return None
    best = int(_knee(learned[:, None], forgot[:, None])[0])
    return Recommendation(
        setting=points[best][0],
        adapter=points[best][0].median(),
        num_settings=len(points),
        learned=float(learned[best] / learned.max()),
        forgot=float(forgot[best]),
        most_forgot=float(forgot.max()),
        agreement=_agreement([point[0] for point in points], best),
        of_scales=of_scales,
    )


def _knee(learned: np.ndarray, forgot: np.ndarray) -> np.ndarray:
    """Index of the chosen one of the settings (rows), for each column."""
    most_learned, most_forgot = learned.max(0), forgot.max(0)
    with np.errstate(all="ignore"):
        lead = learned / most_learned - np.maximum(0.0, forgot) / most_forgot
    little = most_forgot <= NEXT_TO_NOTHING_PCT
    return np.where(little, learned, lead).argmax(0)


def _agreement(groups: Sequence[Setting], best: int) -> float | None:
    """How often resampled texts and seeds give the same choice."""
    learned: list[np.ndarray] = []
    forgot: list[np.ndarray] = []
    for group in groups:
        gain = bootstrap.resampled(group.blocks(None), bootstrap.gain)
        # Every text is drawn on its own, the same for all settings.
        rises = [
            bootstrap.resampled(group.blocks(corpus), seed=i + 1)
            for i, corpus in enumerate(sorted(group.increases))
        ]
        known = [rise for rise in rises if rise is not None]
        if gain is None or not known or len(known) < len(rises):
            return None
        learned.append(gain)
        forgot.append(np.max(known, axis=0))
    chosen = _knee(np.stack(learned), np.stack(forgot))
    return float((chosen[1:] == best).mean())


def recommendations(report: Report) -> tuple[Recommendation | None, list[Recommendation]]:
    """The setting to take of all, and what is to be said: of every adapter's scales, and of all."""
    every, before = settings(on_shared_corpora(report)), report.base.adaptation_ppl
    kept = [group for group in every if not any(arm.budget_held is False for arm in group.runs)]
    groups = kept or every  # who broke a budget is not recommended, unless all did
    families: dict[tuple[object, ...], list[Setting]] = {}
    for group in groups:
        one = group.first
        key = (one.setting, one.kind, one.weight, one.direction, one.temperature, one.adapter)
        families.setdefault((*key, *group.seeds), []).append(group)
    choice = choose(groups, before)
    said = [
        choose(family, before, of_scales=True)
        for family in families.values()
        if any(group.first.scale is not None for group in family)
    ]
    said += [choice] if len(families) > 1 else []
    return choice, [one for one in said if one]
