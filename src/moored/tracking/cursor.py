"""How far a run's journal has been shipped to each store, and which process ships it.

The shipping itself is `shipper.py`'s.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from moored.tracking.journal import JOURNAL_NAME
from moored.utils.json_files import write_json

logger = logging.getLogger(__name__)

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
