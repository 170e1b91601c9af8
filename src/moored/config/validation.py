"""A recipe's plain values -> a validated section class, with every problem found in one pass.

The keys and their relations are the class's own; how a problem reads is `wording.py`'s.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar, cast

from pydantic import ValidationError

from moored.config.recipe import Recipe
from moored.config.section import Key, Relation, Section
from moored.config.wording import unknown_key, wording
from moored.utils.errors import UserErrors

Root = TypeVar("Root", bound=Section)
# A pass takes wrong values away, and removing one seldom brings another to light.
MAX_PASSES = 50


def validate(
    root: type[Root],
    recipe: Recipe,
    placeholders: Mapping[Key, Any],
    extra: Callable[[Root], Iterable[Relation]],
) -> Root:
    """Validates the values of a recipe.

    Each pass replaces the values that are wrong by themselves, so that the relations among the
    others are checked too and everything is reported at once.

    Args:
        root: the class of the whole recipe.
        recipe: the values; its `data` is changed.
        placeholders: valid stand-ins for the keys that have no default.
        extra: relations that hold for files only, not for objects made in Python.

    Raises:
        UserErrors: all problems, in the order of the file.
    """
    problems = list(recipe.problems)
    broken: list[Key] = []
    for _ in range(MAX_PASSES):
        try:
            config = root.model_validate(recipe.data)
        except ValidationError as error:
            relations: Sequence[Relation] = ()
            for entry in error.errors():
                if entry["type"] == "relations":
                    relations = entry["ctx"]["broken"]  # pyright: ignore[reportTypedDictNotRequiredAccess]
                else:
                    _report_value(root, recipe, cast("Any", entry), broken, problems)
                    missing = entry["type"] == "missing"
                    _mend(recipe.data, _key(entry["loc"]), placeholders if missing else {})
            if not relations or _drop_overridden(recipe, relations):
                continue
            _report_relations(recipe, relations, broken, problems)
            break
        _report_relations(recipe, list(extra(config)), broken, problems)
        if problems:
            break
        return config
    raise UserErrors(sorted(dict.fromkeys(problems), key=_line_number))


def _key(loc: Sequence[str | int]) -> Key:
    return tuple(part for part in loc if part != "[key]")


def _report_value(
    root: type[Section],
    recipe: Recipe,
    entry: Mapping[str, Any],
    broken: list[Key],
    problems: list[str],
) -> None:
    """Adds one pydantic error, unless something that holds it was reported before."""
    key = _key(entry["loc"])
    if not any(key[: len(b)] == b for b in broken):
        problems.append(recipe.line(key, wording(root, key, entry)))
    if entry["type"] == "extra_forbidden":
        # A misspelt key is there all the same: that it is missing must not be said as well.
        meant = unknown_key(root, key).meant
        if meant and meant not in (_lookup(recipe.data, key[:-1]) or {}):
            key = (*key[:-1], meant)
    broken.append(key)


def _report_relations(
    recipe: Recipe, relations: Sequence[Relation], broken: list[Key], problems: list[str]
) -> None:
    """Adds broken relations, save those about a key that is wrong by itself."""
    for relation in relations:
        about = (relation.key, *relation.involves)
        if not any(a[: len(b)] == b or b[: len(a)] == a for a in about for b in broken):
            problems.append(recipe.line(relation.key, relation.message))


def _drop_overridden(recipe: Recipe, relations: Sequence[Relation]) -> bool:
    """Takes out the file's options that the command line made void; True if there were any."""
    dropped = False
    for relation in relations:
        overridden = any(recipe.is_new(switch) for switch in relation.switches)
        if overridden and not recipe.is_overridden(relation.key):
            remove(recipe.data, relation.key)
            dropped = True
    return dropped


def _line_number(problem: str) -> int:
    found = re.match(r"\S.*?:(\d+): ", problem)
    return int(found[1]) if found else 1 << 30


def _mend(data: Any, key: Key, placeholders: Mapping[Key, Any]) -> None:
    """Puts something valid, or nothing, in the place of a wrong value."""
    holder = _lookup(data, key[:-1])
    if key in placeholders and isinstance(holder, dict):
        holder[key[-1]] = copy.deepcopy(placeholders[key])
    elif not isinstance(key[-1], int):
        remove(data, key)
    elif key[0] in ("optim", "adapter") or not isinstance(holder, list):
        remove(data, key[:-1])  # a list of plain values, wrong as a whole
    elif key[-1] < len(cast("list[Any]", holder)):
        holder[key[-1]] = {}  # one of several sections; the places of the others stay


def _lookup(data: Any, key: Key) -> Any:
    for part in key:
        try:
            data = data[part]
        except (KeyError, IndexError, TypeError):
            return None
    return data


def remove(data: Any, key: Key) -> None:
    """Takes a key out of nested mappings and lists, if it is there."""
    holder = _lookup(data, key[:-1])
    if isinstance(holder, dict):
        cast("dict[Any, Any]", holder).pop(key[-1], None)
