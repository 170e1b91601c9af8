"""Cross-entropy and masked KL of one chunk of logits, or of one rank's shard of them, closed form.

Holds the options of the loss, what becomes of the target, how much a token weighs, the shards and
their one collective, and the gradient; knows no reduction, no autograd and no hidden states
(rows.py, head.py). Derivations, and the equations that comments number: docs/loss.md.

Legend: C tokens of the chunk, v this rank's columns without padding, P ranks, K the numbers a rank
sends per token, `_C1` a column. For one token: s the policy's logits, e the reference's minus the
policy's (both over the temperature inside a KL), y the target, p and q the policy's and the
reference's probabilities, d = log q - log p, k = q - p. The sums never contain y (`mask_target_`):
with a mask that is the definition, without one y joins as a shard of its own. So nothing is ever
subtracted, and a target of probability 1 - 1e-12 costs no digit. A row without a target has its KL
over every column, with a mask as without one, and no cross-entropy: its id is negative, no shard's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from moored.loss.softmax_pair import NEG_INF, Contrast, contrast_, exact_dtype, jsd_terms, softmax_

Direction = Literal["forward", "reverse", "jsd"]
CEWeighting = Literal["uniform", "probability", "entropy"]
KLWeighting = Literal["uniform", "entropy"]
RestFactor = Literal["one", "base"]

NUM_TOPS = 20  # first choices whose entropy weighs a token
NO_TARGET = -1  # as any negative id: a row's KL is over every column, and nothing is learned


@dataclass(frozen=True, slots=True)
class VocabShard:
    """The vocabulary rows [start, stop) that this rank owns.

    Args:
        start: first vocabulary id owned.
        stop: one past the last id owned; may exceed `vocab_size`, the rest being padding.
        vocab_size: number of real ids; columns at or past it take part in nothing.
        group: the process group whose shards tile the vocabulary; None means one rank.
    """

    start: int
    stop: int
    vocab_size: int
    group: Any = None

    def __post_init__(self) -> None:
        if self.vocab_size < 2:
            raise ValueError(f"vocab_size={self.vocab_size}: at least 2 ids are needed")
        if not 0 <= self.start <= self.stop:
            raise ValueError(f"shard [{self.start}, {self.stop}): 0 <= start <= stop is needed")
        if self.world_size == 1 and (self.start > 0 or self.stop < self.vocab_size):
            raise ValueError(
                f"shard [{self.start}, {self.stop}) of vocab_size={self.vocab_size} on one rank: "
                "it must cover the vocabulary, or group must name the ranks that hold the rest"
            )

    @property
    def width(self) -> int:
        """Columns held, padding included."""
        return self.stop - self.start

    @property
    def num_valid(self) -> int:
        """Columns held that are real vocabulary ids."""
        return max(0, min(self.stop, self.vocab_size) - self.start)

    @property
    def world_size(self) -> int:
        """Ranks that share the vocabulary."""
        return 1 if self.group is None else dist.get_world_size(self.group)

    @property
    def rank(self) -> int:
        """This rank's place in the group."""
        return 0 if self.group is None else dist.get_rank(self.group)


@dataclass(frozen=True, slots=True)
class Objective:
    """The options of the loss, all of them: what is descended, but for the factors of its parts.

    Args:
        direction: of the KL, KL(q || p) for "forward", KL(p || q) for "reverse", or "jsd".
        mask_target: remove the target from both distributions of the KL and renormalise (TMKL).
        temperature: divides the logits in the KL, which is multiplied by its square.
        ce_weighting: how targets weigh in the cross-entropy: "probability" by p_y, as in DFT (arXiv
            2508.05629) and ASFT (2509.23753); "entropy" by that of the policy's first choices, as
            in EAFT (2601.02151).
        kl_weighting: how rows weigh in the KL: "entropy" by that of the reference's first choices.
        first_tokens: targets at the start of each answer whose KL has a factor of its own.
        first_tokens_factor: that factor.
        target_weight: of the KL between (target, rest) of both models, which the mask leaves out.
        rest_factor: what multiplies the masked KL, that within the rest: "base": the reference's
            probability of the rest, as in KL(q || p), which it is with a target_weight of 1.
    """

    direction: Direction = "forward"
    mask_target: bool = True
    temperature: float = 1.0
    ce_weighting: CEWeighting = "uniform"
    kl_weighting: KLWeighting = "uniform"
    first_tokens: int | None = None
    first_tokens_factor: float = 1.0
    target_weight: float = 0.0
    rest_factor: RestFactor = "one"

    @property
    def is_split(self) -> bool:
        """Whether the KL is put together of its parts: target against rest, and within the rest."""
        return self.target_weight != 0 or self.rest_factor != "one"

    @property
    def weighs_by_models(self) -> bool:
        """Whether tokens weigh differently by what the models say of them."""
        return (self.ce_weighting, self.kl_weighting) != ("uniform", "uniform")

    def kl_weights(self, place_N: Tensor) -> Tensor | None:
        """A weight of each row's KL by its target's place in its answer, from 0; None: all 1."""
        if not self.first_tokens:
            return None
        return torch.where(place_N < self.first_tokens, self.first_tokens_factor, 1.0)

    def __post_init__(self) -> None:
        if self.direction not in ("forward", "reverse", "jsd"):
            raise ValueError(f"direction={self.direction!r}: expected forward, reverse or jsd")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f"temperature={self.temperature}: a finite number > 0 is needed")
        if not (math.isfinite(self.target_weight) and self.target_weight >= 0):
            raise ValueError(f"target_weight={self.target_weight}: a finite number >= 0 is needed")
        if self.rest_factor not in ("one", "base"):
            raise ValueError(f"rest_factor={self.rest_factor!r}: expected one or base")
        if self.is_split and not (self.mask_target and self.direction == "forward"):
            raise ValueError(
                f"target_weight={self.target_weight} and rest_factor={self.rest_factor!r} with "
                f"direction={self.direction!r} and mask_target={self.mask_target}: they are parts "
                "of the forward KL with a mask"
            )


class Scales(NamedTuple):
    """Factors of the sums in the loss, numbers or on the device.

    Attributes:
        ce: of the cross-entropies.
        kl: of the KLs at rows with a target.
        prompt: of the KLs at rows without one.
    """

    ce: float | Tensor = 1.0
    kl: float | Tensor = 0.0
    prompt: float | Tensor = 0.0


# ---------------------------------------------------------------- shards of columns


class TargetAgainstRest(NamedTuple):
    """The target against the rest, [C], and of the KL within the rest its factor."""

    kl_C: Tensor  # forward, of the two of them
    k_y_C: Tensor  # q_y - p_y
    rest_C: Tensor | float  # times the masked KL: 1 - q_y, or 1


class Whole(NamedTuple):
    """All shards put together, in fp64."""

    ce_C: Tensor
    miss_C: Tensor  # 1 - p_y at temperature 1, to full relative accuracy
    log_rest_C: Tensor  # log sum exp(s) without y, at temperature 1
    share_CP: Tensor  # the shards' shares of that sum
    kl: Contrast | None = None
    # What p, k and d are to a column, for the shards; without a mask y is the last, at index P.
    p_CP: Tensor = torch.empty(0)
    k_CP: Tensor = torch.empty(0)
    d_CP: Tensor = torch.empty(0)
    kl_reverse_CP: Tensor = torch.empty(0)  # within each
    split: TargetAgainstRest | None = None


def all_gather(stats_KC: Tensor, shard: VocabShard) -> Tensor:
    """Every rank's stats as [P, K, C]: the one collective of a chunk."""
    if shard.world_size == 1:
        return stats_KC.unsqueeze(0)
    out_PKC = stats_KC.new_empty((shard.world_size, *stats_KC.shape))
    flat = out_PKC.view(-1), stats_KC.reshape(-1)
    # Its successor all_gather_single is absent from the older releases that we support.
    dist.all_gather_into_tensor(*flat, group=shard.group)  # pyright: ignore
    return out_PKC


def mask_target_(s_Cv: Tensor, y_C1: Tensor, own_C1: Tensor) -> Tensor:
    """Mask the target: its logit becomes -inf, so that no sum has it; returns what it was, [C].

    Taken off the sums afterwards, a target of probability near 1 would leave them no digit (eq. 5).
    Where it is another rank's, nothing is changed and -inf is returned.
    """
    return _take_(s_Cv, y_C1, own_C1, leave=NEG_INF, absent=NEG_INF)


def summarise_(
    s_Cv: Tensor, e_Cv: Tensor | None, targets_C: Tensor, objective: Objective, shard: VocabShard
) -> tuple[Tensor, list[Tensor]]:
    """Reduce this rank's logits to the K numbers per token that it sends.

    Overwrites s with the shard's own p and e with k (reverse: p d), normalised within the shard.
    Returns the numbers [K, C], fp64 so that a large common offset costs nothing (s_y; log mass at
    temperature 1; with a KL: e_y, log ratio, both KLs, log mass at its temperature if that is not
    1), and further buffers: p at temperature 1 if that is not the KL's; d for jsd.
    """
    num_rows = s_Cv.shape[0]
    y_C1, own_C1 = _own_column(targets_C, shard)
    s_y_C = mask_target_(s_Cv, y_C1, own_C1)
    more: list[Tensor] = []
    if e_Cv is None:
        mass_C1 = s_Cv.new_empty((num_rows, 1), dtype=exact_dtype(s_Cv))
        each_block(s_Cv, lambda rows: mass_C1[rows].copy_(softmax_(s_Cv[rows])))
        return torch.stack([s_y_C.to(mass_C1.dtype), mass_C1.squeeze(1)]), more
    warm = objective.temperature != 1.0
    if warm:
        more.append(s_Cv.clone())
        s_Cv.div_(objective.temperature)
        e_Cv.div_(objective.temperature)
    e_y_C = _take_(e_Cv, y_C1, own_C1, leave=0.0, absent=0.0)
    if objective.direction == "jsd":
        more.append(torch.empty_like(s_Cv))
    # fp64: g is a difference of these (eq. 5), which an offset of all logits would cost its digits.
    stats_CK = s_Cv.new_zeros((num_rows, 7), dtype=exact_dtype(s_Cv))
    stats_CK[:, 0] = s_y_C
    stats_CK[:, 2] = e_y_C
    largest = s_Cv[next(row_blocks(s_Cv))].shape
    spare: list[Tensor] = []  # one per thread

    def work(rows: slice) -> None:
        scratch_4Cv = spare.pop() if spare else s_Cv.new_empty((4, *largest))
        d_Cv, part = contrast_(s_Cv[rows], e_Cv[rows], scratch_4Cv)
        stats_CK[rows, 3:6] = torch.cat([part.log_ratio, part.kl_forward, part.kl_reverse], -1)
        stats_CK[rows, 6:] = part.log_mass
        stats_CK[rows, 1:2] = softmax_(more[0][rows]) if warm else part.log_mass
        if objective.direction == "reverse":
            torch.mul(s_Cv[rows], d_Cv, out=e_Cv[rows])
        elif objective.direction == "jsd":
            more[-1][rows] = d_Cv
        spare.append(scratch_4Cv)

    each_block(s_Cv, work)
    return stats_CK.t()[: 7 if warm else 6].contiguous(), more


def combine(stats_PKC: Tensor, objective: Objective) -> Whole:
    """Put the shards together: each shard is to the whole what a column is to its shard.

    KL(q || p) = sum_r Q_r KL_r + KL(Q || P) over the shards' masses P and Q (eq. 14), the latter by
    the same `contrast_`; so no digit is lost here either.
    """
    s_y_C = stats_PKC[:, 0].amax(0)
    log_rest_C = stats_PKC[:, 1].logsumexp(0)
    # CE and 1 - p_y by g, the log odds against y (eq. 5): by a p_y near 1 they would keep no digit.
    gap_C = log_rest_C - s_y_C
    ce_C = torch.logaddexp(gap_C, torch.zeros_like(gap_C))
    miss_C = torch.sigmoid(gap_C)
    share_PC = torch.where(log_rest_C == NEG_INF, 0.0, stats_PKC[:, 1].softmax(0))
    if stats_PKC.shape[1] == 2:
        return Whole(ce_C, miss_C, log_rest_C, share_PC.t())
    temperature = objective.temperature
    x_CP = stats_PKC[:, -1 if temperature != 1.0 else 1].t().clone()
    e_CP = stats_PKC[:, 3].t().clone()
    kl_forward_CP, kl_reverse_CP = stats_PKC[:, 4].t(), stats_PKC[:, 5].t()
    if not objective.mask_target:  # then y joins, as one more shard, with no KL within it
        x_CP = torch.cat([x_CP, s_y_C.unsqueeze(1) / temperature], 1)
        e_CP = torch.cat([e_CP, stats_PKC[:, 2].sum(0).unsqueeze(1)], 1)
        kl_forward_CP = torch.nn.functional.pad(kl_forward_CP, (0, 1))
        kl_reverse_CP = torch.nn.functional.pad(kl_reverse_CP, (0, 1))
    d_CP, kl = contrast_(x_CP, e_CP)
    p_CP, k_CP = x_CP, e_CP
    # KLs between the shards and within them, all terms >= 0 (eq. 14): nothing cancels.
    forward_C1 = kl.kl_forward + ((p_CP + k_CP) * kl_forward_CP).sum(1, keepdim=True)
    reverse_C1 = kl.kl_reverse + (p_CP * kl_reverse_CP).sum(1, keepdim=True)
    kl = kl._replace(kl_forward=forward_C1, kl_reverse=reverse_C1)
    split = _split(s_y_C / temperature, stats_PKC[:, 2].sum(0), kl, objective)
    return Whole(ce_C, miss_C, log_rest_C, share_PC.t(), kl, p_CP, k_CP, d_CP, kl_reverse_CP, split)


def _split(
    s_y_C: Tensor, e_y_C: Tensor, rest: Contrast, objective: Objective
) -> TargetAgainstRest | None:
    """The target, by its logits over the temperature, against the rest of the vocabulary (eq. 21).

    Two columns as any: compared by `contrast_`, so that their KL and k_y lose no digit.
    """
    if not objective.is_split:
        return None
    mass_C, ratio_C = rest.log_mass.squeeze(1), rest.log_ratio.squeeze(1)
    p_C2, k_C2 = torch.stack([mass_C, s_y_C], 1), torch.stack([ratio_C, e_y_C], 1)
    _, both = contrast_(p_C2, k_C2)
    rest_C = 1.0
    if objective.rest_factor == "base":
        rest_C = torch.sigmoid(
            (mass_C - s_y_C) + (ratio_C - e_y_C)
        )  # 1 - q_y is 0 too soon (eq. 5)
    return TargetAgainstRest(both.kl_forward.squeeze(1), k_C2[:, 1], rest_C)


class ChunkLoss(NamedTuple):
    """Per token, fp64 [C]: cross-entropy and KL, unweighted; the objective's weights of both."""

    ce_C: Tensor
    kl_C: Tensor | None
    ce_factor_C: Tensor | float = 1.0
    kl_factor_C: Tensor | float = 1.0


def chunk_loss_(
    s_Cv: Tensor,
    e_Cv: Tensor | None,
    targets_C: Tensor,
    objective: Objective,
    shard: VocabShard,
    ce_weight: float | Tensor,
    kl_weight: float | Tensor,
) -> ChunkLoss:
    """Per-token cross-entropy and KL of one chunk; s is overwritten with the gradient.

    Args:
        s_Cv: this rank's policy logits without padding, fp32 or fp64.
        e_Cv: reference minus policy logits, overwritten; None for cross-entropy alone.
        targets_C: global ids; negative where there is none, so that there is a KL alone.
        objective: what is descended.
        shard: whose columns these are.
        ce_weight: weight of the cross-entropy in the gradient; a number, or one per token.
        kl_weight: weight of the KL in the gradient; a number, or one per token.
    """
    tops_KC = _tops(s_Cv, e_Cv, objective)
    stats_KC, more = summarise_(s_Cv, e_Cv, targets_C, objective, shard)
    num_stats = len(stats_KC)
    stats_PKC = all_gather(torch.cat([stats_KC, *tops_KC]) if tops_KC else stats_KC, shard)
    whole = combine(stats_PKC[:, :num_stats], objective)
    # Without a target s_y is -inf: right for the KL, but the cross-entropy would be infinite.
    ce_C, miss_C = (torch.where(targets_C >= 0, x, 0.0) for x in (whole.ce_C, whole.miss_C))
    whole = whole._replace(ce_C=ce_C, miss_C=miss_C)
    ce_factor_C = _ce_factors(objective.ce_weighting, whole.ce_C, stats_PKC[:, num_stats:])
    kl_factor_C = _kl_factors(objective.kl_weighting, stats_PKC[:, num_stats:])
    ce_weight, kl_weight = ce_factor_C * ce_weight, kl_factor_C * kl_weight
    kl_weight_acts = isinstance(kl_weight, Tensor) or kl_weight != 0
    r, p_CP, k_CP, d_CP = shard.rank, whole.p_CP, whole.k_CP, whole.d_CP
    # Gradient = a p1 + b k + c p, with p1 the shard's own p at temperature 1: coefficients a, b, c
    # by row (eq. 15), and y's own entry by itself: -sigma(g), since p_y - 1 is 0 as soon as p_y
    # rounds to 1 (eq. 5). `sum` is what the KL's part sums to over each shard.
    a_C = ce_weight * whole.share_CP[:, r] * whole.miss_C
    y_C = -ce_weight * whole.miss_C
    kl_C = None
    if e_Cv is not None and whole.kl is not None:
        t = objective.temperature
        w = kl_weight * t
        w_C1 = w.unsqueeze(1) if isinstance(w, Tensor) and w.dim() else w
        sum_CP = None  # forward: b k + c p loses nothing, k having full accuracy already (eq. 8)
        if objective.direction == "forward":
            kl_C = whole.kl.kl_forward.squeeze(1)
            b_C, c_CP = -w * (p_CP + k_CP)[:, r], -w_C1 * k_CP
            if whole.split is not None:  # eq. 22
                pull_C = w * objective.target_weight * whole.split.k_y_C
                kl_C = whole.split.rest_C * kl_C + objective.target_weight * whole.split.kl_C
                b_C, rest_C = whole.split.rest_C * b_C, whole.split.rest_C
                c_CP = c_CP * (rest_C.unsqueeze(1) if isinstance(rest_C, Tensor) else rest_C)
                c_CP = c_CP + pull_C.unsqueeze(1) * p_CP
                y_C = y_C - pull_C if kl_weight_acts else y_C
        elif objective.direction == "reverse":
            kl_C = whole.kl.kl_reverse.squeeze(1)
            b_C, c_CP = -w * p_CP[:, r], -w_C1 * p_CP * (d_CP + kl_C.unsqueeze(1))
            # Where p is nearly 1, d and -KL are nearly equal: closed by the other shards' (eq. 12).
            sum_CP = _closed(c_CP + w_C1 * p_CP * whole.kl_reverse_CP, p_CP)
        else:
            kl_C, b_C, c_CP, sum_CP = _jsd_(s_Cv, e_Cv, more[-1], whole, objective, shard)
            b_C, c_CP, sum_CP = w * b_C, w_C1 * c_CP, w_C1 * _closed(sum_CP, p_CP)
        if not objective.mask_target and kl_weight_acts:
            y_C = y_C + (c_CP if sum_CP is None else sum_CP)[:, -1]
        kl_C = kl_C * t**2
        p1_Cv = s_Cv if t == 1.0 else more[0]
        a_C1, b_C1, c_C1 = (_column(x, s_Cv) for x in (a_C, b_C, c_CP[:, r]))
        sum_C1 = None if sum_CP is None else _column(sum_CP[:, r], s_Cv)

        def work(rows: slice) -> None:
            if not kl_weight_acts:  # a KL that is not finite would give 0 * nan
                torch.mul(p1_Cv[rows], a_C1[rows], out=s_Cv[rows])
                return
            part_Cv = e_Cv[rows].mul_(b_C1[rows]).addcmul_(s_Cv[rows], c_C1[rows])
            if sum_C1 is not None and part_Cv.shape[1]:  # the same at the largest column (eq. 12)
                top_C1 = s_Cv[rows].argmax(-1, keepdim=True)
                missing_C1 = sum_C1[rows] - part_Cv.sum(-1, keepdim=True)
                part_Cv.scatter_add_(1, top_C1, missing_C1)
            torch.addcmul(part_Cv, p1_Cv[rows], a_C1[rows], out=s_Cv[rows])

        each_block(s_Cv, work)
    else:
        s_Cv.mul_(_column(a_C, s_Cv))
    column_C1, own_C1 = _own_column(targets_C, shard)
    if s_Cv.shape[1]:
        rest_C1 = s_Cv.gather(1, column_C1)
        s_Cv.scatter_(1, column_C1, torch.where(own_C1, _column(y_C, s_Cv), rest_C1))
    return ChunkLoss(whole.ce_C, kl_C, ce_factor_C, kl_factor_C)


def _closed(sum_CP: Tensor, p_CP: Tensor) -> Tensor:
    """The shards' sums of a gradient that sums to 0: the largest shard's as minus the others'.

    Its own is a difference of numbers of order 1 that are nearly equal where p_CP is nearly 1
    (eq. 12).
    """
    top_C1 = p_CP.argmax(1, keepdim=True)
    others_CP = sum_CP.scatter(1, top_C1, 0.0)
    return others_CP.scatter(1, top_C1, -others_CP.sum(1, keepdim=True))


def _jsd_(
    p_Cv: Tensor, k_Cv: Tensor, d_Cv: Tensor, whole: Whole, objective: Objective, shard: VocabShard
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """JSD [C]; the gradient's coefficients of k [C], here p log(m / p), and of p [C, P]; its sums.

    The sums [C, P] are those over each shard's columns.
    """
    r = shard.rank
    sums_3C = whole.p_CP.new_zeros((3, p_Cv.shape[0]))
    p_C, q_C, d_C = whole.p_CP[:, r], (whole.p_CP + whole.k_CP)[:, r], whole.d_CP[:, r]

    def work(rows: slice) -> None:
        d, p = d_Cv[rows], p_Cv[rows]
        # Where q is far below p, k is nearly -p, and p + k would have lost its digits (eq. 8).
        q = torch.where(d < -1, p * d.exp(), p + k_Cv[rows]) * _column(q_C[rows], p_Cv)
        p = p * _column(p_C[rows], p_Cv)
        d = d.add_(_column(d_C[rows], d_Cv))
        to_p, to_q, k_Cv[rows] = jsd_terms(p, q, d)
        for i, values in enumerate((to_p, to_q, k_Cv[rows])):
            sums_3C[i, rows] = values.sum(-1)

    each_block(p_Cv, work)
    sums_P3C = all_gather(sums_3C, shard)
    sums_2C, pa_CP = sums_P3C[:, :2].sum(0), sums_P3C[:, 2].t()
    c_CP = torch.zeros_like(whole.p_CP)
    if not objective.mask_target:
        p, k, d = whole.p_CP[:, -1], whole.k_CP[:, -1], whole.d_CP[:, -1]
        to_p, to_q, pa_C = jsd_terms(p, p + k, d)
        sums_2C = sums_2C + torch.stack([to_p, to_q])
        c_CP[:, -1] = -0.5 * pa_C
        pa_CP = torch.nn.functional.pad(pa_CP, (0, 1))
    c_CP = c_CP - 0.5 * whole.p_CP * sums_2C[0].unsqueeze(1)
    return 0.5 * sums_2C.sum(0), torch.full_like(sums_2C[0], -0.5), c_CP, c_CP - 0.5 * pa_CP


# ---------------------------------------------------------------- how much a token weighs
#
# By what the models say of it, in full: constants to the gradient, which is linear in them.


def _tops(s_Cv: Tensor, e_Cv: Tensor | None, objective: Objective) -> list[Tensor]:
    """What a rank sends for the weights: first choices' logits, [NUM_TOPS, C] each, in fp64.

    The policy's for the cross-entropy come first, then the reference's for the KL.
    """
    found: list[Tensor] = []
    if objective.ce_weighting == "entropy":
        found.append(_top_logits(s_Cv))
    if objective.kl_weighting == "entropy" and e_Cv is not None:
        found.append(_top_logits(s_Cv + e_Cv))
    return found


def _top_logits(s_Cv: Tensor) -> Tensor:
    num_tops = min(NUM_TOPS, s_Cv.shape[1])
    top_CK = s_Cv.topk(num_tops, dim=1).values.to(exact_dtype(s_Cv))
    return torch.nn.functional.pad(top_CK, (0, NUM_TOPS - num_tops), value=NEG_INF).t()


def _ce_factors(weighting: CEWeighting, ce_C: Tensor, tops_PKC: Tensor) -> Tensor | float:
    """Each token's weight in the cross-entropy, [C] or 1; `tops_PKC` of all ranks."""
    if weighting == "probability":
        return torch.exp(-ce_C)
    return _top_entropy(tops_PKC[:, :NUM_TOPS]) if weighting == "entropy" else 1.0


def _kl_factors(weighting: KLWeighting, tops_PKC: Tensor) -> Tensor | float:
    """Each token's weight in the KL, [C] or 1; `tops_PKC` of all ranks, empty without a KL."""
    if weighting == "uniform" or not tops_PKC.shape[1]:
        return 1.0
    return _top_entropy(tops_PKC[:, -NUM_TOPS:])


def _top_entropy(tops_PKC: Tensor) -> Tensor:
    """Entropy of the first choices of all shards together, over its greatest value (eq. 16)."""
    top_CK = tops_PKC.permute(2, 0, 1).flatten(1).topk(NUM_TOPS, dim=1).values
    log_p_CK = top_CK.log_softmax(1)
    terms_CK = torch.where(log_p_CK == NEG_INF, 0.0, log_p_CK.exp() * log_p_CK)
    return -terms_CK.sum(1) / math.log(NUM_TOPS)


# ---------------------------------------------------------------- rows and columns


def row_blocks(x_Cv: Tensor) -> Iterator[slice]:
    """Row slices small enough for the elementwise passes over them to stay in a cache."""
    size = 2**25 if x_Cv.is_cuda else 2**19
    step = max(1, size // max(1, x_Cv.shape[1]))
    return (slice(i, i + step) for i in range(0, x_Cv.shape[0], step))


def each_block(x_Cv: Tensor, work: Callable[[slice], object]) -> None:
    """Call `work` on every row block of x; on a CPU one thread works on one block.

    The passes over a block take some 50 microseconds each. Split over threads one by one they wait
    for the slowest thread every time, which on a shared machine costs ten times the work.
    """
    blocks, num_threads = list(row_blocks(x_Cv)), torch.get_num_threads()
    workers = 1 if x_Cv.is_cuda else min(len(blocks), num_threads, 16)
    if workers <= 1:
        for rows in blocks:
            work(rows)
        return
    inference = torch.is_inference_mode_enabled()

    def alone(rows: slice) -> None:
        with torch.inference_mode(inference), torch.no_grad():
            work(rows)

    try:  # set_num_threads is the calling thread's own, but for the default of later threads
        with ThreadPoolExecutor(workers, "blocks", torch.set_num_threads, (1,)) as pool:
            list(pool.map(alone, blocks))
    finally:
        torch.set_num_threads(num_threads)


def _column(x_C: Tensor, like: Tensor) -> Tensor:
    return x_C.to(like.dtype).unsqueeze(1)


def _own_column(targets_C: Tensor, shard: VocabShard) -> tuple[Tensor, Tensor]:
    """The target's column in this shard (0 where it is another's), and whether it is ours."""
    column_C1 = (targets_C - shard.start).unsqueeze(1)
    own_C1 = (column_C1 >= 0) & (column_C1 < shard.num_valid)
    return torch.where(own_C1, column_C1, 0), own_C1


def _take_(x_Cv: Tensor, y_C1: Tensor, own_C1: Tensor, *, leave: float, absent: float) -> Tensor:
    """Take the target's entry out of each row that has it, leaving `leave` there."""
    if x_Cv.shape[1] == 0:
        return x_Cv.new_full((x_Cv.shape[0],), absent)
    entry_C1 = x_Cv.gather(1, y_C1)
    x_Cv.scatter_(1, y_C1, torch.where(own_C1, leave, entry_C1))
    return torch.where(own_C1, entry_C1, absent).squeeze(1)
