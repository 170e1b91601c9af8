"""What ranks send each other is JSON: it comes back as it was, and no rank ever unpickles."""

from __future__ import annotations

import contextlib
import math
import pickle
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from distributed.runner import run_distributed
from moored.config import Config, load_config
from moored.distributed.mesh import Axis, alone
from moored.training import train
from moored.utils.errors import UserError
from tiny import tiny_recipe, write_recipe

VALUES: list[Any] = [
    None,
    True,
    -7,
    2**70,
    0.1 + 0.2,
    5e-324,
    -0.0,
    math.inf,
    "",
    "ü \udcff \x00 💡",
    [],
    {"b": [1.5, {"c": None}], "a": "order is kept"},
    {str(i): i / 7 for i in range(3000)},
]
BAD: list[Any] = [(1, 2), {1: "a"}, [{"a": Path("/")}], {"a": {1, 2}}, b"x", torch.ones(1)]


class Canary:
    """A pickle that, when read, writes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.path, "ran")


def exchange(rank: int, world_size: int) -> dict[str, Any]:
    axis = Axis(name="world", rank=rank, size=world_size)
    found: dict[str, Any] = {
        "gathered": [axis.gather(value) for value in VALUES],
        "own": axis.gather({"rank": "r" * rank * 1000}),
        "sent": [axis.broadcast(value if rank == 0 else object()) for value in VALUES],
        "nan": axis.broadcast(math.nan),
        "complaints": [],
    }
    for value in BAD:
        for who in (0, world_size - 1):
            with pytest.raises(TypeError) as caught:
                axis.gather(value if rank == who else "fine")
            found["complaints"].append(str(caught.value))
        with pytest.raises(TypeError):
            axis.broadcast(value if rank == 0 else "fine")
    found["after"] = axis.gather(rank)
    return found


@pytest.mark.parametrize("world_size", [2, 3])
def test_values_come_back_as_they_were(world_size: int) -> None:
    for rank, found in enumerate(run_distributed(exchange, world_size)):
        for value, gathered in zip(VALUES, found["gathered"], strict=True):
            assert repr(gathered) == repr([value] * world_size)  # repr: -0.0, and the keys' order
        assert repr(found["sent"]) == repr(VALUES)
        assert found["own"] == [{"rank": "r" * i * 1000} for i in range(world_size)]
        assert math.isnan(found["nan"])
        first, last = found["complaints"][:2]
        assert ("value is a tuple" if rank == 0 else "rank 0 was to send") in first
        assert ("value is a tuple" if rank == world_size - 1 else "was to send") in last
        assert found["after"] == list(range(world_size))  # a refused value holds nobody up


@pytest.mark.parametrize("value", BAD, ids=lambda value: type(value).__name__)
def test_one_process_refuses_what_several_would(value: Any) -> None:
    with pytest.raises(TypeError, match="ranks send each other JSON"):
        alone().world.gather(value)
    with pytest.raises(TypeError, match="ranks send each other JSON"):
        alone().world.broadcast(value)


def send_a_pickle(rank: int, world_size: int, canary: Path, how: str) -> str:
    """The last rank is a stranger who sends what unpickling ranks would have run."""
    axis = Axis(name="world", rank=rank, size=world_size)
    stranger = (rank == 0) if how == "broadcast" else (rank == world_size - 1)
    if not stranger:
        with pytest.raises(UserError) as caught:
            axis.broadcast(None) if how == "broadcast" else axis.gather(None)
        return str(caught.value)
    data = torch.frombuffer(bytearray(pickle.dumps(Canary(canary))), dtype=torch.uint8)
    length = torch.tensor([len(data) if how != "huge" else 2**62])
    if how == "broadcast":
        dist.broadcast(length, src=0)
        dist.broadcast(data, src=0)
        return ""
    axis._all(length)
    if how == "gather":
        axis._all(data)
    return ""


@pytest.mark.parametrize("how", ["gather", "broadcast", "huge"])
def test_a_pickle_from_a_stranger_is_not_read(how: str, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    pickle.loads(pickle.dumps(Canary(canary)))
    assert canary.exists()  # so it would be noticed
    canary.unlink()
    said = run_distributed(send_a_pickle, 2, canary, how)
    assert "another program takes part in this run" in "".join(said)
    assert not canary.exists()


def train_watched(rank: int, world_size: int, configs: list[Config]) -> list[str]:
    """Where anything below torch.distributed unpickled during whole runs."""
    found: list[str] = []
    c10d = dist.distributed_c10d

    def watch(original: Any) -> Any:
        def unpickle(*args: Any, **kwargs: Any) -> Any:
            stack = traceback.extract_stack()[:-1]
            if any("/torch/distributed/" in frame.filename for frame in stack):
                found.append("".join(traceback.format_list(stack[-8:])))
            return original(*args, **kwargs)

        return unpickle

    with contextlib.ExitStack() as stack:
        for module, name in [
            (pickle, "loads"),
            (pickle, "load"),
            (c10d, "_unpickler"),
            (c10d, "_tensor_to_object"),
            (c10d, "_object_to_tensor"),
        ]:
            original = getattr(module, name)
            setattr(module, name, watch(original))
            stack.callback(setattr, module, name, original)
        for config in configs:
            train.run(config, path=config.output.dir / config.name, parent=config.output.dir)
        watched = len(found)
        dist.all_gather_object([None] * world_size, "seen")
        assert len(found) > watched  # the watch itself works
        return found[:watched]


@pytest.mark.long
def test_no_library_unpickles_what_ranks_send(tmp_path: Path) -> None:
    """DeepSpeed in every stage, the device mesh, evaluation and generation: measured, not read."""
    recipe = tiny_recipe(
        tmp_path,
        intermediate_size=320,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
    )
    recipe["train"]["steps"] = 2
    recipe["evaluation"] |= {"exact_match": True, "max_new_tokens": 3}
    path = write_recipe(tmp_path, recipe)
    meshes = [(1, 1), (2, 1), (3, 1), (2, 2)]  # ZeRO stage, tensor_parallel_degree
    configs = [
        load_config(
            path,
            [
                f"name=zero{stage}-tp{degree}",
                f"parallel.zero_stage={stage}",
                f"parallel.tensor_parallel_degree={degree}",
            ],
        )
        for stage, degree in meshes
    ]
    assert run_distributed(train_watched, 2, configs) == [[], []]
    for config in configs:
        assert (config.output.dir / config.name / "adapter").is_dir()
