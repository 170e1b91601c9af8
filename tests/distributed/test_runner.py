"""The runner itself: results in order, a failure's traceback, a death, a rank that hangs."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

from distributed.runner import run_distributed


def add_ranks(rank: int, world_size: int, start: torch.Tensor) -> tuple[int, torch.Tensor]:
    total = start + rank
    dist.all_reduce(total)
    return rank, total


def fail_on_rank_1(rank: int, world_size: int) -> None:
    if rank == 1:
        raise ValueError("the reef at rank one")
    dist.barrier()


def die_on_rank_0(rank: int, world_size: int) -> None:
    if rank == 0:
        os._exit(7)
    dist.barrier()


def hang(rank: int, world_size: int) -> None:
    time.sleep(3600)


def test_results_come_back_in_rank_order() -> None:
    results = run_distributed(add_ranks, 2, torch.tensor([10.0]))
    assert [rank for rank, _ in results] == [0, 1]
    assert all(total.item() == 21.0 for _, total in results)


@pytest.mark.parametrize(
    ("fn", "message", "timeout"),
    [
        (fail_on_rank_1, "rank 1 of 2 failed(.|\n)*the reef at rank one", 3600),
        (die_on_rank_0, r"(died without a word, exit codes .*7|rank 1 of 2 failed)", 3600),
        (hang, r"no result from ranks \[0, 1\]", 6),
    ],
)
def test_a_failure_ends_all_ranks_and_is_told(fn, message: str, timeout: float) -> None:
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=message):
        run_distributed(fn, 2, timeout=timeout)
    assert time.monotonic() - start < 600
