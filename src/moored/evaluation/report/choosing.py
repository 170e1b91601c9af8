"""Which setting to take: the knee between learning and forgetting, and how sure that choice is.

How it is drawn is `frontier.py`'s.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moored.evaluation.report import bootstrap
from moored.evaluation.report.comparing import Setting, on_shared_corpora, settings
from moored.evaluation.report.results import Report
from moored.evaluation.report.words import clean, kind_name, percent

# Forgetting below this is nothing to weigh against.
NEXT_TO_NOTHING_PCT = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Recommendation:
    """The setting to take of several.

    Attributes:
        setting: the one.
        adapter: its arm to take: of several seeds the one with the median worst corpus.
        num_settings: that it was chosen of.
        learned: its share of the most that any of them learned, 0 to 1.
        forgot: percent on its worst corpus.
        most_forgot: percent on the worst corpus of the one that forgot most.
        agreement: share of resamples in which it is chosen as well; None without blocks.
    """

    setting: Setting
    adapter: str
    num_settings: int
    learned: float
    forgot: float
    most_forgot: float
    agreement: float | None

    @property
    def is_knee(self) -> bool:
        """Whether there was forgetting to weigh learning against."""
        return self.most_forgot > NEXT_TO_NOTHING_PCT

    @property
    def in_words(self) -> str:
        """Why it is the one, as the end of a sentence."""
        most = percent(self.most_forgot)
        if not self.is_knee:
            return f"learned most; none forgot more than {most}"
        return (
            f"is the knee: {self.learned:.0%} of what was learned at most, with "
            f"{percent(self.forgot)} of retention perplexity at worst, against {most} at most"
        )

    @property
    def how_sure(self) -> str:
        """The share of resamples that agree, in brackets; nothing where it is not known."""
        if self.agreement is None:
            return ""
        return f" (so in {100 * self.agreement:.0f} of 100 resamples)"


def choose(groups: Sequence[Setting], before: float | None) -> Recommendation | None:
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


def recommendations(report: Report) -> tuple[Recommendation | None, list[str]]:
    """The setting to take of all, and a line on it and on every adapter measured at scales."""
    every, before = settings(on_shared_corpora(report)), report.base.adaptation_ppl
    kept = [group for group in every if not any(arm.budget_held is False for arm in group.runs)]
    groups = kept or every  # who broke a budget is not recommended, unless all did
    families: dict[tuple[object, ...], list[Setting]] = {}
    for group in groups:
        one = group.first
        key = (one.setting, one.kind, one.weight, one.direction, one.temperature, one.adapter)
        families.setdefault((*key, *group.seeds), []).append(group)
    lines: list[str] = []
    for family in families.values():
        scaled = any(group.first.scale is not None for group in family)
        if scaled and (best := choose(family, before)):
            of = f"Of {best.num_settings} scales of the adapter ({kind_name(family[0].first.kind)})"
            scale = 1.0 if best.setting.first.scale is None else best.setting.first.scale
            sure = best.how_sure if best.is_knee else ""
            lines.append(f"{of}, {scale:g} {best.in_words}{sure}.")
    choice = choose(groups, before)
    if choice and len(families) > 1:
        name, num_seeds = clean(choice.setting.name, 40), len(choice.setting.arms)
        take = f" Take {clean(choice.adapter, 60)}, the median of {num_seeds} seeds."
        lines.append(
            f"Of {choice.num_settings} settings, {name} {choice.in_words}{choice.how_sure}."
            f"{take if num_seeds > 1 else ''}"
        )
    return choice, lines
