"""Who may write to a run directory: one process, and no longer than it is the newest."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from moored.tracking.run_directory import RunDirectory, heartbeat, is_owned, locked
from moored.utils.errors import TakenOverError, UserError


@pytest.fixture(autouse=True)
def outside_of_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)


def left(run: Path, *, age: float = 0.0, **changes: object) -> Path:
    """A lock of somebody else."""
    run.mkdir(exist_ok=True)
    owner = {"host": "elsewhere", "pid": 77, "started": "1", "job": None, "restart": None}
    lock = run / "lock"
    lock.write_text(json.dumps(owner | changes))
    os.utime(lock, (time.time() - age, time.time() - age))
    return lock


def test_one_at_a_time(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with locked(run):
        assert is_owned(run)
        RunDirectory(run).require_owned()
        with pytest.raises(UserError, match=rf"in use by process {os.getpid()} on "), locked(run):
            pass
        assert (run / "lock").exists()
    assert not is_owned(run)
    assert not (run / "lock").exists()


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    says = "Not a directory: choose another output"
    with pytest.raises(UserError, match=says), locked(tmp_path / "file/runs/one"):
        pass


def test_a_dead_process_of_this_machine_owns_nothing(tmp_path: Path) -> None:
    left(tmp_path, host=os.uname().nodename)
    assert not is_owned(tmp_path)
    with locked(tmp_path):
        RunDirectory(tmp_path).require_owned()


def test_another_machine_is_believed_for_ten_minutes(tmp_path: Path) -> None:
    left(tmp_path, age=500)
    assert is_owned(tmp_path)
    with pytest.raises(UserError, match="in use by process 77 on elsewhere"), locked(tmp_path):
        pass
    left(tmp_path, age=700)
    with locked(tmp_path):
        RunDirectory(tmp_path).require_owned()


@pytest.mark.parametrize(("theirs", "mine", "free"), [(0, 1, True), (1, 1, False), (2, 1, False)])
def test_a_later_start_of_a_job_takes_over_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, theirs: int, mine: int, free: bool
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(mine))
    left(tmp_path, job="12", restart=theirs)
    if free:
        with locked(tmp_path):
            RunDirectory(tmp_path).require_owned()
    else:
        with pytest.raises(UserError, match="in use by job 12, process 77"), locked(tmp_path):
            pass


def test_who_was_replaced_writes_nothing_more(tmp_path: Path) -> None:
    with locked(tmp_path):
        directory = RunDirectory(tmp_path)
        heartbeat(directory)
        left(tmp_path, job="12", restart=1)
        with pytest.raises(TakenOverError, match="belongs to job 12, process 77 on elsewhere now"):
            heartbeat(directory)
    assert json.loads((tmp_path / "lock").read_text())["job"] == "12"  # it is not ours to remove


def test_a_lock_that_was_removed_is_no_ours(tmp_path: Path) -> None:
    with locked(tmp_path):
        (tmp_path / "lock").unlink()
        with pytest.raises(TakenOverError, match="belongs to nobody now"):
            RunDirectory(tmp_path).require_owned()
