"""The run directory: its paths, who owns it, and `state.json`.

What a checkpoint holds is `checkpoint.py`'s; what the journal holds is the tracker's.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moored.config import Config, load_config
from moored.utils import scheduler
from moored.utils.atomic_dir import write_atomically, write_json
from moored.utils.environment import slurm_job
from moored.utils.errors import TakenOverError, UserError

log = logging.getLogger(__name__)
# What a run directory holds, and the command that makes it.
COMMANDS = {"run": "train", "comparison": "compare", "sweep": "sweep"}
# All that is in one which was begun, and no more, before anything is trained.
BEGUN = {"config.yaml", "lock", "logs"}
WRITTEN = BEGUN | {"adapter", "arms", "checkpoints", "journal.jsonl", "mlflow.json", "report"}
WRITTEN |= {"scales", "shipper.lock", "slurm", "state.json"}
STALE_LOCK_SECONDS = 600.0
GONE_LOCK_SECONDS = 60.0  # where SLURM says that the owner's job is gone


def path_of(config: Config) -> Path:
    """Where a recipe's run is, unless its command says otherwise."""
    return (config.output.dir / config.name).absolute()


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """Paths of one run, and its small files."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved recipe."""
        return self.path / "config.yaml"

    @property
    def state_file(self) -> Path:
        """Status, step, attempt and why it ended, as JSON."""
        return self.path / "state.json"

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        """The final adapter, as PEFT writes it."""
        return self.path / "adapter"

    @property
    def report(self) -> Path:
        """Folder of the report."""
        return self.path / "report"

    @property
    def lock(self) -> Path:
        """Who writes here now."""
        return self.path / "lock"

    @property
    def slurm(self) -> Path:
        """What `moored submit` left: script, recipe and code of the job, and what became of it."""
        return self.path / "slurm"

    @property
    def sweep_file(self) -> Path:
        """The arms of a sweep; no other directory has this file."""
        return self.slurm / "arms.json"

    @property
    def arms(self) -> list[RunDirectory]:
        """The runs of a comparison or a sweep; none of a run."""
        return [RunDirectory(path) for path in sorted(self.path.glob("arms/*")) if path.is_dir()]

    def arm(self, name: str) -> RunDirectory:
        """The run of one arm of a comparison or a sweep."""
        return RunDirectory(self.path / "arms" / name)

    @property
    def kind(self) -> str:
        """`run`, `comparison` or `sweep`; older versions did not write it down."""
        if self.sweep_file.exists():
            return "sweep"
        with contextlib.suppress(UserError, KeyError):
            return str(self.state()["kind"])
        return "comparison" if (self.path / "arms").is_dir() else "run"

    def state(self) -> dict[str, Any]:
        """The content of `state.json`; empty when there is none yet."""
        try:
            return dict(json.loads(self.state_file.read_text()))
        except FileNotFoundError:
            return {}
        except (ValueError, TypeError) as error:
            raise UserError(
                f"{self.state_file} is not valid JSON ({error}): remove it to resume from the "
                "newest checkpoint, or start over with --restart"
            ) from error

    def update_state(self, **fields: Any) -> None:
        """Merge `fields` into `state.json`."""
        state = self.state() | fields | {"updated": round(time.time(), 3)}
        write_json(self.state_file, state)

    def require_owned(self) -> None:
        """Refuse to write once another process has taken the run over.

        A process that was cut off from the rest of a cluster does not know that it was replaced.

        Raises:
            TakenOverError: the lock is not this process's.
        """
        owner = _owner(self.lock)
        if owner is None or not _is_me(owner):
            who = "nobody" if owner is None else f"{_words(owner)}"
            raise TakenOverError(f"{self.path} belongs to {who} now: this process leaves it alone")

    def is_vacant(self) -> bool:
        """Whether nothing would be lost here: nothing trained, and nobody else's files."""
        names = {child.name for child in self.path.iterdir() if not child.name.startswith(".")}
        begun = names <= BEGUN or bool(names & {"state.json", "slurm"})
        return names <= WRITTEN and begun and self.is_untrained()

    def is_untrained(self) -> bool:
        """Whether no step was made here, or none that was kept, and no job is to make one."""
        state = self.state()
        if "step" in state or state.get("status") == "done" or self.adapter.exists():
            return False
        if any(self.checkpoints.glob("[!.]*")) or _is_queued(self):
            return False
        return all(arm.is_untrained() and not is_owned(arm.path) for arm in self.arms)

    def clear(self, *, but: Sequence[Path] = ()) -> None:
        """Remove what a run wrote, but not the lock of who calls this, nor the job that runs it."""
        for child in self.path.iterdir():
            if child in (self.lock, self.slurm, *but):
                continue
            if child.is_dir() and not child.is_symlink():
                shutil.rmtree(child)
            else:
                child.unlink()


def open_run(config: Config, path: Path, *, restart: bool, kind: str = "run") -> RunDirectory:
    """Create or reopen the run directory of a recipe. Called on rank 0, under its lock.

    Where nothing was trained yet, a changed recipe makes it its own.

    Args:
        config: the recipe.
        path: the run directory.
        restart: whether to remove what an earlier run left.
        kind: of `COMMANDS`: what shall be there.

    Raises:
        UserError: the directory belongs to another recipe, or holds another kind.
    """
    directory = RunDirectory(path)
    if not directory.config.exists():
        if any(child.name not in {"lock", "logs", "slurm"} for child in path.iterdir()):
            raise UserError(f"{path} exists and is not a run directory: choose another name=...")
    else:
        # A folder with somebody else's config.yaml is not cleared.
        begun = load_config(directory.config)
        changed = begun.changed_keys(config)
        require_kind(directory, kind)
        if restart:
            directory.clear()
        elif directory.kind != kind or changed:
            if not directory.is_vacant():
                raise UserError(
                    f"{path} holds a run of another recipe (it differs in "
                    f"{', '.join(changed[:5])}): choose another name=..., or start over with "
                    "--restart"
                )
            logs = path / "logs"  # a launcher writes there already
            directory.clear(but=[logs])
            shutil.rmtree(logs / "system", ignore_errors=True)
        else:
            config = config.going_on(begun)
    write_atomically(directory.config, config.dump_yaml().encode())
    return directory


def require_kind(directory: RunDirectory, kind: str) -> None:
    """Refuse a directory of another kind, unless it is vacant and no sweep's.

    Raises:
        UserError: it does.
    """
    held = directory.kind
    if held != kind and (held == "sweep" or not directory.is_vacant()):
        raise UserError(
            f"{directory.path} is a {held}: choose another name=..., or go on with it by "
            f"`moored {COMMANDS[held]}`"
        )


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Own the run directory while the body runs, so that no two jobs write to it.

    A lock is taken over when its process is gone: on this host by its pid and start time; of an
    earlier start of the same SLURM job at once; of another job once SLURM says that it is gone and
    the heartbeat (`heartbeat`) is a minute old; else when that is older than ten minutes. Who was
    replaced and still runs finds out by `RunDirectory.require_owned`.

    Raises:
        UserError: another live process owns it, or it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise UserError(
            f"{path} cannot be made: {error.strerror}: choose another output.dir"
        ) from error
    directory, job = RunDirectory(path), slurm_job()
    mine = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": _start_time(os.getpid()),
        "job": job and job.id,
        "restart": job and job.restart,
    }
    for _ in range(2):
        try:
            descriptor = os.open(directory.lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
            break
        except FileExistsError:
            while _alive(directory.lock, path):
                time.sleep(1.0)
            directory.lock.unlink(missing_ok=True)
    else:
        raise UserError(f"{path} was locked by another process just now: try again")
    with os.fdopen(descriptor, "w") as file:
        json.dump(mine, file)
    try:
        yield
    finally:
        with contextlib.suppress(TakenOverError, OSError):
            directory.require_owned()
            directory.lock.unlink(missing_ok=True)


def heartbeat(directory: RunDirectory) -> None:
    """Say that the owner of the lock is alive.

    Raises:
        TakenOverError: it is another one by now.
    """
    directory.require_owned()
    with contextlib.suppress(OSError):
        os.utime(directory.lock)


def is_owned(path: Path) -> bool:
    """Whether somebody seems to work in a run directory now: by process, else by heartbeat."""
    lock = RunDirectory(path).lock
    owner = _owner(lock)
    if owner is None:
        return False
    if owner.get("host") == socket.gethostname():
        return owner.get("started") == _start_time(owner.get("pid", -1))
    with contextlib.suppress(FileNotFoundError):
        return time.time() - lock.stat().st_mtime < STALE_LOCK_SECONDS
    return False


def _is_queued(directory: RunDirectory) -> bool:
    """Whether a job that was submitted for the directory waits or runs, or may do so."""
    try:
        jobs = json.loads((directory.slurm / "jobs.json").read_text())["jobs"]
        return scheduler.is_here() and any(scheduler.is_alive(j["id"], j["name"]) for j in jobs)
    except (OSError, ValueError, KeyError, TypeError):
        return False
    except UserError:  # SLURM does not answer
        return True


def _owner(lock: Path) -> dict[str, Any] | None:
    """What the lock says; None where there is none, or one that was cut short."""
    try:
        return dict(json.loads(lock.read_text() or "{}")) or None
    except (FileNotFoundError, ValueError, TypeError):
        return None


def _is_me(owner: dict[str, Any]) -> bool:
    here = owner.get("host") == socket.gethostname() and owner.get("pid") == os.getpid()
    return here and owner.get("started") == _start_time(os.getpid())


def _words(owner: dict[str, Any]) -> str:
    job = f"job {owner['job']}, " if owner.get("job") else ""
    return f"{job}process {owner.get('pid')} on {owner.get('host')}"


def _alive(lock: Path, path: Path) -> bool:
    """Whether to go on waiting for the lock's owner, which is gone, but not for long.

    Raises:
        UserError: it is alive.
    """
    owner, job = _owner(lock), slurm_job()
    try:
        age = time.time() - lock.stat().st_mtime
    except FileNotFoundError:
        return False
    if owner is None:
        return False
    theirs = owner.get("job")
    if job is not None and theirs == job.id and (owner.get("restart") or 0) < job.restart:
        log.info("taking over from an earlier start of this job (%s)", _words(owner))
        return False
    if owner.get("host") == socket.gethostname():
        if owner.get("started") != _start_time(owner.get("pid", -1)):
            return False
    elif age >= STALE_LOCK_SECONDS:
        return False
    elif theirs and (job is None or theirs != job.id) and _is_gone(theirs):
        log.info("%s was left by %s, which is gone: taking over", lock, _words(owner))
        return age < GONE_LOCK_SECONDS
    raise UserError(
        f"{path} is in use by {_words(owner)}: wait for it, end it"
        f"{' (moored cancel)' if theirs else ''}, or choose another name=..."
    )


def _is_gone(job: str) -> bool:
    try:
        return scheduler.is_here() and not scheduler.is_alive(job)
    except UserError:
        return False


def _start_time(pid: int) -> str | None:
    """When a process started, in clock ticks since boot; None if there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = stat[stat.rindex(")") + 2 :].split()
    return None if fields[0] == "Z" else fields[19]
