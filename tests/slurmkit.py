"""A real SLURM for tests: the mini cluster of `slurm/`, and what a user does on it."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from forking import moored
from moored.tracking.journal import metrics, read_journal

ROOT = Path(__file__).parents[1]
MOORED = [sys.executable, "-m", "moored"]
STEPS, SAVED = 80, 10  # of the recipe: how long it takes, and between two checkpoints
SECONDS = 900.0  # after which a test gives up: never the reason on a slow machine


def minicluster() -> Any:
    """The module `slurm/minicluster.py`, which belongs to no package."""
    spec = importlib.util.spec_from_file_location("minicluster", ROOT / "slurm/minicluster.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["minicluster"] = module
    spec.loader.exec_module(module)
    return module


def until(condition: Callable[[], Any], what: Callable[[], str], every: float = 0.2) -> Any:
    """The first true result; what was awaited is named when it does not come."""
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        if result := condition():
            return result
        time.sleep(every)
    raise AssertionError(f"not within {SECONDS:.0f} s: {what()}")


class Desk:
    """A user's place on a cluster: a shell with SLURM_CONF, and a recipe."""

    def __init__(self, cluster: Any, recipe: Path):
        self.cluster, self.recipe = cluster, recipe
        self.environment = os.environ | {
            "SLURM_CONF": str(cluster.conf),
            "PYTHONPATH": str(ROOT / "src"),
        }

    def sh(self, *command: str, **variables: str) -> str:
        done = subprocess.run(
            command,
            env=self.environment | variables,
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def moored(self, *arguments: str, code: int = 0, **variables: str) -> str:
        process = moored(*arguments, cwd=self.recipe.parent, **self.environment | variables)
        out, err = process.communicate(SECONDS)
        assert process.returncode == code, f"{arguments}: {process.returncode}: {out}{err}"
        return out + err

    def submit(
        self, name: str, *overrides: str, nodes: int = 2, sets: tuple[str, ...] = (), **more: Any
    ) -> Job:
        """`moored submit` on the minicluster's profile, without preflight unless asked for."""
        options = [f"--nodes={nodes}", "--site=minicluster"]
        given = {text.partition("=")[0] for text in sets}
        if "slurm.preflight" not in given:
            sets = (*sets, "slurm.preflight=false")
        options += [f"--set={text}" for text in sets]
        said = self.moored("submit", str(self.recipe), f"name={name}", *overrides, *options, **more)
        found = re.search(r"^run +(.+)$", said, re.M)
        assert found, said
        return Job(self, Path(found[1]), re.findall(r"^job (\d+)", said, re.M))


def facts(desk: Desk, job: str) -> str:
    """What SLURM knows of a job."""
    return desk.sh("scontrol", "--oneliner", "show", "job", job)


class Job:
    """A submitted run."""

    def __init__(self, desk: Desk, run: Path, ids: list[str]):
        self.desk, self.run, self.ids = desk, run, ids

    def state(self) -> dict[str, Any]:
        try:
            return json.loads((self.run / "state.json").read_text())
        except (OSError, ValueError):
            return {}

    def log(self) -> str:
        """What the jobs' scripts said, the oldest first."""
        logs = sorted((self.run / "slurm").glob("*.log"), key=lambda path: path.stat().st_ctime)
        return "\n".join(path.read_text(errors="replace") for path in logs)

    def words(self) -> str:
        """Everything that may say why, for a failing test."""
        ranks = sorted((self.run / "logs").glob("rank-*.out"))
        tails = [f"{p.name}: {p.read_text(errors='replace')[-1500:]}" for p in ranks]
        queue = self.desk.sh("squeue", "--noheader", "-o", "%i %T %r %N")
        return "\n".join([json.dumps(self.state()), queue, self.log()[-3000:], *tails])

    def is_at(self, step: int) -> bool:
        """Whether so many steps are saved."""
        return self.state().get("step", 0) >= step

    def at_step(self, step: int) -> None:
        """Wait until so many steps are saved."""
        until(lambda: self.is_at(step), lambda: f"step {step}; {self.words()}", every=0.02)

    def slurm_states(self, job: str | None = None) -> set[str]:
        out = subprocess.run(
            ["scontrol", "--oneliner", "show", "job", job or self.ids[0]],
            env=self.desk.environment,
            capture_output=True,
            text=True,
            check=False,
        ).stdout
        return set(re.findall(r"JobState=([A-Z_]+)", out))

    def ended(self) -> None:
        """Wait until SLURM is through with all of its jobs."""
        over = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED"}

        def all_over() -> bool:
            return all((states := self.slurm_states(job)) and states <= over for job in self.ids)

        until(all_over, lambda: f"the end of {self.ids}; {self.words()}")

    def done(self) -> Job:
        """Wait until the run is trained, and SLURM agrees."""
        until(lambda: self.state().get("status") == "done", self.words)
        self.ended()
        assert self.slurm_states(self.ids[-1]) == {"COMPLETED"}, self.words()
        return self

    def tasks(self) -> dict[int, int]:
        """The running trainers: rank -> pid."""
        found: dict[int, int] = {}
        for pid in filter(str.isdigit, os.listdir("/proc")):
            try:
                command = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
                environment = Path(f"/proc/{pid}/environ").read_text().split("\0")
            except (OSError, UnicodeDecodeError):
                continue
            if "train" in command and str(self.run) in command and "python" in command[0]:
                rank = next((e for e in environment if e.startswith("SLURM_PROCID=")), None)
                if rank is not None and "srun" not in command[0]:
                    found[int(rank.partition("=")[2])] = int(pid)
        return found

    def kill(self, rank: int) -> None:
        os.kill(self.tasks()[rank], signal.SIGKILL)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """The trainers stand still, so that time passes and they get nowhere."""
        pids = self.tasks().values()
        assert pids, f"nobody is at work: {self.words()}"
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)

    @contextlib.contextmanager
    def held_at(self, step: int) -> Iterator[None]:
        """The trainers stand still once a step is saved: what befalls a job finds it at work."""
        self.at_step(step)
        with self.held():
            yield

    def adapter(self) -> dict[str, torch.Tensor]:
        return load_file(self.run / "adapter/adapter_model.safetensors")

    def losses(self) -> list[tuple[int, float]]:
        return metrics(self.run)["train/loss"]

    def num_attempts(self) -> int:
        starts = [r for r in read_journal(self.run / "journal.jsonl") if r.get("event") == "start"]
        return len(starts)
