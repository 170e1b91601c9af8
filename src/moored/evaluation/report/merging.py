"""Several reports over one base as one.

Nothing is read or written here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from moored.evaluation.report.results import ArmResult, BaseResult, Report
from moored.utils.errors import UserError

# Two measurements of one base on one text may differ by rounding, not by more than this.
BASE_RELATIVE_TOLERANCE = 1e-3


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
        _require_same_base(base, other.base, labels[0], label)
        base = replace(
            base,
            retention_ppl=_union(base.retention_ppl, other.base.retention_ppl),
            num_tokens=_union(base.num_tokens, other.base.num_tokens),
            last_word_accuracy=_union(base.last_word_accuracy, other.base.last_word_accuracy),
            last_word_tallies=_union(base.last_word_tallies, other.base.last_word_tallies),
            lm_eval=_union(base.lm_eval, other.base.lm_eval),
            **{
                name: getattr(other.base, name)
                for name in _BASE_FIGURES
                if getattr(base, name) is None
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


# Of these two measurements of one base agree; of its answers not, since rounding may flip a greedy
# choice: the first report's are taken.
_SAME_FIGURES = (
    "adaptation_ppl",
    "num_adaptation_tokens",
    "num_adaptation_prompts",
    "num_instructions",
    "num_instruction_prompts",
)
_BASE_FIGURES = (
    *_SAME_FIGURES,
    "adaptation_exact_match",
    "instruction_following",
    "instruction_prompts_followed",
    "exact_match_tally",
    "instruction_tally",
)


def _union(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    return first | {key: value for key, value in second.items() if first.get(key) is None}


def _require_same_base(one: BaseResult, other: BaseResult, first: str, second: str) -> None:
    pairs: dict[str, tuple[Any, Any]] = {
        name: (getattr(one, name), getattr(other, name))
        for name in ("model", "revision", "quantization", *_SAME_FIGURES)
    }
    for name in ("retention_ppl", "num_tokens"):
        mine, theirs = getattr(one, name), getattr(other, name)
        pairs |= {f"{name}.{key}": (mine[key], theirs[key]) for key in mine if key in theirs}
    differences = [
        f"{name} ({_figure(a)} and {_figure(b)})" for name, (a, b) in pairs.items() if _differ(a, b)
    ]
    if differences:
        raise UserError(
            f"{first} and {second} do not share a base: they differ in {', '.join(differences)}: "
            "report them apart, or evaluate both on the same model and texts"
        )


def _figure(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _differ(a: object, b: object) -> bool:
    if a is None or b is None:
        return False  # not measured in one of them
    if isinstance(a, float) and isinstance(b, float):
        if math.isnan(a) or math.isnan(b):
            return math.isnan(a) != math.isnan(b)
        return not math.isclose(a, b, rel_tol=BASE_RELATIVE_TOLERANCE)
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
    seen: dict[str, int] = {}
    for i, name in enumerate(names):
        seen[name] = seen.get(name, 0) + 1
        if seen[name] > 1:
            names[i] = f"{name}-{seen[name]}"
    return names
