"""Tables and pictures of docs/study.md, from the results that are there.

    python benchmarks/study/study_tables.py

Everything between the page's markers is written anew; the words around them are a person's.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from common import HERE, RESULTS, SETS
from scipy.stats import spearmanr

from moored.evaluation.report import ArmResult, Report, merge
from moored.evaluation.report.bootstrap import Interval, difference, interval, ratio_pct
from moored.evaluation.report.frontier import frontier_png

PAGE = HERE.parents[1] / "docs" / "study.md"
ALWAYS = ("none", "tmkl-0.3", "kl-0.3")  # stand in every table of their set, to compare with
EQUAL_PCT = 2.0  # adaptation perplexities within this are equal, as the paper compares


@dataclass(frozen=True, slots=True)
class Setting:
    """The runs of one setting, in the order of their seeds."""

    data: str
    label: str
    runs: tuple[dict[str, Any], ...]

    @property
    def arms(self) -> list[ArmResult]:
        """Their figures."""
        return [next(iter(report_of(run).arms.values())) for run in self.runs]


def report_of(run: dict[str, Any]) -> Report:
    """A result's report, whose setting is the study's, not that of one version's recipes."""
    data, label = run["spec"]["data"], run["spec"]["label"]
    report = Report.from_json(run["report"], source=label)
    arms = {name: replace(arm, setting=f"{data}-{label}") for name, arm in report.arms.items()}
    return replace(report, arms=arms)


def settings() -> dict[tuple[str, str], Setting]:
    """All results by data set and label."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for path in sorted(RESULTS.glob("*.json")):
        run = json.loads(path.read_text())
        found.setdefault((run["spec"]["data"], run["spec"]["label"]), []).append(run)
    return {
        key: Setting(*key, tuple(sorted(runs, key=lambda run: run["spec"]["seed"])))
        for key, runs in found.items()
    }


def shown(value: Interval | None, digits: int = 1) -> str:
    """A percentage with its interval."""
    if value is None:
        return "–"
    low, high = (f"{x:+.{digits}f}" for x in (value.low, value.high))
    return f"{value.value:+.{digits}f} [{low}, {high}]"


def adaptation(one: Setting, plain: Setting) -> Interval | None:
    """Percent by which its adaptation perplexity is above plain fine-tuning's."""
    ours, theirs = _same_seeds(one, plain)
    return ratio_pct(*([arm.adaptation_blocks for arm in arms] for arms in (ours, theirs)))


def retention(one: Setting, corpus: str) -> Interval | None:
    """Percent by which a corpus's perplexity rose."""
    blocks = [arm.retention_blocks[corpus] for arm in one.arms if corpus in arm.retention_blocks]
    return interval(blocks) if blocks else None


def forgot_more(one: Setting, other: Setting, corpus: str) -> Interval | None:
    """Points by which a corpus rose more than with another setting, of the seeds that both have."""
    pairs = [
        [arm.retention_blocks[corpus] for arm in arms if corpus in arm.retention_blocks]
        for arms in _same_seeds(one, other)
    ]
    return difference(*pairs) if all(pairs) else None


def _same_seeds(one: Setting, other: Setting) -> tuple[list[ArmResult], list[ArmResult]]:
    seeds = {run["spec"]["seed"] for run in one.runs} & {r["spec"]["seed"] for r in other.runs}
    picked = []
    for setting in (one, other):
        pairs = zip(setting.runs, setting.arms, strict=True)
        picked.append([arm for run, arm in pairs if run["spec"]["seed"] in seeds])
    return picked[0], picked[1]


def table(
    every: dict[tuple[str, str], Setting], data: str, wanted: Callable[[str], bool]
) -> Iterator[str]:
    """One data set's settings as Markdown."""
    plain = every.get((data, "none"))
    chosen = [one for (name, label), one in every.items() if name == data and wanted(label)]
    if plain is None or all(one.label in ALWAYS for one in chosen):
        yield "(no result yet)"
        return
    corpora = [c for c in plain.arms[0].retention_ppl if c != data]
    yield "| setting | adaptation | against plain, % | " + " | ".join(corpora) + " | drift |"
    yield "|---" * (4 + len(corpora)) + "|"
    for one in sorted(chosen, key=lambda s: _order(s.label)):
        arms = one.arms
        cells = [one.label, ", ".join(f"{arm.adaptation_ppl:.3f}" for arm in arms)]
        cells.append("" if one is plain else shown(adaptation(one, plain)))
        cells += [shown(retention(one, corpus)) for corpus in corpora]
        worst = max(_mean(arm.drift_nats_per_token[c] for arm in arms) for c in corpora)
        yield "| " + " | ".join([*cells, f"{worst:.3f}"]) + " |"


def _mean(values: Iterable[float | None]) -> float:
    known = [value for value in values if value is not None]
    return sum(known) / len(known)


def _order(label: str) -> tuple[int, list[Any]]:
    first = {"none": 0, "tmkl": 1, "kl": 2}.get(label.split("-")[0], 3)
    return first, [float(x) if x.replace(".", "").isdigit() else x for x in label.split("-")]


def verdicts(every: dict[tuple[str, str], Setting]) -> Iterator[str]:
    """For each set, what of plain fine-tuning's forgetting is left at equal adaptation."""
    head = "| set | setting | against plain, % | corpus | plain, % | here, % | difference | left |"
    yield head
    yield "|---" * 8 + "|"
    for data in SETS:
        plain = every.get((data, "none"))
        if plain is None:
            continue
        for (name, label), one in sorted(every.items(), key=lambda item: _order(item[0][1])):
            if name != data or not re.fullmatch(r"(tmkl|kl)-[\d.]+", label):
                continue
            gap = adaptation(one, plain)
            if gap is None or gap.value > EQUAL_PCT:
                continue
            for corpus in plain.arms[0].retention_ppl:
                lost, kept = retention(plain, corpus), retention(one, corpus)
                if lost is None or kept is None or not lost.is_clear or lost.value <= 0:
                    continue
                share = f"{max(0.0, kept.value) / lost.value:.2f}"
                apart = shown(forgot_more(one, plain, corpus))
                cells = [data, label, shown(gap), corpus, shown(lost), shown(kept), apart, share]
                yield "| " + " | ".join(cells) + " |"


def against(
    every: dict[tuple[str, str], Setting], data: str, label: str, wanted: Callable[[str], bool]
) -> Iterator[str]:
    """Settings against one of them, with paired intervals; what is clear is in bold."""
    mark = every.get((data, label))
    chosen = [one for (name, of), one in every.items() if name == data and wanted(of)]
    chosen = [one for one in chosen if one is not mark]
    if mark is None or not chosen:
        yield "(no result yet)"
        return
    # Of WikiText-2 what the budget's controller did not see.
    corpora = [corpus for corpus in mark.arms[0].retention_ppl if corpus != "wikitext-2"]
    yield "| setting | weight | probe, % | adaptation, % | " + " | ".join(corpora) + " |"
    yield "|---" * (4 + len(corpora)) + "|"
    for one in [mark, *sorted(chosen, key=lambda s: _order(s.label))]:
        losses = (arm.budget_lost for arm in one.arms)
        lost = ", ".join("–" if x is None else f"{x:+.2f}" for x in losses)
        weights = (arm.weight for arm in one.arms)
        cells = [one.label, ", ".join("–" if x is None else f"{x:.3g}" for x in weights), lost]
        if one is mark:
            cells += ["0"] * (1 + len(corpora))
        else:
            found = [adaptation(one, mark), *(forgot_more(one, mark, c) for c in corpora)]
            cells += [f"**{shown(x)}**" if x and x.is_clear else shown(x) for x in found]
        yield "| " + " | ".join(cells) + " |"


def budgets(every: dict[tuple[str, str], Setting]) -> Iterator[str]:
    """What was allowed, and what was lost of the probe and of text that was not seen."""
    yield "| set | seed | budget, % | probe, % | unseen text, % | adaptation against plain, % |"
    yield "|---|---|---|---|---|---|"
    for (data, label), one in sorted(every.items()):
        if not label.startswith("budget"):
            continue
        for run, arm in zip(one.runs, one.arms, strict=True):
            alone = Setting(data, label, (run,))
            unseen = retention(alone, "wikitext-2-unseen")
            gap = adaptation(alone, every[data, "none"]) if (data, "none") in every else None
            lost = "–" if arm.budget_lost is None else f"{arm.budget_lost:+.2f}"
            cells = [data, str(arm.seed), label.split("-")[1], lost, shown(unseen, 2), shown(gap)]
            yield "| " + " | ".join(cells) + " |"


# ---------------------------------------------------------------- foretelling

UNLIKE = ("lambada", "wikitext-2-unseen")  # last words, which training helps; of budgets alone
MEAN = "mean of the texts"
FEWEST = 5  # settings, of which a line has two numbers


@dataclass(frozen=True, slots=True)
class Pair:
    """A run: the divergence on its task, and what it lost of one text."""

    setting: tuple[str, str]
    divergence: float  # KL(base || adapted), nats per token
    lost: float  # 100 * log(perplexity / the base's), which is percent where it is little


@dataclass(frozen=True, slots=True)
class Foretold:
    """How well a straight line through some runs tells what others lost.

    Attributes:
        num: runs.
        slope: of the line through all, points per nat.
        order: rank correlation of both (Spearman's).
        error: root of the mean square of what was off, in points, for settings left out.
        blind: the same where the mean of the others is guessed.
    """

    num: int
    slope: float
    order: float
    error: float
    blind: float


def held_out_divergence(arm: ArmResult) -> float | None:
    """KL(base || adapted) on held-out answers of the task, nats per token."""
    blocks = arm.adaptation_blocks
    return None if blocks is None else sum(blocks.kl) / sum(blocks.num_tokens)


def train_divergence(arm: ArmResult) -> float | None:
    """The same on answers that were learned; of runs from before that was measured, none."""
    return arm.train_drift_nats_per_token


DIVERGENCES = {"held-out answers": held_out_divergence, "learned answers": train_divergence}
# LoRA on the task, held nowhere but at its answers: what else is done moves the model elsewhere.
AT_ANSWERS = re.compile(
    r"none|eaft|budget-.*|under-3-(tmkl|kl|reverse|jsd)|"
    r"(tmkl|kl)-[\d.]+(-(cosine|entropy|every|first|fraction|temperature)[-\d.]*)?"
)


def pairs(
    every: dict[tuple[str, str], Setting], divergence: Callable[[ArmResult], float | None]
) -> dict[str, list[Pair]]:
    """Every run by text, and the mean over those texts that all runs have."""
    found: dict[str, list[Pair]] = {}
    for key, setting in every.items():
        for arm in setting.arms:
            far = divergence(arm)
            if far is None:
                continue
            rises = arm.retention_increase_pct.items()
            lost = {text: 100 * math.log1p(pct / 100) for text, pct in rises if pct is not None}
            alike = [value for text, value in lost.items() if text not in UNLIKE]
            lost = {text: value for text, value in lost.items() if text != UNLIKE[1]}
            for text, value in ({MEAN: _mean(alike)} | lost).items():
                found.setdefault(text, []).append(Pair(key, far, value))
    return found


def foretold(rows: Sequence[Pair], group: Callable[[Pair], object]) -> Foretold | None:
    """Fit all rows but those of one group, and tell these; for each group in turn."""
    groups = {group(row) for row in rows}
    if len({row.setting for row in rows}) < FEWEST or len(groups) < 2:
        return None
    x, y = (np.array([getattr(row, name) for row in rows]) for name in ("divergence", "lost"))
    off, blind = np.zeros(len(rows)), np.zeros(len(rows))
    for one in groups:
        out = np.array([group(row) == one for row in rows])
        line = np.polynomial.Polynomial.fit(x[~out], y[~out], 1)
        off[out], blind[out] = y[out] - line(x[out]), y[out] - y[~out].mean()
    slope = np.polynomial.Polynomial.fit(x, y, 1).convert().coef[1]
    return Foretold(
        num=len(rows),
        slope=float(slope),
        order=float(spearmanr(x, y).statistic),
        error=float(np.sqrt(np.mean(off**2))),
        blind=float(np.sqrt(np.mean(blind**2))),
    )


def foretelling(every: dict[tuple[str, str], Setting]) -> Iterator[str]:
    """How well the divergence on the task tells what was forgotten, by text and by set."""
    yield "| divergence on | runs | text | left out | number | order | slope | error | guess |"
    yield "|---" * 9 + "|"
    alike = {key: one for key, one in every.items() if AT_ANSWERS.fullmatch(key[1])}
    for name, divergence in DIVERGENCES.items():
        by_text = pairs(alike, divergence)
        mean = by_text.get(MEAN, [])
        found = [("all", MEAN, "setting", pairs(every, divergence).get(MEAN, []))]
        found += [("LoRA", text, "setting", rows) for text, rows in by_text.items()]
        found.append(("LoRA", MEAN, "set", mean))
        for data in SETS:
            mine = [row for row in mean if row.setting[0] == data]
            found.append((f"LoRA, {data}", MEAN, "setting", mine))
        for runs, text, out, rows in found:
            fit = foretold(
                rows, lambda row, out=out: row.setting[0] if out == "set" else row.setting
            )
            if fit is not None:
                figures = f"{fit.num} | {fit.order:+.2f} | {fit.slope:+.1f}"
                errors = f"{fit.error:.1f} | {fit.blind:.1f}"
                yield f"| {name} | {runs} | {text} | {out} | {figures} | {errors} |"


def main() -> None:
    """Write the page's tables, and a picture for each set."""
    every = settings()
    plain_kinds = re.compile(r"none|(tmkl|kl)-[\d.]+")
    parts: dict[str, Iterable[str]] = {
        f"main-{data}": table(every, data, lambda label: bool(plain_kinds.fullmatch(label)))
        for data in SETS
    }
    parts["verdicts"] = verdicts(every)
    parts["budgets"] = budgets(every)
    methods = ("dora", "randlora", "sinelora", "oft")
    parts["adapters"] = table(
        every, "headers", lambda s: s in ("none", "tmkl-0.3") or s.split("-")[0] in methods
    )
    rivals = re.compile(r"eaft|(stm|mol)-.*|under-.*")
    parts["baselines"] = table(
        every, "headers-long", lambda s: s == "none" or bool(rivals.fullmatch(s))
    )
    parts["winners"] = against(
        every, "headers-long", "under-3-tmkl", lambda s: bool(rivals.fullmatch(s))
    )
    parts["options"] = table(
        every, "headers", lambda s: s in ("none", "tmkl-0.3") or s.startswith("tmkl-0.3-")
    )
    parts["foretelling"] = foretelling(every)
    page = PAGE.read_text(encoding="utf-8")
    for name, lines in parts.items():
        block = f"<!-- results:{name} -->\n" + "\n".join(lines) + f"\n<!-- /results:{name} -->"
        pattern = f"<!-- results:{name} -->.*?<!-- /results:{name} -->"
        page, count = re.subn(pattern, lambda _, b=block: b, page, flags=re.DOTALL)
        if not count:
            raise SystemExit(f"{PAGE}: has no markers results:{name}: add them where they belong")
    PAGE.write_text(page, encoding="utf-8")
    for data in SETS:
        runs = [
            run
            for (name, label), one in sorted(every.items(), key=lambda item: _order(item[0][1]))
            if name == data and plain_kinds.fullmatch(label)
            for run in one.runs
        ]
        if len(runs) > 1:
            picture = frontier_png(merge([report_of(run) for run in runs]))
            Path(PAGE.with_name(f"study-{data}.png")).write_bytes(picture)


if __name__ == "__main__":
    main()
