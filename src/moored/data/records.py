"""What rows mean: chats, prompt and completion pairs, or texts, every field validated.

Nothing is tokenised here, and no torch is needed: `check_data` runs before anything large loads.
"""

from __future__ import annotations

import difflib
import itertools
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jinja2

from moored.data.corpora import resolve_text
from moored.data.files import (
    Reader,
    Row,
    display,
    missing_problem,
    open_sources,
    text_problem,
)
from moored.data.turns import read_tools, read_turns
from moored.errors import UserError, UserErrors
from moored.progress import Phase

if TYPE_CHECKING:
    from moored.config import Config, Source

logger = logging.getLogger(__name__)

Kind = Literal["messages", "prompt_completion", "text"]
COLUMNS: dict[Kind, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
}
_MARKS = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")
MAX_PROBLEMS = 10_000  # per source; more of them say nothing new
STREAM_CHECKED = 1000  # rows of a streamed hub dataset that are checked at the start


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One valid sample, not yet tokenised.

    Attributes:
        sample_id: stable and unique, `train.jsonl:12`.
        where: the place as messages name it.
        kind: how it was given.
        messages: the conversation; of a prompt and completion, one user and one assistant turn.
        tools: JSON schemas for the chat template, or None.
        text: of kind text.
        document: the text is a whole txt or md file, to be cut into windows.
        learned: whether each message is learned; None if all turns of the assistant are.
        rendered: the words are in the model's chat format already, no template is to be used.
    """

    sample_id: str
    where: str
    kind: Kind
    messages: tuple[dict[str, Any], ...] = ()
    tools: list[dict[str, Any]] | None = None
    text: str = ""
    document: bool = False
    learned: tuple[bool, ...] | None = None
    rendered: bool = False


def read_records(
    reader: Reader, source: Source, problems: list[str], *, skip: int = 0
) -> Iterator[Record]:
    """The valid records of a source after the first `skip` rows; the others go to `problems`."""
    before = len(problems)
    try:
        for row in reader.rows(skip):
            found = parse(row, source, reader.label)
            if isinstance(found, Record):
                yield found
                continue
            problems += [f"{row.where}: {problem}" for problem in found]
            if len(problems) - before >= MAX_PROBLEMS:
                problems.append(f"{reader.label}: gave up after {MAX_PROBLEMS} problems")
                return
    except UserError as error:  # the hub cannot be reached, or knows no such dataset
        problems.append(str(error))


def parse(row: Row, source: Source, label: str) -> Record | list[str]:
    """A row as a record, or what is wrong with it, in words.

    Args:
        row: as read.
        source: says the format and which column holds which field.
        label: the source's place in the recipe.
    """
    if row.problem is not None:
        return [row.problem]
    if row.plain:
        text = row.value["text"]
        return Record(sample_id=row.key, where=row.where, kind="text", text=text, document=True)
    kind = _kind(row.value, source, label)
    if isinstance(kind, list):
        return kind
    columns = [source.fields.get(name, name) for name in COLUMNS[kind]]
    missing = [
        missing_problem(column, row.value, f"{label}.fields.{name}={{}}")
        for name, column in zip(COLUMNS[kind], columns, strict=True)
        if column not in row.value
    ]
    if missing:
        return missing
    values = [row.value[column] for column in columns]
    if kind == "messages":
        turns, tools = (
            read_turns(values[0], columns[0]),
            read_tools(row.value.get("tools"), "tools"),
        )
        if isinstance(turns, list):
            return turns
        if isinstance(tools, str):
            return [tools]
        return Record(
            sample_id=row.key,
            where=row.where,
            kind=kind,
            messages=turns.messages,
            tools=tools,
            learned=turns.learned,
        )
    texts = [_text_problem(value, column) for value, column in zip(values, columns, strict=True)]
    if problems := [problem for problem in texts if problem]:
        return problems
    if kind == "text":
        return Record(
            sample_id=row.key,
            where=row.where,
            kind=kind,
            text=values[0],
            rendered=source.rendered,
        )
    roles = ("user", "assistant")
    chat = tuple({"role": role, "content": text} for role, text in zip(roles, values, strict=True))
    return Record(
        sample_id=row.key, where=row.where, kind=kind, messages=chat, rendered=source.rendered
    )


def _kind(value: dict[str, Any], source: Source, label: str) -> Kind | list[str]:
    if source.format != "auto":
        return source.format
    found: list[Kind] = [
        kind
        for kind, names in COLUMNS.items()
        if any(value.get(source.fields.get(name, name)) for name in names)
    ]
    if len(found) == 1:
        return found[0]
    if not found:
        # A field that is there but empty is a fault of the row, not of its columns.
        there: list[Kind] = [
            kind
            for kind, names in COLUMNS.items()
            if any(source.fields.get(name, name) in value for name in names)
        ]
        if there:
            return there[0]
        names = [name for kind in COLUMNS.values() for name in kind]
        for key in value:
            if close := difflib.get_close_matches(str(key), names, 1, cutoff=0.7):
                return [missing_problem(close[0], value, f"{label}.fields.{close[0]}={{}}")]
        keys = ", ".join(repr(key) for key in list(value)[:8]) or "nothing"
        return [
            f"no messages, prompt and completion, or text field, found {keys}: name the columns, "
            f"{label}.fields={{prompt: ..., completion: ...}}"
        ]
    shown = " and ".join(
        repr(next(name for name in COLUMNS[kind] if value.get(source.fields.get(name, name))))
        for kind in found
    )
    return [f"has both {shown}: say which is meant, {label}.format={found[0]} (or {found[1]})"]


def _text_problem(value: Any, column: str) -> str | None:
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return (
            f"{column}: holds a list of turns, not text: put the whole chat into one messages list"
        )
    return text_problem(value, column)


def read_template(path: Path | None, problems: list[str]) -> str | None:
    """The chat template of the recipe, or None."""
    if path is None:
        return None
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        problems.append(f"data.chat_template={display(Path(path))}: cannot be read: {reason}")
        return None
    if not text.strip():
        problems.append(f"data.chat_template={display(Path(path))}: the file is empty: fill it")
        return None
    try:
        # What transformers adds to the language: these marks, and the tags of loop controls.
        extensions = ["jinja2.ext.loopcontrols"]
        jinja2.Environment(extensions=extensions).parse(_MARKS.sub("", text))
    except jinja2.TemplateSyntaxError as error:
        place = f"data.chat_template={display(Path(path))}:{error.lineno}"
        problems.append(f"{place}: not a Jinja template ({error.message}): mend it here")
        return None
    return text


def streaming_problems(config: Config) -> list[str]:
    """Streamed sources where the number of their samples would have to be known."""
    problems = [
        f"data.eval.{index}.streaming: evaluation reads everything at the start: remove it"
        for index, source in enumerate(config.data.eval)
        if source.streaming
    ]
    for index, source in enumerate(config.data.train):
        if source.streaming and source.hub and not source.limit and len(config.data.train) > 1:
            problems.append(
                f"data.train.{index}.streaming: beside other sources its size must be known, to "
                f"weigh it: set data.train.{index}.limit"
            )
    return problems


def check_data(config: Config) -> dict[str, int]:
    """Reads and validates every file of the recipe: format, fields, types, roles, emptiness.

    Of a streamed hub dataset only the first rows are checked.

    Returns:
        How many samples each source has, by its place in the recipe (retention: documents).

    Raises:
        UserErrors: all problems of all sources, each naming file and line.
    """
    problems: list[str] = []
    counts: dict[str, int] = {}
    problems += streaming_problems(config)
    read_template(config.data.chat_template, problems)
    for section, sources in config.sources().items():
        for reader in open_sources(sources, section, problems):
            source = sources[int(reader.label.rsplit(".", 1)[1])]
            records = read_records(reader, source, problems)
            if reader.hub is not None and reader.streaming:
                records = itertools.islice(records, STREAM_CHECKED)
            text_only, count = False, 0
            with Phase(f"checking {reader.name}", reader.count, "rows") as phase:
                for record in phase.over(records):
                    count += 1
                    text_only = text_only or record.kind == "text"
            counts[reader.label] = count
            if text_only and section == "data.eval" and config.evaluation.exact_match:
                problems.append(
                    f"{reader.label}: exact match needs prompts, but this source is plain text: "
                    "set evaluation.exact_match=false"
                )
    for place, corpus in config.corpora().items():
        try:
            counts[place] = len(resolve_text(corpus, place))
        except UserErrors as errors:
            problems += errors.problems
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserErrors(problems)
    return counts
