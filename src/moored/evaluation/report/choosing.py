"""Which setting to take: the knee between learning and forgetting, and how sure that choice is.

How it is drawn is `figures.py`'s.
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
    known = [(g, g.learned, w[1]) for g in groups if (w := g.worst) and math.isfinite(w[1])]
    points = [(g, math.log(before / ppl), forgot) for g, ppl, forgot in known if ppl is not None]
    if len(points) < 2:
        return None
    learned = np.array([point[1] for point in points])
    forgot = np.array([point[2] for point in points])
    if learned.max() <= 0:
        return None
    best = int(_knee(learned[:, None], forgot[:, None])[0])
    chosen = points[best][0]
    return Recommendation(
        setting=chosen,
        adapter=chosen.median(),
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
        families.setdefault((*key, *(arm.seed for arm in group.runs)), []).append(group)
    choice = choose(groups, before)
    lines: list[str] = []
    for family in families.values():
        if any(group.first.scale is not None for group in family):
            found = choose(family, before)
            lines += [_of_scales(found)] if found else []
    if choice and len(families) > 1:
        lines.append(_of_settings(choice))
    return choice, lines


def _of_scales(choice: Recommendation) -> str:
    first = choice.setting.first
    of = f"Of {choice.num_settings} scales of the adapter ({kind_name(first.kind)})"
    scale = 1.0 if first.scale is None else first.scale
    if not choice.is_knee:
        return f"{of}, {scale:g} learned most; none forgot more than {percent(choice.most_forgot)}."
    return f"{of}, {scale:g} is the knee: {_shares(choice)}{_sure(choice)}."


def _of_settings(choice: Recommendation) -> str:
    name = clean(choice.setting.name, 40)
    of = f"Of {choice.num_settings} settings, {name}"
    take = ""
    if len(choice.setting.arms) > 1:
        take = f" Take {clean(choice.adapter, 60)}, the median of {len(choice.setting.arms)} seeds."
    if not choice.is_knee:
        most = percent(choice.most_forgot)
        return f"{of} learned most; none forgot more than {most}{_sure(choice)}.{take}"
    return f"{of} is the knee: {_shares(choice)}{_sure(choice)}.{take}"


def _shares(choice: Recommendation) -> str:
    return (
        f"{choice.learned:.0%} of what was learned at most, with {percent(choice.forgot)} of "
        f"retention perplexity at worst, against {percent(choice.most_forgot)} at most"
    )


def _sure(choice: Recommendation) -> str:
    if choice.agreement is None:
        return ""
    return f" (so in {100 * choice.agreement:.0f} of 100 resamples)"
