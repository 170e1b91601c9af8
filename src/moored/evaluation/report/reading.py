"""Parsed JSON into the dataclasses of a report, by their annotations; every problem is noted.

Which dataclasses there are is in `results.py`.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields
from functools import partial
from typing import Any, TypeVar

from moored.evaluation.report.blocks import Blocks, Columns, Tally
from moored.evaluation.report.where import Stretch, TokenChoice, TokenDrift, TokenExample, Where

_R = TypeVar("_R")  # a dataclass
_ColumnsT = TypeVar("_ColumnsT", bound=Columns)
_FRACTIONS = (
    "adaptation_exact_match",
    "top1_agreement",
    "instruction_following",
    "instruction_prompts_followed",
)


# Text out of data and vocabularies, which may be empty or blank.
_FREE_TEXT = ("token", "target", "context")


class JsonReader:
    """Parsed JSON -> dataclasses by their annotations; notes every problem with its place."""

    def __init__(self, problems: list[str]):
        self.problems = problems

    def mapping(
        self, data: object, where: str, known: Sequence[str] | None = None
    ) -> dict[str, Any] | None:
        """An object with none but the known keys."""
        place = f"{where}: " if where else ""
        if data is MISSING:
            self.problems.append(f"{place}missing")
            return None
        if not isinstance(data, dict):
            self.problems.append(f"{place}expected an object, got {short(data)}")
            return None
        for key in data:
            if known is not None and key not in known:
                near = difflib.get_close_matches(key, known, 1)
                hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
                path = f"{where}.{short(key)}" if where else short(key)
                self.problems.append(f"{path}: unknown key; {hint}")
        return data

    def result(self, kind: type[_R], data: object, where: str) -> _R | None:
        """An object as a dataclass."""
        known: Any = kind
        data = self.mapping(data, where, [item.name for item in fields(known)])
        if data is None:
            return None
        before = len(self.problems)
        values: dict[str, Any] = {}
        for item in fields(known):
            place = f"{where}.{item.name}"
            if item.name in data:
                values[item.name] = self._value(str(item.type), data[item.name], place, item.name)
            elif item.default is MISSING and item.default_factory is MISSING:
                self.problems.append(f"{place}: missing")
        return kind(**values) if len(self.problems) == before else None

    def _value(self, annotation: str, value: object, place: str, name: str) -> Any:
        if annotation.endswith(" | None"):
            if value is None:
                return None
            annotation = annotation.removesuffix(" | None")
        number = partial(self._number, name=name)
        integer = partial(self._integer, name=name)
        blocks, tally = (partial(self._columns, kind) for kind in (Blocks, Tally))
        readers: dict[str, Callable[[object, str], Any]] = {
            "str": self.text,
            "bool": self._truth,
            "int": integer,
            "float": number,
            "dict[str, int]": lambda v, p: self.values(v, p, integer),
            "Figures": lambda v, p: self.values(v, p, number, optional=True),
            "dict[str, Figures]": lambda v, p: self.values(
                v, p, lambda figures, at: self.values(figures, at, number, optional=True)
            ),
            "list[str]": lambda v, p: self._items(v, p, self.text),
            "list[int]": lambda v, p: self._items(v, p, integer),
            "list[float]": lambda v, p: self._items(v, p, number),
            "dict[str, list[float]]": lambda v, p: self.values(
                v, p, lambda items, at: self._items(items, at, number)
            ),
            "Blocks": blocks,
            "Tally": tally,
            "dict[str, Tally]": lambda v, p: self.values(v, p, tally),
            "dict[str, Blocks]": lambda v, p: self.values(v, p, blocks),
            "dict[str, Where]": lambda v, p: self.values(v, p, partial(self.result, Where)),
        }
        for kind in (Stretch, TokenDrift, TokenExample, TokenChoice):
            readers[f"list[{kind.__name__}]"] = partial(
                self._items, read=partial(self.result, kind)
            )
        if name in _FREE_TEXT:
            return self._free(value, place)
        return readers[annotation](value, place)

    def values(
        self,
        data: object,
        where: str,
        read: Callable[[object, str], Any],
        *,
        optional: bool = False,
    ) -> dict[str, Any]:
        """An object whose values are all read alike."""
        return {
            name: None if optional and value is None else read(value, f"{where}.{short(name)}")
            for name, value in (self.mapping(data, where) or {}).items()
        }

    def _items(self, data: object, where: str, read: Callable[[object, str], Any]) -> list[Any]:
        if not isinstance(data, list):
            self.problems.append(f"{where}: expected a list, got {short(data)}")
            return []
        return [read(value, f"{where}[{index}]") for index, value in enumerate(data)]

    def _columns(self, kind: type[_ColumnsT], data: object, where: str) -> _ColumnsT | None:
        columns = self.result(kind, data, where)
        if columns is not None and not columns.is_even:
            self.problems.append(f"{where}: its lists differ in length")
        return columns

    def _truth(self, value: object, place: str) -> bool:
        if not isinstance(value, bool):
            self.problems.append(f"{place}: expected true or false, got {short(value)}")
        return bool(value)

    def _free(self, value: object, place: str) -> str:
        if not isinstance(value, str):
            self.problems.append(f"{place}: expected text, got {short(value)}")
            return ""
        return value

    def text(self, value: object, place: str) -> str:
        """Text that is not empty."""
        text = self._free(value, place)
        if isinstance(value, str) and not text.strip():
            self.problems.append(f"{place}: must not be empty")
        return text

    def _integer(self, value: object, place: str, *, name: str) -> int:
        if not isinstance(value, int) or isinstance(value, bool):
            self.problems.append(f"{place}: expected an integer, got {short(value)}")
            return 0
        if value < 0 and name != "seed":
            self.problems.append(f"{place}: must not be negative, got {value}")
        return value

    def _number(self, value: object, place: str, *, name: str) -> float:
        if value in ("NaN", "Infinity", "-Infinity"):
            number = float(str(value))
        elif not isinstance(value, (int, float)) or isinstance(value, bool):
            self.problems.append(f"{place}: expected a number, got {short(value)}")
            return math.nan
        else:
            try:
                number = float(value)
            except OverflowError:
                number = math.inf
        # Just below a bound is rounding; clearly below it is another unit.
        if name in ("adaptation_ppl", "retention_ppl") and number < 1 - 1e-6:
            self.problems.append(
                f"{place}: {number:g} is no perplexity: exp of a cross-entropy is never below 1"
            )
        elif name in _FRACTIONS and (number < 0 or number > 1):
            self.problems.append(f"{place}: {number:g} is no fraction: expected 0 to 1")
        elif name.startswith("drift_") and number < -1e-4:
            self.problems.append(f"{place}: {number:g}: a divergence is never negative")
        elif name in ("tokens_per_second", "train_seconds", "temperature") and number < 0:
            self.problems.append(f"{place}: must not be negative, got {number:g}")
        return number


def short(value: object) -> str:
    """A value as errors show it."""
    text = value if isinstance(value, str) and value.isidentifier() else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
