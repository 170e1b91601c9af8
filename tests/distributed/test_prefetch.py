"""ZeRO-3 fetches ahead in every kind of call, whatever was called in between.

What is ahead is one layer: so of each call the layers may be waited for that come first in it, and
those behind the embedding and the head, which are larger and are gathered when they are needed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist

from distributed.runner import mostly_long, run_distributed
from distributed.test_zero import build, local_batches, recipe_config, step_once
from moored.config import Config
from moored.data.batch import Batch
from moored.models import partition
from moored.models.engine import Engine
from moored.models.reference import Reference, of_base

CASES = {
    "tmkl": (),
    "every second step": ("regularizer.every=2",),
    "cache": ("reference.cache=true", "reference.match=batch"),
    "replay": (
        "regularizer.kind=replay",
        "regularizer.replay=[{path: FOLDER/fox.txt}]",
        "regularizer.replay_fraction=0.5",
    ),
    "reentrant": ("train.gradient_checkpointing=reentrant",),
    "randlora": ("adapter.method=randlora",),
}
STEPS, WARM_UP = 8, 4
PHASES = ("step", "measured", "asked", "base asked")


def fetched(engine: Engine) -> Counter[Any]:
    assert engine.policy.partition is not None
    return engine.policy.partition.fetched


@contextmanager
def gathers_counted() -> Iterator[Counter[str]]:
    gather, found = dist.all_gather_into_tensor, Counter[str]()

    def counted(*args: Any, **options: Any) -> Any:
        found["gathers"] += 1
        return gather(*args, **options)

    dist.all_gather_into_tensor = counted
    try:
        yield found
    finally:
        dist.all_gather_into_tensor = gather


def ask(engine: Engine, num_tokens: int, *, base: bool = False) -> None:
    ids = torch.tensor([[5, 9, 4], [7, 3, 8]])
    engine.generate(
        base=base,
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        min_new_tokens=num_tokens,
        max_new_tokens=num_tokens,
        do_sample=False,
    )


def fetches(rank: int, world_size: int, configs: dict[str, Config]) -> dict[str, dict]:
    partition._SHARE_FOR_GENERATION = 0.0  # generations, too, layer by layer
    results: dict[str, dict] = {}
    for case, config in configs.items():
        mesh, engine = build(config)
        engine.keep_references(config, "none", 300)
        losses = []
        found: dict[str, Counter[Any]] = {phase: Counter() for phase in ("warm-up", *PHASES)}
        for step in range(STEPS):
            for phase in PHASES:
                fetched(engine).clear()
                with gathers_counted() as gathers:
                    if phase == "step":
                        stats = step_once(engine, mesh, config, data_step(case, step))
                        losses.append(stats.loss)
                    elif phase == "measured":
                        engine.drift(local_batches(config, mesh, 0)[0])
                    else:
                        ask(engine, 3 + step % 3, base=phase == "base asked")
                found[phase if step >= WARM_UP else "warm-up"] += fetched(engine) + gathers
        engine.close()
        results[case] = {"found": found, "losses": losses, "by itself": by_itself(case, config)}
    return results


def data_step(case: str, step: int) -> int:
    """Data is seen again: of the cache's steps some compute, the others read."""
    return step % 3 if case in ("cache", "replay") else step


def by_itself(case: str, config: Config) -> list[float]:
    """The losses with a call of the base before each of the policy, and no cache."""
    mesh, engine = build(config)

    def reference(batch: Batch) -> Reference:
        return Reference(batch=batch, hidden=of_base(engine._engine.module, batch))

    engine.reference = reference
    losses = [step_once(engine, mesh, config, data_step(case, step)).loss for step in range(STEPS)]
    engine.close()
    return losses


@pytest.fixture(scope="module")
def counted(tmp_path_factory, chosen) -> dict[str, dict]:
    folder = tmp_path_factory.mktemp("prefetch")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOORED_CACHE", str(folder / "cache"))
        configs = {
            name: recipe_config(
                folder,
                "parallel.zero_stage=3",
                "train.micro_batch_size=1",
                *(text.replace("FOLDER", str(folder)) for text in CASES[name]),
            )
            for name in chosen(CASES)
        }
        return run_distributed(fetches, 2, configs)[0]


@pytest.mark.parametrize("case", mostly_long(CASES, "every second step", "cache"))
def test_zero_3_fetches_ahead_in_every_kind_of_call(counted, case):
    found = counted[case]["found"]
    for phase in PHASES:
        num = found[phase].pop("gathers")
        asked = [count for key, count in found[phase].items() if key[1] != "held"]
        assert num == sum(asked), (phase, "no layer is sent for nothing")
        layers = {key: count for key, count in found[phase].items() if ".layers." in key[0]}
        assert {how for _, how in layers} == {"ahead"}, (phase, layers)
        assert sum(layers.values()) >= 8, phase
    assert counted[case]["losses"] == counted[case]["by itself"]
