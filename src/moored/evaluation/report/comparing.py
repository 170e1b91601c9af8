"""Runs taken together: the seeds of one setting, and how settings differ, with their intervals.

What is said of it is `headline.py`'s; how resampling works is `bootstrap.py`'s.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from moored.evaluation.report import bootstrap
from moored.evaluation.report.bootstrap import Interval
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

    def increase(self, corpus: str) -> Interval | None:
        """The rise of a corpus in percent, with its interval."""
        return bootstrap.interval(self.blocks(corpus))

    def learned_interval(self) -> Interval | None:
        """Adaptation perplexity with its interval."""
        nats = bootstrap.interval(self.blocks(None), bootstrap.log_perplexity)
        return nats and nats.map(math.exp)

    def change_interval(self) -> Interval | None:
        """Adaptation perplexity against the base's, in percent."""
        return bootstrap.interval(self.blocks(None))

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
