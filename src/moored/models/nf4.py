"""NF4: weights made piece by piece (codes, scales, state), and the frozen layer that holds them.

Blocks of 64 elements along the rows share a scale, so that a slice at whole blocks has the codes
and scales of the whole (bitsandbytes' own arithmetic makes both). Scales of a whole under double
quantisation are cut in fp32, which keeps them bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import bitsandbytes as bnb
import bitsandbytes.functional as bnb_functional
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

BLOCK = 64  # elements that share one scale
NESTED_BLOCK = 256  # scales that share one, under double quantisation


@dataclass(frozen=True, slots=True)
class Codes:
    """A quantised matrix.

    Attributes:
        packed: uint8 [n / 2, 1], two codes a byte, row by row.
        scales: fp32 [n / 64], the largest magnitude of each block.
        shape: [out_features, in_features].
    """

    packed: Tensor
    scales: Tensor
    shape: tuple[int, int]


def quantize(
    pieces: Iterator[Tensor], shape: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> Codes:
    """Quantise a matrix that comes in pieces of whole rows.

    Args:
        pieces: consecutive rows, of whole blocks each (the last may end in part of one).
        shape: of the matrix.
        dtype: the weights are cast to it first; fp32, bf16 or fp16.
        device: where it is done, and stays.
    """
    num = shape[0] * shape[1]
    packed = torch.empty((num + 1) // 2, 1, dtype=torch.uint8, device=device)
    scales = torch.empty(-(-num // BLOCK), dtype=torch.float32, device=device)
    at = 0
    for piece in pieces:
        codes, absmax = torch.ops.bitsandbytes.quantize_4bit.default(
            piece.to(device=device, dtype=dtype).contiguous(), BLOCK, "nf4", torch.uint8
        )
        packed[at // 2 : at // 2 + len(codes)] = codes
        scales[at // BLOCK : at // BLOCK + len(absmax)] = absmax
        at += piece.numel()
    if at != num:
        raise ValueError(f"the pieces hold {at} elements, but the shape {shape} has {num}")
    return Codes(packed, scales, shape)


def nested(scales: Tensor) -> tuple[Tensor, Tensor, Any]:
    """Scales in 8 bits: codes, offset and inner state, as bitsandbytes quantises them."""
    offset = scales.mean()
    codes, inner = bnb_functional.quantize_blockwise(scales - offset, blocksize=NESTED_BLOCK)
    return codes, offset, inner


def rounded(scales: Tensor) -> Tensor:
    """Scales of a whole matrix as they are after double quantisation, in fp32."""
    codes, offset, inner = nested(scales)
    return bnb_functional.dequantize_blockwise(codes, inner) + offset


def state_of(codes: Codes, dtype: torch.dtype, *, double: bool) -> Any:
    """Bitsandbytes' `QuantState`; `double` quantises the scales, of what is held here."""
    scales, offset, inner = nested(codes.scales) if double else (codes.scales, None, None)
    return bnb_functional.QuantState(
        absmax=scales,
        shape=torch.Size(codes.shape),
        dtype=dtype,
        blocksize=BLOCK,
        code=bnb_functional.get_4bit_type("nf4", device=codes.packed.device),
        quant_type="nf4",
        offset=offset,
        state2=inner,
    )


def install(layer: bnb.nn.Linear4bit, packed: Tensor, state: Any) -> None:
    """Make packed codes and their state the weight of a `Linear4bit`."""
    parameter: Any = bnb.nn.Params4bit
    layer.weight = parameter(
        packed,
        requires_grad=False,
        quant_state=state,
        blocksize=state.blocksize,
        compress_statistics=state.nested,
        quant_type="nf4",
        quant_storage=packed.dtype,
        module=layer,
        bnb_quantized=True,
    )
    layer.quant_state = state


def rows_of(shape: tuple[int, int], elements: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows of about `elements` that begin and end at whole blocks."""
    num_rows, num_columns = shape
    unit = next(n for n in range(1, BLOCK + 1) if n * num_columns % BLOCK == 0)
    step = max(unit, elements // max(1, num_columns) // unit * unit)
    for start in range(0, num_rows, step):
        yield start, min(start + step, num_rows)


# ---------------------------------------------------------------- the layer


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
        assert weight.is_contiguous(), "ZeRO-3 has not gathered this weight"
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
