"""Samples of the machine under a run: processor, memory, disk, network, GPUs, the trainer itself.

psutil is needed, NVML (`pynvml`) is used if there. Only the main rank's host writes the journal,
since appends of several hosts to one file mix on a network file system: the others have a file
each.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from moored.tracking.journal import JOURNAL_NAME, Follower, Journal, read_journal

logger = logging.getLogger(__name__)

INTERVAL_SECONDS = 10.0


class Sampler:
    """A thread that hands a dict of metrics to `sink` every `interval` seconds, until stopped.

    Names are MLflow's where it has one (its UI draws them on a page of their own), so a gauge is
    in megabytes or per cent.

    Args:
        pid: the trainer, whose own share is reported beside the machine's.
        folder: a folder on the disk to watch.
        sink: called with each sample from the thread.
        interval: seconds between two samples.
    """

    def __init__(
        self,
        pid: int,
        folder: Path,
        sink: Callable[[dict[str, float]], None],
        interval: float = INTERVAL_SECONDS,
    ):
        self._pid, self._folder, self._sink, self._interval = pid, folder, sink, interval
        self._processes: dict[int, psutil.Process] = {}
        self._network: tuple[float, float, float] | None = None
        self._nvml = _nvml()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="system-metrics", daemon=True)

    def start(self) -> None:
        """Begin; the first sample comes after one interval (rates need two readings)."""
        self.sample()
        self._thread.start()

    def stop(self) -> None:
        """End; a sample in the making is waited for."""
        self._stop.set()
        self._thread.join(timeout=5.0)

    def _run(self) -> None:
        while not self._stop.wait(self._interval):
            try:
                self._sink(self.sample())
            except Exception as error:
                logger.warning("no system metrics any more: %s", error)
                return

    def sample(self) -> dict[str, float]:
        """One reading; rates are averages since the reading before."""
        memory = psutil.virtual_memory()
        disk = psutil.disk_usage(str(self._folder))
        values = {
            "system/cpu_utilization_percentage": psutil.cpu_percent(),
            "system/system_memory_usage_megabytes": memory.used / 1e6,
            "system/system_memory_usage_percentage": memory.percent,
            "system/disk_usage_percentage": disk.percent,
            "system/disk_available_megabytes": disk.free / 1e6,
        }
        values.update(self._network_rates())
        values.update(self._trainer())
        values.update(self._gpus())
        return values

    def _network_rates(self) -> Iterator[tuple[str, float]]:
        counters = psutil.net_io_counters()
        if counters is None:
            return
        now = (time.monotonic(), counters.bytes_recv / 1e6, counters.bytes_sent / 1e6)
        if self._network is not None and now[0] > self._network[0]:
            seconds, received, sent = (a - b for a, b in zip(now, self._network, strict=True))
            yield "system/network_receive_megabytes_per_second", received / seconds
            yield "system/network_transmit_megabytes_per_second", sent / seconds
        self._network = now

    def _trainer(self) -> Iterator[tuple[str, float]]:
        """The trainer and its children, this process left out; nothing once it is gone."""
        try:
            trainer = self._processes.get(self._pid) or psutil.Process(self._pid)
            family = [trainer, *trainer.children(recursive=True)]
        except psutil.Error:
            return
        # Kept from reading to reading: cpu_percent is a difference of two.
        known, me = self._processes, os.getpid()
        self._processes = {p.pid: known.get(p.pid, p) for p in family if p.pid != me}
        share = resident = 0.0
        for process in self._processes.values():
            with contextlib.suppress(psutil.Error), process.oneshot():
                share += process.cpu_percent()
                resident += process.memory_info().rss / 1e6
        yield "system/trainer_cpu_percentage", share
        yield "system/trainer_memory_usage_megabytes", resident

    def _gpus(self) -> Iterator[tuple[str, float]]:
        nvml = self._nvml
        if nvml is None:
            return
        for index in range(nvml.nvmlDeviceGetCount()):
            prefix = f"system/gpu_{index}"
            try:
                handle = nvml.nvmlDeviceGetHandleByIndex(index)
                memory = nvml.nvmlDeviceGetMemoryInfo(handle)
                yield f"{prefix}_memory_usage_megabytes", memory.used / 1e6
                yield f"{prefix}_memory_usage_percentage", 100.0 * memory.used / memory.total
                rates = nvml.nvmlDeviceGetUtilizationRates(handle)
                yield f"{prefix}_utilization_percentage", float(rates.gpu)
                yield f"{prefix}_power_usage_watts", nvml.nvmlDeviceGetPowerUsage(handle) / 1e3
                celsius = nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)
                yield f"{prefix}_temperature_celsius", float(celsius)
            except nvml.NVMLError:
                continue  # a MIG slice or an old card lacks some gauges


def _nvml() -> Any | None:
    """NVML, initialised, or None where there is no NVIDIA driver or no `pynvml`."""
    try:
        nvml: Any = importlib.import_module("pynvml")
        nvml.nvmlInit()
    except Exception:
        return None
    return nvml


# ---------------------------------------------------------------- a file of each machine's own

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
