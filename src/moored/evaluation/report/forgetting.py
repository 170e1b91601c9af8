"""What did it forget? Which arms, corpora and examples that section of the page shows, in order.

What is said of them is the template's, `forgetting.html.j2`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from moored.evaluation.report.choosing import Recommendation
from moored.evaluation.report.comparing import settings
from moored.evaluation.report.headline import compared
from moored.evaluation.report.results import ArmResult, Report, TokenChoice, TokenExample, Where

# A page must stay one that a person reads: what is beyond is counted, and is in report.json.
MOST_ARMS = 8
MOST_TEXTS_OPEN, MOST_TEXTS = 4, 1  # corpora taken apart: of arms that stand open, of others
MOST_SPOTS_WORST, MOST_SPOTS = 8, 3  # examples: of an arm's worst corpus, of others
MOST_TOKENS = 10
MOST_CHOICES = 3  # of each model


@dataclass(frozen=True, slots=True, kw_only=True)
class Forgotten:
    """What one arm forgot.

    Attributes:
        name: the arm's.
        arm: its figures.
        open: whether its details stand open.
        corpora: all of them: the worst first, then by how far they drifted.
        apart: corpora taken apart, their most telling tokens and worst examples, and how many
            examples are left out.
        num_texts_left: corpora that could be taken apart and are not.
    """

    name: str
    arm: ArmResult
    open: bool
    corpora: list[str]
    apart: list[tuple[str, Where, int]]
    num_texts_left: int

    @property
    def most_drift(self) -> float:
        """Its greatest drift on a corpus, nats per token."""
        return max(map(finite, self.arm.drift_nats_per_token.values()), default=0.0)


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
    corpora = sorted(
        report.corpora,
        key=lambda corpus: (
            corpus != (worst and worst[0]),
            -finite(arm.drift_nats_per_token.get(corpus)),
        ),
    )
    known = [corpus for corpus in corpora if corpus in arm.where]
    kept = known[: MOST_TEXTS_OPEN if is_open else MOST_TEXTS]
    apart: list[tuple[str, Where, int]] = []
    for i, corpus in enumerate(kept):
        where = arm.where[corpus]
        tokens = [item for item in where.tokens if math.isfinite(item.share)]
        tokens = sorted(tokens, key=lambda item: -item.share)[:MOST_TOKENS]
        spots = sorted(where.spots, key=lambda spot: -finite(spot.drift))
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
    by_base = sorted(known, key=lambda one: -finite(one.base))
    by_adapted = sorted(known, key=lambda one: -finite(one.adapted))
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
    return one.token == spot.target and math.isclose(
        one.base, spot.base, rel_tol=0.01, abs_tol=1e-6
    )


def finite(value: float | None) -> float:
    """A figure, or 0 where it is none."""
    return value if value is not None and math.isfinite(value) else 0.0
