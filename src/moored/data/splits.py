"""The splits of a folder: which of its files are for training, and which are not.

The rules are those by which `datasets` reads a repository of the hub: what its README says, then
shards (`data/train-00000-of-00003.parquet`), then words in the names of folders and files. Only
names inside the folder count. What is in the files is not looked at.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

logger = logging.getLogger(__name__)

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


def choose(
    folder: Path, names: Sequence[str], split: str | None, *, shown: str, label: str
) -> list[str] | str:
    """The files of a split, in order, or why they cannot be told, in words.

    Without a split, `train` is read, if the folder has splits at all. Held-out data are to say
    theirs, unless there is only one, which is not for training.

    Args:
        folder: that holds the files.
        names: of its data files within it, in order.
        split: that is asked for.
        shown: the folder as messages name it.
        label: the source's place in the recipe.
    """
    if split == ALL:
        return list(names)
    found = _splits(folder, names)
    if isinstance(found, str):
        return f"{label}.path={shown}: {found} set {label}.split={ALL} to read every file"
    there = ", ".join(f"{one} ({_count(files)})" for one, files in found.files.items())
    rest = f"{_count(found.rest)} of no split ({_some(found.rest)})"
    if not found.files:
        if split is None:
            return list(names)
        return f"{label}.split={split}: no file of {shown} names a split: remove it"
    wanted = split or "train"
    if split is None and label.startswith("data.eval"):
        (only, *more) = found.files
        if more or only == "train" or found.rest:
            held = next((one for one in found.files if one != "train"), "train")
            return (
                f"{label}.path={shown}: has {there}, and does not say which is held out: set "
                f"{label}.split={held}"
            )
        wanted = only
    if wanted not in found.files:
        return (
            f"{label}.path={shown}: has no file of split {wanted}, it has {there}: set "
            f"{label}.split to one of them, or to {ALL}"
        )
    if found.rest and split is None and not found.declared:
        return (
            f"{label}.path={shown}: has {there}, and {rest}: set {label}.split={wanted} to leave "
            f"the others out, or {label}.split={ALL}"
        )
    others = [f"{one} ({_count(files)})" for one, files in found.files.items() if one != wanted]
    others += [rest] if found.rest else []
    if others:
        logger.warning("%s: split %s is read, left out: %s", shown, wanted, ", ".join(others))
    return found.files[wanted]


def _count(files: Sequence[str]) -> str:
    return f"{len(files)} {'file' if len(files) == 1 else 'files'}"


def _some(files: Sequence[str]) -> str:
    return ", ".join(files[:3]) + (", ..." if len(files) > 3 else "")


def _splits(folder: Path, names: Sequence[str]) -> Splits | str:
    declared = _from_readme(folder, names)
    if declared is not None:
        return declared
    shards = {name: found[1] for name in names if (found := _SHARD.fullmatch(name))}
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
    found = Splits(declared=declared)
    for name in names:
        if name in of:
            found.files.setdefault(of[name], []).append(name)
        else:
            found.rest.append(name)
    return found


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
        found = yaml.safe_load(header[1]) if header else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, ValueError, RecursionError):
        return []  # a text for people, then
    configs = found.get("configs") if isinstance(found, dict) else None
    return [one for one in configs if isinstance(one, dict)] if isinstance(configs, list) else []


def _matching(folder: Path, pattern: str) -> set[str]:
    """Names within the folder that a pattern matches."""
    pattern = f"{pattern}/*" if pattern.endswith("**") else pattern
    try:
        return {path.relative_to(folder).as_posix() for path in folder.glob(pattern)}
    except (ValueError, NotImplementedError, OSError):
        return set()
