"""Tokens on disk: what a source or a corpus was tokenised to, read instead of made again.

How tokens are made is `samples.py`'s and `heldout.py`'s matter. A folder's name holds all that
its tokens depend on, this room's own code included, so that a stale one cannot be met; its content
is verified before it is used. Arrays are mapped: the processes of a machine share them. Tokens are
kept of valid rows only, and with what their records were like: such rows need not be read again.
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

from moored.data.files import SourceReader, hub_dataset
from moored.data.records import Digests, Summary
from moored.data.token_arrays import Drops, Flat, HeldSource, Sample, Tokens
from moored.utils import atomic_dir
from moored.utils.environment import cache_folder, version_of
from moored.utils.errors import UserError

if TYPE_CHECKING:
    from moored.config import Corpus
    from moored.data.chat import ChatEncoder
    from moored.data.reading import RecordSource
    from moored.data.samples import Encoder

log = logging.getLogger(__name__)

KEEP_BYTES = 16 << 20  # of a source, from which its tokens are kept without `moored prepare`
_VERSIONS = ("transformers", "tokenizers", "jinja2")
_FACTS = "source.json"
_SUMMARY = "records.json"


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
    source: RecordSource,
    encoder: Encoder,
    make: Callable[[Digests | None], HeldSource],
    problems: list[str],
    *,
    keep: bool = False,
) -> HeldSource:
    """A source's tokens: from the cache, else newly made, and kept if it is worth it.

    Several processes may call this at once: one tokenises and keeps, the others wait and read.

    Args:
        source: of the recipe.
        encoder: with which its tokens are made.
        make: makes them; takes every record into the digests, if it is given some.
        problems: to which `make` appends; a source that has any is not kept.
        keep: keep also a source of less than KEEP_BYTES, and fail if that is not possible.

    Raises:
        UserError: only with `keep`: the cache cannot be written.
    """

    def key(held: Content | None) -> _Key | None:
        tokenizer = _tokenizer(encoder.chat)
        if tokenizer is None or held is None:
            return None
        parts = {
            **tokenizer,
            "template": encoder.chat.templates,
            "rewritten_turns": encoder.data.rewritten_turns,
            "vocab_size": encoder.vocab_size,
            "max_length": encoder.data.max_length,
            "too_long": encoder.data.too_long,
            "rows": _rows(source, held),
        }
        return _Key(parts=parts, keep=keep or held.num_bytes >= KEEP_BYTES)

    def make_in(folder: Path | None) -> HeldSource:
        if folder is None:
            return make(None)
        digests = Digests()
        tokens = make(digests)
        _save(folder, wholes=np.asarray(digests.wholes), prompts=np.asarray(digests.prompts))
        assert source.summary is not None, "all of it has been read"
        (folder / _SUMMARY).write_text(json.dumps(source.summary.as_json()))
        return tokens

    before = key(source.content)
    return _kept(
        source.name, before, lambda: key(content(source.reader)), make_in, problems, must=keep
    )


def kept_summary(source: RecordSource) -> tuple[Summary, Digests] | None:
    """What the records of a source are like, from where its tokens are kept; None if they are not.

    Whichever tokenizer made them: that its rows are valid, and what they are like, is the same.
    """
    for folder in sorted(tokens_folder().glob(f"{_slug(source.name)}-*")):
        try:
            manifest = atomic_dir.read_manifest(folder)
            made_from = manifest["made_from"]
            if "rows" not in made_from or made_from["code"] != _code():
                continue
            if source.content is None or made_from["rows"] != _rows(source, source.content):
                continue
            if any(
                atomic_dir.sha256(folder / name) != manifest["files"][name]["sha256"]
                for name in (_SUMMARY, "wholes.npy", "prompts.npy")
            ):
                continue
            summary = Summary.from_json(json.loads((folder / _SUMMARY).read_text()))
            wholes, prompts = _load(folder, "wholes"), _load(folder, "prompts")
            return summary, Digests(wholes=wholes, prompts=prompts)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # half a folder, or not one of ours: whoever needs its tokens says so
    return None


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

    return list(_kept(f"retention.{name}", key(), key, lambda _: flat(), [], must=keep))


def content(reader: SourceReader) -> Content | None:
    """What the files of a source hold, of a hub data set those in its cache.

    None where that cannot be told: a file that cannot be read, or rows that are in no file.

    Raises:
        UserError: the hub cannot be reached, or knows no such data set.
    """
    try:
        if reader.hub is None:
            return _content_of_files([path for path, _ in reader.files])
        dataset = hub_dataset(reader)
        files = [Path(entry["filename"]) for entry in getattr(dataset, "cache_files", None) or ()]
        if not files or getattr(dataset, "_indices", None) is not None:
            return None
        cached = _content_of_files(files)
    except OSError:
        return None
    which = [reader.subset, reader.split, len(dataset), repr(dataset.features), cached.digest]
    return Content(num_bytes=cached.num_bytes, digest=_digest(which))


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


def _rows(source: RecordSource, held: Content) -> dict[str, Any]:
    """What the records of a source depend on."""
    options = source.source
    return {
        "format": options.format,
        "fields": options.fields,
        "rendered": options.rendered,
        "ignore": list(options.ignore),
        "limit": options.limit,
        "names": [source.name, *(name for _, name in source.reader.files)],
        "content": held.digest,
    }


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
    """A hash of this room's files: a version of Moored that encodes otherwise has other folders."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return _digest([(path.name, atomic_dir.sha256(path)) for path in files])


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


# ---------------------------------------------------------------- reading and writing


def _kept(
    name: str,
    before: _Key | None,
    now: Callable[[], _Key | None],
    make: Callable[[Path | None], HeldSource],
    problems: list[str],
    *,
    must: bool,
) -> HeldSource:
    """Reads the folder of a key, made first if it is broken, or absent and to be kept.

    Args:
        name: of the source.
        before: the key; None where it cannot be told.
        now: the key as it is once the tokens are made.
        make: makes them; where they are kept, it may write something of its own beside them.
        problems: to which `make` appends; a source that has any is not kept.
        must: an error if they cannot be kept.
    """
    if before is None:
        return make(None)
    folder = tokens_folder() / f"{_slug(name)}-{_digest(before.parts)[:24]}"
    if not before.keep and not folder.exists():
        return make(None)
    made: list[HeldSource] = []
    count = len(problems)

    def fill(new: Path) -> dict[str, Any]:
        log.info("tokenising %s, once: %s", name, folder)
        made.append(make(new))
        if len(problems) > count or not len(made[0]) or now() != before:
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
    return made[0] if made else make(None)


def _slug(name: str) -> str:
    """The beginning of a folder's name."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", name)[:40]


def _save(folder: Path, **arrays: np.ndarray) -> None:
    for name, values in arrays.items():
        np.save(folder / f"{name}.npy", values, allow_pickle=False)


def _load(folder: Path, name: str) -> np.ndarray:
    """An array of a folder, mapped."""
    mapped = np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
    return mapped.view(np.ndarray)


def _write(source: HeldSource, folder: Path) -> None:
    names = [sample_id.encode() for sample_id in source.sample_ids]
    _save(
        folder,
        offsets=source.flat.offsets,
        input_ids=source.flat.input_ids,
        label_mask=source.flat.label_mask,
        lengths=np.array(source.drops.lengths, dtype=np.int32),
        names=np.frombuffer(b"".join(names), dtype=np.uint8),
        name_ends=np.cumsum([len(name) for name in names], dtype=np.int64),
    )
    counts = source.drops.counts()
    facts = {"digest": source.digest(), "num_samples": len(source), "drops": counts}
    (folder / _FACTS).write_text(json.dumps(facts))


def _read(folder: Path, name: str) -> HeldSource:
    facts = json.loads((folder / _FACTS).read_text())
    lengths = array("i")
    lengths.frombytes(_load(folder, "lengths").astype(np.intc).tobytes())
    return HeldSource.kept(
        name,
        _Names(_load(folder, "names"), _load(folder, "name_ends")),
        Flat(**{field: _load(folder, field) for field in ("offsets", "input_ids", "label_mask")}),
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
