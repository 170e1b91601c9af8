"""RandLoRA, SineLoRA and OFT over real processes and across a restart are those of one process.

The tolerance is test_zero.py's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distributed.runner import mostly_long, run_distributed
from distributed.test_zero import STEPS, assert_same, build, by_case, global_batch, step_once
from moored.config import Config, load_config
from moored.data.batch import batches_of
from moored.distributed.mesh import start_mesh
from moored.models.adapters import frozen_buffers
from moored.models.engine import Engine
from moored.models.partition import is_cut
from moored.models.policy import load_policy
from moored.training import checkpoint
from tiny import tiny_recipe, write_recipe

METHODS = ["randlora", "sinelora", "oft"]
CASES = [
    (method, stage, kind)
    for method in METHODS
    for stage, kind in [(2, "none"), (3, "reentrant"), (3, "non_reentrant")]
] + [("oft", 3, "none")]


def config_of(folder: Path, method: str, *overrides: str) -> Config:
    recipe = tiny_recipe(folder)
    sizes = {"oft_block_size": 16} if method == "oft" else {"r": 4, "alpha": 8.0}
    recipe["adapter"] = {"method": method, **sizes}
    return load_config(write_recipe(folder, recipe), list(overrides))


def train(config: Config) -> dict[str, Any]:
    """Three updates; what every rank must agree on, and whether it has parts of the adapter."""
    mesh, one = build(config)
    batch = batches_of(global_batch(9), micro_batch_size=6, dp_rank=0, dp_size=1, pad_token_id=0)[0]
    fresh = one.drift(batch)  # outside of the engine's forward, and before its first
    assert not fresh.kl.any()
    stats = [step_once(one, mesh, config, step) for step in range(STEPS)]
    result = {
        "drift": one.drift(batch).kl.tolist(),
        "loss": [s.loss for s in stats],
        "kl": [s.kl for s in stats],
        "grad_norm": [s.grad_norm for s in stats],
        "adapter": one.adapter_tensors(),
        "optimizer": one.optimizer_tensors(),
        "is_cut": [
            is_cut(p) for p in one.policy.parameters() if p.dim() > 1 and not p.requires_grad
        ],
    }
    one.close()
    return result


def train_each(rank: int, world_size: int, configs: dict[Any, Config]) -> dict[Any, dict]:
    return {case: train(config) for case, config in configs.items()}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, chosen) -> tuple[dict, dict]:
    folder, cases = tmp_path_factory.mktemp("adapters"), chosen(CASES)
    one = {method: config_of(folder / method, method) for method, _, _ in cases}
    two = {
        (method, stage, kind): config_of(
            folder / method,
            method,
            f"parallel.zero_stage={stage}",
            f"train.gradient_checkpointing={kind}",
        )
        for method, stage, kind in cases
    }
    return tuple(
        by_case(run_distributed(train_each, world_size, configs))
        for world_size, configs in ((1, one), (2, two))
    )


@pytest.mark.parametrize(
    "case",
    mostly_long(
        CASES, ("randlora", 3, "reentrant"), ("sinelora", 3, "non_reentrant"), ("oft", 3, "none")
    ),
    ids=lambda case: "-".join(map(str, case)),
)
def test_two_processes_equal_one(runs, case):
    one, two = runs
    first, second = two[case]
    method, stage, _ = case
    [expected] = one[method]
    assert_same(first, expected)
    np.testing.assert_allclose(first["drift"], expected["drift"], rtol=1e-4, atol=1e-7)
    assert first["loss"] == second["loss"]
    for name, tensor in first["adapter"].items():
        assert torch.equal(tensor, second["adapter"][name]), f"{name} differs between the ranks"
    assert set(first["is_cut"]) == {stage == 3}, "of the base, which is what ZeRO-3 cuts"


# ---------------------------------------------------------------- across a restart


def continued(rank: int, world_size: int, folder: Path, configs: dict[str, Config]) -> dict:
    """Two updates, a checkpoint, and two more in an engine of its own; and four in one go."""
    results = {}
    for method, config in configs.items():
        mesh, whole = build(config)
        losses = [step_once(whole, mesh, config, step).loss for step in range(4)]
        expected = whole.optimizer_tensors() | {"loss": losses[2:]}
        whole.close()

        mesh, first = build(config)
        for step in range(2):
            step_once(first, mesh, config, step)
        kept = checkpoint.Checkpoint(step=2, optimizer=first.optimizer_tensors(), state={})
        bases = {n: t.clone() for n, t in frozen_buffers(first.policy.causal_lm).items()}
        to = folder / f"{method}-2"
        checkpoint.write(to, kept, first.policy.causal_lm, "base", require_owned=lambda: None)
        first.close()

        mesh = start_mesh(1)
        policy = load_policy(Path(config.model.name_or_path), config, mesh)
        for tensor in frozen_buffers(policy.causal_lm).values():
            tensor.mul_(1.01)  # a machine that draws them otherwise
        checkpoint.load_adapter(to, policy)
        again = frozen_buffers(policy.causal_lm)
        second = Engine(policy, config, mesh)
        second.load_optimizer_tensors(checkpoint.read_optimizer(to))
        losses = [step_once(second, mesh, config, step).loss for step in (2, 3)]
        results[method] = {
            "expected": expected,
            "found": second.optimizer_tensors() | {"loss": losses},
            "bases": {name: (tensor, again[name]) for name, tensor in bases.items()},
        }
        second.close()
    return results


def test_a_run_goes_on_as_if_it_had_not_stopped(tmp_path):
    more = {"oft": "adapter.use_cayley_neumann=false"}  # which has no dropout
    configs = {
        method: config_of(tmp_path / method, method, more.get(method, "adapter.dropout=0.1"))
        for method in METHODS
    }
    [results] = run_distributed(continued, 1, tmp_path, configs)
    for method, result in results.items():
        expected, found = result["expected"], result["found"]
        assert found.pop("loss") == expected.pop("loss"), method
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), (method, name)
        assert len(result["bases"]) == (2 if method == "randlora" else 0)
        for before, after in result["bases"].values():
            assert torch.equal(before, after)
