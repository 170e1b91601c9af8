"""LoRA on a linear layer with fewer passes over its output than PEFT's own layers take.

PEFT's layer copies the base's output, scales the adapter's and adds the two: three passes over
[T, out_features], twice with activation checkpointing, and one more in the backward. Here the scale
is applied to [T, r], and the product with B adds to the base's output. The parameters, their names
and what is saved stay PEFT's.
"""

# PEFT is typed in part only.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

from typing import Any

import torch
from peft.tuners import lora
from torch import Tensor, nn


class AddingLinear(nn.Linear):
    """The product with B; called as a module, so that ZeRO-3's hooks gather its weight."""

    def forward(self, input: Tensor, onto: Tensor | None = None) -> Tensor:
        """Product of `input` [..., r], added to `onto` [..., out_features] where that is given."""
        if onto is None:
            return super().forward(input)
        rows, added = onto.flatten(0, -2), input.flatten(0, -2)
        return torch.addmm(rows, added, self.weight.t()).view(onto.shape)


class _Fused:
    """What becomes of a PEFT layer's forward where one plain adapter is on."""

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base's output for x [..., in_features], and what the active adapters add."""
        active = [name for name in self.active_adapters if name in self.lora_A]
        special = args or kwargs or self.disable_adapters or self.merged or self.lora_variant
        if special or len(active) != 1 or not self._is_plain(active[0], x):
            return super().forward(x, *args, **kwargs)  # pyright: ignore
        (name,) = active
        low = self.lora_A[name](self.lora_dropout[name](x)) * self.scaling[name]
        return self.lora_B[name](low, self.base_layer(x))

    def _is_plain(self: Any, name: str, x: Tensor) -> bool:
        """Whether base and adapter compute in the dtype of x."""
        device = x.device.type
        on = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if on else self.lora_A[name].weight.dtype
        return x.dtype == dtype and isinstance(self.lora_B[name], AddingLinear)


class FusedLinear(_Fused, lora.Linear):
    """On a linear layer in full precision."""


class FusedLinear4bit(_Fused, lora.Linear4bit):  # pyright: ignore[reportGeneralTypeIssues]
    """On a linear layer of bitsandbytes in 4 bits."""


_FUSED: dict[type, type] = {lora.Linear: FusedLinear, lora.Linear4bit: FusedLinear4bit}


def fuse(model: nn.Module) -> int:
    """Turn PEFT's LoRA layers of `model` into such ones, in place; returns how many.

    What is not plain LoRA on a linear layer stays as it is: DoRA and other variants, biases of the
    adapter, convolutions (GPT-2's Conv1D among them) and embeddings.
    """
    changed = 0
    for module in model.modules():
        kind, layer = _FUSED.get(type(module)), module
        if kind is None or layer.lora_variant or layer.fan_in_fan_out:  # pyright: ignore
            continue
        parts: Any = layer.lora_B
        for part in parts.values():
            if type(part) is nn.Linear and part.bias is None:
                part.__class__ = AddingLinear
                module.__class__ = kind
        changed += type(module) is kind
    return changed
