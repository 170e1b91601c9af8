"""Sequence parallelism: on where the architecture lets it, if a recipe leaves it open; long rows.

That it gives the same numbers is shown for every architecture in test_tensor_parallel.py.
"""

from __future__ import annotations

import gc
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distributed import test_mesh_run as mesh_run
from distributed import test_spread_experts as mixtures
from distributed import test_tensor_parallel as dense
from distributed.runner import run_distributed
from moored.adapted import adapters_off
from moored.config import Config, load_config
from moored.data.batch import Batch, collate
from moored.data.stream import TrainStream
from moored.data.token_arrays import Sample
from moored.distributed.mesh import start_mesh
from moored.loss.divergence import Objective, Scales
from moored.models.policy import PolicyModel, load_policy
from moored.training import train
from moored.utils.errors import UserError

DEGREE = "parallel.tensor_parallel_degree=2"


def loaded(rank: int, world_size: int, configs: dict[str, Config]) -> dict[str, Any]:
    """Whether tokens are spread and what was logged of it, or why it is refused."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    log = logging.getLogger("moored.models.loading")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    found: dict[str, Any] = {}
    for name, config in configs.items():
        mesh = start_mesh(config.parallel.tensor_parallel_degree)
        said.clear()
        try:
            policy = load_policy(Path(config.model.name_or_path), config, mesh)
        except UserError as error:
            found[name] = str(error)
        else:
            lines = [line for line in said if "sequence_parallel" in line]
            found[name] = (policy.sequence_parallel, lines)
    return found


def test_what_a_recipe_leaves_open_is_on_where_the_architecture_lets_it(tmp_path: Path) -> None:
    def config(kind: str, asked: str) -> Config:
        more = f"parallel.sequence_parallel={asked}"
        return mixtures.config_of(tmp_path, (kind, "nf4", 1, 2, 0, "none", more))

    configs = {
        f"{kind} {asked}": config(kind, asked)
        for kind in ("mixtral", "deepseek_v3")
        for asked in ("auto", "true", "false")
    }
    for found in run_distributed(loaded, 2, configs):
        assert found["mixtral auto"] == found["mixtral true"] == (True, [])
        assert found["mixtral false"] == found["deepseek_v3 false"] == (False, [])
        is_on, (line,) = found["deepseek_v3 auto"]
        why = "model.layers.0.self_attn (DeepseekV3Attention) is not in its architecture's plan"
        assert not is_on
        assert line.startswith(f"parallel.sequence_parallel is off: {why}")
        asked = found["deepseek_v3 true"]
        assert asked.startswith(f"parallel.sequence_parallel: {why}")
        assert asked.endswith("set it to false, or leave it out")


def begin_and_go_on(rank: int, world_size: int, runs: dict[str, tuple[Config, Config]]) -> Any:
    """Each run broken off under the one recipe, and begun again with the other."""
    names: dict[str, list[Any]] = {name: [] for name in runs}
    original = TrainStream.next_step

    def stop(self: TrainStream, **place: int) -> Any:
        raise mesh_run.Cut

    TrainStream.next_step = stop  # type: ignore[method-assign]
    for name, pair in runs.items():
        for config in pair:
            path = config.output.dir / name
            with pytest.raises(mesh_run.Cut):
                train.run(config, path=path, parent=path.parent)
            if rank == 0:  # which has written it
                kept = load_config(path / "config.yaml")
                names[name].append(kept.parallel.sequence_parallel)
    TrainStream.next_step = original
    return names


def test_a_run_names_what_was_chosen_and_goes_on_with_it(tmp_path: Path) -> None:
    """As those of older versions, whose copies of the recipe say false."""

    def config(asked: str | None, degree: int = 2) -> Config:
        more = [f"parallel.sequence_parallel={asked}"] * (asked is not None)
        mesh = "1x2" if degree == 2 else "1x1"
        config = mesh_run.recipe_of(tmp_path, "evaluation.before=false", *more, mesh=mesh)
        output = config.output.model_copy(update={"dir": tmp_path / "runs"})
        return config.model_copy(update={"output": output})

    open_, off, on = config(None), config("false"), config("true")
    runs = {
        "open": (open_, open_),
        "was off": (off, open_),
        "was on": (on, open_),
        "changed": (on, off),
    }
    names = run_distributed(begin_and_go_on, 2, runs)[0]
    assert names == {
        "open": [True, True],
        "was off": [False, False],
        "was on": [True, True],
        "changed": [True, False],
    }
    assert open_.parallel.sequence_parallel == "auto"
    assert config(None, degree=1).going_on(off).parallel.sequence_parallel == "auto"


# ---------------------------------------------------------------- a row of 8,192 tokens

LENGTHS = (5000, 3192)  # of its samples
LAYERS = 2
CHECKPOINTED = "non_reentrant"


def long_row() -> Batch:
    """One row, of which every third token is learned and held near the base."""
    generator = np.random.default_rng(0)
    row = []
    for index, length in enumerate(LENGTHS):
        ids = generator.integers(3, 259, length).astype(np.int32)
        learned = np.arange(length) % 3 == 1
        row.append(Sample(sample_id=str(index), input_ids=ids, label_mask=learned))
    return collate([row], pad_token_id=0)


def alive() -> dict[int, int]:
    """Bytes of every storage that Python holds, by its address."""
    found: dict[int, int] = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return found


def trained_on_it(rank: int, world_size: int, configs: dict[str, Config]) -> dict[str, Any]:
    """Loss and whole gradients of the row, and the bytes that wait for the backward."""
    results: dict[str, Any] = {}
    for name, config in configs.items():
        mesh = start_mesh(config.parallel.tensor_parallel_degree)
        policy = load_policy(Path(config.model.name_or_path), config, mesh)
        dense.fill(policy)
        batch = long_row()
        with adapters_off(policy):
            reference = policy(batch)
        before = alive()
        hidden = policy(batch)
        after = alive()
        kept = sum(size for at, size in after.items() if at not in before)
        del hidden
        scales = Scales(1 / batch.num_targets, 0.7 / batch.num_kl)
        loss, _ = policy(
            batch, reference, use=PolicyModel.loss, objective=Objective("forward"), scales=scales
        )
        loss.backward()
        whole = policy.sharding.whole if policy.sharding else (lambda _, tensor: tensor)
        grads = {n: whole(n, p.grad) for n, p in policy.trainable().items() if p.grad is not None}
        results[name] = {"loss": loss.item(), "grads": grads, "kept": kept}
    return results


def test_a_row_of_8192_tokens_is_that_of_a_dense_model_and_half_as_large(tmp_path, monkeypatch):
    """Over two ranks, in 4 bits, packed, with checkpointing; dense in fp64 on one process."""

    def config(degree: int, *more: str) -> Config:
        case = ("llama", "nf4", "forward", 1, degree, 0, CHECKPOINTED, "data.packing=true", *more)
        return dense.config_of(tmp_path, (*case, "data.max_length=8192"))

    spread = {
        "by tokens": config(2, "parallel.sequence_parallel=auto"),
        "whole rows": config(2),
    }
    monkeypatch.setattr(dense, "batch_of", lambda _: long_row())
    expected = dense.in_fp64(config(1))
    kept = {}
    for found in run_distributed(trained_on_it, 2, spread):
        for name, one in found.items():
            assert one["loss"] == pytest.approx(float(expected["loss"]), rel=1e-5)
            for parameter, gradient in one["grads"].items():
                distance = (gradient.double() - expected[parameter]).norm()
                assert distance <= 3e-5 * expected[parameter].norm(), (name, parameter)
            assert one["grads"].keys() == expected.keys() - {"loss"}
            kept[name] = one["kept"]
    layer = sum(LENGTHS) * 64 * 4  # its input, all that checkpointing keeps of it
    assert kept["whole rows"] >= LAYERS * layer
    # The first is called with all tokens, and deals them out.
    saved = kept["whole rows"] - kept["by tokens"]
    assert saved == pytest.approx((LAYERS - 1) * layer / 2, rel=0.02), kept
