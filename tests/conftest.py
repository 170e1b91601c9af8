"""Set before torch is imported anywhere: one thread per process, and no network.

The fixtures are for the tests of tracking: stores and a server that are made once for all of them.
"""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from trackkit import Place, Server

Chosen = Callable[[Iterable[Any]], list[Any]]

# A machine that is busy with other tests is not one on which a property fails.
settings.register_profile("busy", deadline=None)
settings.load_profile("busy")
# Two threads per process on two cores, times several processes, is many times slower than one.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Without a GPU, Triton's kernels run in its interpreter; it is asked when they are defined.
if not os.path.exists("/dev/nvidiactl"):
    os.environ["TRITON_INTERPRET"] = "1"
# What a launcher has told the tests is not meant for those that they start.
for name in list(os.environ):
    if name.startswith("SLURM_") or name in (
        *("MLFLOW_TRACKING_URI", "MOORED_SHIP", "MOORED_RENDEZVOUS_SECONDS"),
        *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    ):
        del os.environ[name]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Longest files first, since a worker takes one at a time and must not end with ten minutes.

    The faults of jobs mostly wait, so they run beside what computes.
    """
    order = ("slurm/test_faults.py", "distributed/", "slurm/", "unit/tracking/", "")
    here = Path(__file__).parent

    def place(item: pytest.Item) -> int:
        path = item.path.relative_to(here).as_posix()
        return next(i for i, start in enumerate(order) if path.startswith(start))

    items.sort(key=place)


@pytest.fixture(scope="module")
def chosen(request: pytest.FixtureRequest) -> Chosen:
    """Of some cases those that tests of this module have as a parameter, and that are to run.

    What computes many cases in the same processes computes no more than that.
    """
    values = [
        value
        for item in request.session.items
        if isinstance(item, pytest.Function) and item.path == request.path
        for value in (item.callspec.params.values() if hasattr(item, "callspec") else ())
    ]
    return lambda cases: [case for case in cases if case in values]


@pytest.fixture
def forked_verification(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an export is verified by is a process that stock PEFT was imported in beforehand.

    That it starts from nothing is proved by the commands of `tests/distributed`, and without this.
    """
    import forking
    from moored.export import verification

    monkeypatch.setattr(verification, "watch", forking.stock)


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SQLite store with its tables, made once: that takes seconds."""
    from moored.tracking.mlflow_store import MlflowStore

    folder = tmp_path_factory.mktemp("store")
    MlflowStore(f"sqlite:///{folder}/mlflow.db", folder / "run")
    return folder / "mlflow.db"


@pytest.fixture
def place(tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """A folder with a recipe and a store that is ready; a tracker waits until all is there."""
    from moored.tracking import tracker
    from trackkit import LONG_SECONDS, Place

    monkeypatch.setattr(tracker, "FINISH_SECONDS", LONG_SECONDS)

    (tmp_path / "runs").mkdir()
    shutil.copy(empty_store, tmp_path / "runs" / "mlflow.db")
    return Place(tmp_path)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Iterator[Server]:
    """A real MLflow server; who stops it starts it again."""
    from trackkit import Server

    server = Server(tmp_path_factory.mktemp("server"), empty_store)
    yield server
    server.signal(signal.SIGCONT)
    server.signal(signal.SIGKILL)
