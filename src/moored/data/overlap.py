"""How many held-out samples are learned, too: compared as they are in the data, by their content.

Nothing is read here; `records.py` hands over what it checks.
"""

from __future__ import annotations

import hashlib
import json
import logging
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moored.data.records import Record

logger = logging.getLogger(__name__)
_as_text = json.JSONEncoder(sort_keys=True).encode


@dataclass(slots=True, kw_only=True)
class Overlap:
    """Counts the samples of `data.eval` that are in `data.train`.

    Of each sample 16 bytes are held.

    Attributes:
        streamed: sources of the hub that are read as training goes, and only begun here.
    """

    streamed: list[str] = field(default_factory=list)
    _learned: tuple[array[int], array[int]] = field(
        default_factory=lambda: (array("q"), array("q"))
    )
    _held_out: list[tuple[str, int, int | None]] = field(default_factory=list)

    def add(self, section: str, record: Record) -> None:
        """Takes a sample of a section of the recipe into account."""
        whole, prompt = _digests(record)
        if section == "data.train":
            wholes, prompts = self._learned
            wholes.append(whole)
            if prompt is not None:
                prompts.append(prompt)
        elif section == "data.eval":
            self._held_out.append((record.where, whole, prompt))

    def say(self) -> None:
        """Logs what was found: a warning where there is any, else a line for the log file alone."""
        lines = list(self._lines())
        for line in lines:
            logger.warning("%s", line)
        if self._held_out and not lines:
            total = len(self._held_out)
            logger.debug("data.eval: none of %d samples is in data.train", total)

    def _lines(self) -> Iterator[str]:
        total = len(self._held_out)
        if not total:
            return
        if self.streamed:
            yield (
                f"data.eval: of {', '.join(self.streamed)}, which the hub streams, only the first "
                "rows were compared: see to it that the others have no sample of it"
            )
        wholes, prompts = (self._among(values) for values in self._learned)
        same = [where for where, whole, _ in self._held_out if whole in wholes]
        alike = [
            where
            for where, whole, prompt in self._held_out
            if whole not in wholes and prompt in prompts
        ]
        if len(same) == total:
            yield (
                f"data.eval: ALL {total} SAMPLES ARE LEARNED, TOO: data.train has them, so what is "
                "measured on data.eval is memory: hold other samples out"
            )
        elif same:
            yield (
                f"data.eval: {len(same)} of {total} samples are learned, too, since data.train has "
                f"them ({_some(same)}): take them out of one of both"
            )
        if alike:
            yield (
                f"data.eval: {len(alike)} of {total} samples have the prompt of a sample of "
                f"data.train with another answer ({_some(alike)})"
            )

    def _among(self, learned: array[int]) -> set[int]:
        held_out = {value for _, whole, prompt in self._held_out for value in (whole, prompt)}
        return {value for value in learned if value in held_out}


def _some(places: list[str]) -> str:
    return ", ".join(places[:3]) + (", ..." if len(places) > 3 else "")


def _digests(record: Record) -> tuple[int, int | None]:
    """Of the whole sample, and of what comes before its last answer, if it is a chat.

    Blanks around a turn's words do not count: many templates take them away.
    """
    if record.kind == "text":
        return _number(hashlib.blake2b(record.text.strip().encode(), digest_size=8)), None
    *asked, last = (
        turn | {"content": (turn.get("content") or "").strip()} for turn in record.messages
    )
    digest = hashlib.blake2b(_as_text([record.tools, asked]).encode(), digest_size=8)
    prompt = _number(digest)
    digest.update(_as_text(last).encode())
    return _number(digest), prompt


def _number(digest: hashlib.blake2b) -> int:
    return int.from_bytes(digest.digest(), "little", signed=True)
