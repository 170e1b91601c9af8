"""Made-up but plausible figures for the tests of reports."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from moored.report import ArmResult, BaseResult, Report, increase_pct

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


def strict_json(text: str) -> object:
    def refuse(name: str) -> float:
        raise ValueError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)
