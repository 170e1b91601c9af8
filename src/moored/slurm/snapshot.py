"""What a job needs, kept beside its run when it is submitted: recipe, code, what it expects.

So an edit between submission and start changes nothing, and a file that changed all the same is
noticed (`preflight.py`).
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import moored
from moored.config import Config
from moored.slurm.site import Site
from moored.tracking.run_directory import RunDirectory
from moored.utils.atomic_dir import replacing, write_atomically, write_json
from moored.utils.environment import PACKAGES, installed_versions


def keep_recipe(config: Config, run: Path) -> None:
    """Write the resolved recipe into the run's folder for the job."""
    folder = RunDirectory(run).slurm
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_atomically(folder / "recipe.yaml", config.dump_yaml().encode())


def keep_code(folder: Path) -> None:
    """Copy this package into `folder/slurm/code`, in the place of an earlier copy."""
    source = Path(moored.__file__).resolve().parent
    code = RunDirectory(folder).slurm / "code"
    if source.is_relative_to(code.resolve()):
        return  # submitted by a job: it runs the copy already
    with replacing(code) as new:
        shutil.copytree(source, new / "moored", ignore=shutil.ignore_patterns("__pycache__"))


def keep_expectations(configs: Sequence[Config], folder: Path, site: Site) -> None:
    """Write what every node must find, for `moored preflight`."""
    same_python = site.container.runtime == "none" and site.environment.python is None
    expected = {
        "files": fingerprints(dict.fromkeys(path for c in configs for path in input_files(c))),
        "versions": installed_versions(("python", *PACKAGES)) if same_python else {},
        "gpus": site.slurm.gpus_per_node,
        "min_free_gib": site.storage.min_free_gib,
        "min_bandwidth_gbit": site.network.min_bandwidth_gbit,
        "max_clock_skew_seconds": site.network.max_clock_skew_seconds,
    }
    write_json(RunDirectory(folder).slurm / "expected.json", expected)


# ---------------------------------------------------------------- the files that a recipe reads

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
