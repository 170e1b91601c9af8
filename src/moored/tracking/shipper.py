"""Carries a run's journal into a tracking store: no duplicates, through outages, to the end.

Which store that is stays open (`store.py`), and so does who runs this: a process beside the
trainer (`sidecar.py`), or `moored sync` (`sync.py`).
"""

from __future__ import annotations

import logging
import random
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from moored.tracking.journal import (
    JOURNAL_NAME,
    Cursor,
    Fence,
    Follower,
    JournalLine,
    first_start,
    is_start,
    parent_of,
    shipping,
)
from moored.tracking.store import Point, RejectedError, StopError, Store, first_line, inside

logger = logging.getLogger(__name__)

BATCH_POINTS = 1000  # MLflow's limit for one request
FLUSH_SECONDS = 2.0  # how long fresh points wait for company
POLL_SECONDS = 0.25
PENDING_SECONDS = 30.0  # between two tries of an artifact
MAX_DELAY_SECONDS = 15.0  # between two tries of a store that fails
SETTLE_SECONDS = 2.0  # for others who make the same run to be seen


class Shipper:
    """One pass, or a long watch, over the journal of a run.

    Args:
        run_dir: the run directory.
        target: the store's address without credentials.
        connect: opens the store; asked again after every failure.
        redact: takes secrets out of a text.
        trainer_gone: tells whether the process that writes the journal has ended; None says that
            nothing is awaited: what is there is shipped (`moored sync`).
        attempt: whose shipper this is; a later attempt's start event ends it.
        unfinished: the status of a run whose journal ends without a finish event; None: leave it.
        drain_seconds: how long it goes on trying after the trainer is gone.
        before_close: called once all is shipped; what it still writes to the journal is shipped
            too. It may be called again after a failure.
        progress: called with (bytes shipped, bytes in all).

    Attributes:
        num_points, num_artifacts: sent by this object.
        problems: items that the store rejected, one line each.
        ended: status of the finish event of the current attempt; None while it has none.
    """

    def __init__(
        self,
        run_dir: Path,
        target: str,
        connect: Callable[[], Store],
        *,
        redact: Callable[[str], str] = str,
        trainer_gone: Callable[[], bool] | None = None,
        attempt: int = 0,
        unfinished: str | None = None,
        drain_seconds: float = 60.0,
        before_close: Callable[[], None] = lambda: None,
        progress: Callable[[int, int], None] | None = None,
    ):
        self.run_dir, self.target = run_dir, target
        self.num_points = self.num_artifacts = 0
        self.problems: list[str] = []
        self.ended: str | None = None
        self._journal = run_dir / JOURNAL_NAME
        self._connect, self._redact, self._progress = connect, redact, progress
        self._gone, self._attempt, self._unfinished = trainer_gone, attempt, unfinished
        self._drain_seconds, self._before_close = drain_seconds, before_close
        self._store: Store | None = None
        self._flushed = self._tried_pending = self._last_time = 0.0
        first = first_start(self._journal)
        if first is None:
            raise StopError(f"{self._journal} holds no start of a run: nothing to ship")
        self._start, self._began = first["fields"], first["time"]
        self._inode = self._journal.stat().st_ino
        uid = str(self._start.get("uid", ""))
        cursor = Cursor.load(run_dir, target)
        self.cursor = cursor if cursor.uid == uid else Cursor(uid=uid)
        if self.cursor.fits(self._journal):
            self._read_from_start("batch" if self.cursor.run_id else "none")
        else:
            logger.warning("%s lost lines that were shipped: comparing all", self._journal)
            self.cursor.move(self._journal, 0)
            self._read_from_start("all")

    def run(self, max_failures: int | None = None) -> bool:
        """Ship until the end of the run (or, for a sync, of the journal); True if all arrived.

        Args:
            max_failures: in a row, after which the store's last error is raised.
        """
        failures, deadline = 0, float("inf")
        while True:
            # Asked before reading: what a trainer wrote before it ended is then seen to the end.
            gone = self._gone is None or self._gone()
            if self._gone is not None and gone:
                deadline = min(deadline, time.monotonic() + self._drain_seconds)
            try:
                state = self._round(gone)
                if state == "superseded":
                    return True
                if state == "empty" and (gone or self._has_ended()):
                    self._before_close()
                    self._fill()
                    if not self._buffer:
                        return self._close()
                    continue
                failures, delay = 0, 0.0 if state == "worked" else POLL_SECONDS
            except StopError as error:
                self._note(str(error))
                raise
            except Exception as error:
                failures += 1
                self._store = None
                self._note(f"{type(error).__name__}: {error}")
                if max_failures is not None and failures >= max_failures:
                    raise
                delay = min(0.5 * 2.0 ** min(failures, 9), 2.0 if gone else MAX_DELAY_SECONDS)
                delay *= random.uniform(0.5, 1.0)  # runs on one store must not retry in step
            self._sleep(min(delay, deadline - time.monotonic()), gone)
            if time.monotonic() >= deadline:
                return False

    def _sleep(self, seconds: float, gone: bool) -> None:
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            time.sleep(min(POLL_SECONDS, left))
            if self._gone is not None and not gone and self._gone():
                return

    def _round(self, gone: bool) -> str:
        """One step: a batch of points or one event; says whether it worked, waits or is done."""
        self._fill()
        if self._store is None:
            self._open()
        self._ship_pending()
        if not self._buffer:
            return "empty"
        record = self._buffer[0].record
        if self._gone is not None and is_start(record) and record["attempt"] > self._attempt:
            return "superseded"
        if not (gone or self._has_ended() or self._due()):
            return "waiting"
        if record["kind"] == "event":
            self._ship_event(record)
            self._confirm(1)
        else:
            self._ship_points()
        self._flushed = time.monotonic()
        return "worked"

    def _due(self) -> bool:
        """Whether to send now, or to wait for more points so that requests stay few."""
        if len(self._buffer) >= BATCH_POINTS or time.monotonic() - self._flushed >= FLUSH_SECONDS:
            return True
        return any(line.record["kind"] == "event" for line in self._buffer)

    def _has_ended(self) -> bool:
        return self.ended is not None and self._fence.attempt >= self._attempt

    def _fill(self) -> None:
        """Read on, until there is enough for a batch; what is shipped already is only counted."""
        if self._replaced() or self._journal.stat().st_size < self._follower.offset:
            raise StopError(f"{self._journal} was cut or replaced while it was being shipped")
        while len(self._buffer) < BATCH_POINTS and (lines := self._follower.read()):
            for line in lines:
                if line.end > self.cursor.offset:
                    self._buffer.append(line)
                elif self._absorb(line.record) and line.record["kind"] != "event":
                    for name in line.record["values"]:
                        self._seen.setdefault(name, set()).add(line.record["step"])

    def _open(self) -> None:
        """Connect, and find or make the run; the search by uid guards a making tried before."""
        store, cursor = self._connect(), self.cursor
        run_id = store.find_run(self._start, cursor.run_id)
        if run_id is None:
            if cursor.offset:
                logger.warning("the run is not in the store any more: shipping all again")
            self._restart("none")
            cursor.creates += 1
            self._save()
            run_id = store.create_run(self._start, self._began)
            if (self.run_dir / "arms").is_dir():  # whose shippers, on any host, may make it too
                time.sleep(SETTLE_SECONDS)
                if (agreed := store.settle(self._start, run_id)) != run_id:
                    self._restart("all")
                    run_id = agreed
        elif run_id != cursor.run_id:
            self._restart("all")
        cursor.run_id = run_id
        self._save()
        self._store = store
        self._flushed = 0.0

    def _restart(self, doubt: str) -> None:
        self.cursor.move(self._journal, 0)
        self.cursor.pending.clear()
        self._read_from_start(doubt)
        self._fill()

    def _read_from_start(self, doubt: str) -> None:
        self._follower, self._fence = Follower(self._journal), Fence()
        self._buffer: deque[JournalLine] = deque()
        self._seen: dict[str, set[int]] = {}
        # Which points may be in the store without our knowledge: none, the next batch's, or all.
        self._doubt = doubt
        self._logged: dict[str, set[int]] = {}

    def _absorb(self, record: dict[str, Any]) -> bool:
        """Keep track of attempts and of the end; False for a line of a superseded attempt."""
        if not self._fence.admits(record):
            return False
        self._last_time = max(self._last_time, record["time"])
        if is_start(record):
            self.ended = None
        elif record["kind"] == "event" and record["event"] == "finish":
            self.ended = str(record["fields"].get("status", "FINISHED"))
        return True

    def _confirm(self, num_lines: int) -> None:
        """The store has the first lines of the buffer: move the cursor behind them."""
        for _ in range(num_lines - 1):
            self._buffer.popleft()
        self.cursor.move(self._journal, self._buffer.popleft().end)
        self._note(None, save=False)
        self._save()
        if self._progress is not None:
            self._progress(self.cursor.offset, self._journal.stat().st_size)

    def _ship_points(self) -> None:
        """Send the points up to the next event, at most a batch of them.

        After a restart the batch begins where the last one did and is at least as long, since the
        file only grows: so only the first batch can hold points that the store has already.
        """
        points: dict[tuple[str, int], Point] = {}
        num_lines = 0
        for line in self._buffer:
            record = line.record
            if record["kind"] == "event":
                break
            if num_lines and len(points) + len(record["values"]) > BATCH_POINTS:
                break
            num_lines += 1
            if not self._absorb(record):
                continue
            step, when = record["step"], record["time"]
            for name, value in record["values"].items():
                if step not in self._seen.get(name, ()) and (name, step) not in points:
                    points[name, step] = Point(name=name, step=step, value=value, time=when)
        fresh = [p for p in points.values() if self._doubt == "none" or not self._is_logged(p)]
        try:
            for first in range(0, len(fresh), BATCH_POINTS):
                self._send(fresh[first : first + BATCH_POINTS])
        except Exception:
            # Perhaps it arrived, perhaps not: ask before sending it again.
            self._doubt = "all" if self._doubt == "all" else "batch"
            self._logged.clear()
            raise
        if self._doubt == "batch":
            self._doubt = "none"
            self._logged.clear()
        for name, step in points:
            self._seen.setdefault(name, set()).add(step)
        self._confirm(num_lines)

    def _is_logged(self, point: Point) -> bool:
        if point.name not in self._logged:
            store, run_id = self._opened()
            self._logged[point.name] = store.steps_logged(run_id, point.name)
        return point.step in self._logged[point.name]

    def _send(self, points: Sequence[Point]) -> None:
        """Send points; one that the store rejects is left out, alone."""
        store, run_id = self._opened()
        try:
            store.log_points(run_id, points)
            self.num_points += len(points)
        except RejectedError as error:
            if len(points) == 1:
                self._problem(f"{points[0].name} at step {points[0].step}: {error}")
                return
            half = len(points) // 2
            self._send(points[:half])
            self._send(points[half:])

    def _ship_event(self, record: dict[str, Any]) -> None:
        if not self._absorb(record):
            return
        store, run_id = self._opened()
        event, fields = record["event"], record["fields"]
        try:
            if event == "start":
                store.describe(run_id, fields, record["attempt"])
                if self._gone is not None:
                    store.set_status(run_id, "RUNNING", None)
                    self.cursor.status = None
            elif event == "dataset":
                store.log_dataset(run_id, fields)
            for item in items_of(record, self._start.get("config")):
                if item not in self.cursor.pending:
                    self.cursor.pending.append(item)
                self._tried_pending = 0.0
        except (RejectedError, KeyError) as error:
            self._problem(f"{event}: {error}")

    def _ship_pending(self, *, last: bool = False) -> None:
        """Artifacts, the parent, the registry; their trouble does not hold up the metrics."""
        wait = 0.0 if last else PENDING_SECONDS
        if not self.cursor.pending or time.monotonic() - self._tried_pending < wait:
            return
        store, run_id = self._opened()
        left, num_sent = send_all(
            self.cursor.pending,
            store,
            run_id,
            run_dir=self.run_dir,
            parent_run=self._parent_run,
            refused=self._problem,
            failed=self._note,
        )
        self.num_artifacts += num_sent
        if not left:
            self._note(None, save=False)
        self.cursor.pending = left
        self._tried_pending = time.monotonic()
        self._save()

    def _parent_run(self, parent: Path) -> str | None:
        """The parent's run in the store; made from here if its own process may be long gone.

        One child at a time does that, and where a file system's locks do not reach other hosts,
        the makers settle. A parent that seemed to have ended runs again with its child.
        """
        cursor = Cursor.load(parent, self.target)
        if cursor.run_id is None or (cursor.status is not None and self._gone is not None):
            with shipping(parent, lambda: False) as held:
                if held:
                    above = Shipper(parent, self.target, self._connect, redact=self._redact)
                    above.run(max_failures=1)
        return Cursor.load(parent, self.target).run_id

    def _close(self) -> bool:
        """All lines are shipped: the rest of what was pending, then the status."""
        for delay in (0.0, 1.0, 2.0, 4.0):
            if self.cursor.pending:
                time.sleep(delay)
                self._ship_pending(last=True)
        store, run_id = self._opened()
        status = self.ended or self._unfinished
        if status is not None:
            store.set_status(run_id, status, self._last_time)
        elif self.cursor.status is not None:
            store.set_status(run_id, "RUNNING", None)
        self.cursor.status = status
        if self.cursor.creates > 1 or (self.run_dir / "arms").is_dir():
            store.drop_twins(self._start, run_id)
            self.cursor.creates = 1
        self._save()
        return not self.cursor.pending

    def _opened(self) -> tuple[Store, str]:
        assert self._store is not None
        assert self.cursor.run_id is not None
        return self._store, self.cursor.run_id

    def _save(self) -> None:
        if not self._replaced():  # `--restart` made room for another run, with a cursor of its own
            self.cursor.save(self.run_dir, self.target)

    def _replaced(self) -> bool:
        try:
            return self._journal.stat().st_ino != self._inode
        except FileNotFoundError:
            return True

    def _note(self, error: str | None, *, save: bool = True) -> None:
        """Record the store's last error: its first line; a database's goes on with its SQL."""
        error = None if error is None else first_line(self._redact(error))
        if error == self.cursor.error:
            return
        logger.warning("%s", error or "the store works again")
        self.cursor.error = error
        if save:
            self._save()

    def _problem(self, text: str) -> None:
        text = first_line(self._redact(text))
        logger.warning("left out: %s", text)
        self.problems.append(text)


# ---------------------------------------------------------------- what may wait

# An artifact, the parent or the model registry: none of them holds up the metrics.
Item = dict[str, str]


def items_of(record: dict[str, Any], first_config: str | None) -> Iterator[Item]:
    """What an event asks for that may wait.

    Args:
        record: the event.
        first_config: the recipe of the first attempt; another attempt's is kept beside it.

    Raises:
        KeyError: the event lacks a field.
    """
    event, fields = record["event"], record["fields"]
    if event == "start":
        if text := fields.get("config"):
            name = "config" if text == first_config else f"config-attempt-{record['attempt']}"
            yield {"text": str(text), "name": f"{name}.yaml"}
        if fields.get("parent"):
            yield {"parent": str(fields["parent"])}
    elif event == "artifact":
        yield {"path": str(fields["path"]), "folder": str(fields.get("folder", ""))}
    elif event == "register":
        yield {"register": str(fields["name"]), "folder": str(fields["folder"])}


def send_all(
    items: Sequence[Item],
    store: Store,
    run_id: str,
    *,
    run_dir: Path,
    parent_run: Callable[[Path], str | None],
    refused: Callable[[str], None],
    failed: Callable[[str], None],
) -> tuple[list[Item], int]:
    """Bring items into the store, as far as it can be done now.

    Args:
        items: of `items_of`, in order.
        store: where to.
        run_id: the run in the store.
        run_dir: the run directory.
        parent_run: from a run directory to its run in the store, None while it has none.
        refused: told of each item that will never get there.
        failed: told of each that may another time.

    Returns:
        What is left for another time, and how many files or folders were sent.
    """
    left: list[Item] = []
    num_sent = 0
    for item in items:
        kind = next(kind for kind in ("path", "name", "parent", "register") if kind in item)
        named = f"{kind} {item[kind]}" if kind in ("parent", "register") else item[kind]
        try:
            if kind == "path":
                store.upload(run_id, inside(run_dir, item["path"]), item["folder"])
            elif kind == "name":
                store.upload_text(run_id, item["text"], item["name"])
            elif kind == "register":
                if any(other.get("folder") == item["folder"] for other in left):
                    left.append(item)  # not before its files
                    continue
                store.register(run_id, item["register"], item["folder"])
            elif not (parent := parent_of(run_dir, item["parent"])).is_dir():
                raise RejectedError("its run directory is gone")
            elif parent_id := parent_run(parent):
                store.link_parent(run_id, parent_id)
            else:
                left.append(item)
                continue
            num_sent += kind in ("path", "name")
        except RejectedError as error:
            refused(f"{named}: {error}")
        except Exception as error:
            left.append(item)
            failed(f"{named}: {type(error).__name__}: {error}")
    return left, num_sent
