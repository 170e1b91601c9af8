"""What of a recipe memory and time depend on, and what little of its data can be seen at a glance.

A `Workload` is a flat copy, so that a plan can try other layouts without making recipes of them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from moored.config import Config

GLANCE_BYTES = 2**20  # of each file, from its start
CHARACTERS_PER_TOKEN = 4.0  # English under vocabularies of 100,000 and more; code has less


@dataclass(frozen=True, slots=True, kw_only=True)
class DataGlance:
    """Training data by the first megabyte of each file.

    Attributes:
        num_samples: of one epoch.
        mean_tokens: of a sample, by characters: within a quarter.
        learned: share of these that is learned, likewise; 1 where it cannot be told.
    """

    num_samples: int
    mean_tokens: float
    learned: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """One recipe, as far as memory and time go.

    Attributes:
        nf4: the base is held in 4 bits.
        double_quantization: its scales in 8 bits.
        cache_quantized: the quantised base is kept on disk.
        compute_bytes: of an activation: 2 in bf16, 4 in fp32.
        eager_attention: asked for by the recipe.
        family: of the adapter.
        r: its rank.
        targets: names of adapted modules; None: all linear layers.
        max_length: tokens of a row at most.
        packing: several samples in a row.
        has_kl: a reference pass, and the divergence or a look at each target's probability.
        holds_prompt: the divergence also where nothing is learned.
        anchor_rows: rows beside those of a step on which the policy is held near the base.
        kl_every: in one of so many steps.
        direction: of the divergence.
        is_warm: its temperature is not 1.
        ce_by_entropy: targets are weighted by the policy's entropy.
        kl_by_entropy: rows of the divergence are weighted by the reference's.
        cached_reference: the base's hidden states are kept.
        cached_by_sample: one record per sample, not one per epoch.
        zero_stage: of DeepSpeed.
        zero_hpz_partition_size: data-parallel ranks over which stage 3 cuts the base; None: all.
        tensor_parallel_degree: ranks that share a model.
        sequence_parallel: also by tokens.
        offload: the optimizer's state is in the host's memory.
        micro_batch_size: rows.
        checkpointing: none, reentrant or non_reentrant.
        checkpointed_layers: part of the layers that are recomputed.
        rows_per_step: of all ranks.
        steps: updates; None: not known without the data.
        epochs: passes over the data; None: not known.
        keep_checkpoints: how many.
        data: None where it cannot be read cheaply.
        context_parallel_degree: data-parallel ranks that share a row.
        may_share_rows: no option of the recipe looks at whole rows.
        selects_targets: the reference says which targets are learned, and there is no divergence.
        oft_block_size: inputs that OFT turns together.
        anchors_alone: the divergence is on the anchors' rows, not on what is learned.
    """

    nf4: bool
    double_quantization: bool
    cache_quantized: bool
    compute_bytes: int
    eager_attention: bool
    family: str
    r: int
    targets: tuple[str, ...] | None
    max_length: int
    packing: bool
    has_kl: bool
    holds_prompt: bool
    anchor_rows: int
    kl_every: int
    direction: str
    is_warm: bool
    ce_by_entropy: bool
    kl_by_entropy: bool
    cached_reference: bool
    cached_by_sample: bool
    zero_stage: int
    tensor_parallel_degree: int
    sequence_parallel: bool
    offload: bool
    micro_batch_size: int
    checkpointing: str
    checkpointed_layers: float
    rows_per_step: int
    steps: int | None
    epochs: float | None
    keep_checkpoints: int
    data: DataGlance | None
    context_parallel_degree: int = 1
    may_share_rows: bool = False
    selects_targets: bool = False
    anchors_alone: bool = False
    oft_block_size: int = 32
    zero_hpz_partition_size: int | None = None

    @property
    def tokens(self) -> int:
        """Tokens of the largest micro-batch that one rank has."""
        return -(-self.micro_batch_size * self.max_length // self.context_parallel_degree)

    @property
    def row_tokens(self) -> float:
        """Tokens of a row that are computed, on average, padding included."""
        if self.packing or self.data is None:
            return float(self.max_length)
        # A micro-batch is as long as its longest sample, about 1.5 times the mean of many.
        longest = self.data.mean_tokens * (1 + 0.5 * (1 - 1 / self.micro_batch_size))
        return min(float(self.max_length), max(1.0, longest))

    @property
    def head_share(self) -> float:
        """Part of the tokens that are rows of the head: what is learned, if that can be seen."""
        return 1.0 if self.holds_prompt or self.data is None else self.data.learned

    def recomputed(self, num_layers: int) -> int:
        """Layers of which only the input is kept."""
        if self.checkpointing == "none":
            return 0
        return math.ceil(round(self.checkpointed_layers * num_layers, 9))

    @classmethod
    def of(cls, config: Config, *, on_gpu: bool = True, by_tokens: bool = True) -> Workload:
        """That of a recipe.

        Args:
            config: the recipe.
            on_gpu: else on a CPU, which computes in fp32 unless the recipe says otherwise.
            by_tokens: of the architecture: what the recipe gets where it leaves it open.
        """
        model, parallel, train = config.model, config.parallel, config.train
        data = glance(config)
        rows = train.global_batch_sequences or max(
            1, (train.global_batch_tokens or 1) // config.data.max_length
        )
        in_bf16 = model.dtype == "bfloat16" or (model.dtype == "auto" and on_gpu)
        targets = config.adapter.target_modules
        found = cls(
            nf4=model.quantization == "nf4",
            double_quantization=model.double_quantization,
            cache_quantized=model.cache_quantized,
            compute_bytes=2 if in_bf16 else 4,
            eager_attention=model.attention == "eager",
            family=config.adapter.method,
            r=config.adapter.r,
            targets=None if isinstance(targets, str) else tuple(targets),
            max_length=config.data.max_length,
            packing=config.data.packing,
            has_kl=config.regularizer.runs_base,
            holds_prompt=config.regularizer.holds_prompt,
            anchor_rows=math.ceil(anchors.fraction * rows / config.regularizer.every)
            if (anchors := config.regularizer.anchors) and config.regularizer.has_divergence
            else 0,
            kl_every=config.regularizer.every,
            direction=config.regularizer.direction,
            is_warm=config.regularizer.temperature != 1.0,
            ce_by_entropy=config.regularizer.ce_weighting == "entropy",
            kl_by_entropy=config.regularizer.kl_weighting == "entropy",
            cached_reference=config.reference.cache,
            cached_by_sample=config.reference.match == "sample",
            zero_stage=parallel.zero_stage,
            zero_hpz_partition_size=parallel.zero_hpz_partition_size,
            tensor_parallel_degree=parallel.tensor_parallel_degree,
            sequence_parallel=parallel.tensor_parallel_degree > 1
            and (by_tokens if parallel.sequence_parallel == "auto" else parallel.sequence_parallel),
            offload=parallel.offload == "optimizer",
            micro_batch_size=train.micro_batch_size,
            checkpointing=train.gradient_checkpointing,
            checkpointed_layers=train.checkpointed_layers,
            rows_per_step=rows,
            steps=train.steps,
            epochs=train.epochs,
            keep_checkpoints=train.keep_checkpoints,
            data=data,
            context_parallel_degree=parallel.context_parallel_degree,
            may_share_rows=model.attention in ("auto", "sdpa")
            and not config.adapter.dropout
            and not config.reference.cache
            and all(r.first_tokens is None for _, r in config.regularizers()),
            oft_block_size=config.adapter.oft_block_size,
            selects_targets=config.regularizer.selects_targets,
            anchors_alone=not config.regularizer.compares_task
            and config.regularizer.has_divergence,
        )
        return found._with_steps()

    def _with_steps(self) -> Workload:
        """Steps of so many epochs, or epochs of so many steps, where the data could be seen."""
        from dataclasses import replace

        if self.data is None:
            return self
        rows = float(self.data.num_samples)
        if self.packing:
            rows *= min(1.0, self.data.mean_tokens / self.max_length)
        steps_per_epoch = max(1.0, rows / self.rows_per_step)
        if self.steps is None and self.epochs is not None:
            return replace(self, steps=math.ceil(self.epochs * steps_per_epoch))
        if self.epochs is None and self.steps is not None:
            return replace(self, epochs=self.steps / steps_per_epoch)
        return self


def glance(config: Config) -> DataGlance | None:
    """Samples and their mean length, if every source is a local file of JSON lines."""
    samples = tokens = learned = 0.0
    for source in config.data.train:
        path = Path(source.path) if source.path is not None else None
        if path is None or path.suffix != ".jsonl" or not path.is_file():
            return None
        seen = _glance_at(path)
        if seen is None:
            return None
        num = min(seen.num_samples, source.limit or seen.num_samples) * source.weight
        samples, tokens = samples + num, tokens + num * seen.mean_tokens
        learned += num * seen.mean_tokens * seen.learned
    if samples < 1:
        return None
    return DataGlance(
        num_samples=round(samples),
        mean_tokens=tokens / samples,
        learned=learned / tokens if tokens else 1.0,
    )


def _glance_at(path: Path) -> DataGlance | None:
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(GLANCE_BYTES)
    lines = start.split(b"\n")
    whole = lines if len(start) == size else lines[:-1]
    rows = [line for line in whole if line.strip()]
    if not rows:
        return None
    try:
        values = [json.loads(row) for row in rows]
        characters = [sum(map(len, _texts(value))) for value in values]
        learned = [_learned(v, all_of) for v, all_of in zip(values, characters, strict=True)]
    except ValueError:
        return None
    read = sum(len(line) + 1 for line in whole)
    num = len(rows) if len(start) == size else round(len(rows) * size / read)
    return DataGlance(
        num_samples=num,
        mean_tokens=sum(characters) / len(rows) / CHARACTERS_PER_TOKEN,
        learned=sum(learned) / max(1, sum(characters)),
    )


def _learned(value: Any, characters: int) -> int:
    """Characters that are learned: of answers, where they can be told; else all."""
    if not isinstance(value, dict):
        return characters
    row = cast("dict[str, Any]", value)
    messages: Any = row.get("messages")
    if isinstance(messages, list):
        said = [m for m in cast("list[Any]", messages) if isinstance(m, dict)]
        answers = [m for m in cast("list[dict[str, Any]]", said) if m.get("role") == "assistant"]
        return sum(map(len, _texts([m.get("content") for m in answers])))
    if "prompt" in row and "completion" in row:
        return sum(map(len, _texts(row["completion"])))
    return characters


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner)
