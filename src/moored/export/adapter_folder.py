"""The folder of an export: free before, whole or absent after, with the facts about it.

What lies in it is made beside; modes are those of the umask, since others are to read it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moored.export.card.gather import utc
from moored.utils import atomic_dir
from moored.utils.environment import versions_of
from moored.utils.errors import UserError
from moored.utils.json_files import write_json

FACTS = "export.json"
EXPORT_VERSIONS = ("moored", "torch", "transformers", "peft", "bitsandbytes")
SPARE_BYTES = 64 * 2**20  # tokenizer, probe, small files


def require_free_name(to: Path, run: Path) -> None:
    """Refuse a place that holds something, or lies in the run directory.

    Raises:
        UserError: see above.
    """
    if to.is_symlink() or (to.exists() and not to.is_dir()):
        raise UserError(f"{to} exists and is not a folder: choose another --to")
    if to.is_dir() and any(to.iterdir()):
        raise UserError(f"{to} is not empty: choose another --to, or remove it")
    if to.resolve().is_relative_to(run.resolve()):
        raise UserError(f"{to} lies in the run directory, which is Moored's: choose another --to")


def require_disk(folder: Path, num_bytes: int) -> None:
    """Refuse what will not fit, before it is made.

    Args:
        folder: an existing one on the disk in question.
        num_bytes: of the weights; what else is written is small.

    Raises:
        UserError: less is free.
    """
    need, free = num_bytes + SPARE_BYTES, shutil.disk_usage(folder).free
    if free < need:
        raise UserError(
            f"the disk of {folder} has {free / 1e9:.2f} GB free, but the export takes "
            f"{need / 1e9:.2f} GB: free some, or choose another --to"
        )


def write_facts(folder: Path, facts: dict[str, Any]) -> None:
    """Write `export.json`: facts, time, versions, and size and SHA-256 of each file in `folder`."""
    whole = {
        "format": 1,
        **facts,
        "versions": versions_of(EXPORT_VERSIONS),
        "created": utc(time.time()),
        "files": atomic_dir.contents(folder, "hashing what is exported"),
    }
    write_json(folder / FACTS, whole)


@contextlib.contextmanager
def publishing(to: Path) -> Iterator[tuple[Path, Path]]:
    """A folder that gets the name `to` when the body ends well, and one for work; else neither.

    Yields:
        The folder to fill, and one beside it that goes in any case.

    Raises:
        UserError: something else took the name in the meantime.
    """
    to.parent.mkdir(parents=True, exist_ok=True)
    with atomic_dir.beside(to) as temporary:
        new, work = temporary / "new", temporary / "work"
        new.mkdir()
        work.mkdir()
        yield new, work
        umask = os.umask(0)
        os.umask(umask)
        for path in (new, *new.rglob("*")):
            path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)
        atomic_dir.flush(new)
        try:
            os.rename(new, to)  # an empty folder may be there, and nothing else
        except OSError as error:
            raise UserError(f"{to} was filled by another process: choose another --to") from error
        atomic_dir.fsync_directory(to.parent)
