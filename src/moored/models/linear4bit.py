"""A frozen 4-bit linear layer whose autograd graph holds no weight.

Quantisation itself is bitsandbytes'. Nothing here knows adapters or ZeRO.
"""

from __future__ import annotations

from typing import Any, cast

import bitsandbytes as bnb
import bitsandbytes.functional as bnb_functional
import torch
from torch import nn
from torch.autograd.function import once_differentiable


class _Matmul4Bit(torch.autograd.Function):
    """`x @ W.T` that dequantises W again in the backward.

    bitsandbytes' own Function saves a view of the packed weight. Under ZeRO-3 that view keeps
    every gathered layer alive until the backward; this one keeps the *module*, whose weight ZeRO
    gathers again just before the backward of that module.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, module: FrozenLinear4bit) -> torch.Tensor:
        ctx.module = module
        return x @ module.dequantized(x.dtype).t()

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: torch.Tensor
    ) -> tuple[torch.Tensor | None, None]:
        (grad,) = grads
        if not ctx.needs_input_grad[0]:
            return None, None
        return grad @ ctx.module.dequantized(grad.dtype), None


class FrozenLinear4bit(bnb.nn.Linear4bit):
    """bitsandbytes' `Linear4bit`, frozen, with a backward that is safe under ZeRO-3.

    It stays a `Linear4bit`, so that PEFT wraps it as it wraps the original. Unlike the original
    it never repacks its weight in `eval` mode (bitsandbytes does on some CPUs), so that the
    reference is the same in every mode.
    """

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight [out_features, in_features] in `dtype`, a fresh tensor."""
        weight = cast(bnb.nn.Params4bit, self.weight)
        return bnb_functional.dequantize_4bit(weight.data, weight.quant_state).to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the layer to x [..., in_features] in the compute dtype; returns x's dtype."""
        compute_dtype = self.compute_dtype or x.dtype
        with torch.autocast(x.device.type, enabled=False):
            y = _Matmul4Bit.apply(x.to(compute_dtype), self)
            if self.bias is not None:
                y = y + self.bias.to(compute_dtype)
        return y.to(x.dtype)


def make_zero_safe(model: nn.Module, dtype: torch.dtype | None = None) -> int:
    """Turn every bitsandbytes `Linear4bit` of `model` into a `FrozenLinear4bit`, in place.

    Args:
        model: the base.
        dtype: to compute in; None leaves what each layer has.

    Returns:
        How many layers were changed.
    """
    changed = 0
    for module in model.modules():
        if type(module) is bnb.nn.Linear4bit:
            module.__class__ = FrozenLinear4bit
            module.compute_dtype = dtype or module.compute_dtype
            changed += 1
    return changed
