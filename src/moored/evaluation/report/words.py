"""Numbers and names as people read them, and the templates that make sentences of them.

What the figures amount to is found in `headline.py`; no layout and no file format is known here.
"""

from __future__ import annotations

import functools
import math
import unicodedata
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import jinja2

MISSING = "–"
MINUS = "−"
NBSP = "\u00a0"
KINDS = {
    "none": "plain fine-tuning",
    "kl": "unmasked KL",
    "tmkl": "TMKL",
    "asft": "ASFT",
    "eaft": "EAFT",
    "stm": "STM",
    "mol": "MoL",
    "l2": "L2 penalty",
    "replay": "replay",
}


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
        text = f"{size:,.{_decimals(size)}f}"
    if not text.strip("0.,"):
        return f"0{NBSP}%"
    return f"{'+' if value > 0 else MINUS}{text}{NBSP}%"


def _decimals(size: float) -> int:
    return 2 if size < 0.995 else 1 if size < 99.95 else 0


def points(value: float | None) -> str:
    """A difference of two percentages, in percentage points: +2.7 points."""
    return percent(value).replace(f"{NBSP}%", f"{NBSP}points")


def bounds(low: float, high: float) -> str:
    """The ends of an interval in percent, without the sign: [−0.42, 2.7]."""
    size = max(abs(low), abs(high))
    if not math.isfinite(size) or size >= 1e5:
        return f"[{figure(low)}, {figure(high)}]"
    # Rounded first, so that no zero has a sign.
    ends = [f"{round(end, _decimals(size)) + 0.0:,.{_decimals(size)}f}" for end in (low, high)]
    return f"[{ends[0]},{NBSP}{ends[1]}]".replace("-", MINUS)


def nats(value: float | None) -> str:
    """A divergence or a loss, in nats per token."""
    if value is None or not math.isfinite(value):
        return _special(value)
    if value != 0 and abs(value) < 1e-4:
        return f"{value:.1e}".replace("-", MINUS)
    return f"{value:.4f}".replace("-", MINUS)


def fraction(value: float | None) -> str:
    """A fraction as a percentage."""
    if value is None or not math.isfinite(value):
        return _special(value)
    return f"{100 * value:.1f}{NBSP}%"


def probability(value: float | None) -> str:
    """A probability as a percentage; what would round to nothing as less than the least shown."""
    return f"<0.1{NBSP}%" if value is not None and 0 < value < 0.001 else fraction(value)


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


# White space and what else could not be seen in a token.
_VISIBLE = {" ": "␣", "\n": "↵", "\t": "⇥", "\r": "␍", "\u2028": "↵", "\u2029": "↵"}


def token(text: str, limit: int = 24) -> str:
    """A token with its white space made visible; what has no shape or turns others is a �."""
    shown = "".join(_VISIBLE.get(c) or _shape(c) for c in text)
    if limit and len(shown) > limit:
        shown = f"{shown[: limit - 1]}…"
    if shown and unicodedata.combining(shown[0]):
        shown = f"◌{shown}"
    return shown or "(empty)"


def passage(text: str, limit: int = 200) -> str:
    """The end of a context: line breaks visible and kept short, other white space as it is."""
    shown = "".join(
        " " if c == " " else "↵ " if c in "\n\u2028\u2029" else _VISIBLE.get(c) or _shape(c)
        for c in text
    )
    return shown if len(shown) <= limit else f"…{shown[len(shown) - limit + 1 :]}"


def _shape(c: str) -> str:
    category = unicodedata.category(c)
    # Zs: a space of another kind than the usual.
    return "⍽" if category == "Zs" else "�" if category[0] == "C" else c


def kind_name(kind: str) -> str:
    """A regulariser as prose names it."""
    return KINDS.get(kind, clean(kind, 24))


def render(name: str, **values: Any) -> str:
    """A template with these values, a `.html.j2` with all its text escaped.

    Filters show numbers and names as above; bars get their `width`, and figures may be `finite`.
    """
    return _templates().get_template(name).render(values)


def lines(name: str, **values: Any) -> list[str]:
    """The lines of such a text."""
    return [line for line in render(name, **values).split("\n") if line]


@functools.cache
def _templates() -> jinja2.Environment:
    import jinja2  # only where words are made

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("moored.evaluation.report"),
        autoescape=lambda name: name is not None and name.endswith(".html.j2"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    shows = (clean, count, duration, fraction, kind_name, memory, nats, passage, percent, points)
    environment.filters |= {show.__name__: show for show in (*shows, ppl, probability, token)}
    environment.filters["bounds"] = lambda interval: bounds(interval.low, interval.high)
    environment.filters["width"] = width
    environment.tests["finite"] = lambda value: value is not None and math.isfinite(value)
    return environment


def finite(value: float | None) -> float:
    """A figure, or 0 where it is none."""
    return value if value is not None and math.isfinite(value) else 0.0


def width(value: float | None, most: float) -> str:
    """The length of a bar, in percent of its track."""
    return f"{100 * min(1.0, max(0.0, finite(value) / most if most > 0 else 0.0)):.1f}"
