"""One training step with TMKL, with and without the reference cache, against one without TMKL.

By whole `moored train` runs side by side; and by TRL's SFTTrainer, plain and with a KL as one would
add it by hand, where it is installed.

    python benchmarks/step_cost.py                     # CPU: 70 million parameters, fp32 compute
    python benchmarks/step_cost.py --size 3b --out step             # one GPU: NF4, bf16
    python benchmarks/step_cost.py --size 8b --tokens 8192 --packed 8 --micro-batch-size 1

The base has random weights and the shape of a Llama of that size, and is written to a temporary
folder: speed and memory do not depend on what a model knows. The runs alternate, the first steps of
each are left out, and the figure is the ratio of the medians of seconds per step.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from fresh import output_of
from outcome import Bar, Panel, add_option, write

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

# Hidden size, intermediate size, layers, heads, key/value heads, vocabulary
SIZES = {
    "30m": (384, 1024, 8, 6, 3, 32000),  # nearly half of all products are the head's
    "70m": (512, 1408, 20, 8, 4, 8192),  # 6 %, as in an 8B model
    "1b": (2048, 8192, 16, 32, 8, 128256),
    "3b": (3072, 8192, 28, 24, 8, 128256),
    "8b": (4096, 14336, 32, 32, 8, 128256),
}
TMKL = {"kind": "tmkl", "weight": 1.0}
ARMS: dict[str, dict[str, Any]] = {
    "ce": {"regularizer": {"kind": "none"}},
    "tmkl": {"regularizer": TMKL},
    "cached": {"regularizer": TMKL, "reference": {"cache": True}},
}
TRL_ARMS = {"trl": [], "trl+kl": ["--kl"]}


def main() -> None:
    """Run the arms in turns and print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_options(parser)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--skip", type=int, default=3, help="first steps left out")
    parser.add_argument("--rounds", type=int, default=1)
    add_option(parser)
    args = parser.parse_args()
    arms = list(ARMS)
    if args.packed > 1:
        print("trl: left out, which packs otherwise")
    elif importlib.util.find_spec("trl"):
        arms += TRL_ARMS
    else:
        print("trl: not installed, left out")
    found: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arms}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        model = write_model(place / "model", SIZES[args.size])
        data = write_data(place / "train.jsonl", args.tokens, args.sequences * 4, args.packed)
        train(place / "filling", model, data, "cached", args)
        for i in range(args.rounds):
            for arm in arms if i % 2 == 0 else reversed(arms):
                run = train_by_trl if arm in TRL_ARMS else train
                found[arm].append(run(place / f"{arm}-{i}", model, data, arm, args))
                print(f"round {i + 1} {arm}: {found[arm][-1]}", flush=True)
    print(table(found, args))
    write(args.out, {"arguments": vars(args), "runs": found}, *picture(found, args))


def add_options(parser: argparse.ArgumentParser) -> None:
    """What a run is of: all that `recipe` reads but the number of steps."""
    parser.add_argument("--size", choices=SIZES, default="70m")
    parser.add_argument("--tokens", type=int, default=512, help="tokens per sequence")
    parser.add_argument("--sequences", type=int, default=4, help="per step")
    parser.add_argument("--micro-batch-size", type=int, default=4)
    parser.add_argument("--packed", type=int, default=1, help="samples of a row")
    parser.add_argument("--checkpointing", default="non_reentrant")
    parser.add_argument("--zero-stage", type=int, default=0)


def table(found: dict[str, list[dict[str, Any]]], args: argparse.Namespace) -> str:
    """Median seconds per step, their ratio to cross-entropy alone, and the peak of memory."""
    tokens = args.tokens * args.sequences
    lines = [
        f"{args.size}, {tokens} tokens per step, ZeRO {args.zero_stage}, {args.checkpointing}",
        "",
        "| | seconds | tokens/s | / ce | peak GiB |",
        "|---|---|---|---|---|",
    ]
    seconds = median_seconds(found)
    for arm, runs in found.items():
        lines.append(
            f"| {arm} | {seconds[arm]:.3f} | {tokens / seconds[arm]:,.0f} "
            f"| {seconds[arm] / seconds['ce']:.2f} | {max(r['peak_gib'] for r in runs):.2f} |"
        )
    return "\n".join(lines)


def median_seconds(found: dict[str, list[dict[str, Any]]]) -> dict[str, float]:
    """Per step, of every arm."""
    return {
        arm: statistics.median(s for run in runs for s in run["seconds"])
        for arm, runs in found.items()
    }


def picture(
    found: dict[str, list[dict[str, Any]]], args: argparse.Namespace
) -> tuple[str, list[Panel]]:
    """A title, and seconds and memory as bars."""
    seconds = median_seconds(found)
    title = f"A step of {args.tokens * args.sequences:,} tokens, {args.size}"
    return title, [
        Panel(
            "seconds / cross-entropy alone",
            [
                Bar(name=arm, value=seconds[arm] / seconds["ce"], is_ours=arm in ARMS)
                for arm in found
            ],
            mark=1.0,
        ),
        Panel(
            "memory at most, GiB",
            [
                Bar(name=arm, value=max(r["peak_gib"] for r in runs), is_ours=arm in ARMS)
                for arm, runs in found.items()
            ],
        ),
    ]


def write_model(folder: Path, shape: tuple[int, ...]) -> Path:
    """A Llama with random weights, in bf16, and a byte-level tokenizer."""
    import torch
    import transformers

    from tiny import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    hidden, intermediate, layers, heads, kv_heads, vocab = shape
    config = transformers.LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=hidden // heads,
        max_position_embeddings=8192,
        tie_word_embeddings=hidden < 4096,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_data(path: Path, tokens: int, count: int, packed: int = 1) -> Path:
    """Chats that are longer than a sequence, so that each fills one; several nearly fill it."""
    # The tokenizer's tokens are bytes; a prompt and what the template adds have some 30.
    length = tokens + 16 if packed == 1 else tokens // packed - 40
    with open(path, "w") as file:
        for i in range(count * packed):
            words = " ".join(str((i * 7919 + k * 104729) % 100003) for k in range(length))
            text = {"prompt": f"count {i}", "completion": words[:length]}
            file.write(json.dumps(text) + "\n")
    return path


def recipe(
    folder: Path, model: Path, data: Path, arm: str, args: argparse.Namespace
) -> dict[str, Any]:
    """What a run below `folder` is of."""
    return {
        "name": arm,
        "model": {"name_or_path": str(model), "quantization": "nf4"},
        "adapter": {"r": 16, "alpha": 32.0},
        "data": {
            "train": [{"path": str(data)}],
            "max_length": args.tokens,
            "too_long": "truncate",
            "packing": getattr(args, "packed", 1) > 1,
        },
        "optim": {"learning_rate": 1e-4},
        "parallel": {"zero_stage": args.zero_stage},
        "train": {
            "steps": args.steps,
            "global_batch_sequences": args.sequences,
            "micro_batch_size": args.micro_batch_size,
            "gradient_checkpointing": args.checkpointing,
        },
        "evaluation": {"before": False},
        "track": {"mlflow": False},
        "output": {"dir": str(folder / "runs")},
        **ARMS[arm],
    }


def train(
    folder: Path, model: Path, data: Path, arm: str, args: argparse.Namespace
) -> dict[str, Any]:
    """One run: seconds per step after the first ones, and the peak of memory."""
    from moored.tracking.journal import metrics

    folder.mkdir()
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe(folder, model, data, arm, args)))
    command = [sys.executable, "-m", "moored", "train", str(path)]
    paths = [*sys.path[:2], *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "MOORED_CACHE": str(folder.parent / "cache"),
    }
    output_of(arm, command, env=environment)
    values = metrics(folder / "runs" / arm)
    seconds = [value for _, value in values["perf/step_seconds"]][args.skip :]
    return {"seconds": seconds, "peak_gib": values["perf/peak_memory_bytes"][-1][1] / 2**30}


def train_by_trl(
    folder: Path, model: Path, data: Path, arm: str, args: argparse.Namespace
) -> dict[str, Any]:
    """The same by TRL, in a process of its own."""
    folder.mkdir()
    script = Path(__file__).with_name("step_trl.py")
    command = [sys.executable, str(script), "--model", str(model), "--data", str(data)]
    for option in ("tokens", "sequences", "micro_batch_size", "checkpointing", "steps"):
        command += [f"--{option.replace('_', '-')}", str(getattr(args, option))]
    command += TRL_ARMS[arm]
    figures = json.loads(output_of(arm, command, cwd=folder).splitlines()[-1])
    return figures | {"seconds": figures["seconds"][args.skip :]}


if __name__ == "__main__":
    main()
