"""Where the time of a training step goes: a whole run under torch.profiler, as text.

    python benchmarks/profile_step.py [--size 70m] [--arm tmkl] [--out profile.txt]

One table of the parts of a step (each with what it calls), and one of the operators that take most
time by themselves; both in milliseconds per step. Same runs as `step.py`, one in this process.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from step_cost import ARMS, SIZES, add_options, recipe, write_data, write_model
from torch.profiler import ProfilerActivity, profile, record_function

import moored.training.train
from moored.config import Config
from moored.loss.head import Head
from moored.models.engine import Engine
from moored.models.nf4 import FrozenLinear4bit

PARTS = {
    "reference pass": (Engine, "reference"),
    "adapted pass": (Engine, "forward"),
    "head and loss": (Head, "forward"),
    "4-bit weights decoded": (FrozenLinear4bit, "dequantized"),
    "backward": (Engine, "backward"),
    "update": (Engine, "step"),
}


def main() -> None:
    """Train a few steps and print the tables of the last ones."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_options(parser)
    parser.add_argument("--arm", choices=ARMS, default="tmkl")
    parser.add_argument("--skip", type=int, default=2, help="first steps left out")
    parser.add_argument("--steps", type=int, default=5, help="in all")
    parser.add_argument("--rows", type=int, default=16, help="operators shown")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    for name, (owner, method) in PARTS.items():
        setattr(owner, method, named(name, getattr(owner, method)))
    profiler = profile(activities=activities)
    count = 0
    train_step = moored.training.train.train_step

    def watched(*positional: Any, **named: Any) -> Any:
        nonlocal count
        if count == args.skip:
            profiler.start()
        found = train_step(*positional, **named)
        count += 1
        if count == args.steps:
            profiler.stop()
        return found

    moored.training.train.train_step = watched
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        model = write_model(place / "model", SIZES[args.size])
        data = write_data(place / "train.jsonl", args.tokens, args.sequences * 4)
        config = Config.model_validate(recipe(place, model, data, args.arm, args))
        moored.training.train.run(config)
    text = tables(profiler, args, on_gpu=on_gpu)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


def named(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as a part of the profile."""

    @functools.wraps(function)
    def recorded(*positional: Any, **named: Any) -> Any:
        with record_function(name):
            return function(*positional, **named)

    return recorded


def tables(profiler: profile, args: argparse.Namespace, *, on_gpu: bool) -> str:
    """Both, in milliseconds per step."""
    machine = torch.cuda.get_device_name() if on_gpu else f"{torch.get_num_threads()} CPU threads"
    steps, events = args.steps - args.skip, profiler.key_averages()
    unit = 1e3 * steps
    total, alone = ("device_time_total", "self_device_time_total") if on_gpu else (
        "cpu_time_total", "self_cpu_time_total"
    )  # fmt: skip
    whole = sum(getattr(event, alone) for event in events) / unit
    lines = [
        f"{args.size}, {args.arm}, {args.tokens * args.sequences} tokens per step, "
        f"{args.checkpointing}, on {machine}, torch {torch.__version__}: {whole:,.0f} ms per step",
        "",
        f"{'part, with what it calls':<40}{'ms':>10}{'share':>8}{'calls':>8}",
    ]
    parts = {event.key: event for event in events if event.key in PARTS}
    for name in PARTS:
        if name in parts:
            spent = getattr(parts[name], total) / unit
            lines.append(
                f"{name:<40}{spent:>10,.1f}{spent / whole:>8.1%}{parts[name].count / steps:>8,.0f}"
            )
    lines += ["", f"{'operator, by itself':<40}{'ms':>10}{'share':>8}{'calls':>8}"]
    others = [event for event in events if event.key not in PARTS]
    for event in sorted(others, key=lambda event: -getattr(event, alone))[: args.rows]:
        spent = getattr(event, alone) / unit
        lines.append(
            f"{event.key[:39]:<40}{spent:>10,.1f}{spent / whole:>8.1%}{event.count / steps:>8,.0f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
