"""Tracking of a run: `Tracker` writes the journal, a process beside it ships that to MLflow.

MLflow itself is not loaded by a trainer: that is for the process, and for `sync`, which does the
same for a run that has ended. The journal's format is `journal.py`'s.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

from moored.config import Config
from moored.errors import UserError
from moored.track import provenance
from moored.track.cursor import Cursor, lock_holder, parent_of, shipping
from moored.track.journal import JOURNAL_NAME, Journal, first_start, is_start, read_journal
from moored.track.mlflow_store import MlflowStore
from moored.track.process import ShipperProcess
from moored.track.shipper import Shipper

logger = logging.getLogger(__name__)

FINISH_SECONDS = 60.0
KILLED_FINISH_SECONDS = 5.0  # somebody wants the machine back
SILENT_SECONDS = 3600.0  # another host's journal that is older belongs to no live trainer


class Tracker:
    """What a trainer says about its run; no call waits for more than an append to a file.

    Made by `start`; on ranks other than the main one every method does nothing.

    Attributes:
        where: how to look at the run in MLflow, one line; empty if it is not tracked there.
    """

    def __init__(self, run_dir: Path, journal: Journal | None, attempt: int):
        self.run_dir = run_dir
        self.where = ""
        self._journal, self._attempt = journal, attempt
        self._uri = ""
        self._shipper: ShipperProcess | None = None

    @classmethod
    def start(
        cls,
        config: Config,
        run_dir: Path,
        *,
        attempt: int,
        is_main: bool = True,
        parent: Path | str | None = None,
    ) -> Tracker:
        """Open the journal, write the start event, and start the shipper process.

        Args:
            config: the recipe; `config.track` says where to.
            run_dir: the run directory; made if it is not there.
            attempt: 1, 2, ...: a resumed attempt goes on in the same MLflow run.
            is_main: whether this is the rank that tracks.
            parent: run directory of a comparison, whose MLflow run becomes this one's parent.
        """
        if not is_main:
            return cls(run_dir, None, attempt)
        run_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        uri = provenance.tracking_uri(config)
        fields = provenance.start_fields(config, run_dir, uri, Path(parent) if parent else None)
        tracker = cls(run_dir, Journal(run_dir / JOURNAL_NAME), attempt)
        tracker._uri = uri
        tracker.event("start", **fields)
        if config.track.mlflow:
            tracker.where = _where(uri)
            sampled = config.track.system_metrics
            tracker._shipper = ShipperProcess(run_dir, uri, attempt, system_metrics=sampled)
        return tracker

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Append the values of a step; names carry their units: `train/ce_nats_per_token`."""
        if self._journal is None or not values:
            return
        self._journal.write(
            {
                "time": time.time(),
                "kind": "metrics",
                "step": int(step),
                "attempt": self._attempt,
                "values": {name: float(value) for name, value in values.items()},
            }
        )

    def event(self, kind: str, /, **fields: Any) -> None:
        """Append something that happened; `kind` names it, `fields` are JSON values."""
        if self._journal is None:
            return
        record = {"time": time.time(), "kind": "event", "event": kind, "attempt": self._attempt}
        self._journal.write(record | {"fields": _scrubbed(fields, self._uri)})
        if kind in ("start", "finish"):
            self._journal.flush()
        if self._shipper is not None:
            self._shipper.keep()

    def dataset(
        self,
        name: str,
        digest: str,
        num_samples: int,
        num_tokens: int,
        context: str = "training",
    ) -> None:
        """Say what data the run reads; it becomes a dataset input of the MLflow run."""
        self.event(
            "dataset",
            name=name,
            digest=digest,
            num_samples=int(num_samples),
            num_tokens=int(num_tokens),
            context=context,
        )

    def artifact(self, path: Path, folder: str = "") -> None:
        """Hand over a file or directory inside the run directory; it is read later, so keep it.

        Args:
            path: what to upload; a directory's content goes into `folder`.
            folder: the place among the run's artifacts, "" for the top.
        """
        absolute, root = Path(path).absolute(), self.run_dir.absolute()
        inside = absolute.is_relative_to(root)
        shown = absolute.relative_to(root) if inside else absolute
        self.event("artifact", path=str(shown), folder=folder)

    def finish(self, status: str, timeout: float | None = None) -> None:
        """Write how the run ended, and give the shipper a bounded time to deliver the rest.

        Args:
            status: FINISHED, FAILED or KILLED.
            timeout: seconds to wait; by default 60, and 5 for a run that was killed.
        """
        if self._journal is None:
            return
        self.event("finish", status=status)
        self._journal.close()
        self._journal = None
        if timeout is None:
            timeout = KILLED_FINISH_SECONDS if status == "KILLED" else FINISH_SECONDS
        if self._shipper is not None and not self._shipper.wait(timeout):
            logger.warning(
                "MLflow does not have everything: %s. Nothing is lost: `moored sync %s` sends the "
                "rest",
                self._shipper,
                self.run_dir,
            )


def _scrubbed(value: Any, uri: str) -> Any:
    if isinstance(value, str):
        return provenance.scrub(value, uri)
    if isinstance(value, Mapping):
        return {str(key): _scrubbed(item, uri) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_scrubbed(item, uri) for item in value]
    return value


def _where(uri: str) -> str:
    clean = provenance.address(uri)
    if urlsplit(uri).scheme in ("http", "https"):
        return clean
    return f"mlflow ui --backend-store-uri {clean}"


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
        """For the terminal."""
        sent = f"{self.num_points} points and {self.num_artifacts} artifacts sent"
        lines = [f"{self.uri}: run {self.run_id} ({self.status or 'going on'}), {sent}"]
        lines += [f"left out: {problem}" for problem in self.problems]
        return "\n".join(lines if self.complete else [*lines, "not complete: sync again"])


def sync(
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
            sync(parent, uri)
    with _private_files(), shipping(run_dir, lambda: False) as held:
        if not held:
            raise UserError(
                f"{run_dir} is being shipped by process {lock_holder(run_dir)}: wait until it "
                "ends, or end it, and sync again"
            )
        try:
            shipper = Shipper(
                run_dir,
                target,
                partial(MlflowStore, uri, run_dir),
                redact=partial(provenance.scrub, uri=uri),
                unfinished=None if _goes_on(run_dir) else "KILLED",
                progress=progress,
            )
            complete = shipper.run(max_failures=3)
        except Exception as error:
            text = provenance.scrub(f"{error}", uri).partition("\n")[0]
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


@contextlib.contextmanager
def _private_files() -> Iterator[None]:
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


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


def _goes_on(run_dir: Path) -> bool:
    """Whether the trainer of the journal's last attempt may still be at work."""
    start: dict[str, Any] = {}
    last = 0.0
    for record in read_journal(run_dir / JOURNAL_NAME):
        last = record["time"]
        start = record["fields"] if is_start(record) else start
    if start.get("host") != socket.gethostname():
        return time.time() - last < SILENT_SECONDS
    try:
        return abs(psutil.Process(start["pid"]).create_time() - start["pid_began"]) < 1.0
    except (psutil.Error, KeyError, TypeError):
        return False
