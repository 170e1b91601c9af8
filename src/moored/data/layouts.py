"""Which layout a row has, and which of its columns are read: ours, or Alpaca's, or ShareGPT's.

The names that columns of rows and keys of turns have are here, ours and the field's. What may stand
in the columns is `records.py`'s and `turns.py`'s matter.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from moored.data.nested import UNREAD, holds_text, kind_of, missing_problem

if TYPE_CHECKING:
    from moored.config import Source

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
BESIDE = ("system", "tools")  # a chat or a pair
CONVERSATIONS = ("conversations", "conversation")
ALPACA = ("instruction", "output")
ALPACA_BESIDE = ("input", "history")
MEDIA = ("image", "images", "video", "videos", "audio", "audios")
FIELDS = (*(name for names in COLUMNS.values() for name in names), *BESIDE)
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
    foreign = (*CONVERSATIONS, *ALPACA, *ALPACA_BESIDE)
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
