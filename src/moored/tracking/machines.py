"""Samples of a run's other machines: a file of each machine's own, and its way into the journal.

Appends of several hosts to one file mix on a network file system, so only the main rank's host
writes the journal. What is sampled is `system_metrics.py`'s matter.
"""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from pathlib import Path
from typing import Any

from moored.tracking.journal import JOURNAL_NAME, Follower, Journal, read_journal

logger = logging.getLogger(__name__)

FOLDER = Path("logs") / "system"
LAST_SECONDS = 2.0  # of waiting for other machines' last samples, once the run has ended
_POLL_SECONDS = 0.1
_NOT_IN_HOSTS = re.compile(r"[^A-Za-z0-9._-]")


def host_in_names(host: str) -> str:
    """A host's name as a part of file and metric names."""
    return _NOT_IN_HOSTS.sub("_", host).strip(".") or "unnamed"


def of_host(values: dict[str, float], host: str | None) -> dict[str, float]:
    """Named as MLflow's own monitor names a node: `system/HOST/cpu_...`; None: left as they are."""
    if host is None:
        return values
    return {f"system/{host}/{name.removeprefix('system/')}": x for name, x in values.items()}


class MachineFile:
    """The samples of one machine in one attempt, written by a process on that machine.

    Lines are as in the journal, but for the step, which is unix seconds: when the run began is for
    the reader to know.

    Args:
        run_dir: the run directory.
        host: of the machine, as `host_in_names` says it.
        attempt: of the run.
    """

    def __init__(self, run_dir: Path, host: str, attempt: int):
        (run_dir / FOLDER).mkdir(parents=True, exist_ok=True, mode=0o700)
        self._attempt = attempt
        self._file = Journal(run_dir / FOLDER / f"{host}.attempt-{attempt}.jsonl")

    def write(self, values: dict[str, float]) -> None:
        """Append a sample; a network file system shows it to others once it is flushed."""
        now = time.time()
        record = {"time": now, "kind": "system", "step": int(now), "attempt": self._attempt}
        self._file.write(record | {"values": values})
        self._file.flush()

    def close(self) -> None:
        """Say that no more will come."""
        record = {"time": time.time(), "kind": "event", "event": "end", "attempt": self._attempt}
        self._file.write(record | {"fields": {}})
        self._file.flush()
        self._file.close()


class SampleCollector:
    """Brings what the other machines' files hold into the journal, each sample once.

    A file may show up late, or never; a line that is torn is left out. What the journal has is
    found in the journal itself, so that a collector may be killed and followed by another.

    Args:
        run_dir: the run directory.
        journal: where to append.
        attempt: whose files are read.
        began: when the run began, in unix seconds.
    """

    def __init__(self, run_dir: Path, journal: Journal, attempt: int, began: float):
        self._folder, self._journal = run_dir / FOLDER, journal
        self._attempt, self._began = attempt, began
        self._followers: dict[str, Follower] = {}
        self._ended: set[str] = set()
        self._newest: dict[str, float] = {}
        self._until: float | None = None
        self._lock = threading.Lock()
        for record in read_journal(run_dir / JOURNAL_NAME):
            if record["kind"] == "system" and record["attempt"] == attempt and "host" in record:
                self._newest[str(record["host"])] = record["time"]

    def collect(self) -> bool:
        """Append what is new; whether every file has come to its end."""
        with self._lock:
            try:
                self._read()
            except OSError as error:  # a network file system may lose its hold on a file
                logger.info("%s: %s", self._folder, error)
            return self._ended >= self._followers.keys()

    def drain(self, seconds: float) -> None:
        """Collect to the end of every file, or for so long, counted from the first call."""
        self._until = self._until or time.monotonic() + seconds
        while not self.collect() and time.monotonic() < self._until:
            time.sleep(_POLL_SECONDS)

    def _read(self) -> None:
        suffix = f".attempt-{self._attempt}.jsonl"
        for path in sorted(self._folder.glob(f"*{suffix}")):
            host = host_in_names(path.name.removesuffix(suffix))
            follower = self._followers.setdefault(host, Follower(path))
            while lines := follower.read():
                for line in lines:
                    self._take(host, line.record)

    def _take(self, host: str, record: dict[str, Any]) -> None:
        if record["kind"] == "event":
            self._ended.add(host)
        elif record["kind"] == "system" and record["time"] > self._newest.get(host, 0.0):
            self._newest[host] = record["time"]
            line = {"time": record["time"], "kind": "system", "attempt": self._attempt}
            line |= {"step": max(0, int(record["time"] - self._began)), "host": host}
            self._journal.write(line | {"values": of_host(record["values"], host)})


def collect_rest(run_dir: Path, attempt: int, began: float) -> None:
    """What arrived after the run had ended, for those who send it later."""
    if not (run_dir / FOLDER).is_dir() or not os.access(run_dir / JOURNAL_NAME, os.W_OK):
        return
    journal = Journal(run_dir / JOURNAL_NAME)
    try:
        SampleCollector(run_dir, journal, attempt, began).collect()
    finally:
        journal.close()
