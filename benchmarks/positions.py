"""One training step that holds every position near the base, against one that holds the targets.

    python benchmarks/positions.py                        # CPU: the head is 6 % of the products
    python benchmarks/positions.py --size 3b --tokens 4096 --prompt 0.9 --out positions  # a GPU

One engine in one process, the steps of both in turns on the same samples, so that neither a busy
machine nor a warm cache favours one. What is compared is the process's own time on a CPU and the
clock's on a GPU: the ratio of the medians. Models and samples are those of step_cost.py.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from step_cost import SIZES, add_options, recipe, write_model

from moored.config import Config
from moored.data import TrainStream, load_samples
from moored.distributed.mesh import peak_memory_bytes
from moored.models.base_files import resolve_base
from moored.models.engine import Engine, leave
from moored.models.policy import load_policy
from moored.training.lifecycle import join_mesh
from moored.training.step import StepStats, train_step

POSITIONS = ("targets", "all")


def main() -> None:
    """Train in turns and print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_options(parser)
    parser.add_argument("--steps", type=int, default=9, help="of each")
    parser.add_argument("--skip", type=int, default=2, help="first steps left out")
    parser.add_argument("--prompt", type=float, default=0.75, help="share that is not learned")
    parser.add_argument("--cached", action="store_true", help="no forward of the base")
    parser.add_argument("--out", type=Path, help="the figures as JSON")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), args)
    print(table(found, args))
    if args.out:
        figures = {"arguments": vars(args) | {"out": str(args.out)}, "steps": found}
        args.out.with_suffix(".json").write_text(json.dumps(figures, indent=1) + "\n")


def measure(place: Path, args: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """Seconds, peak of memory and rows of the head of every step, for both."""
    model = write_model(place / "model", SIZES[args.size])
    data = write_data(place / "train.jsonl", args.tokens, args.sequences * 4, args.prompt)
    configs: dict[str, Config] = {}
    for positions in POSITIONS:
        given = recipe(place, model, data, "tmkl", args)
        given["regularizer"] = {"kind": "tmkl", "positions": positions}
        configs[positions] = Config.model_validate(given)
    config = configs["targets"]
    mesh = join_mesh(config)
    base = resolve_base(config.model, mesh)
    samples = load_samples(config.data.train, base.tokenizer, config.data, base.vocab_size)
    streams = {name: TrainStream(configs[name], base.tokenizer, samples) for name in POSITIONS}
    engine = Engine(load_policy(base.source.path, config, mesh), config, mesh)
    if args.cached:
        keep_in_memory(engine)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in POSITIONS}
    for step in range(args.steps):
        for name in POSITIONS if step % 2 else reversed(POSITIONS):
            batches = streams[name].next_step(dp_rank=0, dp_size=1)
            if args.cached:
                for batch in batches:
                    engine.reference(batch)
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            started = clock()
            stats: StepStats = train_step(
                engine,
                batches,
                mesh,
                step=step,
                regularizer=configs[name].regularizer,
                learning_rate=1e-4,
                seed=0,
            )
            seconds = clock() - started
            rows = sum(batch.num_targets + batch.num_prompt for batch in batches)
            peak = peak_memory_bytes(mesh.device) / 2**30
            found[name].append({"seconds": seconds, "rows": rows, "peak_gib": peak})
            print(f"{name} {step}: {seconds:.2f} s, {rows} rows, loss {stats.loss:.4f}", flush=True)
    engine.close()
    leave()
    return {name: steps[args.skip :] for name, steps in found.items()}


def keep_in_memory(engine: Engine) -> None:
    """Have the base run once for each batch, as with a reference cache that is full."""
    kept: dict[tuple[Any, ...], torch.Tensor] = {}
    run = engine.reference

    def remembered(batch: Any) -> torch.Tensor:
        key = batch.sample_ids, len(batch.targets)
        if key not in kept:
            kept[key] = run(batch)
        return kept[key]

    engine.reference = remembered


def clock() -> float:
    """Seconds: of this process on a CPU, after all that was asked of a GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def write_data(path: Path, tokens: int, count: int, prompt: float) -> Path:
    """Chats of `tokens` and a few more, of which a share is the prompt; a word is some 6 tokens."""

    def words(number: int, i: int) -> str:
        return " ".join(str((i * 7919 + k * 104729) % 100003) for k in range(number))

    with open(path, "w") as file:
        for i in range(count):
            asked, said = int(tokens * prompt / 6), max(1, int(tokens * (1.2 - prompt) / 6))
            file.write(json.dumps({"prompt": words(asked, i), "completion": words(said, i)}) + "\n")
    return path


def table(found: dict[str, list[dict[str, float]]], args: argparse.Namespace) -> str:
    """Medians, and their ratio."""
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU seconds"
    lines = [
        f"{args.size}, {args.tokens * args.sequences} tokens per step, {args.checkpointing}"
        f"{', cached reference' if args.cached else ''}, {where}",
        "",
        "| positions | rows of the head | seconds | / targets | peak GiB |",
        "|---|---|---|---|---|",
    ]
    seconds = {name: statistics.median(s["seconds"] for s in found[name]) for name in POSITIONS}
    for name, steps in found.items():
        rows = statistics.median(step["rows"] for step in steps)
        peak, ratio = max(step["peak_gib"] for step in steps), seconds[name] / seconds["targets"]
        lines.append(f"| {name} | {rows:.0f} | {seconds[name]:.2f} | {ratio:.3f} | {peak:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
