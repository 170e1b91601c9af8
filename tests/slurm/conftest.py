"""One cluster for all tests of this folder."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from slurmkit import SAVED, STEPS, Desk, minicluster
from tiny import tiny_recipe, write_recipe

SPANK_HEADER = Path("/usr/include/slurm/spank.h")


def _free_ports(count: int) -> int:
    """The first of so many ports in a row that are free.

    Workers that start at once look in ranges of their own: what one has found is not bound yet.
    """
    number = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    start = 24000 + 750 * (number % 8)
    for first in range(start, start + 750 - count, count):
        sockets = [socket.socket() for _ in range(count)]
        try:
            for offset, each in enumerate(sockets):
                each.bind(("", first + offset))
        except OSError:
            continue
        else:
            return first
        finally:
            for each in sockets:
                each.close()
    raise AssertionError("no ports are free")


@pytest.fixture(scope="session")
def cluster() -> Iterator[Any]:
    """Four nodes; srun knows the options of pyxis."""
    module = minicluster()
    missing = [name for name in (*module.PROGRAMS, "gcc") if shutil.which(name) is None]
    if missing or not SPANK_HEADER.exists() or os.geteuid() != 0:
        if os.geteuid() != 0 or shutil.which("apt-get") is None:
            reason = "a SLURM of one's own needs root, and Debian's slurmctld, slurmd, libslurm-dev"
            if os.environ.get("MOORED_REQUIRE_SLURM"):
                pytest.fail(reason)
            pytest.skip(reason)
        module.install()
        command = ["apt-get", "install", "-y", "-qq", "--no-install-recommends"]
        subprocess.run([*command, "libslurm-dev", "gcc", "libc6-dev"], check=True)
    # Short: the path of munge's socket may have no more than 108 characters.
    root = Path(tempfile.mkdtemp(prefix="moored-slurm-", dir="/tmp"))
    plugin = root / "pyxis_stub.so"
    source = Path(__file__).with_name("pyxis_stub.c")
    subprocess.run(["gcc", "-shared", "-fPIC", "-Wall", "-o", plugin, source], check=True)
    cluster = module.Cluster(root, num_nodes=4, port=_free_ports(8), plugin=plugin)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(root, ignore_errors=True)


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model for long enough to be disturbed."""
    folder = tmp_path_factory.mktemp("recipe")
    values = tiny_recipe(folder)
    values["train"] |= {"steps": STEPS, "save_every": SAVED, "global_batch_sequences": 4}
    return write_recipe(folder, values)


@pytest.fixture
def desk(cluster: Any, recipe: Path) -> Iterator[Desk]:
    """A place to submit from; every node is up at the start of a test."""
    for node in cluster.nodes:
        cluster.revive(node)
    cluster.wait_until_up(cluster.nodes)
    desk = Desk(cluster, recipe)
    yield desk
    desk.sh("scancel", "--quiet", "--user=root")
