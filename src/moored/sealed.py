"""Folders that are whole or absent: made once under a lock, sealed by a manifest, verified on use.

What lies in such a folder is its maker's business; no format is known here.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import filelock

from moored.errors import UserError

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
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
    if fault_of(folder) is None:
        return read_manifest(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(folder.parent / f".{folder.name}.lock", timeout=timeout)
        with _held(lock, folder, timeout):
            fault = fault_of(folder)
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
def publishing(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Fill an empty folder, which is sealed and gets its name when the body ends well.

    Where another process was first, its copy stays.

    Yields:
        The folder to fill, and facts for the manifest, to be filled, too.
    """
    with tempfile.TemporaryDirectory(
        prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent, ignore_cleanup_errors=True
    ) as temporary:
        new, facts = Path(temporary) / "new", dict[str, Any]()
        new.mkdir(mode=0o700)
        yield new, facts
        seal(new, facts)
        if fault_of(folder) is None:
            return
        if folder.exists():
            shutil.rmtree(folder)
        os.rename(new, folder)
        fsync_directory(folder.parent)


@contextlib.contextmanager
def _held(lock: filelock.BaseFileLock, folder: Path, timeout: float):
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        log.info("another process makes %s: waiting for it", folder)
        try:
            lock.acquire()
        except filelock.Timeout:
            raise UserError(
                f"{lock.lock_file} has been held for {timeout:.0f} s: end the process that makes "
                f"{folder.name}, or remove the lock if there is none"
            ) from None
    try:
        yield
    finally:
        lock.release()


def seal(folder: Path, facts: dict[str, Any] | None = None) -> None:
    """Flush every file below `folder` and write the manifest over them, and over `facts`."""
    files: dict[str, dict[str, Any]] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        name = path.relative_to(folder).as_posix()
        files[name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    with open(folder / MANIFEST, "w", encoding="utf-8") as file:
        json.dump({**(facts or {}), "files": files}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    for child in (folder, *(p for p in folder.rglob("*") if p.is_dir())):
        fsync_directory(child)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a sealed folder."""
    return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))


def fault_of(folder: Path) -> str | None:
    """Why a sealed folder cannot be trusted; None when every byte is as it was written.

    Everything is read: safetensors itself loads a flipped bit without a word.
    """
    try:
        files = read_manifest(folder)["files"]
        if not files:
            return "its manifest names no files"
        for name, expected in files.items():
            path = folder / name
            if path.is_symlink() or not path.resolve().is_relative_to(folder.resolve()):
                return f"{name} leads out of it"
            if path.stat().st_size != expected["bytes"]:
                return f"{name} has {path.stat().st_size} bytes, not {expected['bytes']}"
            if sha256(path) != expected["sha256"]:
                return f"{name} has other content than was written"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def sha256(path: Path) -> str:
    """Of a file's content, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync_directory(path: Path) -> None:
    """Make what was created or renamed inside `path` durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
