"""Steps and evaluations as metrics: names that carry their units, for the journal and MLflow.

Nothing is measured or written here.
"""

from __future__ import annotations

from collections.abc import Mapping

from moored.evaluation.evaluate import Evaluation, TextFigures
from moored.evaluation.report import Report, TaskScore
from moored.evaluation.report.suite_scores import suite_mean
from moored.training.forgetting_budget import Controller
from moored.training.step import StepStats


def of_step(
    stats: StepStats,
    kind: str,
    *,
    seconds: float,
    peak_memory_bytes: int,
    regularized: StepStats | None = None,
) -> dict[str, float]:
    """The metrics of one update.

    Args:
        stats: of the update.
        kind: the regulariser's.
        seconds: that it took.
        peak_memory_bytes: so far.
        regularized: the newest update that had the regulariser, if this one has not.
    """
    values = {
        "train/loss": stats.loss,
        "train/ce_nats_per_token": stats.ce,
        "train/grad_norm": stats.grad_norm,
        "train/learning_rate": stats.learning_rate,
        "train/num_targets": float(stats.num_targets),
        "perf/tokens_per_second": stats.num_tokens / seconds,
        "perf/step_seconds": seconds,
        "perf/peak_memory_bytes": float(peak_memory_bytes),
    }
    held = regularized or stats
    if held.kl is not None:
        values[f"train/{kind}_nats_per_token"] = held.kl
    if held.kl_prompt is not None:
        values["train/kl_prompt_nats_per_token"] = held.kl_prompt
    if held.kl_anchors is not None:
        values["train/kl_anchors_nats_per_token"] = held.kl_anchors
    if stats.learned_fraction is not None:
        values["train/learned_targets_fraction"] = stats.learned_fraction
    if held.penalty is not None:
        unit = "squared_norm" if kind == "l2" else "nats_per_token"
        values[f"train/{kind}_{unit}"] = held.penalty
    if any(part is not None for part in (held.kl, held.kl_anchors, held.penalty)):
        values["train/regularizer_weight"] = held.weight
    return values


def of_budget(controller: Controller) -> dict[str, float]:
    """The metrics of one measurement of the budget's probe, and the weight that follows from it."""
    unit = "drift_nats_per_token" if controller.budget.by_drift else "retention_increase_pct"
    assert controller.measured is not None
    return {
        f"budget/{unit}": controller.measured,
        f"budget/limit_{unit}": controller.budget.limit,
        "budget/weight": controller.weight,
    }


def of_evaluation(evaluation: Evaluation) -> dict[str, float]:
    """The metrics of one evaluation, per corpus."""
    values: dict[str, float] = {}
    if evaluation.adaptation is not None:
        values["eval/adaptation_perplexity"] = evaluation.adaptation.policy_ppl
    answered = evaluation.answered
    if answered.exact_match is not None:
        values["eval/exact_match_fraction"] = answered.exact_match.share
    if answered.followed is not None:
        values["eval/instruction_following_fraction"] = answered.followed.constraints.share
        values["eval/instruction_prompts_followed_fraction"] = answered.followed.prompts.share
    values |= _of_suite(answered.suite or {})
    for name, figures in evaluation.retention.items():
        values[f"retention/{name}/perplexity"] = figures.policy_ppl
        values[f"drift/{name}/kl_nats_per_token"] = figures.kl
        values[f"drift/{name}/tmkl_nats_per_token"] = figures.tmkl
        if figures.last_word is not None:
            values[f"retention/{name}/last_word_accuracy_fraction"] = figures.last_word.share
        values[f"drift/{name}/top1_agreement_fraction"] = figures.top1_agreement
    return values


def _of_suite(scores: Mapping[str, TaskScore]) -> dict[str, float]:
    """The mean above a guess, and the share of each task."""
    mean = suite_mean(scores)
    if mean is None:
        return {}
    shares = {f"suite/{name}_fraction": task.share for name, task in scores.items()}
    return {"eval/suite_mean_fraction": mean.value, **shares}


def of_learned(figures: TextFigures) -> dict[str, float]:
    """The divergence on what was learned."""
    return {
        "train_drift/kl_nats_per_token": figures.kl,
        "train_drift/tmkl_nats_per_token": figures.tmkl,
    }


def of_suite_change(report: Report) -> dict[str, float]:
    """What became of the suite's mean, of a report on one arm; nothing without a suite."""
    (arm,) = report.arms.values()
    if arm.suite_change is None:
        return {}
    low, high = arm.suite_change_interval
    return {
        "eval/suite_change_fraction": arm.suite_change,
        "eval/suite_change_low_fraction": low,
        "eval/suite_change_high_fraction": high,
    }
