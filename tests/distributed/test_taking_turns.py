"""Rank 0 goes first, for as long as it takes: the others wait at the store, not in a collective."""

from __future__ import annotations

import logging
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from distributed.runner import run_distributed
from moored.distributed import mesh as meshes
from moored.distributed.mesh import start_mesh
from moored.utils.errors import UserError

LIMIT = 2.0  # of a collective, in seconds
LONG = 3 * LIMIT


def spoken() -> list[str]:
    """What this process logs from now on."""
    found: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())
    logging.getLogger("moored").addHandler(handler)
    logging.getLogger("moored").setLevel(logging.INFO)
    return found


def download(rank: int, world_size: int, folder: Path) -> tuple[str | None, list[str]]:
    """A download that takes longer than a collective may."""
    mesh, said = start_mesh(1), spoken()
    meshes.WORD_SECONDS = 1.0
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=LIMIT))
    with mesh.main_first("download what is tested"):
        if mesh.is_main:
            time.sleep(LONG)
            (folder / "weights").write_text("here")
        found = (folder / "weights").read_text()
    assert mesh.world.gather(rank) == list(range(world_size))  # and they work together afterwards
    return found, said


def test_a_download_may_take_longer_than_a_collective(tmp_path):
    results = run_distributed(download, 3, tmp_path)
    assert [found for found, _ in results] == ["here"] * 3
    for rank, (_, said) in enumerate(results):
        words = [w for w in said if w.startswith(f"rank {rank} waits for rank 0 to download what")]
        assert len(words) >= (2 if rank else 0), said


def fail(rank: int, world_size: int, folder: Path) -> list[str]:
    """The second of three turns fails; who did not go first learns of it, and runs nothing."""
    mesh, said = start_mesh(1), []
    for turn in range(3):
        try:
            with mesh.main_first():
                if turn == 1 and mesh.is_main:
                    raise UserError("the hub is not there: look for it")
                assert mesh.is_main or turn != 1
                said.append(f"turn {turn}")
        except UserError as error:
            said.append(str(error))
    return said


def test_all_learn_that_it_failed(tmp_path):
    first, second = run_distributed(fail, 2, tmp_path)
    assert first == ["turn 0", "the hub is not there: look for it", "turn 2"]
    assert second == ["turn 0", "rank 0: the hub is not there: look for it", "turn 2"]


def leave(rank: int, world_size: int) -> None:
    mesh = start_mesh(1)
    with mesh.main_first():
        if mesh.is_main:
            raise UserError("no such model")


def test_one_process_needs_no_store(tmp_path):
    with pytest.raises(RuntimeError, match="no such model"):
        run_distributed(leave, 1)
