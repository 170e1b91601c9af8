"""What a rank holds of the base, and what it holds on the way: its share and one tensor.

A checkpoint in several files, of 70 million parameters, so that its tensors stand out from what
Python itself allocates.
"""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
import transformers

from distributed.runner import mostly_long, run_distributed
from moored.config import Config, load_config
from moored.distributed.mesh import start_mesh
from moored.models import policy
from moored.models.engine import Engine
from moored.models.loading import load_base
from moored.models.partition import Partition
from moored.models.policy import load_policy
from tiny import tiny_recipe, write_recipe

MIB = 2**20
SIZES = {
    "hidden_size": 768,
    "intermediate_size": 2304,
    "num_hidden_layers": 8,
    "num_attention_heads": 12,
    "num_key_value_heads": 6,
    "head_dim": 64,
    "tie_word_embeddings": False,
}
# Quantising 2**20 elements at a time takes some 20 bytes each (a cast to fp32, and what
# bitsandbytes makes of it); the rest is Python's.
WORKING = 32 * MIB


def config_of(folder: Path, *overrides: str) -> Config:
    recipe = tiny_recipe(folder)
    path = folder / "large"
    if not path.exists():
        torch.manual_seed(0)
        config = transformers.LlamaConfig(**SIZES, vocab_size=259)
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
        model.save_pretrained(path, max_shard_size="30MB")
        for file in (folder / "model").glob("tok*"):
            (path / file.name).write_bytes(file.read_bytes())
    assert len(list(path.glob("*.safetensors"))) > 3
    recipe["model"]["name_or_path"] = str(path)
    return load_config(write_recipe(folder, recipe), list(overrides))


def packed_bytes(causal_lm: torch.nn.Module) -> dict[str, int]:
    """Bytes of codes by layer, from their storages."""
    return {
        path: module.weight.untyped_storage().nbytes()
        for path, module in causal_lm.named_modules()
        if isinstance(module, bnb.nn.Linear4bit)
    }


def let_go_of_freed_memory() -> None:
    """From now on glibc returns it at once, so that what is resident is what is allocated."""
    trim_threshold, mmap_threshold = -1, -3
    for parameter in (trim_threshold, mmap_threshold):
        assert ctypes.CDLL(None).mallopt(parameter, 65536)


def peak_of(load: Callable[[], Any]) -> tuple[Any, int]:
    """What `load` returns, and the most resident bytes on the way, above those at the start."""
    gc.collect()
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    loaded = load()
    return loaded, _status("VmHWM") - before


def _status(name: str) -> int:
    text = Path("/proc/self/status").read_text()
    match = re.search(rf"{name}:\s+(\d+) kB", text)
    assert match is not None
    return int(match[1]) * 1024


def loading(rank: int, world_size: int, cases: list[Config], warm_up: Config) -> list[Any]:
    let_go_of_freed_memory()
    results: list[dict[str, Any]] = []
    for config in [warm_up, *cases]:  # the first one pays for what is imported and allocated once
        mesh = start_mesh(config.parallel.tensor_parallel_degree)
        is_cut = config.parallel.zero_stage == 3 and mesh.dp.size > 1
        after = Partition(mesh.dp) if is_cut else None
        path = Path(config.model.name_or_path)
        load = partial(load_base, path, config.model, mesh, config.parallel, after)
        (base, _), peak = peak_of(load)
        stored = [p.untyped_storage() for p in base.parameters()]
        stored += [buffer.part.untyped_storage() for buffer in after.buffers] if after else []
        states = [getattr(p, "quant_state", None) for p in base.parameters()]
        scales = sum(state.absmax.nbytes for state in states if state is not None)
        held = sum(storage.nbytes() for storage in stored) + scales
        results.append({"peak": peak, "held": held, "packed": packed_bytes(base)})
        del base, load, stored, states, after
    return results[1:]


def stock(rank: int, world_size: int, config: Config) -> int:
    let_go_of_freed_memory()
    quantization = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    load = partial(
        transformers.AutoModelForCausalLM.from_pretrained,
        config.model.name_or_path,
        dtype=torch.float32,
        quantization_config=quantization,
    )
    return peak_of(load)[1]


def small(folder: Path, *overrides: str) -> Config:
    model = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32}
    recipe = tiny_recipe(folder / "small", intermediate_size=256, **model)
    return load_config(write_recipe(folder / "small", recipe), list(overrides))


MESHES = {
    "1x1": (1, []),
    "1x2": (2, ["parallel.tensor_parallel_degree=2"]),
    "zero-3": (2, ["parallel.zero_stage=3"]),
    "1x4": (4, ["parallel.tensor_parallel_degree=4"]),
    "2x2-zero-3": (4, ["parallel.tensor_parallel_degree=2", "parallel.zero_stage=3"]),
}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory, chosen) -> dict[str, list[dict[str, Any]]]:
    """Mesh -> what each rank held."""
    folder = tmp_path_factory.mktemp("memory")
    found: dict[str, list[dict[str, Any]]] = {}
    for world_size in (1, 2, 4):
        names = [name for name in chosen(MESHES) if MESHES[name][0] == world_size]
        if not names:
            continue
        cases = [config_of(folder, *MESHES[name][1]) for name in names]
        warm_up = small(folder, *MESHES[names[-1]][1])
        ranks = run_distributed(loading, world_size, cases, warm_up)
        for name, *each in zip(names, *ranks, strict=True):
            found[name] = each
    return found


@pytest.mark.parametrize("mesh", mostly_long(MESHES, "1x2", "zero-3"))
def test_loading_holds_a_ranks_share_and_one_tensor(loaded, mesh):
    one_tensor = 2 * SIZES["hidden_size"] * SIZES["intermediate_size"]  # bf16, as in the file
    for rank in loaded[mesh]:
        assert rank["peak"] <= rank["held"] + one_tensor + WORKING, {
            key: rank[key] / MIB for key in ("peak", "held")
        }


@pytest.mark.long
def test_every_rank_holds_its_share_of_the_whole(loaded):
    whole = loaded["1x1"][0]["held"]
    for mesh, share in {"1x2": 2, "zero-3": 2, "1x4": 4, "2x2-zero-3": 4}.items():
        for rank in loaded[mesh]:
            # Uneven heads, scales in fp32 or not cut by ZeRO, and what is not in the layers.
            assert rank["held"] < 1.35 * whole / share, mesh


@pytest.mark.long
def test_a_smaller_peak_than_transformers_own_loading(loaded, tmp_path):
    """Which makes every rank hold the whole; else the bounds above would prove nothing."""
    [peak] = run_distributed(stock, 1, config_of(tmp_path))
    assert peak > 1.5 * max(rank["peak"] for rank in loaded["2x2-zero-3"])


@pytest.mark.long
def test_packed_bytes_are_the_share_of_heads_and_columns(loaded):
    """Six key/value heads over four ranks: 2, 2, 1, 1; 2304 columns are 36 blocks: 9 each."""
    for path, size in loaded["1x1"][0]["packed"].items():
        assert [rank["packed"][path] for rank in loaded["1x2"]] == [size // 2] * 2
        shares = [2, 2, 1, 1] if "self_attn" in path else [9, 9, 9, 9]
        expected = [size * share // sum(shares) for share in shares]
        assert [rank["packed"][path] for rank in loaded["1x4"]] == expected, path


def partitioned(rank: int, world_size: int, config: Config) -> dict[str, Any]:
    """The same bits as of a base that was loaded whole and cut by the engine."""
    mesh = start_mesh(1)
    path = Path(config.model.name_or_path)
    engine = Engine(load_policy(path, config, mesh), config, mesh)
    assert engine.policy.partition is not None
    buffers = engine.policy.partition.buffers
    cut = {str(index): buffer.part.clone() for index, buffer in enumerate(buffers)}
    for buffer in buffers:
        buffer.restore()
    names = {name: p for name, p in engine.policy.named_parameters() if not p.requires_grad}
    whole = {name: p.detach().clone() for name, p in names.items()}
    engine.close()
    return cut | whole


def whole_first(rank: int, world_size: int, config: Config) -> dict[str, Any]:
    policy._is_dora = lambda *_: True
    found = partitioned(rank, world_size, config)
    stage_2 = config.model_copy(
        update={"parallel": config.parallel.model_copy(update={"zero_stage": 2})}
    )
    never_cut = load_policy(Path(config.model.name_or_path), stage_2, start_mesh(1))
    for name, parameter in never_cut.named_parameters():
        if not parameter.requires_grad:
            assert torch.equal(found[name], parameter), name
    return found


@pytest.mark.parametrize("quantization", mostly_long(["nf4", "none"], "nf4"))
def test_parts_made_while_loading_are_those_of_a_base_loaded_whole(tmp_path, quantization):
    config = small(tmp_path, "parallel.zero_stage=3", f"model.quantization={quantization}")
    ours = run_distributed(partitioned, 2, config)
    theirs = run_distributed(whole_first, 2, config)
    for mine, expected in zip(ours, theirs, strict=True):
        assert mine.keys() == expected.keys()
        assert all(torch.equal(mine[name], tensor) for name, tensor in expected.items())
