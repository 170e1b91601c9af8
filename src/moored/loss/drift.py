"""How far a policy is from its reference, row by row, and what both predict where it is most.

For evaluation: no gradient. The projections are logits.py's, the arithmetic divergence.py's;
equations are numbered in docs/loss.md.

Legend: N rows, S spots, K tokens of a spot, C the rows of one chunk, v this rank's columns, P
ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from moored.loss.chunks import chunk_size
from moored.loss.divergence import Objective, VocabShard, all_gather, combine, summarise_
from moored.loss.logits import Logits
from moored.loss.rows import Rows, compute_dtype

NUM_CHOICES = 5  # of each model, at a spot
MOST_PER_GROUP = 2  # of the rows that are looked at closely


@dataclass(frozen=True)
class Spots:
    """The S rows that drift most, and K tokens of each: first choices of either model.

    A token that both prefer stands twice.
    """

    rows: Tensor  # [S], by falling drift
    tokens: Tensor  # [S, K]
    log_p_policy: Tensor  # [S, K]
    log_p_reference: Tensor  # [S, K]


@dataclass(frozen=True)  # without slots: ZeRO-3's forward hook looks into outputs with vars()
class DriftSums:
    """Per row [N]: how far the policy is from the reference, in nats, and what both predict."""

    ce_policy: Tensor
    ce_reference: Tensor
    kl: Tensor  # forward KL over the whole vocabulary
    tmkl: Tensor  # forward KL without the target
    top1_agree: Tensor  # bool: policy and reference have the same first choice
    top1_correct: Tensor  # bool: the policy's first choice is the target
    top1_correct_reference: Tensor  # bool: the reference's is
    spots: Spots | None = None


def drift(
    logits: Logits,
    hidden: Tensor,
    reference_hidden: Tensor,
    targets: Tensor,
    chunk_tokens: int | None = None,
    num_spots: int = 0,
    groups: Tensor | None = None,
    reference_logits: Logits | None = None,
) -> DriftSums:
    """Compare policy and reference at every row.

    Args:
        logits: the head, of the policy.
        hidden: the policy's hidden states, [N, D].
        reference_hidden: the reference's.
        targets: global ids, [N].
        chunk_tokens: rows at a time; None: a default.
        num_spots: look at as many rows that drift most.
        groups: [N], of which each has `MOST_PER_GROUP` of these rows at most.
        reference_logits: the reference's head; None: the policy's.
    """
    objective = Objective()
    plain = Objective(mask_target=False)
    shard, num_rows = logits.shard, len(targets)
    dtype = compute_dtype(hidden, reference_hidden, logits.weight_vD)
    columns: list[tuple[Tensor, ...]] = []
    size = chunk_size(chunk_tokens, num_rows, logits)
    buffer = logits.new_buffer(2 * min(size, num_rows), dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        for i in range(0, num_rows, size):
            rows: Rows = slice(i, i + size)
            both = hidden[rows], reference_hidden[rows]
            s_Cv, e_Cv = _project(logits, reference_logits, *both, dtype, buffer)
            top_4C = torch.cat([_top1(s_Cv, shard), _top1(s_Cv + e_Cv, shard)])
            stats_KC, _ = summarise_(s_Cv, e_Cv, targets[rows], objective, shard)
            num_stats = len(stats_KC)
            stats_PKC = all_gather(torch.cat([stats_KC, top_4C.to(stats_KC.dtype)]), shard)
            masked = combine(stats_PKC[:, :num_stats], objective)
            whole = combine(stats_PKC[:, :num_stats], plain)
            assert masked.kl is not None
            assert whole.kl is not None
            log_ratio = masked.kl.log_ratio.squeeze(1)
            # The reference's g (eq. 5) is the policy's plus what e adds: equal if the models are.
            gap_C = masked.log_rest_C + log_ratio
            gap_C = gap_C - stats_PKC[:, 0].amax(0) - stats_PKC[:, 2].sum(0)
            tops_PC = stats_PKC[:, num_stats::2], stats_PKC[:, num_stats + 1 :: 2]
            best_2C = tops_PC[0].argmax(0, keepdim=True)
            ids_2C = tops_PC[1].gather(0, best_2C).squeeze(0)
            columns.append(
                (
                    masked.ce_C,
                    torch.logaddexp(gap_C, torch.zeros_like(gap_C)),
                    whole.kl.kl_forward.squeeze(1),
                    masked.kl.kl_forward.squeeze(1),
                    ids_2C[0] == ids_2C[1],
                    ids_2C[0] == targets[rows],
                    ids_2C[1] == targets[rows],
                )
            )
    empty = torch.zeros(0, dtype=torch.float64, device=hidden.device)
    parts = list(zip(*columns, strict=True)) or [(empty,)] * 4 + [(empty.bool(),)] * 3
    a, b, c, d, e, f, g = (torch.cat(part) for part in parts)
    found = DriftSums(a, b, c, d, e, f, g)
    if not num_spots or not columns:
        return found
    most = _most(found.kl, groups)[:num_spots]
    heads = logits, reference_logits
    spots = _choices(*heads, hidden[most], reference_hidden[most], most, dtype)
    return replace(found, spots=spots)


def _most(drift_N: Tensor, groups_N: Tensor | None) -> Tensor:
    """Rows by falling drift, few of each group."""
    order_N = drift_N.argsort(descending=True, stable=True)
    if groups_N is None:
        return order_N
    groups_N = groups_N[order_N]
    same_NG = groups_N[:, None] == groups_N.unique()
    place_N = (same_NG.cumsum(0) * same_NG).sum(1)  # within its group, from 1
    return order_N[place_N <= MOST_PER_GROUP]


def _project(
    logits: Logits,
    reference_logits: Logits | None,
    hidden: Tensor,
    reference_hidden: Tensor,
    dtype: torch.dtype,
    buffer: Tensor,
) -> tuple[Tensor, Tensor]:
    """The policy's logits, and the reference's minus the policy's, both [C, v]."""
    if reference_logits is None:
        s_Cv, e_Cv, _ = logits.project(hidden, reference_hidden, dtype, buffer)
        assert e_Cv is not None
        return s_Cv, e_Cv
    num_rows = len(hidden)
    s_Cv, _, _ = logits.project(hidden, None, dtype, buffer[:num_rows])
    e_Cv, _, _ = reference_logits.project(reference_hidden, None, dtype, buffer[num_rows:])
    return s_Cv, e_Cv.sub_(s_Cv)


def _choices(
    logits: Logits,
    reference_logits: Logits | None,
    hidden: Tensor,
    reference_hidden: Tensor,
    rows: Tensor,
    dtype: torch.dtype,
) -> Spots:
    """What policy and reference predict at S rows: both models' first choices, of all shards."""
    shard = logits.shard
    with torch.autocast(hidden.device.type, enabled=False):
        buffer = logits.new_buffer(2 * len(rows), dtype)
        both = hidden, reference_hidden
        s_Sv, e_Sv = _project(logits, reference_logits, *both, dtype, buffer)
        both_2Sv = torch.stack([s_Sv, s_Sv + e_Sv]).double()
    width = both_2Sv.shape[-1]
    here = min(NUM_CHOICES, width)
    value, index = both_2Sv.topk(here, dim=-1)
    pad = (0, NUM_CHOICES - here)
    value = nn.functional.pad(value, pad, value=float("-inf"))
    index = nn.functional.pad(index + shard.start, pad)
    mass = both_2Sv.logsumexp(-1, keepdim=True)
    sent = torch.cat([value, index.to(value.dtype), mass], dim=-1)
    every = all_gather(sent.flatten(), shard).view(-1, *sent.shape)  # [P, 2, S, 2 K + 1]
    values, ids = (part.movedim(0, 2).flatten(2) for part in every[..., :-1].chunk(2, dim=-1))
    best = values.topk(NUM_CHOICES, dim=-1).indices
    tokens_SK = torch.cat(list(ids.gather(-1, best).long()), dim=-1)
    log_mass = every[..., -1].logsumexp(0).unsqueeze(-1)
    column = tokens_SK - shard.start
    ours = (column >= 0) & (column < width)
    at = torch.where(ours, column, 0).expand(2, -1, -1)
    mine = both_2Sv.gather(-1, at) if width else values.new_zeros(at.shape)
    mine = torch.where(ours, mine, float("-inf"))
    log_p = all_gather(mine.flatten(), shard).view(-1, *mine.shape).amax(0) - log_mass
    return Spots(rows=rows, tokens=tokens_SK, log_p_policy=log_p[0], log_p_reference=log_p[1])


def _top1(s_Cv: Tensor, shard: VocabShard) -> Tensor:
    """This shard's largest logit and its id, as two rows [2, C]."""
    if s_Cv.shape[1] == 0:
        return s_Cv.new_full((2, s_Cv.shape[0]), float("-inf"))
    value_C, index_C = s_Cv.max(-1)
    return torch.stack([value_C, (index_C + shard.start).to(value_C.dtype)])
