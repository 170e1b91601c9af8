"""Shipping: each point exactly once, whatever call fails or wherever the shipper is killed.

The store here is a dictionary that, unlike MLflow's SQL store, takes a repeated point twice, so
that nothing but the shipper's own care keeps it single. Real MLflow is in test_tracking.py.
"""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from moored.tracking import shipper as module
from moored.tracking.journal import JOURNAL_NAME, Cursor, Journal, shipping
from moored.tracking.shipper import Shipper
from moored.tracking.store import Point, RejectedError, StopError, inside


class KilledError(BaseException):
    """Stands for SIGKILL: nothing catches it."""


class Memory:
    """A store in memory that fails, or kills its caller, at a chosen call."""

    def __init__(self):
        self.runs: dict[str, dict[str, Any]] = {}
        self.calls = 0
        self.faults: dict[int, str] = {}
        self.rejects: set[str] = set()
        self.versions: set[tuple[str, ...]] = set()

    def _fault(self, when: str) -> None:
        fault = self.faults.get(self.calls, "")
        if fault == f"fail {when}":
            raise ConnectionError("no route")
        if fault == f"kill {when}":
            raise KilledError

    def __getattribute__(self, name: str) -> Any:
        method = object.__getattribute__(self, name)
        if name.startswith("_") or not callable(method):
            return method

        def faulty(*args: Any) -> Any:
            self.calls += 1
            self._fault("before")
            result = method(*args)
            self._fault("after")
            return result

        return faulty

    def find_run(self, start: dict[str, Any], run_id: str | None) -> str | None:
        if run_id in self.runs:
            return run_id
        return min((k for k, run in self.runs.items() if run["uid"] == start["uid"]), default=None)

    def create_run(self, start: dict[str, Any], began: float) -> str:
        run = {"uid": start["uid"], "points": [], "files": Counter(), "status": None}
        run |= {"attempts": set(), "datasets": set(), "parent": None}
        run_id = f"run{len(self.runs)}"
        self.runs[run_id] = run
        return run_id

    def drop_twins(self, start: dict[str, Any], run_id: str) -> None:
        uid = start["uid"]
        self.runs = {k: r for k, r in self.runs.items() if k == run_id or r["uid"] != uid}

    def describe(self, run_id: str, fields: dict[str, Any], attempt: int) -> None:
        self.runs[run_id]["attempts"].add(attempt)

    def log_points(self, run_id: str, points: Sequence[Point]) -> None:
        if any(point.name in self.rejects for point in points):
            raise RejectedError("bad name")
        self.runs[run_id]["points"] += [(p.name, p.step, p.value) for p in points]

    def steps_logged(self, run_id: str, name: str) -> set[int]:
        return {step for n, step, _ in self.runs[run_id]["points"] if n == name}

    def log_dataset(self, run_id: str, fields: dict[str, Any]) -> None:
        self.runs[run_id]["datasets"].add(fields["name"])

    def upload(self, run_id: str, path: Path, folder: str) -> None:
        self.runs[run_id]["files"][f"{folder}/{path.name}"] += 1

    def upload_text(self, run_id: str, text: str, name: str) -> None:
        self.runs[run_id]["files"][name] += 1

    def link_parent(self, run_id: str, parent_run_id: str) -> None:
        self.runs[run_id]["parent"] = parent_run_id

    def settle(self, start: dict[str, Any], run_id: str) -> str:
        agreed = min(k for k, run in self.runs.items() if run["uid"] == start["uid"])
        if agreed != run_id:
            del self.runs[run_id]
        return agreed

    def register(self, run_id: str, name: str, folder: str) -> None:
        assert any(file.startswith(f"{folder}/") for file in self.runs[run_id]["files"])
        self.versions.add((name, run_id, folder))

    def set_status(self, run_id: str, status: str, ended: float | None) -> None:
        self.runs[run_id]["status"] = status


@pytest.fixture(autouse=True)
def no_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Shipper, "_sleep", lambda self, seconds, gone: None)
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


class Writer:
    """Writes the journal of a trainer."""

    def __init__(self, run_dir: Path):
        run_dir.mkdir(exist_ok=True)
        self.journal = Journal(run_dir / JOURNAL_NAME)
        self.attempt = 1

    def event(self, name: str, /, **fields: Any) -> None:
        line = {"time": 1.0, "kind": "event", "event": name, "attempt": self.attempt}
        self.journal.write(line | {"fields": fields})

    def start(self, attempt: int, **fields: Any) -> None:
        self.attempt = attempt
        self.event("start", **{"uid": "u1", "config": "name: x\n"} | fields)

    def point(self, step: int, **values: float) -> None:
        line = {"time": float(step), "kind": "metrics", "step": step, "attempt": self.attempt}
        self.journal.write(line | {"values": values})


def story(run_dir: Path) -> None:
    """Two attempts; the second rewinds two steps, and changes the recipe."""
    writer = Writer(run_dir)
    writer.start(1)
    writer.event("dataset", name="toy", digest="0")
    for step in range(1, 8):
        writer.point(step, loss=step / 10, rate=1.0)
    (run_dir / "report.txt").write_text("x")
    writer.start(2, config="name: y\n")
    for step in range(6, 11):
        writer.point(step, loss=step / 10, rate=2.0)
    writer.event("artifact", path="report.txt", folder="report")
    writer.event("register", name="toy", folder="report")
    writer.event("finish", status="FINISHED")


def assert_told(store: Memory) -> None:
    [(run_id, run)] = store.runs.items()
    assert store.versions == {("toy", run_id, "report")}
    points = Counter((name, step) for name, step, _ in run["points"])
    assert points == Counter(itertools.product(("loss", "rate"), range(1, 11)))
    # What the first attempt said about a step stays.
    assert ("rate", 7, 1.0) in run["points"]
    assert ("rate", 8, 2.0) in run["points"]
    assert run["attempts"] == {1, 2}
    assert run["datasets"] == {"toy"}
    assert set(run["files"]) == {"config.yaml", "config-attempt-2.yaml", "report/report.txt"}
    assert run["status"] == "FINISHED"


def ship(run_dir: Path, store: Memory, **arguments: Any) -> Shipper:
    shipper = Shipper(run_dir, "memory", lambda: store, **arguments)
    assert shipper.run(max_failures=50)
    return shipper


def test_a_story_arrives_and_is_not_sent_again(tmp_path: Path) -> None:
    story(tmp_path)
    store = Memory()
    assert ship(tmp_path, store).num_points == 20
    assert_told(store)
    again = ship(tmp_path, store)
    assert (again.num_points, again.num_artifacts) == (0, 0)
    assert_told(store)


@pytest.mark.parametrize("batch", [1, 3, 1000])
@pytest.mark.parametrize("fault", ["fail before", "fail after", "kill before", "kill after"])
def test_one_fault_at_any_call_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, batch: int
) -> None:
    monkeypatch.setattr(module, "BATCH_POINTS", batch)
    for call in range(1, 200):
        run_dir = tmp_path / str(call)
        run_dir.mkdir()
        story(run_dir)
        store = Memory()
        store.faults = {call: fault}
        try:
            ship(run_dir, store)
        except KilledError:
            ship(run_dir, store)
        assert_told(store)
        if store.calls < call:
            return
    pytest.fail("the faults never ran out of calls")


@pytest.mark.parametrize("fault", ["fail after", "kill after"])
def test_a_fault_at_every_third_call_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setattr(module, "BATCH_POINTS", 3)
    story(tmp_path)
    store = Memory()
    store.faults = dict.fromkeys(range(3, 300, 5), fault)
    for _ in range(300):
        try:
            ship(tmp_path, store)
        except KilledError:
            continue
        break
    assert_told(store)


def test_a_kill_around_any_save_of_the_cursor_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BATCH_POINTS", 3)
    save = Cursor.save
    for when, number in itertools.product(("before", "after"), range(1, 40)):
        saves = itertools.count(1)

        def killing(cursor: Cursor, *args: Any, w=when, n=number, s=saves) -> None:
            now = next(s) == n
            if now and w == "before":
                raise KilledError
            save(cursor, *args)
            if now:
                raise KilledError

        run_dir = tmp_path / f"{when}{number}"
        run_dir.mkdir()
        story(run_dir)
        store = Memory()
        monkeypatch.setattr(Cursor, "save", killing)
        try:
            ship(run_dir, store)
        except KilledError:
            monkeypatch.setattr(Cursor, "save", save)
            ship(run_dir, store)
        assert_told(store)


def test_a_lost_cursor_is_made_up_for_by_asking(tmp_path: Path) -> None:
    story(tmp_path)
    store = Memory()
    ship(tmp_path, store)
    (tmp_path / "mlflow.json").write_text("{")
    assert ship(tmp_path, store).num_points == 0
    assert_told(store)


def test_a_journal_that_lost_its_end_is_compared(tmp_path: Path) -> None:
    """A power cut takes what was shipped from the disk; the next attempt writes on from there."""
    writer = Writer(tmp_path)
    writer.start(1)
    for step in range(10):
        writer.point(step, loss=float(step))
    store = Memory()
    ship(tmp_path, store)
    path = tmp_path / JOURNAL_NAME
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:6]))
    writer = Writer(tmp_path)
    writer.start(2)
    for step in range(4, 14):
        writer.point(step, loss=float(step), rate=1.0)
    ship(tmp_path, store)
    [run] = store.runs.values()
    points = sorted((name, step) for name, step, _ in run["points"])
    assert points == [("loss", i) for i in range(14)] + [("rate", i) for i in range(4, 14)]


def test_a_run_that_vanished_from_the_store_is_made_anew(tmp_path: Path) -> None:
    story(tmp_path)
    store = Memory()
    ship(tmp_path, store)
    store.runs.clear()
    ship(tmp_path, store)
    assert_told(store)


def test_two_stores_have_cursors_of_their_own(tmp_path: Path) -> None:
    story(tmp_path)
    one, two = Memory(), Memory()
    ship(tmp_path, one)
    Shipper(tmp_path, "other", lambda: two).run()
    assert_told(one)
    assert_told(two)
    assert Cursor.load(tmp_path, "memory").run_id is not None


def test_a_late_twin_is_removed(tmp_path: Path) -> None:
    """A making that timed out is done by the server later, when another was made already."""
    story(tmp_path)
    store = Memory()
    make = Memory.create_run

    class Slow(Memory):
        def create_run(self, start: dict[str, Any], began: float) -> str:
            if self.late is None:
                self.late = start
                raise TimeoutError
            run_id = make(self, start, began)
            make(self, self.late, began)
            return run_id

    store = Slow()
    store.late = None
    ship(tmp_path, store)
    assert_told(store)


def test_a_rejected_point_is_left_out_alone(tmp_path: Path) -> None:
    writer = Writer(tmp_path)
    writer.start(1)
    for step in range(5):
        writer.point(step, good=1.0, bad=1.0)
    store = Memory()
    store.rejects = {"bad"}
    shipper = ship(tmp_path, store)
    [run] = store.runs.values()
    assert [name for name, _, _ in run["points"]] == ["good"] * 5
    assert len(shipper.problems) == 5
    assert "bad at step 0" in shipper.problems[0]


def test_a_line_longer_than_a_batch_is_split(tmp_path: Path) -> None:
    writer = Writer(tmp_path)
    writer.start(1)
    writer.point(0, **{f"m{k}": float(k) for k in range(2500)})
    writer.point(1, m0=0.0)
    store = Memory()
    sizes = []
    log = Memory.log_points
    store.log_points = lambda run, points: (sizes.append(len(points)), log(store, run, points))
    ship(tmp_path, store)
    assert sizes == [1000, 1000, 500, 1]


def test_an_artifact_that_fails_does_not_hold_up_the_metrics(tmp_path: Path) -> None:
    writer = Writer(tmp_path)
    writer.start(1)
    (tmp_path / "a.txt").write_text("x")
    writer.event("artifact", path="a.txt", folder="")
    writer.point(1, loss=1.0)
    writer.event("finish", status="FINISHED")

    class NoArtifacts(Memory):
        def upload(self, run_id: str, path: Path, folder: str) -> None:
            raise PermissionError("/server/mlartifacts")

    store = NoArtifacts()
    shipper = Shipper(tmp_path, "memory", lambda: store)
    assert not shipper.run()
    [run] = store.runs.values()
    assert run["points"] == [("loss", 1, 1.0)]
    assert run["status"] == "FINISHED"
    assert "PermissionError" in (Cursor.load(tmp_path, "memory").error or "")
    store.__class__ = Memory
    ship(tmp_path, store)
    assert run["files"]["/a.txt"] == 1
    assert Cursor.load(tmp_path, "memory").error is None


@pytest.mark.parametrize("path", ["../outside.txt", "/etc/passwd", "link", "folder", "missing"])
def test_artifacts_stay_inside_the_run_directory(tmp_path: Path, path: str) -> None:
    run_dir = tmp_path / "run"
    (run_dir / "folder").mkdir(parents=True)
    (tmp_path / "outside.txt").write_text("secret")
    (run_dir / "link").symlink_to(tmp_path / "outside.txt")
    (run_dir / "folder" / "deep").symlink_to(tmp_path)
    with pytest.raises(RejectedError):
        inside(run_dir, path)


def test_a_child_finds_its_parent(tmp_path: Path) -> None:
    parent, child = tmp_path / "p", tmp_path / "p" / "arms" / "kl"
    child.mkdir(parents=True)
    store = Memory()
    writer = Writer(child)
    writer.start(1, uid="u2", parent=str(parent))
    writer.event("finish", status="FINISHED")
    assert not Shipper(child, "memory", lambda: store).run()  # the parent is not there yet
    story(parent)
    parent_run = ship(parent, store).cursor.run_id
    child_run = ship(child, store).cursor.run_id
    assert store.runs[child_run]["parent"] == parent_run != child_run


def test_a_follower_ends_with_its_trainer(tmp_path: Path) -> None:
    writer = Writer(tmp_path)
    writer.start(1)
    writer.point(0, loss=1.0)
    store, asked = Memory(), itertools.count()

    def gone() -> bool:
        number = next(asked)
        if number == 5:
            writer.point(1, loss=2.0)  # its last words
        return number >= 5

    ship(tmp_path, store, trainer_gone=gone, attempt=1, unfinished="KILLED")
    [run] = store.runs.values()
    assert [step for _, step, _ in run["points"]] == [0, 1]
    assert run["status"] == "KILLED"


def test_a_follower_leaves_the_next_attempt_to_its_own_shipper(tmp_path: Path) -> None:
    writer = Writer(tmp_path)
    writer.start(1)
    writer.point(0, loss=1.0)
    writer.start(2)
    writer.point(1, loss=1.0)
    store = Memory()
    ship(tmp_path, store, trainer_gone=lambda: True, attempt=1, unfinished="KILLED")
    [run] = store.runs.values()
    assert run["attempts"] == {1}
    assert run["status"] == "RUNNING"
    assert len(run["points"]) == 1
    ship(tmp_path, store, trainer_gone=lambda: True, attempt=2, unfinished="KILLED")
    assert run["attempts"] == {1, 2}
    assert run["status"] == "KILLED"
    assert len(run["points"]) == 2


def test_an_orphan_gives_up_in_time(tmp_path: Path) -> None:
    story(tmp_path)

    def refuse() -> Memory:
        raise ConnectionError("refused")

    shipper = Shipper(tmp_path, "memory", refuse, trainer_gone=lambda: True, drain_seconds=0.3)
    assert not shipper.run()
    assert "refused" in (Cursor.load(tmp_path, "memory").error or "")


@pytest.mark.parametrize("how", ["cut", "replaced", "removed"])
def test_a_journal_lost_under_a_shipper_stops_it(tmp_path: Path, how: str) -> None:
    writer = Writer(tmp_path)
    writer.start(1)
    for step in range(100):
        writer.point(step, loss=1.0)
    shipper = Shipper(tmp_path, "memory", Memory, trainer_gone=lambda: False, attempt=1)
    shipper._round(gone=False)
    if how == "cut":
        (tmp_path / JOURNAL_NAME).write_text("")
    else:
        (tmp_path / JOURNAL_NAME).rename(tmp_path / "old.jsonl")
        (tmp_path / "mlflow.json").unlink()
    if how == "replaced":
        story(tmp_path)
        Writer(tmp_path).point(0, **{f"m{k}": 0.0 for k in range(500)})
    with pytest.raises(StopError, match="replaced"):
        shipper.run()
    assert (tmp_path / "mlflow.json").exists() == (how == "cut")


def test_no_start_event_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(StopError, match="no start"):
        Shipper(tmp_path, "memory", Memory)


def test_one_ships_at_a_time(tmp_path: Path) -> None:
    with shipping(tmp_path, lambda: False) as first:
        assert first
        with shipping(tmp_path, lambda: False) as second:
            assert not second
    with shipping(tmp_path, lambda: False) as third:
        assert third
