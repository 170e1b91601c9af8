"""Ranks of an srun step meet although others listen at the ports that their job's id gives."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from moored.launched import FIRST_PORT, NUM_PORTS

RANK = """
import torch
from moored.mesh import leave_mesh, start_mesh
mesh = start_mesh()
print(int(mesh.world.sum(torch.ones(1)).item()), flush=True)
leave_mesh()
"""


def start(job: int, rank: int, size: int, restart: int = 0) -> subprocess.Popen[str]:
    variables = {
        "SLURM_JOB_ID": str(job),
        "SLURM_STEP_ID": "0",
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
        "SLURM_STEP_NUM_TASKS": str(size),
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_RESTART_COUNT": str(restart),
    }
    inherited = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    return subprocess.Popen(
        [sys.executable, "-c", RANK],
        env=inherited | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture
def job() -> int:
    """An id of which the first ports are free."""
    for number in range(1000 + os.getpid() % 500, 3000):
        try:
            for port in ports(number):
                socket.create_server(("", port)).close()
        except OSError:
            continue
        return number
    raise AssertionError("no free ports")


def ports(job: int) -> list[int]:
    return [FIRST_PORT + (job * 31 + 7919 * i) % NUM_PORTS for i in range(4)]


@pytest.fixture
def squatters(job: int) -> Iterator[None]:
    """Somebody who never answers at the first port, and a store of another job at the second."""
    silent = socket.create_server(("", ports(job)[0]))
    code = (
        "import sys, time; from datetime import timedelta; from torch.distributed import TCPStore\n"
        f"s = TCPStore('localhost', {ports(job)[1]}, None, True, timedelta(seconds=9), False)\n"
        "print('up', flush=True); time.sleep(300)"
    )
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    assert other.stdout.readline() == "up\n"
    yield
    silent.close()
    other.kill()
    other.wait()


@pytest.mark.usefixtures("squatters")
def test_taken_ports_are_passed_by(job: int) -> None:
    ranks = [start(job, rank, 3) for rank in (2, 1, 0)]
    assert [rank.communicate(timeout=120)[0].strip() for rank in ranks] == ["3"] * 3


def test_who_did_not_hear_the_answer_asks_again(job: int) -> None:
    """Rank 1 left before it was answered, since somebody silent was served first."""
    first = start(job, 0, 2)
    deadline = time.monotonic() + 60
    while True:
        try:
            asking = socket.create_connection(("localhost", ports(job)[0]), timeout=3)
            break
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.1)
    asking.sendall(f"{job}.0.0 1\n".encode())
    asking.close()
    ranks = [start(job, 1, 2), first]
    try:
        assert [rank.communicate(timeout=60)[0].strip() for rank in ranks] == ["2"] * 2
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


def test_an_earlier_start_of_the_job_is_not_met(job: int) -> None:
    """Rank 0 of a start that is cut off still waits for its rank 1."""
    stale = start(job, 0, 2, restart=0)
    try:
        time.sleep(3)
        ranks = [start(job, rank, 2, restart=1) for rank in (1, 0)]
        assert [rank.communicate(timeout=120)[0].strip() for rank in ranks] == ["2"] * 2
    finally:
        stale.kill()
        stale.wait()
