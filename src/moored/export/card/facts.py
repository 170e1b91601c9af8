"""A forgetting card as data: frozen, JSON out.

Nothing is read, measured or worded here. None is: not measured, or not known.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from moored.evaluation.report import Report, headline

FORMAT = 1
NOT_MEASURED = "What it learned and what it forgot was not measured."


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """A token at which a model stops.

    Attributes:
        id: of the token.
        token: its text.
        count: turns of the training data that it ends; None: not counted.
    """

    id: int
    token: str
    count: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Stops:
    """Where generation stops.

    Attributes:
        learned: tokens that end what was learned, the most frequent first.
        base: at which the base stops.
    """

    learned: tuple[End, ...] = ()
    base: tuple[End, ...] = ()

    @property
    def ids(self) -> list[int]:
        """Of all of them, the learned first."""
        return list(dict.fromkeys(end.id for end in (*self.learned, *self.base)))

    @property
    def are_the_base_s(self) -> bool:
        """Whether the base stops at all that was learned."""
        return {end.id for end in self.learned} <= {end.id for end in self.base}


@dataclass(frozen=True, slots=True, kw_only=True)
class TextFacts:
    """A retention corpus, scored with the base and with the adapter.

    Attributes:
        name: the recipe's.
        source: where the text is from: a file's name, a data set of the hub, or a built-in text.
        num_tokens: scored tokens.
        ppl_before: perplexity of the base.
        ppl_after: perplexity with the adapter.
        increase_pct: 100 * (after / before - 1), percent.
        increase_interval_pct: its 95 % bootstrap interval, low and high.
        last_word_before: fraction of passages whose last word the base predicts, where only last
            words are scored.
        last_word_after: the same with the adapter.
        kl_nats_per_token: mean KL(base || adapted) over the whole vocabulary.
        masked_kl_nats_per_token: the same with the true token left out of both.
        top1_agreement: fraction of positions at which both prefer the same token.
    """

    name: str
    source: str | None = None
    num_tokens: int | None = None
    ppl_before: float | None = None
    ppl_after: float | None = None
    increase_pct: float | None = None
    increase_interval_pct: tuple[float, float] | None = None
    last_word_before: float | None = None
    last_word_after: float | None = None
    kl_nats_per_token: float | None = None
    masked_kl_nats_per_token: float | None = None
    top1_agreement: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What was measured, before and after.

    Attributes:
        headline: what the figures say, in a sentence computed from them.
        missing: why there are none, and what measures them; None where there are.
        measured_on: revision of the base that they are of.
        adaptation_ppl_before: of the base, on held-out targets of the new task.
        adaptation_ppl_after: of the adapted model on the same.
        exact_match_before: fraction of the new task's prompts that the base answers exactly.
        exact_match_after: the same with the adapter.
        num_adaptation_tokens: scored targets.
        num_adaptation_prompts: prompts behind the exact match.
        retention: per corpus; empty where forgetting was not measured.
        budget: what might be forgotten of which text, where there was a budget.
        budget_lost: what that text lost, in the budget's unit.
        budget_held: whether that was within the budget.
    """

    headline: str = NOT_MEASURED
    missing: str | None = None
    measured_on: str | None = None
    adaptation_ppl_before: float | None = None
    adaptation_ppl_after: float | None = None
    exact_match_before: float | None = None
    exact_match_after: float | None = None
    num_adaptation_tokens: int | None = None
    num_adaptation_prompts: int | None = None
    retention: tuple[TextFacts, ...] = ()
    budget: str | None = None
    budget_lost: float | None = None
    budget_held: bool | None = None

    @classmethod
    def of(cls, report: Report, arm_name: str, sources: Mapping[str, str]) -> Figures:
        """The figures of one arm.

        Args:
            report: with that arm.
            arm_name: of it.
            sources: corpus -> where its text is from.
        """
        base, arm = report.base, report.arms[arm_name]
        return cls(
            headline=headline(Report(base=base, arms={arm_name: arm})).title,
            measured_on=base.revision,
            adaptation_ppl_before=base.adaptation_ppl,
            adaptation_ppl_after=arm.adaptation_ppl,
            exact_match_before=base.adaptation_exact_match,
            exact_match_after=arm.adaptation_exact_match,
            num_adaptation_tokens=base.num_adaptation_tokens,
            num_adaptation_prompts=base.num_adaptation_prompts,
            retention=tuple(
                TextFacts(
                    name=name,
                    source=sources.get(name.partition("/")[0]),  # of all its domains
                    num_tokens=base.num_tokens.get(name),
                    ppl_before=before,
                    ppl_after=arm.retention_ppl.get(name),
                    increase_pct=arm.retention_increase_pct.get(name),
                    increase_interval_pct=_bounds(arm.retention_increase_interval_pct.get(name)),
                    last_word_before=base.last_word_accuracy.get(name),
                    last_word_after=arm.last_word_accuracy.get(name),
                    kl_nats_per_token=arm.drift_nats_per_token.get(name),
                    masked_kl_nats_per_token=arm.drift_tmkl_nats_per_token.get(name),
                    top1_agreement=arm.top1_agreement.get(name),
                )
                for name, before in base.retention_ppl.items()
            ),
            budget=arm.budget,
            budget_lost=arm.budget_lost,
            budget_held=arm.budget_held,
        )


def _bounds(interval: Sequence[float] | None) -> tuple[float, float] | None:
    return None if interval is None or len(interval) != 2 else (interval[0], interval[1])


@dataclass(frozen=True, slots=True, kw_only=True)
class File:
    """A file of the base.

    Attributes:
        bytes: its size.
        sha256: of its content, in hex; None: not hashed.
        by: who hashed it: `hub` (its cache names the file so), `moored` (when the folder was made)
            or `export` (now); None: nobody.
    """

    bytes: int
    sha256: str | None = None
    by: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """The model below the adapter.

    Attributes:
        name: hub name, else the name of its folder or file.
        hub: the same where it is a name on the hub.
        revision: a commit of the hub, `sha256:...` of a GGUF file, or `local:...`.
        origin: where its files came from.
        quantization: how the run held it: nf4 or none.
        double_quantization: whether the 4-bit scales were quantised, too.
        license: as the base's own card says.
        files: by name.
    """

    name: str
    hub: str | None = None
    revision: str | None = None
    origin: str | None = None
    quantization: str = "none"
    double_quantization: bool | None = None
    license: str | None = None
    files: Mapping[str, File] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """The adapter's own files.

    Attributes:
        method: PEFT's type in lower case; `dora` for LoRA with magnitudes.
        r: rank.
        alpha: as exported, with the scale in it.
        rslora: the product is scaled by alpha / sqrt(r) instead of alpha / r.
        dropout: probability, in training.
        target_modules: names, or a pattern.
        num_parameters: trained.
        sha256: of `adapter_model.safetensors`.
        bytes: of it.
    """

    method: str
    r: int | None = None
    alpha: float | None = None
    rslora: bool = False
    dropout: float | None = None
    target_modules: tuple[str, ...] | str | None = None
    num_parameters: int | None = None
    sha256: str | None = None
    bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingFacts:
    """How it was trained; sections of the recipe as they took effect.

    Attributes:
        regularizer: kind, weight, direction, temperature, every.
        optim: learning rate and schedule.
        train: length, batch, seed.
        steps: updates that were made.
        tokens: trained on, padding left out, repeated passes counted.
        seconds: spent in updates.
        final_loss: of the last update, nats per token.
    """

    regularizer: Mapping[str, Any]
    optim: Mapping[str, Any]
    train: Mapping[str, Any]
    steps: int | None = None
    tokens: int | None = None
    seconds: float | None = None
    final_loss: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceFacts:
    """What was trained on; a data set.

    Attributes:
        name: of the file or folder, or of the data set on the hub.
        hub: the latter.
        revision: of it, as the recipe names it.
        format: of its rows, as the recipe has it.
        passes: over it per epoch.
        streamed: read as training went, so that tokens were not counted.
        num_samples: that were used.
        num_tokens: of these.
        num_dropped: that were too long, or had nothing to learn.
        sha256: fingerprint of the tokenised samples (of a streamed source: of its files).
    """

    name: str
    hub: str | None = None
    revision: str | None = None
    format: str | None = None
    passes: float = 1.0
    streamed: bool = False
    num_samples: int | None = None
    num_tokens: int | None = None
    num_dropped: int | None = None
    sha256: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """All sources.

    Attributes:
        sources: in the recipe's order.
        replayed: what was replayed beside them, so that it is not forgotten.
        num_samples: of all that were not streamed.
        num_tokens: of these.
        sha256: fingerprint of everything in its order, as the run's journal has it.
    """

    sources: tuple[SourceFacts, ...] = ()
    replayed: tuple[SourceFacts, ...] = ()
    num_samples: int | None = None
    num_tokens: int | None = None
    sha256: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """How far matrices were moved, by the Frobenius norm.

    Attributes:
        count: matrices.
        norm: ||dW||, the root of the sum of squares over all of them.
        relative: ||dW|| / ||W||; None where W was not read.
    """

    count: int
    norm: float
    relative: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Deltas:
    """What the adapter adds to the weights.

    Attributes:
        of: `adapter` (dW = scale * B A) or `merged` (the weights as written less the base's).
        missing: why there are none; None where there are.
        total: over all adapted matrices.
        by_module: by the last part of their names.
        largest: name of the matrix that moved most, relatively where that is known.
        largest_delta: of that one.
        rounding: ||what rounding to the written dtype changed|| / ||dW||; None: not merged.
    """

    of: str
    missing: str | None = None
    total: Delta | None = None
    by_module: Mapping[str, Delta] = field(default_factory=dict)
    largest: str | None = None
    largest_delta: Delta | None = None
    rounding: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Merged:
    """A merged model.

    Attributes:
        into: `w16`, the base's own weights, or `nf4`, its 4-bit weights dequantised.
        dtype: of the weights written.
        kl_trained_merged_nats_per_token: KL(trained || merged), on the verification's tokens.
        kl_trained_base_nats_per_token: KL(trained || base) on the same.
    """

    into: str
    dtype: str
    kl_trained_merged_nats_per_token: float
    kl_trained_base_nats_per_token: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """Which run made it, and with what.

    Attributes:
        began: first start of the run, UTC.
        ended: its end, UTC.
        attempts: starts.
        recipe_sha256: fingerprint of all options that determine the numbers.
        commits: git commits of the folders that the run was started in.
        versions: of the packages that trained it.
        export_versions: of those that exported it.
        mlflow: `uri` (without credentials) and `run_id` of each store that has the run.
    """

    began: str | None = None
    ended: str | None = None
    attempts: int | None = None
    recipe_sha256: str | None = None
    commits: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    export_versions: Mapping[str, str] = field(default_factory=dict)
    mlflow: tuple[Mapping[str, str], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """All of it.

    Attributes:
        kind: `adapter` or `merged`.
        name: of the run, else of the adapter's folder.
        created: when it was exported, UTC.
        scale: factor of what was trained; 1 as trained.
        training: None where it was not a run of Moored's.
        data: None likewise.
        stops: where generation is to stop; None: not known.
        verified: what `moored export` compared, as in `export.json`.
    """

    kind: str
    name: str
    created: str
    scale: float = 1.0
    figures: Figures
    base: Base
    adapter: Adapter
    training: TrainingFacts | None = None
    data: Data | None = None
    deltas: Deltas
    merged: Merged | None = None
    stops: Stops | None = None
    verified: Mapping[str, Any] = field(default_factory=dict)
    provenance: Provenance

    def to_json(self) -> dict[str, Any]:
        """The content of `forgetting-card.json`; NaN and infinities are strings `float` reads."""
        return {"format": FORMAT} | _plain(self)


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {item.name: _plain(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value
