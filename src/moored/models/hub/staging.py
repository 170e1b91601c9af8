"""A model on each node's own disk: copied once per node, verified, used by all its processes.

Where the model comes from is `resolve.py`'s. `MOORED_SCRATCH` names the disk; without it nothing is
staged.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from moored.config import ModelConfig
from moored.models.hub.resolve import ResolvedModel, resolve_model
from moored.utils import atomic_dir
from moored.utils.errors import UserError

log = logging.getLogger(__name__)
SPARE_BYTES = 1 << 30


def stage(model: ModelConfig) -> Path | None:
    """Copy the model of a recipe to this node's disk, unless a whole copy is there.

    Every byte is compared with the manifest of the copy, which is written from the original.

    Returns:
        The copy; None where there is no scratch disk.

    Raises:
        UserError: the disk is too small, or cannot be written.
    """
    if not os.environ.get("MOORED_SCRATCH"):
        return None
    source = resolve_model(model)
    folder = _folder(source)
    if not folder.exists():
        _require_space(folder, source.path)
    atomic_dir.make_once(folder, lambda new: _copy(source, new))
    return folder


def staged(source: ResolvedModel) -> ResolvedModel:
    """The model as it was staged on this node, else as it is.

    The copy is known by its manifest and sizes: its bytes were compared when it was made, and again
    when the job began.
    """
    if not os.environ.get("MOORED_SCRATCH"):
        return source
    folder = _folder(source)
    try:
        files: dict[str, Any] = atomic_dir.read_manifest(folder)["files"]
        whole = all((folder / n).stat().st_size == f["bytes"] for n, f in files.items())
    except (OSError, ValueError, KeyError):
        whole = False
    if not whole:
        log.warning("the model is not staged in %s: reading it from %s", folder, source.path)
        return source
    return replace(source, path=folder)


def _folder(source: ResolvedModel) -> Path:
    scratch = Path(os.environ["MOORED_SCRATCH"]).expanduser()
    key = hashlib.sha256(f"{source.path}\0{source.revision}".encode()).hexdigest()[:12]
    return scratch / "moored-models" / f"{source.path.name[:60]}-{key}"


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name != atomic_dir.MANIFEST)


def _require_space(folder: Path, source: Path) -> None:
    needed = sum(path.stat().st_size for path in _files(source))
    at = folder.parent
    while not at.exists():
        at = at.parent
    free = shutil.disk_usage(at).free
    if free < needed + SPARE_BYTES:
        raise UserError(
            f"{folder.parent}: {free / 2**30:.1f} GiB free, but the model takes "
            f"{needed / 2**30:.1f}: make room, or take storage.scratch out of the site profile"
        )


def _copy(source: ResolvedModel, folder: Path) -> dict[str, Any]:
    log.info("staging %s in %s", source.path, folder.parent)
    files = _files(source.path)
    with atomic_dir.hashing("copying the model and comparing it", files, times=3) as phase:
        for path in files:
            target = folder / path.relative_to(source.path)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)  # what a link points to, as the hub's cache has them
            phase.advance(path.stat().st_size / 1e9)
            if atomic_dir.sha256(path, phase) != atomic_dir.sha256(target, phase):
                raise UserError(
                    f"{target} is not what was copied: this node's disk is not to be trusted"
                )
    return {"source": str(source.path), "revision": source.revision}
