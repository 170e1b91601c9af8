"""ZeRO-3 fetches ahead in every kind of call, whatever was called in between.

DeepSpeed fetches ahead only while its trace of the modules that were called holds: so each module's
fetch is counted by the state of the trace in which it is made.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from distributed.runner import mostly_long, run_distributed
from distributed.test_zero import build, local_batches, recipe_config, step_once
from moored.config import Config
from moored.data.batch import Batch
from moored.models.engine import Engine
from moored.models.reference import Reference, of_base
from moored.models.zero import deepspeed

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


@contextmanager
def fetches_counted() -> Iterator[dict[str, Counter[str]]]:
    """By what was going on (set it as `now` of what is yielded) and by the state of the trace."""
    kind = deepspeed.runtime.zero.partitioned_param_coordinator.PartitionedParameterCoordinator
    fetch, forget = kind.fetch_sub_module, kind._invalidate_trace
    found: dict[str, Counter[str]] = {phase: Counter() for phase in ("warm-up", *PHASES)}
    found["now"] = found["warm-up"]

    def counted(self: Any, *args: Any, **options: Any) -> Any:
        found["now"]["ahead" if self.is_complete_trace() else "late"] += 1
        return fetch(self, *args, **options)

    def forgotten(self: Any) -> Any:
        found["now"]["forgotten"] += 1
        return forget(self)

    kind.fetch_sub_module, kind._invalidate_trace = counted, forgotten
    try:
        yield found
    finally:
        kind.fetch_sub_module, kind._invalidate_trace = fetch, forget


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
    results: dict[str, dict] = {}
    for case, config in configs.items():
        mesh, engine = build(config)
        engine.keep_references(config, "none", 300)
        losses = []
        with fetches_counted() as found:
            for step in range(STEPS):
                for phase in PHASES:
                    found["now"] = found[phase if step >= WARM_UP else "warm-up"]
                    if phase == "step":
                        stats = step_once(engine, mesh, config, data_step(case, step))
                        losses.append(stats.loss)
                    elif phase == "measured":
                        engine.drift(local_batches(config, mesh, 0)[0])
                    else:
                        ask(engine, 3 + step % 3, base=phase == "base asked")
        del found["now"]
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
        assert found[phase]["ahead"] > 50, phase
        assert not found[phase]["forgotten"], (phase, found[phase])
        assert found[phase]["late"] == 0, (phase, found[phase])
    assert counted[case]["losses"] == counted[case]["by itself"]
