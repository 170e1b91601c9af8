"""Whether a change of the code changed a number: journals and adapters of short runs, bit for bit.

    python benchmarks/same_losses.py RECIPE --save before.json            # with the code as it was
    python benchmarks/same_losses.py RECIPE --against before.json         # with the code as it is

Trains RECIPE (the quickstart's by default) for a few steps in one process, and over two with
ZeRO 2, ZeRO 3 and tensor parallelism. Prints a hash over each run's metrics and one over its
adapter's tensors; with --against, exits with 1 if any differs. The code is that which
`import moored` finds, so PYTHONPATH may name another checkout. Both runs on one machine.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from safetensors.numpy import load_file

MESHES = {
    "1 process": (1, []),
    "2 processes, ZeRO 2": (2, ["parallel.zero_stage=2"]),
    "2 processes, ZeRO 3": (2, ["parallel.zero_stage=3"]),
    # Sums as older versions have them, which knew of no other default.
    "1 x 2 tensor parallel": (
        2,
        ["parallel.tensor_parallel_degree=2", "parallel.sequence_parallel=false"],
    ),
}
TIMED = ("seconds", "per_second", "bytes", "perf/")  # what no two runs have alike


def run(
    recipe: str, processes: int, options: list[str], folder: Path, new: tuple[str, ...] = ()
) -> dict[str, str]:
    """Hashes of what one short run wrote, without metrics named by a word of `new`."""
    torchrun = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}"] * (processes > 1)
    command = [sys.executable, *torchrun, "-m", "moored", "train", recipe, "name=same"]
    command += [f"output.dir={folder}", *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout[-4000:]}")
    metrics = []
    for line in (folder / "same" / "journal.jsonl").read_text().splitlines():
        record = json.loads(line)
        if record["kind"] == "event":
            continue
        values = {k: v for k, v in record.items() if k not in ("time", "seq", "attempt")}
        for key in {"metrics", "values"} & values.keys():
            kept = {k: v for k, v in values[key].items() if not any(word in k for word in new)}
            if values[key] and not kept:
                values.clear()  # nothing but what is new
                break
            values[key] = kept
        if not values:
            continue
        text = json.dumps(values, sort_keys=True)
        if not any(word in text for word in TIMED) and "system/" not in text:
            metrics.append(text)
        else:
            named = values.get("metrics") or values.get("values") or {}
            kept = {k: v for k, v in named.items() if not any(word in k for word in TIMED)}
            metrics.append(json.dumps({**values, "metrics": kept, "values": kept}, sort_keys=True))
    sha = hashlib.sha256()
    for name, tensor in sorted(
        load_file(folder / "same/adapter/adapter_model.safetensors").items()
    ):
        sha.update(name.encode() + tensor.tobytes())
    losses = hashlib.sha256("\n".join(metrics).encode()).hexdigest()
    return {"losses": losses[:16], "adapter": sha.hexdigest()[:16]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", nargs="?", default="recipes/quickstart/slurm-headers.yaml")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--save", type=Path)
    parser.add_argument("--against", type=Path)
    parser.add_argument("--new", nargs="*", default=[], help="words of metrics that came since")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    given = parser.parse_args()
    common = [f"train.steps={given.steps}", "track.mlflow=false", *given.set]
    found = {}
    for mesh, (processes, options) in MESHES.items():
        with tempfile.TemporaryDirectory() as folder:
            found[mesh] = run(
                given.recipe, processes, [*common, *options], Path(folder), tuple(given.new)
            )
        shown = "  ".join(f"{name} {value}" for name, value in found[mesh].items())
        print(f"{mesh:24} {shown}", flush=True)
    if given.save:
        given.save.write_text(json.dumps(found, indent=1) + "\n")
    if given.against:
        before = json.loads(given.against.read_text())
        differ = [mesh for mesh in found if found[mesh] != before.get(mesh)]
        print(f"differ: {', '.join(differ)}" if differ else "all the same")
        sys.exit(bool(differ))


if __name__ == "__main__":
    main()
