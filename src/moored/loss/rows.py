"""What is done with the rows of a loss: checks, order, chunks, reduction, and the autograd node.

Shared by tmkl.py, which has logits, and head.py, which has hidden states; nothing here knows which,
nor the loss itself (divergence.py).

Legend: T tokens, C the tokens of one chunk, D hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moored.loss.divergence import VocabShard, row_blocks

Reduction = Literal["mean", "sum", "none"]
Rows = slice | Tensor

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class TMKLOutput(NamedTuple):
    """`loss` is differentiable, once; `ce` and the KLs are unweighted, detached, in nats.

    `kl` is of the `num_kl` rows with a target, `kl_prompt` of the `num_prompt` ones without.
    """

    loss: Tensor
    ce: Tensor
    kl: Tensor
    num_targets: Tensor
    num_kl: Tensor
    kl_prompt: Tensor
    num_prompt: Tensor


@dataclass(frozen=True, slots=True)
class RowPlan:
    """Which rows are computed, and with what: ignored rows are in no group.

    `groups` holds (rows, count, with_kl); rows is None where it is every row. Rows without a target
    that have a KL are in the group of those that have both, so that they add no collective.
    """

    num_rows: int
    num_targets: int
    num_kl: int  # rows with a target and a KL
    groups: tuple[tuple[Tensor | None, int, bool], ...]
    counts_3: Tensor | None = None  # num_targets, num_kl and num_prompt, for `output`
    num_prompt: int = 0
    prompt_N: Tensor | None = None  # rows with a KL alone; None: there are none

    @staticmethod
    def of(
        targets_T: Tensor,
        kl_mask_T: Tensor | None,
        ignore_index: int,
        vocab_size: int,
        *,
        with_kl: bool,
        with_prompt: bool = False,
    ) -> RowPlan:
        """Sort rows into ignored and computed ones; range-check the targets.

        With `with_prompt`, rows of `kl_mask_T` without a target have a KL alone.
        """
        valid_T = targets_T != ignore_index
        bad_T = valid_T & ((targets_T < 0) | (targets_T >= vocab_size))
        kl_T = valid_T if kl_mask_T is None else valid_T & kl_mask_T
        alone_T = torch.zeros_like(valid_T)
        if kl_mask_T is not None and with_prompt and with_kl:
            alone_T = kl_mask_T & ~valid_T
        counts = torch.stack([valid_T.sum(), kl_T.sum(), alone_T.sum(), bad_T.sum()])
        num_targets, num_kl, num_prompt, num_bad = cast(list[int], counts.tolist())  # pyright: ignore[reportUnknownMemberType]
        if num_bad:
            at = int(bad_T.nonzero()[0])
            raise ValueError(
                f"targets[{at}] = {int(targets_T[at])} is outside [0, vocab_size={vocab_size}) "
                f"and is not ignore_index={ignore_index}"
            )
        num_rows = len(targets_T)
        parts = [
            (kl_T | alone_T, num_kl + num_prompt, with_kl),
            (valid_T & ~kl_T, num_targets - num_kl, False),
        ]
        if not with_kl:
            parts = [(valid_T, num_targets, False)]
        groups = _groups(num_rows, *parts)
        prompt_T = alone_T if num_prompt else None
        return RowPlan(num_rows, num_targets, num_kl, groups, counts[:3], num_prompt, prompt_T)

    @staticmethod
    def of_batch(
        targets_N: Tensor,
        kl_mask_N: Tensor | None,
        *,
        with_kl: bool,
        num_targets: int | None = None,
        num_kl: int | None = None,
        num_prompt: int | None = None,
    ) -> RowPlan:
        """Rows whose targets are known to be in range (at collation).

        Where all counts are given that are needed, the host waits for no device.

        Args:
            targets_N: negative where there is none; such rows are computed where `kl_mask_N` is
                set and there is a KL.
            kl_mask_N: rows with a KL; None: all of them.
            with_kl: whether there is one at all.
            num_targets: rows with a target; None: all of them.
            num_kl: those of `kl_mask_N` with a target; None: they are counted here.
            num_prompt: those of `kl_mask_N` without one; None: likewise.
        """
        num_rows = len(targets_N)
        num_targets = num_rows if num_targets is None else num_targets
        if not with_kl:
            groups = _groups(num_rows, (targets_N >= 0, num_targets, False))
            return RowPlan(num_rows, num_targets, 0, groups)
        if kl_mask_N is None:
            num_kl, num_prompt = num_targets, num_rows - num_targets
        elif num_targets == num_rows:
            num_prompt = 0
        if num_kl is None or num_prompt is None:
            assert kl_mask_N is not None
            counted = int(kl_mask_N.sum())
            num_kl = int((kl_mask_N & (targets_N >= 0)).sum()) if num_kl is None else num_kl
            num_prompt = counted - num_kl
        kl_N = torch.ones_like(targets_N, dtype=torch.bool) if kl_mask_N is None else kl_mask_N
        groups = _groups(
            num_rows,
            (kl_N, num_kl + num_prompt, True),
            (~kl_N & (targets_N >= 0), num_targets - num_kl, False),
        )
        prompt_N = kl_N & (targets_N < 0) if num_prompt else None
        return RowPlan(
            num_rows, num_targets, num_kl, groups, num_prompt=num_prompt, prompt_N=prompt_N
        )

    @property
    def num_computed(self) -> int:
        """Rows that are in a group."""
        return sum(count for _, count, _ in self.groups)

    def chunks(self, size: int) -> Iterator[tuple[Rows, bool]]:
        """Even chunks of at most `size` rows, each with whether the KL applies."""
        for index, count, with_kl in self.groups:
            step = math.ceil(count / math.ceil(count / size))
            for i in range(0, count, step):
                rows = slice(i, min(i + step, count))
                yield (rows if index is None else index[rows]), with_kl

    def scales(
        self, kl_weight: float, prompt_weight: float, reduction: Reduction
    ) -> tuple[float, float, float]:
        """The factors of the sums of cross-entropies and both KLs in the loss, as of `Scales`."""
        if reduction != "mean":
            return 1.0, kl_weight, prompt_weight
        kl_scale = kl_weight / self.num_kl if self.num_kl else 0.0
        prompt_scale = prompt_weight / self.num_prompt if self.num_prompt else 0.0
        return 1 / max(1, self.num_targets), kl_scale, prompt_scale

    def by_kind(self, kl_N: Tensor) -> tuple[Tensor, Tensor]:
        """The KLs of rows with a target, and of those without: each 0 where it is the other."""
        if self.prompt_N is None:
            return kl_N, torch.zeros_like(kl_N)
        return torch.where(self.prompt_N, 0.0, kl_N), torch.where(self.prompt_N, kl_N, 0.0)

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
        prompt_weight: float,
        reduction: Reduction,
        dtype: torch.dtype,
    ) -> TMKLOutput:
        """Reduce the rows' values."""
        ce, (kl, kl_prompt) = ce_T, self.by_kind(kl_T)
        if reduction != "none":
            ce, kl, kl_prompt = ce.sum(), kl.sum(), kl_prompt.sum()
        if reduction == "mean":
            ce, kl = ce / max(1, self.num_targets), kl / max(1, self.num_kl)
            kl_prompt = kl_prompt / max(1, self.num_prompt)
        loss = ce + kl_weight * kl if kl_weight else ce
        loss = loss + prompt_weight * kl_prompt if prompt_weight else loss
        assert self.counts_3 is not None
        num_targets, num_kl, num_prompt = self.counts_3.unbind()
        loss, ce, kl, kl_prompt = (x.to(dtype) for x in (loss, ce, kl, kl_prompt))
        return TMKLOutput(loss, ce, kl, num_targets, num_kl, kl_prompt, num_prompt)


def _groups(
    num_rows: int, *parts: tuple[Tensor, int, bool]
) -> tuple[tuple[Tensor | None, int, bool], ...]:
    """Groups of (mask [N], rows that it is set in, with_kl), without asking the device for any.

    A stable sort puts the rows of a mask in front, in their order; how many they are is known.
    """
    return tuple(
        (None if count == num_rows else _front(mask_N)[:count], count, with_kl)
        for mask_N, count, with_kl in parts
        if count
    )


def _front(mask_N: Tensor) -> Tensor:
    return (~mask_N).to(torch.uint8).argsort(stable=True)


# ---------------------------------------------------------------- checks


def check_rows(
    named: tuple[tuple[str, Tensor], tuple[str, Tensor | None]],
    targets: Tensor,
    kl_mask: Tensor | None,
    kl_weight: float,
    prompt_weight: float | None,
    reduction: str,
) -> tuple[float, float]:
    """Both KLs' weights as numbers; raises ValueError unless the arguments of a loss fit."""
    (policy_name, policy), (reference_name, reference) = named
    rows = f"{policy_name} has shape {_shape(policy)}"
    check_dtypes(*named)
    if targets.shape != policy.shape[:1]:
        raise ValueError(f"targets has shape {_shape(targets)}, but {rows}: one id per row")
    if targets.dtype != torch.int64:
        raise ValueError(f"targets has dtype {targets.dtype}: torch.int64 is needed")
    kl_weight = _weight("kl_weight", kl_weight)
    held = 0.0 if prompt_weight is None else _weight("prompt_weight", prompt_weight)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction={reduction!r}: expected mean, sum or none")
    if reference is None:
        if kl_weight or held:
            name = "kl_weight" if kl_weight else "prompt_weight"
            raise ValueError(f"{reference_name} is None: needed unless {name} is 0")
    elif reference.shape != policy.shape:
        raise ValueError(f"{reference_name} has shape {_shape(reference)}, but {rows}")
    if kl_mask is not None and (kl_mask.shape != targets.shape or kl_mask.dtype != torch.bool):
        raise ValueError(
            f"kl_mask has shape {_shape(kl_mask)} and dtype {kl_mask.dtype}, but {rows}: one bool "
            "per row is needed"
        )
    if kl_mask is None and prompt_weight is not None:
        raise ValueError(
            f"prompt_weight={prompt_weight}, but kl_mask is None: it must say which rows without a "
            "target have a KL, since padding has none either"
        )
    return kl_weight, held


def _weight(name: str, weight: float) -> float:
    try:
        number = float(weight)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{name}={weight!r}: a finite number >= 0 is needed") from None
    if not (math.isfinite(number) and number >= 0):
        raise ValueError(f"{name}={number}: a finite number >= 0 is needed")
    return number


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


def _shape(x: Tensor) -> tuple[int, ...]:
    return tuple(x.shape)


# ---------------------------------------------------------------- autograd


def wants_gradient(x: Tensor) -> bool:
    """Whether autograd will ask for the gradient of `x`."""
    return torch.is_grad_enabled() and x.requires_grad


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
