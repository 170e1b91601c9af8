"""Which layout a row has, and which of its columns are read: ours, or Alpaca's, or ShareGPT's.

The names that columns of rows and keys of turns have are here, ours and the field's, and what is
undone that a storage format did to their values: Arrow (parquet, data sets of the hub) gives every
struct of a column the same fields and fills those that a row lacks with null, and where no schema
can hold what the rows have, people store JSON as text. What may stand in the columns is
`records.py`'s and `turns.py`'s matter.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from moored.config import Source


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


# How the field names an answer's reasoning; templates read one of them, and which is their matter.
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking", "thought", "thoughts")
# What the field calls "learn this turn, or do not": OpenAI (weight), axolotl (train, training),
# LLaMA-Factory, ms-swift and slime (loss, loss_mask).
FLAGS = ("loss", "loss_mask", "train", "training", "trainable", "weight")
# Likewise about learning, but of a part of a turn, by a fraction, or the other way round.
UNKNOWN_FLAGS = (
    "ignore_loss",
    "loss_scale",
    "loss_weight",
    "mask",
    "masked",
    "no_loss",
    "train_detail",
    "training_detail",
    "train_on_turn",
)

Kind = Literal["messages", "prompt_completion", "text"]
RowLayout = Literal["messages", "prompt_completion", "text", "sharegpt", "alpaca"]
COLUMNS: Mapping[Kind, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
}
CHAT_EXTRAS = ("system", "tools")  # a chat or a pair
CONVERSATIONS = ("conversations", "conversation")
ALPACA = ("instruction", "output")
ALPACA_EXTRAS = ("input", "history")
MEDIA = ("image", "images", "video", "videos", "audio", "audios")
FIELDS = (*(name for names in COLUMNS.values() for name in names), *CHAT_EXTRAS)
# Columns that are a part of the sample wherever they are met. Who leaves one unread is to say so.
PARTS = (
    "instruction",
    "input",
    "context",
    "history",
    "system_prompt",
    "system_message",
    "functions",
    *REASONING_KEYS,
    "chain_of_thought",
    "chosen",
    "rejected",
    "documents",
    "chat_template_kwargs",
    "completion_mask",
    "assistant_masks",
    *MEDIA,
)
VERDICTS = (*FLAGS, *UNKNOWN_FLAGS, "label")  # `label: false` is KTO's word for a bad answer


def wanted(source: Source) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The columns of a source that may hold samples, and those that are read whatever they hold."""
    foreign = (*CONVERSATIONS, *ALPACA, *ALPACA_EXTRAS)
    mapped = tuple(source.fields.get(name, name) for name in FIELDS)
    judged = tuple(name for name in (*PARTS, *VERDICTS) if name not in MEDIA)
    return _without((*mapped, *foreign), source), _without(
        [name for name in (*foreign, *judged) if name not in mapped], source
    )


def _without(names: Iterable[str], source: Source) -> tuple[str, ...]:
    return tuple(name for name in dict.fromkeys(names) if name not in source.ignore)


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
        columns |= {name: name for name in (*ALPACA, *ALPACA_EXTRAS) if name in value}
    else:
        columns |= {name: source.fields.get(name, name) for name in COLUMNS[layout]}
        if missing := [
            missing_problem(column, value, f"{label}.fields.{name}={{}}")
            for name, column in columns.items()
            if column not in value
        ]:
            return missing
    if layout != "text":
        beside = {name: source.fields.get(name, name) for name in CHAT_EXTRAS}
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
    lost = [name for name in PARTS if name in others and _is_given(others[name])]
    if lost:
        shown, they, them = ", ".join(lost), "they are", "them"
        if len(lost) == 1:
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
    filled: dict[RowLayout, list[str]] = {}
    for layout, names in columns.items():
        full = [name for name in names if value.get(name)]
        if full and (layout != "alpaca" or len(full) == len(ALPACA)):
            filled[layout] = full
    if len(filled) == 1:
        return next(iter(filled))
    if filled:
        return [_ambiguous(filled, label)]
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


def _ambiguous(filled: Mapping[RowLayout, list[str]], label: str) -> str:
    shown = " and ".join(repr(names[0]) for names in filled.values())
    formats = [layout for layout in filled if layout not in ("sharegpt", "alpaca")]
    if len(formats) == len(filled):
        return (
            f"has both {shown}: say which is meant, {label}.format={formats[0]} (or {formats[1]})"
        )
    choices = [f"{label}.ignore=[{', '.join(names)}]" for names in reversed([*filled.values()])]
    return f"has both {shown}: say which is not meant, {' or '.join(choices)}"
