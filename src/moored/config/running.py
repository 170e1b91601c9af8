"""The sections of a recipe that say how a run goes: processes, length, measuring, tracking, output.

Every key with its type, bounds, unit and default.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from moored.config.section import (
    Ignored,
    Positive,
    Problem,
    RecipePath,
    Section,
    Text,
    about,
    one_of,
)


class ParallelConfig(Section):
    """How the work is spread over processes."""

    zero_stage: Annotated[int, Field(ge=0, le=3, description="DeepSpeed ZeRO stage")] = 2
    tensor_parallel_degree: Annotated[
        Positive, about("neighbouring ranks that share each layer")
    ] = 1
    sequence_parallel: Annotated[
        bool, about("norms and residuals are spread over those ranks, too, by tokens")
    ] = False
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
        """One rank shares nothing."""
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
    max_examples: Annotated[Positive | None, about("samples of data.eval; null: all")] = None
    micro_batch_size: Annotated[Positive, about("sequences per rank and forward")] = 4

    def ignored(self) -> Iterator[Ignored]:
        """Lengths of answers that are not generated."""
        if not self.exact_match:
            yield Ignored("max_new_tokens", ("exact_match",), "exact_match is false")
        if not self.instructions:
            yield Ignored("instruction_tokens", ("instructions",), "instructions is false")


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
