"""Tokens that no adapter can make a model say: their rows in the frozen head were never trained.

Rows that a base never learned are alike, so that their logits are; a turn that ends with such a
token never ends. Nothing is trained or mended here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moored.data import TurnEnd
from moored.distributed.mesh import Axis
from moored.loss.head import Head

# How far two rows are apart that were never parted, relative to their size. Rows that were set to
# one value are equal up to rounding (0.4 % in bf16), those drawn about one mean nearly so. Of
# SmolLM2-135M 17 such tokens are 0.07 % apart, and of all others the nearest two 30 %.
ALIKE = 0.05
NOTHING = 1e-3  # size of a row that is as good as zero, relative to the mean of all
ROWS = 8192  # that are compared at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class Untrained:
    """A token whose row says nothing of its own.

    Attributes:
        end: the token.
        alike: ids of the tokens that have the same row; empty where the row is zero.
    """

    end: TurnEnd
    alike: tuple[int, ...]


@torch.no_grad()
def untrained(head: Head, ends: Sequence[TurnEnd], axis: Axis) -> list[Untrained]:
    """Those of the tokens whose rows in the head were never trained. Collective.

    No copy of the head is made.

    Args:
        head: the model's, or this rank's rows of it.
        ends: tokens that are to be learned.
        axis: over which the head is spread.
    """
    if not ends:
        return []
    start = 0 if head.shard is None else head.shard.start
    num_rows = len(head.weight) if head.shard is None else head.shard.num_valid
    rows_ED = torch.zeros(len(ends), _row(head, 0, 0).shape[1], device=head.weight.device)
    for number, end in enumerate(ends):
        if start <= end.id < start + num_rows:
            rows_ED[number] = _row(head, end.id - start, end.id - start + 1)[0]
    rows_ED = axis.sum(rows_ED)
    sizes_E = rows_ED.square().sum(1)
    total = torch.zeros(2, dtype=torch.float64, device=rows_ED.device)
    near: list[list[int]] = [[] for _ in ends]
    for first in range(0, num_rows, ROWS):
        part_RD = _row(head, first, min(num_rows, first + ROWS))
        sizes_R = part_RD.square().sum(1)
        total[0] += sizes_R.sqrt().sum()
        total[1] += len(sizes_R)
        apart_ER = sizes_E[:, None] + sizes_R[None] - 2 * rows_ED @ part_RD.t()
        found = (apart_ER <= ALIKE**2 * sizes_E[:, None]).nonzero().tolist()
        for number, row in found:
            if start + first + row != ends[number].id:
                near[number].append(start + first + row)
    total = axis.sum(total)
    mean = float(total[0] / total[1])
    every = axis.gather(near)
    lists = [sorted(i for part in every for i in part[number]) for number in range(len(ends))]
    return [
        Untrained(end=end, alike=() if is_nothing else tuple(alike))
        for end, alike, size in zip(ends, lists, sizes_E.sqrt().tolist(), strict=True)
        if (is_nothing := size <= NOTHING * mean) or alike
    ]


def _row(head: Head, first: int, past: int) -> Tensor:
    """Rows of the head in fp32, with the bias as one more column, [rows, D + 1]."""
    weight_RD = head.weight[first:past].float()
    if head.bias is None:
        return torch.cat([weight_RD, weight_RD.new_zeros(len(weight_RD), 1)], dim=1)
    return torch.cat([weight_RD, head.bias[first:past, None].float()], dim=1)


def in_words(found: Untrained, tokenizer: Any, model: str) -> str:
    """What is wrong with a token of a model (by its name), and what to do."""
    end = found.end
    like = [f"{tokenizer.convert_ids_to_tokens(i)!r} ({i})" for i in found.alike[:3]]
    more = f" and {len(found.alike) - len(like)} more" if len(found.alike) > len(like) else ""
    row = f"the same as that of {', '.join(like)}{more}" if like else "zero"
    eos = tokenizer.eos_token_id
    such = f", such as its own {tokenizer.eos_token!r}" if eos not in (end.id, *found.alike) else ""
    return (
        f"{model}: turns end with {end.token!r} ({end.id}), whose row in the output head is {row}: "
        "the base never learned it, and the head stays frozen, so no adapter can make the model "
        "stop there: take the instruction-tuned model, or set data.chat_template to one whose "
        f"turns end with a token that the base knows{such}"
    )
