"""What came of forgetting budgets, in words."""

from __future__ import annotations

from moored.evaluation.report.results import ArmResult, Report
from moored.evaluation.report.words import clean

MOST_NAMED = 4


def budgets(report: Report) -> list[str]:
    """A line for each budget; of many, one on those that were held, and the broken ones by name."""
    known = {name: arm for name, arm in report.arms.items() if arm.budget_held is not None}
    if len(known) <= MOST_NAMED:
        return [_says(name, arm) for name, arm in known.items()]
    broken = {name: arm for name, arm in known.items() if not arm.budget_held}
    lines = [f"{len(known) - len(broken)} of {len(known)} forgetting budgets were held."]
    lines += [_says(name, arm) for name, arm in list(broken.items())[:MOST_NAMED]]
    if len(broken) > MOST_NAMED:
        lines.append(f"{len(broken) - MOST_NAMED} more were broken: see report.json.")
    return lines


def _says(name: str, arm: ArmResult) -> str:
    lost = "not known" if arm.budget_lost is None else f"{arm.budget_lost:.3g}"
    verdict = "held" if arm.budget_held else "BROKEN"
    return (
        f"The budget of {clean(name, 40)} ({clean(arm.budget or '', 80)}) was {verdict}: the probe "
        f"lost {lost}."
    )


def watched(report: Report) -> list[str]:
    """Retention corpora that a controller saw, so that they say little of what it did not see."""
    found = dict.fromkeys(corpus for arm in report.arms.values() for corpus in arm.budget_watched)
    return list(found)
