"""Several reports over one base as one.

Nothing is read or written here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

from moored.evaluation.report.results import ArmResult, BaseResult, Report
from moored.utils.errors import UserError

# Two measurements of one base on one text may differ by rounding, not by more than this.
BASE_RELATIVE_TOLERANCE = 1e-3

# What two measurements of one base agree in, as a whole or where both know a text; not in its
# answers, since rounding may flip a greedy choice: the first report's are taken.
_SAME = (
    "model",
    "revision",
    "quantization",
    "adaptation_ppl",
    "num_adaptation_tokens",
    "num_adaptation_prompts",
    "num_instructions",
    "num_instruction_prompts",
    "retention_ppl",
    "num_tokens",
)


def merge(reports: Sequence[Report], *, labels: Sequence[str] | None = None) -> Report:
    """Reports over one base as a single report.

    Arms keep their names where these are unique; otherwise every arm is named by its kind, and by
    weight, direction, temperature, seed, adapter and at last `labels` where these vary.

    Args:
        reports: at least one.
        labels: what to call each report in errors and in the names of otherwise equal arms.

    Raises:
        UserError: the bases differ; the line says in what.
    """
    if not reports:
        raise UserError("no report to merge: name at least one run")
    labels = list(labels or [f"report {i + 1}" for i in range(len(reports))])
    base, settings = reports[0].base, dict(reports[0].settings)
    for label, other in zip(labels[1:], reports[1:], strict=True):
        if differences := _differences(base, other.base):
            raise UserError(
                f"{labels[0]} and {label} do not share a base: they differ in "
                f"{', '.join(differences)}: report them apart, or evaluate both on the same model "
                "and texts"
            )
        base = replace(
            base,
            **{
                item.name: _filled(getattr(base, item.name), getattr(other.base, item.name))
                for item in fields(base)
                if item.name != "revision"
            },
        )
        for key, value in other.settings.items():
            seen = settings.setdefault(key, value)
            if value not in seen.split("; "):
                settings[key] = f"{seen}; {value}"
    arms = [
        (name, arm, label)
        for report, label in zip(reports, labels, strict=True)
        for name, arm in report.arms.items()
    ]
    names = [name for name, _, _ in arms]
    if len(set(names)) < len(names):
        names = _names([arm for _, arm, _ in arms], [label for _, _, label in arms])
    merged = {name: arm for name, (_, arm, _) in zip(names, arms, strict=True)}
    return Report(base=base, arms=merged, settings=settings)


def _filled(first: Any, second: Any) -> Any:
    """One report's figures, and of what it did not measure the other's."""
    if isinstance(first, dict):
        return first | {key: value for key, value in second.items() if first.get(key) is None}
    return second if first is None else first


def _differences(one: BaseResult, other: BaseResult) -> list[str]:
    pairs: dict[str, tuple[Any, Any]] = {}
    for name in _SAME:
        mine, theirs = getattr(one, name), getattr(other, name)
        if isinstance(mine, dict):
            pairs |= {f"{name}.{key}": (mine[key], theirs[key]) for key in mine if key in theirs}
        else:
            pairs[name] = mine, theirs
    return [
        f"{name} ({_figure(a)} and {_figure(b)})" for name, (a, b) in pairs.items() if _differ(a, b)
    ]


def _figure(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _differ(a: object, b: object) -> bool:
    if a is None or b is None:
        return False  # not measured in one of them
    if isinstance(a, float) and isinstance(b, float):
        both_nan = math.isnan(a) and math.isnan(b)
        return not both_nan and not math.isclose(a, b, rel_tol=BASE_RELATIVE_TOLERANCE)
    return a != b


def _names(arms: Sequence[ArmResult], labels: Sequence[str]) -> list[str]:
    names: list[str] = []
    for arm in arms:
        name = arm.kind
        same = [other for other in arms if other.kind == arm.kind]
        for key in ("weight", "direction", "temperature", "seed", "adapter", "scale"):
            value = getattr(arm, key)
            if value is not None and len({getattr(other, key) for other in same}) > 1:
                shown = f"{value:g}" if isinstance(value, float) else str(value)
                name += f"-{shown}" if isinstance(value, str) else f"-{key}{shown}"
        names.append(name)
    twice = {name for name in names if names.count(name) > 1}
    names = [f"{n}-{label}" if n in twice else n for n, label in zip(names, labels, strict=True)]
    counted = [names[: i + 1].count(name) for i, name in enumerate(names)]
    return [f"{n}-{many}" if many > 1 else n for n, many in zip(names, counted, strict=True)]
