"""Tokens at which a model can be made to stop, found in text."""

from __future__ import annotations

import re
from collections.abc import Sequence


class StopStrings:
    """The tokens at which a model can be made to stop, found in text.

    Args:
        special: texts of the special tokens, the end of sequence among them.
        added: texts of other tokens that are never split; at these a turn may end, too, where
            its template writes no special one.
    """

    def __init__(self, special: Sequence[str], added: Sequence[str] = ()):
        self._special = _any_of(special)
        other = [text for text in added if text.strip() and not text.startswith(("</", "[/"))]
        self._all = _any_of([*special, *other])

    def closing(self, text: str, start: int = 0) -> int | None:
        """Past the special token that ends the text, blanks apart; None if none does."""
        last = None
        for match in self._special.finditer(text, start):
            last = match
        return last.end() if last and not text[last.end() :].strip() else None

    def first(self, text: str, start: int, stop: int | None = None) -> int | None:
        """Past the token that comes next, blanks apart; None if words do."""
        match = self._all.search(text, start, len(text) if stop is None else stop)
        return match.end() if match and not text[start : match.start()].strip() else None

    def last(self, text: str, start: int, stop: int) -> int | None:
        """Past the last token that lies in text[start:stop] whole."""
        ends = [match.end() for match in self._all.finditer(text, start) if match.end() <= stop]
        return ends[-1] if ends else None

    def whole(self, text: str, start: int, at: int) -> int:
        """`at`, or the start of the token that it would cut."""
        for match in self._all.finditer(text, start):
            if match.start() < at < match.end():
                return match.start()
        return at

    def only(self, text: str) -> bool:
        """Whether there are nothing but such tokens and blanks."""
        return not self._all.sub("", text).strip()


def _any_of(texts: Sequence[str]) -> re.Pattern[str]:
    longest_first = sorted(dict.fromkeys(texts), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
