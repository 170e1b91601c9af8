"""Numbers, names and caveats as people read them.

What the figures amount to is said in `headline.py`; no layout and no file format is known here.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping

from moored.report.results import Report

MISSING = "–"
MINUS = "−"
NBSP = "\u00a0"
KINDS = {"none": "plain fine-tuning", "kl": "unmasked KL", "tmkl": "TMKL"}


def ppl(value: float | None) -> str:
    """A perplexity with about four significant digits."""
    if value is None or not math.isfinite(value):
        return _special(value)
    if value >= 1e6:
        return f"{value:.2e}".replace("e+0", "e").replace("e+", "e")
    decimals = 3 if value < 9.9995 else 2 if value < 99.995 else 1 if value < 999.95 else 0
    return f"{value:,.{decimals}f}"


def percent(value: float | None) -> str:
    """A signed percentage: +136 %, −0.42 %."""
    if value is None or not math.isfinite(value):
        return _special(value)
    size = abs(value)
    if size >= 1e5:
        text = f"{size:.1e}".replace("e+0", "e").replace("e+", "e")
    else:
        text = f"{size:,.{2 if size < 0.995 else 1 if size < 99.95 else 0}f}"
    if not text.strip("0.,"):
        return f"0{NBSP}%"
    return f"{'+' if value > 0 else MINUS}{text}{NBSP}%"


def nats(value: float | None) -> str:
    """A divergence or a loss, in nats per token."""
    if value is None or not math.isfinite(value):
        return _special(value)
    if value != 0 and abs(value) < 1e-4:
        return f"{value:.1e}".replace("-", MINUS)
    return f"{value:.4f}".replace("-", MINUS)


def fraction(value: float | None) -> str:
    """A fraction as a percentage."""
    return (
        f"{100 * value:.1f}{NBSP}%"
        if value is not None and math.isfinite(value)
        else _special(value)
    )


def figure(value: float | None) -> str:
    """A number of any kind, with four significant digits."""
    if value is None or not math.isfinite(value):
        return _special(value)
    return f"{value:.4g}".replace("-", MINUS)


def with_error(figures: Mapping[str, float | None], metric: str) -> tuple[str, str]:
    """A figure of the evaluation harness and its standard error, as text."""
    name, space, where = metric.partition(" ")
    error = figures.get(f"{name}_stderr{space}{where}")
    shown = "" if error is None or not math.isfinite(error) else f"± {figure(error)}"
    return figure(figures.get(metric)), shown


def count(value: float | None) -> str:
    """A number of things, with thousands apart."""
    return f"{value:,.0f}" if value is not None and math.isfinite(value) else _special(value)


def duration(seconds: float | None) -> str:
    """A time in the unit that suits it."""
    if seconds is None or not math.isfinite(seconds):
        return _special(seconds)
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def memory(num_bytes: float | None) -> str:
    """Bytes in GiB."""
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes is not None else MISSING


def _special(value: float | None) -> str:
    if value is None:
        return MISSING
    return "NaN" if math.isnan(value) else "∞" if value > 0 else f"{MINUS}∞"


def clean(text: str, limit: int = 0) -> str:
    """A name as it may be shown: no control characters, no tricks with direction, not too long."""
    shown = "".join(
        "�" if unicodedata.category(c) in ("Cc", "Cs", "Co", "Cn") or c in _DIRECTION else c
        for c in " ".join(text.split())
    )
    if limit and len(shown) > limit:
        head = (limit - 1) // 2
        shown = f"{shown[: limit - 1 - head]}…{shown[len(shown) - head :]}"
    return shown or "�"


_DIRECTION = frozenset("\u200e\u200f\u061c\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def kind_name(kind: str) -> str:
    """A regulariser as prose names it."""
    return KINDS.get(kind, clean(kind, 24))


def caveats(report: Report) -> list[str]:
    """What the figures do not show."""
    result: list[str] = []
    seeds = {arm.seed for arm in report.arms.values()}
    by_setting: dict[tuple[object, ...], int] = {}
    for arm in report.arms.values():
        key = (arm.kind, arm.weight, arm.direction, arm.temperature, arm.adapter, arm.scale)
        by_setting[key] = by_setting.get(key, 0) + 1
    if max(by_setting.values(), default=0) <= 1:
        result.append(
            "One run per setting: differences may be chance. Repeat with other seeds before "
            "relying on small ones; nothing here is a claim of significance."
        )
    else:
        result.append(
            f"{len(seeds)} seeds; no test of significance was made, and ranges are plain "
            "minimum and maximum."
        )
    tokens = report.base.num_tokens
    known = {name: tokens[name] for name in report.corpora if name in tokens}
    if known:
        sizes = ", ".join(f"{clean(name, 32)} {count(number)}" for name, number in known.items())
        result.append(f"Retention was measured on samples (scored tokens): {sizes}.")
    if len(known) < len(report.corpora):
        result.append("For some corpora the number of scored tokens was not recorded.")
    if report.base.num_adaptation_tokens is not None:
        held = f"Adaptation: {count(report.base.num_adaptation_tokens)} held-out target tokens"
        asked = report.base.num_adaptation_prompts
        result.append(held + (f", {count(asked)} prompts for the exact match." if asked else "."))
    if report.base.num_instructions is not None:
        prompts, full = report.base.num_instruction_prompts, report.base.num_instructions
        result.append(
            f"Instructions followed: {count(full)} constraints in {count(prompts)} prompts, so one "
            f"constraint is {100 / max(1, full):.1f} points; form only, not whether answers are "
            "right."
        )
    if len({arm.num_steps for arm in report.arms.values()}) > 1:
        result.append("The arms did not train for the same number of steps.")
    for name, arm in report.arms.items():
        if arm.status != "done":
            result.append(f"{clean(name, 40)} ended as “{clean(arm.status, 40)}”.")
    result.append(
        "Perplexities compare only under the same tokenizer, texts and window length; text that "
        "the base was trained on understates forgetting elsewhere."
    )
    return result
