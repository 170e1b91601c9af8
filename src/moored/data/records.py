"""What rows mean: chats, prompt and completion pairs, or texts, every field validated.

Nothing is tokenised here, and no torch is needed: `check_data` runs before anything large loads.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2

from moored.data.columns import Kind
from moored.data.corpora import resolve_text
from moored.data.files import (
    Row,
    SourceReader,
    display,
    open_sources,
    text_problem,
)
from moored.data.foreign import alpaca_history, alpaca_prompt
from moored.data.layouts import Cells, cells_of
from moored.data.overlap import Overlap
from moored.data.turns import Turns, read_tools, read_turns
from moored.utils.errors import UserError, UserErrors
from moored.utils.progress import Phase

if TYPE_CHECKING:
    from moored.config import Config, Source

logger = logging.getLogger(__name__)

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
        unread: columns of the row that hold text and are not read.
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
    unread: tuple[str, ...] = ()


def read_records(
    reader: SourceReader, source: Source, problems: list[str], *, skip: int = 0
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
    found = _parse(row, source, label)
    if isinstance(found, Record) and source.rendered:
        return dataclasses.replace(found, rendered=found.kind != "messages")
    return found


def _parse(row: Row, source: Source, label: str) -> Record | list[str]:
    if row.problem is not None:
        return [row.problem]
    if row.plain:
        text = row.value["text"]
        return Record(sample_id=row.key, where=row.where, kind="text", text=text, document=True)
    cells = cells_of(row.value, source, label)
    if isinstance(cells, list):
        return cells
    if cells.layout == "text":
        problem = _text_problem(cells, "text")
        return [problem] if problem else _record(row, cells, "text", text=cells.values["text"])
    if cells.layout in ("messages", "sharegpt"):
        turns: Turns | list[str] = read_turns(cells.values["messages"], cells.columns["messages"])
        return turns if isinstance(turns, list) else _chat(row, cells, turns, "messages")
    names = ("instruction", "output") if cells.layout == "alpaca" else ("prompt", "completion")
    if problems := [problem for name in names if (problem := _text_problem(cells, name))]:
        return problems
    prompt, completion = (cells.values[name] for name in names)
    before: list[dict[str, Any]] = []
    if cells.layout == "alpaca":
        given, history = cells.values.get("input"), alpaca_history(cells.values.get("history"))
        if given is not None and (problem := text_problem(given, "input", blank_is_fine=True)):
            return [problem]
        if isinstance(history, str):
            return [f"history: {history}"]
        prompt, before = alpaca_prompt(prompt, given or ""), history
    pair = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
    if before:
        turns = read_turns([*before, *pair], "history")
        return turns if isinstance(turns, list) else _chat(row, cells, turns, "messages")
    return _chat(row, cells, Turns(messages=tuple(pair)), "prompt_completion")


def _chat(row: Row, cells: Cells, turns: Turns, kind: Kind) -> Record | list[str]:
    """A chat with what stands beside it in its row: a system turn, and tools."""
    messages, learned = turns.messages, turns.learned
    tools = read_tools(cells.values.get("tools"), cells.columns.get("tools", "tools"))
    if isinstance(tools, str):
        return [tools]
    system, column = cells.values.get("system"), cells.columns.get("system", "system")
    if system is not None and (problem := text_problem(system, column, blank_is_fine=True)):
        return [problem]
    if system and system.strip():
        if messages[0]["role"] == "system":
            return [f"{column}: the chat has a system turn of its own: keep one of them"]
        messages = ({"role": "system", "content": system}, *messages)
        learned = learned and (False, *learned)
    kind = kind if len(messages) == 2 and not tools else "messages"
    return _record(row, cells, kind, messages=messages, tools=tools, learned=learned)


def _record(row: Row, cells: Cells, kind: Kind, **content: Any) -> Record:
    return Record(sample_id=row.key, where=row.where, kind=kind, unread=cells.unread, **content)


def _text_problem(cells: Cells, name: str) -> str | None:
    value, column = cells.values[name], cells.columns[name]
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

    Of a streamed hub dataset only the first rows are checked. How many held-out samples are
    learned, too, and which columns with text are not read is logged.

    Returns:
        How many samples each source has, by its place in the recipe (retention: documents).

    Raises:
        UserErrors: all problems of all sources, each naming file and line.
    """
    problems: list[str] = []
    counts: dict[str, int] = {}
    problems += streaming_problems(config)
    read_template(config.data.chat_template, problems)
    overlap = Overlap()
    for section, sources in config.sources().items():
        for reader in open_sources(sources, section, problems):
            source = sources[int(reader.label.rsplit(".", 1)[1])]
            records = read_records(reader, source, problems)
            if reader.hub is not None and reader.streaming:
                records = itertools.islice(records, STREAM_CHECKED)
                overlap.streamed += [reader.label] if section == "data.train" else []
            text_only, count = False, 0
            unread: dict[str, None] = {}
            with Phase(f"checking {reader.name}", reader.count, "rows") as phase:
                for record in phase.over(records):
                    count += 1
                    if config.data.eval:
                        overlap.add(section, record)
                    unread |= dict.fromkeys(record.unread)
                    text_only = text_only or record.kind == "text"
            counts[reader.label] = count
            if unread:
                logger.warning(
                    "%s (%s): columns with text that are not read: %s; map them with fields, or "
                    "list them as ignore",
                    reader.label,
                    reader.name,
                    ", ".join(repr(name) for name in unread),
                )
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
    overlap.say()
    return counts
