"""One decoder layer, 4-bit and with LoRA, forward and backward: eager, torch.compile, CUDA graphs.

    python benchmarks/compile_layer.py [--hidden 512] [--tokens 256] [--rounds 5] [--dtype float32]

Random weights, non-reentrant checkpointing as in a step. In turns in one process: median seconds,
the processor's own, seconds of the first call (compilation, capture), and whether output and
gradients have eager's bits. Without a GPU there are no CUDA graphs.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.utils.checkpoint import checkpoint

from moored.config import Config
from moored.distributed.mesh import alone
from moored.models.policy import load_policy

Call = Callable[[torch.Tensor], torch.Tensor]


def layer_of(folder: Path, hidden: int, dtype: str, device: str) -> tuple[Any, Any]:
    """The layer, and the embedding of positions that it is given."""
    heads = max(1, hidden // 64)
    transformers.LlamaConfig(
        vocab_size=512,
        hidden_size=hidden,
        intermediate_size=7 * hidden // 2,
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4),
        max_position_embeddings=2**16,
    ).save_pretrained(folder)
    recipe = {
        "name": "layer",
        "model": {"name_or_path": str(folder), "dtype": dtype, "weights": "random"},
        "adapter": {"r": 16, "alpha": 32.0},
        "data": {"train": [{"path": str(folder / "none.jsonl")}]},
        "parallel": {"zero_stage": 0},
        "train": {"steps": 1, "global_batch_sequences": 1, "gradient_checkpointing": "none"},
    }
    policy = load_policy(folder, Config.model_validate(recipe), alone(device))
    backbone: Any = policy.causal_lm.get_base_model().model
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.normal_(0, 0.02)
    return backbone.layers[0], backbone.rotary_emb


def main() -> None:
    """Measure, and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder = Path(tempfile.mkdtemp())
    layer, rotary = layer_of(folder, options.hidden, options.dtype, device)
    trained = [p for p in layer.parameters() if p.requires_grad]
    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype)
    x = torch.randn(1, options.tokens, options.hidden, device=device, dtype=dtype)
    places = torch.arange(options.tokens, device=device)[None]
    angles = rotary(x, places)

    def eager(inputs: torch.Tensor) -> torch.Tensor:
        out = layer(inputs, position_embeddings=angles, position_ids=places)
        return out[0] if isinstance(out, tuple) else out

    calls: dict[str, Call] = {"eager": eager, "torch.compile": torch.compile(eager)}
    if device == "cuda":
        sample = x.clone().requires_grad_()
        calls["CUDA graphs"] = torch.cuda.make_graphed_callables(eager, (sample,))
        calls["torch.compile, reduce-overhead"] = torch.compile(eager, mode="reduce-overhead")

    def once(call: Call) -> tuple[list[torch.Tensor], float, float]:
        inputs = x.clone().requires_grad_()
        for parameter in trained:
            parameter.grad = None
        began, own = time.perf_counter(), time.process_time()
        out = checkpoint(call, inputs, use_reentrant=False)
        out.float().square().mean().backward()
        own = time.process_time() - own  # before the GPU is waited for: what the host does
        if device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        found = [out.detach().clone(), *(p.grad.clone() for p in (inputs, *trained))]
        return found, seconds, own

    first: dict[str, float] = {}
    results: dict[str, list[torch.Tensor]] = {}
    failed: dict[str, str] = {}
    for name, call in list(calls.items()):
        try:
            results[name], first[name], _ = once(call)
        except Exception as error:  # what a compiler or a capture refuses is the result
            failed[name] = str(error).strip().splitlines()[0][:160]
            del calls[name]
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for _ in range(options.rounds):
        for name, call in calls.items():
            results[name], seconds, own = once(call)
            times[name].append((seconds, own))
    where = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    print(f"D = {options.hidden}, {options.tokens} tokens, {options.dtype}, {where}")
    for name, found in results.items():
        if name not in calls:
            continue
        pairs = list(zip(found, results["eager"], strict=True))
        same = all(torch.equal(a, b) for a, b in pairs)
        apart = max(float((a - b).norm() / b.norm().clamp_min(1e-30)) for a, b in pairs)
        wall, own = (statistics.median(column) for column in zip(*times[name], strict=True))
        print(
            f"{name:32} {1e3 * wall:9.2f} ms, processor {1e3 * own:9.2f} ms, first "
            f"{first[name]:6.1f} s, "
            + ("the same bits" if same else f"apart by {apart:.1e} (relative)")
        )
    for name, why in failed.items():
        print(f"{name:32} refused: {why}")


if __name__ == "__main__":
    main()
