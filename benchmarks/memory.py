"""Memory of a training step against tokens, vocabulary and layers.

    python benchmarks/memory.py [--out memory]

Whole runs, in a process each. The figure is what torch had allocated at most during a step above
what it held before it, by the allocator's own records on a CPU as on a GPU: neither the weights nor
what the optimizer keeps. One of the three is varied at a time.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from fresh import output_of
from outcome import Bar, Panel, add_option, write
from step_cost import ARMS, SIZES, recipe, write_data, write_model
from torch.profiler import ProfilerActivity, profile

VARIED = {
    "tokens": (512, 1024, 2048, 4096),
    "vocab": (8192, 32768, 131072),
    "layers": (4, 8, 16),
}
SHAPE = {"tokens": 1024, "vocab": 32768, "layers": 8}


def main() -> None:
    """A table per quantity, one row per value of it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="70m", help="of all that is not varied")
    parser.add_argument("--arms", nargs="*", choices=ARMS, default=["ce", "tmkl"])
    add_option(parser)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(measure(args.size, **json.loads(args.one)))
        return
    found = []
    for quantity, values in VARIED.items():
        print(f"\n| {quantity} | {' | '.join(f'{arm}, MiB' for arm in args.arms)} |")
        print("|---" * (1 + len(args.arms)) + "|")
        for value in values:
            runs = [SHAPE | {quantity: value, "arm": arm} for arm in args.arms]
            taken = [in_fresh_process(args.size, run) for run in runs]
            found += [run | {"bytes": n} for run, n in zip(runs, taken, strict=True)]
            print(f"| {value:,} | {' | '.join(f'{n / 2**20:,.0f}' for n in taken)} |", flush=True)
    write(args.out, found, "Memory of a step above what was held, MiB", picture(found, args.arms))


def picture(found: list[dict[str, Any]], arms: list[str]) -> list[Panel]:
    """A panel for each quantity that is varied."""
    panels, runs = [], iter(found)
    for quantity, values in VARIED.items():
        bars = []
        for value in values:
            for arm in arms:
                taken = next(runs)["bytes"] / 2**20
                name = f"{value:,} {quantity}, {arm}"
                bars.append(Bar(name=name, value=taken, is_ours=arm != "ce"))
        fixed = ", ".join(f"{n:,} {name}" for name, n in SHAPE.items() if name != quantity)
        panels.append(Panel(fixed, bars, form=",.0f"))
    return panels


def in_fresh_process(size: str, run: dict[str, Any]) -> int:
    """Bytes at most above what was held."""
    command = [sys.executable, __file__, "--size", size, "--one", json.dumps(run)]
    return int(output_of(str(run), command).splitlines()[-1])


def measure(size: str, tokens: int, vocab: int, layers: int, arm: str) -> int:
    """Train two steps; the second is watched."""
    import moored.training.train
    from moored.config import Config

    train_step, peaks = moored.training.train.train_step, []

    def watched(*positional: Any, **named: Any) -> Any:
        if torch.cuda.is_available():
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            stats = train_step(*positional, **named)
            peaks.append(torch.cuda.max_memory_allocated() - before)
            return stats
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watching:
            stats = train_step(*positional, **named)
        peaks.append(peak(watching))
        return stats

    moored.training.train.train_step = watched
    hidden, intermediate, _, heads, kv_heads, _ = SIZES[size]
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        shape = hidden, intermediate, layers, heads, kv_heads, vocab
        model = write_model(place / "model", shape)
        data = write_data(place / "train.jsonl", tokens, 4)
        settings = argparse.Namespace(
            tokens=tokens, sequences=1, micro_batch_size=1, checkpointing="non_reentrant",
            zero_stage=0, steps=2,
        )  # fmt: skip
        config = Config.model_validate(recipe(place, model, data, arm, settings))
        moored.training.train.run(config)
    return peaks[-1]


def peak(watched: profile) -> int:
    """The greatest sum of allocations less releases, in the order of time."""
    results = watched.profiler.kineto_results
    changes = sorted(
        (event.start_ns(), event.nbytes())
        for event in results.events()
        if event.name() == "[memory]"
    )
    held = most = 0
    for _, change in changes:
        held += change
        most = max(most, held)
    return most


if __name__ == "__main__":
    main()
