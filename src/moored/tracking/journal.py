"""The append-only journal of a run: one JSON object a line, written before anything else knows.

How far it was shipped to each store, and which process ships it, is kept beside it; sending it to
MLflow is not done here: `shipper.py` follows the file.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from moored.utils.atomic_dir import jsonable, write_json

logger = logging.getLogger(__name__)

JOURNAL_NAME = "journal.jsonl"

# Lines kept in memory while the disk refuses them; older ones are given up first.
_MAX_HELD_LINES = 10_000
_READ_BYTES = 1 << 20


class Journal:
    """Appends records to a journal file; every line is one `os.write` on an `O_APPEND` descriptor.

    So lines of several writers (trainer, system-metrics sampler) never mix, and a killed writer
    leaves at most one torn line, the last. A disk that refuses a line does not stop the caller:
    the line is held and tried again with the next one.

    Args:
        path: the file; made with mode 600 if it is not there.
    """

    def __init__(self, path: Path):
        self.path = path
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        self._descriptor = os.open(path, flags, 0o600)
        self._held: deque[bytes] = deque(maxlen=_MAX_HELD_LINES)
        self._lock = threading.Lock()
        self._refused = False
        size = os.fstat(self._descriptor).st_size
        # A torn last line of a killed writer is closed off, so that ours starts on its own line.
        self._torn = size > 0 and os.pread(self._descriptor, 1, size - 1) != b"\n"

    def write(self, record: dict[str, Any]) -> None:
        """Append one record; never raises because of the disk, never waits for it."""
        line = (encode(record) + "\n").encode()
        with self._lock:
            self._held.append(line)
            self._write_held()

    def flush(self) -> None:
        """Ask the file system to keep what was written (fsync); for the rare, important lines."""
        with self._lock:
            try:
                self._write_held()
                os.fsync(self._descriptor)
            except OSError as error:
                logger.warning("%s: fsync failed: %s", self.path, error)

    def close(self) -> None:
        """Close the descriptor; writing afterwards is an error."""
        with self._lock:
            if self._held:
                self._write_held()
            os.close(self._descriptor)

    def _write_held(self) -> None:
        while self._held:
            data = b"\n" + self._held[0] if self._torn else self._held[0]
            try:
                written = os.write(self._descriptor, data)
            except OSError as error:
                self._refuse(error)
                return
            if written < len(data):
                self._torn = True
                self._refuse(OSError(f"only {written} of {len(data)} bytes written"))
                return
            self._torn = False
            self._held.popleft()
        if self._refused:
            self._refused = False
            logger.warning("%s: writable again, no line is held back any more", self.path)

    def _refuse(self, error: OSError) -> None:
        if not self._refused:
            logger.warning(
                "%s: cannot write (%s); training goes on and up to %d lines are held in memory",
                self.path,
                error,
                _MAX_HELD_LINES,
            )
        self._refused = True


def encode(record: dict[str, Any]) -> str:
    """One record as one line of valid JSON; NaN and infinities become the strings of `float()`."""
    try:
        return json.dumps(record, separators=(",", ":"), allow_nan=False, default=str)
    except ValueError:
        record = jsonable(record)
        return json.dumps(record, separators=(",", ":"), allow_nan=False, default=str)


@dataclass(frozen=True, slots=True, kw_only=True)
class JournalLine:
    """A parsed line: its record and the offset in bytes of the line after it."""

    record: dict[str, Any]
    end: int


class Follower:
    """Reads whole lines of a growing journal, from its start; an unfinished last line waits."""

    def __init__(self, path: Path):
        self.path = path
        self.offset = 0
        self.num_broken = 0

    def read(self, max_bytes: int = _READ_BYTES) -> list[JournalLine]:
        """The next lines, about `max_bytes` of them; empty at the end of the file."""
        try:
            with self.path.open("rb") as file:
                file.seek(self.offset)
                data = file.read(max_bytes)
                if data and b"\n" not in data:
                    # A line longer than the window, or the unfinished last one.
                    data += file.readline()
        except FileNotFoundError:
            return []
        whole = data[: data.rfind(b"\n") + 1]
        lines: list[JournalLine] = []
        for raw in whole.splitlines(keepends=True):
            self.offset += len(raw)
            record = _parse(raw)
            if record is not None:
                lines.append(JournalLine(record=record, end=self.offset))
            elif raw.strip():
                self.num_broken += 1
        if whole and not lines:
            return self.read(max_bytes)
        return lines


def _parse(raw: bytes) -> dict[str, Any] | None:
    """A record, or None for a line that is torn or not one of ours."""
    try:
        record = json.loads(raw)
        record |= {"time": float(record["time"]), "attempt": int(record["attempt"])}
        if record["kind"] == "event":
            whole = isinstance(record["event"], str) and isinstance(record["fields"], dict)
            return record if whole else None
        values = {str(name): float(value) for name, value in record["values"].items()}
        return record | {"step": int(record["step"]), "values": values}
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def read_journal(path: Path | str) -> Iterator[dict[str, Any]]:
    """The records of a journal in the order of writing; torn and foreign lines are left out.

    Values of metrics are floats again (`"NaN"` becomes `nan`); an event has a dict `fields`.
    """
    follower = Follower(Path(path))
    while lines := follower.read():
        for line in lines:
            yield line.record
    if follower.num_broken:
        logger.warning("%s: %d torn lines left out", path, follower.num_broken)


def is_start(record: dict[str, Any]) -> bool:
    """Whether the record is the event with which an attempt begins."""
    return record["kind"] == "event" and record["event"] == "start"


def first_start(path: Path) -> dict[str, Any] | None:
    """The first start event of a journal, which has the run's identity; None if there is none."""
    return next(filter(is_start, read_journal(path)), None)


class Fence:
    """Tells the lines of a superseded attempt from those of the current one.

    A trainer that was cut off may go on writing after its successor has started; what it writes
    then is no part of the run.
    """

    def __init__(self):
        self.attempt = 0

    def admits(self, record: dict[str, Any]) -> bool:
        """Whether the record belongs to the current attempt; records must come in file order."""
        attempt = record["attempt"]
        if is_start(record) or attempt > self.attempt:
            self.attempt = attempt
        return attempt >= self.attempt


def metrics(run_dir: Path | str, kind: str = "metrics") -> dict[str, list[tuple[int, float]]]:
    """The curves of a run: name -> (step, value) in order of the step, one value per step.

    Where a resumed attempt repeated a step, its value wins.

    Args:
        run_dir: the run directory.
        kind: `metrics` (steps of training), or `system` (the step is seconds since the run began).
    """
    curves: dict[str, dict[int, float]] = {}
    fence = Fence()
    for record in read_journal(Path(run_dir) / JOURNAL_NAME):
        if not fence.admits(record) or record["kind"] != kind:
            continue
        for name, value in record["values"].items():
            curves.setdefault(name, {})[record["step"]] = value
    return {name: sorted(curve.items()) for name, curve in curves.items()}


# ---------------------------------------------------------------- how far it has been shipped

CURSOR_NAME = "mlflow.json"
LOCK_NAME = "shipper.lock"
_TAIL_BYTES = 256


@dataclass(slots=True, kw_only=True)
class Cursor:
    """How far a journal has been shipped to one store; an entry of `mlflow.json`.

    Attributes:
        uid: identity of the journal, so that a cursor is not taken for another journal's.
        run_id: the run in the store; None until it is made.
        creates: how often its making was tried; more than once may have left a twin.
        offset: bytes of the journal that the store has confirmed.
        tail: checksum of the bytes before `offset`: a journal that lost its end is noticed.
        pending: artifacts and the parent, which may wait without holding up the metrics.
        status: the last status that was set.
        error: what the store said last; None once it works again.
    """

    uid: str = ""
    run_id: str | None = None
    creates: int = 0
    offset: int = 0
    tail: int = 0
    pending: list[dict[str, str]] = field(default_factory=list)
    status: str | None = None
    error: str | None = None

    @classmethod
    def load(cls, run_dir: Path, target: str) -> Cursor:
        """The cursor of `target`, a store's address without credentials; fresh if unusable."""
        try:
            return cls(**_targets(run_dir)[target])
        except (TypeError, KeyError):
            return cls()

    def save(self, run_dir: Path, target: str) -> None:
        """Record the cursor durably, beside those of other targets.

        A full disk is no reason to stop shipping: what is sent again is recognised by the store.
        """
        targets = _targets(run_dir) | {target: asdict(self)}
        try:
            write_json(run_dir / CURSOR_NAME, {"targets": targets})
        except OSError as error:
            logger.warning("%s: not saved: %s", run_dir / CURSOR_NAME, error)

    def move(self, journal: Path, offset: int) -> None:
        """Set the offset, and the checksum of what lies before it."""
        self.offset, self.tail = offset, _checksum(journal, offset) or 0

    def fits(self, journal: Path) -> bool:
        """Whether the journal still holds what was shipped (a power cut may take a file's end)."""
        return self.offset == 0 or _checksum(journal, self.offset) == self.tail


def _targets(run_dir: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((run_dir / CURSOR_NAME).read_text())["targets"])
    except (OSError, ValueError, TypeError, KeyError):
        return {}


def _checksum(journal: Path, offset: int) -> int | None:
    begin = max(0, offset - _TAIL_BYTES)
    with journal.open("rb") as file:
        file.seek(begin)
        data = file.read(offset - begin)
    return zlib.crc32(data) if len(data) == offset - begin else None


def parent_of(run_dir: Path, recorded: str) -> Path:
    """The comparison of an arm: where the arm lies now, else where it was."""
    around = run_dir.parent.parent
    moved = run_dir.parent.name == "arms" and (around / JOURNAL_NAME).is_file()
    return around if moved else Path(recorded)


def lock_holder(run_dir: Path) -> str:
    """Pid and host of who ships this run, or did so last."""
    try:
        return (run_dir / LOCK_NAME).read_text().strip() or "unknown"
    except OSError:
        return "unknown"


@contextlib.contextmanager
def shipping(run_dir: Path, keep_trying: Callable[[], bool]) -> Iterator[bool]:
    """Hold the run's shipper lock; yields False where another process keeps it.

    The lock is the kernel's (flock), so a killed holder leaves none behind; the file tells who.

    Args:
        run_dir: the run directory.
        keep_trying: asked while the lock is taken; once it says no, the wait is over.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(run_dir / LOCK_NAME, flags, 0o600)
    try:
        held = _flock(descriptor)
        while not held and keep_trying():
            time.sleep(0.25)
            held = _flock(descriptor)
        if held:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()} {socket.gethostname()}\n".encode(), 0)
        yield held
    finally:
        os.close(descriptor)


def _flock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        # A file system without locks: shipping is idempotent, so two shippers cost time only.
        return error.errno not in (errno.EWOULDBLOCK, errno.EACCES)
    return True
