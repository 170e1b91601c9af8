"""Whose a run directory is: of a mended recipe while nothing is trained, of one kind ever after."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distributed.test_run import in_one_process, recipe_of, report, state
from moored.config import Config
from moored.data import TrainStream
from moored.evaluation import evaluate_command
from moored.export import run_command as export
from moored.slurm.status import describe
from moored.tracking import sync_run
from moored.tracking.journal import is_start, read_journal
from moored.tracking.mlflow_store import MlflowStore
from moored.training import compare, train
from moored.utils.errors import UserError


def starts(run: Path) -> list[dict[str, Any]]:
    return [line for line in read_journal(run / "journal.jsonl") if is_start(line)]


def wrong(folder: Path, *overrides: str, **sections: Any) -> Config:
    missing = f"data.train.0.path={folder / 'nofile.jsonl'}"
    return recipe_of(folder, missing, *overrides, **sections)


# -- a recipe that was mended --------------------------------------------------------------------


def mending(folder: Path) -> None:
    tracked = {"mlflow": True, "system_metrics": False}
    with pytest.raises(UserError, match=r"nofile\.jsonl"):
        train.run(wrong(folder, track=tracked))
    run = folder / "runs/tiny"
    assert (state(run)["status"], state(run)["exit_code"]) == ("failed", 2)
    [first] = starts(run)
    with pytest.raises(UserError, match="no such file or folder"):
        train.run(recipe_of(folder, f"model.name_or_path={folder}/nomodel", track=tracked))
    said = (run / "logs/rank-0.log").read_text()
    (run / "logs/system").mkdir()
    (run / "logs/system/there.attempt-1.jsonl").touch()
    config = recipe_of(folder, track=tracked)
    assert train.run(config) == run
    assert (state(run)["status"], state(run)["attempt"]) == ("done", 1)
    assert (run / "logs/rank-0.log").read_text().startswith(said)  # a launcher's are there, too
    assert not (run / "logs/system").exists()
    [last] = starts(run)
    assert last["fields"]["uid"] != first["fields"]["uid"]
    # The failed ones have runs of their own in MLflow, if they arrived there: no parameters mix.
    client = MlflowStore(f"sqlite:///{folder}/runs/mlflow.db", run)._client
    [experiment] = client.search_experiments(filter_string="name = 'moored'")
    found = {r.data.tags["moored.uid"]: r for r in client.search_runs([experiment.experiment_id])}
    one = found[last["fields"]["uid"]]
    assert one.info.status == "FINISHED"
    assert one.data.params["data.train.0.path"] == str(folder / "train.jsonl")
    assert all(run.info.status != "FINISHED" for run in found.values() if run is not one)

    # Once something is trained, another recipe has to say so.
    before = (run / "journal.jsonl").read_bytes()
    for key in ("optim.learning_rate=0.1", f"data.train.0.path={folder}/nofile.jsonl"):
        with pytest.raises(UserError, match=r"holds a run of another recipe.*--restart"):
            train.run(recipe_of(folder, key, track=tracked))
    (run / "state.json").unlink()
    with pytest.raises(UserError, match="holds a run of another recipe"):
        train.run(recipe_of(folder, "optim.learning_rate=0.1", track=tracked))
    assert (run / "journal.jsonl").read_bytes() == before


def test_a_run_takes_over_where_nothing_was_trained(tmp_path: Path, empty_store: Path) -> None:
    (tmp_path / "runs").mkdir()
    shutil.copy(empty_store, tmp_path / "runs/mlflow.db")
    in_one_process(mending, tmp_path)


def cut(config: Config, step: int, run: Callable[[Config], Path]) -> None:
    """Interrupt a run before a step."""
    seen = TrainStream.next_step

    def cutting(self: Any, **place: int) -> Any:
        if self.step == step:
            raise KeyboardInterrupt
        return seen(self, **place)

    TrainStream.next_step = cutting
    with pytest.raises(KeyboardInterrupt):
        run(config)
    TrainStream.next_step = seen


def mending_a_comparison(folder: Path) -> None:
    with pytest.raises(UserError, match=r"nofile\.jsonl"):
        compare.run(wrong(folder))
    run = folder / "runs/tiny"
    assert [path.name for path in (run / "arms").iterdir()] == ["none"]
    cut(recipe_of(folder), 0, compare.run)
    assert (run / "arms/none/state.json").exists()

    # Saved once, in an arm: it belongs to this recipe, whatever its own directory holds.
    cut(recipe_of(folder, "optim.learning_rate=0.1", train={"save_every": 1}), 2, compare.run)
    assert state(run / "arms/none")["step"] > 0
    with pytest.raises(UserError, match=r"another recipe \(it differs in optim\.learning_rate"):
        compare.run(recipe_of(folder))
    compare.run(recipe_of(folder, "optim.learning_rate=0.1", train={"save_every": 1}))
    assert list(report(run)["arms"]) == ["none", "tmkl"]
    assert [state(run / "arms/none")[k] for k in ("status", "attempt")] == ["done", 2]


def test_a_comparison_takes_over_where_no_arm_was_trained(tmp_path: Path) -> None:
    in_one_process(mending_a_comparison, tmp_path)


# -- a run, or a comparison ----------------------------------------------------------------------


def files_of(run: Path) -> dict[Path, tuple[int, int]]:
    found = [path for path in run.rglob("*") if path.is_file()]
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in found}


def kinds(folder: Path) -> None:
    config, both = recipe_of(folder), recipe_of(folder, "name=both")
    run, comparison = train.run(config), compare.run(both)
    assert (state(run)["kind"], state(comparison)["kind"]) == ("run", "comparison")
    assert state(comparison / "arms/none")["kind"] == "run"
    for version in ("this", "one that kept no kind"):
        before = files_of(folder / "runs")
        for restart in (False, True):
            with pytest.raises(UserError) as caught:
                compare.run(config, restart=restart)
            assert str(caught.value) == (
                f"{run} is a run: choose another name=..., or go on with it by `moored train`"
            )
            with pytest.raises(UserError) as caught:
                train.run(both, restart=restart)
            assert str(caught.value) == (
                f"{comparison} is a comparison: choose another name=..., or go on with it by "
                "`moored compare`"
            )
        assert files_of(folder / "runs") == before, version
        for path in (run, comparison):
            text = json.dumps({k: v for k, v in state(path).items() if k != "kind"})
            (path / "state.json").write_text(text)

    # Each goes on as what it is, and the other commands know both.
    assert train.run(config) == run
    assert compare.run(both) == comparison
    assert any(line.startswith("arm       tmkl") for line in describe(comparison))
    assert any("done" in line for line in describe(run))
    for path in (run, comparison / "arms/tmkl"):
        evaluate_command.run_command([str(path)], out=folder / "again" / path.name)
        export(path, folder / "exported" / path.name)
        assert (folder / "exported" / path.name / "adapter_config.json").exists()
    with pytest.raises(UserError, match="is a comparison: name one of its arms"):
        export(comparison, folder / "exported/both")
    store = f"sqlite:///{folder}/store.db"
    for path in (run, comparison, comparison / "arms/none"):
        assert sync_run(path, store).complete

    # Where nothing was trained, either may begin.
    for first, second in ((train, compare), (compare, train)):
        name = f"name=first-{first.__name__}"
        with pytest.raises(UserError, match=r"nofile\.jsonl"):
            first.run(wrong(folder, name))
        path = second.run(recipe_of(folder, name))
        assert state(path)["status"] == "done"
        assert (path / "arms").exists() == (second is compare)


@pytest.mark.long
def test_a_run_and_a_comparison_do_not_share_a_directory(tmp_path: Path, empty_store: Path) -> None:
    shutil.copy(empty_store, tmp_path / "store.db")
    in_one_process(kinds, tmp_path)
