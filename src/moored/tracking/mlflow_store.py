"""MLflow as the store of a shipper; the only importer of mlflow, and only when one is opened.

What is shipped, when and how often, is `shipper.py`'s matter.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import json
import os
import re
import socket
import sqlite3
import time
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from moored.tracking.store import Point, RejectedError, StopError, first_line
from moored.utils.atomic_dir import fsync_directory

# MLflow's own patience is minutes per call; ours is in the shipper's loop, which sees more.
CLIENT_SETTINGS = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # it would print the password in it
}
# MLflow's limits, and the characters that it takes in names.
MAX_NAME, MAX_PARAM, MAX_TAG, MAX_PARAMS, MAX_DATASET, MAX_DIGEST = 250, 6000, 5000, 100, 500, 36
REFUSALS = (
    "BAD_REQUEST",
    "ENDPOINT_NOT_FOUND",
    "FEATURE_DISABLED",
    "INVALID_PARAMETER_VALUE",
    "NOT_IMPLEMENTED",
    "PERMISSION_DENIED",
    "UNAUTHENTICATED",
)
_NOT_IN_NAMES = re.compile(r"[^/\w.\- ]")
# What is said of tables that are not those of the version that a SQLite store says it has.
_MISFIT = re.compile(
    r"already exists|duplicate column name|no such (table|column|index)|out-of-date database schema"
)


class MlflowStore:
    """MLflow as the store of `Shipper`; see `store.Store` for what each method promises.

    Args:
        uri: the tracking URI.
        run_dir: the run directory; artifacts of a database without a server go beside it.

    Raises:
        StopError: mlflow cannot be imported.
    """

    def __init__(self, uri: str, run_dir: Path):
        for name, value in CLIENT_SETTINGS.items():
            os.environ.setdefault(name, value)
        try:
            from mlflow import entities
            from mlflow.exceptions import MlflowException
            from mlflow.tracking import MlflowClient
        except Exception as error:
            raise StopError(
                f"mlflow cannot be imported ({error!r}): mend the installation"
            ) from error
        self._entities, self._error = entities, MlflowException
        self._artifacts = _artifact_root(uri, run_dir)
        with _made_whole(uri, self._artifacts):
            self._client = MlflowClient(uri)
            self._client.search_experiments(max_results=1)

    @contextlib.contextmanager
    def _judged(self, run_id: str) -> Iterator[None]:
        """Tell what MLflow will never take from what may pass."""
        try:
            yield
        except self._error as error:
            if error.error_code != "INVALID_PARAMETER_VALUE":
                raise
            self._require_active(self._client.get_run(run_id))
            raise RejectedError(str(error)) from error

    def _require_active(self, run: Any) -> None:
        if run.info.lifecycle_stage == "deleted":
            raise StopError(
                f"run {run.info.run_id} was deleted in MLflow: restore it there, or remove "
                "mlflow.json from the run directory to make a new one"
            )

    def _experiment(self, name: str) -> str:
        experiment = self._client.get_experiment_by_name(name)
        if experiment is None:
            try:
                return self._client.create_experiment(name, artifact_location=self._artifacts)
            except self._error as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                experiment = self._client.get_experiment_by_name(name)
        if experiment is None or experiment.lifecycle_stage == "deleted":
            raise StopError(
                f"experiment {name!r} is deleted in MLflow: restore it there, or set "
                "track.experiment to another name"
            )
        return experiment.experiment_id

    def find_run(self, start: dict[str, Any], run_id: str | None) -> str | None:
        """The run by id, else by the uid that its tags hold."""
        if run_id is not None:
            try:
                self._require_active(self._client.get_run(run_id))
            except self._error as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
            else:
                return run_id
        return next(iter(self._twins(start)), None)

    def _twins(self, start: dict[str, Any]) -> list[str]:
        """The runs with this uid, the oldest first: all who ask take the same."""
        experiment = self._experiment(start["experiment"])
        twins = self._client.search_runs([experiment], f"tags.`moored.uid` = '{start['uid']}'")
        made = sorted((run.data.tags.get("moored.made", ""), run.info.run_id) for run in twins)
        return [run_id for _, run_id in made]

    def create_run(self, start: dict[str, Any], began: float) -> str:
        """A run named after the recipe, with the uid by which it is found again."""
        run = self._client.create_run(
            self._experiment(start["experiment"]),
            start_time=int(began * 1000),
            run_name=start["name"],
            tags={
                "moored.uid": start["uid"],
                "moored.made": f"{time.time():.3f}",
                "mlflow.user": start.get("user") or "unknown",
            },
        )
        return run.info.run_id

    def settle(self, start: dict[str, Any], run_id: str) -> str:
        """The oldest; each maker deletes none but its own."""
        agreed = next(iter(self._twins(start)), run_id)
        if agreed != run_id:
            self._client.delete_run(run_id)
        return agreed

    def drop_twins(self, start: dict[str, Any], run_id: str) -> None:
        """Delete runs that a making left which seemed to fail; they are empty."""
        for twin in self._twins(start):
            if twin != run_id:
                self._client.delete_run(twin)

    def describe(self, run_id: str, fields: dict[str, Any], attempt: int) -> None:
        """Parameters (MLflow's cannot change: what differs goes into a tag) and tags."""
        with self._judged(run_id):
            known = self._client.get_run(run_id).data.params
            wanted = {_name(k): _cut(v, MAX_PARAM) for k, v in fields.get("params", {}).items()}
            changed = [f"{k}: {known[k]} -> {v}" for k, v in wanted.items() if known.get(k, v) != v]
            tags = _tags(fields, attempt)
            if changed:
                tags[f"moored.changed_params.attempt_{attempt}"] = "; ".join(changed)
            make = self._entities.RunTag
            labels = [make(_name(k), _cut(v, MAX_TAG)) for k, v in tags.items()]
            self._client.log_batch(run_id, tags=labels, synchronous=True)
            new = [self._entities.Param(k, v) for k, v in wanted.items() if k not in known]
            for first in range(0, len(new), MAX_PARAMS):
                some = new[first : first + MAX_PARAMS]
                self._client.log_batch(run_id, params=some, synchronous=True)

    def log_points(self, run_id: str, points: Sequence[Point]) -> None:
        """One request; with the journal's time stamps, so that a repetition is recognised."""
        make = self._entities.Metric
        metrics = [make(_name(p.name), p.value, int(p.time * 1000), p.step) for p in points]
        with self._judged(run_id):
            self._client.log_batch(run_id, metrics=metrics, synchronous=True)

    def steps_logged(self, run_id: str, name: str) -> set[int]:
        """All steps of one metric's history."""
        return {metric.step for metric in self._client.get_metric_history(run_id, _name(name))}

    def log_dataset(self, run_id: str, fields: dict[str, Any]) -> None:
        """Record a dataset input; MLflow takes the same name and digest once."""
        entities = self._entities
        counts = {name: fields.get(name) for name in ("num_samples", "num_tokens")}
        dataset = entities.Dataset(
            name=_cut(str(fields["name"]), MAX_DATASET),
            digest=str(fields["digest"])[:MAX_DIGEST],
            source_type="local",
            source=json.dumps({"name": fields["name"], "digest": fields["digest"]}),
            profile=json.dumps(counts),
        )
        tag = entities.InputTag("mlflow.data.context", str(fields.get("context", "training")))
        with self._judged(run_id):
            self._client.log_inputs(run_id, [entities.DatasetInput(dataset, [tag])])

    def upload(self, run_id: str, path: Path, folder: str) -> None:
        """A directory's content, or a file."""
        send = self._client.log_artifacts if path.is_dir() else self._client.log_artifact
        with self._judged(run_id):
            send(run_id, str(path), folder or None)

    def upload_text(self, run_id: str, text: str, name: str) -> None:
        """A text as a file among the artifacts."""
        with self._judged(run_id):
            self._client.log_text(run_id, text, name)

    def link_parent(self, run_id: str, parent_run_id: str) -> None:
        """Link it by the tag from which MLflow's UI draws the tree."""
        self._client.set_tag(run_id, "mlflow.parentRunId", parent_run_id)

    def register(self, run_id: str, name: str, folder: str) -> None:
        """A version whose source is the folder; found again by its run, so that it is made once."""
        client = self._client
        if not client.list_artifacts(run_id, folder):
            raise RejectedError(f"the run has no artifacts in {folder}")
        with self._registry():
            versions = client.search_model_versions(f"run_id = '{run_id}'")
            if any(version.name == name for version in versions):
                return
            try:
                client.create_registered_model(name)
            except self._error as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            run = client.get_run(run_id)
            source = f"{(run.info.artifact_uri or '').rstrip('/')}/{folder}"
            tags = {
                "moored.uid": run.data.tags.get("moored.uid", ""),
                "moored.run": run.info.run_name or "",
            }
            client.create_model_version(name, source, run_id, tags=tags, await_creation_for=0)

    @contextlib.contextmanager
    def _registry(self) -> Iterator[None]:
        """A store without a registry, or one that refuses, will not take it later either."""
        try:
            yield
        except self._error as error:
            if error.error_code not in REFUSALS:
                raise
            raise RejectedError(first_line(str(error))) from error

    def set_status(self, run_id: str, status: str, ended: float | None) -> None:
        """RUNNING again, or terminated at a time."""
        if ended is None:
            self._client.update_run(run_id, status=status)
        else:
            self._client.set_terminated(run_id, status, end_time=int(ended * 1000))


def _tags(fields: dict[str, Any], attempt: int) -> dict[str, str]:
    tags = {
        "mlflow.source.name": "moored",
        "mlflow.source.type": "LOCAL",
        "mlflow.source.git.commit": fields.get("commit"),
        "moored.attempt": str(attempt),
        "moored.host": fields.get("host"),
        "moored.slurm_job_id": fields.get("slurm_job_id"),
    }
    tags |= {f"version.{name}": text for name, text in fields.get("versions", {}).items()}
    tags |= fields.get("tags", {})
    return {name: str(text) for name, text in tags.items() if text is not None}


def _name(name: str) -> str:
    """A name that MLflow takes; one that had to be changed keeps apart from its neighbours."""
    clean = "/".join(p for p in _NOT_IN_NAMES.sub("_", name).split("/") if p.strip("."))
    if clean == name and len(name) <= MAX_NAME:
        return name
    return f"{clean[: MAX_NAME - 9]}_{zlib.crc32(name.encode()):08x}"


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."


def _artifact_root(uri: str, run_dir: Path) -> str | None:
    """Where a database without a server keeps artifacts: not in the working directory."""
    scheme = urlsplit(uri).scheme
    if scheme == "sqlite":
        return (_sqlite_path(uri).parent / "mlartifacts").as_uri()
    if scheme.partition("+")[0] in ("postgresql", "mysql", "mssql"):
        return (run_dir.absolute().parent / "mlartifacts").as_uri()
    return None


def _sqlite_path(uri: str) -> Path:
    return Path(uri.removeprefix("sqlite:///").partition("?")[0]).absolute()


@contextlib.contextmanager
def _made_whole(uri: str, artifacts: str | None) -> Iterator[None]:
    """One process at a time makes a SQLite store, which gets its name only once it is whole.

    Who makes its tables may be killed at any moment, and MLflow does not go on from half of them.

    Raises:
        StopError: the body cannot open a store that was left half made all the same.
    """
    if urlsplit(uri).scheme != "sqlite":
        yield
        return
    path = _sqlite_path(uri)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(path.name + ".lock"), "a") as lock:
        alone = False
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
            alone = True
        if not _has_content(path):
            _make(path.resolve(), artifacts, alone=alone)
        try:
            yield
        except Exception as error:
            if _MISFIT.search(str(error)) is None or _has_runs(path):
                raise
            raise StopError(
                f"{path.name} is half made, since who made its tables was killed: remove or rename "
                f"{path.name}; `moored sync` sends everything again"
            ) from error


def _make(path: Path, artifacts: str | None, *, alone: bool) -> None:
    """A new store with its tables, under another name until they are all there."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    if alone:
        for left in path.parent.glob(f".{glob.escape(path.name)}.*.new*"):  # by who was killed
            left.unlink(missing_ok=True)
    new = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.new")
    store = SqlAlchemyStore(f"sqlite:///{new}", artifacts)
    store.engine.dispose()
    if _has_content(path):  # of another maker, where there are no locks
        new.unlink()
        return
    for suffix in ("-journal", "-wal", "-shm"):  # of a store that was removed: not of this one
        path.with_name(path.name + suffix).unlink(missing_ok=True)
    os.replace(new, path)
    fsync_directory(path.parent)


def _has_content(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0


def _has_runs(path: Path) -> bool:
    """Whether a SQLite store has, or may have, what somebody would miss."""
    try:
        with contextlib.closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as database:
            return database.execute("SELECT 1 FROM runs LIMIT 1").fetchone() is not None
    except sqlite3.Error as error:
        return "no such table" not in str(error)
