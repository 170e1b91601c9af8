"""What rows mean: chats, prompt and completion pairs, or texts, every field validated.

How many held-out samples are learned, too, is counted by their content. Nothing is tokenised here,
and no torch is needed. Who reads which source when is `reading.py`'s matter.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from moored.data.files import Row, SourceReader
from moored.data.layouts import Cells, Kind, cells_of, first_few, text_problem
from moored.data.turns import Turns, alpaca_history, alpaca_prompt, read_tools, read_turns
from moored.utils.errors import UserError

if TYPE_CHECKING:
    from moored.config import Source


MAX_PROBLEMS = 10_000  # per source; more of them say nothing new


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


@dataclass(slots=True, kw_only=True)
class Summary:
    """What the records of a source are like, all together.

    Attributes:
        num_records: how many there are.
        unread: columns of any row that hold text and are not read, in the order they were met.
        has_text: whether any record is plain text.
    """

    num_records: int = 0
    unread: dict[str, None] = dataclasses.field(default_factory=dict)
    has_text: bool = False

    def add(self, record: Record) -> None:
        """Takes one more record into account."""
        self.num_records += 1
        self.unread |= dict.fromkeys(record.unread)
        self.has_text = self.has_text or record.kind == "text"

    def as_json(self) -> dict[str, Any]:
        """The same as JSON values, out of which `from_json` makes it again."""
        return dataclasses.asdict(self) | {"unread": list(self.unread)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """See `as_json`."""
        return cls(**{**values, "unread": dict.fromkeys(values["unread"])})


def read_records(reader: SourceReader, source: Source, problems: list[str]) -> Iterator[Record]:
    """The valid records of a source; what is wrong with its other rows goes to `problems`."""
    before = len(problems)
    try:
        for row in reader.rows():
            record = parse(row, source, reader.label)
            if isinstance(record, Record):
                yield record
                continue
            problems += [f"{row.where}: {problem}" for problem in record]
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
    record = _parse(row, source, label)
    if isinstance(record, Record) and source.rendered:
        return dataclasses.replace(record, rendered=record.kind != "messages")
    return record


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


# ---------------------------------------------------------------- held-out samples that are learned

logger = logging.getLogger(__name__)
_as_text = json.JSONEncoder(sort_keys=True).encode


@dataclass(slots=True, kw_only=True)
class Digests:
    """The samples of a source, 64 bits of each and 64 of what comes before its last answer.

    Attributes:
        wholes: int64, of each sample.
        prompts: int64, of each as far as its last answer; of a text, which has none, of the whole.
        places: of each, for messages; None where nobody will name them.
    """

    wholes: Any = field(default_factory=lambda: array("q"))
    prompts: Any = field(default_factory=lambda: array("q"))
    places: list[str] | None = None

    def add(self, record: Record) -> None:
        """Takes one more sample in."""
        whole, prompt = _digests(record)
        self.wholes.append(whole)
        self.prompts.append(prompt)
        if self.places is not None:
            self.places.append(record.where)

    def over(self, records: Iterable[Record]) -> Iterator[Record]:
        """The records, each of which is taken in."""
        for record in records:
            self.add(record)
            yield record


def report_overlap(
    learned: Sequence[Digests], held_out: Sequence[Digests], streamed: Sequence[str] = ()
) -> None:
    """Logs which samples of `data.eval` are in `data.train`.

    A warning where there is any, else a line for the log file alone.

    Args:
        learned: of each source of `data.train`.
        held_out: of each source of `data.eval`, with places.
        streamed: sources of the hub that are read as training goes, and only begun here.
    """
    lines = list(_lines(learned, held_out, streamed))
    for line in lines:
        logger.warning("%s", line)
    total = sum(len(one.wholes) for one in held_out)
    if total and not lines:
        logger.debug("data.eval: none of %d samples is in data.train", total)


def _lines(
    learned: Sequence[Digests], held_out: Sequence[Digests], streamed: Sequence[str]
) -> Iterator[str]:
    places = [place for one in held_out for place in one.places or ()]
    total = len(places)
    if not total:
        return
    if streamed:
        yield (
            f"data.eval: of {', '.join(streamed)}, which the hub streams, only the first rows were "
            "compared: see to it that the others have no sample of it"
        )
    is_same = np.isin(
        _joined([one.wholes for one in held_out]), _joined([one.wholes for one in learned])
    )
    is_alike = ~is_same & np.isin(
        _joined([one.prompts for one in held_out]), _joined([one.prompts for one in learned])
    )
    same, alike = ([places[i] for i in np.flatnonzero(mask)] for mask in (is_same, is_alike))
    if len(same) == total:
        yield (
            f"data.eval: ALL {total} SAMPLES ARE LEARNED, TOO: data.train has them, so what is "
            "measured on data.eval is memory: hold other samples out"
        )
    elif same:
        yield (
            f"data.eval: {len(same)} of {total} samples are learned, too, since data.train has "
            f"them ({first_few(same)}): take them out of one of both"
        )
    if alike:
        yield (
            f"data.eval: {len(alike)} of {total} samples have the prompt of a sample of "
            f"data.train with another answer ({first_few(alike)})"
        )


def _joined(parts: Sequence[Any]) -> np.ndarray:
    return np.concatenate([np.zeros(0, np.int64), *(np.asarray(part, np.int64) for part in parts)])


def _digests(record: Record) -> tuple[int, int]:
    """A sample's two digests; see `Digests`.

    Blanks around a turn's words do not count: many templates take them away.
    """
    if record.kind == "text":
        whole = _number(hashlib.blake2b(record.text.strip().encode(), digest_size=8))
        return whole, whole
    *asked, last = (
        turn | {"content": (turn.get("content") or "").strip()} for turn in record.messages
    )
    digest = hashlib.blake2b(_as_text([record.tools, asked]).encode(), digest_size=8)
    prompt = _number(digest)
    digest.update(_as_text(last).encode())
    return _number(digest), prompt


def _number(digest: hashlib.blake2b) -> int:
    return int.from_bytes(digest.digest(), "little", signed=True)
