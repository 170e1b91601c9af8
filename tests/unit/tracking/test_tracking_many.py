"""Tracking of many at once: several machines, many runs on one store, parents, and the registry.

How one run reaches MLflow is in test_tracking.py.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from distributed.runner import run_distributed
from moored.config import load_config
from moored.distributed.mesh import start_mesh
from moored.tracking import Tracker, journal, ships_later, sync_run
from moored.tracking import shipper as shipper_module
from moored.tracking.journal import (
    JOURNAL_NAME,
    Cursor,
    Journal,
    first_start,
    metrics,
    read_journal,
)
from moored.tracking.mlflow_store import MlflowStore
from moored.tracking.shipper import Shipper
from moored.tracking.sync import _Now, _unfinished
from moored.tracking.system_metrics import MachineFile, SampleCollector, host_in_names
from moored.training.lifecycle import open_run_on_all_ranks, start_tracking
from moored.utils.errors import UserError
from trackkit import Place, Server, eventually, free_port, train

CPU = "cpu_utilization_percentage"


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("MOORED_SHIP", raising=False)
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.4")


def asked(server: Server, path: str, **query: str) -> Any:
    """What MLflow's REST API answers."""
    url = f"{server.uri}/api/2.0/mlflow/{path}?{urllib.parse.urlencode(query)}"
    with urllib.request.urlopen(url, timeout=600) as answer:
        return json.load(answer)


def system_lines(path: Path) -> list[dict[str, Any]]:
    return [record for record in read_journal(path) if record["kind"] == "system"]


# -- several machines ---------------------------------------------------------------------------

# One rank of another machine: it is sampled until it finishes, or is killed.
NODE = """
import pathlib, sys
from moored.config import load_config
from moored.tracking import Tracker
folder = pathlib.Path(sys.argv[1])
tracker = Tracker.start(
    load_config(folder / "recipe.yaml"), folder / "runs/toy", attempt=1, is_main=False,
    machine=sys.argv[2],
)
print(tracker._sampler.pid, flush=True)
sys.stdin.readline()
tracker.finish("FINISHED")
"""


def start_node(place: Place, host: str) -> tuple[subprocess.Popen[str], int]:
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    node = subprocess.Popen([sys.executable, "-c", NODE, str(place.folder), host], **pipes)
    assert node.stdout is not None
    return node, int(node.stdout.readline())


def test_every_machine_is_sampled_into_the_one_run(place: Place, server: Server) -> None:
    config = place.config(uri=server.uri)
    tracker = Tracker.start(config, place.run_dir, attempt=1, machine="alpha")
    first = first_start(place.run_dir / JOURNAL_NAME)
    assert first is not None
    beta, beta_sampler = start_node(place, "beta.cluster")
    gamma, gamma_sampler = start_node(place, "ga mma/1")
    samples = place.run_dir / "logs" / "system"
    beta_file = samples / "beta.cluster.attempt-1.jsonl"
    gamma_file = samples / "ga_mma_1.attempt-1.jsonl"
    # It samples once it has stepped back.
    eventually(lambda: system_lines(beta_file))
    assert psutil.Process(beta_sampler).nice() == min(19, psutil.Process().nice() + 10)
    assert os.getsid(beta_sampler) == beta_sampler
    os.kill(beta_sampler, signal.SIGTERM)  # of a launcher that ends all at once: not for samplers
    eventually(lambda: len(system_lines(beta_file)) > 1 and len(system_lines(gamma_file)) > 1)
    gamma.kill()  # its sampler ends by itself
    eventually(lambda: not psutil.pid_exists(gamma_sampler))
    # A machine that went down in the middle of a line, and whose file is seen late.
    record = {"time": first["time"] + 7.5, "kind": "system", "step": 0, "attempt": 1}
    whole = json.dumps(record | {"values": {f"system/{CPU}": 12.5}})
    (samples / "delta.attempt-1.jsonl").write_text(f"{whole}\n{whole[:40]}\n{whole[:60]}")
    train(tracker, range(3))
    beta.communicate("finish\n")
    tracker.finish("FINISHED")

    assert not psutil.pid_exists(beta_sampler)
    run_id = Cursor.load(place.run_dir, server.uri).run_id or ""
    run = asked(server, "runs/get", run_id=run_id)["run"]
    assert run["info"]["status"] == "FINISHED"
    names = {metric["key"] for metric in run["data"]["metrics"]}
    hosts = {name.split("/")[1] for name in names if name.startswith("system/")}
    assert hosts == {"alpha", "beta.cluster", "ga_mma_1", "delta"}
    assert {f"system/{host}/{CPU}" for host in hosts} <= names
    assert "system/beta.cluster/trainer_memory_usage_megabytes" in names
    assert all(name.count("/") == 2 for name in names if name.startswith("system/"))

    def history(host: str) -> list[tuple[int, float]]:
        key = f"system/{host}/{CPU}"
        found = asked(server, "metrics/get-history", run_id=run_id, metric_key=key)["metrics"]
        return sorted((int(point.get("step", 0)), point["value"]) for point in found)

    for host, file in (("beta.cluster", beta_file), ("ga_mma_1", gamma_file)):
        steps = {int(line["time"] - first["time"]) for line in system_lines(file)}
        assert [step for step, _ in history(host)] == sorted(steps)
    assert history("delta") == [(7, 12.5)]
    assert 0 <= min(history("alpha"))[0] <= max(history("alpha"))[0] <= time.time() - first["time"]
    # The journal has it all, so that another store gets the same.
    assert {name for name in metrics(place.run_dir, "system") if name.endswith(CPU)} == {
        f"system/{host}/{CPU}" for host in hosts
    }
    assert (place.run_dir / "logs" / "mlflow.log").read_text() == ""


def test_a_collector_takes_each_sample_once_however_it_comes(tmp_path: Path) -> None:
    journal = Journal(tmp_path / JOURNAL_NAME)
    began = time.time() - 5
    collector = SampleCollector(tmp_path, journal, 2, began)
    assert collector.collect()  # no folder, no files: nothing is missing
    old = MachineFile(tmp_path, "a", 1)
    old.write({"system/x": 0.0})
    file = MachineFile(tmp_path, "a", 2)
    for value in (1.0, 2.0):
        file.write({"system/x": value})
    assert not collector.collect()
    again = SampleCollector(tmp_path, journal, 2, began)  # the process was killed: another goes on
    file.write({"system/x": 3.0})
    again.collect()
    late = MachineFile(tmp_path, "b", 2)
    late.write({"system/x": 4.0})
    file.close()
    assert not again.collect()
    threading.Timer(0.3, late.close).start()
    waited = time.monotonic()
    again.drain(600)
    assert 0.2 < time.monotonic() - waited < 300
    lines = system_lines(tmp_path / JOURNAL_NAME)
    assert [(line["host"], *line["values"].items()) for line in lines] == [
        ("a", ("system/a/x", 1.0)),
        ("a", ("system/a/x", 2.0)),
        ("a", ("system/a/x", 3.0)),
        ("b", ("system/b/x", 4.0)),
    ]
    assert all(line["step"] in (5, 6) and line["attempt"] == 2 for line in lines)
    again.drain(0)
    assert len(system_lines(tmp_path / JOURNAL_NAME)) == 4


@pytest.mark.parametrize(
    ("host", "named"),
    [("node-1.x_y", "node-1.x_y"), ("../etc", "_etc"), ("a b/c", "a_b_c"), ("..", "unnamed")],
)
def test_host_names_are_made_fit_for_files(host: str, named: str) -> None:
    assert host_in_names(host) == named


def _ranks(rank: int, world_size: int, folder: Path, hosts: list[str]) -> tuple[bool, bool]:
    """A run's tracking on ranks of several hosts: who samples, and who is the main one."""
    os.environ["MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL"] = "0.3"
    os.environ["MOORED_SHIP"] = "later"
    socket.gethostname = lambda: hosts[rank]
    mesh = start_mesh()
    run_dir = folder / "runs" / "toy"
    tracker = start_tracking(load_config(folder / "recipe.yaml"), run_dir, 1, mesh)
    if tracker._sampler is not None:
        of_rank = {0: run_dir / JOURNAL_NAME, 2: run_dir / "logs/system/two.attempt-1.jsonl"}
        eventually(lambda: system_lines(of_rank[rank]))
    mesh.world.barrier()
    tracker.finish("FINISHED")
    return tracker._sampler is not None, tracker._journal is None and mesh.is_main


def test_one_rank_samples_each_machine(place: Place) -> None:
    place.recipe()
    hosts = ["one", "one", "two", "two"]
    assert run_distributed(_ranks, 4, place.folder, hosts) == [
        (True, True),
        (False, False),
        (True, False),
        (False, False),
    ]
    names = {name for name in metrics(place.run_dir, "system") if name.endswith(CPU)}
    assert names == {f"system/one/{CPU}", f"system/two/{CPU}"}
    files = sorted(path.name for path in (place.run_dir / "logs" / "system").iterdir())
    assert files == ["one.log", "two.attempt-1.jsonl", "two.log"]
    assert not (place.run_dir / "mlflow.json").exists()
    # What a slow file system shows after the end is sent by `moored sync`.
    late = MachineFile(place.run_dir, "three", 1)
    late.write({f"system/{CPU}": 50.0})
    late.close()
    assert sync_run(place.run_dir, place.database).complete
    found = {name for name in place.run().data.metrics if name.endswith(CPU)}
    assert found == names | {f"system/three/{CPU}"}


# -- one writer per store -----------------------------------------------------------------------


def test_later_means_the_journal_only(
    place: Place, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MOORED_SHIP", "later")
    uri = f"http://me:canary-pass@127.0.0.1:{free_port()}"  # wins over a server, too
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with caplog.at_level(logging.INFO):
        tracker = Tracker.start(place.config(), place.run_dir, attempt=1)
    assert f"moored sync {place.run_dir}" in caplog.text
    assert "canary" not in caplog.text
    assert tracker.where == ""
    journal = place.run_dir / JOURNAL_NAME
    train(tracker, range(5))
    eventually(lambda: len(system_lines(journal)) > 1)
    began = time.monotonic()
    tracker.finish("FINISHED")
    assert time.monotonic() - began < 300  # it waits for nobody
    num_lines = len(journal.read_text().splitlines())
    time.sleep(1)
    assert len(journal.read_text().splitlines()) == num_lines  # nobody writes any more
    assert not list(place.run_dir.glob("mlflow.json")) + list(place.run_dir.glob("shipper.lock"))
    assert sync_run(place.run_dir, place.database).complete
    run = place.run()
    assert run.info.status == "FINISHED"
    assert f"system/{CPU}" in run.data.metrics
    assert [step for step, _ in place.history("train/loss")] == list(range(5))


@pytest.mark.parametrize("value", ["Later", "never", "1"])
def test_an_unknown_way_to_ship_is_refused_before_there_is_a_run(
    place: Place, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("MOORED_SHIP", value)
    unasked: Any = None
    for start in (
        ships_later,
        partial(Tracker.start, place.config(), place.run_dir, attempt=1),
        partial(
            open_run_on_all_ranks, unasked, place.config(), place.run_dir, unasked, restart=False
        ),
    ):
        with pytest.raises(UserError, match=f"MOORED_SHIP='{value}' is not known") as caught:
            start()
        assert "\n" not in str(caught.value)
    assert not place.run_dir.exists()


# -- parents ------------------------------------------------------------------------------------

# An element of a sweep, as a job of its own.
ARM = """
import pathlib, sys
from moored.config import load_config
from moored.tracking import Tracker
folder, name = pathlib.Path(sys.argv[1]), sys.argv[2]
sweep = folder / "runs/sweep"
config = load_config(folder / "recipe.yaml")
tracker = Tracker.start(config, sweep / "arms" / name, attempt=1, parent=sweep)
tracker.metrics(1, {"train/loss": 1.0})
print(flush=True)
sys.stdin.readline()
tracker.finish("FINISHED")
"""


def of_another_host(run_dir: Path) -> None:
    """Rewrite a journal of one start event, as if another host had written it long ago."""
    journal = run_dir / JOURNAL_NAME
    record = json.loads(journal.read_text())
    record["time"] -= 7200
    record["fields"]["host"] = "login-node"
    journal.write_text(json.dumps(record) + "\n")


def test_children_make_the_parent_that_nobody_ships(place: Place, server: Server) -> None:
    config = place.config(uri=server.uri, system_metrics=False, experiment="sweep")
    sweep = place.folder / "runs" / "sweep"
    names = ["a", "b", "c"]
    Tracker.declare(config, sweep, names)
    of_another_host(sweep)
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    command = [sys.executable, "-c", ARM, str(place.folder)]
    jobs = [subprocess.Popen([*command, name], **pipes) for name in names]
    client = place.client(server.uri)

    def runs() -> list[Any]:
        experiment = client.get_experiment_by_name("sweep")
        found = client.search_runs([experiment.experiment_id]) if experiment else []
        return sorted(found, key=lambda run: run.info.run_name)

    def linked() -> bool:
        return sum("mlflow.parentRunId" in run.data.tags for run in runs()) >= 1

    eventually(linked)
    assert [run.info.status for run in runs()] == ["RUNNING"] * 4
    for job in jobs:
        job.communicate("finish\n", timeout=600)
    parent, *children = runs()
    assert len(children) == 3
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent.info.run_id}
    assert [run.info.status for run in children] == ["FINISHED"] * 3
    assert parent.data.params["optim.learning_rate"] == "0.0002"
    assert parent.info.status == "RUNNING"  # until somebody looks
    assert sync_run(sweep).status == "FINISHED"
    assert [run.info.status for run in runs()] == ["FINISHED"] * 4


def test_a_sweep_has_the_parameters_that_its_arms_share(place: Place) -> None:
    configs = [
        place.config("regularizer.kind=none"),
        place.config("regularizer.weight=0.1"),
        place.config("regularizer.weight=0.3", "optim.learning_rate=1e-3"),
    ]
    sweep = place.folder / "runs" / "sweep"
    Tracker.declare(configs[0], sweep, ["none", "a", "b"], configs)
    start = first_start(sweep / JOURNAL_NAME)
    assert start is not None
    shared = start["fields"]["params"]
    assert (shared["train.steps"], shared["optim.schedule"]) == ("5", "cosine")
    assert not {"regularizer.kind", "regularizer.weight", "optim.learning_rate"} & shared.keys()


def test_makers_without_a_common_lock_settle_on_one_parent(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several hosts on a file system whose locks are each host's own: all make it at once."""
    monkeypatch.setattr(journal, "_flock", lambda descriptor: True)
    monkeypatch.setattr(shipper_module, "SETTLE_SECONDS", 1.5)
    config = place.config(mlflow=False)
    sweep, names = place.folder / "runs" / "sweep", ["a", "b", "c"]
    Tracker.declare(config, sweep, names)
    for name in names:
        tracker = Tracker.start(config, sweep / "arms" / name, attempt=1, parent=sweep)
        tracker.finish("FINISHED")
    uid = _Now.of(sweep).start["uid"]
    together = threading.Barrier(3, timeout=600)
    made: list[str] = []

    class Racing(MlflowStore):
        def create_run(self, start: dict[str, Any], began: float) -> str:
            if start["uid"] != uid:
                return super().create_run(start, began)
            together.wait()  # all have looked, and found none
            run_id = super().create_run(start, began)
            made.append(run_id)
            return run_id

    done: list[bool] = []

    def ship(name: str) -> None:
        connect = partial(Racing, place.database, sweep)
        shipper = Shipper(sweep / "arms" / name, place.database, connect)
        done.append(shipper.run(max_failures=5))

    threads = [threading.Thread(target=ship, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert done == [True] * 3
    assert len(set(made)) == 3
    runs = place.runs()
    [parent] = [run for run in runs if run.data.tags["moored.uid"] == uid]
    assert len(runs) == 4
    assert parent.info.run_id in made
    assert Cursor.load(sweep, place.database).run_id == parent.info.run_id
    links = [run.data.tags.get("mlflow.parentRunId") for run in runs if run is not parent]
    assert links == [parent.info.run_id] * 3


def test_a_parents_status_is_that_of_its_arms(place: Place) -> None:
    config, sweep = place.config(mlflow=False), place.folder / "runs" / "sweep"

    def status() -> str | None:
        return _unfinished(sweep, _Now.of(sweep))

    Tracker.declare(config, sweep, ["a", "b"])
    of_another_host(sweep)
    assert status() is None  # all are still to come
    a, b = (Tracker.start(config, sweep / "arms" / n, attempt=1, parent=sweep) for n in "ab")
    assert status() is None
    a.finish("FINISHED")
    assert status() is None
    b.finish("FAILED")
    assert status() == "FAILED"
    again = Tracker.start(config, sweep / "arms" / "b", attempt=2, parent=sweep)
    assert status() is None
    again.finish("FINISHED")
    assert status() == "FINISHED"
    # A comparison is one process with its arms: once that is gone, all of it is.
    alone = place.folder / "runs" / "alone"
    Tracker.start(config, alone, attempt=1)
    assert _unfinished(alone, _Now.of(alone)) is None
    of_another_host(alone)
    assert _unfinished(alone, _Now.of(alone)) == "KILLED"


def test_a_parent_that_seemed_ended_runs_again_with_its_child(place: Place) -> None:
    config, sweep = place.config(mlflow=False), place.folder / "runs" / "sweep"
    Tracker.declare(config, sweep, ["a"])
    arm = sweep / "arms" / "a"
    Tracker.start(config, arm, attempt=1, parent=sweep).finish("KILLED")
    parent = sync_run(sweep, place.database)
    assert parent.status == "FAILED"
    assert sync_run(arm, place.database).complete
    client = place.client()
    assert client.get_run(parent.run_id).info.status == "FAILED"  # a sync of an arm revives none
    again = Tracker.start(config, arm, attempt=2, parent=sweep)
    store = partial(MlflowStore, place.database, arm)
    going: list[bool] = []
    until = time.monotonic() + 600

    def gone() -> bool:
        going.append(client.get_run(parent.run_id).info.status == "RUNNING")
        return going[-1] or time.monotonic() > until

    assert Shipper(arm, place.database, store, trainer_gone=gone, attempt=2).run()
    assert going[0] is False
    assert going[-1] is True
    again.finish("FINISHED")
    assert sync_run(sweep, place.database).status == "FINISHED"
    assert client.get_run(parent.run_id).info.status == "FINISHED"


# -- the model registry -------------------------------------------------------------------------


def with_adapter(place: Place, tracker: Tracker) -> None:
    (place.run_dir / "adapter").mkdir(exist_ok=True)
    (place.run_dir / "adapter" / "adapter_config.json").write_text("{}")
    tracker.artifact(place.run_dir / "adapter", "adapter")
    tracker.register("adapter")


def test_the_adapter_becomes_one_version_of_the_registered_model(
    place: Place, server: Server
) -> None:
    track: Any = {"uri": server.uri, "system_metrics": False, "register_model": "slurm writer"}
    first = Tracker.start(place.config(**track), place.run_dir, attempt=1)
    with_adapter(place, first)
    first.finish("FAILED", timeout=600)
    second = Tracker.start(place.config(**track), place.run_dir, attempt=2)
    with_adapter(place, second)
    second.finish("FINISHED")
    (place.run_dir / "mlflow.json").unlink()
    assert sync_run(place.run_dir).complete
    client = place.client(server.uri)
    [version] = client.search_model_versions("name = 'slurm writer'")
    run_id = Cursor.load(place.run_dir, server.uri).run_id
    run = client.get_run(run_id)
    assert (version.run_id, version.version, version.status) == (run_id, "1", "READY")
    assert version.source == f"{run.info.artifact_uri}/adapter"
    assert version.tags == {"moored.uid": run.data.tags["moored.uid"], "moored.run": "toy"}
    # Another run is another version; without the option there is none.
    for name, model in (("other", "slurm writer"), ("none", None)):
        place.run_dir = place.folder / "runs" / name
        config = place.config(**track | {"register_model": model})
        tracker = Tracker.start(config, place.run_dir, attempt=1)
        with_adapter(place, tracker)
        tracker.finish("FINISHED")
    versions = client.search_model_versions("name = 'slurm writer'")
    assert sorted(version.version for version in versions) == ["1", "2"]


def test_a_registry_that_refuses_is_a_problem_and_no_failure(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = place.config(system_metrics=False, register_model="m")
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", "nonsense://nowhere")
    tracker = Tracker.start(config, place.run_dir, attempt=1)
    with_adapter(place, tracker)
    tracker.finish("FINISHED")
    run = place.run()
    assert run.info.status == "FINISHED"
    assert place.is_shipped()
    said = (place.run_dir / "logs" / "mlflow.log").read_text()
    assert "left out: register m: " in said
    assert "Model Registry features are not supported" in said
    assert sync_run(place.run_dir).complete


def test_a_version_waits_for_its_files(place: Place) -> None:
    config = place.config(mlflow=False)
    track = config.track.model_copy(update={"register_model": "m"})
    config = config.model_copy(update={"track": track})
    tracker = Tracker.start(config, place.run_dir, attempt=1)
    with_adapter(place, tracker)
    tracker.finish("FINISHED")
    told: list[str] = []

    class Late(MlflowStore):
        def upload(self, run_id: str, path: Path, folder: str) -> None:
            told.append("upload")
            if len(told) < 3:
                raise ConnectionError("no answer")
            super().upload(run_id, path, folder)

        def register(self, run_id: str, name: str, folder: str) -> None:
            told.append("register")
            super().register(run_id, name, folder)

    assert Shipper(place.run_dir, "x", partial(Late, place.database, place.run_dir)).run()
    assert told == ["upload"] * 3 + ["register"]
    assert len(place.client().search_model_versions("name = 'm'")) == 1
