"""The figures of finished runs as data: strict, JSON in and out.

Nothing is measured, worded or drawn here; several reports are joined in `merging.py`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from moored.evaluation.report.blocks import Blocks, Tally
from moored.evaluation.report.reading import JsonReader, short
from moored.evaluation.report.where import Where
from moored.utils.errors import UserError, UserErrors

Figures = dict[str, float | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseResult:
    """The base model, before any adapter. None: not measured.

    Attributes:
        model: name or path.
        revision: of the model.
        quantization: nf4 or none.
        adaptation_ppl: perplexity on the new task's held-out targets.
        adaptation_exact_match: fraction of its prompts answered exactly, 0 to 1.
        retention_ppl: perplexity per corpus.
        num_tokens: scored tokens per corpus.
        num_adaptation_tokens: scored target tokens of the new task.
        num_adaptation_prompts: prompts behind the exact match.
        last_word_accuracy: fraction of passages whose last word was predicted, per corpus where
            nothing else is scored.
        instruction_following: fraction of checkable constraints that its answers met, 0 to 1.
        instruction_prompts_followed: fraction of prompts of which all constraints were met.
        num_instructions: constraints behind that.
        num_instruction_prompts: prompts behind that.
        exact_match_tally: right answers per prompt.
        instruction_tally: constraints met per prompt.
        last_word_tallies: last words predicted per passage, per corpus.
        lm_eval: figures of the evaluation harness (lm_eval): task -> metric -> value, with
            `METRIC_stderr` beside it where the harness gives a standard error.
    """

    model: str
    revision: str | None
    quantization: str
    adaptation_ppl: float | None
    adaptation_exact_match: float | None = None
    retention_ppl: Figures
    num_tokens: dict[str, int]
    num_adaptation_tokens: int | None = None
    num_adaptation_prompts: int | None = None
    last_word_accuracy: Figures = field(default_factory=dict)
    instruction_following: float | None = None
    instruction_prompts_followed: float | None = None
    num_instructions: int | None = None
    num_instruction_prompts: int | None = None
    exact_match_tally: Tally | None = None
    instruction_tally: Tally | None = None
    last_word_tallies: dict[str, Tally] = field(default_factory=dict)
    lm_eval: dict[str, Figures] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmResult:
    """One adapted model. None: not measured; dicts are per corpus.

    Attributes:
        kind: the regulariser.
        weight: of the regulariser; where a budget moved it, the one that acted last.
        seed: of data order and adapter.
        adaptation_ppl: perplexity on the new task's held-out targets.
        retention_ppl: perplexity per corpus.
        retention_increase_pct: 100 * (retention_ppl / the base's - 1), percent.
        drift_nats_per_token: mean KL(base || adapted) over the whole vocabulary.
        num_steps: optimizer updates.
        tokens_per_second: trained tokens (without padding) per second of training.
        adaptation_exact_match: fraction of the prompts answered exactly, 0 to 1.
        drift_tmkl_nats_per_token: the same drift with the true token left out.
        top1_agreement: fraction of positions where base and adapted prefer the same token.
        train_seconds: spent in updates.
        peak_memory_bytes: most memory that one process held.
        final_loss: of the last update, nats per token.
        status: how the run ended.
        setting: digest of the recipe without its seed: what seeds of one setting share.
        direction: of the divergence.
        temperature: of the divergence.
        adapter: its method.
        scale: factor of all that the adapter adds, where it is not as trained.
        last_word_accuracy: fraction of passages whose last word was predicted.
        retention_increase_interval_pct: 95 % bootstrap interval of that increase, [low, high].
        drift_alternatives_nats_per_token: the part of the drift that is among the alternatives to
            the true token; the rest is the change of the true token's probability.
        adaptation_blocks: sums over blocks of the new task's held-out samples.
        retention_blocks: sums over blocks of each corpus.
        budget: what might be forgotten of which text, in words, where there was a budget.
        budget_lost: what its probe has lost in the end, in the budget's unit.
        budget_held: whether that is within the budget and its tolerance.
        budget_watched: retention corpora out of the probe's own text.
        where: each corpus's drift by place, by token and in its worst examples.
        instruction_following: fraction of checkable constraints that its answers met, 0 to 1.
        instruction_prompts_followed: fraction of prompts of which all constraints were met.
        exact_match_tally: right answers per prompt.
        instruction_tally: constraints met per prompt.
        last_word_tallies: last words predicted per passage, per corpus.
        lm_eval: figures of the evaluation harness, as of the base.
    """

    kind: str
    weight: float | None
    seed: int | None
    adaptation_ppl: float | None
    retention_ppl: Figures
    retention_increase_pct: Figures
    drift_nats_per_token: Figures
    num_steps: int
    tokens_per_second: float | None
    adaptation_exact_match: float | None = None
    drift_tmkl_nats_per_token: Figures = field(default_factory=dict)
    top1_agreement: Figures = field(default_factory=dict)
    train_seconds: float | None = None
    peak_memory_bytes: int | None = None
    final_loss: float | None = None
    status: str = "done"
    setting: str | None = None
    direction: str | None = None
    temperature: float | None = None
    adapter: str | None = None
    scale: float | None = None
    last_word_accuracy: Figures = field(default_factory=dict)
    retention_increase_interval_pct: dict[str, list[float]] = field(default_factory=dict)
    drift_alternatives_nats_per_token: Figures = field(default_factory=dict)
    adaptation_blocks: Blocks | None = None
    retention_blocks: dict[str, Blocks] = field(default_factory=dict)
    budget: str | None = None
    budget_lost: float | None = None
    budget_held: bool | None = None
    budget_watched: list[str] = field(default_factory=list)
    where: dict[str, Where] = field(default_factory=dict)
    instruction_following: float | None = None
    instruction_prompts_followed: float | None = None
    exact_match_tally: Tally | None = None
    instruction_tally: Tally | None = None
    last_word_tallies: dict[str, Tally] = field(default_factory=dict)
    lm_eval: dict[str, Figures] = field(default_factory=dict)

    def worst(self) -> tuple[str, float] | None:
        """The corpus whose perplexity rose most and by how many percent; NaN counts as most."""
        known = [
            (name, pct) for name, pct in self.retention_increase_pct.items() if pct is not None
        ]
        return max(known, key=lambda item: badness(item[1]), default=None)


def badness(value: float) -> float:
    """Sorts figures of which less is better; NaN is worse than everything."""
    return math.inf if math.isnan(value) else value


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """A base and what each arm made of it.

    Attributes:
        base: the figures before.
        arms: the figures after, by name.
        settings: what else a reader needs to repeat the runs (recipe, versions): label -> text.
    """

    base: BaseResult
    arms: dict[str, ArmResult]
    settings: dict[str, str] = field(default_factory=dict)

    @property
    def corpora(self) -> list[str]:
        """Names of the retention corpora, in the order of the base."""
        return list(self.base.retention_ppl)

    def with_lm_eval(
        self, base: dict[str, Figures], arm: dict[str, Figures], settings: Mapping[str, str]
    ) -> Report:
        """The same with the evaluation harness's figures, of a report on one arm."""
        arms = {name: replace(result, lm_eval=arm) for name, result in self.arms.items()}
        return replace(
            self,
            base=replace(self.base, lm_eval=base),
            arms=arms,
            settings={**self.settings, **settings},
        )

    def to_json(self) -> dict[str, Any]:
        """The content of report.json; NaN and infinities become the strings that `float` reads."""
        result: dict[str, Any] = {
            "base": _plain(self.base),
            "arms": {name: _plain(arm) for name, arm in self.arms.items()},
        }
        return result | ({"settings": dict(self.settings)} if self.settings else {})

    @classmethod
    def from_json(cls, data: object, *, source: str = "report.json") -> Report:
        """Check and take over the content of a report.json.

        Args:
            data: the parsed JSON.
            source: what to call it in errors.

        Raises:
            UserErrors: everything that is wrong with it, one line each.
        """
        problems: list[str] = []
        report = _read(JsonReader(problems), data)
        if report is not None and not problems:
            problems += _contradictions(report)
        if problems or report is None:
            raise UserErrors([f"{source}: {problem}" for problem in problems])
        return report

    @classmethod
    def read(cls, path: Path | str) -> Report:
        """Read a report.json.

        Raises:
            UserError: it is not there, no JSON, or not as it must be.
        """
        path = Path(path)
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(
                f"{path}: no such file: finish the run, or measure it with `moored evaluate`"
            ) from None
        except (OSError, RecursionError) as error:
            raise UserError(f"{path}: cannot be read: {error}") from error
        except ValueError as error:
            raise UserError(f"{path}: not valid JSON ({error}): evaluate the run again") from error
        return cls.from_json(data, source=str(path))


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {item.name: _plain(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _read(reader: JsonReader, data: object) -> Report | None:
    top = reader.mapping(data, "", ("base", "arms", "settings"))
    if top is None:
        return None
    base = reader.result(BaseResult, top.get("base", MISSING), "base")
    arms: dict[str, ArmResult] = {}
    given = reader.mapping(top.get("arms", MISSING), "arms")
    if given is not None and not given:
        reader.problems.append("arms: empty: a report needs at least one arm")
    for name, arm in (given or {}).items():
        result = reader.result(ArmResult, arm, f"arms.{short(name)}")
        if not name.strip():
            reader.problems.append("arms: an arm's name is empty: name it after its regulariser")
        if result is not None:
            arms[name] = result
    settings = reader.values(top.get("settings", {}), "settings", reader.text)
    return None if base is None else Report(base=base, arms=arms, settings=settings)


def _contradictions(report: Report) -> list[str]:
    """Figures that cannot all be right, such as an increase given as a fraction."""
    problems: list[str] = []
    for arm_name, arm in report.arms.items():
        where = f"arms.{short(arm_name)}"
        for corpus in {**arm.retention_ppl, **arm.retention_increase_pct}:
            if corpus not in report.base.retention_ppl:
                problems.append(
                    f"{where}: corpus {short(corpus)} is not in base.retention_ppl: "
                    "measure the base on it too"
                )
        problems += [f"{where}.{problem}" for problem in _off_their_sums(arm)]
        for corpus, ends in arm.retention_increase_interval_pct.items():
            # Written so that NaN is refused as well.
            if len(ends) != 2 or not ends[0] <= ends[1]:
                problems.append(
                    f"{where}.retention_increase_interval_pct.{short(corpus)}: {short(ends)} is no "
                    "interval: expected [low, high] in percent"
                )
        for corpus, given in arm.retention_increase_pct.items():
            expected = increase_pct(report.base.retention_ppl, arm.retention_ppl).get(corpus)
            if given is None or expected is None:
                continue
            if not math.isfinite(given) or not math.isfinite(expected):
                continue
            # Generous to figures that were rounded by hand.
            if abs(given - expected) > 0.5 + 0.02 * abs(expected):
                problems.append(
                    f"{where}.retention_increase_pct.{short(corpus)}: {given:g} percent, but the "
                    f"perplexities give {expected:g}: evaluate the run again"
                )
    return problems


def _off_their_sums(arm: ArmResult) -> list[str]:
    """Perplexities that are not those of the sums beside them, so that intervals would mislead."""
    pairs = [("adaptation", arm.adaptation_ppl, arm.adaptation_blocks)]
    pairs += [
        (f"retention.{short(corpus)}", arm.retention_ppl.get(corpus), blocks)
        for corpus, blocks in arm.retention_blocks.items()
    ]
    problems: list[str] = []
    for name, ppl, blocks in pairs:
        nats = None if blocks is None else blocks.mean_ce
        if ppl is None or nats is None or not math.isfinite(ppl) or not math.isfinite(nats):
            continue
        if ppl > 0 and abs(math.log(ppl) - nats) > 0.02:
            problems.append(
                f"{name}: perplexity {ppl:g}, but its blocks give exp({nats:.4g}): evaluate the "
                "run again"
            )
    return problems


def increase_pct(base: Mapping[str, float | None], after: Mapping[str, float | None]) -> Figures:
    """Percent by which each perplexity rose over the base's; None where one was not measured."""
    return {corpus: rise_pct(base.get(corpus), ppl) for corpus, ppl in after.items()}


def rise_pct(before: float | None, after: float | None) -> float | None:
    """Percent by which a perplexity rose; None where one was not measured."""
    return None if not before or after is None else 100.0 * (after / before - 1.0)
