"""Ranks that share the tokens of each row train as one process, and see what it sees.

Tolerances as in test_tensor_parallel.py: a mesh changes the order of sums, nothing else.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distributed import test_mesh_run as mesh_run
from distributed import test_tensor_parallel as dense
from distributed.runner import mostly_long, run_distributed
from distributed.test_zero import by_case
from moored.adapted import adapters_off
from moored.config import Config, load_config
from moored.data.batch import Batch, collate
from moored.data.token_arrays import Sample
from moored.distributed.mesh import start_mesh
from moored.loss.divergence import Objective, Scales
from moored.models.policy import PolicyModel, load_policy
from moored.training import train
from moored.utils.errors import UserError, UserErrors
from tiny import tiny_recipe, write_recipe

Case = tuple[Any, ...]
TWO, FOUR = (f"parallel.context_parallel_degree={degree}" for degree in (2, 4))
AUTO = "parallel.sequence_parallel=auto"

# ---------------------------------------------------------------- five updates

CASES: dict[int, list[Case]] = {
    2: [
        ("llama", "nf4", "forward", 1, 1, 0, "non_reentrant", TWO),
        ("llama", "nf4", "reverse", 1, 1, 2, "reentrant", TWO, dense.PROMPT),
        ("qwen2", "none", "jsd", 1, 1, 1, "none", TWO),
        ("qwen3", "nf4", "forward", 1, 1, 3, "non_reentrant", TWO),
        ("llama", "nf4", "forward", 1, 1, 2, "none", TWO, "regularizer.every=3"),
        ("llama", "nf4", "forward", 1, 1, 2, "none", TWO, "adapter.method=dora"),
        ("llama", "none", "forward", 1, 1, 0, "none", TWO, "optim.max_grad_norm=0.02"),
    ],
    4: [
        ("llama", "nf4", "forward", 1, 2, 2, "non_reentrant", TWO, AUTO),
        ("llama", "none", "forward", 1, 2, 3, "none", TWO),
        ("qwen2", "nf4", "forward", 2, 1, 2, "none", TWO),
        ("qwen2", "none", "reverse", 1, 1, 2, "non_reentrant", FOUR),
    ],
}
ALL = [case for cases in CASES.values() for case in cases]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cp")


@pytest.fixture(scope="module")
def one_process(folder, chosen) -> dict[Case, dict[str, Any]]:
    cases = {dense.as_one(case) for case in chosen(ALL)}
    return run_distributed(dense.train_each, 1, {c: dense.config_of(folder, c) for c in cases})[0]


@pytest.fixture(scope="module")
def shared(folder, chosen) -> dict[Case, list[dict[str, Any]]]:
    runs: dict[Case, list[dict[str, Any]]] = {}
    for world_size, cases in CASES.items():
        if configs := {case: dense.config_of(folder, case) for case in chosen(cases)}:
            runs |= by_case(run_distributed(dense.train_each, world_size, configs))
    return runs


@pytest.mark.parametrize(
    "case",
    mostly_long(ALL, ALL[0], ALL[3]),
    ids=lambda case: "-".join(map(str, case)),
)
def test_ranks_that_share_rows_train_as_one_process(shared, one_process, case):
    expected = one_process[dense.as_one(case)]
    assert min(expected["grad_norm"]) > 0.02, "nothing was clipped where it should be"
    for run in shared[case]:
        for key in ("loss", "kl", "kl_prompt", "grad_norm"):
            mine, theirs = ([value or 0.0 for value in of[key]] for of in (run, expected))
            np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-7, err_msg=key)
        for name, tensor in expected["optimizer"].items():
            if name.endswith(("master", "exp_avg")):
                distance = (run["optimizer"][name] - tensor).norm()
                assert distance <= 1e-5 * tensor.norm() + 1e-9, name


# ---------------------------------------------------------------- gradients of packed rows


def packed(rows: tuple[tuple[int, ...], ...] = ((30, 17), (25, 9, 6))) -> Batch:
    """Rows of several samples, of a length that no number of ranks divides."""
    generator = np.random.default_rng(0)
    found = []
    for row, lengths in enumerate(rows):
        samples = []
        for index, length in enumerate(lengths):
            ids = generator.integers(3, 259, length).astype(np.int32)
            learned = generator.random(length) < 0.6
            samples.append(Sample(sample_id=f"{row}:{index}", input_ids=ids, label_mask=learned))
        found.append(samples)
    return collate(found, pad_token_id=0)


def gradients(rank: int, world_size: int, configs: dict[Case, Config]) -> dict[Case, Any]:
    """The loss of packed rows and its gradients, summed over the ranks that share them."""
    results = {}
    for case, config in configs.items():
        parallel = config.parallel
        mesh = start_mesh(
            parallel.tensor_parallel_degree,
            context_parallel_degree=parallel.context_parallel_degree,
        )
        policy = load_policy(Path(config.model.name_or_path), config, mesh)
        dense.fill(policy)
        whole = packed()
        batch = whole.part(mesh.cp.rank, mesh.cp.size)
        with adapters_off(policy):
            reference = policy(batch)
        scales = Scales(1 / whole.num_targets, 0.7 / whole.num_kl)
        objective = Objective(config.regularizer.direction)
        loss, _ = policy(batch, reference, use=PolicyModel.loss, objective=objective, scales=scales)
        loss.backward()
        join = policy.sharding.whole if policy.sharding else (lambda _, tensor: tensor)
        results[case] = {"loss": mesh.cp.sum(loss.detach())} | {
            name: mesh.cp.sum(join(name, parameter.grad))
            for name, parameter in policy.trainable().items()
        }
    return results


GRADIENTS: dict[int, list[Case]] = {
    2: [
        ("llama", "nf4", "forward", 1, 1, 0, "non_reentrant", TWO, "data.packing=true"),
        ("llama", "nf4", "forward", 1, 1, 0, "none", TWO),
        ("qwen2", "none", "jsd", 1, 1, 0, "reentrant", TWO, "data.packing=true"),
    ],
    4: [
        ("qwen3", "nf4", "reverse", 1, 2, 0, "non_reentrant", TWO, "data.packing=true", AUTO),
        ("llama", "none", "forward", 1, 1, 0, "none", FOUR, "data.packing=true"),
    ],
}
ALL_GRADIENTS = [case for cases in GRADIENTS.values() for case in cases]


@pytest.fixture(scope="module")
def found_gradients(folder, chosen) -> dict[Case, list[dict[str, torch.Tensor]]]:
    found: dict[Case, list[dict[str, torch.Tensor]]] = {}
    for world_size, cases in GRADIENTS.items():
        if configs := {case: dense.config_of(folder, case) for case in chosen(cases)}:
            found |= by_case(run_distributed(gradients, world_size, configs))
    return found


@pytest.mark.parametrize(
    "case",
    mostly_long(ALL_GRADIENTS, ALL_GRADIENTS[0]),
    ids=lambda case: "-".join(map(str, case)),
)
def test_gradients_of_packed_rows_are_those_of_a_dense_fp64_model(
    folder, found_gradients, case, monkeypatch
):
    monkeypatch.setattr(dense, "batch_of", lambda _: packed())
    expected = dense.in_fp64(dense.config_of(folder, dense.as_one(case)))
    for found in found_gradients[case]:
        assert abs(found["loss"] - expected["loss"]) <= 1e-5 * expected["loss"]
        for name, gradient in expected.items():
            if name != "loss":
                distance = (found[name].double() - gradient).norm()
                assert distance <= 3e-5 * gradient.norm(), name


def test_parts_hold_every_token_and_target_once() -> None:
    whole = packed()
    for size in (1, 2, 3, 5):
        parts = [whole.part(rank, size) for rank in range(size)]
        length = whole.input_ids.shape[1]
        for name in ("input_ids", "position_ids"):
            joined = torch.cat([getattr(part, name) for part in parts], 1)
            assert torch.equal(joined[:, :length], getattr(whole, name))
        for name in ("num_targets", "num_kl", "num_prompt", "num_tokens"):
            assert sum(getattr(part, name) for part in parts) == getattr(whole, name)
        seen = []
        for rank, part in enumerate(parts):
            share = part.input_ids.shape[1]
            at = part.target_index // share * length + part.target_index % share + rank * share
            assert torch.equal(at, whole.target_index[whole.part_of_targets(rank, size)])
            seen += list(zip(at.tolist(), part.targets.tolist(), strict=True))
            if size > 1:
                assert {sum(lengths) for lengths in part.sample_lengths or ()} == {share * size}
        assert sorted(seen) == list(
            zip(whole.target_index.tolist(), whole.targets.tolist(), strict=True)
        )


# ---------------------------------------------------------------- whole runs, and refusals


def test_a_run_whose_ranks_share_rows_is_that_of_one_process(tmp_path: Path) -> None:
    """Packed, with evaluation, the export and a checkpoint that is gone on from without them."""
    packing = ("data.packing=true", "train.global_batch_sequences=2", "train.micro_batch_size=1")
    alone = mesh_run.recipe_of(tmp_path, *packing)
    both = mesh_run.recipe_of(tmp_path, *packing, TWO)
    run_distributed(mesh_run.run_all, 1, [(alone, tmp_path / "one", False)])
    runs = [(both, tmp_path / "shared", False), (both, tmp_path / "begun", True)]
    run_distributed(mesh_run.run_all, 2, runs)
    run_distributed(mesh_run.run_all, 1, [(alone, tmp_path / "begun", False)])
    for name in ("shared", "begun"):
        mesh_run.assert_same_run(tmp_path / name, tmp_path / "one")


def refused(rank: int, world_size: int, configs: dict[str, Config]) -> dict[str, str]:
    found = {}
    for name, config in configs.items():
        with pytest.raises(UserError) as caught:
            train.run(config, path=config.output.dir / name, parent=config.output.dir)
        found[name] = str(caught.value)
    return found


def test_what_cannot_be_shared_is_refused_in_one_line(tmp_path: Path) -> None:
    def config(name: str, architecture: str, *more: str, **sizes: Any) -> Config:
        recipe = tiny_recipe(tmp_path / name, architecture, **sizes)
        return load_config(write_recipe(tmp_path / name, recipe), [TWO, *more])

    configs = {
        "heads": config("heads", "llama", **dense.THIRDS),
        "capped": config("capped", "gemma2", **dense.ARCHITECTURES["gemma2"]),
        "window": config("window", "mistral", **dense.ARCHITECTURES["mistral"]),
    }
    for found in run_distributed(refused, 2, configs):
        assert (
            "3 key/value heads cannot be dealt out evenly to 2 ranks: set it to 1"
            in (found["heads"])
        )
        assert "its rows are not attended to sample by sample" in found["capped"]
        assert "it looks back 12 tokens, and rows have 64" in found["window"]
        assert all("\n" not in line for line in found.values())
    [three] = {
        line["divides"] for line in run_distributed(refused, 3, {"divides": configs["heads"]})
    }
    assert "= 2 does not divide the 3 processes" in three


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("adapter.dropout=0.1", "adapter.dropout: is drawn for a whole row"),
        ("reference.cache=true", "reference.cache: keeps hidden states of whole rows"),
        ("model.attention=eager", "model.attention: eager is not spread over ranks"),
        ("regularizer.first_tokens=4", "regularizer.first_tokens: counts an answer's tokens"),
    ],
)
def test_options_that_look_at_whole_rows_are_refused(tmp_path: Path, override, said) -> None:
    path = write_recipe(tmp_path, tiny_recipe(tmp_path))
    load_config(path, [TWO])
    load_config(path, [override])
    with pytest.raises(UserErrors) as caught:
        load_config(path, [TWO, override])
    assert said in str(caught.value)
