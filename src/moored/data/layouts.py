"""Which layout a row has, and which of its columns are read: ours, or Alpaca's, or ShareGPT's.

What may stand in the columns is `records.py`'s and `turns.py`'s matter.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moored.data.columns import (
    ALPACA,
    ALPACA_BESIDE,
    BESIDE,
    COLUMNS,
    CONVERSATIONS,
    PARTS,
    UNKNOWN_FLAGS,
    VERDICTS,
    RowLayout,
)
from moored.data.files import missing_problem
from moored.data.nested import UNREAD, holds_text, kind_of

if TYPE_CHECKING:
    from moored.config import Source


@dataclass(frozen=True, slots=True, kw_only=True)
class Cells:
    """What a row's columns hold, by our names.

    Attributes:
        layout: whose names its columns have.
        values: by our names, and Alpaca's; only of columns that there are.
        columns: the name of each in the file.
        unread: columns with text that are not among them.
    """

    layout: RowLayout
    values: dict[str, Any]
    columns: dict[str, str]
    unread: tuple[str, ...]


def cells_of(row: Mapping[str, Any], source: Source, label: str) -> Cells | list[str]:
    """The columns of a row that are read, or what is wrong with them, in words.

    Args:
        row: its columns.
        source: says the format, which column holds which field, and which are not read.
        label: the source's place in the recipe.
    """
    value = {name: cell for name, cell in row.items() if name not in source.ignore}
    layout = _layout(value, source, label)
    if isinstance(layout, list):
        return layout
    columns: dict[str, str] = {}
    if layout == "sharegpt":
        columns["messages"] = max(
            (name for name in CONVERSATIONS if name in value), key=lambda name: bool(value[name])
        )
    elif layout == "alpaca":
        columns |= {name: name for name in (*ALPACA, *ALPACA_BESIDE) if name in value}
    else:
        columns |= {name: source.fields.get(name, name) for name in COLUMNS[layout]}
        if missing := [
            missing_problem(column, value, f"{label}.fields.{name}={{}}")
            for name, column in columns.items()
            if column not in value
        ]:
            return missing
    if layout != "text":
        beside = {name: source.fields.get(name, name) for name in BESIDE}
        columns |= {name: column for name, column in beside.items() if column in value}
    others = {name: cell for name, cell in value.items() if name not in columns.values()}
    if problems := list(_refused(others, layout, label)):
        return problems
    return Cells(
        layout=layout,
        values={name: value[column] for name, column in columns.items()},
        columns=columns,
        unread=tuple(name for name, cell in others.items() if cell is UNREAD or holds_text(cell)),
    )


def _refused(others: Mapping[str, Any], layout: RowLayout, label: str) -> Iterator[str]:
    """Columns that are not read and cannot be passed over."""
    if not others:
        return
    for name in VERDICTS:
        if name in others and _says_no(name, others[name]):
            yield (
                f"{name}: holds {kind_of(others[name])}, and what is said of a whole row is not "
                f"read: take the row out, mark its turns, or set {label}.ignore=[{name}]"
            )
    if layout == "text":
        return  # a text is whole
    found = [name for name in PARTS if name in others and _is_given(others[name])]
    if found:
        shown, they, them = ", ".join(found), "they are", "them"
        if len(found) == 1:
            they, them = "it is", "it"
        yield (
            f"{shown}: would be lost, as {they} a part of the sample and not read: map {them} with "
            f"{label}.fields, write {them} into what is read, or set {label}.ignore=[{shown}]"
        )


def _says_no(name: str, cell: Any) -> bool:
    """Whether a column says that a row, or a part of it, is not to be learned."""
    if name == "label":
        return cell is False
    if isinstance(cell, bool):
        return not cell or name in UNKNOWN_FLAGS
    return (isinstance(cell, int | float) and cell == 0) or (isinstance(cell, list) and bool(cell))


def _is_given(cell: Any) -> bool:
    if isinstance(cell, str):
        return bool(cell.strip())
    return cell is UNREAD or (isinstance(cell, list | dict | bytes) and bool(cell))


def _layout(value: dict[str, Any], source: Source, label: str) -> RowLayout | list[str]:
    if source.format != "auto":
        return source.format
    mapped = source.fields.values()
    columns: dict[RowLayout, list[str]] = {
        kind: [source.fields.get(name, name) for name in names] for kind, names in COLUMNS.items()
    }
    columns["sharegpt"] = [name for name in CONVERSATIONS if name not in mapped]
    if all(name in value and name not in mapped for name in ALPACA):
        columns["alpaca"] = list(ALPACA)
    found: dict[RowLayout, list[str]] = {}
    for layout, names in columns.items():
        full = [name for name in names if value.get(name)]
        if full and (layout != "alpaca" or len(full) == len(ALPACA)):
            found[layout] = full
    if len(found) == 1:
        return next(iter(found))
    if found:
        return [_ambiguous(found, label)]
    # A field that is there but empty is a fault of the row, not of its columns.
    for layout, names in columns.items():
        if any(name in value for name in names):
            return layout
    names = [name for kind in COLUMNS.values() for name in kind]
    for key in value:
        if close := difflib.get_close_matches(str(key), names, 1, cutoff=0.7):
            return [missing_problem(close[0], value, f"{label}.fields.{close[0]}={{}}")]
    keys = ", ".join(repr(key) for key in list(value)[:8]) or "nothing"
    return [
        f"no messages, prompt and completion, or text field, found {keys}: name the columns, "
        f"{label}.fields={{prompt: ..., completion: ...}}"
    ]


def _ambiguous(found: Mapping[RowLayout, list[str]], label: str) -> str:
    shown = " and ".join(repr(names[0]) for names in found.values())
    formats = [layout for layout in found if layout not in ("sharegpt", "alpaca")]
    if len(formats) == len(found):
        return (
            f"has both {shown}: say which is meant, {label}.format={formats[0]} (or {formats[1]})"
        )
    choices = [f"{label}.ignore=[{', '.join(names)}]" for names in reversed([*found.values()])]
    return f"has both {shown}: say which is not meant, {' or '.join(choices)}"
