"""Hidden states to this rank's logits, and their gradient back: the frozen output projection.

Holds the matrix products, logit scale, bias and soft cap; knows no loss. Equations are numbered in
docs/loss.md.

Legend: C the rows of one chunk, D hidden size, v this rank's columns without padding. h the
policy's and h0 the reference's hidden states; s the policy's logits, e the reference's minus the
policy's; logits = softcap(scale * (h W^T + bias)).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from moored.loss.divergence import VocabShard, each_block

_BLOCK_ELEMENTS = 2**21  # of a half-precision weight, upcast at a time: 8 MiB in fp32


@dataclass(frozen=True, slots=True)
class Logits:
    """Hidden states to this rank's logits, and a gradient of logits back to hidden states."""

    weight_vD: Tensor
    bias_v: Tensor | None
    scale: float
    softcap: float | None
    shard: VocabShard

    @staticmethod
    def of(
        weight: Tensor,
        bias: Tensor | None,
        scale: float,
        softcap: float | None,
        shard: VocabShard | None,
    ) -> Logits:
        """Check the head's parts and cut the padding off."""
        num_rows = weight.shape[0]
        shard = VocabShard(0, num_rows, num_rows) if shard is None else shard
        if num_rows != shard.width:
            raise ValueError(
                f"lm_head_weight has shape {tuple(weight.shape)}, but shard [{shard.start}, "
                f"{shard.stop}) holds {shard.width} rows"
            )
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError(
                f"bias has shape {tuple(bias.shape)}, but lm_head_weight has shape "
                f"{tuple(weight.shape)}: one entry per row"
            )
        if softcap is not None and not (math.isfinite(softcap) and softcap > 0):
            raise ValueError(f"logit_softcap={softcap}: a finite number > 0 is needed, or None")
        if not math.isfinite(scale):
            raise ValueError(f"logit_scale={scale}: a finite number is needed")
        valid = slice(0, shard.num_valid)
        cut_bias = None if bias is None else bias.detach()[valid]
        return Logits(weight.detach()[valid], cut_bias, scale, softcap, shard)

    def new_buffer(self, num_rows: int, dtype: torch.dtype) -> Tensor:
        """Room for rows of logits: made once, since fresh pages cost as much as the sums."""
        return self.weight_vD.new_empty((num_rows, self.weight_vD.shape[0]), dtype=dtype)

    def products(
        self, h_CD: Tensor, h0_CD: Tensor | None, dtype: torch.dtype, buffer_2Cv: Tensor
    ) -> tuple[Tensor, bool]:
        """Products h W^T above (h0 - h) W^T, or above h0 W^T, and which, in `buffer_2Cv`.

        The difference as a product of its own keeps its relative accuracy (eq. 6). Half-precision
        operands would lose it by being rounded, but enter h0 W^T as they are. One product reads the
        weight once.
        """
        if self.native(h_CD.dtype):
            stack_D = h_CD if h0_CD is None else torch.cat([h_CD, h0_CD.to(h_CD.dtype)])
            return self._matmul(stack_D, h_CD.dtype, buffer_2Cv[: len(stack_D)]), False
        stack_D = h_CD.to(dtype)
        if h0_CD is not None:
            stack_D = torch.cat([stack_D, h0_CD.to(dtype) - stack_D])
        return self._matmul(stack_D, h_CD.dtype, buffer_2Cv[: len(stack_D)]), True

    def project(
        self, h_CD: Tensor, h0_CD: Tensor | None, dtype: torch.dtype, buffer_2Cv: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Policy logits s, reference minus policy logits e, and d s / d (h W^T), all [C, v]."""
        num_rows = h_CD.shape[0]
        both_v, is_difference = self.products(h_CD, h0_CD, dtype, buffer_2Cv)
        s_Cv, e_Cv = both_v[:num_rows], both_v[num_rows:] if h0_CD is not None else None
        if e_Cv is not None and not is_difference:
            e_Cv.sub_(s_Cv)
        if self.bias_v is not None:
            s_Cv.add_(self.bias_v.to(dtype))
        if self.scale != 1.0:
            both_v.mul_(self.scale)
        return s_Cv, e_Cv, None if self.softcap is None else _soft_cap_(s_Cv, e_Cv, self.softcap)

    def pull_back(
        self, g_Cv: Tensor, slope_Cv: Tensor | None, weight_vD: Tensor | None = None
    ) -> Tensor:
        """The gradient of h [C, D] from that of the logits, which is overwritten.

        Args:
            g_Cv: gradient of the logits.
            slope_Cv: of the cap; None where there is none, or where it is in g already.
            weight_vD: the weight in the half precision of the product; None: in that of g.
        """
        if slope_Cv is not None:
            g_Cv.mul_(slope_Cv)
        if weight_vD is not None:
            dh_CD = torch.mm(g_Cv.to(weight_vD.dtype), weight_vD, out_dtype=torch.float32)
        elif self.weight_vD.dtype == g_Cv.dtype:
            dh_CD = torch.mm(g_Cv, self.weight_vD)
        else:
            dh_CD = g_Cv.new_zeros((g_Cv.shape[0], self.weight_vD.shape[1]))
            for columns in self._blocks():
                dh_CD.addmm_(g_Cv[:, columns], self.weight_vD[columns].to(g_Cv.dtype))
        return dh_CD.mul_(self.scale) if self.scale != 1.0 else dh_CD

    def _matmul(self, x_D: Tensor, like: torch.dtype, out_v: Tensor) -> Tensor:
        weight_vD = self.weight_vD
        if self.native(like):
            x_D = x_D.to(weight_vD.dtype)
            return torch.mm(x_D, weight_vD.t(), out_dtype=torch.float32, out=out_v)
        if weight_vD.dtype == x_D.dtype:
            return torch.mm(x_D, weight_vD.t(), out=out_v)
        for columns in self._blocks():
            torch.mm(x_D, weight_vD[columns].to(x_D.dtype).t(), out=out_v[:, columns])
        return out_v

    def native(self, like: torch.dtype) -> bool:
        """Half-precision operands with an fp32 accumulator, which only CUDA gives out."""
        half = self.weight_vD.dtype in (torch.bfloat16, torch.float16)
        return self.weight_vD.is_cuda and half and like == self.weight_vD.dtype

    def _blocks(self) -> Iterator[slice]:
        num_columns, hidden_size = self.weight_vD.shape
        step = max(256, _BLOCK_ELEMENTS // max(1, hidden_size))
        return (slice(i, i + step) for i in range(0, num_columns, step))


def _soft_cap_(s_Cv: Tensor, e_Cv: Tensor | None, cap: float) -> Tensor:
    """Cap s and, without cancellation, e in place; returns the cap's slope at s, sech^2(s / cap).

    tanh y - tanh x = sinh(y - x) sech x sech y for y near x, where their difference would cancel
    (eq. 11); the plain difference elsewhere.
    """
    slope_Cv = torch.empty_like(s_Cv)

    def work(rows: slice) -> None:
        x = s_Cv[rows].div_(cap)
        sech_x = 1 / torch.cosh(x)
        torch.mul(sech_x, sech_x, out=slope_Cv[rows])
        if e_Cv is not None:
            step = e_Cv[rows].div_(cap)
            y = x + step
            near = torch.sinh(step.clamp(-1, 1)) * sech_x / torch.cosh(y)
            far = torch.tanh(y) - torch.tanh(x)
            e_Cv[rows] = torch.where(step.abs() <= 1, near, far) * cap
        torch.tanh(x, out=x).mul_(cap)

    each_block(s_Cv, work)
    return slope_Cv
