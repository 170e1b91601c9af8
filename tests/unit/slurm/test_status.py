"""What jobs leave behind, read without SLURM: logs, successors; and what SLURM's commands say."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from forking import moored
from moored.cli.cluster import status as status_command
from moored.slurm import status
from moored.slurm.jobs import remembered
from moored.utils import scheduler
from moored.utils.errors import UserError
from tiny import tiny_recipe, write_recipe


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of two ranks whose job has ended."""
    for folder in ("slurm", "logs"):
        (tmp_path / folder).mkdir()
    (tmp_path / "slurm/job-7.log").write_text("one\ntwo\nthree\n")
    for rank in (0, 1):
        (tmp_path / f"logs/rank-{rank}.out").write_text(f"rank {rank}\nsays\n")
    keep_jobs(tmp_path)
    return tmp_path


def keep_jobs(run: Path, **facts: int) -> None:
    job = {"stage": "train", "id": "7", "name": "moored-x", "log": str(run / "slurm/job-7.log")}
    report = job | {"stage": "report", "id": "8"}
    text = json.dumps({"jobs": [job, report], "nodes": 2, "ranks": 1, **facts})
    (run / "slurm/jobs.json").write_text(text)


def shown(run: Path, *, rank: int = 0, lines: int = 20) -> str:
    out = io.StringIO()
    status.show_logs(run, out, rank=rank, lines=lines, follow=False)
    return out.getvalue()


def test_the_last_lines_of_job_and_rank(run: Path) -> None:
    text = shown(run, rank=1, lines=2)
    assert "one" not in text
    assert text.endswith("rank-1.out <==\nrank 1\nsays\n")
    assert text.count("==>") == 2
    assert "three\n" in text
    assert "three" not in shown(run, lines=0)


def test_a_rank_that_there_is_not(run: Path) -> None:
    with pytest.raises(UserError, match=r"has no rank 2: there are 0 to 1"):
        shown(run, rank=2)
    keep_jobs(run, nodes=3)  # submitted anew, and not started yet
    assert "three" in shown(run, rank=2)


def test_a_ranks_own_log_is_shown_without_debugging(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when what is followed is written piece by piece."""
    (tmp_path / "logs").mkdir()
    (tmp_path / "config.yaml").touch()
    log = tmp_path / "logs/rank-0.log"
    pieces = [
        "2026-01-02 03:04:05,678 INFO moored.training.train: one\n2026-01-02 03:04:05,679 DEB",
        "UG moored.cli: Traceback\n  File x\n",
        "NoError: it broke\n2026-01-02 03:04:05,680 ERROR moored.cli: it broke\nand mo",
        "re",
    ]
    log.touch()
    waits = iter(pieces)

    def write(_seconds: float) -> None:
        with log.open("a") as file:
            file.write(next(waits))

    monkeypatch.setattr(status.time, "sleep", write)
    monkeypatch.setattr(status, "_has_ended", lambda _run: log.read_text().endswith("more"))
    out = io.StringIO()
    status.show_logs(tmp_path, out, rank=0, lines=20, follow=True)
    wanted = [
        "2026-01-02 03:04:05,678 INFO moored.training.train: one",
        "2026-01-02 03:04:05,680 ERROR moored.cli: it broke",
        "and more",
    ]
    assert out.getvalue().splitlines()[1:] == wanted
    assert shown(tmp_path, lines=2).splitlines()[1:] == wanted[1:]


@pytest.mark.parametrize("command", ["train", "compare"])
def test_the_log_of_a_run_that_ended_by_an_error_ends_with_it(tmp_path: Path, command: str) -> None:
    recipe = write_recipe(tmp_path, tiny_recipe(tmp_path))
    done = moored(command, str(recipe), "data.train.0.path=nofile.jsonl", cwd=tmp_path)
    assert done.wait() == 2
    *_, line = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert "nofile.jsonl" in line
    assert done.stderr.count("nofile.jsonl") == 1
    run = tmp_path / "runs/tiny"
    text = shown(run)
    assert "Traceback" not in text
    assert text.splitlines()[-1].endswith(f" ERROR moored.cli: {line.removeprefix('error: ')}")
    assert "Traceback" in (run / "logs/rank-0.log").read_text()  # for who wants it


def test_successors_are_known(run: Path) -> None:
    assert [job["id"] for job in remembered(run)] == ["7", "8"]
    (run / "slurm/continued").write_text("9;cluster\n")
    assert [job["id"] for job in remembered(run)] == ["9", "8"]
    (run / "slurm/continued").write_text("")  # what a failed submission leaves
    assert [job["id"] for job in remembered(run)] == ["7", "8"]


def test_successors_of_arms_are_known(run: Path) -> None:
    for arm, job in (("a", "11"), ("b", "12")):
        (run / f"arms/{arm}/slurm").mkdir(parents=True)
        (run / f"arms/{arm}/slurm/continued").write_text(f"{job}\n")
    jobs = remembered(run)
    assert [(job["stage"], job["id"]) for job in jobs] == [
        ("train", "7"),
        ("report", "8"),
        ("train", "11"),
        ("train", "12"),
    ]
    assert {job["name"] for job in jobs} == {"moored-x"}


def test_a_run_that_cannot_be_read_does_not_hide_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "config.yaml").touch()
    (tmp_path / "runs/a/state.json").write_text("{")
    (tmp_path / "runs/b/state.json").write_text('{"status": "done", "step": 4, "num_steps": 4}')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"runs/a/state.json is not valid JSON"):
        status_command.callback(())  # pyright: ignore[reportOptionalCall]
    assert "runs/b" in capsys.readouterr().out


def test_an_arm_says_why_it_ended(run: Path) -> None:
    arm = run / "arms/b"
    (arm / "slurm").mkdir(parents=True)
    (arm / "slurm/ended").write_text("no node passed the checks; giving up\n")
    (run / "slurm/arms.json").write_text('{"arms": [{"name": "a"}, {"name": "b"}]}')
    (run / "slurm/job-7_0.log").write_text("of the other\n")
    (run / "slurm/job-7_1.log").write_text("of this one\n")
    assert "giving up" in list(status.describe(run))[-1]
    text = shown(arm)
    assert "of this one" in text
    assert "of the other" not in text


def test_all_that_slurm_complains_of_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sbatch = tmp_path / "sbatch"
    sbatch.write_text(
        "#!/bin/sh\necho 'sbatch: error: lua: name an account' >&2\n"
        "echo 'sbatch: error: Batch job submission failed: Unspecified error' >&2\nexit 1\n"
    )
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(UserError) as caught:
        scheduler.check("#!/bin/sh\n")
    assert str(caught.value) == (
        "SLURM would refuse this job: lua: name an account; "
        "Batch job submission failed: Unspecified error"
    )
    sbatch.write_text("#!/bin/sh\necho 'sbatch: fatal: no configuration source' >&2\nexit 1\n")
    with pytest.raises(UserError, match=r"does not answer here \(no configuration source\): try"):
        scheduler.check("#!/bin/sh\n")
