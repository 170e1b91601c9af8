"""A model's files verified: shards complete, headers readable, content as the hub says.

Where the files come from is `models/hub/`'s matter; no weights are loaded.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from moored.models.weights import INDEX
from moored.utils import atomic_dir
from moored.utils.errors import UserErrors
from moored.utils.progress import Phase

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """What was looked at.

    Attributes:
        num_files: with weights.
        num_hashed: of them, those of which a hash was known, and is right.
    """

    num_files: int
    num_hashed: int


def verify(folder: Path) -> Verified:
    """Verify the files of a model's folder.

    Every safetensors file must be as long as its header says, and hold what the index promises. A
    file that lies in the hub's cache must have the content that it is named after there. (What was
    converted has a manifest, against which `resolve_model` verifies it.)

    Raises:
        UserErrors: all files that are not as they must be, and what to do.
    """
    problems: list[str] = []
    promised = _promised(folder)
    weights = sorted(folder.glob("*.safetensors"))
    num_hashed = 0
    for path in weights:
        try:
            with safe_open(path, framework="np") as file:
                names = set(file.keys())
        except (SafetensorError, OSError) as error:
            problems.append(f"{path}: is broken ({_line(error)}): {_fix(path)}")
            continue
        if absent := sorted(promised.get(path.name, set()) - names):
            problems.append(
                f"{path}: lacks {len(absent)} tensors of {INDEX} (first: {absent[0]}): copy or "
                "download the folder again"
            )
    files = sorted(p for p in folder.iterdir() if p.is_file())
    with atomic_dir.hashing(f"verifying {folder.name}", files) as phase:
        for path in files:
            right = _as_named(path, phase)
            if right is False:
                problems.append(f"{path}: has other content than the hub's: {_fix(path)}")
            num_hashed += bool(right) and path in weights
    if problems:
        raise UserErrors(problems)
    return Verified(num_files=len(weights), num_hashed=num_hashed)


def _promised(folder: Path) -> Mapping[str, set[str]]:
    """File -> the tensors that the index says are in it; `resolve_model` has read it before."""
    index = folder / INDEX
    if not index.is_file():
        return {}
    by_file: dict[str, set[str]] = {}
    for name, file in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items():
        by_file.setdefault(file, set()).add(name)
    return by_file


def _as_named(path: Path, phase: Phase) -> bool | None:
    """Whether a file of the hub's cache has the content that its blob is named after.

    The name is the SHA-256 of a large file, git's SHA-1 of a small one; None for other files.
    """
    blob = path.resolve()
    if not path.is_symlink() or blob.parent.name != "blobs":
        return None
    if re.fullmatch(r"[0-9a-f]{64}", blob.name):
        log.info("verifying %s", path)
        return atomic_dir.sha256(blob, phase) == blob.name
    if re.fullmatch(r"[0-9a-f]{40}", blob.name):
        content = blob.read_bytes()
        head = f"blob {len(content)}\0".encode()
        return hashlib.sha1(head + content, usedforsecurity=False).hexdigest() == blob.name
    return None


def _fix(path: Path) -> str:
    return (
        f"remove {path.resolve()} and prepare again"
        if path.is_symlink()
        else "copy or download the folder again"
    )


def _line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]
