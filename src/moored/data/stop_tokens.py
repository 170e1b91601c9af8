"""The tokens that end turns: seen in the text of a chat, and in what is learned of it.

Where the turns themselves are in a text is `chat_layout.py`'s matter.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from moored.data.samples import SampleSet

_MOST_INSIDE = 0.01  # of an end's places, in the middle of what is learned: texts that quote it


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
        """Whether there is nothing but such tokens and blanks."""
        return not self._all.sub("", text).strip()


def _any_of(texts: Sequence[str]) -> re.Pattern[str]:
    longest_first = sorted(dict.fromkeys(texts), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnEnd:
    """A token that ends learned turns.

    Attributes:
        id: of the token.
        token: its text.
        count: turns that it ends; None where nobody counted.
    """

    id: int
    token: str
    count: int | None = None


def turn_ends(samples: SampleSet, tokenizer: Any, max_length: int) -> list[TurnEnd]:
    """The tokens that end what is learned, the most frequent first.

    Only tokens that no text is made of count (the tokenizer's added ones, and its end of sequence),
    and only those that stand at ends alone: one that parts an answer from its reasoning is no place
    to stop. Of a streamed source the first block is looked at.

    Args:
        samples: that are learned.
        tokenizer: of the model.
        max_length: at which samples were cut, so that what they end with ends nothing.
    """
    added = {*tokenizer.added_tokens_decoder, tokenizer.eos_token_id}
    marks = np.array(sorted(added), dtype=np.int64)
    at_ends: Counter[int] = Counter()
    inside: Counter[int] = Counter()
    for source in samples.at_hand():
        flat = source.flat
        mask, ids = np.asarray(flat.label_mask), np.asarray(flat.input_ids)
        learned = np.flatnonzero(mask)
        learned = learned[np.isin(ids[learned], marks)]
        last = flat.offsets[1:] - 1
        goes_on = np.append(mask[1:], False)
        goes_on[last] = False
        cut = last[np.diff(flat.offsets) >= max_length]
        is_end = ~goes_on[learned]
        ends = learned[is_end]
        at_ends.update(ids[ends[~np.isin(ends, cut)]].tolist())
        inside.update(ids[learned[~is_end]].tolist())
    return [
        TurnEnd(id=index, token=str(tokenizer.convert_ids_to_tokens(index)), count=count)
        for index, count in sorted(at_ends.items(), key=lambda item: (-item[1], item[0]))
        if inside[index] <= _MOST_INSIDE * count
    ]
