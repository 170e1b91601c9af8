"""The tokens that end what is learned: where a model that was trained on it is to stop.

Found in the tokens themselves, whatever template or format they came from.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from moored.data.encode import HeldSource

if TYPE_CHECKING:
    from moored.data.samples import SampleSet

_MOST_INSIDE = 0.01  # of an end's places, in the middle of what is learned: texts that quote it


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnEnd:
    """A token that ends learned turns.

    Attributes:
        id: of the token.
        token: its text.
        count: turns that it ends.
    """

    id: int
    token: str
    count: int


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
    for source in _held(samples):
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


def _held(samples: SampleSet) -> Iterator[HeldSource]:
    for source in samples.sources:
        held = source if isinstance(source, HeldSource) else source.block(0)
        if held:
            yield held
