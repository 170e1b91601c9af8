"""`launch/`: real launchers and ranks, here and on two "machines" behind a stand-in for ssh."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from forking import finished, moored
from moored.tracking.journal import read_journal
from tiny import tiny_recipe, write_recipe

ROOT = Path(__file__).parents[2]
STEPS = 40
HOSTS = "127.0.0.1,127.0.0.2"  # two names that a rank can reach
SECRET = "canary-7c1f6a"

# As ssh: a host and a line for the shell there, a bare environment, and, where the user may, a host
# name of its own.
RSH = """#!/bin/sh
host=$1
shift
case $host in
nowhere*) echo "ssh: Could not resolve hostname $host: Name or service not known" >&2; exit 255 ;;
esac
line="$*"
set -- env -i PATH="$PATH" HOME="$HOME"
if [ "$(id -u)" = 0 ] && unshare --uts true 2>/dev/null; then
    exec "$@" unshare --uts sh -c 'hostname "$0"; exec sh -c "$1"' "box${host##*.}" "$line"
fi
exec "$@" sh -c "$line"
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("launch")
    recipe = tiny_recipe(folder)
    recipe["train"] |= {"steps": STEPS, "save_every": 10}
    recipe["retention"], recipe["data"]["eval"] = {}, []
    write_recipe(folder, recipe)
    (folder / "rsh").write_text(RSH)
    (folder / "rsh").chmod(0o755)
    return folder


@pytest.fixture(autouse=True)
def _nothing_left(place: Path) -> Iterator[None]:
    """Where a test fails, whatever it started goes with it."""
    yield
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.cwd() == str(place):
                process.kill()


def start(place: Path, launcher: str, *arguments: str, **variables: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "launch" / launcher)]
    if launcher == "multinode":
        command += ["--rsh", str(place / "rsh"), "--env", "PYTHONPATH", "--env", "OMP_NUM_THREADS"]
    return subprocess.Popen(
        [*command, *arguments],
        env=os.environ
        | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
        | variables,
        cwd=place,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # Started by `&` or nohup, pytest ignores Ctrl-C, and so would the launcher, as it should.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def finish(process: subprocess.Popen[str], code: int, seconds: float = 900.0) -> str:
    out, err = process.communicate(timeout=seconds)
    assert process.returncode == code, out + err
    return out + err


def run_dir(place: Path, name: str) -> Path:
    return place / "runs" / name


def state(place: Path, name: str) -> dict[str, Any]:
    return json.loads((run_dir(place, name) / "state.json").read_text())


def losses(path: Path) -> dict[int, float]:
    return {
        line["step"]: line["values"]["train/loss"]
        for line in read_journal(path / "journal.jsonl")
        if line["kind"] == "metrics" and "train/loss" in line["values"]
    }


def wait_for(what: Callable[[], Any], process: subprocess.Popen[str], seconds: float = 900) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return found


def ranks(run: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            line = process.cmdline()
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        if "train" in line and f"name={run}" in line and "moored" in line:
            found.append(process)
    return found


def at_step(place: Path, name: str, step: int) -> Callable[[], bool]:
    journal = run_dir(place, name) / "journal.jsonl"
    return lambda: journal.exists() and max(losses(journal.parent), default=0) >= step


def adapter(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "adapter/adapter_model.safetensors")


def assert_identical(found: Path, expected: Path) -> None:
    assert losses(found) == losses(expected)
    theirs = adapter(expected)
    assert any(tensor.abs().max() > 0 for tensor in theirs.values())
    for name, tensor in adapter(found).items():
        assert torch.equal(tensor, theirs[name]), name


@pytest.fixture(scope="module")
def whole(place: Path) -> Path:
    """Two ranks on this machine, undisturbed."""
    process = start(place, "local", "--ranks", "2", "tiny.yaml", "name=whole")
    assert finish(process, 0).splitlines()[0] == str(run_dir(place, "whole"))
    return run_dir(place, "whole")


def test_two_ranks_equal_one_process(place: Path, whole: Path) -> None:
    finished(moored("train", "tiny.yaml", "name=one", cwd=place))
    one = losses(run_dir(place, "one"))
    assert sorted(one) == list(range(1, STEPS + 1))
    assert losses(whole) == pytest.approx(one, rel=1e-5)
    logs = {path.name for path in (whole / "logs").iterdir()}
    assert logs == {"rank-0.log", "rank-0.out", "rank-1.log", "rank-1.out"}


@pytest.mark.long
def test_a_killed_rank_costs_nothing(place: Path, whole: Path) -> None:
    process = start(place, "local", "--ranks", "2", "tiny.yaml", "name=killed")
    wait_for(at_step(place, "killed", 13), process)
    victim = next(rank for rank in ranks("killed") if rank.environ()["RANK"] == "1")
    victim.kill()
    output = finish(process, 0)
    assert "rank 1 on this machine ended with signal 9" in output
    assert "step 10 is saved: starting again" in output
    assert_identical(run_dir(place, "killed"), whole)
    assert state(place, "killed")["attempt"] == 2


@pytest.mark.long
def test_a_signal_saves_and_ends(place: Path) -> None:
    """SIGTERM in the middle; then Ctrl-C while the ranks import their modules."""
    command = ("local", "--ranks", "2", "tiny.yaml", "name=signal", "train.steps=100000")
    process = start(place, *command)
    wait_for(at_step(place, "signal", 3), process)
    process.send_signal(signal.SIGTERM)
    output = finish(process, 75)
    assert "starting again" not in output
    first = state(place, "signal")
    assert (first["status"], first["exit_code"]) == ("preempted", 75)
    assert first["step"] >= 3
    assert ranks("signal") == []

    process = start(place, *command)
    wait_for(lambda: len(ranks("signal")) == 2, process)
    os.killpg(process.pid, signal.SIGINT)  # as the terminal sends it
    finish(process, 75)
    second = state(place, "signal")
    assert (second["status"], second["attempt"]) == ("preempted", 2)
    assert second["step"] > first["step"]
    assert ranks("signal") == []


@pytest.mark.long
def test_what_the_user_must_mend_is_not_tried_again(place: Path) -> None:
    process = start(place, "local", "tiny.yaml", "optim.learning_rat=1")
    assert "did you mean learning_rate?" in finish(process, 2)
    process = start(place, "local", "--min-free-gib", "1e9", "tiny.yaml", "name=full")
    assert "GiB free" in finish(process, 2)
    process = start(place, "local", "tiny.yaml", "name=wrong", "data.train.0.path=missing.jsonl")
    output = finish(process, 2)
    assert output.count("error: ") == 1
    assert "starting again" not in output
    assert "missing.jsonl" in state(place, "wrong")["reason"]
    assert state(place, "wrong")["attempt"] == 1


@pytest.mark.long
def test_starts_that_save_nothing_are_capped(place: Path) -> None:
    """A rank's death ends the first, its agent's the second, and takes all ranks along."""
    process = start(place, "local", "--attempts", "2", "--ranks", "2", "tiny.yaml", "name=capped")
    for victim in ("rank", "agent"):
        first = wait_for(lambda: ranks("capped"), process)[0]
        (first if victim == "rank" else first.parent()).kill()
        first.wait(900)
        wait_for(lambda: not ranks("capped"), process)
    output = finish(process, 1)
    assert output.count("starting again") == 1
    assert "2 starts in a row saved no new step: giving up" in output


@pytest.mark.long
def test_two_machines_equal_one(place: Path, whole: Path) -> None:
    arguments = ("--hosts", HOSTS, "--env", "HF_TOKEN", "tiny.yaml", "name=two")
    process = start(place, "multinode", *arguments, HF_TOKEN=SECRET, LEFT_HERE="1")
    both = wait_for(lambda: len(found := ranks("two")) == 2 and found, process)
    for rank in both:
        assert rank.environ()["HF_TOKEN"] == SECRET
        assert "LEFT_HERE" not in rank.environ()
    (key,) = {rank.environ()["MOORED_MEETING_SECRET"] for rank in both}
    for line in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            assert SECRET.encode() not in line.read_bytes()
            assert key.encode() not in line.read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue
    output = finish(process, 0)
    assert "ranks: 1 on 127.0.0.1, 1 on 127.0.0.2" in output
    assert_identical(run_dir(place, "two"), whole)
    for path in [*run_dir(place, "two").rglob("*"), place / "rsh"]:
        assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path
        assert not path.is_file() or key.encode() not in path.read_bytes(), path
    assert key not in output


@pytest.mark.long
def test_no_rank_outlives_its_launcher(place: Path) -> None:
    """Nor are the steps lost that it could still save."""
    arguments = ("--hosts", HOSTS, "tiny.yaml", "name=orphan", "train.steps=100000")
    process = start(place, "multinode", *arguments)
    wait_for(at_step(place, "orphan", 3), process)
    left = psutil.Process(process.pid).children(recursive=True)
    assert {rank.pid for rank in ranks("orphan")} < {one.pid for one in left}
    process.kill()
    process.communicate()
    _, alive = psutil.wait_procs(left, timeout=900)
    assert alive == []
    assert state(place, "orphan")["status"] == "preempted"


def test_a_bad_machine_is_named(place: Path) -> None:
    hostfile = place / "hosts"
    hostfile.write_text("127.0.0.1 slots=1\nnowhere slots=1  # gone\n")
    process = start(place, "multinode", "--hostfile", "hosts", "tiny.yaml", "name=bad")
    output = finish(process, 2)
    assert "error: nowhere: no connection: ssh: Could not resolve hostname nowhere" in output
    assert "error: 127.0.0.1" not in output
    assert not run_dir(place, "bad").exists()


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--hosts=-oProxyCommand=x"], "is no host"),
        (["--hosts", "a:0"], "is no host"),
        (["--hosts", "a,b,a:2"], "a is named twice"),
        (["--hosts", ","], "no host is named"),
        (["--hosts", "a", "--env", "A=secret"], "takes a NAME"),
        (["--hosts", "a", "--env", "NOT_SET_HERE"], "it is not set here"),
        (["--hosts", "a", "--ranks-per-host", "x"], "'x' is no whole number from 1, such as 2"),
        (["--hosts", "a", "--rsh", "ssh 'a"], "is no command, such as 'ssh -p 2222'"),
        (["--hostfile", "missing"], "--hostfile missing: No such file or directory: name a file"),
        (["--hostfile", "model"], "--hostfile model: Is a directory: name a file with lines such"),
        (["--hostfile", "model/model.safetensors"], "it is no text: name a file with lines such"),
        ([], "--hosts --hostfile is required"),
    ],
)
def test_what_multinode_refuses(place: Path, options: list[str], complaint: str) -> None:
    [line] = finish(start(place, "multinode", *options, "tiny.yaml"), 2).splitlines()
    assert line.startswith("error: ")
    assert complaint in line


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "arguments are required: RECIPE (see `launch/local --help`)"),
        (["--ranks", "0", "tiny.yaml"], "--ranks: '0' is no whole number from 1, such as 2"),
        (["--attempts", "x", "tiny.yaml"], "--attempts: 'x' is no whole number from 1, such as 2"),
        (["--min-free-gib", "x", "tiny.yaml"], "'x' is no number from 0, such as 1.5"),
        (["--restart", "tiny.yaml"], "unrecognized arguments: --restart"),
    ],
)
def test_what_local_refuses(place: Path, arguments: list[str], complaint: str) -> None:
    [line] = finish(start(place, "local", *arguments), 2).splitlines()
    assert line.startswith("error: ")
    assert complaint in line


@pytest.mark.long
def test_deepspeeds_launcher_ends_with_the_code_of_the_run(place: Path) -> None:
    done = subprocess.run(
        [
            *(str(ROOT / "launch/deepspeed"), "--num_gpus=1", "--master_addr=127.0.0.1", "--"),
            *("tiny.yaml", "name=ds", "data.train.0.path=missing.jsonl"),
        ],
        env=os.environ
        | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"},
        cwd=place,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert "missing.jsonl" in state(place, "ds")["reason"]
