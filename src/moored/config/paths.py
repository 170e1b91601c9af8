"""Where the relative paths of a recipe lead: from its own folder, or from the current one.

Which keys are paths is listed here; what they hold is not looked at.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moored.config.recipe import Recipe
from moored.config.section import Key

_PATHS: tuple[Key, ...] = (
    ("model", "name_or_path"),
    ("data", "chat_template"),
    ("data", "train", "*", "path"),
    ("data", "eval", "*", "path"),
    ("retention", "*", "path"),
    ("regularizer", "replay", "*", "path"),
    ("regularizer", "budget", "probe", "path"),
    ("compare", "*", "replay", "*", "path"),
    ("compare", "*", "budget", "probe", "path"),
    ("output", "dir"),
)
# A folder of `Dataset.save_to_disk` is given where a name of the hub may stand.
_HUBS: tuple[Key, ...] = tuple((*key[:-1], "hub") for key in _PATHS if key[-1] == "path")


def resolve_paths(recipe: Recipe) -> None:
    """Make the paths of a recipe, and of its overrides, absolute; in place."""
    data = recipe.data
    output = data.setdefault("output", {})
    if isinstance(output, dict) and "dir" not in output:
        output["dir"] = os.path.abspath("runs")
    for pattern in (*_PATHS, *_HUBS):
        for holder, last, key in matches(data, pattern):
            value = holder[last]
            if not isinstance(value, str) or not value:
                continue
            folder = Path.cwd() if recipe.is_overridden(key) else recipe.folder
            full = os.path.abspath(folder / os.path.expanduser(value))
            if last == "hub":
                is_path = _is_marked(value) or _is_saved(full)
            else:
                is_path = key != ("model", "name_or_path") or _is_local(value, full)
            if is_path:
                holder[last] = full


def _is_local(name: str, full: str) -> bool:
    """Whether a model is a path rather than a hub name."""
    return _is_marked(name) or name.endswith(".gguf") or os.path.exists(full)


def _is_marked(name: str) -> bool:
    return name.startswith((".", "/", "~"))


def _is_saved(folder: str) -> bool:
    files = ("dataset_dict.json", "state.json")
    return any(os.path.isfile(os.path.join(folder, file)) for file in files)


def matches(at: Any, pattern: Key, key: Key = ()) -> Iterator[tuple[Any, Any, Key]]:
    """What stands at the places of a pattern, in which `*` is any name: holder, name, whole key."""
    part, rest = pattern[0], pattern[1:]
    if part == "*":
        if isinstance(at, list):
            names: list[Any] = list(range(len(at)))  # pyright: ignore[reportUnknownArgumentType]
        else:
            names = list(at) if isinstance(at, dict) else []  # pyright: ignore[reportUnknownArgumentType]
    else:
        names = [part] if isinstance(at, dict) and part in at else []
    for name in names:
        if rest:
            yield from matches(at[name], rest, (*key, name))
        else:
            yield at, name, (*key, name)
