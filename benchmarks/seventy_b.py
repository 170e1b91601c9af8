"""Llama-3.x 70B at its true size on one GPU of 80 GB or more, with random weights: no download.

    python benchmarks/seventy_b.py                   # 80 layers, NF4, rank 16, rows of 4,096
    python benchmarks/seventy_b.py --layers 4        # where less memory or time is there
    python benchmarks/seventy_b.py --small           # on a CPU, in small, to see that it works

What `moored probe` says of recipes/llama-3.3-70b/chat.yaml: loading, memory, and a micro-batch by
phase, with TMKL and with cross-entropy alone, beside the plan. Meant to end within five minutes on
a GPU, loading included.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "src"))

from moored.config import ModelConfig, load_config  # noqa: E402
from moored.plan.architecture import find_config  # noqa: E402
from moored.training.probe import Probed, run  # noqa: E402

RECIPE = ROOT / "recipes" / "llama-3.3-70b" / "chat.yaml"
SMALL = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "vocab_size": 2048,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
}  # fmt: skip


def main() -> None:
    """Probe 70B, or what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, help="of 80")
    parser.add_argument("--length", type=int, default=4096, help="tokens of a row")
    parser.add_argument("--steps", type=int, default=5, help="timed ones")
    parser.add_argument("--small", action="store_true", help="a tiny model, rows of 64")
    parser.add_argument("--out", type=Path, default=Path("seventy_b.json"))
    args = parser.parse_args()
    changed = SMALL if args.small else {}
    if args.layers is not None:
        changed = changed | {"num_hidden_layers": args.layers}
    with tempfile.TemporaryDirectory() as folder:
        overrides = [
            f"data.max_length={64 if args.small else args.length}",
            "data.packing=false",
            "parallel.zero_stage=0",
            "model.cache_quantized=false",
            f"output.dir={folder}/runs",
        ]
        config = load_config(RECIPE, overrides)
        if changed:
            sizes = find_config(ModelConfig(name_or_path=config.model.name_or_path))[0]
            (Path(folder) / "config.json").write_text(json.dumps(sizes | changed))
            config = load_config(RECIPE, [*overrides, f"model.name_or_path={folder}"])
        started = time.perf_counter()
        probed: Probed = run(config, steps=args.steps)
        seconds = time.perf_counter() - started
    facts = dataclasses.asdict(probed) | {"all_seconds": seconds}
    args.out.write_text(json.dumps(facts, indent=1) + "\n")
    print(f"all of it took {seconds:.0f} s; figures in {args.out}")


if __name__ == "__main__":
    main()
