"""The run directory: its paths, who owns it, and `state.json`.

What a checkpoint holds is `checkpoint.py`'s; what the journal holds is the tracker's.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moored.config import Config, load_config
from moored.errors import UserError
from moored.sealed import fsync_directory

STALE_LOCK_SECONDS = 600.0


def write_atomically(path: Path, data: bytes) -> None:
    """Replace `path` by `data` so that a reader or a crash sees the old or the new, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    fsync_directory(path.parent)


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
        write_atomically(self.state_file, (json.dumps(state, indent=1) + "\n").encode())

    def clear(self) -> None:
        """Remove what a run wrote, but not the lock of who calls this."""
        for child in self.path.iterdir():
            if child == self.lock:
                continue
            if child.is_dir() and not child.is_symlink():
                shutil.rmtree(child)
            else:
                child.unlink()


def open_run(config: Config, path: Path, *, restart: bool) -> RunDirectory:
    """Create or reopen the run directory of a recipe. Called on rank 0, under its lock.

    Args:
        config: the recipe.
        path: the run directory.
        restart: whether to remove what an earlier run left.

    Raises:
        UserError: the directory belongs to another recipe.
    """
    directory = RunDirectory(path)
    if not directory.config.exists():
        if any(child.name not in {"lock", "logs"} for child in path.iterdir()):
            raise UserError(f"{path} exists and is not a run directory: choose another name=...")
    elif restart:
        load_config(directory.config)  # a folder with somebody else's config.yaml is not cleared
        directory.clear()
    else:
        changed = load_config(directory.config).changed_keys(config)
        if changed:
            raise UserError(
                f"{path} holds a run of another recipe (it differs in {', '.join(changed[:5])}): "
                "choose another name=..., or start over with --restart"
            )
    write_atomically(directory.config, config.dump_yaml().encode())
    return directory


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Own the run directory while the body runs, so that no two jobs write to it.

    A lock is taken over when its process is gone: on this host by its pid and start time, on
    another one when its heartbeat (`heartbeat`) is older than ten minutes.

    Raises:
        UserError: another live process owns it.
    """
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    lock = path / "lock"
    mine = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": _start_time(os.getpid()),
        "job": os.environ.get("SLURM_JOB_ID"),
    }
    for _ in range(2):
        try:
            descriptor = os.open(lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
            break
        except FileExistsError:
            _require_stale(lock, path)
            lock.unlink(missing_ok=True)
    else:
        raise UserError(f"{path} was locked by another process just now: try again")
    with os.fdopen(descriptor, "w") as file:
        json.dump(mine, file)
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)


def heartbeat(path: Path) -> None:
    """Say that the owner of the lock in `path` is alive."""
    with contextlib.suppress(OSError):
        os.utime(path / "lock")


def _require_stale(lock: Path, path: Path) -> None:
    try:
        owner = dict(json.loads(lock.read_text() or "{}"))
        age = time.time() - lock.stat().st_mtime
    except (FileNotFoundError, ValueError, TypeError):
        return
    if owner.get("host") == socket.gethostname():
        alive = owner.get("started") == _start_time(owner.get("pid", -1))
    else:
        alive = age < STALE_LOCK_SECONDS
    if alive and owner:
        raise UserError(
            f"{path} is in use by process {owner.get('pid')} on {owner.get('host')}: wait for it, "
            "end it, or choose another name=..."
        )


def _start_time(pid: int) -> str | None:
    """When a process started, in clock ticks since boot; None if there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = stat[stat.rindex(")") + 2 :].split()
    return None if fields[0] == "Z" else fields[19]
