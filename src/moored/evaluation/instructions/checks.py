"""What a text must be to meet a constraint: pure functions, read strictly.

An answer is judged as it is, white space at its ends apart; an empty one meets nothing. Prompts are
`tasks.py`'s.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Check:
    """One constraint.

    Attributes:
        kind: its name.
        holds: of an answer that is not empty, stripped.
    """

    kind: str
    holds: Callable[[str], bool]

    def met_by(self, answer: str) -> bool:
        """Whether an answer meets it."""
        text = answer.strip()
        return bool(text) and self.holds(text)


# ---------------------------------------------------------------- letters


def lowercase() -> Check:
    """Letters, and no capital among them."""
    return Check("lowercase", lambda text: text == text.lower() and text != text.upper())


def uppercase() -> Check:
    """Letters, and all of them capital."""
    return Check("uppercase", lambda text: text == text.upper() and text != text.lower())


def without(characters: str) -> Check:
    """None of these characters."""
    return Check("without", lambda text: not set(text) & set(characters))


def no_digits() -> Check:
    """No digit."""
    return Check("no_digits", lambda text: not any(c.isdigit() for c in text))


def capital_words(least: int) -> Check:
    """At least so many words of two letters or more that are all capitals."""
    return Check(
        "capital_words", lambda text: sum(len(w) > 1 and w.isupper() for w in _words(text)) >= least
    )


# ---------------------------------------------------------------- words


def contains(word: str, times: int = 1) -> Check:
    """A whole word or phrase, in any case, at least so many times."""
    return Check("contains", lambda text: _count(word, text) >= times)


def contains_exactly(word: str, times: int) -> Check:
    """A whole word or phrase, in any case, exactly so many times."""
    return Check("contains_exactly", lambda text: _count(word, text) == times)


def avoids(*words: str) -> Check:
    """None of these whole words, in any case."""
    return Check("avoids", lambda text: not any(_count(word, text) for word in words))


def words_at_least(least: int) -> Check:
    """At least so many words, parted by white space."""
    return Check("words_at_least", lambda text: len(text.split()) >= least)


def words_at_most(most: int) -> Check:
    """At most so many words, parted by white space."""
    return Check("words_at_most", lambda text: len(text.split()) <= most)


def one_of(*choices: str) -> Check:
    """One of these answers to the letter, and nothing else."""
    return Check("one_of", lambda text: text in choices)


# ---------------------------------------------------------------- beginning and end


def begins_with(phrase: str) -> Check:
    """These very characters at the beginning."""
    return Check("begins_with", lambda text: text.startswith(phrase))


def ends_with(phrase: str) -> Check:
    """These very characters at the end."""
    return Check("ends_with", lambda text: text.endswith(phrase))


def quoted() -> Check:
    """Double quotes (straight ones) around the whole, with something in between."""
    return Check("quoted", lambda text: len(text) > 2 and text[0] == text[-1] == '"')


# ---------------------------------------------------------------- layout


def bullets(count: int) -> Check:
    """Exactly so many lines that begin with `* ` or `- `, indented or not."""
    return Check("bullets", lambda text: _lines_like(r"\s*[*-] +\S", text) == count)


def only_bullets() -> Check:
    """No other lines than such."""
    return Check("only_bullets", lambda text: _lines_like(r"\s*[*-] +\S", text) == len(_rows(text)))


def numbered(count: int) -> Check:
    """Lines that begin with `1.`, `2.` and so on to `count.`, in this order, and no further one."""
    wanted = [str(number) for number in range(1, count + 1)]
    return Check("numbered", lambda text: re.findall(r"(?m)^\s*(\d+)\. +\S", text) == wanted)


def lines(count: int) -> Check:
    """Exactly so many lines, blank ones apart."""
    return Check("lines", lambda text: len(_rows(text)) == count)


def paragraphs(count: int) -> Check:
    """Exactly so many blocks of lines, parted by blank lines."""
    return Check("paragraphs", lambda text: len(re.split(r"\n\s*\n", text)) == count)


def sections(count: int, separator: str = "***") -> Check:
    """Exactly so many parts that are not empty, between lines that hold the separator alone."""
    pattern = rf"(?m)^[ \t]*{re.escape(separator)}[ \t]*$"

    def holds(text: str) -> bool:
        parts = re.split(pattern, text)
        return len(parts) == count and all(part.strip() for part in parts)

    return Check("sections", holds)


def heading() -> Check:
    """A first line that is a Markdown heading (`# `)."""
    return Check("heading", lambda text: re.match(r"#{1,6} +\S", text) is not None)


def bold(least: int) -> Check:
    """At least so many parts between double asterisks."""
    return Check("bold", lambda text: len(re.findall(r"\*\*[^*\n]+\*\*", text)) >= least)


def placeholders(least: int) -> Check:
    """At least so many placeholders in square brackets, such as [name]."""
    return Check("placeholders", lambda text: len(re.findall(r"\[[^\[\]\n]+\]", text)) >= least)


def table(columns: int) -> Check:
    """A Markdown table of so many columns: a head, its rule and a row at least."""

    def holds(text: str) -> bool:
        rows = [row.strip().strip("|").split("|") for row in _rows(text) if "|" in row]
        rules = [all(re.fullmatch(r"\s*:?-+:?\s*", cell) for cell in row) for row in rows]
        even = all(len(row) == columns for row in rows)
        return even and len(rows) >= 3 and rules == [False, True] + [False] * (len(rows) - 2)

    return Check("table", holds)


# ---------------------------------------------------------------- JSON


def json_object(*keys: str) -> Check:
    """A JSON object with exactly these keys and nothing around it but a Markdown fence."""

    def holds(text: str) -> bool:
        value = _json(text)
        return isinstance(value, dict) and set(value) == set(keys)

    return Check("json_object", holds)


def json_list(count: int) -> Check:
    """A JSON array of so many texts, likewise."""

    def holds(text: str) -> bool:
        value = _json(text)
        is_list = isinstance(value, list) and len(value) == count
        return is_list and all(isinstance(item, str) for item in value)

    return Check("json_list", holds)


def _json(text: str) -> Any:
    fenced = re.fullmatch(r"```(?:json)?\s*\n(.*)\n\s*```", text, re.DOTALL)
    try:
        return json.loads(fenced[1] if fenced else text)
    except (ValueError, RecursionError):
        return None


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W\d_]+(?:['’][^\W\d_]+)*", text)


def _count(word: str, text: str) -> int:
    return len(re.findall(rf"(?i)(?<!\w){re.escape(word)}(?!\w)", text))


def _rows(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.strip()]


def _lines_like(pattern: str, text: str) -> int:
    return sum(re.match(pattern, line) is not None for line in text.splitlines())
