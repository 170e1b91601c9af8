"""Tracking into a real MLflow: SQLite stores and a real server on loopback, well and ill.

The shipper's care for single points is in test_shipper.py, the journal's for lines in
test_journal.py.
"""

from __future__ import annotations

import http.server
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from moored.config import load_config
from moored.tracking import Tracker, provenance, sync_run
from moored.tracking.journal import Cursor, metrics, shipping
from moored.tracking.mlflow_store import MlflowStore
from moored.tracking.provenance import params, tracking_uri
from moored.tracking.shipper import Shipper
from moored.tracking.store import RejectedError, StopError
from moored.utils.errors import UserError
from trackkit import LONG_SECONDS, Place, Server, eventually, free_port, train

# Far above an append to a file (tens of microseconds), far below any wait for a server.
SLOW_SECONDS = 5.0
BOUND_SECONDS = 240.0  # of a wait that would have no end if it had no bound


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.5")


# A trainer as a process of its own, to be killed: it logs steps until it is told to end.
TRAINER = """
import sys, time, pathlib, socket
from moored.config import load_config
from moored.tracking import Tracker
folder, attempt, first, last = pathlib.Path(sys.argv[1]), *map(int, sys.argv[2:5])
listener = socket.create_server(("127.0.0.1", 0))
listener.set_inheritable(True)
tracker = Tracker.start(load_config(folder / "recipe.yaml"), folder / "runs/toy", attempt=attempt)
for step in range(first, last):
    tracker.metrics(step, {"train/loss": 1.0 / (step + 1), "step": step})
print(listener.getsockname()[1], flush=True)
if "finish" in sys.argv:
    tracker.finish("FINISHED", timeout=600)
elif "raise" in sys.argv:
    raise SystemExit(1)
else:
    time.sleep(3600)
"""


def start_trainer(place: Place, *arguments: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", TRAINER, str(place.folder), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def assert_ended(pid: int) -> None:
    eventually(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == "zombie")


# -- a store that works -----------------------------------------------------------------------


def test_a_run_is_in_mlflow_with_all_that_it_is_made_of(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = place.folder / "repository"
    repository.mkdir()
    monkeypatch.chdir(repository)
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@y"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
    commit = subprocess.check_output(["git", "rev-parse", "HEAD"], text=True).strip()

    config = place.config(tags={"team": "red"})
    parent = Tracker.start(config, place.folder / "runs" / "comparison", attempt=1)
    tracker = Tracker.start(
        config, place.run_dir, attempt=1, parent=place.folder / "runs" / "comparison"
    )
    tracker.dataset("toy", "d" * 64, num_samples=10, num_tokens=1234)
    train(tracker, range(50))
    tracker.metrics(50, {"odd/ä+b//../c": 1.0, "nan": float("nan"), "inf": float("inf")})
    (place.run_dir / "report").mkdir()
    (place.run_dir / "report" / "report.json").write_text("{}")
    tracker.artifact(place.run_dir / "report", "report")
    sampled = "system/trainer_memory_usage_megabytes"
    eventually(lambda: len(metrics(place.run_dir, "system").get(sampled, [])) > 1)
    tracker.finish("FINISHED")
    parent.finish("FAILED")

    runs = {run.info.run_name: run for run in place.runs()}
    run, above = runs["toy toy"], runs["toy"]
    assert run.info.status == "FINISHED"
    assert above.info.status == "FAILED"
    assert run.data.tags["mlflow.parentRunId"] == above.info.run_id
    assert run.data.tags["mlflow.source.git.commit"] == commit
    assert run.data.tags["moored.slurm_job_id"] == "4711"
    assert run.data.tags["moored.host"] == socket.gethostname()
    assert run.data.tags["team"] == "red"
    assert run.data.tags["version.torch"]
    assert run.data.params["optim.learning_rate"] == "0.0002"
    assert run.data.params["train.steps"] == "5"
    assert place.history("train/loss") == [(i, 1.0 / (i + 1)) for i in range(50)]
    odd = [name for name in run.data.metrics if name.startswith("odd")]
    assert len(odd) == 1
    assert "nan" in run.data.metrics
    assert sampled in run.data.metrics
    assert run.data.metrics["system/system_memory_usage_megabytes"] > 100
    [dataset] = run.inputs.dataset_inputs
    assert dataset.dataset.name == "toy"
    assert json.loads(dataset.dataset.profile) == {"num_samples": 10, "num_tokens": 1234}
    client, run_id = place.client(), run.info.run_id
    names = [file.path for file in client.list_artifacts(run_id)]
    assert names == ["config.yaml", "report"]
    saved = Path(client.download_artifacts(run_id, "config.yaml"))
    assert load_config(saved).fingerprint() == config.fingerprint()
    assert client.download_artifacts(run_id, "report/report.json")
    assert not (repository / "mlruns").exists()
    assert sync_run(place.run_dir).num_points == 0
    assert (place.run_dir / "logs" / "mlflow.log").read_text() == ""


def test_a_resumed_attempt_goes_on_in_the_same_run(place: Place) -> None:
    first = Tracker.start(place.config(system_metrics=False), place.run_dir, attempt=1)
    train(first, range(10))
    first.finish("KILLED", timeout=LONG_SECONDS)
    changed = place.config("optim.learning_rate=0.5", system_metrics=False)
    second = Tracker.start(changed, place.run_dir, attempt=2)
    eventually(place.is_shipped)
    assert place.run().info.status == "RUNNING"
    train(second, range(6, 14))
    second.finish("FINISHED")
    run = place.run()
    assert run.info.status == "FINISHED"
    assert [step for step, _ in place.history("train/loss")] == list(range(14))
    assert run.data.params["optim.learning_rate"] == "0.0002"
    tag = run.data.tags["moored.changed_params.attempt_2"]
    assert tag == "optim.learning_rate: 0.0002 -> 0.5"
    assert run.data.tags["moored.attempt"] == "2"
    names = [file.path for file in place.client().list_artifacts(run.info.run_id)]
    assert names == ["config-attempt-2.yaml", "config.yaml"]


QUICKSTART = Path(__file__).parents[3] / "recipes" / "quickstart" / "slurm-headers.yaml"


def test_parameters_are_the_options_with_an_effect(place: Place) -> None:
    overrides = ["track.system_metrics=false", f"output.dir={place.folder}/runs"]
    config = load_config(QUICKSTART, overrides)
    above = place.folder / "runs" / "quickstart"
    (above / "arms").mkdir(parents=True)
    trackers = {"quickstart": Tracker.start(config, above, attempt=1)}
    for name, arm in config.arms().items():
        folder = above / "arms" / name
        trackers[f"quickstart {name}"] = Tracker.start(arm, folder, attempt=1, parent=above)
    for tracker in trackers.values():
        tracker.finish("FINISHED")
    client = place.client()
    experiment = client.get_experiment_by_name("quickstart")
    runs = client.search_runs([experiment.experiment_id])
    params = {run.info.run_name: run.data.params for run in runs}
    assert params.keys() == trackers.keys()

    for name, arm in config.arms().items():
        mine = params[f"quickstart {name}"]
        assert 60 < len(mine) <= 90
        assert mine.keys() <= arm.flat().keys()
        assert not [key for key in mine if key.startswith(("compare", "track"))]
        # An override without an effect is refused.
        recipe = place.folder / f"{name}.yaml"
        recipe.write_text(arm.dump_yaml())
        for key, text in mine.items():
            again = load_config(recipe, [f"{key}={text}"])
            assert again.fingerprint() == arm.fingerprint(), key
    none, tmkl = params["quickstart none"], params["quickstart tmkl"]
    assert [key for key in none if key.startswith("regularizer")] == ["regularizer.kind"]
    assert tmkl["regularizer.weight"] == "0.2"
    assert not [key for key in tmkl if "replay" in key or "budget" in key or "first" in key]
    assert tmkl.items() - none.items() == {
        (key, text) for key, text in tmkl.items() if key.startswith("regularizer")
    }
    both = params["quickstart"]
    assert len(both) <= 90
    assert (both["compare.0.kind"], both["compare.1.weight"]) == ("none", "0.2")
    assert not [key for key in both if key.startswith(("regularizer", "compare.0.weight"))]


def test_a_run_that_has_the_parameters_of_an_older_version_goes_on(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = place.config(system_metrics=False)
    older = {"compare.0.kind": "none", "regularizer.first_tokens": "null", "adapter.omega": "200.0"}
    with monkeypatch.context() as patch:
        patch.setattr(provenance, "params", lambda config, kind: params(config, kind) | older)
        first = Tracker.start(config, place.run_dir, attempt=1)
    train(first, range(3))
    first.finish("KILLED", timeout=LONG_SECONDS)
    second = Tracker.start(config, place.run_dir, attempt=2)
    train(second, range(3, 6))
    second.finish("FINISHED")
    run = place.run()
    assert run.info.status == "FINISHED"
    assert run.data.params == params(config) | older
    assert not [tag for tag in run.data.tags if "changed_params" in tag]
    assert [step for step, _ in place.history("train/loss")] == list(range(6))
    assert (place.run_dir / "logs" / "mlflow.log").read_text() == ""


@pytest.mark.long
def test_many_runs_may_share_one_new_sqlite_store(tmp_path: Path) -> None:
    """Of six tasks on one fresh store, five used to fail (and to corrupt it)."""
    place, runs = Place(tmp_path), range(6)
    place.recipe(system_metrics=False)
    script = TRAINER.replace('folder / "runs/toy"', 'folder / "runs" / sys.argv[6]')
    command = [sys.executable, "-c", script, str(tmp_path), "1", "0", "200", "finish"]
    trainers = [
        subprocess.Popen([*command, f"toy{k}"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        for k in runs
    ]
    said = [trainer.communicate(timeout=LONG_SECONDS)[1] for trainer in trainers]
    assert [trainer.returncode for trainer in trainers] == [0] * 6
    assert said == [b""] * 6  # no warning: all of it arrived without help
    found = place.runs()
    assert [run.info.status for run in found] == ["FINISHED"] * 6
    client = place.client()
    for run in found:
        assert len(client.get_metric_history(run.info.run_id, "train/loss")) == 200
    assert [sync_run(tmp_path / "runs" / f"toy{k}").num_points for k in runs] == [0] * 6


def test_a_killed_trainer_is_marked_and_leaves_nothing_behind(place: Place) -> None:
    place.recipe()
    with start_trainer(place, 1, 0, 300) as trainer:
        assert trainer.stdout is not None
        port = int(trainer.stdout.readline())
        shipper = place.shipper_pid()
        assert psutil.Process(shipper).nice() == min(19, psutil.Process().nice() + 10)
        trainer.kill()
    # The trainer's sockets are closed with it, though its shipper still works.
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=120)
    assert_ended(shipper)
    assert place.run().info.status == "KILLED"
    assert [step for step, _ in place.history("train/loss")] == list(range(300))


def test_a_killed_shipper_is_replaced_or_made_up_for(place: Place) -> None:
    tracker = Tracker.start(place.config(system_metrics=False), place.run_dir, attempt=1)
    train(tracker, range(20))
    eventually(place.is_shipped)
    os.kill(place.shipper_pid(), signal.SIGKILL)
    train(tracker, range(20, 40))
    tracker.finish("FINISHED")
    assert [step for step, _ in place.history("train/loss")] == list(range(40))
    assert place.run().info.status == "FINISHED"


def test_a_crash_of_both_is_completed_by_sync(place: Place) -> None:
    place.recipe(system_metrics=False)
    with start_trainer(place, 1, 0, 50) as trainer:
        assert trainer.stdout is not None
        trainer.stdout.readline()
        shipper = place.shipper_pid()
        with pytest.raises(UserError, match=f"process {shipper} "):
            sync_run(place.run_dir)
        os.kill(shipper, signal.SIGKILL)
        trainer.kill()
    eventually(place.is_let_go)
    summary = sync_run(place.run_dir)
    assert summary.complete
    assert summary.status == "KILLED"
    assert [step for step, _ in place.history("train/loss")] == list(range(50))
    assert sync_run(place.run_dir).num_points == 0
    assert place.run().info.status == "KILLED"


def test_a_comparison_that_was_moved_is_shipped_whole(place: Place, empty_store: Path) -> None:
    config = place.config(mlflow=False)
    old, moved = place.folder / "runs" / "both", place.folder / "moved"
    parent = Tracker.start(config, old, attempt=1)
    child = Tracker.start(config, old / "arms" / "a", attempt=1, parent=old)
    train(child, range(3))
    child.finish("FINISHED")
    parent.finish("FINISHED")
    old.rename(moved)
    above, below = (sync_run(run, place.database) for run in (moved, moved / "arms" / "a"))
    assert above.complete
    assert below.complete
    tags = place.client().get_run(below.run_id).data.tags
    assert tags["mlflow.parentRunId"] == above.run_id
    # An arm that lies elsewhere by itself has no parent any more, and says so.
    shutil.copytree(moved / "arms" / "a", place.folder / "alone")
    (place.folder / "alone" / "mlflow.json").unlink()
    shutil.copy(empty_store, place.folder / "other.db")
    alone = sync_run(place.folder / "alone", f"sqlite:///{place.folder}/other.db")
    assert alone.complete
    assert alone.problems == (f"parent {old}: its run directory is gone",)


def test_sync_waits_for_nobody_while_another_process_ships(place: Place) -> None:
    Tracker.start(place.config(mlflow=False), place.run_dir, attempt=1).finish("FINISHED")
    with shipping(place.run_dir, lambda: False), pytest.raises(UserError, match="being shipped"):
        sync_run(place.run_dir, place.database)


def test_without_mlflow_there_is_the_journal(place: Place) -> None:
    tracker = Tracker.start(place.config(mlflow=False), place.run_dir, attempt=1)
    train(tracker, range(3))
    tracker.finish("FINISHED")
    assert [step for step, _ in metrics(place.run_dir)["train/loss"]] == [0, 1, 2]
    assert not (place.run_dir / "mlflow.json").exists()
    with pytest.raises(UserError, match="name a store"):
        sync_run(place.run_dir)
    assert sync_run(place.run_dir, place.database).num_points == 6


def test_other_ranks_do_nothing(place: Place) -> None:
    tracker = Tracker.start(place.config(), place.run_dir, attempt=1, is_main=False)
    tracker.dataset("toy", "0", 1, 1)
    tracker.artifact(place.run_dir / "adapter")
    train(tracker, range(3))
    tracker.event("saved", kind="checkpoint", self="x")
    tracker.finish("FINISHED")
    assert not place.run_dir.exists()


def test_the_environments_store_is_used_if_the_recipe_names_none(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place.folder)
    assert tracking_uri(place.config()) == place.database
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///other.db")
    assert tracking_uri(place.config()) == f"sqlite:///{place.folder}/other.db"
    assert tracking_uri(place.config(uri="http://host:1")) == "http://host:1"


def test_a_run_that_was_deleted_in_mlflow_is_not_filled(place: Place) -> None:
    tracker = Tracker.start(place.config(mlflow=False), place.run_dir, attempt=1)
    train(tracker, range(3))
    tracker.finish("FINISHED")
    run_id = sync_run(place.run_dir, place.database).run_id
    store = MlflowStore(place.database, place.run_dir)
    with pytest.raises(RejectedError, match="Invalid"):
        store.describe(run_id, {"tags": {"": "a tag without a name"}}, 1)
    place.client().delete_run(run_id)
    with pytest.raises(StopError, match="deleted"):
        store.describe(run_id, {"params": {"new": "y"}}, 1)
    with pytest.raises(UserError, match="was deleted in MLflow: restore it"):
        sync_run(place.run_dir, place.database)


# -- a store that does not ----------------------------------------------------------------------


class Answering500(http.server.BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        self.send_response(500)
        self.end_headers()
        self.wfile.write(b"internal error")

    do_GET = do_POST

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def failing_server() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answering500) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("trouble", ["refused", "500"])
def test_a_store_that_never_works_costs_a_bounded_wait(
    place: Place,
    failing_server: str,
    trouble: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    host = failing_server if trouble == "500" else f"127.0.0.1:{free_port()}"
    target = f"http://{host}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:canary-pass@{host}")
    tracker = Tracker.start(place.config(), place.run_dir, attempt=1)
    assert train(tracker, range(300)) < SLOW_SECONDS
    eventually(lambda: Cursor.load(place.run_dir, target).error)
    assert train(tracker, range(300, 600)) < SLOW_SECONDS
    shipper, began = place.shipper_pid(), time.monotonic()
    with caplog.at_level(logging.INFO):
        tracker.finish("FINISHED", timeout=4)
    assert 3.5 < time.monotonic() - began < BOUND_SECONDS
    assert f"moored sync {place.run_dir}" in caplog.messages[-1]
    assert "waiting up to" in caplog.messages[0]
    assert trouble in " ".join(caplog.messages)
    assert_ended(shipper)
    with pytest.raises(UserError, match=trouble) as caught:
        sync_run(place.run_dir)
    assert "\n" not in str(caught.value)
    files = [path.read_text() for path in place.run_dir.rglob("*") if path.is_file()]
    assert trouble in " ".join(files)
    assert "canary-pass" not in " ".join([*files, *caplog.messages, str(caught.value)])
    # Another store takes all of it.
    assert sync_run(place.run_dir, place.database).complete
    assert len(place.history("train/loss")) == 600


def test_an_mlflow_that_cannot_be_imported_stops_nothing(
    place: Place, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broken = place.folder / "broken" / "mlflow"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise ImportError('a piece is missing')")
    monkeypatch.setenv("PYTHONPATH", str(broken.parent))
    tracker = Tracker.start(place.config(), place.run_dir, attempt=1)
    train(tracker, range(10))
    began = time.monotonic()
    tracker.finish("FINISHED")
    assert time.monotonic() - began < BOUND_SECONDS
    assert "a piece is missing" in caplog.text
    assert "moored sync" in caplog.text
    monkeypatch.delenv("PYTHONPATH")
    assert sync_run(place.run_dir).num_points >= 20


def test_a_server_that_is_stopped_killed_and_back_loses_nothing(
    place: Place, server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    config = place.config(uri=server.uri, system_metrics=False)
    tracker = Tracker.start(config, place.run_dir, attempt=1)
    tracker.dataset("toy", "d" * 64, num_samples=10, num_tokens=1234)
    longest = train(tracker, range(100))
    eventually(lambda: Cursor.load(place.run_dir, server.uri).offset > 5000)

    server.signal(signal.SIGSTOP)
    for step in range(100, 200):
        longest = max(longest, train(tracker, range(step, step + 1)))
        time.sleep(0.03)  # so that the shipper is caught in a request
    (place.run_dir / "adapter.bin").write_bytes(b"x" * 1000)
    tracker.artifact(place.run_dir / "adapter.bin", "adapter")
    began = time.monotonic()
    tracker.finish("FINISHED", timeout=2)
    assert 1.5 < time.monotonic() - began < BOUND_SECONDS
    assert "moored sync" in caplog.text
    assert longest < SLOW_SECONDS

    server.signal(signal.SIGCONT)
    eventually(server.answers)
    server.signal(signal.SIGKILL)
    with pytest.raises(UserError, match="refused"):
        sync_run(place.run_dir)

    server.start()
    summary = sync_run(place.run_dir)
    assert summary.complete
    assert summary.status == "FINISHED"
    assert [step for step, _ in place.history("train/loss", server.uri)] == list(range(200))
    again = sync_run(place.run_dir)
    assert (again.num_points, again.num_artifacts) == (0, 0)
    client, run = place.client(server.uri), summary.run_id
    assert client.get_run(run).info.status == "FINISHED"
    assert len(client.get_run(run).inputs.dataset_inputs) == 1
    assert [file.path for file in client.list_artifacts(run)] == ["adapter", "config.yaml"]
    (place.run_dir / "mlflow.json").unlink()
    assert sync_run(place.run_dir).run_id == run  # found again by its uid, and compared
    assert len(place.history("train/loss", server.uri)) == 200


def test_no_secret_gets_out(
    place: Place, server: Server, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    canaries = [
        "hf_CanaryCanaryCanaryCanary",
        "canary-tracking",
        "canaryuser",
        "canary/pass",
        "canarytag",
    ]
    monkeypatch.setenv("HF_TOKEN", canaries[0])
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", canaries[1])
    host = server.uri.removeprefix("http://")
    uri = f"http://canaryuser:canary%2Fpass@{host}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    config = place.config(tags={"api_key": "canarytag", "num_memory_tokens": "512"})
    tracker = Tracker.start(config, place.run_dir, attempt=1)
    tracker.event("failed", reason=f"GET {uri}/api: {canaries[0]}", nested=[{"a": canaries[1]}])
    train(tracker, range(3))
    shipper = psutil.Process(place.shipper_pid())
    said = [str(part) for part in shipper.cmdline()]
    tracker.finish("FINISHED")
    run = next(r for r in place.runs(server.uri) if r.data.tags["moored.uid"])
    run_id = Cursor.load(place.run_dir, server.uri).run_id
    run = place.client(server.uri).get_run(run_id)
    assert run.data.tags["num_memory_tokens"] == "512"
    saved = place.client(server.uri).download_artifacts(run_id, "config.yaml")
    said += [str(run.to_dictionary()), Path(saved).read_text()]
    with pytest.raises(UserError) as caught:
        sync_run(place.run_dir, f"http://canaryuser:canary%2Fpass@127.0.0.1:{free_port()}")
    said.append(str(caught.value))
    said += [str(sync_run(place.run_dir)), tracker.where]
    said += capfd.readouterr()
    said += [path.read_text() for path in place.run_dir.rglob("*") if path.is_file()]
    assert len(said) > 8
    for canary in ["Canary", *canaries[1:], "canary%2Fpass"]:
        assert not [text for text in said if canary in text], canary


def test_thousands_of_points_arrive_in_few_requests(place: Place) -> None:
    tracker = Tracker.start(place.config(mlflow=False), place.run_dir, attempt=1)
    train(tracker, range(1000), third=1.0, fourth=2.0)
    tracker.finish("FINISHED")
    store = MlflowStore(place.database, place.run_dir)
    sizes: list[int] = []
    log = store.log_points

    def counting(run_id: str, points: Any) -> None:
        sizes.append(len(points))
        log(run_id, points)

    store.log_points = counting
    assert Shipper(place.run_dir, "x", lambda: store).run()
    assert Counter(sizes) == {1000: 4}
