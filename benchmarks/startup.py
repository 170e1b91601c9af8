"""Seconds until a command answers and until a run takes its first step.

    python benchmarks/startup.py [--size 70m] [--rounds 3]

The commands take turns with the imports that no training script can do without; a base of random
weights in bf16 is quantised at the start, or read as 4-bit weights that an earlier start has kept.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml
from step_cost import ROOT, SIZES, recipe, write_data, write_model

IMPORTS = "import torch, transformers, peft, deepspeed, bitsandbytes"


def main() -> None:
    """Run everything in turns and print medians."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="70m")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        model = write_model(place / "model", SIZES[args.size])
        data = write_data(place / "train.jsonl", 64, 8)
        settings = argparse.Namespace(
            tokens=64, sequences=1, micro_batch_size=1, checkpointing="none", zero_stage=0, steps=1
        )
        runs = {}
        for name, kept in (("quantised at the start", False), ("kept in 4 bits", True)):
            found: dict[str, Any] = recipe(place / name, model, data, "tmkl", settings)
            found["model"]["cache_quantized"] = kept
            runs[name] = place / f"{name}.yaml"
            runs[name].write_text(yaml.safe_dump(found))
        commands = {
            "the imports alone": [sys.executable, "-c", IMPORTS],
            "moored --help": [sys.executable, "-m", "moored", "--help"],
            "moored train --help": [sys.executable, "-m", "moored", "train", "--help"],
            **{
                f"one step, {name}": [
                    sys.executable, "-m", "moored", "train", str(path), "--restart"
                ]
                for name, path in runs.items()
            },
        }  # fmt: skip
        taken: dict[str, list[float]] = {name: [] for name in commands}
        seconds(commands["one step, kept in 4 bits"], place)
        for _ in range(args.rounds):
            for name, command in commands.items():
                taken[name].append(seconds(command, place))
    bare = statistics.median(taken["the imports alone"])
    print("| | seconds | / the imports |\n|---|---|---|")
    for name, values in taken.items():
        middle = statistics.median(values)
        print(f"| {name} | {middle:.2f} | {middle / bare:.2f} |")


def seconds(command: list[str], folder: Path) -> float:
    """Of the command from start to end; for a run until its first step is done."""
    environment = os.environ | {
        "PYTHONPATH": str(ROOT / "src"), "MOORED_CACHE": str(folder / "cache")
    }  # fmt: skip
    start = time.perf_counter()
    with subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        assert process.stdout is not None
        seen, stop = [], None
        for line in process.stdout:
            seen.append(line)
            if stop is None and line.startswith("step 1/1"):
                stop = time.perf_counter()
        process.wait()
    if process.returncode:
        raise SystemExit(f"{command} failed:\n{''.join(seen)[-3000:]}")
    return (stop or time.perf_counter()) - start


if __name__ == "__main__":
    main()
