"""`moored plan` against what was measured: the runs of docs/performance.md, and storages on a CPU.

    python benchmarks/plan_accuracy.py                   # against the documented runs, at once
    python benchmarks/plan_accuracy.py --wide 70b        # and layers of a 70B's width on this CPU

`--wide` makes two layers of true width (and a small vocabulary) with random weights in a temporary
folder, trains them for two steps on meshes of one and two processes over gloo, and adds up the
storages that are alive just before the second update: no allocator's guess, the tensors themselves.
It takes 3 GB of memory per process, 4 GB of disk and some minutes.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

from moored.plan.architecture import Architecture, read_architecture  # noqa: E402
from moored.plan.gpus import cluster_of  # noqa: E402
from moored.plan.memory_terms import (  # noqa: E402
    BUCKET,
    GIB,
    gpu_memory,
    of_a_step,
    torch_peak,
    total,
)
from moored.plan.step_time import counted, head_seconds, step_time  # noqa: E402
from moored.plan.workload import Workload  # noqa: E402


class Row(NamedTuple):
    """One figure of the plan beside one that was measured."""

    what: str
    planned: float
    measured: float
    unit: str

    @property
    def off(self) -> float:
        """By how much the plan is more, relative."""
        return self.planned / self.measured - 1


# Hidden size, intermediate size, layers, heads, key/value heads, vocabulary: as in step_cost.py.
SHAPES = {
    "30m": (384, 1024, 8, 6, 3, 32000),
    "70m": (512, 1408, 20, 8, 4, 8192),
    "1b": (2048, 8192, 16, 32, 8, 128256),
    "3b": (3072, 8192, 28, 24, 8, 128256),
    "1k": (1024, 2816, 2, 8, 4, 4096),
    "70b": (8192, 28672, 2, 64, 8, 128256),
    "70b-16k": (8192, 28672, 2, 64, 8, 16384),  # where two copies of the words are too many
}
PLAIN = Workload(
    nf4=True, double_quantization=True,  cache_quantized=False, compute_bytes=2,
    eager_attention=False, family="lora", r=16, targets=None, max_length=4096, packing=False,
    has_kl=True, holds_prompt=False, anchor_rows=0, kl_every=1, direction="forward", is_warm=False,
    ce_by_entropy=False, kl_by_entropy=False, cached_reference=False, cached_by_sample=False,
    zero_stage=0, tensor_parallel_degree=1, sequence_parallel=False, offload=False,
    micro_batch_size=2, checkpointing="non_reentrant", checkpointed_layers=1.0, rows_per_step=4,
    steps=6, epochs=None, keep_checkpoints=2, data=None,
)  # fmt: skip
H100 = cluster_of("1xh100-80gb")


def shaped(
    hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocab: int
) -> Architecture:
    """A Llama of these sizes; like those of step_cost.py tied below a width of 4,096."""
    config = {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
        "vocab_size": vocab,
        "tie_word_embeddings": hidden < 4096 and layers > 2,
    }
    return read_architecture(config, "benchmarks/plan_accuracy.py")


def documented() -> list[Row]:
    """The runs of docs/performance.md."""
    return [*memory_on_gpus(), *time_on_gpus(), *head_on_gpus(), *memory_on_cpus(), *ratios()]


def memory_on_gpus() -> list[Row]:
    """Peak of torch in whole runs on an H100.

    Those of cross-entropy alone were measured when the head still held room for both models'
    logits, so they are what TMKL takes but for the reference's hidden states.
    """
    rows: list[Row] = []
    for size, length, ce, tmkl in (("1b", 2048, 3.29, 3.31), ("3b", 4096, 6.13, 6.19)):
        architecture = shaped(*SHAPES[size])
        work = replace(PLAIN, max_length=length)
        peak = torch_peak(architecture, work) / GIB
        kept = 2 * work.tokens * architecture.hidden_size / GIB
        rows.append(Row(f"{size}, TMKL, H100", peak, tmkl, "GiB"))
        rows.append(Row(f"{size}, CE as it was then, H100", peak - kept, ce, "GiB"))
    return rows


def time_on_gpus() -> list[Row]:
    """Seconds of a step on three H100 machines; one factor each says how slow its host was."""
    runs = (
        ("1b", 2048, 1.0, {"CE": 8192 / 19168, "TMKL": 8192 / 16404}),
        ("3b", 4096, 1.0, {"CE": 16384 / 13750, "TMKL": 16384 / 10820}),
        ("3b", 4096, 1.9, {"CE": 1.339, "TMKL": 1.825, "TMKL, cached": 1.337}),
        ("1b", 2048, 1.75, {"CE": 0.68, "TMKL": 0.96, "TMKL, cached": 0.67}),
    )
    rows: list[Row] = []
    for size, length, host, seconds in runs:
        for arm, measured in seconds.items():
            work = replace(PLAIN, max_length=length, has_kl=arm != "CE")
            if "cached" in arm:  # filled: the base is never run
                work = replace(work, cached_reference=True, cached_by_sample=True, epochs=1e9)
            planned = step_time(shaped(*SHAPES[size]), work, H100, host).seconds()
            rows.append(Row(f"{size}, {arm}, H100, host x{host:g}", planned, measured, "s"))
    return rows


def head_on_gpus() -> list[Row]:
    """The head alone, 8,192 tokens."""
    runs = (
        (128256, 4096, 45.7, 31.2), (128256, 8192, 83.6, 56.3), (152064, 3584, 50.1, 33.7)
    )  # fmt: skip
    rows: list[Row] = []
    for vocab, hidden, tmkl, ce in runs:
        architecture = shaped(hidden, 1024, 1, 8, 8, vocab)
        for arm, measured in (("TMKL", tmkl), ("CE", ce)):
            work = replace(PLAIN, max_length=8192, micro_batch_size=1, has_kl=arm == "TMKL")
            planned = 1e3 * head_seconds(counted(architecture, work, reference=False), H100)
            rows.append(Row(f"head, V {vocab:,}, D {hidden:,}, {arm}", planned, measured, "ms"))
    return rows


def memory_on_cpus() -> list[Row]:
    """What a step takes above what is held, by benchmarks/memory.py."""
    runs = (
        (512, 32768, 8, 140, 74), (1024, 32768, 8, 155, 88), (2048, 32768, 8, 180, 128),
        (4096, 32768, 8, 264, 256), (1024, 8192, 8, 94, 64), (1024, 131072, 8, 282, 151),
        (1024, 32768, 4, 147, 79), (1024, 32768, 16, 171, 104),
    )  # fmt: skip
    rows: list[Row] = []
    for tokens, vocab, layers, tmkl, ce in runs:
        architecture = shaped(512, 1408, layers, 8, 4, vocab)
        for arm, measured in (("TMKL", tmkl), ("CE", ce)):
            work = replace(
                PLAIN, compute_bytes=4, max_length=tokens, micro_batch_size=1, has_kl=arm == "TMKL"
            )
            planned = total(of_a_step(architecture, work, 1, on_gpu=False)) / 2**20
            name = f"step on a CPU, {tokens:,} tokens, V {vocab:,}, {layers} layers, {arm}"
            rows.append(Row(name, planned, measured, "MiB"))
    return rows


def ratios() -> list[Row]:
    """Steps on a CPU, whose speed is no GPU's: ratios of operations against ratios of seconds."""
    rows: list[Row] = []
    for size, tmkl, cached in (("70m", 1.32, 1.04), ("30m", 1.41, 1.20)):
        architecture = shaped(*SHAPES[size])
        work = replace(PLAIN, compute_bytes=4, max_length=2048, micro_batch_size=1)
        ce = counted(architecture, replace(work, has_kl=False), reference=False).operations
        for arm, reference, measured in (("TMKL", True, tmkl), ("TMKL, cached", False, cached)):
            planned = counted(architecture, work, reference=reference).operations / ce
            rows.append(Row(f"step on a CPU, {size}, {arm} / CE", planned, measured, "x"))
    return rows


# ---------------------------------------------------------------- storages


MESHES = (  # processes, tensor-parallel degree, ZeRO stage
    *((1, 1, 0), (1, 1, 2), (2, 1, 1), (2, 1, 2), (2, 1, 3)),
    *((2, 2, 0),),
)
TOKENS = 64


def wide(size: str, only: list[str] | None, kept: Path | None) -> list[Row]:
    """Storages by term on each mesh, rank 0."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="wide-") as folder:
        place = kept or Path(folder)
        if not (place / "model").exists():
            write_layers(place / "model", SHAPES[size])
        with open(place / "train.jsonl", "w") as file:
            for i in range(16):
                words = " ".join(str((i * 7919 + k * 104729) % 100003) for k in range(100))
                file.write(json.dumps({"prompt": f"count {i}", "completion": words}) + "\n")
        for world, degree, stage in MESHES:
            name = f"{world // degree}x{degree} z{stage}"
            if only and name.replace(" ", "") not in only:
                continue
            found = on_mesh(place, world, degree, stage)
            work = replace(
                PLAIN, tensor_parallel_degree=degree, sequence_parallel=degree > 1,
                zero_stage=stage, max_length=TOKENS, micro_batch_size=1, rows_per_step=2,
            )  # fmt: skip
            terms = {t.name: t.bytes for t in gpu_memory(shaped(*SHAPES[size]), work, world)}
            terms["ZeRO's buffers"] = BUCKET  # between steps no layer is gathered
            for term, measured in found.items():
                planned = terms.get(term, 0.0) / 2**20
                rows.append(Row(f"{size}'s width, {name}, {term}", planned, measured, "MiB"))
            for row in rows[-len(found) :]:
                print(
                    f"{row.what}: {row.planned:,.1f} {row.measured:,.1f} {row.off:+.1%}", flush=True
                )
    return rows


def on_mesh(place: Path, world: int, degree: int, stage: int) -> dict[str, float]:
    """MiB by term, of rank 0 of a run on so many processes."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    started: list[subprocess.Popen[str]] = []
    for rank in range(world):
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([*sys.path[:2], os.environ.get("PYTHONPATH", "")]),
            "OMP_NUM_THREADS": "1",
            "MOORED_CACHE": str(place / "cache"),
        }
        if world > 1:
            environment |= {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
                "LOCAL_WORLD_SIZE": str(world),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            }  # fmt: skip
        command = [sys.executable, __file__, "--one", json.dumps([str(place), degree, stage])]
        started.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        )
    said = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise SystemExit(f"a run on {world} processes ended with an error, see above")
    return json.loads(next(line for line in said[0].splitlines() if line.startswith("{")))


def measure(place: Path, degree: int, stage: int) -> None:
    """One rank: two steps, and the storages that are alive before the second update."""
    import torch

    import moored.training.train
    from moored.config import Config
    from moored.models.engine import Engine

    torch.set_num_threads(1)
    step, found = Engine.step, []

    def counting(self: Engine, *arguments: Any) -> float:
        found.append(storages(self))
        if len(found) < 2:
            return step(self, *arguments)
        if os.environ.get("RANK", "0") == "0":
            print(json.dumps(found[-1]), flush=True)
        time.sleep(5)  # until the others are here, too, and nobody waits for this rank
        os._exit(0)

    Engine.step = counting  # pyright: ignore
    parallel: dict[str, Any] = {"zero_stage": stage, "tensor_parallel_degree": degree}
    moored.training.train.run(
        Config.model_validate(
            {
                "name": f"wide-{degree}-{stage}-{os.environ.get('WORLD_SIZE', '1')}",
                "model": {
                    "name_or_path": str(place / "model"),
                    "dtype": "bfloat16",
                    "cache_quantized": True,  # quantised once per layout: a CPU takes minutes
                },
                "data": {
                    "train": [{"path": str(place / "train.jsonl")}],
                    "max_length": TOKENS,
                    "too_long": "truncate",
                },
                "optim": {"learning_rate": 1e-4},
                "parallel": parallel,
                "train": {
                    "steps": 2,
                    "global_batch_sequences": int(os.environ.get("WORLD_SIZE", "1")) // degree,
                    "save_every": 1000,
                },
                "evaluation": {"before": False},
                "track": {"mlflow": False},
                "output": {"dir": str(place / "runs")},
            }
        ),
        restart=True,
    )


def storages(engine: Any) -> dict[str, float]:
    """MiB by the plan's terms, each storage once, by dtype and by whose it is."""
    import torch

    from moored.models.zero import REDUCE_BUCKET

    scales: set[int] = set()
    for parameter in engine.policy.parameters():
        state = getattr(parameter, "quant_state", None)
        for one in (state, getattr(state, "state2", None)):
            if one is not None and one.absmax is not None:
                scales.add(one.absmax.untyped_storage().data_ptr())
    sums = {"base": 0, "embedding, head, norms": 0, "adapter": 0, "ZeRO's buffers": 0}
    seen: set[int] = set()
    for thing in gc.get_objects():
        if not isinstance(thing, torch.Tensor) or thing.device.type != "cpu":
            continue
        for tensor in (
            thing,
            getattr(thing, "ds_tensor", None),
            thing.grad if thing.is_leaf else None,
        ):
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            if storage.data_ptr() in seen or storage.nbytes() < 2**10:
                continue
            seen.add(storage.data_ptr())
            if tensor.dtype == torch.uint8 or storage.data_ptr() in scales:
                sums["base"] += storage.nbytes()
            elif tensor.dtype == torch.bfloat16:
                sums["embedding, head, norms"] += storage.nbytes()
            elif storage.nbytes() >= 4 * REDUCE_BUCKET:
                sums["ZeRO's buffers"] += storage.nbytes()
            elif tensor.dtype == torch.float32:
                sums["adapter"] += storage.nbytes()
    return {name: size / 2**20 for name, size in sums.items() if size}


def write_layers(folder: Path, shape: tuple[int, ...]) -> None:
    """Layers of true width with random weights, a file at a time, and a byte-level tokenizer."""
    import torch
    from safetensors.torch import save_file

    from tiny import tiny_tokenizer

    hidden, intermediate, layers, heads, kv_heads, vocab = shape
    folder.mkdir(parents=True)
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder)
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": hidden,
        "intermediate_size": intermediate, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocab,
        "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "torch_dtype": "bfloat16",
        "tie_word_embeddings": False, "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)

    def weight(*size: int) -> Any:
        out = torch.empty(size, dtype=torch.bfloat16)
        for start in range(0, size[0], 1024):
            part = out[start : start + 1024]
            part.copy_(torch.randn(part.shape, generator=generator) * 0.02)
        return out

    keys = hidden // heads * kv_heads
    groups: list[dict[str, tuple[int, ...]]] = [{"model.embed_tokens.weight": (vocab, hidden)}]
    for index in range(layers):
        at = f"model.layers.{index}."
        groups.append(
            {
                f"{at}self_attn.q_proj.weight": (hidden, hidden),
                f"{at}self_attn.k_proj.weight": (keys, hidden),
                f"{at}self_attn.v_proj.weight": (keys, hidden),
                f"{at}self_attn.o_proj.weight": (hidden, hidden),
                f"{at}mlp.gate_proj.weight": (intermediate, hidden),
                f"{at}mlp.up_proj.weight": (intermediate, hidden),
                f"{at}mlp.down_proj.weight": (hidden, intermediate),
                f"{at}input_layernorm.weight": (hidden,),
                f"{at}post_attention_layernorm.weight": (hidden,),
            }
        )
    groups.append({"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)})
    weight_map: dict[str, str] = {}
    for index, group in enumerate(groups, 1):
        name = f"model-{index:05d}-of-{len(groups):05d}.safetensors"
        tensors = {
            key: torch.ones(size, dtype=torch.bfloat16) if len(size) == 1 else weight(*size)
            for key, size in group.items()
        }
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    index_file = folder / "model.safetensors.index.json"
    index_file.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def table(rows: list[Row]) -> str:
    """As docs/plan.md shows it."""
    lines = ["| | plan | measured | off |", "|---|---|---|---|"]
    for row in rows:
        digits = ".2f" if row.measured < 100 else ",.0f"
        lines.append(
            f"| {row.what} | {row.planned:{digits}} {row.unit} | {row.measured:{digits}} "
            f"{row.unit} | {row.off:+.0%} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--wide", choices=["1k", "70b", "70b-16k"], help="also two layers of this width"
    )
    parser.add_argument("--meshes", nargs="*", help="of --wide, such as 1x1z0 2x1z3")
    parser.add_argument("--kept", type=Path, help="folder of the model, made if it is not there")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        place, degree, stage = json.loads(args.one)
        measure(Path(place), degree, stage)
        return
    rows = documented()
    if args.wide:
        rows += wide(args.wide, args.meshes, args.kept)
    print(table(rows))


if __name__ == "__main__":
    main()
