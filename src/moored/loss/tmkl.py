"""The loss on logits: cross-entropy plus target-masked KL to a reference, `tmkl_loss`.

Holds argument checks, the choice of rows, chunking, reduction and the once-differentiable result;
a chunk's arithmetic is in divergence.py and softmax_pair.py. The three import torch alone, and
know no model and no config: together they can be pasted into another trainer.

    p~_v = exp(s_v) / sum_{u != y} exp(s_u),  q~_v likewise from t,  v != y
    loss = CE(s, y) + kl_weight * KL(q~ || p~)            ("Mask the Target", arXiv 2605.29498)

Legend: T tokens, C the tokens of one chunk, V vocabulary, v this rank's columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moored.loss.divergence import Direction, Objective, VocabShard, chunk_loss_, row_blocks

__all__ = ["LossSums", "Objective", "TMKLOutput", "VocabShard", "tmkl_loss"]

Reduction = Literal["mean", "sum", "none"]
Rows = slice | Tensor

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Where only a reference logit is -inf, the log-ratio is held at this, so that 0 * inf never arises:
# forward and jsd are finite then. Reverse is not, and comes out as nan.
_LOWEST = {"forward": -1e30, "jsd": -1e30, "reverse": -math.inf}


class TMKLOutput(NamedTuple):
    """`loss` is differentiable, once; `ce` and `kl` are unweighted, detached, in nats."""

    loss: Tensor
    ce: Tensor
    kl: Tensor
    num_targets: Tensor
    num_kl: Tensor


@dataclass(frozen=True, slots=True)
class LossSums:
    """Detached sums over rows, in nats; `loss` is the scaled and weighted sum of both."""

    loss: Tensor
    ce_sum: Tensor
    kl_sum: Tensor
    num_targets: Tensor | int
    num_kl: Tensor | int


def tmkl_loss(
    policy_logits: Tensor,
    reference_logits: Tensor | None,
    targets: Tensor,
    *,
    kl_weight: float = 1.0,
    direction: Direction = "forward",
    mask_target: bool = True,
    temperature: float = 1.0,
    ignore_index: int = -100,
    kl_mask: Tensor | None = None,
    shard: VocabShard | None = None,
    reduction: Reduction = "mean",
) -> TMKLOutput:
    """Cross-entropy plus `kl_weight` times the (target-masked) KL to a reference.

    The gradient is formed in this call, in the dtype of `policy_logits`, chunk by chunk; arithmetic
    is fp32 (fp64 for fp64 logits). The backward hands that buffer over, so it works once.

    Args:
        policy_logits: [T, V], or [T, stop - start] under `shard`. Anything is allowed in padding,
            and -inf elsewhere where the reference has it too.
        reference_logits: same shape, gets no gradient; -inf means probability 0 (reverse is nan
            then, unless the policy has it too). None only when
            `kl_weight` is 0; when given with weight 0, the KL is still reported.
        targets: int64 [T], global ids aligned with the rows; `ignore_index` where nothing applies.
        kl_weight: finite, >= 0.
        direction: "forward" KL(q || p), "reverse" KL(p || q), or "jsd", p being the policy.
        mask_target: remove the target from both distributions and renormalise.
        temperature: divides the logits in the KL, which is multiplied by its square.
        ignore_index: the target that marks a row as ignored.
        kl_mask: bool [T], rows where the KL applies (all by default); ignored rows never count.
        shard: this rank's columns of the vocabulary.
        reduction: "mean": ce_sum / num_targets + kl_weight * kl_sum / num_kl; "sum"; or "none",
            per row and 0 where ignored.

    Returns:
        TMKLOutput, the same on every rank of the shard's group.

    Raises:
        ValueError: shapes, dtypes, ranges or options do not fit; names the argument.
    """
    goal = Objective(direction, mask_target, temperature)
    if policy_logits.dim() != 2:
        raise ValueError(f"policy_logits has shape {_shape(policy_logits)}: [T, V] is needed")
    width = policy_logits.shape[1]
    shard = VocabShard(0, width, width) if shard is None else shard
    if width != shard.width:
        raise ValueError(
            f"policy_logits has shape {_shape(policy_logits)}, but shard [{shard.start}, "
            f"{shard.stop}) holds {shard.width} columns"
        )
    named = ("policy_logits", policy_logits), ("reference_logits", reference_logits)
    kl_weight = check_rows(named, targets, kl_mask, kl_weight, reduction)
    plan = RowPlan.of(
        targets, kl_mask, ignore_index, shard.vocab_size, with_kl=reference_logits is not None
    )
    ce_scale, kl_scale = plan.scales(kl_weight, reduction)
    # Stored over a row's largest scale: so a fp16 gradient does not underflow until the backward.
    unit_T = torch.full(targets.shape, ce_scale, dtype=torch.float64, device=targets.device)
    policy_TV, with_gradient = policy_logits.detach(), wants_gradient(policy_logits)
    grad_TV = torch.zeros_like(policy_TV) if with_gradient else None
    dtype = compute_dtype(policy_logits, reference_logits)
    ce_T, kl_T = plan.new_values(policy_TV.device)
    size = default_chunk_tokens(plan.num_targets, shard, on_gpu=policy_TV.is_cuda)
    for rows, with_kl in plan.chunks(size):
        s_Cv = policy_TV[rows, : shard.num_valid].to(dtype, copy=True)
        e_Cv = None
        if with_kl and reference_logits is not None:
            t_Cv = reference_logits.detach()[rows, : shard.num_valid].to(dtype)
            e_Cv = _difference(t_Cv, s_Cv, _LOWEST[direction])
        unit = max(ce_scale, kl_scale) if with_kl else ce_scale
        unit_T[rows] = unit
        found = chunk_loss_(
            s_Cv, e_Cv, targets[rows], goal, shard, ce_scale / unit, kl_scale / unit
        )
        ce_T[rows] = found.ce_C
        if found.kl_C is not None:
            kl_T[rows] = found.kl_C
        if grad_TV is not None:
            grad_TV[rows, : shard.num_valid] = s_Cv.to(grad_TV.dtype)
    out = plan.output(ce_T, kl_T, kl_weight, reduction, dtype)
    if grad_TV is None:
        return out
    return out._replace(loss=precomputed(policy_logits, out.loss, grad_TV, unit_T, consume=True))


def _difference(t_Cv: Tensor, s_Cv: Tensor, lowest: float) -> Tensor:
    """T - s, with 0 where both are -inf and no less than `lowest`."""
    e_Cv = t_Cv - s_Cv
    if e_Cv.is_cuda or not bool(torch.isfinite(e_Cv.sum())):
        e_Cv = torch.where(t_Cv == s_Cv, 0.0, e_Cv).clamp_(min=lowest)
    return e_Cv


# ---------------------------------------------------------------- shared with head.py


def precomputed(
    x: Tensor, value: Tensor, grad: Tensor, unit: float | Tensor = 1.0, *, consume: bool = False
) -> Tensor:
    """`value` with a graph to `x` in which `grad` * `unit` (of all rows, or [T]) is its gradient.

    With `consume` the backward scales `grad` in place, so that no copy of it is made.
    """
    return cast(Tensor, _Precomputed.apply(x, value, grad, unit, consume))  # pyright: ignore


class _Precomputed(torch.autograd.Function):
    """A value whose gradient is known already: the backward only scales it."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, value: Tensor, grad: Tensor, unit: float | Tensor, consume: bool
    ) -> Tensor:
        """Keep the gradient."""
        ctx.unit, ctx.dtype, ctx.grad = unit, x.dtype, grad if consume else None
        if not consume:
            ctx.save_for_backward(grad)
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore
        ctx: Any, upstream: Tensor
    ) -> tuple[Tensor | None, ...]:
        """Scale the stored gradient, per row where `upstream` is [T]."""
        factor = upstream.double() * ctx.unit if upstream.device.type != "mps" else upstream
        factor = factor.unsqueeze(-1) if factor.dim() else factor.reshape(1, 1)
        saved = ctx.saved_tensors  # read once: hooks of checkpointing unpack at every access
        if ctx.grad is None and not saved:
            raise RuntimeError("this loss is differentiable once: its gradient was handed over")
        grad = ctx.grad if ctx.grad is not None else saved[0]
        out = grad if ctx.grad is not None else torch.empty_like(grad, dtype=ctx.dtype)
        ctx.grad = None
        factor = factor.to(torch.promote_types(grad.dtype, torch.float32)).expand(len(grad), 1)
        for rows in row_blocks(grad):
            out[rows] = grad[rows].to(factor.dtype) * factor[rows]
        return out, None, None, None, None


@dataclass(frozen=True, slots=True)
class RowPlan:
    """Which rows are computed, and with what: ignored rows are in no group.

    `groups` holds (rows, count, with_kl); rows is None where it is every row.
    """

    num_rows: int
    num_targets: int
    num_kl: int
    groups: tuple[tuple[Tensor | None, int, bool], ...]
    counts_2: Tensor | None = None  # num_targets and num_kl on the device, for `output`

    @staticmethod
    def of(
        targets_T: Tensor,
        kl_mask_T: Tensor | None,
        ignore_index: int,
        vocab_size: int,
        *,
        with_kl: bool,
    ) -> RowPlan:
        """Sort rows into ignored, cross-entropy alone, and both; range-check the targets."""
        valid_T = targets_T != ignore_index
        bad_T = valid_T & ((targets_T < 0) | (targets_T >= vocab_size))
        kl_T = valid_T if kl_mask_T is None else valid_T & kl_mask_T
        counts = torch.stack([valid_T.sum(), kl_T.sum(), bad_T.sum()])
        num_targets, num_kl, num_bad = cast(list[int], counts.tolist())  # pyright: ignore[reportUnknownMemberType]
        if num_bad:
            at = int(bad_T.nonzero()[0])
            raise ValueError(
                f"targets[{at}] = {int(targets_T[at])} is outside [0, vocab_size={vocab_size}) "
                f"and is not ignore_index={ignore_index}"
            )
        num_rows = len(targets_T)
        parts = [(kl_T, num_kl, with_kl), (valid_T & ~kl_T, num_targets - num_kl, False)]
        if not with_kl:
            parts = [(valid_T, num_targets, False)]
        groups = tuple(
            (None if count == num_rows else mask.nonzero().squeeze(1), count, kl)
            for mask, count, kl in parts
            if count
        )
        return RowPlan(num_rows, num_targets, num_kl, groups, counts[:2])

    def chunks(self, size: int) -> Iterator[tuple[Rows, bool]]:
        """Even chunks of at most `size` rows, each with whether the KL applies."""
        for index, count, with_kl in self.groups:
            step = math.ceil(count / math.ceil(count / size))
            for i in range(0, count, step):
                rows = slice(i, min(i + step, count))
                yield (rows if index is None else index[rows]), with_kl

    def scales(self, kl_weight: float, reduction: Reduction) -> tuple[float, float]:
        """The factors of the sums of cross-entropy and KL in the loss."""
        if reduction != "mean":
            return 1.0, float(kl_weight)
        kl_scale = kl_weight / self.num_kl if self.num_kl else 0.0
        return 1 / max(1, self.num_targets), kl_scale

    def new_values(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Zeros [T] for the rows' cross-entropies and KLs, in fp64 so that long sums hold."""
        dtype = torch.float32 if device.type == "mps" else torch.float64
        return (
            torch.zeros(self.num_rows, dtype=dtype, device=device),
            torch.zeros(self.num_rows, dtype=dtype, device=device),
        )

    def output(
        self,
        ce_T: Tensor,
        kl_T: Tensor,
        kl_weight: float,
        reduction: Reduction,
        dtype: torch.dtype,
    ) -> TMKLOutput:
        """Reduce the rows' values."""
        ce, kl = ce_T, kl_T
        if reduction != "none":
            ce, kl = ce.sum(), kl.sum()
        if reduction == "mean":
            ce, kl = ce / max(1, self.num_targets), kl / max(1, self.num_kl)
        loss = ce + kl_weight * kl if kl_weight else ce
        assert self.counts_2 is not None
        counts = self.counts_2.unbind()
        return TMKLOutput(loss.to(dtype), ce.to(dtype), kl.to(dtype), *counts)


def check_rows(
    named: tuple[tuple[str, Tensor], tuple[str, Tensor | None]],
    targets: Tensor,
    kl_mask: Tensor | None,
    kl_weight: float,
    reduction: str,
) -> float:
    """The KL's weight as a number; raises ValueError unless the arguments of a loss fit."""
    (policy_name, policy), (reference_name, reference) = named
    rows = f"{policy_name} has shape {_shape(policy)}"
    check_dtypes(*named)
    if targets.shape != policy.shape[:1]:
        raise ValueError(f"targets has shape {_shape(targets)}, but {rows}: one id per row")
    if targets.dtype != torch.int64:
        raise ValueError(f"targets has dtype {targets.dtype}: torch.int64 is needed")
    try:
        kl_weight = float(kl_weight)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"kl_weight={kl_weight!r}: a finite number >= 0 is needed") from None
    if not (math.isfinite(kl_weight) and kl_weight >= 0):
        raise ValueError(f"kl_weight={kl_weight}: a finite number >= 0 is needed")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction={reduction!r}: expected mean, sum or none")
    if reference is None:
        if kl_weight:
            raise ValueError(f"{reference_name} is None: needed unless kl_weight is 0")
    elif reference.shape != policy.shape:
        raise ValueError(f"{reference_name} has shape {_shape(reference)}, but {rows}")
    if kl_mask is not None and (kl_mask.shape != targets.shape or kl_mask.dtype != torch.bool):
        raise ValueError(
            f"kl_mask has shape {_shape(kl_mask)} and dtype {kl_mask.dtype}, but {rows}: one bool "
            "per row is needed"
        )
    return kl_weight


def check_dtypes(*named: tuple[str, Tensor | None]) -> None:
    """Raise ValueError unless the tensors hold numbers that the loss computes with."""
    for name, tensor in named:
        if tensor is not None and tensor.dtype not in DTYPES:
            known = ", ".join(str(dtype) for dtype in DTYPES)
            raise ValueError(f"{name} has dtype {tensor.dtype}: one of {known} is needed")


def default_chunk_tokens(num_tokens: int, shard: VocabShard, *, on_gpu: bool = False) -> int:
    """Tokens per chunk: a function of T, vocabulary and ranks alone, so that ranks agree.

    A buffer of 64 MiB of fp32 logits per rank on a CPU, 512 MiB on a GPU; but at least as many rows
    as a matrix product needs to be quick: 256, or 64.
    """
    columns = max(1, shard.vocab_size // shard.world_size)
    size, multiple, least = (2**27, 128, 64) if on_gpu else (2**24, 16, 256)
    rows = size // columns // multiple * multiple
    return max(1, min(num_tokens, max(least, min(4096, rows))))


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """fp64 if any tensor is, else fp32."""
    wide = any(x is not None and x.dtype == torch.float64 for x in tensors)
    return torch.float64 if wide else torch.float32


def wants_gradient(x: Tensor) -> bool:
    """Whether autograd will ask for the gradient of `x`."""
    return torch.is_grad_enabled() and x.requires_grad


def _shape(x: Tensor) -> tuple[int, ...]:
    return tuple(x.shape)
