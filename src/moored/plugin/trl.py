"""What TRL's SFTTrainer reads of a model with a fused head, made of our loss.

Its loss is minus the sum of `log_probs` over the number of targets, so `log_probs` carries the
divergence; entropy and accuracy are of the model alone. Legend: as in attached.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moored.loss.chunks import Chunked
from moored.loss.logits import Logits
from moored.loss.rows import default_chunk_tokens, precomputed
from moored.plugin.attached import IGNORED, Attached, plain_logits


def output(
    attached: Attached, found: Chunked, hidden_BLD: Tensor, targets_T: Tensor, *, shifted: bool
) -> Any:
    """TRL's output, of which every field is [B, L - 1], or [B, L] where labels came shifted."""
    from trl.trainer.utils import FusedCausalLMOutput

    hidden_TD, shape = hidden_BLD.flatten(0, 1), hidden_BLD.shape[:2]
    assert found.grad_ND is not None
    loss_T = precomputed(hidden_TD, found.weighted_N.to(found.grad_ND.dtype), found.grad_ND)
    entropy_T, is_top1_T = attached.by_head(lambda logits: _seen(logits, hidden_TD, targets_T))
    fields = {
        "log_probs": -loss_T,
        "entropy": entropy_T,
        "is_top1": is_top1_T,
        "label_mask": targets_T != IGNORED,
    }
    end = None if shifted else -1
    return FusedCausalLMOutput(
        loss=loss_T.sum(), **{name: x.view(shape)[:, :end] for name, x in fields.items()}
    )


def _seen(logits: Logits, hidden_TD: Tensor, targets_T: Tensor) -> tuple[Tensor, Tensor]:
    """The entropy of each target's distribution, and whether the target is its first choice."""
    entropy_T = torch.zeros(len(targets_T), device=hidden_TD.device)
    is_top1_T = torch.zeros(len(targets_T), dtype=torch.bool, device=hidden_TD.device)
    index_N = (targets_T != IGNORED).nonzero().squeeze(1)
    size = default_chunk_tokens(len(index_N), logits.shard, on_gpu=hidden_TD.is_cuda)
    for rows in index_N.split(max(1, size)):
        s_CV = plain_logits(logits, hidden_TD.detach()[rows])
        is_top1_T[rows] = s_CV.argmax(dim=-1) == targets_T[rows]
        log_p_CV = s_CV.log_softmax(dim=-1)
        entropy_T[rows] = -(log_p_CV.exp() * log_p_CV).sum(dim=-1).float()
    return entropy_T, is_top1_T
