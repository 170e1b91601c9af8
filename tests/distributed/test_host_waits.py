"""The host waits for the device at no micro-batch: it only hands out work, until the update.

On a GPU every value that is read from the device, and every call of DeepSpeed's `synchronize`, lets
the device run dry. Both are seen on a CPU as well.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from distributed.runner import mostly_long, run_distributed
from distributed.test_zero import anchored_batches, build, recipe_config
from moored.config import Config, Regularizer
from moored.data import TrainStream, load_samples
from moored.data.batch import Batch
from moored.models.base_files import resolve_base
from moored.models.engine import Engine
from moored.models.zero import deepspeed
from moored.training.step import train_step

CASES: dict[Any, tuple[str, ...]] = {
    (stage, packing): (f"parallel.zero_stage={stage}", f"data.packing={packing}")
    for stage in range(4)
    for packing in ("false", "true")
}
# Where the regulariser looks: some targets, the first ones of an answer, all positions, other text;
# and whether what the base says is computed and kept, or read.
CASES |= {
    "token_fraction": ("regularizer.token_fraction=0.5",),
    "first_tokens": ("regularizer.first_tokens=2", "regularizer.first_tokens_factor=3"),
    "positions": ("regularizer.positions=all", "data.packing=true"),
    "positions, some": ("regularizer.positions=all", "regularizer.token_fraction=0.5"),
    "anchors": ("regularizer.anchors={path: FOLDER/fox.txt, window_tokens: 32}", "retention={}"),
    "cache": ("reference.cache=true", "reference.match=batch"),
    "entropy": ("regularizer.token_weighting=entropy",),
    "eaft": ("regularizer.kind=eaft",),
    "cache, positions": ("reference.cache=true", "regularizer.positions=all"),
}
READS = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "unique")
CPU_ONLY = "loss/softmax_pair.py"  # looks at values only where tensors are on a CPU


class Watch(TorchDispatchMode):
    """Where values were read from the device, while `on`."""

    def __init__(self) -> None:
        super().__init__()
        self.on, self.found = False, list[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(name in str(func) for name in READS):
            self.note(str(func))
        return func(*args, **(kwargs or {}))

    def note(self, what: str) -> None:
        frames = [f for f in traceback.extract_stack()[:-2] if "/torch/" not in f.filename]
        at = f"{frames[-1].filename}:{frames[-1].lineno}"
        if self.on and CPU_ONLY not in at:
            self.found.append(f"{what} at {at}")


@contextmanager
def watched(engine: Engine) -> Iterator[Watch]:
    """Watch forwards and backwards; the update itself asks whether its gradient is finite."""
    accelerator, update = deepspeed.accelerator.get_accelerator(), engine.step
    kind = type(accelerator)
    synchronize, cpu = kind.synchronize, torch.Tensor.cpu
    with Watch() as watch:

        def stepping(learning_rate: float) -> float:
            watch.on = False
            try:
                return update(learning_rate)
            finally:
                watch.on = True

        def synchronizing(self: Any, *args: Any) -> Any:
            watch.note("synchronize")
            return synchronize(self, *args)

        def copying(self: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
            if self.is_floating_point():  # token ids are on the CPU anyway
                watch.note("cpu")
            return cpu(self, *args, **options)

        engine.step, kind.synchronize, torch.Tensor.cpu = stepping, synchronizing, copying
        watch.on = True
        try:
            yield watch
        finally:
            watch.on, engine.step, kind.synchronize = False, update, synchronize
            torch.Tensor.cpu = cpu


def waits(rank: int, world_size: int, configs: dict[Any, Config]) -> dict[Any, dict]:
    results: dict[Any, dict] = {}
    for case, config in configs.items():
        mesh, engine = build(config)
        base = resolve_base(config.model, mesh)
        samples = load_samples(config.data.train, base.tokenizer, config.data, base.vocab_size)
        stream = TrainStream(config, base.tokenizer, samples)
        engine.keep_references(config, "none", base.vocab_size)
        found: dict[str, list[str]] = {}
        batches: list[Batch] = []
        for step in range(3):  # DeepSpeed's timer, if it is on, begins with the third
            batches = stream.next_step(dp_rank=0, dp_size=1)
            anchored = anchored_batches(config, mesh, step)
            for kind in ("filling", "tmkl", "none"):
                with watched(engine) as watch:
                    train_step(
                        engine,
                        batches,
                        mesh,
                        step=step,
                        regularizer=Regularizer(kind="none")
                        if kind == "none"
                        else config.regularizer,
                        learning_rate=1e-3,
                        seed=1,
                        anchored=anchored if kind != "none" else (),
                    )
                found[kind] = watch.found
        cache = engine.references
        results[case] = {
            "found": found,
            "num": len(batches),
            "packed": any(batch.sample_lengths is not None for batch in batches),
            "anchored": len(anchored_batches(config, mesh, 0)),
            "partial": any(0 < batch.num_kl < batch.num_targets for batch in batches),
            "prompt": any(batch.num_prompt for batch in batches),
            "cache": None if cache is None else (cache.num_read, cache.num_computed),
        }
        engine.close()
    return results


@pytest.fixture(scope="module")
def found(tmp_path_factory, chosen) -> dict[Any, dict]:
    folder = tmp_path_factory.mktemp("waits")
    common = ("train.gradient_checkpointing=non_reentrant", "train.global_batch_sequences=12")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOORED_CACHE", str(folder / "cache"))
        configs = {
            case: recipe_config(
                folder, *common, *(text.replace("FOLDER", str(folder)) for text in CASES[case])
            )
            for case in chosen(CASES)
        }
        return run_distributed(waits, 1, configs)[0]


SHORT = (2, "true"), (3, "false"), "positions, some", "anchors", "cache"


@pytest.mark.parametrize("case", mostly_long(CASES, *SHORT))
def test_no_micro_batch_lets_the_host_wait(found, case):
    one = found[case]
    assert one["num"] >= 2
    options = " ".join(CASES[case])
    assert one["packed"] is ("packing=true" in options)
    assert bool(one["anchored"]) is ("anchors" in options)
    assert one["partial"] is ("token_fraction" in options)
    assert one["prompt"] is ("positions=all" in options)
    if "cache=true" in options:
        read, computed = one["cache"]
        assert read >= one["num"]
        assert computed >= one["num"]
    assert one["found"] == {"filling": [], "tmkl": [], "none": []}
