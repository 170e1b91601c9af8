"""When a changed recipe may have a run directory: nothing of anybody's would be lost."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from moored.config import Config, load_config
from moored.tracking.run_directory import RunDirectory, locked, open_run
from moored.utils.errors import UserError

RECIPE = {
    "model": {"name_or_path": "some/model"},
    "data": {"train": [{"path": "train.jsonl"}]},
    "train": {"steps": 3, "global_batch_sequences": 4},
}


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., Config]:
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(RECIPE))
    return lambda *overrides: load_config(path, overrides)


@pytest.fixture
def run(tmp_path: Path, recipe: Callable[..., Config]) -> RunDirectory:
    """One that failed before its first step."""
    (tmp_path / "run").mkdir()
    run = open_run(recipe(), tmp_path / "run", restart=False)
    run.update_state(kind="run", status="failed", attempt=1)
    (run.path / "journal.jsonl").touch()
    (run.path / "logs").mkdir()
    (run.path / "logs/rank-0.out").write_text("of now")
    return run


def test_a_vacant_one_begins_anew(run: RunDirectory, recipe: Callable[..., Config]) -> None:
    open_run(recipe(), run.path, restart=False)  # the same recipe goes on
    assert run.state()["attempt"] == 1
    open_run(recipe("train.steps=4"), run.path, restart=False)
    assert {path.name for path in run.path.iterdir()} == {"config.yaml", "logs"}
    assert (run.path / "logs/rank-0.out").read_text() == "of now"
    assert load_config(run.config).train.steps == 4
    open_run(recipe("train.steps=5"), run.path, restart=False)  # killed before it said anything
    assert load_config(run.config).train.steps == 5


@pytest.mark.parametrize(
    "made",
    [
        "adapter/adapter_config.json",
        "checkpoints/step-00000001/manifest.json",
        "checkpoints/broken-step-00000001/manifest.json",
        "arms/a/adapter/adapter_config.json",
        "arms/a/checkpoints/step-00000001/manifest.json",
        "thesis.tex",
    ],
)
@pytest.mark.parametrize("kind", ["run", "comparison"])
def test_what_would_be_lost_is_kept(
    run: RunDirectory, recipe: Callable[..., Config], made: str, kind: str
) -> None:
    (run.path / made).parent.mkdir(parents=True, exist_ok=True)
    (run.path / made).touch()
    run.update_state(kind=kind)
    before = sorted(run.path.rglob("*"))
    with pytest.raises(UserError, match=r"another recipe \(it differs in train.steps\): choose"):
        open_run(recipe("train.steps=4"), run.path, restart=False, kind=kind)
    other, command = {"run": ("comparison", "train"), "comparison": ("run", "compare")}[kind]
    with pytest.raises(UserError, match=rf"is a {kind}: choose .* by `moored {command}`"):
        open_run(recipe(), run.path, restart=True, kind=other)
    assert sorted(run.path.rglob("*")) == before


def test_a_step_that_is_saved_or_a_folder_that_is_no_run_is_kept(
    run: RunDirectory, recipe: Callable[..., Config]
) -> None:
    run.update_state(step=1)
    with pytest.raises(UserError, match="holds a run of another recipe"):
        open_run(recipe("train.steps=4"), run.path, restart=False)
    run.state_file.unlink()
    (run.path / "report").mkdir()  # somebody's own, beside a recipe called config.yaml
    with pytest.raises(UserError, match="holds a run of another recipe"):
        open_run(recipe("train.steps=4"), run.path, restart=False)


def test_an_arm_that_somebody_works_on_is_kept(
    run: RunDirectory, recipe: Callable[..., Config]
) -> None:
    run.update_state(kind="comparison")
    kept = pytest.raises(UserError, match="holds a run of another recipe")
    with locked(run.path / "arms/a"), kept:
        open_run(recipe("train.steps=4"), run.path, restart=False, kind="comparison")
    open_run(recipe("train.steps=4"), run.path, restart=False, kind="comparison")
    assert not (run.path / "arms").exists()


def test_a_state_that_is_broken_can_be_started_over(
    run: RunDirectory, recipe: Callable[..., Config]
) -> None:
    run.state_file.write_text("{")
    with pytest.raises(UserError, match="is not valid JSON"):
        open_run(recipe("train.steps=4"), run.path, restart=False)
    open_run(recipe("train.steps=4"), run.path, restart=True)
    assert run.state() == {}


@pytest.mark.parametrize(("answer", "taken"), [("echo JobState=FAILED JobName=x", True)] + [
    (said, False) for said in ("echo JobState=PENDING JobName=x", "echo slow >&2; exit 1")
])  # fmt: skip
def test_one_that_waits_in_the_queue_is_kept(
    run: RunDirectory,
    recipe: Callable[..., Config],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    answer: str,
    taken: bool,
) -> None:
    """With a stand-in for a controller that fails; the real one is in tests/slurm."""
    for name in ("scontrol", "sbatch"):
        (tmp_path / name).write_text(f"#!/bin/sh\n{answer}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    run.slurm.mkdir()
    jobs = {"jobs": [{"stage": "train", "id": "7", "name": "x"}]}
    (run.slurm / "jobs.json").write_text(json.dumps(jobs))
    if not taken:
        with pytest.raises(UserError, match="holds a run of another recipe"):
            open_run(recipe("train.steps=4"), run.path, restart=False)
        return
    open_run(recipe("train.steps=4"), run.path, restart=False)
    assert (run.slurm / "jobs.json").exists()
