"""Samples of the machine under a run: processor, memory, disk, network, GPUs, the trainer itself.

Where the samples go is the caller's matter; psutil is needed, NVML (`pynvml`) is used if there.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

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
