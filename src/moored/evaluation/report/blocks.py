"""Sums over blocks of a text, policy and base on the same tokens: what intervals are made of.

The intervals themselves are `bootstrap.py`'s.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

# Neighbouring samples share a block, so that a report stays small and what neighbours have in
# common stays together.
MOST_BLOCKS = 200


@dataclass(frozen=True, slots=True)
class Columns:
    """Lists side by side, an entry in each per block."""

    @property
    def is_even(self) -> bool:
        """Whether all lists are of one length."""
        return len({len(getattr(self, item.name)) for item in fields(self)}) == 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocks(Columns):
    """One entry per block of neighbouring samples (windows, passages, answers), in their order.

    Attributes:
        num_tokens: scored tokens.
        ce: the policy's cross-entropy, nats.
        ce_base: the base's.
        kl: KL(base || policy) over the whole vocabulary, nats.
    """

    num_tokens: list[int]
    ce: list[float]
    ce_base: list[float]
    kl: list[float]

    @property
    def mean_ce(self) -> float | None:
        """The policy's mean cross-entropy, nats per token; None without a token."""
        num_tokens = sum(self.num_tokens)
        return sum(self.ce) / num_tokens if num_tokens else None

    @staticmethod
    def of(sums: Mapping[str, Sequence[float]]) -> Blocks:
        """Blocks of per-sample sums by the names above; at most `MOST_BLOCKS`, of like size."""
        edges = _edges(len(sums["num_tokens"]))
        summed = {
            item.name: [sum(sums[item.name][a:b]) for a, b in itertools.pairwise(edges)]
            for item in fields(Blocks)
        }
        return Blocks(
            num_tokens=[int(count) for count in summed["num_tokens"]],
            ce=_rounded(summed["ce"]),
            ce_base=_rounded(summed["ce_base"]),
            kl=_rounded(summed["kl"]),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally(Columns):
    """What was right of what was asked, per block of neighbours (passages, prompts), in order.

    Attributes:
        num: asked.
        hits: right.
    """

    num: list[int]
    hits: list[int]

    @property
    def total(self) -> int:
        """All that was asked."""
        return sum(self.num)

    @property
    def share(self) -> float:
        """Of what was right, 0 to 1; 0 where nothing was asked."""
        return sum(self.hits) / max(1, self.total)

    @staticmethod
    def of(rows: Sequence[tuple[int, int]]) -> Tally:
        """Of (asked, right) per passage or prompt; at most `MOST_BLOCKS` blocks of like size."""
        blocks = [rows[a:b] for a, b in itertools.pairwise(_edges(len(rows)))]
        num, hits = ([sum(row[i] for row in block) for block in blocks] for i in (0, 1))
        return Tally(num=num, hits=hits)


def _edges(num_samples: int) -> list[int]:
    """Where blocks of neighbours begin and end."""
    num_blocks = min(num_samples, MOST_BLOCKS)
    return [round(i * num_samples / max(1, num_blocks)) for i in range(num_blocks + 1)]


def _rounded(values: Sequence[float]) -> list[float]:
    return [float(f"{value:.8g}") for value in values]
