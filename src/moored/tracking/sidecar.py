"""The processes beside a trainer: one that ships its journal, one that samples a machine.

How a journal is shipped is `shipper.py`'s matter; who starts these, and why, is `tracker.py`'s.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from moored.tracking.journal import JOURNAL_NAME, Journal, first_start, shipping
from moored.tracking.mlflow_store import MlflowStore
from moored.tracking.provenance import address, scrub
from moored.tracking.shipper import Shipper
from moored.tracking.start_sidecar import COMPLETE, INCOMPLETE, STOPPED, URI_VARIABLE
from moored.tracking.store import StopError
from moored.tracking.system_metrics import (
    INTERVAL_SECONDS,
    LAST_SECONDS,
    MachineFile,
    SampleCollector,
    Sampler,
    of_host,
)

DRAIN_SECONDS = 60.0  # of trying on, once the trainer is gone
POLL_SECONDS = 0.5
NICE = 10


class _Scrubbing:
    """A text stream that keeps secrets out of what libraries print."""

    def __init__(self, stream: TextIO, uri: str):
        self._stream, self._uri = stream, uri

    def write(self, text: str) -> int:
        return self._stream.write(scrub(text, self._uri))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _Trainer:
    """The process that started this one."""

    def __init__(self, pid: int):
        self.pid = pid
        self.gone_since: float | None = None

    def gone(self) -> bool:
        """Whether it has ended."""
        if self.gone_since is None and os.getppid() != self.pid:
            self.gone_since = time.monotonic()
        return self.gone_since is not None

    def gone_long(self) -> bool:
        """Whether it has ended so long ago that nothing is worth waiting for."""
        return self.gone() and time.monotonic() - (self.gone_since or 0.0) >= DRAIN_SECONDS

    def wait(self) -> None:
        """Until it says stop, or is gone."""
        while not self.gone() and not select.select([0], [], [], POLL_SECONDS)[0]:
            pass


def main(argv: Sequence[str] | None = None) -> int:
    """A process beside a trainer, which ends by itself once its trainer has finished or is gone.

    `ship` follows the journal, and samples the machine if asked to. `sample` only samples: into
    the journal; `machine` into a file of its machine's own.
    """
    parser = argparse.ArgumentParser(prog="python -m moored.tracking")
    parser.add_argument("role", choices=["ship", "sample", "machine"])
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--trainer", type=int, required=True)
    parser.add_argument("--attempt", type=int, required=True)
    parser.add_argument("--host")
    parser.add_argument("--system-metrics", action="store_true")
    options = parser.parse_args(argv)
    uri = os.environ.pop(URI_VARIABLE, "")
    _step_back()
    sys.stdout = sys.stderr = _Scrubbing(sys.stderr, uri)
    logging.basicConfig(format="%(asctime)s %(name)s %(message)s", stream=sys.stderr)
    trainer = _Trainer(options.trainer)
    where = (options.run_dir, trainer, options.attempt, options.host)
    if options.role == "machine":
        with _sampling_apart(*where):
            trainer.wait()
        return COMPLETE
    if options.role == "sample":
        with _sampling(*where):
            trainer.wait()
        return COMPLETE
    sampling = _sampling(*where) if options.system_metrics else contextlib.nullcontext(_nothing)
    with sampling as stop_sampling:
        return _ship(options.run_dir, uri, trainer, options.attempt, stop_sampling)


def _ship(
    run_dir: Path, uri: str, trainer: _Trainer, attempt: int, stop_sampling: Callable[[], None]
) -> int:
    with shipping(run_dir, lambda: not trainer.gone_long()) as held:
        if not held:
            return INCOMPLETE
        try:
            shipper = Shipper(
                run_dir,
                address(uri),
                partial(MlflowStore, uri, run_dir),
                redact=partial(scrub, uri=uri),
                trainer_gone=trainer.gone,
                attempt=attempt,
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


def _interval() -> float:
    return float(os.environ.get("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL") or INTERVAL_SECONDS)


@contextlib.contextmanager
def _sampling(
    run_dir: Path, trainer: _Trainer, attempt: int, host: str | None
) -> Iterator[Callable[[], None]]:
    """Append system metrics to the journal; their step is seconds since the run began.

    In a run over several machines (`host` is given) what the others wrote is brought, too.
    Yields what stops it early.
    """
    first = first_start(run_dir / JOURNAL_NAME)
    if first is None:
        yield _nothing
        return
    journal, began = Journal(run_dir / JOURNAL_NAME), first["time"]
    others = None if host is None else SampleCollector(run_dir, journal, attempt, began)

    def write(values: dict[str, float]) -> None:
        now = time.time()
        if not trainer.gone():
            line = {"time": now, "kind": "system", "step": int(now - began), "attempt": attempt}
            journal.write(line | {"values": of_host(values, host)})
            if others is not None:
                others.collect()

    sampler = Sampler(trainer.pid, run_dir, write, _interval())
    sampler.start()

    def stop() -> None:
        sampler.stop()
        if others is not None:
            others.drain(LAST_SECONDS)

    try:
        yield stop
    finally:
        stop()
        journal.close()


@contextlib.contextmanager
def _sampling_apart(run_dir: Path, trainer: _Trainer, attempt: int, host: str) -> Iterator[None]:
    """Append system metrics to the machine's own file."""
    file = MachineFile(run_dir, host, attempt)
    sampler = Sampler(trainer.pid, run_dir, file.write, _interval())
    sampler.start()
    try:
        yield
    finally:
        sampler.stop()
        file.close()
