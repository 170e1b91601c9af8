"""The sections of a recipe that say how a run goes: what it trains and how, measures and keeps.

Every key with its type, bounds, unit and default.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from pydantic import BeforeValidator, Field, model_validator

from moored.config.section import (
    Ignored,
    Positive,
    Problem,
    RecipePath,
    Section,
    Text,
    about,
    invalid,
    one_of,
)


def _target_modules(value: object) -> object:
    names = cast("list[object]", value) if isinstance(value, list) else []
    if value == "all-linear" or (names and all(isinstance(n, str) and n for n in names)):
        return cast(object, value)
    if isinstance(value, str) and value:
        raise invalid(f"{value!r} is not a list: write [{value}]")
    raise invalid('expected "all-linear" or a list of module names such as [q_proj, v_proj]')


# Initial values that leave the base alone and add nothing to it, so that a run starts at the base
# and the reference is the base. A list of what is allowed: what PEFT adds is refused until then.
NEUTRAL_INITS = ("default", "gaussian")
_REWRITES = ("pissa", "olora", "corda", "lora_ga", "loftq")


# What is asked for by name, and cannot be had.
_REFUSED_METHODS = {
    "osf": "takes every weight apart in full precision, which 4-bit weights are not in, trains "
    "half of what it finds, and starts beside the base by rounding"
}


def _method(value: object) -> object:
    why = _REFUSED_METHODS.get(value.lower()) if isinstance(value, str) else None
    if why is not None:
        raise invalid(f"{value} {why}: use lora, dora, randlora, sinelora or oft")
    return value


class AdapterConfig(Section):
    """The trained part: one of the four adapters of the paper, or oft; see docs/adapters.md."""

    method: Annotated[
        Literal["lora", "dora", "randlora", "sinelora", "oft"],
        BeforeValidator(_method),
        about("adapter family"),
    ] = "lora"
    r: Annotated[
        Positive, about("rank; of each random basis with randlora, whose size falls; not oft")
    ] = 16
    alpha: Annotated[
        float,
        Field(gt=0, description="scale is alpha / r; left out with randlora: 20 r; not oft"),
    ] = 32.0
    dropout: Annotated[float, Field(ge=0, lt=1, description="probability; not oft")] = 0.0
    target_modules: Annotated[
        list[str] | Literal["all-linear"],
        BeforeValidator(_target_modules),
        about("module names that get an adapter"),
    ] = "all-linear"
    use_rslora: Annotated[bool, about("scale by alpha / sqrt(r); not randlora or oft")] = False
    init: Annotated[Text, about("of A, beside B = 0: default, gaussian; not randlora or oft")] = (
        "default"
    )
    omega: Annotated[
        float, Field(gt=0, description="frequency of sinelora's sine, in radians per unit of B A")
    ] = 200.0
    oft_block_size: Annotated[
        int,
        Field(
            ge=2,
            description="inputs of a layer that oft turns together: a larger one trains more; "
            "divides the inputs of every adapted layer",
        ),
    ] = 32
    use_cayley_neumann: Annotated[
        bool,
        about("of oft: five terms of a series; false: exact rotations, by solving equations"),
    ] = True

    @model_validator(mode="before")
    @classmethod
    def _fill_alpha(cls, values: Any) -> Any:
        """RandLoRA's own scale, as PEFT advises: its bases are small."""
        given = cast("dict[str, object]", values) if isinstance(values, dict) else {}
        r = given.get("r", cls.model_fields["r"].default)
        if given.get("method") == "randlora" and "alpha" not in given and isinstance(r, int):
            return given | {"alpha": 20.0 * min(max(r, 1), 2**31)}  # r is checked by itself
        return cast(object, values)

    def ignored(self) -> Iterator[Ignored]:
        """What another method knows."""
        of_oft = ("oft_block_size", "use_cayley_neumann")
        others = {
            "lora": ("omega", *of_oft),
            "dora": ("omega", *of_oft),
            "randlora": ("use_rslora", "init", "omega", *of_oft),
            "sinelora": of_oft,
            "oft": ("r", "alpha", "dropout", "use_rslora", "init", "omega"),
        }
        for name in others[self.method]:
            yield Ignored(name, ("method",), f"method is {self.method}")

    def problems(self) -> Iterator[Problem]:
        """The reference must be the base, and training must start there."""
        if self.init not in NEUTRAL_INITS:
            if self.init.startswith(_REWRITES):
                why = "rewrites the base's weights, so that the reference would be another model"
            elif self.init == "eva":
                why = "is computed from data beforehand, which is not done here"
            else:
                why = "is not one of those that start at the base and leave it alone"
            yield Problem("init", f"{self.init} {why}: use {' or '.join(NEUTRAL_INITS)}")

    def spread(
        self, *, nf4: bool, zero_stage: int, tensor_parallel_degree: int
    ) -> Iterator[Problem]:
        """Why it cannot be trained on such a mesh; `names` are the dotted keys of the others."""
        if self.method == "dora" and nf4 and zero_stage == 3:
            yield Problem(
                "method",
                "DoRA reads the 4-bit weights outside of their layers, where ZeRO-3 has them in "
                "parts: set parallel.zero_stage to 2",
                ("parallel.zero_stage", "model.quantization"),
            )
        whole = {
            "randlora": "randlora's bases are shared by layers of all sizes and",
            "oft": "oft's rotations are of all inputs of a layer and",
        }
        if self.method in whole and tensor_parallel_degree > 1:
            yield Problem(
                "method",
                f"{whole[self.method]} not spread over ranks: set "
                "parallel.tensor_parallel_degree to 1, or take lora, dora or sinelora",
                ("parallel.tensor_parallel_degree",),
            )


class OptimConfig(Section):
    """AdamW and its schedule."""

    learning_rate: Annotated[float, Field(gt=0, le=1, description="at the peak")] = 2e-4
    betas: Annotated[
        tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]],
        Field(strict=False, description="decay of the two moments per step"),
    ] = (0.9, 0.999)
    eps: Annotated[float, Field(gt=0, description="added to the denominator")] = 1e-8
    weight_decay: Annotated[float, Field(ge=0, description="per unit learning rate")] = 0.0
    schedule: Annotated[
        Literal["constant", "linear", "cosine"], about("after warm-up; the latter two end at 0")
    ] = "cosine"
    warmup_steps: Annotated[int, Field(ge=0, description="steps of linear rise")] = 0
    max_grad_norm: Annotated[
        Annotated[float, Field(gt=0)] | None, about("global L2 norm; null: no clipping")
    ] = 1.0


def _on_off_or_auto(value: object) -> object:
    if isinstance(value, bool) or value == "auto":
        return value
    raise invalid(f"expected true, false or auto, got {value!r}")


class ParallelConfig(Section):
    """How the work is spread over processes."""

    zero_stage: Annotated[int, Field(ge=0, le=3, description="DeepSpeed ZeRO stage")] = 2
    tensor_parallel_degree: Annotated[
        Positive, about("neighbouring ranks that share each layer")
    ] = 1
    zero_hpz_partition_size: Annotated[
        Positive | None,
        about(
            "neighbouring data-parallel ranks over which ZeRO-3 cuts the base, such as those of a "
            "machine; null: all of them"
        ),
    ] = None
    sequence_parallel: Annotated[
        bool | Literal["auto"],
        BeforeValidator(_on_off_or_auto),
        about(
            "norms and residuals are spread over those ranks, too, by tokens; auto: where the "
            "architecture lets them"
        ),
    ] = "auto"
    context_parallel_degree: Annotated[
        Positive, about("neighbouring data-parallel ranks that share each row, by tokens")
    ] = 1
    offload: Annotated[Literal["none", "optimizer"], about("what is kept in CPU memory")] = "none"
    rendezvous_seconds: Annotated[
        float,
        Field(gt=0, lt=1e6, description="how long a process waits for the others to start"),
    ] = 600.0

    def problems(self) -> Iterator[Problem]:
        """Offload belongs to ZeRO."""
        if self.offload == "optimizer" and self.zero_stage == 0:
            yield Problem(
                "offload",
                "optimizer offload needs ZeRO, but parallel.zero_stage is 0: "
                "set zero_stage to 1, 2 or 3, or offload to none",
                ("zero_stage",),
            )

    def ignored(self) -> Iterator[Ignored]:
        """One rank shares nothing; below ZeRO-3 nothing of the base is cut."""
        if self.zero_stage != 3:
            why = f"zero_stage is {self.zero_stage}"
            yield Ignored("zero_hpz_partition_size", ("zero_stage",), why)
        if self.tensor_parallel_degree == 1:
            switches = ("tensor_parallel_degree",)
            yield Ignored("sequence_parallel", switches, "tensor_parallel_degree is 1")


class ReferenceConfig(Section):
    """Whether what the base makes of a text is kept on disk, see docs/reference_cache.md."""

    cache: Annotated[
        bool, about("keep the base's final hidden states, so that they are computed once")
    ] = False
    match: Annotated[
        Literal["batch", "sample"],
        about(
            "what a kept state serves; batch: the same micro-batch, bit for bit as computed; "
            "sample: the same sample in any micro-batch, epoch and mesh, the same but for rounding"
        ),
    ] = "batch"
    max_gib: Annotated[
        float, Field(gt=0, description="GiB of all kept states; no more are added beyond it")
    ] = 100.0

    def ignored(self) -> Iterator[Ignored]:
        """Nothing is kept."""
        if not self.cache:
            for name in ("match", "max_gib"):
                yield Ignored(name, ("cache",), "cache is false")


class TrainConfig(Section):
    """How long, in which batches, and what is saved on the way."""

    steps: Annotated[Positive | None, about("optimizer updates")] = None
    epochs: Annotated[Annotated[float, Field(gt=0)] | None, about("passes over data.train")] = None
    global_batch_sequences: Annotated[
        Positive | None, about("rows per update over all ranks (samples, or packed rows)")
    ] = None
    global_batch_tokens: Annotated[Positive | None, about("tokens per update, all ranks")] = None
    micro_batch_size: Annotated[Positive, about("sequences per rank and forward")] = 1
    gradient_checkpointing: Annotated[
        Literal["none", "reentrant", "non_reentrant"],
        about("recompute activations in the backward"),
    ] = "non_reentrant"
    checkpointed_layers: Annotated[
        float,
        Field(gt=0, le=1, description="part of them recomputed; below 1: less time, more memory"),
    ] = 1.0
    save_every: Annotated[Positive, about("steps between checkpoints")] = 100
    keep_checkpoints: Annotated[Positive, about("checkpoints kept, the newest")] = 2
    log_every: Annotated[Positive, about("steps between logged points")] = 1
    seed: Annotated[int, Field(ge=0, lt=2**63, description="of data order and adapter")] = 0
    rehearse: Annotated[
        Literal["auto", "always", "never"],
        about("try the largest micro-batch before the first update; auto: on a GPU"),
    ] = "auto"

    def ignored(self) -> Iterator[Ignored]:
        """Nothing is recomputed."""
        if self.gradient_checkpointing == "none":
            why = "gradient_checkpointing is none"
            yield Ignored("checkpointed_layers", ("gradient_checkpointing",), why)

    def problems(self) -> Iterator[Problem]:
        """One length, one size of the global batch, and micro-batches that fit in it."""
        yield from one_of(self, ("steps", "epochs"), what="how long to train")
        sizes = ("global_batch_sequences", "global_batch_tokens")
        yield from one_of(self, sizes, what="the size of one update")
        rows = self.global_batch_sequences
        if rows is not None and self.micro_batch_size > rows:
            yield Problem(
                "micro_batch_size",
                f"{self.micro_batch_size} is more than train.global_batch_sequences {rows}: "
                f"set it to {rows} or less",
                ("global_batch_sequences",),
            )


# What `evaluation.suite: general` asks, by the names that lm_eval has for them; why these, their
# licences and sizes are in docs/evaluation.md.
GENERAL_TASKS = ("arc_challenge", "hellaswag", "mmlu", "truthfulqa_mc1", "gsm8k")


def _suite(value: object) -> object:
    names = cast("list[object]", value) if isinstance(value, list) else []
    if value is None or value == "general":
        return cast(object, value)
    if names and all(isinstance(name, str) and name.strip() for name in names):
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise invalid(f"holds {twice} twice: remove one")
        return cast(object, value)
    if isinstance(value, str) and value:
        raise invalid(f"{value!r} is no suite: write general, or a list of tasks such as [{value}]")
    raise invalid("expected general, or a list of tasks of lm_eval such as [arc_challenge, gsm8k]")


class EvaluationConfig(Section):
    """What is measured beside the training loss."""

    before: Annotated[bool, about("also measure the untouched base")] = True
    every: Annotated[Positive | None, about("steps between evaluations; null: at the end")] = None
    exact_match: Annotated[bool, about("generate answers to data.eval and compare")] = False
    max_new_tokens: Annotated[Positive, about("tokens per generated answer to data.eval")] = 128
    instructions: Annotated[
        bool, about("generate answers to 50 built-in prompts whose constraints can be checked")
    ] = False
    instruction_tokens: Annotated[Positive, about("tokens per answer to these")] = 256
    suite: Annotated[
        list[Text] | Literal["general"] | None,
        BeforeValidator(_suite),
        about(
            "tasks of lm_eval asked of base and adapted model, in the chat template where there is "
            "one; general: a list of well-known ones, see docs/evaluation.md"
        ),
    ] = None
    suite_limit: Annotated[Positive, about("questions per task, spread evenly over it")] = 200
    suite_include: Annotated[RecipePath | None, about("folder with tasks of your own (YAML)")] = (
        None
    )
    max_examples: Annotated[Positive | None, about("samples of data.eval; null: all")] = None
    micro_batch_size: Annotated[Positive, about("sequences per rank and forward")] = 4

    def ignored(self) -> Iterator[Ignored]:
        """Lengths of answers that are not generated."""
        if not self.exact_match:
            yield Ignored("max_new_tokens", ("exact_match",), "exact_match is false")
        if not self.instructions:
            yield Ignored("instruction_tokens", ("instructions",), "instructions is false")
        if self.suite is None:
            for name in ("suite_limit", "suite_include"):
                yield Ignored(name, ("suite",), "suite is null")

    @property
    def suite_tasks(self) -> tuple[str, ...]:
        """The suite's tasks, groups or tags of lm_eval by name; none without a suite."""
        return GENERAL_TASKS if self.suite == "general" else tuple(self.suite or ())


class TrackConfig(Section):
    """Where metrics go beside the journal in the run directory."""

    mlflow: Annotated[bool, about("ship the journal to MLflow in the background")] = True
    uri: Annotated[Text | None, about("tracking server; null: mlflow.db in output.dir")] = None
    experiment: Annotated[Text, about("MLflow experiment")] = "moored"
    system_metrics: Annotated[bool, about("sample CPU, memory and GPU")] = True
    register_model: Annotated[
        Annotated[str, Field(pattern=r"^[^/:]*[^/:. ][^/:]*$")] | None,
        about("model in MLflow's registry that gets the final adapter as a version"),
    ] = None
    tags: dict[str, str] = Field(default_factory=dict, description="MLflow tags of the run")

    def ignored(self) -> Iterator[Ignored]:
        """Without MLflow, the journal is all there is."""
        if not self.mlflow:
            for name in ("uri", "experiment", "system_metrics", "register_model", "tags"):
                yield Ignored(name, ("mlflow",), "mlflow is false")


class OutputConfig(Section):
    """Where run directories are made."""

    dir: Annotated[RecipePath, about("folder of run directories")] = Path("runs")
