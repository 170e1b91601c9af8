"""NF4 weights made piece by piece: codes, scales, and the state that a layer needs of them.

Blocks of 64 elements along the rows share a scale, so that a slice at whole blocks has the codes
and scales of the whole (bitsandbytes' own arithmetic makes both). Scales of a whole under double
quantisation are cut in fp32, which keeps them bit for bit.
"""

# bitsandbytes is untyped in parts.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import bitsandbytes as bnb
import bitsandbytes.functional as bnb_functional
import torch
from torch import Tensor

BLOCK = 64  # elements that share one scale
_NESTED_BLOCK = 256  # scales that share one, under double quantisation


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
    codes, inner = bnb_functional.quantize_blockwise(scales - offset, blocksize=_NESTED_BLOCK)
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
