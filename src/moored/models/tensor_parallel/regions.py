"""Where activations enter and leave a sharded region, each with its own backward.

Each function is the identity, a sum, a slice or a join over the axis in the forward, and the
adjoint of that in the backward. `axis` is the tensor-parallel axis; x is [..., features], and
[batch, length, features] where the sequence is dealt out.
"""

# Functions without saved tensors: nothing is kept for the backward but sizes.
# pyright: reportIncompatibleMethodOverride=false, reportUnknownMemberType=false

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from moored.distributed.mesh import Axis
from moored.models.tensor_parallel.layout import Split

Move = Callable[[Tensor], Tensor]


class _Moved(torch.autograd.Function):
    """One move in the forward, its adjoint in the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, there: Move, back: Move) -> Tensor:
        ctx.back = back
        moved = there(x)
        return moved.view_as(moved) if moved is x else moved

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.back(grad), None, None


def _move(x: Tensor, there: Move, back: Move) -> Tensor:
    return cast(Tensor, _Moved.apply(x, there, back))


def _same(x: Tensor) -> Tensor:
    return x


class TokensNotApartError(Exception):
    """What goes into the layers has no dimension of tokens that could be dealt out."""


def copy_to(x: Tensor, axis: Axis) -> Tensor:
    """The same x on every rank, into layers that each use a share of it: gradients are summed."""
    return _move(x, _same, axis.sum)


def reduce_from(x: Tensor, axis: Axis) -> Tensor:
    """Each rank's share of a sum to the sum; its gradient is the same on every rank already."""
    return _move(x, axis.sum, _same)


def gather_from(x: Tensor, axis: Axis, split: Split) -> Tensor:
    """Each rank's last dimension joined; every rank goes on with all of it."""
    return _move(x, lambda y: axis.concatenate(y, -1, split.sizes), lambda g: cut(g, axis, split))


def scatter_to(x: Tensor, axis: Axis, split: Split) -> Tensor:
    """This rank's share of the last dimension of an x that is the same on every rank."""
    return _move(x, lambda y: cut(y, axis, split), lambda g: axis.concatenate(g, -1, split.sizes))


def cut(x: Tensor, axis: Axis, split: Split) -> Tensor:
    """This rank's slice of the last dimension, contiguous; no gradient."""
    start, stop = split.range_of(axis.rank)
    return x[..., start:stop].contiguous()


class Sequence:
    """Residual stream and norms on this rank's share of each sequence [batch, length, features].

    Lengths that do not divide are filled up with zeros on the last ranks, and cut again.
    """

    def __init__(self, axis: Axis):
        self.axis = axis
        self.length = 0  # of the sequences under way, in tokens

    def deal(self, x: Tensor) -> Tensor:
        """The same whole sequences on every rank to this rank's share of each."""
        if x.dim() != 3:
            raise TokensNotApartError(
                f"its layers take {tuple(x.shape)}, not one row of features per token"
            )
        self.length = x.shape[1]
        return _move(x, self._mine, self._all)

    def collect(self, x: Tensor) -> Tensor:
        """Shares to whole sequences, which every rank uses in the same way."""
        return _move(x, self._all, self._mine)

    def copy_to(self, x: Tensor) -> Tensor:
        """Shares to whole sequences, of whose use each rank has a share: gradients are summed."""
        return _move(x, self._all, self._my_sum)

    def reduce_from(self, x: Tensor) -> Tensor:
        """Each rank's share of a sum over whole sequences to this rank's sequences of the sum."""
        return _move(x, self._my_sum, self._all)

    def _padded(self, x: Tensor) -> Tensor:
        missing = -self.length % self.axis.size
        return torch.nn.functional.pad(x, (0, 0, 0, missing)) if missing else x

    def _mine(self, x: Tensor) -> Tensor:
        return self._padded(x).chunk(self.axis.size, dim=1)[self.axis.rank].contiguous()

    def _all(self, x: Tensor) -> Tensor:
        joined = self.axis.concatenate(x, 1, [x.shape[1]] * self.axis.size)
        return joined[:, : self.length].contiguous()

    def _my_sum(self, x: Tensor) -> Tensor:
        return self.axis.sum_part(self._padded(x), 1)
