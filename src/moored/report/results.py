"""The figures of finished runs as data: strict, JSON in and out.

Nothing is measured, worded or drawn here; several reports are joined in `merging.py`.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from moored.errors import UserError, UserErrors

Figures = dict[str, float | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseResult:
    """The base model, before any adapter. None: not measured.

    Attributes:
        model: name or path.
        revision: of the model.
        quantization: nf4 or none.
        adaptation_ppl: perplexity on the new task's held-out targets.
        adaptation_exact_match: fraction of its prompts answered exactly, 0 to 1.
        retention_ppl: perplexity per corpus.
        num_tokens: scored tokens per corpus.
        num_adaptation_tokens: scored target tokens of the new task.
        num_adaptation_prompts: prompts behind the exact match.
    """

    model: str
    revision: str | None
    quantization: str
    adaptation_ppl: float | None
    adaptation_exact_match: float | None = None
    retention_ppl: Figures
    num_tokens: dict[str, int]
    num_adaptation_tokens: int | None = None
    num_adaptation_prompts: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmResult:
    """One adapted model. None: not measured; dicts are per corpus.

    Attributes:
        kind: the regulariser.
        weight: of the regulariser.
        seed: of data order and adapter.
        adaptation_ppl: perplexity on the new task's held-out targets.
        retention_ppl: perplexity per corpus.
        retention_increase_pct: 100 * (retention_ppl / the base's - 1), percent.
        drift_nats_per_token: mean KL(base || adapted) over the whole vocabulary.
        num_steps: optimizer updates.
        tokens_per_second: trained tokens (without padding) per second of training.
        adaptation_exact_match: fraction of the prompts answered exactly, 0 to 1.
        drift_tmkl_nats_per_token: the same drift with the true token left out.
        top1_agreement: fraction of positions where base and adapted prefer the same token.
        train_seconds: spent in updates.
        peak_memory_bytes: most memory that one process held.
        final_loss: of the last update, nats per token.
        status: how the run ended.
        direction: of the divergence.
        temperature: of the divergence.
        adapter: its method.
        scale: factor of all that the adapter adds, where it is not as trained.
    """

    kind: str
    weight: float | None
    seed: int | None
    adaptation_ppl: float | None
    retention_ppl: Figures
    retention_increase_pct: Figures
    drift_nats_per_token: Figures
    num_steps: int
    tokens_per_second: float | None
    adaptation_exact_match: float | None = None
    drift_tmkl_nats_per_token: Figures = field(default_factory=dict)
    top1_agreement: Figures = field(default_factory=dict)
    train_seconds: float | None = None
    peak_memory_bytes: int | None = None
    final_loss: float | None = None
    status: str = "done"
    direction: str | None = None
    temperature: float | None = None
    adapter: str | None = None
    scale: float | None = None

    def worst(self) -> tuple[str, float] | None:
        """The corpus whose perplexity rose most and by how many percent; NaN counts as most."""
        known = [
            (name, pct) for name, pct in self.retention_increase_pct.items() if pct is not None
        ]
        return max(known, key=lambda item: badness(item[1]), default=None)


def badness(value: float) -> float:
    """Sorts figures of which less is better; NaN is worse than everything."""
    return math.inf if math.isnan(value) else value


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """A base and what each arm made of it.

    Attributes:
        base: the figures before.
        arms: the figures after, by name.
        settings: what else a reader needs to repeat the runs (recipe, versions): label -> text.
    """

    base: BaseResult
    arms: dict[str, ArmResult]
    settings: dict[str, str] = field(default_factory=dict)

    @property
    def corpora(self) -> list[str]:
        """Names of the retention corpora, in the order of the base."""
        return list(self.base.retention_ppl)

    def to_json(self) -> dict[str, Any]:
        """The content of report.json; NaN and infinities become the strings that `float` reads."""
        result: dict[str, Any] = {
            "base": _plain(self.base),
            "arms": {name: _plain(arm) for name, arm in self.arms.items()},
        }
        return result | ({"settings": dict(self.settings)} if self.settings else {})

    @classmethod
    def from_json(cls, data: object, *, source: str = "report.json") -> Report:
        """Check and take over the content of a report.json.

        Args:
            data: the parsed JSON.
            source: what to call it in errors.

        Raises:
            UserErrors: everything that is wrong with it, one line each.
        """
        problems: list[str] = []
        report = _Reader(problems).report(data)
        if report is not None and not problems:
            problems += _contradictions(report)
        if problems or report is None:
            raise UserErrors([f"{source}: {problem}" for problem in problems])
        return report

    @classmethod
    def read(cls, path: Path | str) -> Report:
        """Read a report.json.

        Raises:
            UserError: it is not there, no JSON, or not as it must be.
        """
        path = Path(path)
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(
                f"{path}: no such file: finish the run, or measure it with `moored evaluate`"
            ) from None
        except (OSError, RecursionError) as error:
            raise UserError(f"{path}: cannot be read: {error}") from error
        except ValueError as error:
            raise UserError(f"{path}: not valid JSON ({error}): evaluate the run again") from error
        return cls.from_json(data, source=str(path))


def _plain(value: Any) -> Any:
    if isinstance(value, (BaseResult, ArmResult)):
        return {item.name: _plain(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


_R = TypeVar("_R", BaseResult, ArmResult)


class _Reader:
    """Parsed JSON -> dataclasses by their annotations; notes every problem with its place."""

    def __init__(self, problems: list[str]):
        self.problems = problems

    def report(self, data: object) -> Report | None:
        top = self._mapping(data, "", ("base", "arms", "settings"))
        if top is None:
            return None
        base = self._result(BaseResult, top.get("base", MISSING), "base")
        arms: dict[str, ArmResult] = {}
        given = self._mapping(top.get("arms", MISSING), "arms")
        if given is not None and not given:
            self.problems.append("arms: empty: a report needs at least one arm")
        for name, arm in (given or {}).items():
            result = self._result(ArmResult, arm, f"arms.{_short(name)}")
            if not name.strip():
                self.problems.append("arms: an arm's name is empty: name it after its regulariser")
            if result is not None:
                arms[name] = result
        settings = self._values(top.get("settings", {}), "settings", self._text)
        return None if base is None else Report(base=base, arms=arms, settings=settings)

    def _mapping(
        self, data: object, where: str, known: Sequence[str] | None = None
    ) -> dict[str, Any] | None:
        place = f"{where}: " if where else ""
        if data is MISSING:
            self.problems.append(f"{place}missing")
            return None
        if not isinstance(data, dict):
            self.problems.append(f"{place}expected an object, got {_short(data)}")
            return None
        for key in data:
            if known is not None and key not in known:
                near = difflib.get_close_matches(key, known, 1)
                hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
                path = f"{where}.{_short(key)}" if where else _short(key)
                self.problems.append(f"{path}: unknown key; {hint}")
        return data

    def _result(self, kind: type[_R], data: object, where: str) -> _R | None:
        data = self._mapping(data, where, [item.name for item in fields(kind)])
        if data is None:
            return None
        before = len(self.problems)
        values: dict[str, Any] = {}
        for item in fields(kind):
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
        readers: dict[str, Callable[[object, str], Any]] = {
            "str": self._text,
            "int": integer,
            "float": number,
            "dict[str, int]": lambda v, p: self._values(v, p, integer),
            "Figures": lambda v, p: self._values(v, p, number, optional=True),
        }
        return readers[annotation](value, place)

    def _values(
        self,
        data: object,
        where: str,
        read: Callable[[object, str], Any],
        *,
        optional: bool = False,
    ) -> dict[str, Any]:
        return {
            name: None if optional and value is None else read(value, f"{where}.{_short(name)}")
            for name, value in (self._mapping(data, where) or {}).items()
        }

    def _text(self, value: object, place: str) -> str:
        if not isinstance(value, str):
            self.problems.append(f"{place}: expected text, got {_short(value)}")
            return ""
        if not value.strip():
            self.problems.append(f"{place}: must not be empty")
        return value

    def _integer(self, value: object, place: str, *, name: str) -> int:
        if not isinstance(value, int) or isinstance(value, bool):
            self.problems.append(f"{place}: expected an integer, got {_short(value)}")
            return 0
        if value < 0 and name != "seed":
            self.problems.append(f"{place}: must not be negative, got {value}")
        return value

    def _number(self, value: object, place: str, *, name: str) -> float:
        if value in ("NaN", "Infinity", "-Infinity"):
            number = float(str(value))
        elif not isinstance(value, (int, float)) or isinstance(value, bool):
            self.problems.append(f"{place}: expected a number, got {_short(value)}")
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
        elif name in ("adaptation_exact_match", "top1_agreement") and (number < 0 or number > 1):
            self.problems.append(f"{place}: {number:g} is no fraction: expected 0 to 1")
        elif name.startswith("drift_") and number < -1e-4:
            self.problems.append(f"{place}: {number:g}: a divergence is never negative")
        elif name in ("tokens_per_second", "train_seconds", "temperature") and number < 0:
            self.problems.append(f"{place}: must not be negative, got {number:g}")
        return number


def _contradictions(report: Report) -> list[str]:
    """Figures that cannot all be right, such as an increase given as a fraction."""
    problems: list[str] = []
    for arm_name, arm in report.arms.items():
        where = f"arms.{_short(arm_name)}"
        for corpus in {**arm.retention_ppl, **arm.retention_increase_pct}:
            if corpus not in report.base.retention_ppl:
                problems.append(
                    f"{where}: corpus {_short(corpus)} is not in base.retention_ppl: "
                    "measure the base on it too"
                )
        for corpus, given in arm.retention_increase_pct.items():
            expected = increase_pct(report.base.retention_ppl, arm.retention_ppl).get(corpus)
            if given is None or expected is None:
                continue
            if not math.isfinite(given) or not math.isfinite(expected):
                continue
            # Generous to figures that were rounded by hand.
            if abs(given - expected) > 0.5 + 0.02 * abs(expected):
                problems.append(
                    f"{where}.retention_increase_pct.{_short(corpus)}: {given:g} percent, but the "
                    f"perplexities give {expected:g}: evaluate the run again"
                )
    return problems


def increase_pct(base: Mapping[str, float | None], after: Mapping[str, float | None]) -> Figures:
    """Percent by which each perplexity rose over the base's; None where one was not measured."""
    result: Figures = {}
    for corpus, ppl in after.items():
        before = base.get(corpus)
        result[corpus] = None if not before or ppl is None else 100.0 * (ppl / before - 1.0)
    return result


def _short(value: object) -> str:
    text = value if isinstance(value, str) and value.isidentifier() else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
