"""Mixtures of experts on every mesh train as on one process, and ZeRO-3 cuts them.

Tolerances as in test_tensor_parallel.py: a mesh changes the order of sums, nothing else. A token
whose two best experts are tied up to rounding would go elsewhere; routers are far from that here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distributed import test_tensor_parallel as dense
from distributed.runner import mostly_long, run_distributed
from distributed.test_zero import by_case
from expertskit import experts
from moored.config import Config, load_config
from moored.distributed.mesh import start_mesh
from moored.models.experts import Experts4bit, experts_of
from moored.models.loading import load_base
from moored.models.partition import Partition
from tiny import tiny_recipe, write_recipe

Case = tuple[Any, ...]
# Attention that can be cut at whole blocks.
WIDE = {"hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 4}
KINDS: dict[str, dict[str, Any]] = {
    "mixtral": WIDE | {"num_local_experts": 5},  # 3 + 2
    "qwen2_moe": WIDE,
    "qwen3_moe": WIDE | {"head_dim": 32},
    "olmoe": WIDE,
    "deepseek_v3": {"moe_intermediate_size": 128, "intermediate_size": 128},
    "gpt_oss": {},
    "deepseek_v2": {},
}


def config_of(folder: Path, case: Case) -> Config:
    """Of (kind, quantisation, dp, tp, stage, checkpointing, more...)."""
    kind, quantization, _, tp, stage, checkpointing, *more = case
    path = folder / kind
    model = path / "experts"
    recipe = tiny_recipe(path) if not model.exists() else None
    if recipe is not None:
        experts(model, kind, **KINDS[kind])
        recipe["model"]["name_or_path"] = str(model)
        write_recipe(path, recipe)
    overrides = [
        f"model.quantization={quantization}",
        f"parallel.tensor_parallel_degree={tp}",
        f"parallel.zero_stage={stage}",
        f"train.gradient_checkpointing={checkpointing}",
        *more,
    ]
    if tp > 1 and not any("sequence_parallel" in text for text in more):
        overrides.append("parallel.sequence_parallel=false")
    return load_config(path / "tiny.yaml", overrides)


def as_one(case: Case) -> Case:
    ours = [text for text in case[6:] if not text.startswith("parallel.")]
    return (case[0], case[1], 1, 1, 0, "none", *ours)


BOTH = "adapter.target_modules=[q_proj,o_proj,experts.gate_up_proj,experts.down_proj]"
DOWN = "adapter.target_modules=[experts.down_proj]"
SEQUENCE = "parallel.sequence_parallel=true"
CASES: dict[int, list[Case]] = {
    2: [
        *(
            (kind, quantization, 1, 2, 0, "none")
            for kind in ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3")
            for quantization in ("nf4", "none")
        ),
        ("mixtral", "nf4", 1, 2, 2, "non_reentrant"),
        ("mixtral", "nf4", 1, 2, 0, "reentrant"),
        ("mixtral", "nf4", 1, 2, 0, "none", "model.double_quantization=false"),
        ("mixtral", "nf4", 1, 2, 0, "non_reentrant", SEQUENCE),
        ("qwen2_moe", "nf4", 1, 2, 0, "none", SEQUENCE),
        ("olmoe", "none", 1, 2, 2, "reentrant", SEQUENCE),
        ("qwen3_moe", "nf4", 1, 2, 1, "none", SEQUENCE),
        *((kind, "nf4", 2, 1, 3, "none") for kind in ("gpt_oss", "deepseek_v2", "olmoe")),
        ("mixtral", "nf4", 2, 1, 3, "non_reentrant"),
        ("mixtral", "none", 2, 1, 3, "reentrant"),
        ("deepseek_v3", "nf4", 2, 1, 3, "reentrant"),
        ("qwen3_moe", "nf4", 2, 1, 2, "none"),
        ("mixtral", "nf4", 1, 2, 0, "none", BOTH),
        ("mixtral", "nf4", 1, 2, 2, "none", BOTH, "optim.max_grad_norm=0.02"),
        ("qwen2_moe", "nf4", 1, 2, 1, "non_reentrant", DOWN, SEQUENCE),
        ("qwen3_moe", "nf4", 1, 2, 3, "reentrant", BOTH),
        ("mixtral", "nf4", 2, 1, 3, "non_reentrant", BOTH),
        ("gpt_oss", "nf4", 2, 1, 3, "none", BOTH),
        ("gpt_oss", "nf4", 2, 1, 2, "none", DOWN),
        ("mixtral", "none", 2, 1, 2, "none", BOTH),
    ],
    4: [
        ("mixtral", "nf4", 2, 2, 3, "non_reentrant"),
        ("mixtral", "nf4", 2, 2, 2, "none", BOTH),
        ("qwen2_moe", "nf4", 1, 4, 1, "none"),
    ],
}
ALL = [case for cases in CASES.values() for case in cases]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("experts")


@pytest.fixture(scope="module")
def one_process(folder, chosen) -> dict[Case, dict[str, Any]]:
    configs = {as_one(case): config_of(folder, as_one(case)) for case in chosen(ALL)}
    return run_distributed(dense.train_each, 1, configs)[0]


@pytest.fixture(scope="module")
def spread(folder, chosen) -> dict[Case, list[dict[str, Any]]]:
    runs: dict[Case, list[dict[str, Any]]] = {}
    for world_size, cases in CASES.items():
        if configs := {case: config_of(folder, case) for case in chosen(cases)}:
            runs |= by_case(run_distributed(dense.train_each, world_size, configs))
    return runs


@pytest.mark.parametrize(
    "case",
    mostly_long(
        ALL,
        ("mixtral", "nf4", 1, 2, 0, "none"),
        ("qwen2_moe", "nf4", 1, 2, 0, "none", SEQUENCE),
        ("mixtral", "nf4", 2, 1, 3, "non_reentrant"),
        ("mixtral", "nf4", 1, 2, 0, "none", BOTH),
        ("gpt_oss", "nf4", 2, 1, 3, "none", BOTH),
    ),
    ids=lambda case: "-".join(map(str, case)),
)
def test_experts_train_on_every_mesh_as_on_one_process(spread, one_process, case):
    expected = one_process[as_one(case)]
    assert min(expected["grad_norm"]) > 1e-3
    for run in spread[case]:
        for key in ("loss", "kl", "grad_norm"):
            np.testing.assert_allclose(run[key], expected[key], rtol=1e-5, atol=1e-7, err_msg=key)
        for name, tensor in expected["optimizer"].items():
            if name.endswith(("master", "exp_avg")):
                distance = (run["optimizer"][name] - tensor).norm()
                assert distance <= 1e-5 * tensor.norm() + 1e-9, name


GRADIENTS: list[Case] = [
    ("mixtral", "nf4", 1, 2, 0, "none"),
    ("qwen2_moe", "nf4", 1, 2, 0, "non_reentrant"),
    ("qwen2_moe", "nf4", 1, 2, 0, "none", SEQUENCE),
    ("deepseek_v3", "nf4", 1, 2, 0, "none"),
    ("mixtral", "nf4", 1, 2, 0, "none", BOTH),
    ("qwen2_moe", "nf4", 1, 2, 0, "reentrant", BOTH, SEQUENCE),
]


@pytest.fixture(scope="module")
def gradients(folder, chosen) -> dict[Case, list[dict[str, torch.Tensor]]]:
    configs = {case: config_of(folder, case) for case in chosen(GRADIENTS)}
    return by_case(run_distributed(dense.gradients_each, 2, configs))


@pytest.mark.parametrize(
    "case",
    mostly_long(GRADIENTS, GRADIENTS[0], GRADIENTS[4]),
    ids=lambda case: "-".join(map(str, case)),
)
def test_gathered_gradients_are_those_of_dense_experts_in_fp64(folder, gradients, case):
    expected = dense.in_fp64(config_of(folder, as_one(case)))
    for found in gradients[case]:
        assert abs(found["loss"] - expected["loss"]) <= 3e-5 * abs(expected["loss"])
        for name, grad in expected.items():
            if name != "loss":
                distance = (found[name].double() - grad).norm()
                assert distance <= 3e-5 * grad.norm() + 1e-10, name


# ---------------------------------------------------------------- who holds what


def holdings(rank: int, world_size: int, configs: dict[str, Config]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for name, config in configs.items():
        mesh = start_mesh(config.parallel.tensor_parallel_degree)
        after = Partition(mesh.dp) if config.parallel.zero_stage == 3 else None
        path = Path(config.model.name_or_path)
        base, _ = load_base(path, config.model, mesh, config.parallel, after)
        layers: list[Any] = list(experts_of(base).values())
        parameters = [getattr(layer, kind) for layer in layers for kind in layer.matrices]
        of_experts = {id(p) for p in parameters}
        buffers = after.buffers if after else ()
        parts = [b.part for b in buffers if of_experts & {id(weight) for weight in b.weights}]
        found[name] = {
            "bytes": sum(t.untyped_storage().nbytes() for t in (*parameters, *parts)),
            "packed": all(isinstance(layer, Experts4bit) for layer in layers),
            "tensors": [] if after else [dict(layer.held()) for layer in layers],
        }
    return found


def test_a_rank_holds_its_share_of_the_experts_and_the_same_codes(folder):
    whole = config_of(folder, ("mixtral", "nf4", 1, 1, 0, "none"))
    cases = {
        "tp": config_of(folder, ("mixtral", "nf4", 1, 2, 0, "none")),
        "zero": config_of(folder, ("mixtral", "nf4", 2, 1, 3, "none")),
    }
    (alone,) = run_distributed(holdings, 1, {"alone": whole})
    ranks = run_distributed(holdings, 2, cases)
    expected = alone["alone"]
    assert all(r[case]["packed"] for r in ranks for case in r)
    assert [r["tp"]["bytes"] * 5 // expected["bytes"] for r in ranks] == [3, 2]
    for rank in ranks:
        assert rank["zero"]["bytes"] == pytest.approx(expected["bytes"] / 2, rel=1e-3)
    for layer, held in enumerate(expected["tensors"]):
        for name, tensor in held.items():
            parts = [rank["tp"]["tensors"][layer][name] for rank in ranks]
            assert torch.equal(torch.cat(parts), tensor), name
