"""LoRA, DoRA and SineLoRA on layers of which each rank has a share: initial values, dropout, norms.

Every one is what one process would have, cut.
"""

# PEFT is typed in part only.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners import lora
from peft.tuners.lora.dora import DoraLinearLayer
from torch import Tensor, nn

from moored.distributed.mesh import Axis
from moored.models.tensor_parallel import regions
from moored.models.tensor_parallel.layout import ShardLayout, Split
from moored.sinelora import SineLayer


def adopt_row_layer(module: lora.LoraLayer, axis: Axis, split: Split) -> None:
    """Make the adapter of a layer whose input is cut exact.

    Dropout takes this rank's columns of the mask of all of them, DoRA's norms go over all columns,
    and so does SineLoRA's gain.
    """
    if isinstance(module, SineLayer):
        module.fan_in = split.whole
    for name, dropout in module.lora_dropout.items():
        if isinstance(dropout, nn.Dropout):
            module.lora_dropout[name] = SlicedDropout(dropout.p, axis, split)
    magnitudes: Any = module.lora_magnitude_vector
    for magnitude in magnitudes.values():
        magnitude.__class__ = RowDora
        magnitude.axis = axis
        weight = magnitude.weight
        weight.data = axis.sum(weight.data.double() ** 2).sqrt().to(weight.dtype)


def whole_adapters(
    causal_lm: nn.Module, layout: ShardLayout, config: LoraConfig, seed: int
) -> Mapping[str, Tensor]:
    """The adapters' matrices as PEFT draws them for the undivided model, by their paths.

    Every layer is drawn from PEFT's own layer on a hollow one of its whole size, in the model's
    order: so the fresh adapter is the same on every mesh.

    Args:
        causal_lm: with PEFT's layers in it.
        layout: of the model.
        config: PEFT's.
        seed: of torch's generator.
    """
    torch.manual_seed(seed)
    drawn: dict[str, Tensor] = {}
    for path, module in causal_lm.named_modules():
        if not isinstance(module, lora.LoraLayer):
            continue
        base: Any = module.get_base_layer()
        sizes = [base.out_features, base.in_features]
        layer = layout.layers.get(path)
        if layer is not None:
            sizes[layer.split.dim] = layer.split.whole
        hollow: Any = nn.utils.skip_init(nn.Linear, sizes[1], sizes[0], bias=False, device="meta")
        dtype = base.weight.dtype if base.weight.dtype.is_floating_point else torch.float32
        hollow.weight = nn.Parameter(
            torch.zeros((), dtype=dtype).expand(sizes), requires_grad=False
        )
        whole = lora.Linear(
            hollow, "default", config=config, r=config.r, lora_alpha=config.lora_alpha
        )
        for part in ("lora_A", "lora_B"):
            matrix: Any = getattr(whole, part)["default"].weight
            drawn[f"{path}.{part}"] = matrix.detach()
    return drawn


class SlicedDropout(nn.Module):
    """This rank's columns of the mask that one process would draw for all of them."""

    def __init__(self, p: float, axis: Axis, split: Split):
        super().__init__()
        self.p, self.axis, self.split = p, axis, split

    def forward(self, x: Tensor) -> Tensor:
        """Drop from x [..., this rank's columns] while training."""
        if not self.training:
            return x
        ones = x.new_ones(*x.shape[:-1], self.split.whole)
        return x * regions.cut(nn.functional.dropout(ones, self.p), self.axis, self.split)


class RowDora(DoraLinearLayer):
    """DoRA on a layer of which each rank has some columns: the norm is over all of them."""

    axis: Axis

    def get_weight_norm(
        self, weight: Tensor, lora_weight: Tensor, scaling: float, adapter_name: str | None = None
    ) -> Tensor:
        """||W + scaling * B A|| of each row, [out_features]."""
        local = torch.linalg.norm((weight + scaling * lora_weight).double(), dim=1)
        return self.axis.sum(local**2).sqrt().to(weight.dtype)
