"""Makes the quickstart's task: requests in plain English and the `#SBATCH` header that each means.

The mapping is a function: one request has one right header, options in a fixed order and only those
that were asked for, so an answer is checkable by exact match. The output is committed beside the
recipe and a test holds both together. Never imported by the package; it reads nothing.

    python benchmarks/quickstart/make_task.py recipes/quickstart
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import dataclass
from pathlib import Path

SEED = 20260529
NUM_TRAIN = 320
NUM_EVAL = 60
SYSTEM = "Write the SLURM header."

# fmt: off
JOBS = (
    "align", "bert", "blast", "climate", "dock", "fluid", "fold", "genome", "lattice", "merge",
    "mesh", "orbit", "parse", "plasma", "protein", "quake", "relax", "render", "scan", "score",
    "seismic", "solver", "sort", "spectra", "sweep", "tensor", "tomo", "trace", "train", "vision",
    "weather", "wind",
)
PARTITIONS = (
    "gpu", "cpu", "debug", "long", "short", "bigmem", "a100", "h100", "batch", "preempt",
)
# fmt: on
NODES = (1, 2, 3, 4, 6, 8, 12, 16)
GPUS_PER_NODE = (1, 2, 4, 8)
MINUTES = (10, 15, 20, 30, 45, 60, 90, 120, 150, 180, 240, 300, 360, 480, 600, 720, 1440, 2880)
MEMORY_GB = (4, 8, 16, 24, 32, 48, 64, 96, 128, 256)
WORDS = {1: "one", 2: "two", 3: "three", 4: "four", 6: "six", 8: "eight", 12: "twelve"}

OPENERS_WITH_JOB = (
    "Run {job}",
    "Please run {job}",
    "Submit {job}",
    "I need to run {job}",
    "Can you queue {job}",
    "Start a job called {job}",
    "Launch {job}",
    "Schedule the job {job}",
    "Set up a run named {job}",
)
OPENERS = (
    "Run this",
    "I need a job",
    "Please submit my script",
    "Queue this",
    "Give me a header for a job",
    "Let my script run",
    "Start the run",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is asked of SLURM; None: not asked for, so not in the header."""

    job: str | None
    partition: str
    nodes: int | None
    gpus_per_node: int | None
    minutes: int | None
    memory_gb: int | None

    def header(self) -> str:
        """The one right answer."""
        lines = [
            ("job-name", self.job),
            ("partition", self.partition),
            ("nodes", self.nodes),
            ("gpus-per-node", self.gpus_per_node),
            ("time", self.minutes and f"{self.minutes // 60}:{self.minutes % 60:02d}:00"),
            ("mem", self.memory_gb and f"{self.memory_gb}G"),
        ]
        return "\n".join(f"#SBATCH --{key}={value}" for key, value in lines if value is not None)


def spoken_time(minutes: int, rng: random.Random) -> str:
    """Minutes as people say them."""
    special = {
        30: "half an hour",
        60: "an hour",
        90: "an hour and a half",
        150: "two and a half hours",
        1440: "a day",
        2880: "two days",
    }
    if minutes in special and rng.random() < 0.6:
        return special[minutes]
    if minutes % 60 == 0:
        hours = minutes // 60
        return "1 hour" if hours == 1 else f"{number(hours, rng)} hours"
    return f"{minutes} minutes"


def number(value: int, rng: random.Random) -> str:
    """A count in digits or, half the time and if it is small, as a word."""
    return WORDS[value] if value in WORDS and rng.random() < 0.5 else str(value)


def ask(request: Request, rng: random.Random) -> str:
    """The request as a sentence: one of many phrasings, its clauses in any order."""

    def phrase(*ways: str, **values: object) -> str:
        return rng.choice(ways).format(**values)

    clauses = [
        phrase(
            "on the {p} partition",
            "in partition {p}",
            "in the {p} queue",
            "on {p}",
            p=request.partition,
        )
    ]
    if request.nodes is not None:
        count = f"{number(request.nodes, rng)} {'node' if request.nodes == 1 else 'nodes'}"
        clauses.append(phrase("on {n}", "across {n}", "using {n}", "over {n}", n=count))
    if request.gpus_per_node is not None:
        word = "GPU" if request.gpus_per_node == 1 else "GPUs"
        count = f"{number(request.gpus_per_node, rng)} {word}"
        clauses.append(phrase("with {n} per node", "with {n} on each node", n=count))
    if request.minutes is not None:
        spoken = spoken_time(request.minutes, rng)
        clauses.append(phrase("for {t}", "for at most {t}", "with a limit of {t}", t=spoken))
    if request.memory_gb is not None:
        ways = ("with {g} GB of memory", "with {g} GB of RAM", "with {g}G of memory")
        clauses.append(phrase(*ways, g=request.memory_gb))
    rng.shuffle(clauses)
    opener = phrase(*(OPENERS if request.job is None else OPENERS_WITH_JOB), job=request.job)
    first, rest = " ".join(clauses[:2]), clauses[2:]
    return f"{opener} {', '.join((first, *rest))}{'?' if opener.startswith('Can') else '.'}"


def draw(rng: random.Random) -> Request:
    """A random request: always a partition, and one to three of the other five options."""
    asked = rng.sample(("job", "nodes", "gpus", "minutes", "memory"), rng.choice((1, 2, 2, 3)))
    return Request(
        job=rng.choice(JOBS) if "job" in asked else None,
        partition=rng.choice(PARTITIONS),
        nodes=rng.choice(NODES) if "nodes" in asked else None,
        gpus_per_node=rng.choice(GPUS_PER_NODE) if "gpus" in asked else None,
        minutes=rng.choice(MINUTES) if "minutes" in asked else None,
        memory_gb=rng.choice(MEMORY_GB) if "memory" in asked else None,
    )


def make(seed: int = SEED) -> dict[str, list[dict]]:
    """The two splits; no header occurs twice, so that none of eval's was seen in training."""
    rng = random.Random(seed)
    seen: set[str] = set()
    rows: list[dict] = []
    while len(rows) < NUM_TRAIN + NUM_EVAL:
        request = draw(rng)
        header, text = request.header(), ask(request, rng)
        if header in seen:
            continue
        seen.add(header)
        rows.append(
            {
                "messages": [
                    {"role": "system", "content": SYSTEM},
                    {"role": "user", "content": text},
                    {"role": "assistant", "content": header},
                ]
            }
        )
    return {"train": rows[:NUM_TRAIN], "eval": rows[NUM_TRAIN:]}


def main() -> None:
    """Write train.jsonl and eval.jsonl into the folder that is named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    for split, rows in make().items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
