"""Samples to batches: collation, packing, the label shift, masks, how rows are dealt to ranks.

No file, tokenizer, model or loss lives here; this module knows token ids only. Letters: B rows,
L row length, N positions of the batch that a loss looks at: its targets, or all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from moored.data.token_arrays import Sample

IGNORE_INDEX = -100


Row = list[Sample]  # the samples packed into one row of a batch, in order


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What one forward pass needs.

    Call the backbone with `input_ids`, `position_ids`, `attention_mask=None` and `use_cache=False`:
    only so does transformers read the sample boundaries from the restarting positions and keep
    packed samples apart, under sdpa and eager alike.

    Attributes:
        input_ids: int64 [B, L].
        position_ids: int64 [B, L]; restarts at 0 with each sample and, where any row of the batch
            holds several samples, with each run of padding.
        target_index: int64 [N], ascending flat positions in B * L whose *next* token is a target
            (with `all_positions`, or may be held): the label shift happens here and nowhere else.
        targets: int64 [N], the token after each of them; IGNORE_INDEX where it is not learned.
        kl_mask: bool [N], where the regulariser applies.
        sample_ids: of every sample in the batch, row by row.
        num_targets: how many are learned; N, but for `all_positions`.
        num_kl: positions of the regulariser with a target.
        num_tokens: real tokens, without padding.
        num_prompt: positions of the regulariser without a target.
        sample_lengths: of each row, of its samples and its run of padding, L in all; None where no
            row holds several.
        num_parts: ranks that share its rows; `sample_lengths` is then of the whole rows.
    """

    input_ids: Tensor
    position_ids: Tensor
    target_index: Tensor
    targets: Tensor
    kl_mask: Tensor
    sample_ids: tuple[str, ...]
    num_targets: int
    num_kl: int
    num_tokens: int
    num_prompt: int = 0
    sample_lengths: tuple[tuple[int, ...], ...] | None = None
    num_parts: int = 1

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on `device`."""
        return replace(
            self,
            input_ids=self.input_ids.to(device, non_blocking=True),
            position_ids=self.position_ids.to(device, non_blocking=True),
            target_index=self.target_index.to(device, non_blocking=True),
            targets=self.targets.to(device, non_blocking=True),
            kl_mask=self.kl_mask.to(device, non_blocking=True),
        )

    def part(self, rank: int, size: int) -> Batch:
        """The tokens of each row that one of `size` ranks has, who share them evenly and in order.

        What does not divide is filled up behind the rows. Counts are those of the part, so that
        they add up to the batch's.
        """
        if size == 1:
            return self
        rows, length = self.input_ids.shape
        more = -length % size
        share = (length + more) // size
        columns = slice(rank * share, (rank + 1) * share)
        behind = self.position_ids[:, -1:] + torch.arange(
            1, more + 1, device=self.position_ids.device
        )
        row, column = self.target_index // length, self.target_index % length - columns.start
        mine = self.part_of_targets(rank, size)
        targets, kl_mask = self.targets[mine], self.kl_mask[mine]
        learned = targets >= 0
        lengths = self.sample_lengths or ((length,),) * rows
        return replace(
            self,
            input_ids=torch.nn.functional.pad(self.input_ids, (0, more))[:, columns],
            position_ids=torch.cat([self.position_ids, behind], 1)[:, columns],
            target_index=(row * share + column)[mine],
            targets=targets,
            kl_mask=kl_mask,
            num_targets=int(learned.sum()),
            num_kl=int((kl_mask & learned).sum()),
            num_prompt=int((kl_mask & ~learned).sum()),
            num_tokens=self.num_tokens * (rank + 1) // size - self.num_tokens * rank // size,
            sample_lengths=tuple((*of, more) for of in lengths) if more else lengths,
            num_parts=size,
        )

    def part_of_targets(self, rank: int, size: int) -> Tensor:
        """Which positions [N] are of the part of one of `size` ranks, bool."""
        length = self.input_ids.shape[1]
        return (self.target_index % length) // -(-length // size) == rank

    def learning(self, kept: Tensor) -> Batch:
        """The same batch with only these of its N positions: bool [N], on its device."""
        targets, kl_mask = self.targets[kept], self.kl_mask[kept]
        learned = targets >= 0
        return replace(
            self,
            target_index=self.target_index[kept],
            targets=targets,
            kl_mask=kl_mask,
            num_targets=int(learned.sum()),
            num_kl=int((kl_mask & learned).sum()),
            num_prompt=int((kl_mask & ~learned).sum()),
        )


def collate(
    rows: Sequence[Row],
    pad_token_id: int,
    pad_to: int | None = None,
    *,
    vocab_size: int | None = None,
    all_positions: bool = False,
) -> Batch:
    """Lays rows of samples out as one batch, padded on the right.

    Padding is known by length alone, never by token id: a real end-of-sequence token stays a target
    where the tokenizer pads with it.

    Args:
        rows: the samples of each row; an empty row is all padding, no rows at all give a batch of
            one padding token without targets.
        pad_token_id: fills the rest of a row; seen by no real token.
        pad_to: row length; None takes the longest row.
        vocab_size: if given, every token id must lie in [0, vocab_size).
        all_positions: also those whose next token is not learned, for a regulariser; not the last
            of a sample, which has no next token.

    Raises:
        ValueError: a row longer than `pad_to`, masks of another length than the tokens, or a token
            id outside the vocabulary; the sample is named.
    """
    for row in rows:
        for sample in row:
            _check(sample, vocab_size)
    lengths = [sum(len(sample) for sample in row) for row in rows] or [0]
    longest = max(lengths)
    if pad_to is not None and longest > pad_to:
        ids = ", ".join(sample.sample_id for sample in rows[lengths.index(longest)])
        raise ValueError(f"pad_to={pad_to} is shorter than a row of {longest} tokens ({ids})")
    num_rows, length = len(lengths), max(pad_to or longest, 1)

    packed = any(len(row) > 1 for row in rows)
    input_ids = np.full((num_rows, length), pad_token_id, dtype=np.int64)
    # Without packing, positions run on into the padding: right padding is invisible to a causal
    # model, and unbroken positions let attention run without an explicit mask (faster on GPUs).
    position_ids = np.tile(np.arange(length, dtype=np.int64), (num_rows, 1))
    is_target = np.zeros((num_rows, length), dtype=bool)
    is_kl = np.zeros((num_rows, length), dtype=bool)
    is_seen = np.zeros((num_rows, length), dtype=bool) if all_positions else is_target
    for index, row in enumerate(rows):
        start = 0
        for sample in row:
            stop = start + len(sample)
            input_ids[index, start:stop] = sample.input_ids
            is_target[index, start + 1 : stop] = sample.label_mask[1:]
            is_kl[index, start + 1 : stop] = True if sample.kl_mask is None else sample.kl_mask[1:]
            if all_positions:
                is_seen[index, start + 1 : stop] = True
            if packed:
                position_ids[index, start:stop] = np.arange(stop - start)
            start = stop
        if packed:
            position_ids[index, start:] = np.arange(length - start)

    flat = np.flatnonzero(is_seen)  # of the targets themselves; never a sample's first token
    kl_mask, learned = is_kl.reshape(-1)[flat], is_target.reshape(-1)[flat]
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        position_ids=torch.from_numpy(position_ids),
        target_index=torch.from_numpy(flat - 1),
        targets=torch.from_numpy(np.where(learned, input_ids.reshape(-1)[flat], IGNORE_INDEX)),
        kl_mask=torch.from_numpy(kl_mask),
        sample_ids=tuple(sample.sample_id for row in rows for sample in row),
        num_targets=int(np.count_nonzero(learned)),
        num_kl=int(np.count_nonzero(kl_mask & learned)),
        num_tokens=sum(lengths),
        num_prompt=int(np.count_nonzero(kl_mask & ~learned)),
        sample_lengths=tuple(_lengths(row, length) for row in rows) if packed else None,
    )


def _lengths(row: Row, length: int) -> tuple[int, ...]:
    """Lengths of the samples, and of the padding up to `length`."""
    lengths = [len(sample) for sample in row if len(sample)]
    return (*lengths, *([rest] if (rest := length - sum(lengths)) else []))


def answer_offsets(target_index: Tensor, targets: Tensor) -> Tensor:
    """How many targets stand before each target [N] in the same run without a gap.

    A run is an answer, or a sample of plain text: between two runs stands at least one token that
    is no target. What is none is in no answer, and beyond any place in one.
    """
    learned = targets >= 0
    starts = torch.ones_like(learned)
    starts[1:] = (target_index[1:] != target_index[:-1] + 1) | ~learned[:-1]
    here = torch.arange(len(target_index), device=target_index.device)
    if not len(here):
        return here
    place = here - torch.where(starts, here, 0).cummax(0).values
    return torch.where(learned, place, torch.iinfo(place.dtype).max)


def left_padded(rows: Sequence[Sequence[int]], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """Prompts as generation needs them, padded on the left: token ids and mask, int64 [B, L]."""
    longest = max(len(row) for row in rows)
    ids = torch.full((len(rows), longest), pad_token_id, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, longest - len(row) :] = torch.tensor(row)
        mask[index, longest - len(row) :] = 1
    return ids, mask


def empty_batch(pad_token_id: int) -> Batch:
    """One padding token without targets: keeps a rank's number of forwards equal to the others'."""
    return collate([], pad_token_id)


def _check(sample: Sample, vocab_size: int | None) -> None:
    for name, mask in (("label_mask", sample.label_mask), ("kl_mask", sample.kl_mask)):
        if mask is not None and len(mask) != len(sample):
            raise ValueError(
                f"{sample.sample_id}: {name} has {len(mask)} entries for {len(sample)} tokens"
            )
    if vocab_size is None or not len(sample):
        return
    low, high = int(sample.input_ids.min()), int(sample.input_ids.max())
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"{sample.sample_id}: token id {low if low < 0 else high} is outside the model's "
            f"vocabulary of {vocab_size}: use the tokenizer that belongs to the model"
        )


def row_tokens(row: Row) -> int:
    """Real tokens of a row."""
    return sum(len(sample) for sample in row)


def pack(samples: Sequence[Sample], max_length: int) -> list[Row]:
    """Packs samples into rows of at most `max_length` tokens; see `pack_lengths`.

    Raises:
        ValueError: a sample longer than `max_length`.
    """
    for sample in samples:
        if len(sample) > max_length:
            raise ValueError(
                f"{sample.sample_id} has {len(sample)} tokens, more than max_length={max_length}"
            )
    packs = pack_lengths([len(sample) for sample in samples], max_length)
    return [[samples[index] for index in indices] for indices in packs]


def pack_lengths(lengths: Sequence[int], max_length: int) -> list[list[int]]:
    """First-fit decreasing: which items share a row.

    Within a row, and between rows by their first item, the given (shuffled) order is kept, so that
    packing does not sort the training order by length.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    rows: list[list[int]] = []
    room = np.zeros(len(lengths), dtype=np.int64)
    for index in order:
        fits = room[: len(rows)] >= lengths[index]
        slot = int(np.argmax(fits)) if fits.any() else len(rows)
        if slot == len(rows):
            rows.append([])
            room[slot] = max_length
        rows[slot].append(index)
        room[slot] -= lengths[index]
    return sorted((sorted(row) for row in rows), key=lambda row: row[0])


def deal(
    rows: Sequence[Row], *, micro_batch_size: int, dp_rank: int, dp_size: int
) -> list[list[Row]]:
    """This rank's micro-batches of a global batch.

    Rows are sorted by length (longest first, so that too large a batch fails at once) and cut into
    runs of nearly equal size: rows of like length share a micro-batch, and the ranks' work at each
    index is alike. Every rank gets the same number of micro-batches, some of them perhaps without
    rows; the union over ranks is `rows`, whatever `dp_size` and `micro_batch_size`.
    """
    if not 0 <= dp_rank < dp_size or micro_batch_size < 1:
        raise ValueError(
            f"dp_rank={dp_rank}, dp_size={dp_size}, micro_batch_size={micro_batch_size}: "
            "need 0 <= dp_rank < dp_size and micro_batch_size >= 1"
        )
    per_rank = -(-len(rows) // (micro_batch_size * dp_size))
    ordered = sorted(rows, key=lambda row: (-row_tokens(row), [sample.sample_id for sample in row]))
    share, rest = divmod(len(ordered), max(per_rank * dp_size, 1))
    runs, start = [], 0
    for index in range(per_rank * dp_size):
        stop = start + share + (index < rest)
        runs.append(ordered[start:stop])
        start = stop
    return runs[dp_rank::dp_size]


def batches_of(
    rows: Sequence[Row],
    *,
    micro_batch_size: int,
    dp_rank: int,
    dp_size: int,
    pad_token_id: int,
    vocab_size: int | None = None,
    flatten: bool = False,
    all_positions: bool = False,
) -> list[Batch]:
    """Deals rows and collates them.

    Args:
        rows: the global batch.
        micro_batch_size: rows per micro-batch, at most.
        dp_rank: this rank.
        dp_size: number of data-parallel ranks.
        pad_token_id: see `collate`.
        vocab_size: see `collate`.
        flatten: lay all samples of a micro-batch into a single row without padding. Flash attention
            2 reads sample boundaries from the positions only where there is one row.
        all_positions: see `collate`.
    """
    batches = []
    for run in deal(rows, micro_batch_size=micro_batch_size, dp_rank=dp_rank, dp_size=dp_size):
        if flatten and run:
            run = [[sample for row in run for sample in row]]
        batches.append(
            collate(run, pad_token_id, vocab_size=vocab_size, all_positions=all_positions)
        )
    return batches
