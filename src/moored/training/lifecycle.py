"""How a run begins and ends: one owner, equal ranks, signals, and why it ended.

What happens in between is `train.py`'s and `compare.py`'s.
"""

from __future__ import annotations

import contextlib
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import torch

from moored.config import Config, load_config
from moored.distributed.mesh import Mesh, is_lost_peer, start_mesh
from moored.tracking import Tracker, ships_later
from moored.tracking.run_directory import RunDirectory, locked, open_run
from moored.utils.atomic_dir import write_atomically
from moored.utils.environment import launch_id, versions_of
from moored.utils.errors import (
    EvaluationFailedError,
    MooredError,
    PeerLostError,
    PreemptedError,
    TakenOverError,
    TrainingRefusedError,
    UserError,
)

STATUS = {
    PreemptedError: "preempted",
    TrainingRefusedError: "refused",
    EvaluationFailedError: "evaluation_failed",
    KeyboardInterrupt: "interrupted",
}
MLFLOW_STATUS = {"done": "FINISHED", "preempted": "KILLED", "interrupted": "KILLED"}


def join_mesh(config: Config) -> Mesh:
    """Meet the other processes of a recipe's run, waiting for them as long as it says."""
    return start_mesh(
        config.parallel.tensor_parallel_degree,
        wait_seconds=config.parallel.rendezvous_seconds,
        folder=config.output.dir,
        context_parallel_degree=config.parallel.context_parallel_degree,
        zero_hpz_partition_size=config.parallel.zero_hpz_partition_size,
    )


def open_run_on_all_ranks(
    stack: contextlib.ExitStack,
    config: Config,
    path: Path,
    mesh: Mesh,
    *,
    restart: bool,
    kind: str = "run",
) -> tuple[RunDirectory, int]:
    """Rank 0 locks and opens the directory; the others learn of it, or of why not."""
    ships_later()  # what it does not understand is said before there is a run
    error: BaseException | None = None
    if mesh.is_main:
        try:
            stack.enter_context(locked(path))
            directory = open_run(config, path, restart=restart, kind=kind)
            if directory.state().get("status") != "done":
                attempt = directory.state().get("attempt", 0) + 1
                directory.update_state(
                    kind=kind,
                    status="running",
                    attempt=attempt,
                    reason=None,
                    exit_code=None,
                    launch=launch_id(),
                )
        except (MooredError, OSError) as caught:
            error = caught if isinstance(caught, MooredError) else UserError(f"{path}: {caught}")
    mesh.raise_on_all_ranks(error)
    directory = RunDirectory(path)
    return directory, mesh.world.broadcast(directory.state().get("attempt", 1))


def as_begun(config: Config, directory: RunDirectory, mesh: Mesh) -> Config:
    """The recipe with what the run's own copy says of what it leaves open. Collective."""
    begun = load_config(directory.config).parallel.sequence_parallel if mesh.is_main else None
    return config.spread_by_tokens(mesh.world.broadcast(begun))


def say_layout(config: Config, directory: RunDirectory, mesh: Mesh, *, by_tokens: bool) -> None:
    """Write into the run's copy of the recipe what was chosen, so that it goes on with that."""
    if mesh.is_main and mesh.tp.size > 1 and config.parallel.sequence_parallel == "auto":
        said = config.spread_by_tokens(by_tokens)
        write_atomically(directory.config, said.dump_yaml().encode())


def start_tracking(
    config: Config, path: Path, attempt: int, mesh: Mesh, parent: Path | None = None
) -> Tracker:
    """The run's tracker; in a run over several machines one rank samples each. Collective."""
    hosts = mesh.world.gather(socket.gethostname())
    mine = hosts[mesh.world.rank]
    samples = len(set(hosts)) > 1 and hosts.index(mine) == mesh.world.rank
    return Tracker.start(
        config,
        path,
        attempt=attempt,
        is_main=mesh.is_main,
        parent=parent,
        machine=mine if samples else None,
    )


def require_same(mesh: Mesh, **hashes: str) -> None:
    """Every rank must hold the same recipe, data and versions."""
    mine = hashes | versions_of(("moored", "torch", "transformers", "peft", "deepspeed", "python"))
    for rank, theirs in enumerate(mesh.world.gather(mine)):
        for name, value in mine.items():
            if theirs[name] != value:
                raise UserError(
                    f"rank {rank} and rank {mesh.world.rank} differ in {name} "
                    f"({theirs[name][:16]} and {value[:16]}): start all ranks from the same "
                    "code, recipe and data"
                )


@contextlib.contextmanager
def signals_seen() -> Iterator[list[int]]:
    """Collect SIGTERM and SIGUSR1 instead of dying of them; the loop looks at every step."""
    seen: list[int] = []
    previous = {}
    for number in (signal.SIGTERM, signal.SIGUSR1):
        with contextlib.suppress(ValueError):  # not in the main thread
            previous[number] = signal.signal(number, lambda n, _frame: seen.append(n))
    try:
        yield seen
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def asked_to_stop(mesh: Mesh, signals: list[int]) -> bool:
    """Whether any rank has seen a signal; the same answer on all of them. Collective."""
    return mesh.world.max(float(bool(signals)), mesh.device) > 0


@contextlib.contextmanager
def failures_named(mesh: Mesh) -> Iterator[None]:
    """Say in words that a device is full, or what gloo and NCCL say of a broken connection."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            raise _out_of_memory(mesh, error) from error
        if mesh.world.size == 1 or not is_lost_peer(error):
            raise
        raise PeerLostError(
            f"rank {mesh.world.rank} lost another process of the run "
            f"({str(error).splitlines()[0][-120:]}): its own log, logs/rank-*.log, says why; start "
            "the same command again to go on from the newest checkpoint"
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it is what torch and Python say where memory is not to be had, on GPU or CPU."""
    kinds = torch.OutOfMemoryError, MemoryError
    return isinstance(error, kinds) or "can't allocate memory" in str(error)


def _out_of_memory(mesh: Mesh, error: BaseException) -> UserError:
    said = (str(error).splitlines() or [type(error).__name__])[0][:160].rstrip(".:")
    return UserError(
        f"rank {mesh.world.rank}: {said}. Lower train.micro_batch_size (or "
        "evaluation.micro_batch_size), then data.max_length; set train.gradient_checkpointing to "
        "non_reentrant and checkpointed_layers to 1, model.quantization to nf4; spread the model "
        "over the GPUs of a machine by parallel.tensor_parallel_degree with sequence_parallel, "
        "long rows over ranks by context_parallel_degree, or the base over all ranks by "
        "parallel.zero_stage=3 (`moored plan` says what fits)"
    )


@contextlib.contextmanager
def ending(directory: RunDirectory, tracker: Tracker, mesh: Mesh) -> Iterator[None]:
    """Write down how the run ended, whatever way that is."""
    status, reason, exit_code, owned = "done", None, 0, True
    try:
        with failures_named(mesh):
            yield
    except BaseException as error:
        status = next((s for kind, s in STATUS.items() if isinstance(error, kind)), "failed")
        reason = f"{type(error).__name__}: {error}"
        exit_code = 130 if isinstance(error, KeyboardInterrupt) else getattr(error, "exit_code", 1)
        owned = not isinstance(error, TakenOverError)
        raise
    finally:
        if mesh.is_main and owned:
            directory.update_state(status=status, reason=reason, exit_code=exit_code)
        # After a failure the other ranks are gone at once, and a launcher then ends this one too:
        # what is not shipped by then waits in the journal for the next attempt or `moored sync`.
        timeout = None if status == "done" else 5.0
        tracker.finish(MLFLOW_STATUS.get(status, "FAILED"), timeout=timeout)
