"""Tokens on disk: what a source or a corpus was tokenised to, read instead of made again.

How tokens are made is `encode.py`'s and `heldout.py`'s matter. A folder's name holds all that
its tokens depend on, this room's own code included, so that a stale one cannot be met; its content
is verified before it is used. Arrays are mapped: the processes of a machine share them.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
import re
import sys
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moored.data.batch import Sample
from moored.data.chat import ChatEncoder, Tokens
from moored.data.encode import Drops, Encoder, Flat, HeldSource, build
from moored.data.files import SourceReader, hub_dataset
from moored.data.records import read_records
from moored.utils import atomic_dir
from moored.utils.environment import cache_folder, version_of
from moored.utils.errors import UserError
from moored.utils.progress import Phase

if TYPE_CHECKING:
    from moored.config import Corpus, Source

log = logging.getLogger(__name__)

KEEP_BYTES = 16 << 20  # of a source, from which its tokens are kept without `moored prepare`
_VERSIONS = ("transformers", "tokenizers", "jinja2")
_FACTS = "source.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Content:
    """What is to be tokenised.

    Attributes:
        num_bytes: of its files, or of its text.
        digest: SHA-256 of the file, or over the files' or the texts', in hex.
    """

    num_bytes: int
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Key:
    """What tokens depend on, as JSON values, and whether to keep them where they are not yet."""

    parts: Mapping[str, Any]
    keep: bool


class _NotToKeepError(Exception):
    """What was tokenised has problems, or changed meanwhile."""


def tokens_folder() -> Path:
    """Where tokens are kept, a folder per source."""
    return cache_folder() / "tokens"


def source_tokens(
    reader: SourceReader,
    source: Source,
    encoder: Encoder,
    problems: list[str],
    *,
    keep: bool = False,
) -> HeldSource:
    """A source's tokens: from the cache, else newly made, and kept if it is worth it.

    Several processes may call this at once: one tokenises and keeps, the others wait and read.

    Args:
        reader: of the source.
        source: of the recipe.
        encoder: makes the tokens.
        problems: of records that cannot be tokenised; such a source is not kept.
        keep: keep also a source of less than KEEP_BYTES, and fail if that is not possible.

    Raises:
        UserError: only with `keep`: the cache cannot be written.
    """

    def make() -> HeldSource:
        with Phase(f"tokenising {reader.name}", reader.count, "rows") as phase:
            records = phase.over(read_records(reader, source, problems))
            return build(reader.name, records, encoder, problems, Drops())

    def key() -> _Key | None:
        tokenizer, found = _tokenizer(encoder.chat), content(reader)
        if tokenizer is None or found is None:
            return None
        parts = {
            **tokenizer,
            "template": encoder.chat.templates,
            "rewritten_turns": encoder.data.rewritten_turns,
            "vocab_size": encoder.vocab_size,
            "max_length": encoder.data.max_length,
            "too_long": encoder.data.too_long,
            "format": source.format,
            "fields": source.fields,
            "rendered": source.rendered,
            "ignore": source.ignore,
            "limit": source.limit,
            "names": [reader.name, *(name for _, name in reader.files)],
            "content": found.digest,
        }
        return _Key(parts=parts, keep=keep or found.num_bytes >= KEEP_BYTES)

    return _kept(reader.name, key, make, problems, must=keep)


def corpus_tokens(
    name: str,
    corpus: Corpus,
    documents: Sequence[str],
    chat: ChatEncoder,
    make: Callable[[], list[Sample]],
    *,
    keep: bool = False,
) -> list[Sample]:
    """A retention corpus's tokens: from the cache, else from `make`; kept if `keep`.

    Raises:
        UserError: only with `keep`: the cache cannot be written.
    """

    def flat() -> HeldSource:
        pairs = [
            (s.sample_id, Tokens(input_ids=s.input_ids, label_mask=s.label_mask)) for s in make()
        ]
        return HeldSource(name, pairs, Drops())

    def key() -> _Key | None:
        tokenizer = _tokenizer(chat)
        if tokenizer is None:
            return None
        options = [corpus.target, corpus.window_tokens, corpus.max_tokens]
        text = content_of_texts(documents).digest
        parts = {**tokenizer, "corpus": name, "options": options, "content": text}
        return _Key(parts=parts, keep=keep)

    return list(_kept(f"retention.{name}", key, flat, [], must=keep))


def content(reader: SourceReader) -> Content | None:
    """What the files of a source hold, of a hub data set those in its cache.

    None where that cannot be told: a file that cannot be read, or rows that are in no file.
    """
    try:
        if reader.hub is None:
            return _content_of_files([path for path, _ in reader.files])
        dataset = hub_dataset(reader)
        files = [Path(entry["filename"]) for entry in getattr(dataset, "cache_files", None) or ()]
        if not files or getattr(dataset, "_indices", None) is not None:
            return None
        found = _content_of_files(files)
    except (OSError, UserError):
        return None
    which = [reader.subset, reader.split, len(dataset), repr(dataset.features), found.digest]
    return Content(num_bytes=found.num_bytes, digest=_digest(which))


def content_of_texts(texts: Sequence[str]) -> Content:
    """What some texts hold."""
    sha, total = hashlib.sha256(), 0
    for text in texts:
        raw = text.encode()
        total += len(raw)
        sha.update(len(raw).to_bytes(8, "little") + raw)
    return Content(num_bytes=total, digest=sha.hexdigest())


def _content_of_files(files: Sequence[Path]) -> Content:
    with atomic_dir.hashing("hashing the data", files) as phase:
        hashes = [atomic_dir.sha256(path, phase) for path in files]
    return Content(
        num_bytes=sum(path.stat().st_size for path in files),
        digest=hashes[0] if len(hashes) == 1 else _digest(hashes),
    )


# ---------------------------------------------------------------- what tokens depend on


def _tokenizer(chat: ChatEncoder) -> dict[str, Any] | None:
    """What they depend on besides the text and the options; None where that cannot be told."""
    tokenizer = chat.tokenizer
    if not type(tokenizer).__module__.startswith("transformers."):
        return None  # a model's own Python code
    try:
        state = tokenizer.backend_tokenizer.to_str()  # all that its files said
    except Exception:  # parts in Python, which cannot be told
        return None
    return {
        "code": _code(),
        "versions": [*map(version_of, _VERSIONS), sys.version_info[:2]],
        "tokenizer": _digest(state),
        "special": [
            type(tokenizer).__name__,
            repr(sorted(tokenizer.special_tokens_map.items())),
            [chat.eos, chat.prefix],
            bool(getattr(tokenizer, "split_special_tokens", False)),
        ],
    }


@functools.cache
def _code() -> str:
    """Of this room's files: a version of Moored that encodes otherwise has other folders."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return _digest([(path.name, atomic_dir.sha256(path)) for path in files])


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


# ---------------------------------------------------------------- reading and writing


def _kept(
    name: str,
    key: Callable[[], _Key | None],
    make: Callable[[], HeldSource],
    problems: list[str],
    *,
    must: bool,
) -> HeldSource:
    """Reads the folder of this key, made first if it is broken, or absent and to be kept."""
    before = key()
    if before is None:
        return make()
    digest = _digest(before.parts)[:24]
    folder = tokens_folder() / f"{re.sub(r'[^A-Za-z0-9.]+', '-', name)[:40]}-{digest}"
    if not before.keep and not folder.exists():
        return make()
    made: list[HeldSource] = []
    count = len(problems)

    def fill(new: Path) -> dict[str, Any]:
        log.info("tokenising %s, once: %s", name, folder)
        made.append(make())
        if len(problems) > count or not len(made[0]) or key() != before:
            raise _NotToKeepError
        _write(made[0], new)
        return {"made_from": before.parts}

    try:
        atomic_dir.make_once(folder, fill)
        source = _read(folder, name)
        with contextlib.suppress(OSError):  # a cache that others keep
            os.utime(folder / atomic_dir.MANIFEST)  # when it was last of use, for `prune`
        log.info("tokens of %s from %s", name, folder)
        return source
    except _NotToKeepError:
        pass
    except (OSError, ValueError, KeyError, TypeError, UserError) as error:
        if must and isinstance(error, UserError):
            raise
        log.warning("the tokens of %s are not kept: %s", name, error)
    return made[0] if made else make()


def _write(source: HeldSource, folder: Path) -> None:
    names = [sample_id.encode() for sample_id in source.sample_ids]
    arrays = {
        "offsets": source.flat.offsets,
        "input_ids": source.flat.input_ids,
        "label_mask": source.flat.label_mask,
        "lengths": np.array(source.drops.lengths, dtype=np.int32),
        "names": np.frombuffer(b"".join(names), dtype=np.uint8),
        "name_ends": np.cumsum([len(name) for name in names], dtype=np.int64),
    }
    for name, values in arrays.items():
        np.save(folder / f"{name}.npy", values, allow_pickle=False)
    counts = source.drops.counts()
    facts = {"digest": source.digest(), "num_samples": len(source), "drops": counts}
    (folder / _FACTS).write_text(json.dumps(facts))


def _read(folder: Path, name: str) -> HeldSource:
    def values(name: str) -> np.ndarray:
        mapped = np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
        return mapped.view(np.ndarray)

    facts = json.loads((folder / _FACTS).read_text())
    lengths = array("i")
    lengths.frombytes(values("lengths").astype(np.intc).tobytes())
    return HeldSource.kept(
        name,
        _Names(values("names"), values("name_ends")),
        Flat(**{field: values(field) for field in ("offsets", "input_ids", "label_mask")}),
        Drops(**facts["drops"], lengths=lengths),
        digest=facts["digest"],
        folder=folder,
    )


class _Names(Sequence[str]):
    """Texts in one array of bytes, each made when it is asked for."""

    def __init__(self, joined: np.ndarray, ends: np.ndarray):
        self._joined = joined
        self._ends = ends

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        start = int(self._ends[index - 1]) if index else 0
        return self._joined[start : int(self._ends[index])].tobytes().decode()

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(len(self)))
