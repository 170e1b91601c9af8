"""The figures of finished runs as data: what stands in report.json, and how it is checked.

Several reports over one base are joined here. Nothing is measured, worded or drawn.
"""

from __future__ import annotations

import difflib
import functools
import itertools
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

from pydantic import (
    AfterValidator,
    BeforeValidator,
    InstanceOf,
    Strict,
    TypeAdapter,
    ValidationError,
)

from moored.utils.errors import UserError, UserErrors

# Neighbouring samples share a block, so that a report stays small and what neighbours have in
# common stays together.
MOST_BLOCKS = 200


def _number(value: object) -> object:
    """JSON has no NaN and no infinities: they are text, and integers may have any length."""
    if isinstance(value, str) and value in ("NaN", "Infinity", "-Infinity"):
        return float(value)
    return math.inf if type(value) is int and abs(value) > sys.float_info.max else value


def _must(hold: Callable[[Any], object], says: str) -> AfterValidator:
    def check(value: Any) -> Any:
        if not hold(value):
            raise ValueError(says.format(value))
        return value

    return AfterValidator(check)


_NO_FRACTION = "{:g} is no fraction: expected 0 to 1"
_NO_PERPLEXITY = "{:g} is no perplexity: exp of a cross-entropy is never below 1"
_NO_DIVERGENCE = "{:g}: a divergence is never negative"

# Text of data and vocabularies may be empty, or half a surrogate pair: it is no pydantic `str`.
Text = InstanceOf[str]
Name = Annotated[Text, _must(str.strip, "must not be empty")]
ArmName = Annotated[Text, _must(str.strip, "an arm's name is empty: name it after its regulariser")]
Truth = Annotated[bool, Strict()]
Integer = Annotated[int, Strict(), _must(lambda n: abs(n) < 2**63, "too large an integer")]
Count = Annotated[Integer, _must(lambda n: n >= 0, "must not be negative, got {}")]
Number = Annotated[float, Strict(), BeforeValidator(_number)]
# Written so that NaN passes. Just below a bound is rounding; clearly below it is another unit.
NotNegative = Annotated[Number, _must(lambda x: not x < 0, "must not be negative, got {:g}")]
Fraction = Annotated[Number, _must(lambda x: not (x < 0 or x > 1), _NO_FRACTION)]
Perplexity = Annotated[Number, _must(lambda x: not x < 1 - 1e-6, _NO_PERPLEXITY)]
Divergence = Annotated[Number, _must(lambda x: not x < -1e-4, _NO_DIVERGENCE)]
Figures = dict[Text, Number | None]


class Strictly:
    """Data that are read without unknown keys."""

    __slots__ = ()
    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012


@dataclass(frozen=True, slots=True)
class Columns(Strictly):
    """Lists side by side, an entry in each per block of neighbours, in their order."""

    def __post_init__(self) -> None:
        """Refuse lists that differ in length."""
        if len({len(getattr(self, item.name)) for item in fields(self)}) > 1:
            raise ValueError("its lists differ in length")


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocks(Columns):
    """Sums over blocks of samples (windows, passages, answers): what intervals are made of."""

    num_tokens: list[Count]  # scored
    ce: list[Number]  # the policy's cross-entropy, nats
    ce_base: list[Number]  # the base's
    kl: list[Number]  # KL(base || policy) over the whole vocabulary, nats

    @property
    def mean_ce(self) -> float | None:
        """The policy's mean cross-entropy, nats per token; None without a token."""
        num_tokens = sum(self.num_tokens)
        return sum(self.ce) / num_tokens if num_tokens else None

    @staticmethod
    def of(sums: Mapping[str, Sequence[float]]) -> Blocks:
        """Blocks of per-sample sums by the names above; at most `MOST_BLOCKS`, of like size."""
        edges = _edges(len(sums["num_tokens"]))
        num_tokens, *nats = (
            [sum(sums[item.name][a:b]) for a, b in itertools.pairwise(edges)]
            for item in fields(Blocks)
        )
        ce, ce_base, kl = ([float(f"{value:.8g}") for value in values] for values in nats)
        return Blocks(num_tokens=list(map(int, num_tokens)), ce=ce, ce_base=ce_base, kl=kl)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally(Columns):
    """What was right of what was asked, per block of passages or prompts."""

    num: list[Count]  # asked
    hits: list[Count]  # right

    @property
    def total(self) -> int:
        """All that was asked."""
        return sum(self.num)

    @property
    def share(self) -> float:
        """Share of what was right, 0 to 1; 0 where nothing was asked."""
        return sum(self.hits) / max(1, self.total)

    @staticmethod
    def of(rows: Sequence[tuple[int, int]]) -> Tally:
        """Tally of (asked, right) per passage or prompt; at most `MOST_BLOCKS` blocks."""
        blocks = [rows[a:b] for a, b in itertools.pairwise(_edges(len(rows)))]
        num, hits = ([sum(row[i] for row in block) for block in blocks] for i in (0, 1))
        return Tally(num=num, hits=hits)


def _edges(num_samples: int) -> list[int]:
    """Where blocks of neighbours begin and end."""
    num_blocks = min(num_samples, MOST_BLOCKS)
    return [round(i * num_samples / max(1, num_blocks)) for i in range(num_blocks + 1)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretch(Strictly):
    """The drift at some distance from the start of a sample."""

    first: Count  # tokens of context before the first target of the stretch
    last: Count | None  # and before its last; None: to the end
    num_tokens: Count  # scored
    drift: Number  # mean KL(base || policy), nats per token


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenDrift(Strictly):
    """What one true token contributes to the drift."""

    token: Text
    num_tokens: Count  # how often it was to be predicted
    drift: Number  # mean KL(base || policy) there, nats
    share: Number  # of the whole text's drift, 0 to 1


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenChoice(Strictly):
    """A token that one of the models prefers, with both models' probabilities, 0 to 1."""

    token: Text
    base: Number
    adapted: Number


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenExample(Strictly):
    """A place where the drift is among the greatest."""

    sample: Name
    context: Text  # just before it
    target: Text  # the true token
    drift: Number  # KL(base || policy), nats
    base: Number  # the base's probability of the true token
    adapted: Number  # the policy's
    choices: list[TokenChoice]  # what either model prefers, the base's first choice first


@dataclass(frozen=True, slots=True, kw_only=True)
class Where(Strictly):
    """One text's drift taken apart: by place, by token, and its worst examples."""

    stretches: list[Stretch]
    tokens: list[TokenDrift]
    spots: list[TokenExample]


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskScore(Strictly):
    """What one model scored in one task of the suite, question by question."""

    metric: Name  # of the evaluation harness, with its filter in brackets
    chance: Annotated[Number, _must(lambda x: 0 <= x < 1, "{:g} is no score of a guess")]
    scores: Annotated[list[Fraction], _must(bool, "empty: no question was asked")]

    @property
    def share(self) -> float:
        """The mean score, 0 to 1."""
        return sum(self.scores) / len(self.scores)


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseResult(Strictly):
    """The base model, before any adapter. None: not measured; dicts are per corpus."""

    model: Name  # name or path
    revision: Name | None
    quantization: Name  # nf4 or none
    adaptation_ppl: Perplexity | None  # on the new task's held-out targets
    adaptation_exact_match: Fraction | None = None  # of its prompts
    retention_ppl: dict[Text, Perplexity | None]
    num_tokens: dict[Text, Count]  # scored
    num_adaptation_tokens: Count | None = None  # scored targets of the new task
    num_adaptation_prompts: Count | None = None  # behind the exact match
    # Passages whose last word was predicted, of corpora where nothing else is scored.
    last_word_accuracy: Figures = field(default_factory=dict)
    instruction_following: Fraction | None = None  # of the checkable constraints
    instruction_prompts_followed: Fraction | None = None  # prompts of which all were met
    num_instructions: Count | None = None  # constraints
    num_instruction_prompts: Count | None = None
    exact_match_tally: Tally | None = None  # right answers per prompt
    instruction_tally: Tally | None = None  # constraints met per prompt
    last_word_tallies: dict[Text, Tally] = field(default_factory=dict)  # per passage
    # Of the evaluation harness: task -> metric -> value, `METRIC_stderr` beside it where known.
    lm_eval: dict[Text, Figures] = field(default_factory=dict)
    suite: dict[Text, TaskScore] = field(default_factory=dict)  # of general tasks, by name
    suite_mean: Number | None = None  # over them; 0 is guessing, 1 is all right
    suite_mean_interval: list[Number] = field(default_factory=list)  # 95 %, [low, high]


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmResult(Strictly):
    """One adapted model. None: not measured; dicts are per corpus, and as in the base's result."""

    kind: Name  # the regulariser
    weight: Number | None  # where a budget moved it, the one that acted last
    seed: Integer | None  # of data order and adapter
    adaptation_ppl: Perplexity | None
    retention_ppl: dict[Text, Perplexity | None]
    retention_increase_pct: Figures  # 100 * (retention_ppl / the base's - 1)
    drift_nats_per_token: dict[Text, Divergence | None]  # mean KL(base || adapted)
    num_steps: Count  # optimizer updates
    tokens_per_second: NotNegative | None  # trained, without padding
    adaptation_exact_match: Fraction | None = None
    # The drift with the true token left out.
    drift_tmkl_nats_per_token: dict[Text, Divergence | None] = field(default_factory=dict)
    # Of the positions, where both models prefer the same token.
    top1_agreement: dict[Text, Fraction | None] = field(default_factory=dict)
    train_seconds: NotNegative | None = None  # spent in updates
    peak_memory_bytes: Count | None = None  # most that one process held
    final_loss: Number | None = None  # of the last update, nats per token
    status: Name = "done"  # how the run ended
    setting: Name | None = None  # digest of the recipe but its seed: what seeds of it share
    direction: Name | None = None  # of the divergence
    temperature: NotNegative | None = None  # of the divergence
    adapter: Name | None = None  # its method
    scale: Number | None = None  # factor of what the adapter adds, where not as trained
    last_word_accuracy: Figures = field(default_factory=dict)
    # 95 % bootstrap interval of the increase: [low, high].
    retention_increase_interval_pct: dict[Text, list[Number]] = field(default_factory=dict)
    # The part of the drift among the alternatives to the true token; the rest is the change of the
    # true token's probability.
    drift_alternatives_nats_per_token: dict[Text, Divergence | None] = field(default_factory=dict)
    adaptation_blocks: Blocks | None = None  # of the new task's held-out samples
    retention_blocks: dict[Text, Blocks] = field(default_factory=dict)
    budget: Name | None = None  # what might be forgotten of which text, in words
    budget_lost: Number | None = None  # what its probe lost in the end, in the budget's unit
    budget_held: Truth | None = None  # whether that is within the budget and its tolerance
    budget_watched: list[Name] = field(default_factory=list)  # corpora out of the probe's text
    where: dict[Text, Where] = field(default_factory=dict)
    instruction_following: Fraction | None = None
    instruction_prompts_followed: Fraction | None = None
    exact_match_tally: Tally | None = None
    instruction_tally: Tally | None = None
    last_word_tallies: dict[Text, Tally] = field(default_factory=dict)
    lm_eval: dict[Text, Figures] = field(default_factory=dict)
    suite: dict[Text, TaskScore] = field(default_factory=dict)  # of general tasks, by name
    suite_mean: Number | None = None  # over them; 0 is guessing, 1 is all right
    suite_mean_interval: list[Number] = field(default_factory=list)  # 95 %, [low, high]
    # As the drift, on a sample of the targets that were learned: what forgetting is foretold by.
    train_drift_nats_per_token: Divergence | None = None
    train_drift_tmkl_nats_per_token: Divergence | None = None
    num_train_drift_tokens: Count | None = None  # scored
    suite_change: Number | None = None  # of suite_mean against the base's, question by question
    suite_change_interval: list[Number] = field(default_factory=list)  # 95 %, [low, high]

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
class Report(Strictly):
    """A base and what each arm made of it."""

    base: BaseResult
    arms: Annotated[dict[ArmName, ArmResult], _must(bool, "empty: a report needs at least one arm")]
    # What else a reader needs to repeat the runs (recipe, versions): label -> text.
    settings: dict[Text, Name] = field(default_factory=dict)

    @property
    def corpora(self) -> list[str]:
        """Names of the retention corpora, in the order of the base."""
        return list(self.base.retention_ppl)

    def with_lm_eval(
        self, base: dict[str, Figures], arm: dict[str, Figures], settings: Mapping[str, str]
    ) -> Report:
        """The same with the evaluation harness's figures, of a report on one arm."""
        return replace(
            self,
            base=replace(self.base, lm_eval=base),
            arms={name: replace(result, lm_eval=arm) for name, result in self.arms.items()},
            settings={**self.settings, **settings},
        )

    def to_json(self) -> dict[str, Any]:
        """The content of report.json; NaN and infinities become the strings that `float` reads."""
        data = json.loads(json.dumps(asdict(self)), parse_constant=str)
        return {key: value for key, value in data.items() if value or key != "settings"}

    @classmethod
    def from_json(cls, data: object, *, source: str = "report.json") -> Report:
        """Check and take over the content of a report.json.

        Args:
            data: the parsed JSON.
            source: what to call it in errors.

        Raises:
            UserErrors: everything that is wrong with it, one line each.
        """
        try:
            report = _adapter().validate_python(data)
            problems = _contradictions(report)
        except ValidationError as error:
            report, problems = None, [_in_words(one) for one in error.errors(include_url=False)]
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


@functools.cache
def _adapter() -> TypeAdapter[Report]:
    return TypeAdapter(Report)


_EXPECTED = {
    "dataclass_type": "an object",
    "dict_type": "an object",
    "list_type": "a list",
    "float_type": "a number",
    "int_type": "an integer",
    "bool_type": "true or false",
    "is_instance_of": "text",
}


def _in_words(error: Mapping[str, Any]) -> str:
    """One of pydantic's errors as a line: place, what was received, which relation broke."""
    place, kind = error["loc"], error["type"]
    if place[-1:] == ("[key]",):
        place = place[:-2]
    parts = [f"[{part}]" if isinstance(part, int) else f".{short(part)}" for part in place]
    if kind in _EXPECTED:
        says = f"expected {_EXPECTED[kind]}, got {short(error['input'])}"
    elif kind == "unexpected_keyword_argument":
        known = [item.name for item in fields(_class_at(place[:-1]))]
        near = difflib.get_close_matches(place[-1], known, 1)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
        says = f"unknown key; {hint}"
    elif kind == "value_error":
        says = str(error["ctx"]["error"])
    else:
        says = "missing" if kind == "missing" else error["msg"]
    return ": ".join(filter(None, ["".join(parts).removeprefix("."), says]))


def _class_at(place: Sequence[str | int]) -> Any:
    """The dataclass at a place of a report."""
    kind: Any = Report
    for part in place:
        kind = get_type_hints(kind)[str(part)] if is_dataclass(kind) else get_args(kind)[-1]
        if type(None) in get_args(kind):
            kind = get_args(kind)[0]
    return kind


def short(value: object) -> str:
    """A value as errors show it."""
    text = value if isinstance(value, str) and value.isidentifier() else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _contradictions(report: Report) -> list[str]:
    """Figures that cannot all be right, such as an increase given as a fraction."""
    problems = [f"base.{problem}" for problem in _no_intervals(report.base)]
    for arm_name, arm in report.arms.items():
        where = f"arms.{short(arm_name)}"
        for corpus in {**arm.retention_ppl, **arm.retention_increase_pct}:
            if corpus not in report.base.retention_ppl:
                problems.append(
                    f"{where}: corpus {short(corpus)} is not in base.retention_ppl: "
                    "measure the base on it too"
                )
        problems += [f"{where}.{problem}" for problem in _off_their_sums(arm)]
        problems += [f"{where}.{problem}" for problem in _no_intervals(arm)]
        for corpus, ends in arm.retention_increase_interval_pct.items():
            # Written so that NaN is refused as well.
            if len(ends) != 2 or not ends[0] <= ends[1]:
                problems.append(
                    f"{where}.retention_increase_interval_pct.{short(corpus)}: {short(ends)} is no "
                    "interval: expected [low, high] in percent"
                )
        increases = increase_pct(report.base.retention_ppl, arm.retention_ppl)
        for corpus, given in arm.retention_increase_pct.items():
            expected = increases.get(corpus)
            if given is None or expected is None or not math.isfinite(given - expected):
                continue
            # Generous to figures that were rounded by hand.
            if abs(given - expected) > 0.5 + 0.02 * abs(expected):
                problems.append(
                    f"{where}.retention_increase_pct.{short(corpus)}: {given:g} percent, but the "
                    f"perplexities give {expected:g}: evaluate the run again"
                )
    return problems


def _no_intervals(result: BaseResult | ArmResult) -> list[str]:
    """Ends of the suite's intervals that are none."""
    names = [item.name for item in fields(result) if item.name.startswith("suite_")]
    found = {name: getattr(result, name) for name in names if name.endswith("_interval")}
    return [
        f"{name}: {short(ends)} is no interval: expected [low, high] as fractions"
        for name, ends in found.items()
        if ends and (len(ends) != 2 or not ends[0] <= ends[1])
    ]


def _off_their_sums(arm: ArmResult) -> list[str]:
    """Perplexities that are not those of the sums beside them, so that intervals would mislead."""
    sums = {"adaptation": (arm.adaptation_ppl, arm.adaptation_blocks)}
    for corpus, blocks in arm.retention_blocks.items():
        sums[f"retention.{short(corpus)}"] = arm.retention_ppl.get(corpus), blocks
    problems: list[str] = []
    for name, (ppl, blocks) in sums.items():
        nats = None if blocks is None else blocks.mean_ce
        if ppl is None or nats is None or not math.isfinite(ppl) or not math.isfinite(nats):
            continue
        if ppl > 0 and abs(math.log(ppl) - nats) > 0.02:
            problems.append(
                f"{name}: perplexity {ppl:g}, but its blocks give exp({nats:.4g}): evaluate the "
                "run again"
            )
    return problems


def increase_pct(base: Mapping[str, float | None], after: Mapping[str, float | None]) -> Figures:
    """Percent by which each perplexity rose over the base's; None where one was not measured."""
    return {corpus: rise_pct(base.get(corpus), ppl) for corpus, ppl in after.items()}


def rise_pct(before: float | None, after: float | None) -> float | None:
    """Percent by which a perplexity rose; None where one was not measured."""
    return None if not before or after is None else 100.0 * (after / before - 1.0)


# ---------------------------------------------------------------- several reports as one

# Two measurements of one base on one text may differ by rounding, not by more than this.
BASE_RELATIVE_TOLERANCE = 1e-3

# What two measurements of one base agree in, as a whole or where both know a text; not in its
# answers, since rounding may flip a greedy choice: the first report's are taken.
_SAME = (
    "model",
    "revision",
    "quantization",
    "adaptation_ppl",
    "num_adaptation_tokens",
    "num_adaptation_prompts",
    "num_instructions",
    "num_instruction_prompts",
    "retention_ppl",
    "num_tokens",
)


def merge(reports: Sequence[Report], *, labels: Sequence[str] | None = None) -> Report:
    """Reports over one base as a single report.

    Arms keep their names where these are unique; otherwise every arm is named by its kind, and by
    weight, direction, temperature, seed, adapter and at last `labels` where these vary.

    Args:
        reports: at least one.
        labels: what to call each report in errors and in the names of otherwise equal arms.

    Raises:
        UserError: the bases differ; the line says in what.
    """
    if not reports:
        raise UserError("no report to merge: name at least one run")
    labels = list(labels or [f"report {i + 1}" for i in range(len(reports))])
    base, settings = reports[0].base, dict(reports[0].settings)
    for label, other in zip(labels[1:], reports[1:], strict=True):
        if differences := _differences(base, other.base):
            raise UserError(
                f"{labels[0]} and {label} do not share a base: they differ in "
                f"{', '.join(differences)}: report them apart, or evaluate both on the same model "
                "and texts"
            )
        base = replace(
            base,
            **{
                item.name: _filled(getattr(base, item.name), getattr(other.base, item.name))
                for item in fields(base)
                if item.name != "revision"
            },
        )
        for key, value in other.settings.items():
            seen = settings.setdefault(key, value)
            if value not in seen.split("; "):
                settings[key] = f"{seen}; {value}"
    arms = [
        (name, arm, label)
        for report, label in zip(reports, labels, strict=True)
        for name, arm in report.arms.items()
    ]
    names = [name for name, _, _ in arms]
    if len(set(names)) < len(names):
        names = _names([arm for _, arm, _ in arms], [label for _, _, label in arms])
    merged = {name: arm for name, (_, arm, _) in zip(names, arms, strict=True)}
    return Report(base=base, arms=merged, settings=settings)


def _filled(first: Any, second: Any) -> Any:
    """One report's figures, and of what it did not measure the other's."""
    if isinstance(first, dict):
        return first | {key: value for key, value in second.items() if first.get(key) is None}
    return second if first is None else first


def _differences(one: BaseResult, other: BaseResult) -> list[str]:
    pairs: dict[str, tuple[Any, Any]] = {}
    for name in _SAME:
        mine, theirs = getattr(one, name), getattr(other, name)
        if isinstance(mine, dict):
            pairs |= {f"{name}.{key}": (mine[key], theirs[key]) for key in mine if key in theirs}
        else:
            pairs[name] = mine, theirs
    return [
        f"{name} ({_figure(a)} and {_figure(b)})" for name, (a, b) in pairs.items() if _differ(a, b)
    ]


def _figure(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _differ(a: object, b: object) -> bool:
    if a is None or b is None:
        return False  # not measured in one of them
    if isinstance(a, float) and isinstance(b, float):
        both_nan = math.isnan(a) and math.isnan(b)
        return not both_nan and not math.isclose(a, b, rel_tol=BASE_RELATIVE_TOLERANCE)
    return a != b


def _names(arms: Sequence[ArmResult], labels: Sequence[str]) -> list[str]:
    names: list[str] = []
    for arm in arms:
        name = arm.kind
        same = [other for other in arms if other.kind == arm.kind]
        for key in ("weight", "direction", "temperature", "seed", "adapter", "scale"):
            value = getattr(arm, key)
            if value is not None and len({getattr(other, key) for other in same}) > 1:
                shown = f"{value:g}" if isinstance(value, float) else str(value)
                name += f"-{shown}" if isinstance(value, str) else f"-{key}{shown}"
        names.append(name)
    twice = {name for name in names if names.count(name) > 1}
    names = [f"{n}-{label}" if n in twice else n for n, label in zip(names, labels, strict=True)]
    counted = [names[: i + 1].count(name) for i, name in enumerate(names)]
    return [f"{n}-{many}" if many > 1 else n for n, many in zip(names, counted, strict=True)]
