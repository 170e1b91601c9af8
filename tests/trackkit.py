"""What tests of tracking share: a folder with a recipe and a store, and a real MLflow server."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import yaml

from moored.config import Config, load_config
from moored.tracking import Tracker
from moored.tracking.journal import Cursor, shipping
from moored.tracking.mlflow_store import MlflowStore
from moored.tracking.provenance import address

# After which a test gives up: never the reason on a slow machine.
LONG_SECONDS = 600.0


class Place:
    """A folder with a recipe and a ready store."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.run_dir = folder / "runs" / "toy"
        self.database = f"sqlite:///{folder}/runs/mlflow.db"

    def recipe(self, **track: Any) -> Path:
        recipe = {
            "name": "toy",
            "model": {"name_or_path": "somewhere"},
            "data": {"train": [{"path": "data.jsonl"}]},
            "train": {"steps": 5, "global_batch_sequences": 4},
            "track": track,
            "output": {"dir": "runs"},
        }
        path = self.folder / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe))
        return path

    def config(self, *overrides: str, **track: Any) -> Config:
        return load_config(self.recipe(**track), overrides)

    def runs(self, uri: str | None = None) -> list[Any]:
        client = self.client(uri)
        experiment = client.get_experiment_by_name("moored")
        return client.search_runs([experiment.experiment_id])

    def run(self, uri: str | None = None) -> Any:
        [run] = self.runs(uri)
        return run

    def client(self, uri: str | None = None) -> Any:
        return MlflowStore(uri or self.database, self.run_dir)._client

    def history(self, name: str, uri: str | None = None) -> list[tuple[int, float]]:
        """Every point of a metric of the run of this journal, repeated ones too."""
        run_id = Cursor.load(self.run_dir, address(uri or self.database)).run_id
        found = self.client(uri).get_metric_history(run_id, name)
        return sorted((metric.step, metric.value) for metric in found)

    def is_shipped(self) -> bool:
        offset = Cursor.load(self.run_dir, self.database).offset
        return offset == (self.run_dir / "journal.jsonl").stat().st_size

    def is_let_go(self) -> bool:
        """Whether no process holds the shipper's lock; one that was killed does for a moment."""
        with shipping(self.run_dir, lambda: False) as held:
            return held

    def shipper_pid(self) -> int:
        def pid() -> int:
            text = (self.run_dir / "shipper.lock").read_text().split()
            return int(text[0]) if text and psutil.pid_exists(int(text[0])) else 0

        return eventually(pid)


def eventually(condition: Callable[[], Any]) -> Any:
    """The first true result; a file that is not there yet counts as false."""
    until = time.monotonic() + LONG_SECONDS
    while True:
        try:
            result = condition()
        except (FileNotFoundError, psutil.Error):
            result = None
        if result or time.monotonic() > until:
            assert result
            return result
        time.sleep(0.05)


def train(tracker: Tracker, steps: range, **more: float) -> float:
    """Log some steps; returns the longest time that a call took."""
    longest = 0.0
    for step in steps:
        began = time.perf_counter()
        tracker.metrics(step, {"train/loss": 1.0 / (step + 1), "step": step} | more)
        longest = max(longest, time.perf_counter() - began)
    return longest


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


class Server:
    """A real `mlflow server`, with all its processes in a group of their own."""

    def __init__(self, folder: Path, database: Path):
        self.folder, self.port = folder, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        shutil.copy(database, folder / "server.db")
        self.start()

    def start(self) -> None:
        environment = dict(os.environ)
        environment["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"
        environment["MLFLOW_DISABLE_TELEMETRY"] = "true"
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1"]
        command += ["--port", str(self.port), "--workers", "1"]
        command += ["--backend-store-uri", f"sqlite:///{self.folder}/server.db"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        with open(self.folder / "server.log", "ab") as log:
            self.process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        eventually(self.answers)

    def answers(self) -> bool:
        try:
            return urllib.request.urlopen(f"{self.uri}/health", timeout=5).status == 200
        except (urllib.error.URLError, OSError):
            return False

    def signal(self, number: int) -> None:
        os.killpg(self.process.pid, number)
        if number == signal.SIGKILL:
            self.process.wait()
