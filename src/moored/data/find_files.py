"""The files that a path of a recipe stands for: one, or a folder's, all of them or a split's.

Nothing is decoded here; which names make a split is `splits.py`'s matter.
"""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Iterable
from pathlib import Path

from moored.data.formats import PLAIN, STRUCTURED
from moored.data.splits import choose

logger = logging.getLogger(__name__)

# What repositories of the hub hold beside their data, as `datasets` has it.
_ABOUT = ("config.json", "dataset_dict.json", "dataset_info.json", "dataset_infos.json")


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
                found = f", but {', '.join(others[:3])}" if others else ""
                problems.append(
                    f"{label}.path={display(path)}: no {known} file in this directory{found}"
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
    path: Path, found: list[tuple[Path, str]], split: str | None, label: str, problems: list[str]
) -> list[tuple[Path, str]] | None:
    """Those of a folder's files that belong to a split; else a line is appended to `problems`.

    Args:
        path: a file or a folder.
        found: what `find_files` gave for it.
        split: that is asked for.
        label: the source's place in the recipe.
        problems: one line is appended where it is None.
    """
    if not path.is_dir():
        return found
    within = {name: file for file, name in found}
    chosen = choose(path, list(within), split, shown=display(path), label=label)
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
