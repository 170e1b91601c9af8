"""What a process runs in: its place among others, its job, the cache, the versions of packages.

The only reader of RANK, LOCAL_RANK, WORLD_SIZE and SLURM's equivalents, as torchrun, deepspeed or
srun set them, and of which job this is.
With MOORED_RENDEZVOUS, as `launch/` sets it, MASTER_PORT is the first of several ports to try; so
it is where the processes can prove each other that they belong together, whoever started them.
Needs no torch and starts nothing: groups are `joining.py`'s.
"""

from __future__ import annotations

import math
import os
import platform
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from moored import __version__
from moored.utils.errors import UserError

FIRST_PORT, NUM_PORTS = 10000, 20000  # below the range that kernels give out by themselves
TRIED_PORTS = 8  # of a job, until one is free
_SLURM = {
    "RANK": "SLURM_PROCID",
    "WORLD_SIZE": "SLURM_STEP_NUM_TASKS",
    "LOCAL_RANK": "SLURM_LOCALID",
}
RENDEZVOUS_VARIABLE = "MOORED_RENDEZVOUS_SECONDS"
SECRET_VARIABLE = "MOORED_MEETING_SECRET"  # of one start, see distributed/secret.py
SECRET_FILE_VARIABLE = "MOORED_MEETING_SECRET_FILE"
NOT_INSTALLED = "not installed"
# What a run is made with: `moored doctor` asks for all of it, and a job for the same versions.
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "deepspeed", "datasets", "mlflow")


@dataclass(frozen=True, slots=True, kw_only=True)
class RankInfo:
    """This process's place among those that were started together.

    Attributes:
        rank: of this process, 0 to world_size - 1.
        world_size: processes in all.
        local_rank: of this process on its machine.
        address: host at which they meet; None for a process alone.
        ports: at that host: the one that the launcher keeps for them, or several of which rank 0
            takes the first that is free.
        rendezvous: the name of this start, with which they prove each other that they belong to it;
            empty where the port is the launcher's and they cannot: nobody has given them a secret,
            and they may share no folder to leave one in.
        one_machine: whether all of them are on the same one, as far as the launcher says.
        by_slurm: whether a step of srun is what started them.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    address: str | None = None
    ports: tuple[int, ...] = ()
    rendezvous: str = ""
    one_machine: bool = False
    by_slurm: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class SlurmJob:
    """The SLURM job that this process runs in.

    Attributes:
        id: of the job; an element of an array has one of its own.
        restart: how often SLURM has started it again.
    """

    id: str
    restart: int = 0


def version_of(name: str) -> str:
    """The version of a package, or of `python`; `NOT_INSTALLED` where it is not there."""
    # Imported here: the command line starts without it.
    from importlib.metadata import PackageNotFoundError, version

    if name == "python":
        return platform.python_version()
    if name == "moored":
        return __version__  # a source tree on the path has no metadata
    try:
        return version(name)
    except PackageNotFoundError:
        return NOT_INSTALLED


def versions_of(names: Iterable[str]) -> dict[str, str]:
    """The version of each, by its name."""
    return {name: version_of(name) for name in names}


def installed_versions(names: Iterable[str]) -> dict[str, str]:
    """`versions_of` those that are there."""
    return {name: found for name, found in versions_of(names).items() if found != NOT_INSTALLED}


def cache_folder() -> Path:
    """Where Moored keeps what is its own beside the runs: MOORED_CACHE, else ~/.cache/moored."""
    given = os.environ.get("MOORED_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return (Path(given) if given else Path(base) / "moored").expanduser()


def slurm_job() -> SlurmJob | None:
    """The job of this process; None outside of SLURM."""
    job = os.environ.get("SLURM_JOB_ID")
    return SlurmJob(id=job, restart=_integer("SLURM_RESTART_COUNT", 0)) if job else None


def launch_id() -> str | None:
    """What the launcher calls this start of the run, so that it knows its `state.json` again."""
    return os.environ.get("MOORED_LAUNCH") or None


def rank_info() -> RankInfo:
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
        return RankInfo(rank=0, local_rank=local_rank)
    if not 0 <= rank < world_size:
        raise UserError(
            f"{names['RANK']}={rank} is not below {names['WORLD_SIZE']}={world_size}: start all "
            "processes with one torchrun, deepspeed or srun"
        )
    address = os.environ.get("MASTER_ADDR") or (_first_host() if by_slurm else None)
    port, rendezvous = _integer("MASTER_PORT", 0), os.environ.get("MOORED_RENDEZVOUS", "")
    ports = (port,) if port else ()
    one_machine = _one_host() if by_slurm else _local_size() == world_size
    if by_slurm:
        ports, rendezvous = _slurm_ports(port)
    elif port and rendezvous:
        ports = _ports_from(port - FIRST_PORT)
    elif port and (one_machine or has_secret()):
        ports = _ports_from(port - FIRST_PORT + 1)  # the port itself is left to the launcher
        rendezvous = _attempt(f"{address}:{port}")
    for name, value in (("MASTER_ADDR", address), ("MASTER_PORT", ports)):
        if not value:
            raise UserError(
                f"{names['WORLD_SIZE']}={world_size} but {name} is not set: start with torchrun, "
                "the deepspeed launcher or srun"
            )
    return RankInfo(
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        address=address,
        ports=ports,
        rendezvous=rendezvous,
        one_machine=one_machine,
        by_slurm=by_slurm,
    )


def rendezvous_seconds(wanted: float) -> float:
    """How long to wait for the other processes: the environment's word, else `wanted`.

    Raises:
        UserError: it is no number of seconds.
    """
    value = os.environ.get(RENDEZVOUS_VARIABLE, "")
    try:
        seconds = float(value) if value else wanted
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise UserError(
            f"{RENDEZVOUS_VARIABLE}={value!r} is no number of seconds above 0: set it to one, such "
            "as 1800, or unset it"
        )
    return seconds


def has_secret() -> bool:
    """Whether a secret is named by which the processes of this start know each other."""
    return bool(os.environ.get(SECRET_VARIABLE) or os.environ.get(SECRET_FILE_VARIABLE))


def own_rank() -> int:
    """This process's rank; 0 where the environment is broken, so that somebody complains."""
    try:
        return rank_info().rank
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


def _one_host() -> bool:
    return not re.search(r"[\[,]", os.environ.get("SLURM_STEP_NODELIST", ","))


def _local_size() -> int:
    """Processes on this machine, as torchrun and `launch/` or DeepSpeed say; 0: not said."""
    return _integer("LOCAL_WORLD_SIZE", 0) or _integer("LOCAL_SIZE", 0)


def _attempt(place: str) -> str:
    """The name of a start under another's launcher, which may start it again by itself."""
    names = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")
    return " ".join([place, *(os.environ.get(name, "") for name in names)])


def _slurm_ports(port: int) -> tuple[tuple[int, ...], str]:
    """Ports of the step's own, the same on all its nodes (or the one given); the step's name."""
    job, step = _integer("SLURM_JOB_ID", 0), _integer("SLURM_STEP_ID", 0)
    ports = (port,) if port else _ports_from(job * 31 + step)
    cluster = os.environ.get("SLURM_CLUSTER_NAME", "")
    return ports, f"{cluster} {job}.{_integer('SLURM_RESTART_COUNT', 0)}.{step}".strip()


def _ports_from(first: int) -> tuple[int, ...]:
    # Steps of a prime's length, so that neighbouring jobs do not follow each other.
    return tuple(FIRST_PORT + (first + 7919 * i) % NUM_PORTS for i in range(TRIED_PORTS))
