"""Finding data: the files or hub dataset of a source, and their rows, each with a stable id.

How a file is decoded is in `formats.py`, what rows mean as samples in `records.py`. No torch here.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moored.data.find_files import display, find_files, of_split
from moored.data.formats import PLAIN, count_rows, read_file, unread
from moored.data.layouts import wanted
from moored.data.nested import as_written
from moored.utils.errors import UserError

if TYPE_CHECKING:
    from moored.config import Source


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row of a source: `value`, or else the `problem` that kept it from being read.

    Attributes:
        key: stable id, unique among the sources opened together: `train.jsonl:12`.
        where: for messages: the path as the user knows it, and the line (or row).
        plain: the row is a whole txt or md file.
    """

    key: str
    where: str
    value: dict[str, Any] = field(default_factory=dict)
    problem: str | None = None
    plain: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceReader:
    """One source, found but not yet read.

    Attributes:
        label: where the recipe names it: `data.train.0`.
        name: prefix of its rows' keys; unique among the sources opened together.
        files: (path, name of the file within the source); empty for a hub dataset.
    """

    label: str
    name: str
    files: tuple[tuple[Path, str], ...] = ()
    hub: str | None = None
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    streaming: bool = False
    limit: int | None = None
    columns: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()

    def rows(self, skip: int = 0) -> Iterator[Row]:
        """All rows after the first `skip`, up to `limit`; reads on demand, holds one block."""
        stop = self.limit
        if self.hub is not None:
            yield from _hub_rows(self, skip, stop)
        else:
            rows = itertools.chain.from_iterable(self._file(*entry) for entry in self.files)
            yield from itertools.islice(rows, skip, stop)

    def count(self) -> int | None:
        """How many rows there are, where that is soon known; only to say how far a reading is."""
        try:
            if self.hub is not None:
                number = None if self.streaming else len(hub_dataset(self))
            else:
                counts = [count_rows(path) for path, _ in self.files]
                number = None if None in counts else sum(n for n in counts if n is not None)
        except (OSError, ValueError, UserError):  # who reads it will say so
            return None
        return number if number is None or self.limit is None else min(number, self.limit)

    def _file(self, path: Path, name: str) -> Iterator[Row]:
        shown = display(path)
        suffix = path.suffix.lower()
        empty = True
        try:
            for number, value in read_file(path, self.columns, self.beside):
                empty = False
                key, where = f"{name}:{number}", f"{shown}:{number}"
                if isinstance(value, str):
                    yield Row(key=key, where=where, problem=value)
                else:
                    yield Row(key=key, where=where, value=value, plain=suffix in PLAIN)
        except OSError as error:
            yield Row(key=name, where=f"{shown}:1", problem=f"cannot be read: {error.strerror}")
            return
        if empty:
            problem = "the file is empty: fill it or take it out of the recipe"
            yield Row(key=name, where=f"{shown}:1", problem=problem)


def open_sources(
    sources: Sequence[Source], section: str, problems: list[str]
) -> list[SourceReader]:
    """Finds the files of each source; what cannot be found goes to `problems`.

    Args:
        sources: of the recipe.
        section: their place in the recipe, for messages: `data.train`.
        problems: one line each is appended.
    """
    readers: list[SourceReader] = []
    names: set[str] = set()
    for index, source in enumerate(sources):
        label = f"{section}.{index}"
        columns, beside = wanted(source)
        reader = open_one(
            label,
            source.path,
            source.hub,
            source.subset,
            source.split,
            source.revision,
            columns,
            names,
            problems,
            beside=beside,
            by_split=True,
            streaming=source.streaming,
            limit=source.limit,
        )
        if reader is None:
            continue
        suffixes = {path.suffix.lower() for path, _ in reader.files}
        if source.streaming and suffixes & {".json", *PLAIN}:
            problems.append(
                f"{label}.streaming: only jsonl, parquet and hub sources can be streamed, got "
                f"{', '.join(sorted(suffixes))}: write one object a line to a .jsonl file"
            )
        if suffixes and suffixes <= set(PLAIN):
            given = {
                "fields": bool(source.fields),
                "format": source.format not in ("auto", "text"),
                "limit": source.limit is not None and len(reader.files) == 1,
            }
            problems += [
                f"{label}.{option}: a {sorted(suffixes)[0]} file is plain text, cut into rows of "
                f"data.max_length: remove {option}"
                for option, is_given in given.items()
                if is_given
            ]
        readers.append(reader)
    return readers


def open_one(
    label: str,
    path: str | None,
    hub: str | None,
    subset: str | None,
    split: str | None,
    revision: str | None,
    columns: tuple[str, ...],
    names: set[str],
    problems: list[str],
    *,
    beside: tuple[str, ...] = (),
    by_split: bool = False,
    streaming: bool = False,
    limit: int | None = None,
) -> SourceReader | None:
    """Finds one source; None where it cannot be found, with a line in `problems`.

    Args:
        label: its place in the recipe.
        path: its file or folder.
        hub: or its name on the hub.
        subset: of the hub data set.
        split: of the hub data set, or of the folder.
        revision: of the hub data set.
        columns: that are read.
        names: of the sources opened before, so that this one gets another.
        problems: one line each is appended.
        beside: likewise, whatever they hold.
        by_split: of a folder that has splits, one is read.
        streaming: read as it goes.
        limit: rows, from the start.
    """
    if path is None:
        if hub is None:
            problems.append(f"{label}: neither path nor hub is given: set one of them")
            return None
        split = split or "train"
        base = "/".join(part for part in (hub.strip("/").split("/")[-1], subset, split) if part)
        return SourceReader(
            label=label,
            name=_unique(base, names),
            hub=hub,
            subset=subset,
            split=split,
            revision=revision,
            streaming=streaming,
            limit=limit,
            columns=columns,
            beside=beside,
        )
    paths = find_files(Path(path), label, problems)
    if paths is not None and by_split:
        paths = of_split(Path(path), paths, split, label, problems)
    if paths is None:
        return None
    name = _unique(Path(path).name, names)
    files = tuple((file, name if file == Path(path) else f"{name}/{rest}") for file, rest in paths)
    return SourceReader(
        label=label,
        name=name,
        files=files,
        streaming=streaming,
        limit=limit,
        columns=columns,
        beside=beside,
    )


def _unique(base: str, names: set[str]) -> str:
    """Two sources of one name would give two samples one id."""
    name, count = base, 1
    while name in names:
        count += 1
        name = f"{base}#{count}"
    names.add(name)
    return name


def _hub_rows(reader: SourceReader, skip: int, stop: int | None) -> Iterator[Row]:
    dataset = hub_dataset(reader)
    features = getattr(dataset, "features", None)  # of a stream they may not be known
    schema = features.arrow_schema if features is not None else None
    kinds = {name: schema.field(name).type for name in schema.names} if schema else {}
    names = getattr(dataset, "column_names", None) or ()
    chosen = [name for name in names if name in (*reader.columns, *reader.beside)]
    others: dict[str, Any] = {}
    if any(name in reader.columns for name in chosen):
        dataset = dataset.select_columns(chosen)
        others = unread({name: kinds.get(name) for name in names if name not in chosen})
    number = skip
    rows = iter(dataset.skip(skip) if skip else dataset)
    where = f"{reader.hub}[{reader.split}]"
    while stop is None or number < stop:
        try:
            value = next(rows)
        except StopIteration:
            break
        except Exception as error:  # the reader of some remote format
            raise UserError(f"{where}:{number + 1}: {_first_line(error)}: {_HUB_FIX}") from error
        number += 1
        cells = {k: as_written(v, kinds.get(k), decode=False) for k, v in value.items()}
        yield Row(key=f"{reader.name}:{number}", where=f"{where}:{number}", value=cells | others)
    if number == 0:
        problem = "the split is empty: choose another"
        yield Row(key=reader.name, where=f"{where}:1", problem=problem)


_HUB_FIX = (
    "load it once where the hub can be reached (HF_TOKEN if it is gated), or give a local copy "
    "as path"
)


def hub_dataset(reader: SourceReader) -> Any:
    """The data set itself, from its cache or the hub; raises UserError where it cannot be had."""
    import datasets

    assert reader.hub is not None
    where = f"{reader.label}.hub={reader.hub}"
    local = Path(reader.hub)
    try:
        if (local / "dataset_dict.json").is_file() or (local / "state.json").is_file():
            saved = datasets.load_from_disk(local)  # made by Dataset.save_to_disk
            if isinstance(saved, datasets.DatasetDict):
                if reader.split not in saved:
                    raise ValueError(f"Unknown split {reader.split!r}, there are {list(saved)}")
                saved = saved[reader.split]
            return saved
        return datasets.load_dataset(
            reader.hub,
            reader.subset,
            split=reader.split,
            revision=reader.revision,
            streaming=reader.streaming,
        )
    except ValueError as error:  # an unknown subset or split
        fix = f"check {reader.label}.subset and .split"
        raise UserError(f"{where}: {_first_line(error)}: {fix}") from error
    except Exception as error:  # datasets lets through what its network libraries raise
        raise UserError(f"{where}: {_first_line(error)}: {_HUB_FIX}") from error


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}".rstrip(": .")
