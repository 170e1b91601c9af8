"""`moored sync`: sends what a store does not have of a run yet, once nobody else does.

How a journal is shipped is `shipper.py`'s matter.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from moored.tracking import provenance
from moored.tracking.journal import (
    JOURNAL_NAME,
    Cursor,
    Fence,
    first_start,
    is_start,
    lock_holder,
    parent_of,
    read_journal,
    shipping,
)
from moored.tracking.mlflow_store import MlflowStore
from moored.tracking.shipper import Shipper
from moored.tracking.store import first_line
from moored.tracking.system_metrics import collect_rest
from moored.utils.atomic_dir import private_files
from moored.utils.errors import UserError

SILENT_SECONDS = 3600.0  # another host's journal that is older belongs to no live trainer


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncSummary:
    """What a `sync` did.

    Attributes:
        uri: the store, without credentials.
        run_id: the MLflow run.
        status: the status that was set; None for a run that is still going on.
        num_points, num_artifacts: sent now; 0 if nothing was missing.
        problems: items that MLflow rejected, or could not take yet.
        complete: whether MLflow has all that it will take.
    """

    uri: str
    run_id: str
    status: str | None
    num_points: int
    num_artifacts: int
    problems: tuple[str, ...]
    complete: bool

    def __str__(self) -> str:
        """The outcome for the terminal."""
        sent = f"{self.num_points} points and {self.num_artifacts} artifacts sent"
        lines = [f"{self.uri}: run {self.run_id} ({self.status or 'going on'}), {sent}"]
        lines += [f"left out: {problem}" for problem in self.problems]
        return "\n".join(lines if self.complete else [*lines, "not complete: sync again"])


def sync_run(
    run_dir: Path | str,
    uri: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> SyncSummary:
    """Send what MLflow does not have of a run yet; may be repeated, and cut anywhere.

    Args:
        run_dir: the run directory.
        uri: the store; by default the one the run was tracked to.
        progress: called with (bytes of the journal shipped, bytes in all).

    Raises:
        UserError: no journal, no store, the store does not answer, or another process ships.
    """
    run_dir = Path(run_dir).absolute()
    first = first_start(run_dir / JOURNAL_NAME)
    if first is None:
        raise UserError(f"{run_dir} has no journal of a run: give a run directory")
    uri = _sync_uri(run_dir, uri)
    target = provenance.address(uri)
    recorded = first["fields"].get("parent")
    parent = parent_of(run_dir, recorded) if recorded else None
    if parent and Cursor.load(parent, target).run_id is None:
        with contextlib.suppress(UserError):
            sync_run(parent, uri)
    with private_files(), shipping(run_dir, lambda: False) as held:
        if not held:
            raise UserError(
                f"{run_dir} is being shipped by process {lock_holder(run_dir)}: wait until it "
                "ends, or end it, and sync again"
            )
        try:
            now = _Now.of(run_dir)
            if not now.goes_on():
                collect_rest(run_dir, now.attempt, first["time"])
            shipper = Shipper(
                run_dir,
                target,
                partial(MlflowStore, uri, run_dir),
                redact=partial(provenance.scrub, uri=uri),
                unfinished=_unfinished(run_dir, now),
                progress=progress,
            )
            complete = shipper.run(max_failures=3)
        except Exception as error:
            text = first_line(provenance.scrub(f"{error}", uri))
            raise UserError(f"{target}: {text}: mend that and sync again") from error
    return SyncSummary(
        uri=target,
        run_id=shipper.cursor.run_id or "",
        status=shipper.cursor.status,
        num_points=shipper.num_points,
        num_artifacts=shipper.num_artifacts,
        problems=(*shipper.problems, *(str(item) for item in shipper.cursor.pending)),
        complete=complete,
    )


def _sync_uri(run_dir: Path, uri: str | None) -> str:
    """The given store, or the recorded one, with the environment's credentials if it is that."""
    if uri is not None:
        return provenance.absolute(uri)
    from_environment = os.environ.get("MLFLOW_TRACKING_URI")
    starts = [record for record in read_journal(run_dir / JOURNAL_NAME) if is_start(record)]
    recorded = starts[-1]["fields"].get("uri")
    if from_environment and recorded in (None, provenance.address(from_environment)):
        return provenance.absolute(from_environment)
    if recorded is None:
        raise UserError(f"{run_dir} was not tracked in MLflow: name a store, or set track.mlflow")
    return recorded


@dataclass(frozen=True, slots=True, kw_only=True)
class _Now:
    """Where a journal stands.

    Attributes:
        start: fields of its last attempt's start.
        attempt: the last one.
        time: of its last line.
        ended: the status with which that attempt finished; None if it did not.
    """

    start: dict[str, Any]
    attempt: int
    time: float
    ended: str | None

    @classmethod
    def of(cls, run_dir: Path) -> _Now:
        """Read it."""
        start: dict[str, Any] = {}
        attempt, last, ended = 0, 0.0, None
        fence = Fence()
        for record in filter(fence.admits, read_journal(run_dir / JOURNAL_NAME)):
            last = record["time"]
            if is_start(record):
                start, attempt, ended = record["fields"], record["attempt"], None
            elif record["kind"] == "event" and record["event"] == "finish":
                ended = record["fields"].get("status")
        return cls(start=start, attempt=attempt, time=last, ended=ended)

    def goes_on(self) -> bool:
        """Whether the attempt's trainer may still be at work."""
        if self.ended is not None or self.start.get("pid") is None:
            return False
        if self.start.get("host") != socket.gethostname():
            return time.time() - self.time < SILENT_SECONDS
        try:
            began = psutil.Process(self.start["pid"]).create_time()
            return abs(began - self.start["pid_began"]) < 1.0
        except (psutil.Error, KeyError, TypeError):
            return False


def _unfinished(run_dir: Path, now: _Now) -> str | None:
    """The status of a run without a finish event; None while it, or an arm of it, goes on."""
    arms = [_Now.of(journal.parent) for journal in run_dir.glob(f"arms/*/{JOURNAL_NAME}")]
    if now.goes_on() or any(arm.goes_on() for arm in arms):
        return None
    if "arms" not in now.start:
        return "KILLED"
    if len(arms) < len(now.start["arms"]):
        return None  # some are still to come
    return "FINISHED" if all(arm.ended == "FINISHED" for arm in arms) else "FAILED"
