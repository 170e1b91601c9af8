"""Looks at the machine and at a recipe before a run: what is there, what would go wrong.

Everything found is printed; nothing is trained and no run directory is written.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import transformers
from rich.console import Console
from rich.text import Text

from moored.config import Config, DataConfig
from moored.data import BaseIdentity, DataReader, HeldSource, SampleSet, load_samples, turn_ends
from moored.data.batch import Sample
from moored.data.heldout import anchor_samples
from moored.distributed.mesh import Mesh, degree_for, leave_mesh, start_mesh
from moored.distributed.traffic import MicroBatch, Spread, micro_batch_traffic
from moored.evaluation.evaluate import build_suite
from moored.models.base_files import resolve_base
from moored.models.loading import require_layout
from moored.models.policy import PolicyModel, load_policy, num_checkpointed
from moored.models.untrained_tokens import in_words, untrained
from moored.plan import load_problem, machine_line
from moored.utils.environment import NOT_INSTALLED, PACKAGES, version_of, versions_of
from moored.utils.errors import UserError

GIB = 2**30


def run(config: Config | None) -> None:
    """Check the machine and, with a recipe, its data, its model and the reference's identity.

    Under torchrun the rendezvous and the ranks' agreement are checked too. What a run would bear,
    but not end well with, is said last.

    Raises:
        UserError: the first thing that would stop a run.
    """
    console = Console(markup=False, highlight=False, soft_wrap=True)
    if config is None:
        mesh = start_mesh()
    else:
        mesh = start_mesh(
            degree_for(config.parallel.tensor_parallel_degree),
            wait_seconds=config.parallel.rendezvous_seconds,
            folder=config.output.dir,
            context_parallel_degree=degree_for(config.parallel.context_parallel_degree),
            zero_hpz_partition_size=config.parallel.zero_hpz_partition_size,
        )
    try:
        if mesh.is_main:
            _machine(console, config)
        _rendezvous(console, mesh)
        warnings = [] if config is None else _recipe(console, config, mesh)
        if mesh.is_main:
            for line in warnings:
                console.print(f"warning     {line}", style="yellow")
            if not warnings:
                console.print("all is well", style="green")
    finally:
        leave_mesh()


def _machine(console: Console, config: Config | None) -> None:
    versions = versions_of(PACKAGES)
    for package, version in versions.items():
        if version == NOT_INSTALLED:
            raise UserError(f"{package} is not installed: pip install {package}")
    memory = psutil.virtual_memory()
    folder = config.output.dir if config is not None else Path.cwd()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    console.print(f"python      {version_of('python')} ({sys.executable})")
    console.print(f"packages    {', '.join(' '.join(item) for item in versions.items())}")
    console.print(
        f"machine     {psutil.cpu_count()} CPUs, {memory.total / GIB:.1f} GiB memory "
        f"({memory.available / GIB:.1f} free), {free / GIB:.1f} GiB disk free at {folder}"
    )
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            console.print(
                f"gpu {index}       {properties.name}, {properties.total_memory / GIB:.0f} GiB, "
                f"compute capability {properties.major}.{properties.minor}"
            )
    else:
        console.print("gpu         none: training runs in fp32 on the CPU")
    if free < GIB:
        raise UserError(f"{folder} has {free / GIB:.2f} GiB free: a run needs 1 GiB at least")


def _rendezvous(console: Console, mesh: Mesh) -> None:
    ones = mesh.world.sum(torch.ones(1, device=mesh.device)).item()
    if ones != mesh.world.size:
        raise UserError(f"an all-reduce over {mesh.world.size} ranks summed to {ones}")
    if mesh.is_main:
        console.print(f"processes   {mesh.world.size}, all-reduce works on {mesh.device.type}")


def _recipe(console: Console, config: Config, mesh: Mesh) -> list[str]:
    """What is printed of a recipe; warnings come back."""
    reader = DataReader()
    reader.check(config)
    base_files = resolve_base(config.model, mesh)
    source, tokenizer = base_files.source, base_files.tokenizer
    load = partial(
        load_samples,
        tokenizer=tokenizer,
        data=config.data,
        vocab_size=base_files.vocab_size,
        reader=reader,
    )
    samples = load(config.data.train)
    held_out = load(config.data.eval, section="data.eval")
    ends = turn_ends(samples, tokenizer, config.data.max_length)
    suite = build_suite(config, base_files, mesh, reader, held_out)
    anchors = anchor_samples(
        config, tokenizer, BaseIdentity(model=config.model, revision=source.revision), reader
    )
    del reader  # all is tokenised, and what it holds would stay beside the model
    if mesh.is_main:
        console.print(f"model       {config.model.name_or_path} from {source.origin}")
        _show(console, samples, tokenizer, config.data)
        if config.data.eval:
            _show(console, held_out, tokenizer, config.data)
        named = ", ".join(f"{end.token} ({end.count})" for end in ends) or "no token of their own"
        console.print(f"ends        of what is learned: {named}")
        for name, text in suite.retention.items():
            scored = sum(batch.num_targets for batch in text.batches)
            console.print(f"retention   {name}: {scored} scored tokens on this rank")
        for task in suite.tasks.tasks if suite.tasks else ():
            counted = f"{task.num_asked:,} of {task.num_questions:,} questions"
            console.print(f"suite       {task.name}: {counted}, {task.shown_metric}")
        if anchors:
            held = sum(map(len, anchors))
            console.print(f"anchors     {len(anchors)} windows, {held} tokens, none is measured")
    degree = config.parallel.tensor_parallel_degree
    if degree > mesh.tp.size:
        require_layout(source.path, config.model, config.parallel)
        if mesh.is_main:
            console.print(f"sharding    over {degree} ranks is possible; here the model is whole")
    if problems := _planned(console, config, source.path, mesh):
        return problems
    policy = load_policy(source.path, config, mesh)
    if mesh.is_main:
        trained = sum(_whole_size(policy, name) for name in policy.trainable())
        console.print(
            f"adapter     {trained:,} parameters; with adapters off the model is its base"
        )
        if policy.sharding is not None:
            console.print(f"sharding    {_sharded(policy, config, mesh, anchors)}")
    ends = untrained(policy.head, ends, mesh.tp)
    return [in_words(end, tokenizer, config.model.name_or_path) for end in ends]


def _planned(console: Console, config: Config, folder: Path, mesh: Mesh) -> list[str]:
    """Says what the recipe would take of this machine's GPUs; why the base is not loaded here.

    The ranks agree, since loading is collective.
    """
    on_gpu, problems = mesh.device.type == "cuda", list[str]()
    if on_gpu:
        properties = torch.cuda.get_device_properties(mesh.device)
        memory = properties.total_memory
        num_gpus = torch.cuda.device_count()
        line, fits = machine_line(config, folder, properties.name, memory, num_gpus)
        if mesh.is_main:
            console.print(f"plan        {line}", style=None if fits else "yellow")
    else:
        memory = psutil.virtual_memory().available
    problem = load_problem(
        config,
        folder,
        degree=mesh.tp.size,
        world=mesh.world.size,
        on_gpu=on_gpu,
        memory_bytes=memory,
    )
    if mesh.world.max(float(problem is not None), mesh.device) > 0:
        problems.append(problem or "another process has too little memory for the base")
    return problems


def _whole_size(policy: PolicyModel, name: str) -> int:
    parameter = policy.get_parameter(name)
    split = policy.sharding.split_of(name) if policy.sharding is not None else None
    if split is None:
        return parameter.numel()
    return parameter.numel() // parameter.shape[split.dim] * split.whole


def _sharded(
    policy: PolicyModel, config: Config, mesh: Mesh, anchors: Sequence[Sample] = ()
) -> str:
    """What this rank holds, and what a micro-batch of full length sends, and those beside it."""
    length, rows = config.data.max_length, config.train.micro_batch_size
    num, regularizer = rows * length, config.regularizer
    batch = MicroBatch(
        rows=rows,
        length=length,
        num_targets=num,
        num_kl=num if regularizer.is_divergent else 0,
        num_selected_from=num if regularizer.selects_targets else 0,
    )
    packed = sum(p.nbytes for p in policy.parameters() if p.dtype == torch.uint8)
    spread = spread_of(policy, config, mesh)

    def told(batch: MicroBatch) -> str:
        sent = micro_batch_traffic(spread, batch)
        size = sum(s.wire_bytes(mesh.tp.size) for s in sent) / 1e6
        return f"{size:,.1f} MB per rank in {sum(s.count for s in sent)} collectives"

    line = (
        f"rank 0 of {mesh.tp.size} holds {packed / 1e6:,.1f} MB of 4-bit weights; a micro-batch of "
        f"{rows} x {length} tokens sends {told(batch)}"
    )
    for what, share, one in _beside(config, anchors):
        line += f"; one of {what} ({one.rows} x {one.length}, {share:g} beside each) {told(one)}"
    return line


def _beside(config: Config, anchors: Sequence[Sample]) -> Iterator[tuple[str, float, MicroBatch]]:
    """What runs beside the micro-batches of the task: what, how many to one, and the largest."""
    regularizer, rows, length = config.regularizer, config.train.micro_batch_size, 0
    if anchors and regularizer.anchors is not None:
        longest = max(map(len, anchors))
        length = config.data.max_length if config.data.packing else longest
        # A sample's last token has no next one that could be told.
        held = length - (length // longest if config.data.packing else 1)
        one = MicroBatch(rows=rows, length=length, num_targets=0, num_kl=0, num_prompt=rows * held)
        yield "anchors", regularizer.anchors.fraction / regularizer.every, one
    if regularizer.kind == "replay":
        length = config.data.max_length
        one = MicroBatch(rows=rows, length=length, num_targets=rows * length, num_kl=0)
        yield "replayed text", regularizer.replay_fraction, one


def spread_of(policy: PolicyModel, config: Config, mesh: Mesh) -> Spread:
    """What `traffic.py` needs to know of a model that is spread over ranks."""
    assert policy.sharding is not None
    trained = policy.trainable().items()
    hf_config: Any = policy.causal_lm.get_base_model().config
    num_layers: int = hf_config.get_text_config().num_hidden_layers
    return Spread(
        degree=mesh.tp.size,
        hidden_size=hf_config.get_text_config().hidden_size,
        num_layers=num_layers,
        activation_bytes=policy.compute_dtype.itemsize,
        shared_adapter_sizes=[
            p.numel() for name, p in trained if policy.sharding.split_of(name) is None
        ],
        sequence_parallel=policy.sequence_parallel,
        checkpointing=config.train.gradient_checkpointing,
        num_recomputed=num_checkpointed(config.train.checkpointed_layers, num_layers),
        chunk_tokens=policy.head.chunk_tokens_for(10**6),
        direction=config.regularizer.direction,
        is_warm=config.regularizer.temperature != 1.0,
        ce_by_entropy=config.regularizer.ce_weighting == "entropy",
        kl_by_entropy=config.regularizer.kl_weighting == "entropy",
        by_kernels=policy.head.has_kernels,
    )


def _show(console: Console, samples: SampleSet, tokenizer: Any, data: DataConfig) -> None:
    """Shows what each source has and what was left out, and one sample of it as it is learned."""
    for index, (source, first) in enumerate(zip(samples.sources, samples.at_hand(), strict=True)):
        counted = f"{len(first)} samples, {first.num_tokens} tokens, {first.num_targets} learned"
        if not isinstance(source, HeldSource):
            counted = f"streamed; its first block has {counted}"
        console.print(f"{samples.section}.{index:<2}{source.name}: {counted}")
        drops = first.drops
        left_out = drops.reasons(data)
        left_out += [f"{drops.truncated} cut to {data.max_length} tokens"] * bool(drops.truncated)
        console.print(f"            left out: {', '.join(left_out) or 'nothing'}")
        for note in [*drops.notes(), *[drops.split_note] * bool(drops.split)]:
            console.print(f"            {note}", style="yellow")
        console.print("            one of them, what is learned in green and between « and »:")
        console.print(_coloured(first[0], tokenizer))


def _coloured(sample: Sample, tokenizer: transformers.PreTrainedTokenizerBase) -> Text:
    text = Text("            ")
    # Runs of tokens: a character may be spread over several. The first is predicted by nothing.
    learned = sample.label_mask & (np.arange(len(sample)) > 0)
    cuts = np.flatnonzero(np.diff(learned)) + 1
    runs = zip(np.split(sample.input_ids, cuts), np.split(learned, cuts), strict=True)
    for tokens, is_learned in runs:
        words = str(tokenizer.decode(tokens))
        text.append(
            f"«{words}»" if is_learned[0] else words, style="bold green" if is_learned[0] else "dim"
        )
    return text
