"""The shipper as a process beside the trainer: how it is started, kept and awaited, and its main.

How a journal is shipped is `shipper.py`'s matter.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from moored.track.cursor import Cursor, shipping
from moored.track.journal import JOURNAL_NAME, Journal, first_start
from moored.track.mlflow_store import MlflowStore
from moored.track.provenance import address, scrub
from moored.track.shipper import Shipper
from moored.track.store import StopError
from moored.track.system_metrics import INTERVAL_SECONDS, Sampler

logger = logging.getLogger(__name__)

URI_VARIABLE = "MOORED_TRACKING_URI"
COMPLETE, INCOMPLETE, STOPPED = 0, 3, 4  # exit codes; any other is a death
MAX_RESTARTS = 3
SAY_SECONDS = 5.0
FAILING_SECONDS = 15.0  # of waiting for a store that does not work
DRAIN_SECONDS = 60.0  # of trying on, once the trainer is gone
NICE = 10


class ShipperProcess:
    """One run's shipper; never more than a `fork` and an `exec` on the caller's time.

    Args:
        run_dir: the run directory.
        uri: the store's address; it may hold a password, so it goes through the environment,
            which only the owner of the process can read.
        attempt: of the run.
        system_metrics: whether the process samples the machine, too.
    """

    def __init__(self, run_dir: Path, uri: str, attempt: int, *, system_metrics: bool):
        self._run_dir, self._uri = run_dir.absolute(), uri
        # -P: a folder `mlflow` or `datasets` in the working directory is not the package.
        self._command = [sys.executable, "-P", "-m", "moored.track", str(self._run_dir)]
        self._command += ["--trainer", str(os.getpid()), "--attempt", str(attempt)]
        self._command += ["--system-metrics"] if system_metrics else []
        self._process: subprocess.Popen[bytes] | None = None
        self._num_restarts = 0
        self._start()

    @property
    def pid(self) -> int | None:
        """Process id; None if it could not be started."""
        return None if self._process is None else self._process.pid

    def _start(self) -> None:
        environment = dict(os.environ) | {URI_VARIABLE: self._uri}
        package = str(Path(__file__).resolve().parent.parent)
        inherited = environment.get("PYTHONPATH")
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [package, inherited]))
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            (self._run_dir / "logs").mkdir(exist_ok=True, mode=0o700)
            log = os.open(self._run_dir / "logs" / "mlflow.log", flags, 0o600)
        except OSError as error:
            logger.warning("the shipper to MLflow has no log (%s)", error)
            log = os.open(os.devnull, os.O_WRONLY)
        try:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                close_fds=True,  # the trainer's sockets must close when the trainer ends
                start_new_session=True,  # Ctrl-C is for the trainer, which then says how it ended
            )
        except OSError as error:
            logger.warning("no shipper to MLflow (%s): the journal is kept all the same", error)
        finally:
            os.close(log)

    def keep(self) -> bool:
        """Start the process again if it was killed; False once that happened too often."""
        if self._process is None:
            return False
        if self._process.poll() in (None, COMPLETE, INCOMPLETE, STOPPED):
            return True
        if self._num_restarts >= MAX_RESTARTS:
            return False
        self._num_restarts += 1
        self._start()
        return True

    def wait(self, seconds: float) -> bool:
        """Wait for the process to deliver everything; whether it did. It is ended if it is late."""
        began, say_at = time.monotonic(), SAY_SECONDS / 2
        while self.keep() and (waited := time.monotonic() - began) < seconds:
            assert self._process is not None
            code = self._process.poll()
            if code in (COMPLETE, INCOMPLETE, STOPPED):
                return code == COMPLETE
            if waited >= FAILING_SECONDS and Cursor.load(self._run_dir, address(self._uri)).error:
                break  # it will not answer now: the journal has everything
            if waited >= say_at:
                say_at = waited + SAY_SECONDS
                logger.info("waiting up to %.0f s more for MLflow: %s", seconds - waited, self)
            time.sleep(0.05)
        if self._process is not None and self._process.poll() is None:
            self._process.kill()  # every request of it may be repeated: it may be cut anywhere
            self._process.wait()
        return False

    def __str__(self) -> str:
        """Where to, how far, and what the store said last."""
        target = address(self._uri)
        cursor = Cursor.load(self._run_dir, target)
        text = f"{target} has {100 * self._shipped(cursor):.0f} % of the journal"
        return f"{text} ({cursor.error})" if cursor.error else text

    def _shipped(self, cursor: Cursor) -> float:
        with contextlib.suppress(OSError):
            return cursor.offset / max(1, (self._run_dir / JOURNAL_NAME).stat().st_size)
        return 0.0


class _Scrubbing:
    """A text stream that keeps secrets out of what libraries print."""

    def __init__(self, stream: TextIO, uri: str):
        self._stream, self._uri = stream, uri

    def write(self, text: str) -> int:
        return self._stream.write(scrub(text, self._uri))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def main(argv: Sequence[str] | None = None) -> int:
    """The shipper process: follows a journal until its trainer has finished, or is gone."""
    parser = argparse.ArgumentParser(prog="python -m moored.track")
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--trainer", type=int, required=True)
    parser.add_argument("--attempt", type=int, required=True)
    parser.add_argument("--system-metrics", action="store_true")
    options = parser.parse_args(argv)
    uri = os.environ.pop(URI_VARIABLE)
    _step_back()
    sys.stdout = sys.stderr = _Scrubbing(sys.stderr, uri)
    logging.basicConfig(format="%(asctime)s %(name)s %(message)s", stream=sys.stderr)
    run_dir: Path = options.run_dir
    orphaned: list[float] = []

    def gone() -> bool:
        if os.getppid() != options.trainer and not orphaned:
            orphaned.append(time.monotonic())
        return bool(orphaned)

    def may_wait() -> bool:
        return not gone() or time.monotonic() - orphaned[0] < DRAIN_SECONDS

    with contextlib.ExitStack() as stack:
        stop_sampling = _nothing
        if options.system_metrics:
            sampling = _sampling(run_dir, options.trainer, options.attempt, gone)
            stop_sampling = stack.enter_context(sampling)
        if not stack.enter_context(shipping(run_dir, may_wait)):
            return INCOMPLETE
        try:
            shipper = Shipper(
                run_dir,
                address(uri),
                partial(MlflowStore, uri, run_dir),
                redact=partial(scrub, uri=uri),
                trainer_gone=gone,
                attempt=options.attempt,
                unfinished="KILLED",
                drain_seconds=DRAIN_SECONDS,
                before_close=stop_sampling,
            )
            return COMPLETE if shipper.run() else INCOMPLETE
        except StopError:
            return STOPPED


def _step_back() -> None:
    """Make room for the trainer, and leave it to the trainer to react to signals."""
    os.umask(0o077)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(OSError):
        os.nice(NICE)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("500")


def _nothing() -> None:
    pass


@contextlib.contextmanager
def _sampling(
    run_dir: Path, trainer: int, attempt: int, gone: Callable[[], bool]
) -> Iterator[Callable[[], None]]:
    """Append system metrics to the journal; their step is seconds since the run began.

    Yields what stops it early.
    """
    first = first_start(run_dir / JOURNAL_NAME)
    if first is None:
        yield _nothing
        return
    journal = Journal(run_dir / JOURNAL_NAME)

    def write(values: dict[str, float]) -> None:
        now = time.time()
        if not gone():
            line = {"time": now, "kind": "system", "step": int(now - first["time"])}
            journal.write(line | {"attempt": attempt, "values": values})

    interval = os.environ.get("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "")
    sampler = Sampler(trainer, run_dir, write, float(interval or INTERVAL_SECONDS))
    sampler.start()
    try:
        yield sampler.stop
    finally:
        sampler.stop()
        journal.close()
