"""The figures of one adapter as a report: what `evaluate.py` measured, put under their names.

Nothing is measured or drawn here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moored.config import Config
from moored.evaluation.evaluate import Evaluation
from moored.evaluation.generate import Answered
from moored.evaluation.report import (
    ArmResult,
    BaseResult,
    Report,
    TaskScore,
    increase_intervals,
    increase_pct,
    settings_of,
)
from moored.evaluation.report.suite_scores import suite_change, suite_mean
from moored.models.hub import ResolvedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedRun:
    """What training cost, for the report; zeros for an adapter that came from elsewhere."""

    num_steps: int = 0
    seconds: float = 0.0
    tokens: int = 0
    final_loss: float | None = None
    peak_memory_bytes: int | None = None
    weight: float | None = None  # that acted last, where a budget moved it
    budget_lost: float | None = None
    budget_held: bool | None = None
    # KL(base || policy) on targets that were learned, nats per token; without the true token; how
    # many they are.
    train_kl: float | None = None
    train_tmkl: float | None = None
    num_train_targets: int | None = None


def to_report(
    config: Config,
    source: ResolvedModel,
    name: str,
    after: Evaluation,
    training: TrainedRun,
    *,
    base_answered: Answered | None,
    num_prompts: int,
    trained_by: Config | None,
    scale: float | None = None,
    settings: Mapping[str, str] | None = None,
) -> Report:
    """The figures of one adapter as a report with one arm.

    Args:
        config: the recipe that it is measured by.
        source: the base's files.
        name: the arm's.
        after: measured with the adapter; it holds the base's figures beside the policy's.
        training: what training cost.
        base_answered: what the base's answers amount to.
        num_prompts: prompts behind the exact match.
        trained_by: the recipe that made the adapter; None where that is not known.
        scale: factor of what the adapter adds; None: as trained.
        settings: what else a reader needs to repeat it.
    """
    texts, task = after.retention, after.adaptation
    before = base_answered or Answered()
    followed, base_followed = after.answered.followed, before.followed
    exact = after.answered.exact_match
    last_words = {name: text.last_word for name, text in texts.items() if text.last_word}
    base_words = {name: text.base_last_word for name, text in texts.items() if text.base_last_word}
    base_ppl: dict[str, float | None] = {name: text.base_ppl for name, text in texts.items()}
    policy_ppl: dict[str, float | None] = {name: text.policy_ppl for name, text in texts.items()}
    base = BaseResult(
        model=config.model.name_or_path,
        revision=source.revision,
        quantization=config.model.quantization,
        adaptation_ppl=task.base_ppl if task else None,
        adaptation_exact_match=before.exact_match.share if before.exact_match else None,
        retention_ppl=base_ppl,
        num_tokens={name: text.num_tokens for name, text in texts.items()},
        num_adaptation_tokens=task.num_tokens if task else None,
        num_adaptation_prompts=num_prompts or None,
        last_word_accuracy={name: tally.share for name, tally in base_words.items()},
        instruction_following=base_followed.constraints.share if base_followed else None,
        instruction_prompts_followed=base_followed.prompts.share if base_followed else None,
        num_instructions=base_followed.constraints.total if base_followed else None,
        num_instruction_prompts=base_followed.prompts.total if base_followed else None,
        exact_match_tally=before.exact_match,
        instruction_tally=base_followed.constraints if base_followed else None,
        last_word_tallies=base_words,
        **_of_suite(before.suite),
    )
    blocks = {name: text.blocks for name, text in texts.items()}
    arm = ArmResult(
        **_identity(config, trained_by, training, scale),
        adaptation_ppl=task.policy_ppl if task else None,
        adaptation_exact_match=exact.share if exact else None,
        retention_ppl=policy_ppl,
        retention_increase_pct=increase_pct(base_ppl, policy_ppl),
        drift_nats_per_token={name: text.kl for name, text in texts.items()},
        drift_tmkl_nats_per_token={name: text.tmkl for name, text in texts.items()},
        top1_agreement={name: text.top1_agreement for name, text in texts.items()},
        num_steps=training.num_steps,
        tokens_per_second=training.tokens / training.seconds if training.seconds else None,
        train_seconds=training.seconds or None,
        peak_memory_bytes=training.peak_memory_bytes,
        final_loss=training.final_loss,
        scale=scale,
        last_word_accuracy={name: tally.share for name, tally in last_words.items()},
        retention_increase_interval_pct=increase_intervals(blocks),
        drift_alternatives_nats_per_token={n: text.alternatives for n, text in texts.items()},
        adaptation_blocks=task.blocks if task else None,
        retention_blocks=blocks,
        where=dict(after.where),
        instruction_following=followed.constraints.share if followed else None,
        instruction_prompts_followed=followed.prompts.share if followed else None,
        exact_match_tally=exact,
        instruction_tally=followed.constraints if followed else None,
        last_word_tallies=last_words,
        **_of_suite(after.answered.suite, before.suite),
        **_of_learned(training, scale),
    )
    found = {**settings_of(trained_by or config), **(settings or {})}
    return Report(base=base, arms={name: arm}, settings=found)


def _of_learned(training: TrainedRun, scale: float | None) -> dict[str, Any]:
    """The divergence on what was learned, which the run measured of its adapter as trained."""
    if scale is not None:
        return {}
    return {
        "train_drift_nats_per_token": training.train_kl,
        "train_drift_tmkl_nats_per_token": training.train_tmkl,
        "num_train_drift_tokens": training.num_train_targets,
    }


def _of_suite(
    scores: Mapping[str, TaskScore] | None, before: Mapping[str, TaskScore] | None = None
) -> dict[str, Any]:
    """The suite's fields of a result, with what follows from the scores."""
    if scores is None:
        return {}
    figures = {"suite_mean": suite_mean(scores), "suite_change": suite_change(before or {}, scores)}
    found: dict[str, Any] = {"suite": dict(scores)}
    for name, figure in figures.items():
        if figure is not None:
            found |= {name: figure.value, f"{name}_interval": [figure.low, figure.high]}
    return found


def _identity(
    measured_by: Config, trained_by: Config | None, training: TrainedRun, scale: float | None
) -> dict[str, Any]:
    """Fields of `ArmResult` that say what the adapter is, and what came of its budget."""
    if trained_by is None:
        return {"kind": "adapter", "weight": None, "seed": None}
    regularizer = trained_by.regularizer
    found: dict[str, Any] = {
        "kind": regularizer.kind,
        "weight": training.weight or regularizer.kl_weight,
        "seed": trained_by.train.seed,
        "setting": trained_by.setting(),
        "adapter": trained_by.adapter.method,
    }
    if regularizer.has_divergence:
        found |= {"direction": regularizer.direction, "temperature": regularizer.temperature}
    if regularizer.budget is not None and scale is None:  # its verdict is of scale 1
        texts = measured_by.model_copy(update={"regularizer": regularizer})
        found |= {
            "budget": regularizer.budget.in_words(),
            "budget_lost": training.budget_lost,
            "budget_held": training.budget_held,
            "budget_watched": texts.budget_watched(),
        }
    return found
