"""What a tracking store must be able to do for a journal to be shipped, and what it is given.

MLflow's is in `mlflow_store.py`; nothing here knows it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


class RejectedError(Exception):
    """The store will never take this item; the next one may fare better."""


class StopError(Exception):
    """Nothing can be shipped until somebody mends something; the message says what."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One value of one metric; `time` is unix seconds."""

    name: str
    step: int
    value: float
    time: float


class Store(Protocol):
    """What is asked of a tracking store; every call but `create_run` may safely be repeated.

    `start` is the fields of the journal's first start event. A call raises `RejectedError`,
    `StopError`, or anything else for what may pass (no connection, a server's error).
    """

    def find_run(self, start: dict[str, Any], run_id: str | None) -> str | None:
        """The run with this id, else with the journal's uid; None if there is none."""

    def create_run(self, start: dict[str, Any], began: float) -> str:
        """Make the run of a journal; returns its id."""
        ...

    def settle(self, start: dict[str, Any], run_id: str) -> str:
        """The run that all agree on who made it at once; ours goes if it is another."""
        ...

    def drop_twins(self, start: dict[str, Any], run_id: str) -> None:
        """Delete other runs with the journal's uid: a making that seemed to fail, but did not."""

    def describe(self, run_id: str, fields: dict[str, Any], attempt: int) -> None:
        """Parameters, tags and the recipe of an attempt."""

    def log_points(self, run_id: str, points: Sequence[Point]) -> None:
        """All of these points, or (raising) perhaps some of them."""

    def steps_logged(self, run_id: str, name: str) -> set[int]:
        """The steps at which the store has a value of this metric."""
        ...

    def log_dataset(self, run_id: str, fields: dict[str, Any]) -> None:
        """A dataset that the run reads."""

    def upload(self, run_id: str, path: Path, folder: str) -> None:
        """A file or directory, into a folder of the run's artifacts."""

    def upload_text(self, run_id: str, text: str, name: str) -> None:
        """A text, as a file of this name among the artifacts."""

    def link_parent(self, run_id: str, parent_run_id: str) -> None:
        """Make the run a child of another."""

    def register(self, run_id: str, name: str, folder: str) -> None:
        """Make the run's artifacts in a folder a version of a registered model, once a run."""

    def set_status(self, run_id: str, status: str, ended: float | None) -> None:
        """RUNNING, FINISHED, FAILED or KILLED; `ended` in unix seconds."""


def first_line(error: str) -> str:
    """What a store says went wrong; a database goes on with all of its SQL."""
    return error.strip().partition("\n")[0]


def inside(run_dir: Path, path: str) -> Path:
    """`path` (relative to the run directory, or absolute) resolved; refused if it leads out.

    Raises:
        RejectedError: it is missing, outside the run directory, or holds a link that leads outside.
    """
    root = run_dir.resolve()
    whole = (root / path).resolve()
    if not whole.is_relative_to(root):
        raise RejectedError("outside the run directory")
    if not whole.exists():
        raise RejectedError("not there any more")
    for entry in whole.rglob("*") if whole.is_dir() else ():
        if not entry.resolve().is_relative_to(root):
            raise RejectedError(f"{entry.name} links out of the run directory")
    return whole
