"""How much a token weighs in the loss by what the models say of it; constants to the gradient.

`probability` is p_y, as in DFT (arXiv 2508.05629) and ASFT (2509.23753). `entropy` is that of the
renormalised `NUM_TOPS` first choices over its greatest value, as in EAFT (2601.02151): the policy's
for the cross-entropy, the reference's for the KL. What is weighted is divergence.py's.

Legend: C tokens, v this rank's columns, P ranks, K numbers per token.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from moored.loss.softmax_pair import NEG_INF, exact_dtype

CEWeighting = Literal["uniform", "probability", "entropy"]
KLWeighting = Literal["uniform", "entropy"]

NUM_TOPS = 20


def tops(
    s_Cv: Tensor, e_Cv: Tensor | None, ce_weighting: CEWeighting, kl_weighting: KLWeighting
) -> list[Tensor]:
    """What a rank sends for the weights: the first choices' logits, [NUM_TOPS, C] each, in fp64.

    Args:
        s_Cv: the policy's logits.
        e_Cv: reference minus policy; None for cross-entropy alone.
        ce_weighting: of the cross-entropy, whose part comes first.
        kl_weighting: of the KL.
    """
    found: list[Tensor] = []
    if ce_weighting == "entropy":
        found.append(_top_logits(s_Cv))
    if kl_weighting == "entropy" and e_Cv is not None:
        found.append(_top_logits(s_Cv + e_Cv))
    return found


def _top_logits(s_Cv: Tensor) -> Tensor:
    num_tops = min(NUM_TOPS, s_Cv.shape[1])
    top_CK = s_Cv.topk(num_tops, dim=1).values.to(exact_dtype(s_Cv))
    return torch.nn.functional.pad(top_CK, (0, NUM_TOPS - num_tops), value=NEG_INF).t()


def ce_factors(weighting: CEWeighting, ce_C: Tensor, tops_PKC: Tensor) -> Tensor | float:
    """Each token's weight in the cross-entropy, [C] or 1; `tops_PKC` of all ranks."""
    if weighting == "probability":
        return torch.exp(-ce_C)
    return _top_entropy(tops_PKC[:, :NUM_TOPS]) if weighting == "entropy" else 1.0


def kl_factors(weighting: KLWeighting, tops_PKC: Tensor) -> Tensor | float:
    """Each token's weight in the KL, [C] or 1; `tops_PKC` of all ranks, empty without a KL."""
    if weighting == "uniform" or not tops_PKC.shape[1]:
        return 1.0
    return _top_entropy(tops_PKC[:, -NUM_TOPS:])


def _top_entropy(tops_PKC: Tensor) -> Tensor:
    """Entropy of the first choices of all shards together, over log(NUM_TOPS)."""
    top_CK = tops_PKC.permute(2, 0, 1).flatten(1).topk(NUM_TOPS, dim=1).values
    log_p_CK = top_CK.log_softmax(1)
    terms_CK = torch.where(log_p_CK == NEG_INF, 0.0, log_p_CK.exp() * log_p_CK)
    return -terms_CK.sum(1) / math.log(NUM_TOPS)
