"""Which process of how many this is, as torchrun, deepspeed or srun say by the environment.

The only reader of RANK, LOCAL_RANK, WORLD_SIZE and SLURM's equivalents. Needs no torch and starts
nothing: groups are `mesh.py`'s.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from moored.errors import UserError

FIRST_PORT, NUM_PORTS = 10000, 20000  # below the range that kernels give out by themselves
_SLURM = {
    "RANK": "SLURM_PROCID",
    "WORLD_SIZE": "SLURM_STEP_NUM_TASKS",
    "LOCAL_RANK": "SLURM_LOCALID",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Launched:
    """This process's place among those that were started together.

    Attributes:
        rank: of this process, 0 to world_size - 1.
        world_size: processes in all.
        local_rank: of this process on its machine.
        address: host at which they meet; None for a process alone.
        port: at that host.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    address: str | None = None
    port: int | None = None


def launched() -> Launched:
    """Read the environment: RANK and the rest, else those of an srun step.

    Raises:
        UserError: a value is no number, or the ranks are told no place to meet.
    """
    # A batch script has SLURM_PROCID too, but only `srun` sets the step's.
    by_slurm = "RANK" not in os.environ and "SLURM_STEP_ID" in os.environ
    names = {name: _SLURM[name] if by_slurm else name for name in _SLURM}
    rank = _integer(names["RANK"], 0)
    world_size = _integer(names["WORLD_SIZE"], 1)
    local_rank = _integer(names["LOCAL_RANK"], 0)
    if world_size == 1:
        return Launched(rank=0, local_rank=local_rank)
    if not 0 <= rank < world_size:
        raise UserError(
            f"{names['RANK']}={rank} is not below {names['WORLD_SIZE']}={world_size}: start all "
            "processes with one torchrun, deepspeed or srun"
        )
    address = os.environ.get("MASTER_ADDR") or (_first_host() if by_slurm else None)
    port = _integer("MASTER_PORT", _slurm_port() if by_slurm else 0)
    for name, value in (("MASTER_ADDR", address), ("MASTER_PORT", port)):
        if not value:
            raise UserError(
                f"{names['WORLD_SIZE']}={world_size} but {name} is not set: start with torchrun, "
                "the deepspeed launcher or srun"
            )
    return Launched(
        rank=rank, world_size=world_size, local_rank=local_rank, address=address, port=port
    )


def own_rank() -> int:
    """This process's rank; 0 where the environment is broken, so that somebody complains."""
    try:
        return launched().rank
    except UserError:
        return 0


def _integer(name: str, default: int) -> int:
    value = os.environ.get(name, str(default))
    try:
        return int(value)
    except ValueError:
        raise UserError(
            f"{name}={value!r} is not a whole number: start with torchrun, deepspeed or srun, "
            f"or unset {name} for one process"
        ) from None


def _first_host() -> str | None:
    """The first host of the step: `node[03-05,9],x1` is node03, `r[1-2]n[1-4]` is r1n1."""
    nodes = os.environ.get("SLURM_STEP_NODELIST", "")
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first.group()) if first else None


def _slurm_port() -> int:
    """A port of the step's own, the same on all its nodes."""
    job, step = _integer("SLURM_JOB_ID", 0), _integer("SLURM_STEP_ID", 0)
    return FIRST_PORT + (job * 31 + step) % NUM_PORTS
