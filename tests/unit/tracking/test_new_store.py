"""A new SQLite store is whole or not there, whenever its maker is killed; half of one is named."""

from __future__ import annotations

import contextlib
import json
import shutil
import sqlite3
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from moored.slurm.status import describe
from moored.tracking import Tracker, sync_run
from moored.tracking.journal import CURSOR_NAME, Cursor
from moored.utils.errors import UserError
from trackkit import Place, eventually, train

MAKER = """
import sys
from pathlib import Path
from moored.tracking.mlflow_store import MlflowStore
MlflowStore(sys.argv[1], Path(sys.argv[2]))
"""
EARLIER = "534353b11cbc"  # a revision of MLflow's tables from before `evaluation_datasets`


def num_tables(path: Path) -> int:
    try:
        with contextlib.closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as database:
            return database.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    except sqlite3.Error:
        return 0


def has_begun(folder: Path, wanted: int) -> bool:
    """Whether a new store has so many tables and indices by now, under whatever name."""
    files = [path for path in folder.iterdir() if "mlflow.db" in path.name]
    return any(num_tables(path) >= wanted for path in files)


def break_off(store: Path, *, with_a_run: bool = False) -> None:
    """What a killed maker leaves: more tables than the revision that stands in them."""
    with contextlib.closing(sqlite3.connect(store)) as database, database:
        if with_a_run:
            database.execute("INSERT INTO runs (run_uuid, experiment_id) VALUES ('mine', 0)")
        database.execute("UPDATE alembic_version SET version_num = ?", (EARLIER,))
        [last] = database.execute(
            "SELECT name FROM sqlite_master WHERE type = 'table' AND name LIKE 'webhook%' LIMIT 1"
        ).fetchone()
        database.execute(f"DROP TABLE {last}")


def test_a_maker_that_is_killed_leaves_no_store(tmp_path: Path) -> None:
    """Of a store that was made in place, MLflow would not make the rest."""
    place = Place(tmp_path)
    folder = tmp_path / "runs"
    folder.mkdir()
    command = [sys.executable, "-c", MAKER, place.database, str(place.run_dir)]
    for wanted in (10, 50):
        maker = subprocess.Popen(command)
        eventually(partial(has_begun, folder, wanted))
        maker.kill()
        maker.wait()
        assert not (folder / "mlflow.db").exists()
    tracker = Tracker.start(place.config(system_metrics=False), place.run_dir, attempt=1)
    train(tracker, range(3))
    tracker.finish("FINISHED")
    assert [step for step, _ in place.history("train/loss")] == [0, 1, 2]
    left = {path.name for path in folder.iterdir()}
    assert left == {"mlflow.db", "mlflow.db.lock", "mlartifacts", "toy"}


def test_a_first_run_that_fails_early_does_not_break_the_next(tmp_path: Path) -> None:
    """Its shipper is ended while it makes the store."""
    place = Place(tmp_path)
    for name, seconds in (("first", 0.5), ("second", 600)):
        run_dir = tmp_path / "runs" / name
        tracker = Tracker.start(place.config(system_metrics=False), run_dir, attempt=1)
        if name == "first":
            eventually(partial(has_begun, tmp_path / "runs", 5))
        train(tracker, range(3))
        tracker.finish("FAILED", timeout=seconds)
    assert [run.info.run_name for run in place.runs()] == ["toy"]
    assert sync_run(tmp_path / "runs/first").complete
    assert len(place.runs()) == 2


def test_a_journal_that_a_removed_store_left_is_not_played_into_the_new_one(
    tmp_path: Path,
) -> None:
    place = Place(tmp_path)
    Tracker.start(place.config(mlflow=False), place.run_dir, attempt=1).finish("FINISHED")
    killed = tmp_path / "runs/mlflow.db"
    script = (
        "import os, sqlite3, sys; database = sqlite3.connect(sys.argv[1], isolation_level=None)\n"
        "for text in ('CREATE TABLE t (x)', 'PRAGMA cache_size = 1', 'BEGIN',\n"
        "             'INSERT INTO t SELECT zeroblob(4000) FROM pragma_function_list'):\n"
        "    database.execute(text)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    subprocess.run([sys.executable, "-c", script, str(killed)], check=False)
    stale = tmp_path / "runs/mlflow.db-journal"
    assert stale.stat().st_size > 512, "not a test"
    killed.unlink()
    assert sync_run(place.run_dir, place.database).complete
    assert not stale.exists()
    with contextlib.closing(sqlite3.connect(killed)) as database:
        assert not database.execute("SELECT 1 FROM sqlite_master WHERE name = 't'").fetchall()


@pytest.mark.parametrize("with_a_run", [False, True])
def test_half_a_store_is_named_in_one_line(
    place: Place, with_a_run: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """With a run in it, it is somebody's old one: removing it is not advised."""
    place.run_dir.mkdir()
    (place.run_dir / "config.yaml").touch()
    store = place.folder / "runs/mlflow.db"
    break_off(store, with_a_run=with_a_run)
    advice = "is half made, since who made its tables was killed: remove or rename mlflow.db"
    said = "evaluation_datasets already exists" if with_a_run else advice
    tracker = Tracker.start(place.config(system_metrics=False), place.run_dir, attempt=1)
    train(tracker, range(3))
    eventually(lambda: Cursor.load(place.run_dir, place.database).error)
    tracker.finish("FINISHED", timeout=5)
    [warning] = [m for m in caplog.messages if "MLflow does not have everything" in m]
    with pytest.raises(UserError) as caught:
        sync_run(place.run_dir)
    told = [warning, str(caught.value), [*describe(place.run_dir)][-1]]
    for text in told:
        assert said in text
        assert "\n" not in text
        assert "CREATE TABLE" not in text
    if with_a_run:
        assert "remove or rename" not in " ".join(told)
        return
    store.rename(store.with_name("old.db"))
    # Another process: this one has the old store open.
    command = [sys.executable, "-m", "moored", "sync", str(place.run_dir)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "(FINISHED), 6 points and 1 artifacts sent" in done.stdout


def test_a_long_error_that_an_older_version_kept_is_shown_as_a_line(place: Place) -> None:
    Tracker.start(place.config(mlflow=False), place.run_dir, attempt=1).finish("FINISHED")
    (place.run_dir / "config.yaml").touch()
    cursor = {"offset": 0, "run_id": None, "error": "OperationalError: no\n[SQL: \nCREATE TABLE x"}
    text = json.dumps({"targets": {place.database: cursor}})
    (place.run_dir / CURSOR_NAME).write_text(text)
    assert [*describe(place.run_dir)][-1].endswith("0 % shipped (OperationalError: no)")


def test_an_empty_file_is_no_store(place: Place, empty_store: Path) -> None:
    """What a maker leaves that was killed at once; a whole one is left as it is."""
    store = place.folder / "runs/mlflow.db"
    store.write_bytes(b"")
    Tracker.start(place.config(mlflow=False), place.run_dir, attempt=1).finish("FINISHED")
    assert sync_run(place.run_dir, place.database).complete
    shutil.copy(store, place.folder / "copy.db")
    assert sync_run(place.run_dir, place.database).num_points == 0
    assert len(place.runs()) == 1
