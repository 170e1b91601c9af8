"""Run one function on several real gloo processes and hand back what each rank returned.

`fn` must be importable by the child (defined at a module's top level); its arguments and results
must be picklable. A rank that fails ends all of them at once, and its traceback is the test's.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import queue
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import forking


def run_distributed(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout: float = 900,
) -> list[Any]:
    """Call fn(rank, world_size, *args) on `world_size` processes of one gloo group.

    Each process has RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT,
    and one torch thread, beside this process's environment. The group meets over a file, so no port
    can be taken by another test.

    Returns:
        The results in rank order.

    Raises:
        RuntimeError: a rank raised (with its traceback), died, or `timeout` seconds passed.
    """
    results = multiprocessing.get_context("forkserver").Queue()
    # By value: tensors shared between processes would die with the process that made them.
    call = pickle.dumps((fn, args))
    with tempfile.TemporaryDirectory() as folder:
        meeting = f"file://{Path(folder) / 'meeting'}"
        place = (dict(os.environ), list(sys.path))
        job = (world_size, meeting, forking.free_port(), place, timeout)
        with forking.forked_from() as context:
            processes = [
                context.Process(target=_worker, args=(rank, job, results, call))
                for rank in range(world_size)
            ]
            for process in processes:
                process.start()
        grace = 0.0
        try:
            values = _collect(processes, results, timeout)
            grace = 10.0
            return values
        finally:
            for process in processes:
                process.join(grace)
                if process.is_alive():
                    process.kill()
                    process.join()


def mostly_long(cases: Iterable[Any], *short: Any) -> list[Any]:
    """Cases as parameters of a test, of which `make test` has those that are named."""
    known = list(cases)
    assert all(case in known for case in short)
    return [case if case in short else pytest.param(case, marks=pytest.mark.long) for case in known]


def _collect(processes: list[Any], results: Any, timeout: float) -> list[Any]:
    done: dict[int, Any] = {}
    deadline = time.monotonic() + timeout
    while len(done) < len(processes):
        codes = {rank: process.exitcode for rank, process in enumerate(processes)}
        try:
            rank, ok, value = results.get(timeout=0.2)
        except queue.Empty:
            lost = {r: code for r, code in codes.items() if r not in done and code is not None}
            if lost:
                raise RuntimeError(f"ranks died without a word, exit codes {lost}") from None
            if time.monotonic() > deadline:
                missing = sorted(set(codes) - set(done))
                raise RuntimeError(f"no result from ranks {missing} in {timeout} s") from None
            continue
        if not ok:
            raise RuntimeError(f"rank {rank} of {len(processes)} failed:\n{value}")
        done[rank] = pickle.loads(value)
    return [done[rank] for rank in range(len(processes))]


def _worker(rank: int, job: tuple[int, str, int, Any, float], results: Any, call: bytes):
    world_size, meeting, port, (environment, path), timeout = job
    sys.path[:] = path
    os.environ.clear()
    os.environ.update(
        environment,
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    try:
        fn, args = pickle.loads(call)
        dist.init_process_group(
            "gloo",
            init_method=meeting,
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout),
        )
        value = pickle.dumps(fn(rank, world_size, *args))
        if dist.is_initialized():
            dist.barrier()
        results.put((rank, True, value))
        if dist.is_initialized():
            dist.destroy_process_group()
    except BaseException:
        results.put((rank, False, traceback.format_exc()))
