"""Folders and files that are whole or absent: written aside, renamed, and folders verified on use.

A folder may be made once under a lock, and a manifest tells what belongs into it. What lies in it
is its maker's business; of formats JSON alone is known, as values that any reader takes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import filelock

from moored.utils.errors import UserError
from moored.utils.progress import WATCH_SECONDS, Phase

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
BLOCK_BYTES = 2**20  # read at a time
LOCK_SECONDS = 3600.0  # a peer that downloads and converts may take long, but not for ever


def make_once(
    folder: Path, make: Callable[[Path], dict[str, Any]], *, timeout: float = LOCK_SECONDS
) -> dict[str, Any]:
    """Have `folder` whole: as it lies there if it verifies, else newly made.

    Several processes may call this at once, on one machine or over a shared file system: one makes
    it, the others wait. Where the file system has no working locks, each makes its own copy and
    the first one stays; no reader ever sees half a folder.

    Args:
        folder: what shall exist in the end.
        make: fills the empty folder it is given and returns facts (JSON-able) for the manifest.
        timeout: seconds to wait for another process.

    Returns:
        The manifest: `files` (size and SHA-256 of each) and the facts.

    Raises:
        UserError: the lock or the folder cannot be had.
    """
    if verify(folder) is None:
        return read_manifest(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(folder.parent / f".{folder.name}.lock", timeout=timeout)
        with _held(lock, folder, timeout):
            fault = verify(folder)
            if fault is not None:
                if folder.exists():
                    log.warning("%s is broken (%s): making it again", folder, fault)
                _make(folder, make)
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written: {error.strerror or error}: free space there, or set "
            "MOORED_CACHE to a writable folder"
        ) from error
    return read_manifest(folder)


def _make(folder: Path, make: Callable[[Path], dict[str, Any]]) -> None:
    with publishing(folder) as (new, facts):
        facts.update(make(new))


@contextlib.contextmanager
def temporary_beside(folder: Path) -> Iterator[Path]:
    """An empty folder for work beside `folder`, on its disk, which goes when the body ends."""
    with tempfile.TemporaryDirectory(
        prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent, ignore_cleanup_errors=True
    ) as temporary:
        yield Path(temporary)


@contextlib.contextmanager
def publishing(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Fill an empty folder, which is sealed and gets its name when the body ends well.

    Where another process was first, its copy stays.

    Yields:
        The folder to fill, and facts for the manifest, to be filled, too.
    """
    with temporary_beside(folder) as temporary:
        new, facts = temporary / "new", dict[str, Any]()
        new.mkdir(mode=0o700)
        yield new, facts
        seal(new, facts)
        if verify(folder) is not None:
            _put_in_place(new, folder)


@contextlib.contextmanager
def replacing(folder: Path, *, before_rename: Callable[[], None] = lambda: None) -> Iterator[Path]:
    """Fill an empty folder, which takes the place of `folder` when the body ends well.

    For a folder with one writer: meanwhile the new one is `.NAME.tmp` beside it, and what a killed
    writer left there goes.

    Args:
        folder: what is replaced, if it is there.
        before_rename: called once the new folder is filled; raises where nothing may be replaced.

    Yields:
        The folder to fill.
    """
    new = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(new, ignore_errors=True)
    try:
        new.mkdir(parents=True, mode=0o700)
        yield new
    except OSError:
        shutil.rmtree(new, ignore_errors=True)  # it may be what fills the disk
        raise
    before_rename()
    _put_in_place(new, folder)


def _put_in_place(new: Path, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(new, folder)
    fsync_directory(folder.parent)


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


@contextlib.contextmanager
def private_files() -> Iterator[None]:
    """What the body makes is for its owner alone (umask 077, of the whole process)."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


@contextlib.contextmanager
def _held(lock: filelock.BaseFileLock, folder: Path, timeout: float):
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        log.info("another process makes %s: waiting for it", folder)
        if not _waited(lock, folder, timeout):
            raise UserError(
                f"{lock.lock_file} has been held for {timeout:.0f} s: end the process that makes "
                f"{folder.name}, or remove the lock if there is none"
            ) from None
    try:
        yield
    finally:
        lock.release()


def _waited(lock: filelock.BaseFileLock, folder: Path, timeout: float) -> bool:
    """Whether the lock could be had in time."""
    until = time.monotonic() + timeout
    with Phase(f"waiting for another process that makes {folder.name}") as phase:
        while (left := until - time.monotonic()) > 0:
            with contextlib.suppress(filelock.Timeout):
                lock.acquire(timeout=min(left, WATCH_SECONDS))
                return True
            phase.tick()
    return False


def seal(folder: Path, facts: dict[str, Any] | None = None) -> None:
    """Write the manifest over every file below `folder`, and over `facts`; flush all of it."""
    manifest = {**(facts or {}), "files": contents(folder, "hashing what was written")}
    with open(folder / MANIFEST, "w", encoding="utf-8") as file:
        json.dump(manifest, file, indent=1)
    flush(folder)


def contents(folder: Path, what: str) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file below `folder`, by its name there.

    Args:
        folder: what is read.
        what: the work, in words, for those who wait for it.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    with hashing(what, paths) as phase:
        return {
            path.relative_to(folder).as_posix(): {
                "bytes": path.stat().st_size,
                "sha256": sha256(path, phase),
            }
            for path in paths
        }


def flush(folder: Path) -> None:
    """Make everything below `folder` durable."""
    for path in (folder, *folder.rglob("*")):
        if path.is_dir():
            fsync_directory(path)
        elif path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a sealed folder."""
    return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))


def verify(folder: Path) -> str | None:
    """Why a sealed folder cannot be trusted; None when every byte is as it was written.

    Everything is read: safetensors itself loads a flipped bit without a word.
    """
    try:
        files = read_manifest(folder)["files"]
        if not files:
            return "its manifest names no files"
        size = sum(expected["bytes"] for expected in files.values())
        with Phase(f"verifying {folder.name}", size / 1e9, "GB") as phase:
            for name, expected in files.items():
                path = folder / name
                if path.is_symlink() or not path.resolve().is_relative_to(folder.resolve()):
                    return f"{name} leads out of it"
                if path.stat().st_size != expected["bytes"]:
                    return f"{name} has {path.stat().st_size} bytes, not {expected['bytes']}"
                if sha256(path, phase) != expected["sha256"]:
                    return f"{name} has other content than was written"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def hashing(what: str, paths: Iterable[Path], times: int = 1) -> Phase:
    """What `sha256` tells of how far the files are read, in GB; each is read so many `times`."""
    return Phase(what, times * sum(path.stat().st_size for path in paths) / 1e9, "GB")


def sha256(path: Path, phase: Phase | None = None) -> str:
    """The SHA-256 of a file's content, in hex; the phase is told how many GB of it are read."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(BLOCK_BYTES))
    with open(path, "rb", buffering=0) as file:
        while size := file.readinto(buffer):
            digest.update(buffer[:size])
            if phase is not None:
                phase.advance(size / 1e9)
    return digest.hexdigest()


def fsync_directory(path: Path) -> None:
    """Make what was created or renamed inside `path` durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def jsonable(value: Any) -> Any:
    """A value of JSON's own kinds: a dataclass is its fields, a tuple is a list.

    NaN and infinities, which JSON has no numbers for, become the strings that `float` reads.
    """
    if is_dataclass(value):
        return {item.name: jsonable(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by a value as indented JSON, so that a reader sees the old or the new."""
    write_atomically(path, (json.dumps(value, indent=1) + "\n").encode())
