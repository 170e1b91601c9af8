"""How many held-out samples are learned, too: compared as they are in the data, by their content.

Nothing is read here; `reading.py` hands over what it checks.
"""

from __future__ import annotations

import hashlib
import json
import logging
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from moored.data.nested import first_few

if TYPE_CHECKING:
    from moored.data.records import Record

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
