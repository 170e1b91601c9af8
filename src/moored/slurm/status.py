"""`moored status`, `logs` and `cancel`: how runs are, from their files and, where it is, SLURM.

A status works without SLURM and without the job: everything is read from the run directory.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, TextIO

from moored.slurm.jobs import remembered, submitted_ranks
from moored.tracking.journal import CURSOR_NAME, JOURNAL_NAME, Fence, Follower
from moored.tracking.run_directory import RunDirectory, is_owned
from moored.tracking.store import first_line
from moored.utils import scheduler
from moored.utils.errors import UserError

POLL_SECONDS = 0.5
_RECORD = re.compile(r"\d{4}-\d\d-\d\d [\d:,]{12} ([A-Z]+) ")  # how `log.py` begins one


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """How a run is.

    Attributes:
        run: its directory.
        state: `state.json`.
        jobs: stage, id and SLURM's word for each job; "gone" for one that it has forgotten.
        values: the newest value of each metric.
        step: the newest that was reported; the one in `state` is saved.
        starts: how often it was started.
        alive: whether somebody works on it.
    """

    run: Path
    state: Mapping[str, Any]
    jobs: tuple[tuple[str, str, str], ...]
    values: Mapping[str, float]
    step: int
    starts: int
    alive: bool

    @property
    def status(self) -> str:
        """The run's own word, or what it has not said yet."""
        said = self.state.get("status")
        if said in ("running", None) and not self.alive:
            waits = any(word in scheduler.WAITING for _, _, word in self.jobs)
            return "waiting" if waits else "lost" if said else "not started"
        if said is None:
            return "starting"
        waits = any(stage == "train" and w in scheduler.WAITING for stage, _, w in self.jobs)
        return "waiting to go on" if said == "preempted" and waits else str(said)

    @property
    def seconds_left(self) -> float | None:
        """Seconds to the last step, at the pace of the last ones; None where nothing is known."""
        total, pace = self.state.get("num_steps"), self.values.get("perf/step_seconds")
        if not total or not pace or self.status != "running":
            return None
        return max(0.0, (int(total) - self.step) * pace)


def standing(run: Path) -> Standing:
    """Look at a run.

    Raises:
        UserError: it is no run directory.
    """
    directory = RunDirectory(run)
    if not directory.config.exists() and not directory.slurm.is_dir():
        raise UserError(f"{run} is not a run directory: name one, such as runs/NAME")
    values: dict[str, float] = {}
    step = starts = 0
    for record in _records(run):
        if record["kind"] == "metrics":
            values |= record["values"]
            step = record["step"]
        elif record["kind"] == "event" and record["event"] == "start":
            starts += 1
    state = directory.state()
    jobs = tuple((j["stage"], j["id"], _word(j["id"], j["name"])) for j in remembered(run))
    at_work = any(stage == "train" and "RUNNING" in word for stage, _, word in jobs)
    return Standing(
        run=run,
        state=state,
        jobs=jobs,
        values=values,
        step=max(step, int(state.get("step") or 0)),
        starts=starts,
        alive=at_work or is_owned(run),
    )


def _records(run: Path) -> Iterator[dict[str, Any]]:
    follower, fence = Follower(run / JOURNAL_NAME), Fence()
    while lines := follower.read():
        for line in lines:
            if fence.admits(line.record):
                yield line.record


def _word(job: str, name: str) -> str:
    if not scheduler.is_here():
        return "unknown here"
    try:
        return "+".join(scheduler.job_states(job, name)) or "gone"
    except UserError:
        return "unknown"


def describe(run: Path) -> Iterator[str]:
    """A run in a few lines, or a sweep in one line per arm."""
    arms = sorted(path for path in (run / "arms").glob("*") if path.is_dir())
    at = standing(run)
    yield f"run       {run}"
    for stage, job, word in at.jobs:
        yield f"job       {job} ({stage}): {word.lower()}{_where(job, word)}"
    if arms:
        yield from _table([standing(arm) for arm in arms])
        return
    restarts = f", started {at.starts} times" if at.starts > 1 else ""
    yield f"status    {at.status}{restarts}{_because(at)}"
    total = at.state.get("num_steps")
    if at.step or total:
        saved = at.state.get("step")
        yield f"step      {at.step}{f' of {total}' if total else ''}, {saved or 'none'} saved"
    if "train/loss" in at.values:
        pace = at.values.get("perf/tokens_per_second")
        speed = f", {pace:,.0f} tokens/s" if pace and at.status == "running" else ""
        yield f"loss      {at.values['train/loss']:.4g}{speed}"
    if (left := at.seconds_left) is not None:
        end = datetime.now() + timedelta(seconds=left)
        yield f"left      {timedelta(seconds=round(left))} of training, until {end:%a %H:%M}"
    if excluded := _text(RunDirectory(run).slurm / "excluded"):
        yield f"excluded  {excluded}"
    yield from _tracked(run)


def _because(at: Standing) -> str:
    ended = _text(RunDirectory(at.run).slurm / "ended") or at.state.get("reason")
    if at.status == "lost":
        return ": its process is gone; start or submit it again to go on"
    return f": {ended}" if ended and at.status not in ("running", "done") else ""


def _where(job: str, word: str) -> str:
    if word not in ("RUNNING", "PENDING"):
        return ""
    facts = next(iter(scheduler.jobs_facts(job)), {})
    if word == "PENDING":
        return f" ({facts.get('Reason', 'no reason given')})"
    return f" on {facts.get('NodeList')} for {facts.get('RunTime')} of {facts.get('TimeLimit')}"


def _table(arms: list[Standing]) -> Iterator[str]:
    width = max(len(arm.run.name) for arm in arms)
    for arm in arms:
        total, loss = arm.state.get("num_steps"), arm.values.get("train/loss")
        steps = f"{arm.step}/{total}" if total else str(arm.step)
        shown = ("" if loss is None else f"  loss {loss:.4g}") + _because(arm)
        yield f"arm       {arm.run.name:<{width}}  {arm.status:<16} step {steps:>11}{shown}"


def _tracked(run: Path) -> Iterator[str]:
    try:
        targets = json.loads((run / CURSOR_NAME).read_text())["targets"]
        size = (run / JOURNAL_NAME).stat().st_size
    except (OSError, ValueError, KeyError):
        return
    for uri, cursor in targets.items():
        share = 100 * cursor.get("offset", 0) / max(1, size)
        error = first_line(str(cursor.get("error") or ""))
        trouble = f" ({error})" if error else ""
        yield f"MLflow    {uri} run {cursor.get('run_id')}: {share:.0f} % shipped{trouble}"


def _text(path: Path) -> str | None:
    try:
        return " ".join(path.read_text().split()) or None
    except OSError:
        return None


def cancel_jobs(run: Path) -> list[str]:
    """End every job of a run; what was saved stays, and the same submission goes on from there.

    Returns:
        The jobs that were ended.

    Raises:
        UserError: it has no job.
    """
    jobs = remembered(run)
    if not jobs:
        raise UserError(
            f"{run} was not submitted to SLURM: end its process, or name another run directory"
        )
    alive = [job["id"] for job in jobs if scheduler.is_alive(job["id"], job["name"])]
    if alive:
        scheduler.cancel(alive)
    return alive


def show_logs(run: Path, out: TextIO, *, rank: int, lines: int, follow: bool) -> None:
    """Print the ends of a run's logs: the job's, and that of a rank; then what is added.

    Who follows may be there before the job has started.

    Args:
        run: the run directory.
        out: where to.
        rank: whose log.
        lines: how many of each, from the end.
        follow: go on until the run has ended.

    Raises:
        UserError: there is no log, or no such rank.
    """
    _require_rank(run, rank)
    logs: dict[Path, _Log] = {}
    first = True
    while True:
        ended = not follow or _has_ended(run)
        for path in _log_files(run, rank):
            if path not in logs:
                print(f"==> {os.path.relpath(path)} <==", file=out)
                logs[path] = _Log(path)
            text = logs[path].read(to_its_end=ended)
            if first:
                text = "".join(text.splitlines(keepends=True)[-lines:] if lines else [])
            out.write(text)
        out.flush()
        if ended:
            break
        first = False
        time.sleep(POLL_SECONDS)
    if not logs:
        raise UserError(f"{run} has no log of rank {rank} yet: it has not started")


class _Log:
    """A log that grows. Of a rank's own (`log.py`) debugging is left out, such as tracebacks."""

    def __init__(self, path: Path):
        self._path, self._offset, self._hides = path, 0, False
        self._has_levels = path.parent.name == "logs" and path.suffix == ".log"

    def read(self, *, to_its_end: bool) -> str:
        """What was added; a line that is not whole yet may still turn out to be of either kind."""
        with self._path.open("rb") as file:
            file.seek(self._offset)
            data = file.read()
        if self._has_levels and not to_its_end:
            data = data[: data.rfind(b"\n") + 1]
        self._offset += len(data)
        text = data.decode(errors="replace")
        return "".join(self._shown(text)) if self._has_levels else text

    def _shown(self, text: str) -> Iterator[str]:
        for line in text.splitlines(keepends=True):
            if record := _RECORD.match(line):
                self._hides = record[1] == "DEBUG"
            if not self._hides:
                yield line


def _require_rank(run: Path, rank: int) -> None:
    standing(run)
    ranks = {int(path.stem.removeprefix("rank-")) for path in (run / "logs").glob("rank-[0-9]*.*")}
    ranks |= set(range(submitted_ranks(run)))
    if ranks and rank not in ranks:
        raise UserError(f"{run} has no rank {rank}: there are 0 to {max(ranks)}")


def _log_files(run: Path, rank: int) -> list[Path]:
    jobs = sorted(_job_logs(run.absolute()), key=lambda path: path.stat().st_mtime)
    ranks = [run / "logs" / f"rank-{rank}{suffix}" for suffix in (".out", ".log")]
    return [*jobs[-1:], *[path for path in ranks if path.is_file()][:1]]


def _job_logs(run: Path) -> list[Path]:
    """What the scripts of a run's jobs said; an arm's are with its sweep, by its place there."""
    if run.parent.name != "arms":
        return list((run / "slurm").glob("job-*.log"))
    sweep = RunDirectory(run.parents[1])
    try:
        names = [arm["name"] for arm in json.loads(sweep.sweep_file.read_text())["arms"]]
        return list(sweep.slurm.glob(f"job-*_{names.index(run.name)}.log"))
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _has_ended(run: Path) -> bool:
    at = standing(run)
    waits = any(set(word.split("+")) & set(scheduler.ALIVE) for _, _, word in at.jobs)
    return not at.alive and not waits
