"""SineLoRA, which PEFT lacks: the sine of a low-rank product as the change of a weight.

    import moored.sinelora                      # PEFT knows the method from here on
    model = PeftModel.from_pretrained(base, "adapter")

Nothing here knows recipes, meshes or the loss. For a weight W [out, in] and PEFT's own A [r, in]
and B [out, r],

    dW = (alpha / r) * sin(omega * B A) / sqrt(in)

elementwise on the product: "Efficient Learning with Sine-Activated Low-Rank Matrices", arXiv
2403.19243, as its authors' code has it (github.com/samy-ji/Sine-Low-Rank: scale
`lora_alpha / r`, gain `1 / sqrt(in_features)`). B = 0 at first, so that dW = 0. The rank of dW is
not bounded by r; a small product is plain LoRA's times omega / sqrt(in).
"""

# PEFT is typed in part only.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import bitsandbytes as bnb
import torch
from peft import LoraConfig
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

PEFT_TYPE = "SINELORA"
BLOCK_ELEMENTS = 2**22  # of dW that exist at once, in fp32: 16 MB


@dataclass
class SineLoraConfig(LoraConfig):
    """PEFT's configuration of LoRA, with the frequency of the sine.

    It has a type of its own in `adapter_config.json`: PEFT without this module refuses the adapter
    by that name, where it would have taken it for plain LoRA.

    Attributes:
        omega: radians per unit of B A.
    """

    omega: float = field(default=200.0, metadata={"help": "frequency of the sine"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type: Any = PEFT_TYPE
        if self.use_dora or self.init_lora_weights not in (True, "gaussian"):
            raise ValueError("SineLoRA knows no DoRA, and starts from init_lora_weights=True only")


class _SineLinear(torch.autograd.Function):
    """y = x dW^T, of which neither dW nor B A outlives a block of rows.

    x [..., in], A [r, in], B [out, r]; the product and its sine are in A's dtype (fp32), the
    products with x in x's. The backward computes them again:

        P = omega B A,  S = gain sin(P),  G = dy^T x  [out, in]
        dx = dy S,  dP = gain G cos(P),  dB = omega dP A^T,  dA = omega B^T dP
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_a: Tensor, weight_b: Tensor, omega: float, gain: float
    ) -> Tensor:
        ctx.save_for_backward(x, weight_a, weight_b)
        ctx.omega, ctx.gain = omega, gain
        parts = [
            x @ (gain * torch.sin(omega * (weight_b[rows] @ weight_a))).to(x.dtype).t()
            for rows in _blocks(weight_a, weight_b)
        ]
        return torch.cat(parts, dim=-1)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, weight_a, weight_b = ctx.saved_tensors
        needs_x, needs_a, needs_b = ctx.needs_input_grad[:3]
        flat, flat_grad = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        grad_x = torch.zeros_like(flat) if needs_x else None
        grad_a = torch.zeros_like(weight_a) if needs_a else None
        grad_b = torch.empty_like(weight_b) if needs_b else None
        for rows in _blocks(weight_a, weight_b):
            phase = ctx.omega * (weight_b[rows] @ weight_a)
            dy = flat_grad[:, rows]
            if grad_x is not None:
                grad_x += dy @ (ctx.gain * torch.sin(phase)).to(dy.dtype)
            if grad_a is None and grad_b is None:
                continue
            of_phase = (dy.t() @ flat).to(phase.dtype) * phase.cos_() * (ctx.gain * ctx.omega)
            if grad_a is not None:
                grad_a += weight_b[rows].t() @ of_phase
            if grad_b is not None:
                grad_b[rows] = of_phase @ weight_a.t()
        return (None if grad_x is None else grad_x.view_as(x)), grad_a, grad_b, None, None


def _blocks(weight_a: Tensor, weight_b: Tensor) -> Iterator[slice]:
    step = max(1, BLOCK_ELEMENTS // weight_a.shape[1])
    for start in range(0, weight_b.shape[0], step):
        yield slice(start, start + step)


class SineLayer:
    """What makes a LoRA layer of PEFT's a SineLoRA layer: its forward and its dW.

    Attributes:
        omega: of each adapter.
        fan_in: columns of the whole weight, of which a rank may have a share.
    """

    omega: dict[str, float]
    fan_in: int

    def update_layer(self: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter, as `LoraLayer.update_layer` does."""
        if not hasattr(self, "omega"):
            self.omega, self.fan_in = {}, self.in_features
        self.omega[adapter_name] = kwargs["config"].omega
        lora.LoraLayer.update_layer(self, adapter_name, *args, **kwargs)

    def gain(self: Any, adapter: str) -> float:
        """The largest entry that dW can have: alpha / r / sqrt(in)."""
        return self.scaling[adapter] / math.sqrt(self.fan_in)

    def get_delta_weight(self: Any, adapter: str) -> Tensor:
        """DW as the base stores its weight, in fp32 at least."""
        weight_a, weight_b = (part[adapter].weight for part in (self.lora_A, self.lora_B))
        dtype = torch.promote_types(weight_a.dtype, torch.float32)
        product = weight_b.to(dtype) @ weight_a.to(dtype)
        delta = self.gain(adapter) * torch.sin(self.omega[adapter] * product)
        return delta.t() if self.fan_in_fan_out else delta

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base's output, and x dW^T of every active adapter."""
        if kwargs.pop("adapter_names", None) is not None:
            raise ValueError("SineLoRA cannot mix adapters in one batch")
        if self.merged and self.disable_adapters:
            self.unmerge()
        result = self.base_layer(x, *args, **kwargs)
        if self.merged or self.disable_adapters:
            return result
        for adapter in self.active_adapters:
            if adapter not in self.lora_A:
                continue
            weight_a, weight_b = (part[adapter].weight for part in (self.lora_A, self.lora_B))
            inputs = self.lora_dropout[adapter](x).to(_dtype_of_products(x, weight_a))
            with torch.autocast(x.device.type, enabled=False):
                added = _SineLinear.apply(
                    inputs, weight_a, weight_b, self.omega[adapter], self.gain(adapter)
                )
            result = result + added.to(result.dtype)
        return result

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Its dW has no low rank."""
        return False


def _dtype_of_products(x: Tensor, weight: Tensor) -> torch.dtype:
    """The precision of any other linear layer: autocast's, else the adapter's own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


class Linear(SineLayer, lora.Linear):
    """SineLoRA on a linear layer (or GPT-2's Conv1D)."""


class Linear4bit(SineLayer, lora.Linear4bit):  # pyright: ignore[reportGeneralTypeIssues]
    """SineLoRA on a linear layer of bitsandbytes in 4 bits."""


class SineLoraModel(lora.LoraModel):
    """PEFT's `LoraModel` with SineLoRA's layers."""

    @staticmethod
    def _create_new_module(
        lora_config: Any, adapter_name: str, target: nn.Module, **kwargs: Any
    ) -> nn.Module:
        base: Any = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        sizes = {name: kwargs[name] for name in ("r", "lora_alpha")}
        if isinstance(base, bnb.nn.Linear4bit):
            kind: Any = Linear4bit
            return kind(target, adapter_name, config=lora_config, **sizes)
        if isinstance(base, (nn.Linear, Conv1D)) and not isinstance(base, bnb.nn.Linear8bitLt):
            lora_config.fan_in_fan_out = is_turned = isinstance(base, Conv1D)
            return Linear(
                target,
                adapter_name,
                config=lora_config,
                is_target_conv_1d_layer=is_turned,
                **sizes,
            )
        raise ValueError(f"SineLoRA is for linear layers, in 4 bits or not, not for {base}")


# `register_peft_method` takes names of PEFT's own enumeration only; this is what it would do.
PEFT_TYPES: Any = (
    (PEFT_TYPE_TO_CONFIG_MAPPING, SineLoraConfig),
    (PEFT_TYPE_TO_TUNER_MAPPING, SineLoraModel),
    (PEFT_TYPE_TO_PREFIX_MAPPING, SineLoraModel.prefix),
)
for mapping, entry in PEFT_TYPES:
    if mapping.setdefault(PEFT_TYPE, entry) is not entry:
        raise ImportError(
            f"PEFT has a {PEFT_TYPE} of its own by now: moored.sinelora is not that one"
        )
