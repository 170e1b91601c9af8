"""Values inside values, as they were before a storage format held them: structs, maps, JSON text.

Arrow (parquet, data sets of the hub) gives every struct of a column the same fields and fills those
that a row lacks with null; where no schema can hold what the rows have, people store JSON as text.
What the values mean is `turns.py`'s matter.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Sequence
from typing import Any

MAX_DEPTH = 100  # of a value that a template may have to write


class _Unread:
    """The value of a column that is not read, and may hold text."""

    def __bool__(self) -> bool:
        return False


UNREAD = _Unread()


class NotJsonError(Exception):
    """Text that is no JSON of the kind that is wanted; what it is instead, in words."""


def kind_of(value: Any) -> str:
    """A JSON value's type in words, for messages."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, int | float):
        return f"the number {value!r:.40}"
    words = {str: "text", list: "a list", dict: "an object", bytes: "bytes"}
    return words.get(type(value), f"a {type(value).__name__}")


def as_written(value: Any, kind: Any, *, decode: bool = True) -> Any:
    """A value of Arrow without the nulls that fill its structs, at every depth.

    A null in a list is kept, since nothing fills lists, and so is one inside JSON.

    Args:
        value: as `to_pylist(maps_as_pydicts="strict")` gives it.
        kind: its Arrow type; None where it is not known, and each object is taken for a struct.
        decode: JSON (`arrow.json`) is still text.
    """
    if value is None:
        return None
    if kind is None:
        if isinstance(value, dict):
            return {k: as_written(v, None) for k, v in value.items() if v is not None}
        return [as_written(item, None) for item in value] if isinstance(value, list) else value
    import pyarrow.types as types

    if getattr(kind, "extension_name", None) == "arrow.json":
        return _decoded_if_json(value) if decode else value
    if types.is_struct(kind) and isinstance(value, dict):
        fields = (kind.field(index) for index in range(kind.num_fields))
        inner = {f.name: as_written(value.get(f.name), f.type, decode=decode) for f in fields}
        return {name: item for name, item in inner.items() if item is not None}
    if types.is_map(kind) and isinstance(value, dict):
        return {k: as_written(v, kind.item_type, decode=decode) for k, v in value.items()}
    if is_list(kind) and isinstance(value, list):
        return [as_written(item, kind.value_type, decode=decode) for item in value]
    return value


def is_list(kind: Any) -> bool:
    """Whether an Arrow type is one of lists, of whatever make."""
    import pyarrow.types as types

    makes = (types.is_list, types.is_large_list, types.is_fixed_size_list)
    views = (types.is_list_view, types.is_large_list_view)
    return any(is_one(kind) for is_one in (*makes, *views))


def is_text(kind: Any) -> bool:
    """Whether an Arrow type is one of text, of whatever make."""
    import pyarrow.types as types

    if types.is_dictionary(kind):
        kind = kind.value_type
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def may_hold_text(kind: Any) -> bool:
    """Whether there is text anywhere in values of an Arrow type."""
    import pyarrow.types as types

    if is_text(kind) or getattr(kind, "extension_name", None) == "arrow.json":
        return True
    if types.is_struct(kind):
        return any(may_hold_text(kind.field(index).type) for index in range(kind.num_fields))
    if types.is_map(kind):
        return may_hold_text(kind.item_type)
    return is_list(kind) and may_hold_text(kind.value_type)


def holds_text(value: Any) -> bool:
    """Whether there is any text that is not blank in a value."""
    if isinstance(value, str):
        return bool(value.strip())
    inner = value.values() if isinstance(value, dict) else value
    return isinstance(value, dict | list) and any(holds_text(item) for item in inner)


def from_json(value: Any, wanted: type[dict[str, Any]] | type[list[Any]]) -> Any:
    """An object or a list that is given as JSON text; anything but text as it is.

    Raises:
        NotJsonError: the text is not that.
    """
    if not isinstance(value, str):
        return value
    what = "an object" if wanted is dict else "a list"
    try:
        decoded = json.loads(value)
    except (ValueError, RecursionError) as error:
        place = f" at character {error.pos + 1}" if isinstance(error, json.JSONDecodeError) else ""
        reason = getattr(error, "msg", None) or str(error)
        raise NotJsonError(
            f"holds text that is not JSON ({reason[:60]}{place}): write {what}"
        ) from error
    if not isinstance(decoded, wanted):
        raise NotJsonError(f"holds text with {kind_of(decoded)} in it: write {what}")
    return decoded


def _decoded_if_json(value: Any) -> Any:
    try:
        return json.loads(value)
    except (TypeError, ValueError, RecursionError):
        return value  # judged where it is used


def not_json(value: Any, depth: int = 0) -> str | None:
    """Where in a value something is that JSON does not have, and what: `.a[0]: holds ...`.

    None if nothing is.
    """
    if value is None or isinstance(value, str | bool | int):
        return None
    fix = ", which is not JSON: write it as text, or remove it"
    if isinstance(value, float):
        return None if math.isfinite(value) else f": holds {kind_of(value)}{fix}"
    if depth == MAX_DEPTH:
        return f": is nested more than {MAX_DEPTH} deep: write it flat"
    if isinstance(value, list):
        inner = [(f"[{index}]", item) for index, item in enumerate(value)]
    elif isinstance(value, dict):
        odd = [key for key in value if not isinstance(key, str)]
        if odd:
            return f": has {kind_of(odd[0])} as a key{fix}"
        inner = [(f".{key}", item) for key, item in value.items()]
    else:
        return f": holds {kind_of(value)}{fix}"
    for place, item in inner:
        if problem := not_json(item, depth + 1):
            return f"{place}{problem}"
    return None


# ---------------------------------------------------------------- what is wrong, in words


def text_problem(text: Any, name: str, *, blank_is_fine: bool = False) -> str | None:
    """What is wrong with a text field, in words, or None."""
    if not isinstance(text, str):
        fix = "fill it or remove the row" if text is None else "convert it to a string"
        return f"{name}: holds {kind_of(text)}, not text: {fix}"
    if not blank_is_fine and not text.strip():
        return f"{name}: is empty: fill it or remove the row"
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            code = f"\\u{ord(text[error.start]):04x}"
            return (
                f"{name}: holds half a character (lone surrogate {code} at character "
                f"{error.start + 1}): repair the text where it was cut"
            )
    return None


def missing_problem(column: str, row: dict[str, Any], fix: str) -> str:
    """Says that a row lacks a column, what it has instead, and the fix, which has a `{}`."""
    names = [key for key in row if key is not None]
    close = difflib.get_close_matches(column, names, 1, cutoff=0.6)
    there = ", ".join(repr(name) for name in names[:8]) or "nothing"
    meant = f"; did you mean {close[0]!r}? Then" if close else ":"
    return (
        f"no field {column!r}, found {there}{meant} set {fix.format(close[0] if close else '...')}"
    )


def first_few(names: Sequence[str]) -> str:
    """Some names for a message: the first three, and whether there are more."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
