"""Attention of packed rows sample by sample, and of rows that ranks share, with "sdpa".

transformers keeps the samples of a row apart by a mask of row length squared: attention then costs
as much as for one sample of that length, and the kernels that know causality are ruled out. Here
each sample is attended to by itself. A model for which that is not the same keeps the mask.

Where ranks share the tokens of a row (context parallelism), they exchange tokens for heads around
the attention, so that each has all tokens of its share of the heads (Ulysses, arXiv:2309.14509).

Letters: B rows, L row length, l of it on one rank, H heads, h of them, d head size.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import masking_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from moored.data.batch import Batch
from moored.distributed.mesh import Axis, is_lost_peer

log = logging.getLogger(__name__)

# Kernels are started for every sample: below this many tokens in the mean a mask may cost less.
LEAST_MEAN, LEAST_MEAN_ON_GPU = 32, 128

_by_sample: ContextVar[bool] = ContextVar("by_sample", default=False)
# Whether rows of several samples need transformers' mask; None: this is no forward of ours.
_needs_mask: ContextVar[bool | None] = ContextVar("needs_mask", default=None)
_seen: ContextVar[list[bool] | None] = ContextVar("seen", default=None)
# Models that may be attended to by sample, and how long a sample may be for it.
_longest: WeakKeyDictionary[nn.Module, float] = WeakKeyDictionary()
# Of models whose rows are shared by ranks: which.
_sharers: WeakKeyDictionary[nn.Module, Axis] = WeakKeyDictionary()


@contextlib.contextmanager
def samples_apart(causal_lm: nn.Module, batch: Batch) -> Iterator[dict[str, Any]]:
    """Further arguments of the backbone's forward, to be called inside.

    Args:
        causal_lm: the Hugging Face model.
        batch: its rows.
    """
    rows = batch.sample_lengths
    if batch.num_parts > 1:
        with _set(_by_sample, True), _set(_needs_mask, False):
            yield {"sample_lengths": rows, "sharers": _sharers[causal_lm]}
        return
    by_sample = rows is not None and _gains(causal_lm, batch, rows)
    with _set(_by_sample, by_sample), _set(_needs_mask, rows is not None and not by_sample):
        yield {"sample_lengths": rows} if by_sample else {}


def share_rows(causal_lm: nn.Module, axis: Axis, longest: int) -> str | None:
    """Let ranks share the rows of a model that is attended to by sample; why not, if they cannot.

    Args:
        causal_lm: the Hugging Face model.
        axis: the ranks, each of which will be given its part of a batch.
        longest: tokens of a sample at most.
    """
    if causal_lm not in _longest:
        return "its rows are not attended to sample by sample, as sdpa does of most models"
    if longest > _longest[causal_lm]:
        return f"it looks back {_longest[causal_lm]:,} tokens, and rows have {longest:,}"
    _sharers[causal_lm] = axis
    return None


class _Exchanged(torch.autograd.Function):
    """Tokens for heads, or back; its gradient the other way round."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, split: int, join: int) -> Tensor:
        ctx.axis, ctx.dims = axis, (join, split)
        return axis.exchange(x, split, join)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # pyright: ignore
        return ctx.axis.exchange(grad, *ctx.dims), None, None, None


def _gains(causal_lm: nn.Module, batch: Batch, rows: Sequence[Sequence[int]]) -> bool:
    """Whether attention by sample is right for such rows, and costs less than a mask."""
    if max(map(max, rows)) > _longest.get(causal_lm, 0):
        return False
    least = LEAST_MEAN_ON_GPU if batch.input_ids.is_cuda else LEAST_MEAN
    is_trial = _seen.get() is not None
    return is_trial or batch.input_ids.numel() >= least * sum(map(len, rows))


def attend_by_sample(causal_lm: Any, masked: Tensor, hidden: Callable[[], Tensor]) -> bool:
    """Let packed rows of a model be attended to by sample, if that gives the same. Collective.

    Args:
        causal_lm: the Hugging Face model.
        masked: final hidden states of a packed batch under transformers' mask, [N, D].
        hidden: computes them again.

    Returns:
        Whether it will be done.
    """
    config = causal_lm.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    if (
        causal_lm.config._attn_implementation != "sdpa"
        or kinds - {"full_attention", "sliding_attention"}
        or getattr(config, "attention_chunk_size", None) is not None
    ):
        return False
    ALL_ATTENTION_FUNCTIONS["sdpa"] = _attention
    ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] = _mask
    # Within its window a sample is attended to causally and no more; a longer one needs the mask.
    _longest[causal_lm] = getattr(config, "sliding_window", None) or math.inf
    seen: list[bool] = []
    try:
        with _set(_seen, seen):
            apart = hidden()
    except (TypeError, ValueError, RuntimeError) as error:
        if is_lost_peer(error):
            raise
        log.debug("packed rows of %s stay whole: %s", type(causal_lm).__name__, error)
        same = False
    else:
        bound = min(0.1, 1000 * torch.finfo(apart.dtype).eps) * masked.abs().max()
        same = bool(seen) and all(seen) and bool((apart - masked).abs().max() <= bound)
    if not same:
        del _longest[causal_lm]
    return same


def _sample_numbers(position_ids_BL: Tensor) -> Tensor | None:
    """Which sample of its row each position is of; None where no row holds several.

    As transformers finds it, but that it asks the device whether there are several: the host would
    wait for that in every forward.
    """
    needed = _needs_mask.get()
    if needed is None:
        return _ask_positions(position_ids_BL)
    if not needed:
        return None
    before_B1 = position_ids_BL[:, :1] - 1
    return (torch.diff(position_ids_BL, prepend=before_B1, dim=-1) != 1).cumsum(-1)


_ask_positions = masking_utils.find_packed_sequence_indices
masking_utils.find_packed_sequence_indices = _sample_numbers


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """As transformers has it, but none where samples are attended to by themselves."""
    return None if _by_sample.get() else sdpa_mask(*args, **kwargs)


def _attention(
    module: nn.Module,
    query_BHLd: Tensor,
    key_BHLd: Tensor,
    value_BHLd: Tensor,
    attention_mask: Tensor | None,
    *,
    sample_lengths: Sequence[Sequence[int]] | None = None,
    sharers: Axis | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Transformers' sdpa of every sample; [B, L, H, d] and no weights."""
    if sharers is not None:
        parts_BHld = query_BHLd, key_BHLd, value_BHLd
        query_BhLd, key_BhLd, value_BhLd = (_Exchanged.apply(x, sharers, 1, 2) for x in parts_BHld)
        found_BLhd, _ = _attention(
            module, query_BhLd, key_BhLd, value_BhLd, None, sample_lengths=sample_lengths, **kwargs
        )
        return cast(Tensor, _Exchanged.apply(found_BLhd, sharers, 1, 2)), None
    apart = sample_lengths if attention_mask is None else None
    if (seen := _seen.get()) is not None:
        seen.append(apart is not None)
    all_BHLd = query_BHLd, key_BHLd, value_BHLd
    if apart is None:
        return sdpa_attention_forward(module, *all_BHLd, attention_mask, **kwargs)
    rows = []
    for row, lengths in enumerate(apart):
        q, k, v = (x[row : row + 1].split(lengths, 2) for x in all_BHLd)
        found = [
            sdpa_attention_forward(module, *sample, None, **kwargs)[0]
            for sample in zip(q, k, v, strict=True)
        ]
        rows.append(torch.cat(found, 1))
    return torch.cat(rows), None


@contextlib.contextmanager
def _set(variable: ContextVar[Any], value: Any) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)
