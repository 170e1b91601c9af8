"""A recipe on several meshes, compared with one process: losses, adapters, memory.

    python benchmarks/meshes.py recipes/quickstart/slurm-headers.yaml --steps 4 1x3 1x2 2x1
    python benchmarks/meshes.py RECIPE --site minicluster 2x1@2 4x1@2 2x2@2

Prints a table in Markdown. MESH is DPxTP; `1x2z3s` adds ZeRO stage 3 and sequence parallelism, and
`@2` is a job on two nodes of a SLURM cluster.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

# At Adam's default eps an entry that is nothing but rounding moves by the whole learning rate.
SETTINGS = [
    "optim.eps=1e-3",
    "optim.warmup_steps=1",
    "evaluation.before=false",
    "evaluation.exact_match=false",
    "track.mlflow=false",
]


def run(recipe: str, mesh: str, steps: int, folder: Path, site: str) -> Path:
    match = re.fullmatch(r"(\d+)x(\d+)(?:z(\d))?(s?)(?:@(\d+))?", mesh)
    if match is None:
        sys.exit(f"{mesh}: expected DPxTP, such as 1x2, 2x2z3, 1x2z0s or 2x1@2")
    name = mesh.replace("@", "-on-")
    dp, tp, stage, sequence = int(match[1]), int(match[2]), match[3] or "0", bool(match[4])
    moored = [sys.executable, "-m", "moored"]
    if match[5]:
        command = [*moored, "submit", recipe, "--site", site, "--nodes", match[5]]
        command += ["--set", f"slurm.ranks_per_node={dp * tp // int(match[5])}"]
    else:
        torchrun = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={dp * tp}"]
        command = [
            *(torchrun if dp * tp > 1 else [sys.executable]),
            "-m",
            "moored",
            "train",
            recipe,
        ]
    command += [*SETTINGS, f"train.steps={steps}", f"name={name}", f"output.dir={folder}"]
    command += [f"parallel.zero_stage={stage}"]
    if tp > 1:
        command += [f"parallel.tensor_parallel_degree={tp}"]
        command += [f"parallel.sequence_parallel={str(sequence).lower()}"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    state = folder / name / "state.json"
    while match[5] and (not state.exists() or json.loads(state.read_text())["status"] != "done"):
        if (folder / name / "slurm/ended").exists():
            sys.exit(f"{mesh}: {(folder / name / 'slurm/ended').read_text()}")
        time.sleep(1)
    return folder / name


def figures(path: Path) -> tuple[list[float], list[float], dict[str, Any], float]:
    losses, norms = [], []
    for line in (path / "journal.jsonl").read_text().splitlines():
        values = json.loads(line).get("values", {})
        if "train/loss" in values:
            losses.append(values["train/loss"])
            norms.append(values["train/grad_norm"])
    [arm] = json.loads((path / "report/report.json").read_text())["arms"].values()
    adapter = load_file(path / "adapter/adapter_model.safetensors")
    return losses, norms, adapter, arm["peak_memory_bytes"] / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe")
    parser.add_argument("meshes", nargs="+", metavar="MESH")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--site", default="minicluster", help="profile of meshes with an @")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        one = figures(run(arguments.recipe, "1x1", arguments.steps, Path(folder), ""))
        print("| mesh | loss | gradient norm | adapter | resident MiB |\n|---|---|---|---|---|")
        print(f"| 1x1 | | | | {one[3]:,.0f} |")
        for mesh in arguments.meshes:
            losses, norms, adapter, memory = figures(
                run(arguments.recipe, mesh, arguments.steps, Path(folder), arguments.site)
            )
            pairs = ((losses, one[0]), (norms, one[1]))
            loss, norm = (
                max(abs(a - b) / abs(b) for a, b in zip(*pair, strict=True)) for pair in pairs
            )
            distance = max(
                float((adapter[name] - tensor).norm() / tensor.norm())
                for name, tensor in one[2].items()
            )
            print(f"| {mesh} | {loss:.1e} | {norm:.1e} | {distance:.1e} | {memory:,.0f} |")


if __name__ == "__main__":
    main()
