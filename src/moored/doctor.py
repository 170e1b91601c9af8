"""Looks at the machine and at a recipe before a run: what is there, what would go wrong.

Everything found is printed; nothing is trained and no run directory is written.
"""

from __future__ import annotations

import platform
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import psutil
import torch
import transformers
from rich.console import Console
from rich.text import Text

from moored.base import locate
from moored.batch import Sample
from moored.config import Config
from moored.data import SampleSet, check_data, load_samples
from moored.errors import UserError
from moored.evaluate import build_suite
from moored.mesh import Mesh, degree_for, leave_mesh, start_mesh
from moored.model import load_policy

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "deepspeed", "datasets", "mlflow")
GIB = 2**30


def run(config: Config | None) -> None:
    """Check the machine and, with a recipe, its data, its model and the reference's identity.

    Under torchrun the rendezvous and the ranks' agreement are checked too.

    Raises:
        UserError: the first thing that would stop a run.
    """
    console = Console(markup=False, highlight=False, soft_wrap=True)
    mesh = start_mesh(1 if config is None else degree_for(config.parallel.tensor_parallel_degree))
    try:
        if mesh.is_main:
            _machine(console, config)
        _rendezvous(console, mesh)
        if config is not None:
            _recipe(console, config, mesh)
        if mesh.is_main:
            console.print("all is well", style="green")
    finally:
        leave_mesh()


def _machine(console: Console, config: Config | None) -> None:
    versions = []
    for package in PACKAGES:
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            raise UserError(f"{package} is not installed: pip install {package}") from None
    memory = psutil.virtual_memory()
    folder = config.output.dir if config is not None else Path.cwd()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    console.print(f"python      {platform.python_version()} ({sys.executable})")
    console.print(f"packages    {', '.join(versions)}")
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


def _recipe(console: Console, config: Config, mesh: Mesh) -> None:
    check_data(config)
    located = locate(config.model, mesh)
    source, tokenizer = located.source, located.tokenizer
    samples = load_samples(config.data.train, tokenizer, config.data, located.vocab_size)
    suite = build_suite(config, located, mesh)
    if mesh.is_main:
        console.print(f"model       {config.model.name_or_path} from {source.origin}")
        console.print(
            f"data        {samples.num_samples} samples, {samples.num_tokens} tokens"
            f"{_streamed(samples)}; one of them, its targets in green:"
        )
        console.print(_coloured(samples.example(), tokenizer))
        for name, batches in suite.retention.items():
            scored = sum(batch.num_targets for batch in batches)
            console.print(f"retention   {name}: {scored} scored tokens on this rank")
    policy = load_policy(source.path, config, mesh)
    if mesh.is_main:
        trained = sum(p.numel() for p in policy.trainable().values())
        console.print(
            f"adapter     {trained:,} parameters; with adapters off the model is its base"
        )


def _streamed(samples: SampleSet) -> str:
    count = len(samples.sources) - len(samples.held)
    return f" and {count} streamed {'sources' if count > 1 else 'source'}" if count else ""


def _coloured(sample: Sample, tokenizer: transformers.PreTrainedTokenizerBase) -> Text:
    text = Text("            ")
    # Runs of tokens: a character may be spread over several.
    cuts = np.flatnonzero(np.diff(sample.label_mask)) + 1
    runs = zip(np.split(sample.input_ids, cuts), np.split(sample.label_mask, cuts), strict=True)
    for tokens, scored in runs:
        text.append(str(tokenizer.decode(tokens)), style="bold green" if scored[0] else "dim")
    return text
