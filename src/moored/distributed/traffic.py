"""What tensor parallelism sends: collectives and bytes of a micro-batch and an update, by place.

A pure function of sizes, without torch, so that it can be asked before anything is started; a test
holds it against what a training step really sends.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["all_reduce", "all_gather", "reduce_scatter", "broadcast"]


@dataclass(frozen=True, slots=True)
class Sent:
    """Collectives of one kind and size.

    Attributes:
        where: `embedding`, `layers`, `sequence`, `adapters`, `head` or `update`.
        kind: what is done; over the ranks of one tensor-parallel group.
        count: how many.
        bytes_each: the whole tensor: what an all-reduce sums, an all-gather makes, a
            reduce-scatter takes, a broadcast gives.
    """

    where: str
    kind: Kind
    count: int
    bytes_each: int

    @property
    def bytes(self) -> int:
        """The bytes of all of them."""
        return self.count * self.bytes_each

    def wire_bytes(self, degree: int) -> float:
        """What each rank sends for them by the ring algorithm."""
        passes = 2 if self.kind == "all_reduce" else 1
        return passes * (degree - 1) / degree * self.bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """One micro-batch of one data-parallel rank.

    Attributes:
        rows: sequences.
        length: tokens of each, padding included.
        num_targets: rows of the head that are learned.
        num_kl: those with the divergence; 0 without one.
        num_prompt: further rows, with the divergence alone.
        num_idle: rows of which the hidden states are at hand, but which have neither: those not
            drawn by token_fraction.
        num_selected_from: targets of which the base said beforehand which are learned.
    """

    rows: int
    length: int
    num_targets: int
    num_kl: int
    num_prompt: int = 0
    num_idle: int = 0
    num_selected_from: int = 0


ENTROPY_NUMBERS = 20  # per row and rank: `divergence.NUM_TOPS`


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """How a model is spread.

    Attributes:
        degree: ranks of a tensor-parallel group.
        hidden_size: features of the residual stream.
        num_layers: decoder layers, of two regions each (attention and MLP).
        activation_bytes: of one number: 4 in fp32, 2 in bf16.
        shared_adapter_sizes: elements of every adapter matrix that all ranks hold.
        sequence_parallel: norms and residuals are spread by tokens.
        checkpointing: none, reentrant or non_reentrant.
        num_recomputed: layers that are checkpointed; None: all, if any are.
        chunk_tokens: rows of the head at a time.
        direction: of the divergence.
        is_warm: its temperature is not 1.
        ce_by_entropy: targets are weighted by the policy's entropy.
        kl_by_entropy: rows of the divergence are weighted by the reference's.
        by_kernels: Triton's kernels compute the head's rows, if their weights do not depend on the
            models: then ranks send each other fp32, and fewer numbers.
    """

    degree: int
    hidden_size: int
    num_layers: int
    activation_bytes: int
    shared_adapter_sizes: Sequence[int]
    sequence_parallel: bool = False
    checkpointing: str = "none"
    num_recomputed: int | None = None
    chunk_tokens: int = 4096
    direction: str = "forward"
    is_warm: bool = False
    ce_by_entropy: bool = False
    kl_by_entropy: bool = False
    by_kernels: bool = False


def micro_batch_traffic(spread: Spread, batch: MicroBatch) -> list[Sent]:
    """Forward of reference and policy, loss and backward of one micro-batch."""
    if spread.degree == 1:
        return []
    passes = 2 if batch.num_kl or batch.num_prompt or batch.num_selected_from else 1
    regions = 2 * spread.num_layers
    length = batch.length
    if spread.sequence_parallel:
        length += -length % spread.degree
    stream = batch.rows * length * spread.hidden_size * spread.activation_bytes
    whole = batch.rows * batch.length * spread.hidden_size * spread.activation_bytes
    # With checkpointing the backward enters each region again, leaves it again (without reentry not
    # the last one of a layer), and goes down to the embedding, whose output then requires grad.
    again = spread.checkpointing != "none"
    layers = spread.num_layers if spread.num_recomputed is None else spread.num_recomputed
    again_out = {"none": 0, "reentrant": 2 * layers, "non_reentrant": layers}
    backward_in = regions if again else regions - 1
    sent = [Sent("embedding", "all_reduce", passes, whole)]
    if spread.sequence_parallel:
        gathers = passes * regions + again * 2 * layers + regions
        scatters = passes * regions + again_out[spread.checkpointing] + backward_in
        sent += [
            Sent("layers", "all_gather", gathers, stream),
            Sent("layers", "reduce_scatter", scatters, stream),
            Sent("sequence", "all_gather", passes + again, stream),
        ]
    else:
        sums = passes * regions + again_out[spread.checkpointing] + backward_in
        sent.append(Sent("layers", "all_reduce", sums, stream))
    sent += [
        Sent("adapters", "all_reduce", spread.shared_adapter_sizes.count(size), 4 * size)
        for size in sorted(set(spread.shared_adapter_sizes))
    ]
    return [*sent, *_head_traffic(spread, batch)]


def update_traffic(spread: Spread, dp_size: int = 1) -> list[Sent]:
    """One update: the first rank's gradients of what all hold, of its data-parallel part of them.

    Args:
        spread: of the model.
        dp_size: parts into which ZeRO 1 to 3 cut them; 1 at stage 0.
    """
    size = 4 * math.ceil(sum(spread.shared_adapter_sizes) / dp_size)
    return [Sent("update", "broadcast", 1, size)] if spread.degree > 1 and size else []


def _head_traffic(spread: Spread, batch: MicroBatch) -> list[Sent]:
    """One all-gather of numbers per row and chunk, two for jsd, and the sum of the gradient."""
    sent: list[Sent] = []
    by_kernels = spread.by_kernels and not spread.ce_by_entropy and not spread.kl_by_entropy
    number_bytes, per_row, per_row_of_jsd = (4, 6, 2) if by_kernels else (8, 6 + spread.is_warm, 3)
    ce_tops, kl_tops = (ENTROPY_NUMBERS * by for by in (spread.ce_by_entropy, spread.kl_by_entropy))
    with_kl = batch.num_kl + batch.num_prompt
    groups = [
        (with_kl, per_row + ce_tops + kl_tops, spread.direction == "jsd"),
        (batch.num_targets - batch.num_kl, 2 + ce_tops, False),
        (batch.num_selected_from, 2, False),
    ]
    for rows, numbers, is_jsd in groups:
        if not rows:
            continue
        chunk = math.ceil(rows / math.ceil(rows / spread.chunk_tokens))
        full, rest = divmod(rows, chunk)
        widths = [numbers, *([per_row_of_jsd] if is_jsd else [])]
        for width in widths:
            each = number_bytes * width * spread.degree
            sent.append(Sent("head", "all_gather", full, each * chunk))
            if rest:
                sent.append(Sent("head", "all_gather", 1, each * rest))
    if not batch.num_targets + batch.num_prompt:
        return sent
    rows = batch.num_targets + batch.num_prompt + batch.num_idle
    return [*sent, Sent("head", "all_reduce", 1, 4 * rows * spread.hidden_size)]
