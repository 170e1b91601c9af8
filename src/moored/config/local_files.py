"""The files that a recipe reads on this machine, and whether they are still as they were.

So that a job that waits for days trains on what was submitted, or says that it cannot.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from moored.config import Config

# Of a bigger file only its size and both ends are read: weights are verified where they are loaded.
WHOLE_BYTES = 64 << 20
END_BYTES = 1 << 20


def input_files(config: Config) -> list[Path]:
    """Every local file of a recipe: data, corpora, the chat template, a model folder's files."""
    named = [source.path for sources in config.sources().values() for source in sources]
    named += [corpus.path for corpus in config.corpora().values()]
    named += [config.data.chat_template, config.model.name_or_path]
    files: dict[Path, None] = {}
    for name in filter(None, named):
        path = Path(name)
        if path.is_dir():
            files |= dict.fromkeys(sorted(p for p in path.rglob("*") if p.is_file()))
        elif path.is_file():
            files[path] = None
    return [path.absolute() for path in files]


def fingerprints(files: Iterable[Path]) -> dict[str, str]:
    """Path -> what identifies its content: the size, and SHA-256 of all or of both ends."""
    files = list(files)
    with ThreadPoolExecutor(max_workers=8) as pool:
        return dict(zip(map(str, files), pool.map(_fingerprint, files), strict=True))


def missing_and_changed(expected: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """Which of the files are not there, or cannot be read, and which are not as they were."""

    def judge(item: tuple[str, str]) -> int:
        try:
            return 0 if _fingerprint(Path(item[0])) == item[1] else 2
        except OSError:
            return 1

    with ThreadPoolExecutor(max_workers=8) as pool:
        judged = list(zip(expected, pool.map(judge, expected.items()), strict=True))
    return [n for n, verdict in judged if verdict == 1], [n for n, v in judged if v == 2]


def _fingerprint(path: Path) -> str:
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= WHOLE_BYTES:
            digest = hashlib.file_digest(file, "sha256")
        else:
            digest = hashlib.sha256(file.read(END_BYTES))
            file.seek(-END_BYTES, os.SEEK_END)
            digest.update(file.read())
    return f"{size} {digest.hexdigest()}"
