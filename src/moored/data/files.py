"""Finding data: the files or hub dataset of a source, and their rows, each with a stable id.

Which split a file of a folder belongs to follows the rules by which `datasets` reads a repository
of the hub: what its README says, then shards (`data/train-00000-of-00003.parquet`), then words in
the names of folders and files; only names inside the folder count. How a file is decoded is in
`formats.py`, what rows mean as samples in `records.py`. No torch here.
"""

from __future__ import annotations

import difflib
import itertools
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from moored.data.formats import PLAIN, STRUCTURED, count_rows, read_file, unread
from moored.data.layouts import as_written, first_few, wanted
from moored.utils.errors import UserError

if TYPE_CHECKING:
    from moored.config import Source


logger = logging.getLogger(__name__)

# What repositories of the hub hold beside their data, as `datasets` has it.
_ABOUT = ("config.json", "dataset_dict.json", "dataset_info.json", "dataset_infos.json")
ALL = "all"  # every file, whatever its split: `datasets` has the same word
_WORDS: Mapping[str, tuple[str, ...]] = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SEPARATOR = "[-._ 0-9]"
_IN_FOLDER = {
    split: re.compile(rf"(?:.*{_SEPARATOR})?(?:{'|'.join(words)})(?:{_SEPARATOR}.*)?")
    for split, words in _WORDS.items()
}
_IN_FILE = {
    split: re.compile(rf"(?:.*{_SEPARATOR})?(?:{'|'.join(words)}){_SEPARATOR}.*")
    for split, words in _WORDS.items()
}
_SHARD = re.compile(r"data/([^/]+)-\d{5}-of-\d{5}[^/]*\.[^/]+")
_HEADER = re.compile(r"---[ \t]*\r?\n(.*?)^---[ \t]*$", re.S | re.M)
_MOST_HEADER_BYTES = 2**20


def display(path: Path) -> str:
    """The path as short as it stays clear: relative below the working directory."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def find_files(path: Path, label: str, problems: list[str]) -> list[tuple[Path, str]] | None:
    """The data files of a path, in the order of their names, each with its name in the folder.

    Args:
        path: a file or a folder.
        label: its place in the recipe.
        problems: one line is appended where it is None.
    """
    known = ", ".join((*STRUCTURED, *PLAIN))
    try:
        if path.is_dir():
            everything = sorted(
                (entry.relative_to(path).as_posix(), entry)
                for entry in path.rglob("*")
                if entry.is_file()
                and not any(part.startswith(".") for part in entry.relative_to(path).parts)
            )
            if saved := _saved(name for name, _ in everything):
                whole = display(path / saved) if saved != "." else display(path)
                problems.append(
                    f"{label}.path={display(path)}: "
                    f"{'' if saved == '.' else f'{saved} in it '}was written by "
                    f"Dataset.save_to_disk: give it as {label}.hub={whole} instead of path"
                )
                return None
            # A README.md beside data files describes them, as some .json files do.
            files = [
                item
                for item in everything
                if item[1].suffix.lower() in STRUCTURED and item[1].name not in _ABOUT
            ] or [
                item
                for item in everything
                if item[1].suffix.lower() in PLAIN and item[1].stem.lower() != "readme"
            ]
            read = {name for name, _ in files}
            others = [name for name, _ in everything if name not in read]
            if not files:
                beside = f", but {', '.join(others[:3])}" if others else ""
                problems.append(
                    f"{label}.path={display(path)}: no {known} file in this directory{beside}"
                )
                return None
            if others:
                logger.warning(
                    "%s: %d files beside the data are not read (%s)",
                    display(path),
                    len(others),
                    ", ".join(others[:3]),
                )
            return [(file, name) for name, file in files]
        if not path.exists():
            near = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
            close = difflib.get_close_matches(path.name, near, 1, cutoff=0.6)
            hint = f"did you mean {close[0]}?" if close else "check the path"
            problems.append(f"{label}.path={display(path)}: no such file or directory; {hint}")
            return None
        if not path.is_file():
            problems.append(f"{label}.path={display(path)}: not a regular file: copy it to one")
            return None
    except OSError as error:
        problems.append(f"{label}.path={display(path)}: cannot be read: {error.strerror}")
        return None
    if path.suffix.lower() == ".arrow" and (path.parent / "state.json").is_file():
        problems.append(
            f"{label}.path={display(path)}: was written by Dataset.save_to_disk: give its folder "
            f"as {label}.hub={display(path.parent)} instead of path"
        )
        return None
    if path.suffix.lower() not in STRUCTURED + PLAIN:
        problems.append(
            f"{label}.path={display(path)}: unknown kind of file {path.suffix!r}: "
            f"convert it to one of {known}"
        )
        return None
    return [(path, path.name)]


def of_split(
    path: Path, files: list[tuple[Path, str]], split: str | None, label: str, problems: list[str]
) -> list[tuple[Path, str]] | None:
    """Those of a folder's files that belong to a split; else a line is appended to `problems`.

    Args:
        path: a file or a folder.
        files: what `find_files` gave for it.
        split: that is asked for.
        label: the source's place in the recipe.
        problems: one line is appended where it is None.
    """
    if not path.is_dir():
        return files
    within = {name: file for file, name in files}
    chosen = _choose(path, list(within), split, label)
    if isinstance(chosen, str):
        problems.append(chosen)
        return None
    return [(within[name], name) for name in chosen]


def _saved(names: Iterable[str]) -> str | None:
    """The first folder among these files' that `save_to_disk` wrote, or None."""
    there = set(names)
    for name in sorted(there, key=lambda name: (name.count("/"), name)):
        folder, _, file = name.rpartition("/")
        beside = f"{folder}/dataset_info.json".lstrip("/")
        if file == "dataset_dict.json" or (file == "state.json" and beside in there):
            return folder or "."
    return None


# ---------------------------------------------------------------- splits


@dataclass(slots=True, kw_only=True)
class Splits:
    """The files of a folder by their split.

    Attributes:
        files: names within the folder, of each split.
        rest: of no split.
        declared: a README or shards say so, not mere words.
    """

    files: dict[str, list[str]] = field(default_factory=dict)
    rest: list[str] = field(default_factory=list)
    declared: bool = False


def _choose(folder: Path, names: Sequence[str], split: str | None, label: str) -> list[str] | str:
    """The files of a split, in order, or why they cannot be told, in words.

    Without a split, `train` is read, if the folder has splits at all. Held-out data are to say
    theirs, unless there is only one, which is not for training.

    Args:
        folder: that holds the files.
        names: of its data files within it, in order.
        split: that is asked for.
        label: the source's place in the recipe.
    """
    if split == ALL:
        return list(names)
    shown, splits = display(folder), _splits(folder, names)
    if isinstance(splits, str):
        return f"{label}.path={shown}: {splits} set {label}.split={ALL} to read every file"
    there = ", ".join(f"{one} ({_count(files)})" for one, files in splits.files.items())
    rest = f"{_count(splits.rest)} of no split ({first_few(splits.rest)})"
    if not splits.files:
        if split is None:
            return list(names)
        return f"{label}.split={split}: no file of {shown} names a split: remove it"
    wanted = split or "train"
    if split is None and label.startswith("data.eval"):
        (only, *more) = splits.files
        if more or only == "train" or splits.rest:
            held = next((one for one in splits.files if one != "train"), "train")
            return (
                f"{label}.path={shown}: has {there}, and does not say which is held out: set "
                f"{label}.split={held}"
            )
        wanted = only
    if wanted not in splits.files:
        return (
            f"{label}.path={shown}: has no file of split {wanted}, it has {there}: set "
            f"{label}.split to one of them, or to {ALL}"
        )
    if splits.rest and split is None and not splits.declared:
        return (
            f"{label}.path={shown}: has {there}, and {rest}: set {label}.split={wanted} to leave "
            f"the others out, or {label}.split={ALL}"
        )
    others = [f"{one} ({_count(files)})" for one, files in splits.files.items() if one != wanted]
    others += [rest] if splits.rest else []
    if others:
        logger.warning("%s: split %s is read, left out: %s", shown, wanted, ", ".join(others))
    return splits.files[wanted]


def _count(files: Sequence[str]) -> str:
    return f"{len(files)} {'file' if len(files) == 1 else 'files'}"


def _splits(folder: Path, names: Sequence[str]) -> Splits | str:
    declared = _from_readme(folder, names)
    if declared is not None:
        return declared
    shards = {name: shard[1] for name in names if (shard := _SHARD.fullmatch(name))}
    if shards:
        return _grouped(names, shards, declared=True)
    of: dict[str, str] = {}
    for name in names:
        *folders, file = name.split("/")
        words = {
            split
            for split in _WORDS
            if _IN_FILE[split].fullmatch(file)
            or any(_IN_FOLDER[split].fullmatch(part) for part in folders)
        }
        if len(words) > 1:
            return f"{name} looks like {' and '.join(sorted(words))}: name files one by one, or"
        of |= dict.fromkeys([name], words.pop()) if words else {}
    return _grouped(names, of)


def _grouped(names: Sequence[str], of: Mapping[str, str], *, declared: bool = False) -> Splits:
    splits = Splits(declared=declared)
    for name in names:
        if name in of:
            splits.files.setdefault(of[name], []).append(name)
        else:
            splits.rest.append(name)
    return splits


def _from_readme(folder: Path, names: Sequence[str]) -> Splits | str | None:
    """What the header of a README of the hub says of its configuration's files, if anything."""
    configs = [one for one in _configs(folder / "README.md") if one.get("data_files")]
    if not configs:
        return None
    if len(configs) > 1:
        kinds = ", ".join(str(one.get("config_name")) for one in configs[:5])
        return (
            f"its README.md has {len(configs)} configurations ({kinds}): give the folder as hub, "
            "with the name of one as subset; or"
        )
    entries = configs[0]["data_files"]
    if isinstance(entries, str) or (
        isinstance(entries, list) and all(isinstance(entry, str) for entry in entries)
    ):
        entries = [{"split": "train", "path": entries}]
    of: dict[str, str] = {}
    for entry in entries if isinstance(entries, list) else ():
        if not isinstance(entry, dict):
            continue
        paths = entry.get("path")
        for pattern in [paths] if isinstance(paths, str) else paths or ():
            for name in _matching(folder, str(pattern)) & set(names):
                if of.setdefault(name, str(entry.get("split"))) != str(entry.get("split")):
                    return f"its README.md puts {name} into two splits: name files one by one, or"
    return _grouped(names, of, declared=True) if of else None


def _configs(readme: Path) -> list[dict[str, Any]]:
    try:
        with readme.open("rb") as file:
            text = file.read(_MOST_HEADER_BYTES).decode("utf-8-sig")
        header = _HEADER.match(text)
        said = yaml.safe_load(header[1]) if header else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, ValueError, RecursionError):
        return []  # a text for people, then
    configs = said.get("configs") if isinstance(said, dict) else None
    return [one for one in configs if isinstance(one, dict)] if isinstance(configs, list) else []


def _matching(folder: Path, pattern: str) -> set[str]:
    """Names within the folder that a pattern matches."""
    pattern = f"{pattern}/*" if pattern.endswith("**") else pattern
    try:
        return {path.relative_to(folder).as_posix() for path in folder.glob(pattern)}
    except (ValueError, NotImplementedError, OSError):
        return set()


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
