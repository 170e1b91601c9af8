"""Names and tables as Markdown that nobody else's characters can break.

Names come from recipes and files of others: none may end a cell, a line or the front matter, or
become a link, HTML, a picture or a formula. What is said is decided in `markdown.py`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from moored.evaluation.report.words import clean

NOT_MEASURED, NOT_KNOWN = "not measured", "not known"
_SPECIAL = re.compile(r"([\\`*_\[\]<>|~&#$!{}@])")
_PLAIN = re.compile(r"[A-Za-z0-9_./ +=,:@#()-]+")


def text(value: object, limit: int = 120) -> str:
    """A name or sentence as prose, whatever characters it holds; 0: however long."""
    return _escaped(clean(str(value), limit))


def _escaped(shown: str) -> str:
    escaped = _SPECIAL.sub(r"\\\1", shown)
    return escaped.replace("://", r"\://").replace("www.", r"www\.")


def code(value: object, limit: int = 120) -> str:
    """A name as code where its characters allow that, else as prose."""
    shown = clean(str(value), limit)
    is_plain = _PLAIN.fullmatch(shown) and shown.strip() == shown
    return f"`{shown}`" if is_plain else text(value, limit)


def commands(sentence: str) -> str:
    """A sentence with commands in it; what stands between backticks is code."""
    parts = clean(sentence).split("`")
    return "".join(code(p, 0) if i % 2 else _escaped(p) for i, p in enumerate(parts))


def known(shown: str) -> str:
    """A figure as `words.py` shows it, where a dash stands for none."""
    return NOT_MEASURED if shown == "–" else shown


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """A table of finished cells, of which the first `left` columns are words, the rest figures."""
    sides = [":---" if i < left else "---:" for i in range(len(head))]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, sides, *rows))


def listed(rows: Sequence[tuple[str, str]]) -> str:
    """What is called what, a line each."""
    return "\n".join(f"- **{name}:** {value}" for name, value in rows)
