"""`moored prepare`: fetch, verify, tokenise and keep; then prove that no network is needed.

How tokens are kept is `token_cache.py`'s matter, what a model is made from `models/hub/`'s.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import filelock
from rich.console import Console
from safetensors import SafetensorError, safe_open

from moored.config import Config
from moored.data import DataReader, by_domain, load_samples, retention_samples
from moored.data.token_cache import tokens_folder
from moored.distributed.mesh import alone
from moored.evaluation.task_suite import open_task_suite
from moored.models.base_files import resolve_base
from moored.models.reference_cache import FACTS, references_folder
from moored.models.weights import INDEX
from moored.prepare.base_generation import draw
from moored.prepare.items import require_model, size_of
from moored.prepare.offline import prove
from moored.prepare.references import fill, require_fillable
from moored.utils import atomic_dir
from moored.utils.environment import rank_info
from moored.utils.errors import UserError, UserErrors
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


def verify_weights(folder: Path) -> Verified:
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


DAY = 86400.0  # seconds


def run(config: Config, *, only_check: bool = False, num_ranks: int | None = None) -> None:
    """Bring everything that a recipe needs to this machine's caches, and prove it.

    Args:
        config: the recipe.
        only_check: fetch and keep nothing; prove only.
        num_ranks: also fill the reference cache for a run on so many data-parallel ranks.

    Raises:
        UserError: something cannot be had, is broken, or would need a network in a job.
    """
    os.umask(0o077)
    world = rank_info().world_size
    if world > 1:
        raise UserError(
            f"{world} processes were started, but prepare works alone: start it without torchrun, "
            "or with srun --ntasks=1"
        )
    if num_ranks is not None:
        require_fillable(config)
    _require_local(config)
    console = Console(markup=False, highlight=False, soft_wrap=True)
    if not only_check:
        _fetch(config, console, num_ranks)
    for item in prove(config):
        identity = item.identity if len(item.identity) < 50 else item.identity[:23]
        size, note = readable(item.num_bytes), f"  {item.note}" if item.note else ""
        console.print(f"{item.what:<20} {item.where}  {size}  {identity}{note}")
    console.print("a process without a network found all of it", style="green")


def prune(days: float) -> None:
    """Remove tokens and hidden states that nothing has used for so many days.

    And what killed processes left of them.

    Raises:
        UserError: a folder cannot be removed.
    """
    before, freed, left = time.time() - days * DAY, 0, 0
    folders = (tokens_folder(), references_folder())
    for path in (path for at in folders if at.is_dir() for path in sorted(at.iterdir())):
        if not path.is_dir():
            continue
        try:
            size = size_of(path)
            if _last_used(path) > before or not _removed(path):
                left += size
                continue
        except FileNotFoundError:  # somebody else was faster
            continue
        freed += size
        print(f"removed {path} ({readable(size)})")
    where = " and ".join(map(str, folders))
    print(f"freed {readable(freed)}; {readable(left)} are left in {where}")


def readable(num_bytes: int) -> str:
    """A number of bytes, for people."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes} bytes"


def _require_local(config: Config) -> None:
    problems = [
        f"{place}.{index}.streaming: reads {source.hub} from the hub while it trains, which "
        "needs a network: remove streaming, or give a local copy as path"
        for place, sources in config.sources().items()
        for index, source in enumerate(sources)
        if source.streaming and source.hub and not Path(source.hub).exists()
    ]
    if problems:
        raise UserErrors(problems)


def _fetch(config: Config, console: Console, num_ranks: int | None) -> None:
    """The order of a run: data first, since that is soon found wrong."""
    reader = DataReader()
    reader.check(config)
    located = resolve_base(config.model, alone())
    require_model(located.source.path, config)
    weights = verify_weights(located.source.path)
    hashed = f", {weights.num_hashed} of them by the hub's hash" if weights.num_hashed else ""
    console.print(f"{located.source.origin}: {weights.num_files} weight files verified{hashed}")
    tokenizer, size = located.tokenizer, located.vocab_size
    for place, sources in config.sources().items():
        load_samples(sources, tokenizer, config.data, size, section=place, keep=True, reader=reader)
    tasks = open_task_suite(config, located, alone())
    for task in tasks.tasks if tasks else ():
        console.print(f"{task.name}: {task.num_questions:,} questions of {task.source} are here")
    for folder in draw(config, located):
        facts = atomic_dir.read_manifest(folder)
        count, texts = facts["num_tokens"], facts["num_texts"]
        console.print(f"{folder}: {count:,} tokens of the base's own, in {texts:,} texts")
    for place, corpus in config.corpora().items():
        if corpus.builtin != "base-samples":
            section, _, name = place.rpartition(".")
            # A budget's probe is one text, whatever its domains.
            parts = {name: corpus}
            if section == "retention":
                parts = by_domain(name, corpus, reader.corpus)
            for part, of in parts.items():
                retention_samples(part, of, tokenizer, keep=True, place=place, reader=reader)
    del reader  # all is tokenised, and what it holds would stay beside the model
    if num_ranks is not None:
        cache = fill(config, located, num_ranks=num_ranks)
        count, size = cache.num_computed, readable(size_of(cache.folder))
        console.print(f"{cache.folder}: {size}; {count:,} micro-batches of the base were computed")
    total = sum(size_of(path) for path in tokens_folder().glob("[!.]*"))
    console.print(
        f"{tokens_folder()}: {readable(total)} of tokens, of all recipes (`moored prepare "
        "--prune DAYS` removes what nothing has read for so long)"
    )


def _last_used(path: Path) -> float:
    """Unix seconds; of what a killed process left, when it was made."""
    marks = [path / name for name in (atomic_dir.MANIFEST, FACTS) if (path / name).is_file()]
    return (*marks, path)[0].stat().st_mtime


def _removed(path: Path) -> bool:
    """Remove a folder, unless a process makes it, or waits to, just now."""
    name = path.name.rsplit(".", 2)[0] if path.name.startswith(".") else f".{path.name}"
    lock = path.with_name(f"{name}.lock")
    try:
        with filelock.FileLock(lock, timeout=0):
            shutil.rmtree(path)
            lock.unlink(missing_ok=True)
    except filelock.Timeout:
        return False
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be removed: {error.strerror or error}") from error
    return True
