"""The processes beside a trainer, seen from the trainer: how they are started, kept and awaited.

What they do there is `sidecar.py`'s matter.
"""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from moored.tracking.journal import JOURNAL_NAME, Cursor
from moored.tracking.provenance import address
from moored.tracking.system_metrics import FOLDER

logger = logging.getLogger(__name__)

URI_VARIABLE = "MOORED_TRACKING_URI"
COMPLETE, INCOMPLETE, STOPPED = 0, 3, 4  # exit codes; any other is a death
MAX_RESTARTS = 3
SAY_SECONDS = 5.0
FAILING_SECONDS = 15.0  # of waiting for a store that does not work
SAMPLER_SECONDS = 5.0  # of waiting for a sampler's last words


class _Sidecar:
    """A process of our own on this machine; never more than a `fork` and an `exec` to the caller.

    Args:
        run_dir: the run directory.
        role: `ship`, `sample` or `machine`; see `sidecar.py`.
        attempt: of the run.
        options: further arguments.
        log: what it says is appended to this file of the run directory.
        environment: what it gets beside the trainer's own, unseen by other users.
    """

    _stdin = subprocess.DEVNULL

    def __init__(
        self,
        run_dir: Path,
        role: str,
        attempt: int,
        *options: str,
        log: Path,
        environment: Mapping[str, str] | None = None,
    ):
        self._run_dir, self._log = run_dir.absolute(), log
        self._environment = dict(environment or {})
        # -P: a folder `mlflow` or `datasets` in the working directory is not the package.
        self._command = [sys.executable, "-P", "-m", "moored.tracking", role, str(self._run_dir)]
        self._command += ["--trainer", str(os.getpid()), "--attempt", str(attempt), *options]
        self._process: subprocess.Popen[bytes] | None = None
        self._num_restarts = 0
        self._start()

    @property
    def pid(self) -> int | None:
        """Process id; None if it could not be started."""
        return None if self._process is None else self._process.pid

    def _start(self) -> None:
        environment = dict(os.environ) | self._environment
        package = str(Path(__file__).resolve().parents[2])
        inherited = environment.get("PYTHONPATH")
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [package, inherited]))
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        path = self._run_dir / self._log
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            log = os.open(path, flags, 0o600)
        except OSError as error:
            logger.warning("no log of the process beside the trainer (%s)", error)
            log = os.open(os.devnull, os.O_WRONLY)
        try:
            self._process = subprocess.Popen(
                self._command,
                stdin=self._stdin,
                stdout=log,
                stderr=log,
                env=environment,
                close_fds=True,  # the trainer's sockets must close when the trainer ends
                start_new_session=True,  # Ctrl-C is for the trainer, which then says how it ended
            )
        except OSError as error:
            logger.warning("%s: not started (%s)", " ".join(self._command[3:5]), error)
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

    def _end(self) -> None:
        """It may be cut anywhere: files are appended to by lines, requests may be repeated."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()


class ShipperProcess(_Sidecar):
    """One run's shipper.

    Args:
        run_dir: the run directory.
        uri: the store's address; it may hold a password, so it goes through the environment,
            which only the owner of the process can read.
        attempt: of the run.
        system_metrics: whether the process samples the machine, too.
        host: of this machine, in a run over several.
    """

    def __init__(
        self,
        run_dir: Path,
        uri: str,
        attempt: int,
        *,
        system_metrics: bool,
        host: str | None = None,
    ):
        self._uri = uri
        options = ["--system-metrics"] if system_metrics else []
        options += [] if host is None else ["--host", host]
        log, secret = Path("logs") / "mlflow.log", {URI_VARIABLE: uri}
        super().__init__(run_dir, "ship", attempt, *options, log=log, environment=secret)

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
        self._end()
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


class SamplerProcess(_Sidecar):
    """Samples a machine that has no shipper; no store is known to it.

    Args:
        run_dir: the run directory.
        attempt: of the run.
        host: of this machine, in a run over several.
        is_main: whether this is the machine whose samples go into the journal at once.
    """

    _stdin = subprocess.PIPE  # signals are ignored there: they are the trainer's

    def __init__(self, run_dir: Path, attempt: int, host: str | None, *, is_main: bool):
        role, options = "sample" if is_main else "machine", [] if host is None else ["--host", host]
        log = FOLDER / f"{host or 'sampler'}.log"
        super().__init__(run_dir, role, attempt, *options, log=log)

    def stop(self, seconds: float = SAMPLER_SECONDS) -> None:
        """Let it write what it has, and end."""
        if self._process is None:
            return
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.write(b"stop\n")  # a mere end is not seen if a fork holds it, too
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)
        self._end()
