"""What tracking costs: a call of the trainer, shipping to SQLite and to a server, an outage.

    python benchmarks/track.py [--no-server]

Starts a real `mlflow server` on loopback, stops it in the middle, and ends it.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import psutil

from moored.config import load_config
from moored.tracking import Tracker, sync
from moored.tracking.journal import Cursor, lock_holder
from moored.tracking.mlflow_store import MlflowStore
from moored.tracking.shipper import Shipper

RECIPE = """
name: bench
model: {name_or_path: none}
data: {train: [{path: none.jsonl}]}
train: {steps: 1, global_batch_sequences: 1}
output: {dir: runs}
"""
NAMES = [f"train/metric_{k}" for k in range(10)]


def log(tracker: Tracker, steps: range, pause: float = 0.0) -> list[float]:
    costs = []
    for step in steps:
        values = {name: step / 7 for name in NAMES}
        began = time.perf_counter()
        tracker.metrics(step, values)
        costs.append(time.perf_counter() - began)
        time.sleep(pause)
    return costs


def say(what: str, costs: list[float]) -> None:
    micro = sorted(cost * 1e6 for cost in costs)
    median, late = statistics.median(micro), micro[int(len(micro) * 0.99)]
    print(f"{what}: median {median:.0f} us, 99 % below {late:.0f} us, most {micro[-1]:.0f} us")


def timed(what: str, action) -> None:
    began = time.perf_counter()
    result = action()
    print(f"{what}: {time.perf_counter() - began:.2f} s" + (f" ({result})" if result else ""))


def start_server(folder: Path) -> tuple[subprocess.Popen, str]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--workers", "1"]
    command += ["--port", str(port), "--backend-store-uri", f"sqlite:///{folder}/server.db"]
    command += ["--artifacts-destination", str(folder / "artifacts")]
    environment = dict(os.environ, MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false")
    with open(folder / "server.log", "wb") as output:
        server = subprocess.Popen(
            command, env=environment, stdout=output, stderr=output, start_new_session=True
        )
    while True:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).close()
            return server, f"http://127.0.0.1:{port}"
        except OSError:
            time.sleep(0.2)


def ship(run_dir: Path, uri: str, what: str) -> None:
    timed(f"{what}, open the store", lambda: MlflowStore(uri, run_dir) and None)
    shipper = Shipper(run_dir, uri, lambda: MlflowStore(uri, run_dir))
    timed(f"{what}, ship the run", lambda: shipper.run(max_failures=3) and None)
    print(f"    {shipper.num_points} points")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--no-server", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "recipe.yaml").write_text(RECIPE)
        config = load_config(folder / "recipe.yaml")

        quiet = config.model_copy(
            update={"track": config.track.model_copy(update={"mlflow": False})}
        )
        tracker = Tracker.start(quiet, folder / "plain", attempt=1)
        say("metrics(), 10 values, no shipper", log(tracker, range(100)))
        tracker.finish("FINISHED")
        ship(folder / "plain", f"sqlite:///{folder}/plain.db", "1,000 points to sqlite")

        began = time.perf_counter()
        tracker = Tracker.start(config, folder / "live", attempt=1)
        print(f"Tracker.start: {time.perf_counter() - began:.3f} s")
        say("metrics(), shipper starting up", log(tracker, range(500), pause=0.01))
        while Cursor.load(folder / "live", f"sqlite:///{folder}/runs/mlflow.db").offset == 0:
            time.sleep(0.1)
        process = psutil.Process(int(lock_holder(folder / "live").split()[0]))
        say("metrics(), shipper at work", log(tracker, range(500, 1500), pause=0.01))
        times, memory = process.cpu_times(), process.memory_info().rss / 1e6
        print(f"shipper: {times.user + times.system:.1f} s of processor, {memory:.0f} MB resident")
        timed("finish(), sqlite", lambda: tracker.finish("FINISHED"))

        if options.no_server:
            return
        server, uri = start_server(folder)
        try:
            ship(folder / "plain", uri, "1,000 points to a server")
            remote = config.track.model_copy(update={"uri": uri})
            remote = config.model_copy(update={"track": remote})
            tracker = Tracker.start(remote, folder / "remote", attempt=1)
            log(tracker, range(100))
            while Cursor.load(folder / "remote", uri).offset == 0:
                time.sleep(0.1)
            os.killpg(server.pid, signal.SIGSTOP)
            say("metrics(), server stopped", log(tracker, range(100, 1100), pause=0.01))
            timed("finish(timeout=5), server stopped", lambda: tracker.finish("FINISHED", 5))
            os.killpg(server.pid, signal.SIGCONT)
            timed("sync() afterwards", lambda: sync(folder / "remote"))
            timed("sync() again", lambda: sync(folder / "remote"))
        finally:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


if __name__ == "__main__":
    main()
