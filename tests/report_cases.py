"""Made-up but plausible figures for the tests of reports."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from moored.evaluation.report import (
    ArmResult,
    BaseResult,
    Blocks,
    Report,
    Stretch,
    TokenChoice,
    TokenDrift,
    TokenExample,
    Where,
    increase_intervals,
    increase_pct,
)

if TYPE_CHECKING:  # of matplotlib, which most tests of reports need not load
    from matplotlib.lines import Line2D

    from moored.evaluation.report.drawing import Drawing

CORPORA = ("python-reference", "base-samples")


def base(**changes: Any) -> BaseResult:
    result = BaseResult(
        model="HuggingFaceTB/SmolLM2-135M-Instruct",
        revision="0.1.2",
        quantization="nf4",
        adaptation_ppl=13.5,
        retention_ppl=dict(zip(CORPORA, (26.1, 4.2), strict=True)),
        num_tokens=dict(zip(CORPORA, (5000, 4998), strict=True)),
    )
    return replace(result, **changes)


def arm(kind: str, adaptation: float | None, *retention: float | None, **changes: Any) -> ArmResult:
    after = dict(zip(CORPORA, retention, strict=False))
    result = ArmResult(
        kind=kind,
        weight=0.0 if kind == "none" else 1.0,
        seed=0,
        adaptation_ppl=adaptation,
        retention_ppl=after,
        retention_increase_pct=increase_pct(base().retention_ppl, after),
        drift_nats_per_token=dict.fromkeys(after, 0.04),
        num_steps=80,
        tokens_per_second=212.4,
    )
    return replace(result, **changes)


def blocks(before: float, after: float, *, noise: float, text: int, seed: int | None) -> Blocks:
    """40 blocks of 25 tokens of a text whose perplexities are as given.

    Args:
        before: the base's perplexity.
        after: the policy's.
        noise: standard deviation over blocks of the policy's change, nats per token.
        text: its number, which decides how hard each block is.
        seed: of the run, which decides what the policy changed where.
    """
    tokens = np.full(40, 25)
    hard = np.random.default_rng(text).normal(0, 0.5, 40)
    moved = np.random.default_rng([text, seed or 0, 7]).normal(0, noise, 40)
    base_nats = math.log(before) + hard - hard.mean()
    change = math.log(after / before) + moved - moved.mean()
    return Blocks(
        num_tokens=tokens.tolist(),
        ce=(tokens * (base_nats + change)).tolist(),
        ce_base=(tokens * base_nats).tolist(),
        kl=(tokens * np.abs(change)).tolist(),
    )


def measured(
    kind: str, adaptation: float, *retention: float, noise: float = 0.02, **changes: Any
) -> ArmResult:
    """An arm with the sums that intervals are made of."""
    seed = changes.get("seed", 0)
    before = base()
    assert before.adaptation_ppl
    sums: dict[str, Blocks] = {}
    for i, (corpus, after) in enumerate(zip(CORPORA, retention, strict=True)):
        ppl = before.retention_ppl[corpus]
        assert ppl
        sums[corpus] = blocks(ppl, after, noise=noise, text=i + 1, seed=seed)
    learned = blocks(before.adaptation_ppl, adaptation, noise=noise, text=0, seed=seed)
    return replace(
        arm(kind, adaptation, *retention),
        adaptation_blocks=learned,
        retention_blocks=sums,
        retention_increase_interval_pct=increase_intervals(sums),
        drift_alternatives_nats_per_token=dict.fromkeys(sums, 0.03),
        **changes,
    )


def where(token: str = " the", num_spots: int = 2) -> Where:
    """One text's drift, taken apart."""
    spot = TokenExample(
        sample="window-7",
        context="def read(path):\n    with open",
        target=token,
        drift=2.5,
        base=0.7,
        adapted=0.1,
        choices=[
            TokenChoice(token=token, base=0.7, adapted=0.1),
            TokenChoice(token="\n", base=0.2, adapted=0.6),
            TokenChoice(token=" a", base=0.05, adapted=0.25),
        ],
    )
    return Where(
        stretches=[
            Stretch(first=0, last=15, num_tokens=100, drift=0.09),
            Stretch(first=16, last=None, num_tokens=900, drift=0.03),
        ],
        tokens=[
            TokenDrift(token=token, num_tokens=50, drift=0.4, share=0.41),
            TokenDrift(token="\n", num_tokens=20, drift=0.2, share=0.11),
        ],
        spots=[replace(spot, sample=f"window-{i}") for i in range(num_spots)],
    )


def three(**changes: Any) -> Report:
    arms = {
        "none": arm("none", 1.0, 61.6, 9.8),
        "kl": arm("kl", 1.541, 26.5, 4.3),
        "tmkl": arm("tmkl", 1.018, 26.8, 4.25),
    }
    return replace(Report(base=base(), arms=arms), **changes)


def report_of(*arms: ArmResult, **changes: Any) -> Report:
    return Report(base=base(**changes), arms={f"{a.kind}{i}": a for i, a in enumerate(arms)})


def one(name: str, **changes: Any) -> Report:
    changes = {"kind": name, "adaptation": 1.018, **changes}
    kind, adaptation = changes.pop("kind"), changes.pop("adaptation")
    return Report(base=base(), arms={name: arm(kind, adaptation, 26.8, 4.25, **changes)})


def points_of(line: Line2D) -> np.ndarray:
    """Where a line of a drawing goes, in units of its axes."""
    return np.asarray(line.get_xydata(), dtype=float)


def spots(plot: Drawing) -> dict[str, tuple[float, float]]:
    """Where a frontier plot has its marks, by their names, in units of its axes."""
    # Of what has one tooltip the mark comes last.
    return {
        re.split(": | \\(mean", str(line.get_gid()).removeprefix("tip:"))[0]: (x, y)
        for line in plot.axes.lines
        if line.get_gid()
        for x, y in points_of(line)[-1:]
    }


def strict_json(text: str) -> object:
    def refuse(name: str) -> float:
        raise ValueError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)
