"""Runs with the reference cache are the runs without it, on every mesh; and it saves forwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from distributed.runner import mostly_long, run_distributed
from moored.config import Config, load_config
from moored.distributed.mesh import alone
from moored.evaluation.report import Report
from moored.models.base_files import resolve_base
from moored.models.reference_cache import references_folder
from moored.prepare import references
from moored.tracking.journal import metrics, read_journal
from moored.training import compare, train
from moored.utils.errors import UserError
from tiny import tiny_recipe, write_recipe


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Children inherit it."""
    monkeypatch.setenv("MOORED_CACHE", str(tmp_path / "cache"))


def recipe_of(folder: Path, *overrides: str) -> Config:
    """Two epochs of packed rows."""
    recipe = tiny_recipe(folder)
    recipe["data"]["packing"] = True
    recipe["train"] |= {"steps": None, "epochs": 2, "save_every": 2}
    del recipe["train"]["steps"]
    recipe["train"]["epochs"] = 2
    recipe["adapter"]["dropout"] = 0.1
    return load_config(write_recipe(folder, recipe), list(overrides))


LOSSES = {"train/loss", "train/tmkl_nats_per_token", "train/kl_nats_per_token", "train/grad_norm"}


def of(run: Path) -> dict[str, Any]:
    """What a run came to."""
    journal = read_journal(run / "journal.jsonl")
    said = [line["fields"] for line in journal if line.get("event") == "reference_cache"]
    (arm,) = Report.read(run / "report/report.json").arms.values()
    logged = metrics(run)
    losses = [logged[name] for name in sorted(logged) if name in LOSSES]
    return {
        "losses": losses,
        "said": said,
        "ppl": arm.retention_ppl,
        "kl": arm.drift_nats_per_token,
    }


def assert_same(one: Path, other: Path) -> None:
    mine, theirs = (load_file(run / "adapter/adapter_model.safetensors") for run in (one, other))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert any(tensor.abs().max() > 0 for tensor in mine.values())
    for key in ("losses", "ppl", "kl"):
        assert of(one)[key] == of(other)[key], key


TP = ("parallel.tensor_parallel_degree=2", "model.quantization=none")
# By who meets: one start of the processes for all that they can do.
MESHES: dict[str, tuple[int, dict[str, tuple[str, ...]]]] = {
    "one": (1, {"alone": ()}),
    "dp": (
        2,
        {
            "zero-2": ("parallel.zero_stage=2",),
            "zero-3": ("parallel.zero_stage=3", "model.dtype=bfloat16"),
        },
    ),
    "tp": (2, {"tp": (*TP, "parallel.sequence_parallel=false"), "tp-sp": TP}),
}


def train_all(_rank: int, _world_size: int, configs: dict[str, Config], folder: Path) -> None:
    for name, config in configs.items():
        train.run(config, path=folder / name, parent=folder)


@pytest.mark.parametrize("ranks", mostly_long(MESHES, "one"))
def test_a_run_with_the_cache_is_the_run_without_it(tmp_path: Path, ranks: str) -> None:
    size, meshes = MESHES[ranks]
    cache = ("reference.cache=true",)
    runs = {
        "without": (),
        "filling": cache,
        "filled": cache,
        "another-weight": (*cache, "regularizer.weight=0.2"),
    }
    configs = {
        f"{mesh}/{name}": recipe_of(tmp_path, *overrides, *options)
        for mesh, overrides in meshes.items()
        for name, options in runs.items()
    }
    run_distributed(train_all, size, configs, tmp_path)
    for mesh in meshes:
        place = tmp_path / mesh
        assert_same(place / "filling", place / "without")
        assert_same(place / "filled", place / "without")
        said = {name: of(place / name)["said"] for name in runs}
        assert said["without"] == []
        ((filling,), (filled,)) = said["filling"], said["filled"]
        assert filling["read"] == 0
        assert filled == {"read": filling["computed"], "computed": 0}
        assert said["another-weight"] == [filled], "a sweep shares it"
        assert of(place / "another-weight")["losses"] != of(place / "filled")["losses"]


@pytest.mark.long
def test_samples_serve_in_the_next_epoch_and_on_another_mesh(tmp_path: Path) -> None:
    plain = ("data.packing=false", "adapter.dropout=0")
    on = (*plain, "reference.cache=true", "reference.match=sample")
    configs = {"without": recipe_of(tmp_path, *plain), "alone": recipe_of(tmp_path, *on)}
    run_distributed(train_all, 1, configs, tmp_path)
    spread = recipe_of(tmp_path, *on, "parallel.zero_stage=3")
    run_distributed(train_all, 2, {"spread": spread}, tmp_path)
    found = {name: of(tmp_path / name) for name in ("without", "alone", "spread")}
    # Two epochs of 24 samples in micro-batches of two; the rest are the texts that are measured.
    (said,) = found["alone"]["said"]
    assert said["read"] == 12
    assert said["computed"] > 12
    assert found["spread"]["said"][0]["computed"] == 0
    for name in ("alone", "spread"):
        for mine, theirs in zip(found[name]["losses"], found["without"]["losses"], strict=True):
            for (step, value), (_, expected) in zip(mine, theirs, strict=True):
                assert value == pytest.approx(expected, rel=1e-4, abs=1e-6), (name, step)


def fill(_rank: int, _world_size: int, config: Config, num_ranks: int) -> int:
    # As `moored prepare --references` does, without its fetching and proving.
    return references.fill(
        config, resolve_base(config.model, alone()), num_ranks=num_ranks
    ).num_computed


@pytest.mark.long
def test_what_was_prepared_is_what_a_run_computes(tmp_path: Path) -> None:
    plain = ("parallel.zero_stage=3", "retention={}", "data.eval=[]")
    config = recipe_of(tmp_path, *plain, "reference.cache=true")
    (first,) = run_distributed(fill, 1, config, 2)
    (second,) = run_distributed(fill, 1, config, 2)
    assert (first > 0, second) == (True, 0)
    runs = {"prepared": config, "without": recipe_of(tmp_path, *plain)}
    run_distributed(train_all, 2, runs, tmp_path)
    assert_same(tmp_path / "prepared", tmp_path / "without")
    (said,) = of(tmp_path / "prepared")["said"]
    assert (said["read"] > 0, said["computed"]) == (True, 0)


def test_what_cannot_be_prepared_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="keeps no hidden states"):
        references.require_fillable(recipe_of(tmp_path))
    spread = recipe_of(tmp_path, "reference.cache=true", "parallel.tensor_parallel_degree=2")
    with pytest.raises(UserError, match="leave it to the first run"):
        references.require_fillable(spread)


@pytest.mark.long
def test_a_damaged_file_stops_no_rank(tmp_path: Path) -> None:
    """Under ZeRO-3 all ranks must run the base, if one of them has to."""
    on = ("parallel.zero_stage=3", "reference.cache=true")
    run_distributed(train_all, 2, {"first": recipe_of(tmp_path, *on)}, tmp_path)
    files = sorted(references_folder().glob("*/*.safetensors"))
    assert len(files) >= 2
    data = bytearray(files[0].read_bytes())
    data[-3] ^= 4
    files[0].write_bytes(data)
    run_distributed(train_all, 2, {"again": recipe_of(tmp_path, *on)}, tmp_path)
    assert_same(tmp_path / "again", tmp_path / "first")
    (said,) = of(tmp_path / "again")["said"]
    assert said["read"] > 0
    assert said["computed"] > 0
    assert files[0].with_suffix(".broken").exists()


def compare_all(_rank: int, _world_size: int, config: Config) -> str:
    return str(compare.run(config))


def test_the_arms_of_a_comparison_share_it(tmp_path: Path) -> None:
    arms = "compare=[{kind: tmkl}, {kind: kl}, {kind: none}]"
    config = recipe_of(tmp_path, "reference.cache=true", arms)
    (path,) = run_distributed(compare_all, 1, config)
    first, *others = [of(Path(path) / "arms" / name)["said"][0] for name in ("tmkl", "kl", "none")]
    assert first["read"] == 0
    assert all(said["computed"] == 0 and said["read"] > 0 for said in others)
