"""A forgetting card as data: frozen, JSON out. None is: not measured, or not known.

Nothing is read, measured or worded here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict

from moored.evaluation.report import Report, headline
from moored.utils.atomic_dir import jsonable

FORMAT = 1
Number = int | float  # stays what it is: 32 is not written as 32.0


class Facts(BaseModel):
    """A part of a card; each of its fields is a key of the JSON."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class End(Facts):
    """A token at which a model stops."""

    id: int
    token: str
    count: int | None = None  # turns of the training data that it ends; None: not counted


class Stops(Facts):
    """Where generation stops."""

    learned: tuple[End, ...] = ()  # what ends learned turns, the most frequent first
    base: tuple[End, ...] = ()

    @property
    def ids(self) -> list[int]:
        """Tokens of both, the learned first."""
        return list(dict.fromkeys(end.id for end in (*self.learned, *self.base)))

    @property
    def are_the_base_s(self) -> bool:
        """Whether the base stops at all that was learned."""
        return {end.id for end in self.learned} <= {end.id for end in self.base}


class TextFacts(Facts):
    """A retention corpus, scored with the base and with the adapter."""

    name: str  # the recipe's
    source: str | None = None  # a file's name, a data set of the hub, or a built-in text
    num_tokens: int | None = None  # scored
    ppl_before: Number | None = None  # perplexity of the base
    ppl_after: Number | None = None
    increase_pct: Number | None = None  # 100 * (after / before - 1)
    increase_interval_pct: Sequence[Number] | None = None  # low and high, 95 %, by bootstrap
    last_word_before: Number | None = None  # fraction of passages whose last word is predicted,
    last_word_after: Number | None = None  # where only last words are scored
    kl_nats_per_token: Number | None = None  # mean KL(base || adapted), whole vocabulary
    masked_kl_nats_per_token: Number | None = None  # the true token left out of both
    top1_agreement: Number | None = None  # fraction of positions with the same first choice


class Figures(Facts):
    """What was measured, before and after."""

    headline: str = "What it learned and what it forgot was not measured."
    missing: str | None = None  # why there are no figures, and what measures them
    measured_on: str | None = None  # revision of the base
    adaptation_ppl_before: Number | None = None  # of held-out targets of the new task
    adaptation_ppl_after: Number | None = None
    exact_match_before: Number | None = None  # fraction of its prompts answered exactly
    exact_match_after: Number | None = None
    num_adaptation_tokens: int | None = None  # scored targets
    num_adaptation_prompts: int | None = None  # behind the exact match
    train_kl_nats_per_token: Number | None = None  # KL(base || adapted) on what was learned
    train_masked_kl_nats_per_token: Number | None = None  # the true token left out of both
    num_train_tokens: int | None = None  # targets that these were measured on
    suite_tasks: tuple[str, ...] = ()  # general tasks that were asked
    num_suite_questions: int | None = None  # in all of them
    suite_mean_before: Number | None = None  # over the tasks; 0 is guessing, 1 is all right
    suite_mean_after: Number | None = None
    suite_change: Number | None = None  # the same questions paired
    suite_change_interval: Sequence[Number] | None = None  # low and high, 95 %
    retention: tuple[TextFacts, ...] = ()  # empty where forgetting was not measured
    budget: str | None = None  # what might be forgotten of which text
    budget_lost: Number | None = None  # by that text, in the budget's unit
    budget_held: bool | None = None

    @classmethod
    def of(cls, report: Report, arm_name: str, sources: Mapping[str, str]) -> Figures:
        """The figures of one arm.

        Args:
            report: with that arm.
            arm_name: its name.
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
            train_kl_nats_per_token=arm.train_drift_nats_per_token,
            train_masked_kl_nats_per_token=arm.train_drift_tmkl_nats_per_token,
            num_train_tokens=arm.num_train_drift_tokens,
            suite_tasks=tuple(arm.suite),
            num_suite_questions=sum(len(t.scores) for t in arm.suite.values()) or None,
            suite_mean_before=base.suite_mean,
            suite_mean_after=arm.suite_mean,
            suite_change=arm.suite_change,
            suite_change_interval=arm.suite_change_interval or None,
            retention=tuple(
                TextFacts(
                    name=name,
                    source=sources.get(name.partition("/")[0]),  # of all its domains
                    num_tokens=base.num_tokens.get(name),
                    ppl_before=before,
                    ppl_after=arm.retention_ppl.get(name),
                    increase_pct=arm.retention_increase_pct.get(name),
                    increase_interval_pct=arm.retention_increase_interval_pct.get(name),
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


class File(Facts):
    """A file of the base."""

    bytes: int
    sha256: str | None = None
    by: str | None = None  # who hashed it: hub (its cache's name of it), moored (made it), export


class Base(Facts):
    """The model below the adapter."""

    name: str  # on the hub, else of its folder or file
    hub: str | None = None  # the same where it is a name on the hub
    revision: str | None = None  # a commit of the hub, `sha256:...` of a GGUF file, or `local:...`
    origin: str | None = None  # where its files came from
    quantization: str = "none"  # how the run held it: nf4 or none
    double_quantization: bool | None = None  # whether the 4-bit scales were quantised, too
    license: str | None = None  # as its own card says
    files: Mapping[str, File] = {}

    @property
    def weights(self) -> list[File]:
        """Its safetensors."""
        return [file for name, file in self.files.items() if name.endswith(".safetensors")]


class Adapter(Facts):
    """The adapter's own files."""

    method: str  # PEFT's type in lower case; dora: LoRA with magnitudes
    r: Number | None = None
    alpha: Number | None = None  # as exported, with the scale in it
    rslora: bool = False  # scaled by alpha / sqrt(r) instead of alpha / r
    dropout: Number | None = None  # probability, in training
    target_modules: tuple[str, ...] | str | None = None  # names, or a pattern
    num_parameters: int | None = None  # trained
    sha256: str | None = None  # of adapter_model.safetensors
    bytes: int | None = None  # of the same

    @property
    def kinds(self) -> list[str]:
        """Kinds of adapted modules; PEFT may have written the whole path of each."""
        return sorted({name.rpartition(".")[2] for name in self.target_modules or ()})


class TrainingFacts(Facts):
    """How it was trained."""

    regularizer: Mapping[str, Any]  # sections of the recipe, as they took effect
    optim: Mapping[str, Any]
    train: Mapping[str, Any]
    steps: int | None = None  # updates that were made
    tokens: int | None = None  # padding left out, repeated passes counted
    seconds: Number | None = None  # spent in updates
    final_loss: Number | None = None  # of the last update, nats per token


class SourceFacts(Facts):
    """A data set that was trained on."""

    name: str  # of the file or folder, or on the hub
    hub: str | None = None
    revision: str | None = None  # as the recipe names it
    format: str | None = None  # of its rows, as the recipe has it
    passes: Number = 1.0  # per epoch
    streamed: bool = False  # read as training went, so that tokens were not counted
    num_samples: int | None = None
    num_tokens: int | None = None
    num_dropped: int | None = None  # too long, or without anything to learn
    sha256: str | None = None  # of the tokenised samples; of a streamed source: of its files


class Data(Facts):
    """All sources."""

    sources: tuple[SourceFacts, ...] = ()  # in the recipe's order
    replayed: tuple[SourceFacts, ...] = ()  # beside them, so that it is not forgotten
    num_samples: int | None = None  # of all that were not streamed
    num_tokens: int | None = None
    sha256: str | None = None  # of everything in its order, as the run's journal has it


class Delta(Facts):
    """How far matrices were moved, by the Frobenius norm."""

    count: int  # of matrices
    norm: Number  # ||dW||, the root of the sum of squares over all of them
    relative: Number | None = None  # ||dW|| / ||W||; None where W was not read


class Deltas(Facts):
    """What the adapter adds to the weights."""

    of: str  # adapter: dW = scale * B A; merged: the weights as written less the base's
    missing: str | None = None  # why there are none
    total: Delta | None = None
    by_module: Mapping[str, Delta] = {}  # by the last part of their names
    largest: str | None = None  # the matrix that moved most, relatively where that is known
    largest_delta: Delta | None = None
    rounding: Number | None = None  # ||what rounding to the written dtype changed|| / ||dW||


class Merged(Facts):
    """A merged model."""

    into: str  # w16: the base's own weights; nf4: its 4-bit weights dequantised
    dtype: str  # written
    kl_trained_merged_nats_per_token: Number  # KL(trained || merged), on the verification's tokens
    kl_trained_base_nats_per_token: Number  # KL(trained || base) on the same


class Provenance(Facts):
    """Which run made it, and with what."""

    began: str | None = None  # first start of the run, UTC
    ended: str | None = None  # UTC
    attempts: int | None = None  # starts
    recipe_sha256: str | None = None  # of all options that determine the numbers
    commits: tuple[str, ...] = ()  # of git, of the folders that the run was started in
    versions: Mapping[str, Any] = {}  # of the packages that trained it
    export_versions: Mapping[str, Any] = {}
    mlflow: tuple[Mapping[str, str], ...] = ()  # `uri` (no credentials) and `run_id` per store


class Card(Facts):
    """All of it."""

    kind: str  # adapter or merged
    name: str  # of the run, else of the adapter's folder
    created: str  # when it was exported, UTC
    scale: Number = 1.0  # factor of what was trained
    figures: Figures
    base: Base
    adapter: Adapter
    training: TrainingFacts | None = None  # None where it was not a run of Moored's
    data: Data | None = None
    deltas: Deltas
    merged: Merged | None = None
    stops: Stops | None = None
    verified: Mapping[str, Any] = {}  # as in export.json
    provenance: Provenance

    def to_json(self) -> dict[str, Any]:
        """The content of `forgetting-card.json`; NaN and infinities are strings `float` reads."""
        return {"format": FORMAT} | jsonable(self.model_dump())
