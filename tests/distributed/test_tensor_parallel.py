"""A model spread over ranks trains as one process does: losses, gradients, adapters, every mesh.

Derived tolerances. The meshes sum the same fp32 numbers in another order, so what test_zero.py
derives holds here, too: 1e-5, relative, for losses and adapters after a few steps at eps = 1e-3.
A gradient of one batch against fp64 is a chain of about 30 matrix products of length K <= 256,
each with a relative error of about sqrt(K) * 2**-24 ~ 1e-6 in norm: 3e-5, relative.

All cases of one world size share its processes.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft.tuners.lora import ParamWrapper
from torch import nn

from dense_reference import dense_with_prompt
from distributed.runner import mostly_long, run_distributed
from distributed.test_zero import build, by_case, global_batch, step_once
from moored.adapted import adapters_off
from moored.config import Config, load_config
from moored.data.batch import batches_of
from moored.distributed.mesh import start_mesh
from moored.loss.divergence import Objective, Scales
from moored.models.adapters import ExpertLora
from moored.models.experts import Experts4bit
from moored.models.forward import final_hidden
from moored.models.nf4 import FrozenLinear4bit
from moored.models.policy import PolicyModel, load_policy
from tiny import ALONE, tiny_recipe, write_recipe

STEPS = 5
HEADS = {
    "intermediate_size": 320,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
}
THIRDS = {"hidden_size": 192, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 32}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": HEADS,
    "qwen2": HEADS | {"tie_word_embeddings": False},
    "qwen3": HEADS,
    "mistral": HEADS | {"tie_word_embeddings": False, "sliding_window": 12},
    "gemma2": HEADS | {"sliding_window": 12},
    "thirds": THIRDS | {"intermediate_size": 192},
}
CHECKPOINTING = ["none", "reentrant", "non_reentrant"]
PROMPT = "regularizer.positions=all"
MOL = (
    "regularizer.kind=mol",
    "regularizer.anchors={path: FOLDER/train.jsonl, text_field: prompt, window_tokens: 24, "
    "weight: 3.0}",
)
STM = ("regularizer.kind=stm", "regularizer.max_perplexity=270")
SINE = "adapter.method=sinelora"
Case = tuple[Any, ...]


def config_of(folder: Path, case: Case) -> Config:
    """Of (architecture, quantisation, direction, dp, tp, stage, checkpointing, more...)."""
    name, quantization, direction, _, tp, stage, checkpointing, *more = case
    architecture = "llama" if name == "thirds" else name
    path = folder / name
    recipe = tiny_recipe(path, architecture, **ARCHITECTURES[name])
    has_kind = any(text.startswith("regularizer.kind=") for text in more)
    overrides = [
        f"model.quantization={quantization}",
        *([] if has_kind else [f"regularizer.direction={direction}"]),
        f"parallel.tensor_parallel_degree={tp}",
        f"parallel.zero_stage={stage}",
        f"train.gradient_checkpointing={checkpointing}",
        *(text.replace("FOLDER", str(path)) for text in more),
    ]
    if tp > 1 and not any("sequence_parallel" in text for text in more):
        overrides.append("parallel.sequence_parallel=false")
    return load_config(write_recipe(path, recipe), overrides)


def as_one(case: Case) -> Case:
    """The same on one process, stage 0, without checkpointing."""
    name, quantization, direction = case[:3]
    ours = [text for text in case[7:] if not text.startswith("parallel.")]
    return (name, quantization, direction, 1, 1, 0, "none", *ours)


def train(config: Config) -> dict[str, Any]:
    mesh, engine = build(config)
    degree = config.parallel.tensor_parallel_degree
    assert (mesh.dp.rank, mesh.tp.rank) == divmod(mesh.world.rank, degree), "no neighbours"
    stats = [step_once(engine, mesh, config, step) for step in range(STEPS)]
    engine.require_equal_replicas()
    result: dict[str, Any] = {
        "loss": [s.loss for s in stats],
        "kl": [s.kl or 0.0 for s in stats],
        "kl_prompt": [s.kl_prompt or 0.0 for s in stats],
        "kl_anchors": [s.kl_anchors or 0.0 for s in stats],
        "grad_norm": [s.grad_norm for s in stats],
        "optimizer": engine.optimizer_tensors(),
    }
    engine.close()
    return result


def train_each(rank: int, world_size: int, configs: dict[Case, Config]) -> dict[Case, Any]:
    return {case: train(config) for case, config in configs.items()}


CASES: dict[int, list[Case]] = {
    2: [
        *(
            (name, quantization, "forward", 1, 2, stage % 4, "none")
            for stage, name in enumerate(ARCHITECTURES)
            for quantization in ("nf4", "none")
        ),
        *(
            ("llama", "nf4", "reverse", 1, 2, stage, checkpointing)
            for stage in range(4)
            for checkpointing in CHECKPOINTING
        ),
        ("qwen2", "nf4", "forward", 2, 1, 2, "non_reentrant"),
        ("llama", "nf4", "forward", 1, 2, 2, "none", "model.double_quantization=false"),
        ("llama", "nf4", "forward", 1, 2, 0, "none", "adapter.dropout=0.2"),
        ("llama", "nf4", "forward", 1, 2, 3, "non_reentrant", "adapter.dropout=0.2"),
        ("llama", "nf4", "forward", 1, 2, 2, "none", "adapter.method=dora"),
        ("qwen2", "none", "forward", 1, 2, 1, "non_reentrant", "adapter.method=dora"),
        ("llama", "nf4", "forward", 1, 2, 2, "none", "adapter.init=gaussian"),
        ("llama", "nf4", "forward", 1, 2, 3, "non_reentrant", SINE, "adapter.omega=20"),
        *(
            ("llama", "nf4", "forward", 1, 2, stage, "none", "optim.max_grad_norm=0.02")
            for stage in (0, 2, 3)
        ),
        ("llama", "nf4", "forward", 1, 2, 2, "none", "adapter.target_modules=[o_proj,up_proj]"),
        ("llama", "nf4", "forward", 1, 2, 2, "none", PROMPT),
        ("llama", "nf4", "forward", 1, 2, 1, "non_reentrant", *STM),
        ("llama", "nf4", "forward", 1, 2, 3, "reentrant", *MOL),
        ("qwen2", "none", "jsd", 1, 2, 3, "none", PROMPT, "parallel.sequence_parallel=true"),
        *(
            (name, "nf4", "forward", 1, 2, stage, checkpointing, "parallel.sequence_parallel=true")
            for name, stage, checkpointing in [
                ("llama", 0, "none"),
                ("qwen3", 2, "reentrant"),
                ("gemma2", 3, "non_reentrant"),
            ]
        ),
    ],
    3: [
        ("thirds", quantization, direction, 1, 3, stage, "non_reentrant", *more)
        for quantization, direction, stage, more in [
            ("nf4", "forward", 2, ()),
            ("none", "reverse", 3, ()),
            ("nf4", "forward", 1, ("parallel.sequence_parallel=true",)),
        ]
    ],
    4: [
        *(
            (name, "nf4", "forward", 2, 2, stage, "non_reentrant")
            for name, stage in [
                ("llama", 0),
                ("llama", 1),
                ("llama", 2),
                ("llama", 3),
                ("qwen2", 3),
                ("gemma2", 2),
            ]
        ),
        ("mistral", "none", "reverse", 2, 2, 3, "reentrant"),
        ("qwen3", "nf4", "reverse", 1, 4, 0, "none"),
        ("qwen2", "none", "forward", 1, 4, 2, "non_reentrant"),
        ("llama", "nf4", "forward", 2, 2, 2, "none", "parallel.sequence_parallel=true"),
        ("llama", "nf4", "reverse", 2, 2, 2, "none", PROMPT),
        ("qwen2", "none", "forward", 2, 2, 3, "none", *STM, "parallel.sequence_parallel=true"),
    ],
}
ALL = [case for cases in CASES.values() for case in cases]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("tp")


@pytest.fixture(scope="module")
def one_process(folder, chosen) -> dict[Case, dict[str, Any]]:
    configs = {as_one(case): config_of(folder, as_one(case)) for case in chosen(ALL)}
    return run_distributed(train_each, 1, configs)[0]


@pytest.fixture(scope="module")
def spread(folder, chosen) -> dict[Case, list[dict[str, Any]]]:
    runs: dict[Case, list[dict[str, Any]]] = {}
    for world_size, cases in CASES.items():
        if configs := {case: config_of(folder, case) for case in chosen(cases)}:
            runs |= by_case(run_distributed(train_each, world_size, configs))
    return runs


@pytest.mark.parametrize(
    "case",
    mostly_long(
        ALL,
        ("llama", "nf4", "forward", 1, 2, 0, "none"),
        ("qwen2", "none", "forward", 1, 2, 1, "none"),
        ("mistral", "nf4", "forward", 1, 2, 3, "none"),
        ("llama", "nf4", "reverse", 1, 2, 2, "non_reentrant"),
        ("llama", "nf4", "forward", 1, 2, 2, "none", PROMPT),
        ("gemma2", "nf4", "forward", 1, 2, 3, "non_reentrant", "parallel.sequence_parallel=true"),
        ("llama", "nf4", "forward", 2, 2, 2, "non_reentrant"),
    ),
    ids=lambda case: "-".join(map(str, case)),
)
def test_every_mesh_trains_as_one_process(spread, one_process, case):
    expected = one_process[as_one(case)]
    assert any(t.abs().max() > 0 for n, t in expected["optimizer"].items() if "lora_B" in n)
    assert min(expected["grad_norm"]) > 0.02, "nothing was clipped where it should be"
    for run in spread[case]:
        for key in ("loss", "kl", "kl_prompt", "grad_norm"):
            np.testing.assert_allclose(run[key], expected[key], rtol=1e-5, atol=1e-7, err_msg=key)
        assert run["optimizer"].keys() == expected["optimizer"].keys()
        for name, tensor in expected["optimizer"].items():
            if name.endswith(("master", "exp_avg")):
                distance = (run["optimizer"][name] - tensor).norm()
                assert distance <= 1e-5 * tensor.norm() + 1e-9, name


# ---------------------------------------------------------------- what its ranks share


def summed_otherwise(rank: int, world_size: int, configs: dict[Case, Config]) -> dict[Case, dict]:
    """Ranks that sum gradients over their data-parallel groups in orders of their own.

    As NCCL's groups may, and gloo's here do not: so each rank's gradients get the rounding of
    another order.
    """
    results = {}
    for case, config in configs.items():
        mesh, engine = build(config)
        for parameter in engine.policy.trainable().values():
            parameter.register_hook(lambda grad, by=1 + mesh.tp.rank * 2**-21: grad * by)
        norms = [step_once(engine, mesh, config, step).grad_norm for step in range(STEPS)]
        engine.require_equal_replicas()
        results[case] = {"norms": norms, "adapter": engine.adapter_tensors()}
        engine.close()
    return results


SHARED = [
    *(("llama", "nf4", "forward", 2, 2, stage, "none") for stage in range(4)),
    ("llama", "nf4", "forward", 2, 2, 0, "none", "optim.max_grad_norm=0.02"),
    ("llama", "nf4", "forward", 2, 2, 1, "none", "parallel.offload=optimizer"),
    ("llama", "nf4", "forward", 2, 2, 3, "none", "parallel.offload=optimizer"),
]


@pytest.fixture(scope="module")
def otherwise(folder, chosen) -> dict[Case, list[dict]]:
    configs = {case: config_of(folder, case) for case in chosen(SHARED)}
    return by_case(run_distributed(summed_otherwise, 4, configs)) if configs else {}


@pytest.mark.parametrize("case", mostly_long(SHARED, SHARED[0], SHARED[2], SHARED[3]), ids=str)
def test_what_ranks_share_is_equal_by_construction(otherwise, case):
    first, *others = otherwise[case]
    assert all(norm > 0 for norm in first["norms"])
    for other in others:
        if case[5] == 0:  # ZeRO's own norm is of partitions, which no other rank has
            assert other["norms"] == first["norms"]
        for name, tensor in first["adapter"].items():
            assert torch.equal(other["adapter"][name], tensor), name


# ---------------------------------------------------------------- gradients against fp64


def fill(policy: PolicyModel) -> None:
    """The same values everywhere for whole tensors, none of them 0."""
    with torch.no_grad():
        for name, parameter in policy.trainable().items():
            shape = list(parameter.shape)
            split = policy.sharding.split_of(name) if policy.sharding else None
            if split is not None:
                shape[split.dim] = split.whole
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            whole = 0.05 * torch.randn(shape, generator=generator)
            if "magnitude" in name:
                whole = whole.abs() + 1.0
            parameter.copy_(policy.sharding.local(name, whole) if policy.sharding else whole)


def batch_of(config: Config) -> Any:
    how = {"pad_token_id": 0, "all_positions": config.regularizer.holds_prompt}
    return batches_of(global_batch(0), micro_batch_size=6, dp_rank=0, dp_size=1, **how)[0]


def gradients(config: Config) -> dict[str, torch.Tensor]:
    """Whole gradients of one batch, and the loss."""
    mesh = start_mesh(config.parallel.tensor_parallel_degree)
    policy = load_policy(Path(config.model.name_or_path), config, mesh)
    fill(policy)
    batch = batch_of(config)
    with adapters_off(policy):
        reference = policy(batch)
    objective = Objective(config.regularizer.direction)
    scales = Scales(1 / batch.num_targets, 0.7 / batch.num_kl, 1.3 / max(1, batch.num_prompt))
    loss, _ = policy(batch, reference, use=PolicyModel.loss, objective=objective, scales=scales)
    loss.backward()
    found = {"loss": loss.detach(), "hidden": reference}
    for name, parameter in policy.trainable().items():
        assert parameter.grad is not None
        whole = policy.sharding.whole if policy.sharding else (lambda _, tensor: tensor)
        found[name] = whole(name, parameter.grad)
    return found


def gradients_each(rank: int, world_size: int, configs: dict[Case, Config]) -> dict[Case, Any]:
    return {case: gradients(config) for case, config in configs.items()}


def in_full(module: Any) -> None:
    """Make experts in 4 bits transformers' own again, computed by its loop over experts."""
    stacks = {
        kind: torch.stack(
            [module.dequantized(kind, e, torch.float64) for e in range(module.num_experts)]
        )
        for kind in module.matrices
    }
    module.__class__ = type(module).__mro__[2]
    module.config._experts_implementation = "eager"
    for kind, stack in stacks.items():
        whole = stack.transpose(1, 2) if module.is_transposed else stack
        setattr(module, kind, nn.Parameter(whole.contiguous(), requires_grad=False))


def in_fp64(config: Config) -> dict[str, torch.Tensor]:
    """The same by Hugging Face's and PEFT's own forward in fp64, logits and all."""
    policy = load_policy(Path(config.model.name_or_path), config, ALONE)
    fill(policy)
    base: Any = policy.causal_lm.get_base_model()
    for path, module in list(base.named_modules()):
        if isinstance(module, FrozenLinear4bit):
            dense = nn.Linear(module.in_features, module.out_features, module.bias is not None)
            dense.weight = nn.Parameter(module.dequantized(torch.float64), requires_grad=False)
            if module.bias is not None:
                dense.bias = nn.Parameter(module.bias.double(), requires_grad=False)
            parent, _, leaf = path.rpartition(".")
            setattr(base.get_submodule(parent), leaf, dense)
    for module in base.modules():
        if isinstance(module, Experts4bit):
            in_full(module)
        if isinstance(module, ExpertLora):
            module.__class__ = ParamWrapper  # PEFT's own, which adds to the weights
    policy.double()
    batch, head = batch_of(config), policy.head

    def logits() -> torch.Tensor:
        s = final_hidden(base, batch) @ head.weight.t()
        cap = head.logit_softcap
        return s if cap is None else cap * torch.tanh(s / cap)

    with adapters_off(policy):
        reference = logits()
    loss, *_ = dense_with_prompt(
        logits(),
        reference,
        batch.targets,
        kl_mask=batch.kl_mask,
        kl_weight=0.7,
        prompt_weight=1.3,
        direction=config.regularizer.direction,
    )
    loss.backward()
    grads = {name: p.grad for name, p in policy.trainable().items()}
    return {"loss": loss.detach(), **grads}


GRADIENTS: dict[int, list[Case]] = {
    2: [
        (name, quantization, direction, 1, 2, 0, checkpointing, *more)
        for name, quantization, direction, checkpointing, more in [
            ("llama", "nf4", "forward", "none", ()),
            ("llama", "nf4", "reverse", "non_reentrant", ()),
            ("llama", "none", "forward", "reentrant", ("parallel.sequence_parallel=true",)),
            ("qwen2", "none", "forward", "none", ()),
            ("qwen3", "nf4", "jsd", "none", ()),
            ("mistral", "nf4", "forward", "none", ()),
            ("gemma2", "nf4", "forward", "non_reentrant", ()),
            ("thirds", "nf4", "forward", "none", ()),
            ("llama", "nf4", "forward", "none", (SINE,)),
            ("llama", "nf4", "forward", "none", (PROMPT,)),
            ("qwen2", "nf4", "reverse", "non_reentrant", (PROMPT,)),
            ("qwen2", "none", "reverse", "reentrant", (SINE, "parallel.sequence_parallel=true")),
        ]
    ],
    4: [
        ("qwen2", "nf4", "forward", 1, 4, 0, "non_reentrant"),
        ("qwen2", "nf4", "jsd", 1, 4, 0, "none", PROMPT),
        ("gemma2", "none", "reverse", 1, 4, 0, "none", "parallel.sequence_parallel=true"),
    ],
}
ALL_GRADIENTS = [case for cases in GRADIENTS.values() for case in cases]


@pytest.fixture(scope="module")
def gradients_spread(folder, chosen) -> dict[Case, list[dict[str, torch.Tensor]]]:
    found: dict[Case, list[dict[str, torch.Tensor]]] = {}
    for world_size, cases in GRADIENTS.items():
        if configs := {case: config_of(folder, case) for case in chosen(cases)}:
            found |= by_case(run_distributed(gradients_each, world_size, configs))
    return found


@pytest.mark.parametrize(
    "case",
    mostly_long(
        ALL_GRADIENTS,
        ("llama", "nf4", "reverse", 1, 2, 0, "non_reentrant"),
        ("llama", "nf4", "forward", 1, 2, 0, "none", PROMPT),
        ("qwen2", "none", "forward", 1, 2, 0, "none"),
    ),
    ids=lambda case: "-".join(map(str, case)),
)
def test_gathered_gradients_are_those_of_a_dense_fp64_model(folder, gradients_spread, case):
    expected = in_fp64(config_of(folder, as_one(case)))
    first = gradients_spread[case][0]
    assert abs(first["loss"] - expected["loss"]) <= 1e-5 * expected["loss"]
    for name, gradient in expected.items():
        if name != "loss":
            distance = (first[name].double() - gradient).norm()
            assert distance <= 3e-5 * gradient.norm(), (name, float(distance / gradient.norm()))
    for other in gradients_spread[case][1:]:
        for name, tensor in first.items():
            assert torch.equal(other[name], tensor), f"{name} differs between ranks"
