"""Mixtures of experts in 4 bits: the matrices of a layer's experts packed, and their products.

transformers holds the experts of a layer in one tensor per projection, [E, ., .], which
bitsandbytes passes by. Here each expert is quantised by itself, as bitsandbytes would quantise a
linear layer of its size, and decoded only where it got tokens. Which rank holds which expert is
`tensor_parallel`'s.

Shapes: E experts held here, T tokens, K experts per token, S pairs of a token and an expert held
here, O output and I input features of a matrix, B blocks of an expert's matrix.
"""

# bitsandbytes is untyped in parts.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import bitsandbytes.functional as bnb_functional
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from moored.models import nf4
from moored.utils.errors import UserError

# What transformers' `use_experts_implementation` says of a class of experts.
_FLAGS = ("has_gate", "has_bias", "is_transposed", "has_post_expert_norm", "num_experts")


def matrices_of(module: nn.Module) -> tuple[str, ...]:
    """Names of the tensors [E, ., .] of a layer's experts; empty for every other module."""
    if isinstance(module, Experts4bit):
        return module.matrices
    if not all(hasattr(module, flag) for flag in _FLAGS):
        return ()
    kinds = ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")
    own = dict(module.named_parameters(recurse=False))
    shapes = [own[kind].shape for kind in kinds if kind in own]
    return kinds if len(shapes) == 2 and all(len(shape) == 3 for shape in shapes) else ()


def experts_of(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of fused experts of a model, by path."""
    return {path: module for path, module in model.named_modules() if matrices_of(module)}


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertScales:
    """The scales of the blocks of all experts of one projection.

    Attributes:
        absmax: fp32 [E, B]; under double quantisation uint8, their codes.
        nested_absmax: fp32 [E, B / 256 rounded up]: scales of those codes, or None.
        offset: fp32 [E]: what was taken from the scales before, or None.
    """

    absmax: Tensor
    nested_absmax: Tensor | None = None
    offset: Tensor | None = None

    def named(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors there are, by attribute."""
        for name in ("absmax", "nested_absmax", "offset"):
            if (tensor := getattr(self, name)) is not None:
                yield name, tensor

    def states(self, shape: tuple[int, int], dtype: torch.dtype) -> list[Any]:
        """Bitsandbytes' `QuantState` of each expert's matrix [O, I]; views of these tensors."""
        device = self.absmax.device
        table = bnb_functional.get_4bit_type("nf4", device=device)
        common: dict[str, Any] = {"shape": torch.Size(shape), "dtype": dtype, "code": table}
        common |= {"blocksize": nf4.BLOCK, "quant_type": "nf4"}
        if self.nested_absmax is None or self.offset is None:
            return [bnb_functional.QuantState(absmax=scales, **common) for scales in self.absmax]
        inner_table = nf4.nested(torch.ones(1, device=device))[2].code
        inner: dict[str, Any] = {"code": inner_table, "blocksize": nf4.NESTED_BLOCK}
        return [
            bnb_functional.QuantState(
                absmax=codes,
                offset=offset,
                state2=bnb_functional.QuantState(absmax=scales, dtype=torch.float32, **inner),
                **common,
            )
            for codes, scales, offset in zip(
                self.absmax, self.nested_absmax, self.offset, strict=True
            )
        ]


def pack(
    matrices: Iterable[Tensor],
    num_experts: int,
    shape: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    *,
    double: bool,
) -> tuple[Tensor, ExpertScales]:
    """Quantise the matrices of a projection, one expert after the other.

    Args:
        matrices: [O, I] each; read one at a time.
        num_experts: how many there are.
        shape: of each.
        dtype: they are cast to it first; fp32, bf16 or fp16.
        device: where it is done, and stays.
        double: whether the scales are quantised, too.

    Returns:
        The codes, uint8 [E, O I / 2], and their scales.
    """
    size = shape[0] * shape[1]
    blocks = -(-size // nf4.BLOCK)
    packed = torch.empty(num_experts, (size + 1) // 2, dtype=torch.uint8, device=device)
    absmax = torch.empty(
        num_experts, blocks, dtype=torch.uint8 if double else torch.float32, device=device
    )
    outer = torch.empty(num_experts, -(-blocks // nf4.NESTED_BLOCK), device=device)
    offset = torch.empty(num_experts, device=device)
    for expert, matrix in zip(range(num_experts), matrices, strict=True):
        codes = nf4.quantize(iter([matrix]), shape, dtype, device)
        packed[expert] = codes.packed.flatten()
        if double:
            absmax[expert], offset[expert], inner = nf4.nested(codes.scales)
            outer[expert] = inner.absmax
        else:
            absmax[expert] = codes.scales
    if double:
        return packed, ExpertScales(absmax=absmax, nested_absmax=outer, offset=offset)
    return packed, ExpertScales(absmax=absmax)


# ---------------------------------------------------------------- the layer


@dataclass(frozen=True, slots=True)
class Routed:
    """Pairs of a token and an expert held here, expert by expert.

    Attributes:
        pairs: their places among the T x K pairs, [S].
        tokens: rows of the input, [S].
        experts: of each, [S].
        groups: expert, first pair and one past the last, of those experts that got any.
    """

    pairs: Tensor
    tokens: Tensor
    experts: Tensor
    groups: tuple[tuple[int, int, int], ...]

    @staticmethod
    def of(top_k_index: Tensor, num_experts: int) -> Routed:
        """Sort the pairs of `top_k_index` [T, K]; what is `num_experts` or more is left out."""
        experts, pairs = torch.sort(top_k_index.reshape(-1), stable=True)
        ends = torch.searchsorted(
            experts, torch.arange(num_experts, device=experts.device), right=True
        ).tolist()  # the one wait for the device: which experts to decode is known here only
        starts = [0, *ends[:-1]]
        groups = [(e, a, b) for e, (a, b) in enumerate(zip(starts, ends, strict=True)) if a < b]
        pairs = pairs[: ends[-1]]
        return Routed(pairs, pairs // top_k_index.shape[-1], experts[: ends[-1]], tuple(groups))


class _Products(torch.autograd.Function):
    """Each expert's `x @ W.T` on its rows, W decoded anew in the backward.

    It keeps the module, whose weights ZeRO-3 gathers again, and nothing else.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: Experts4bit, kind: str, routed: Routed) -> Tensor:
        ctx.module, ctx.kind, ctx.routed = module, kind, routed
        y = x.new_empty(len(x), module.shape_of(kind)[0])
        for expert, start, stop in routed.groups:
            y[start:stop] = x[start:stop] @ module.dequantized(kind, expert, x.dtype).t()
        return y

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, None, None, None]:
        (grad,) = grads
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        module: Experts4bit = ctx.module
        grad_x = grad.new_empty(len(grad), module.shape_of(ctx.kind)[1])
        for expert, start, stop in ctx.routed.groups:
            weight = module.dequantized(ctx.kind, expert, grad.dtype)
            grad_x[start:stop] = grad[start:stop] @ weight
        return grad_x, None, None, None


class Experts4bit(nn.Module):
    """A layer's experts, frozen, their matrices in NF4: a mixin before the architecture's class.

    The parameters keep their names (`gate_up_proj` or `up_proj`, and `down_proj`) and hold codes,
    uint8 [E, O I / 2], each expert's matrix as [O, I] however the architecture lays it out. Gating,
    activation, biases and norms are the architecture's own.

    Attributes:
        num_experts: held here. An index from there on is another rank's expert, and adds nothing.
        compute_dtype: of the products; None for that of the input.
        matrices: names of the parameters.
        scales: of each, once it is filled.
        added: what adapters add to a product while they are on, by name of the parameter.
    """

    num_experts: int
    compute_dtype: torch.dtype | None
    matrices: tuple[str, str]
    scales: dict[str, ExpertScales]
    added: dict[str, Any]
    _shapes: dict[str, tuple[int, int]]
    _states: dict[str, list[Any]]

    def shape_of(self, kind: str) -> tuple[int, int]:
        """Size [O, I] of an expert's matrix."""
        return self._shapes[kind]

    def install(self, kind: str, packed: Tensor, scales: ExpertScales, dtype: torch.dtype) -> None:
        """Fill a projection: codes [E, O I / 2] and their scales; `dtype` is what they decode to.

        Raises:
            RuntimeError: the codes are of another size.
        """
        shape = self.shape_of(kind)
        if list(packed.shape) != [self.num_experts, (shape[0] * shape[1] + 1) // 2]:
            raise RuntimeError(f"{kind} has codes {list(packed.shape)} for {shape}")
        setattr(self, kind, nn.Parameter(packed, requires_grad=False))
        self.scales[kind] = scales
        self._states[kind] = scales.states(shape, dtype)

    def held(self) -> Iterator[tuple[str, Tensor]]:
        """All that it holds of its matrices once it is filled, by name: codes and scales."""
        for kind in self.matrices:
            yield kind, getattr(self, kind).data
            for what, tensor in self.scales[kind].named():
                yield f"{kind}.{what}", tensor

    def dequantized(self, kind: str, expert: int, dtype: torch.dtype) -> Tensor:
        """One expert's matrix [O, I] in `dtype`, a fresh tensor."""
        codes: Tensor = getattr(self, kind).data[expert]
        assert codes.is_contiguous(), "ZeRO-3 has not gathered these experts"
        state = self._states[kind][expert]
        return bnb_functional.dequantize_4bit(codes.unsqueeze(-1), state).to(dtype)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """What each token's experts make of it, weighted and summed.

        Args:
            hidden_states: [T, D].
            top_k_index: experts of each token, [T, K].
            top_k_weights: their weights, [T, K].

        Returns:
            [T, D], in the dtype of `hidden_states`.
        """
        own: Any = self
        dtype = self.compute_dtype or hidden_states.dtype
        routed = Routed.of(top_k_index, self.num_experts)
        with torch.autocast(hidden_states.device.type, enabled=False):
            x = hidden_states.to(dtype)[routed.tokens]
            x = self._product(x, self.matrices[0], routed)
            x = own._apply_gate(x) if own.has_gate else own.act_fn(x)
            x = self._product(x, self.matrices[1], routed)
            if own.has_post_expert_norm:
                x = own.post_expert_norm(x)
            x = x * top_k_weights.reshape(-1)[routed.pairs].unsqueeze(-1)
            # Each pair in its own row, then one sum over a token's: the order is the same always.
            rows = x.new_zeros(top_k_index.numel(), x.shape[-1]).index_copy(0, routed.pairs, x)
            y = rows.view(*top_k_index.shape, x.shape[-1]).sum(dim=1)
        return y.to(hidden_states.dtype)

    def _product(self, x: Tensor, kind: str, routed: Routed) -> Tensor:
        y = cast(Tensor, _Products.apply(x, self, kind, routed))
        own: Any = self
        if own.has_bias:
            y = y + getattr(self, f"{kind}_bias").to(y.dtype)[routed.experts]
        adapter = self.added.get(kind)
        return y if adapter is None else y + adapter(x, routed)


_CLASSES: dict[type, type] = {}


def hold_in_4_bits(model: nn.Module) -> int:
    """Turn the fused experts of a model on `meta` into such ones, without weights, in place.

    Linear layers beside them that choose experts or weigh the shared one stay in full precision.

    Args:
        model: whose linear layers are bitsandbytes' already.

    Returns:
        How many layers have experts.
    """
    for path in routers_of(model):
        layer: Any = model.get_submodule(path)
        plain = nn.Linear(
            layer.in_features, layer.out_features, layer.bias is not None, device="meta"
        )
        model.set_submodule(path, plain.requires_grad_(False))
    found = experts_of(model)
    for module in found.values():
        _without_weights(module)
    return len(found)


def routers_of(model: nn.Module) -> list[str]:
    """Paths of linear layers beside experts that choose them, or weigh the shared one."""
    found: dict[str, None] = {}
    for path, experts in experts_of(model).items():
        block = path.rpartition(".")[0]
        for name, layer in model.get_submodule(block).named_modules(prefix=block):
            is_linear = isinstance(layer, nn.Linear)
            is_other = re.search(r"attn|attention|(gate|up|down)_proj$", name)
            if is_linear and not is_other and layer.out_features in (1, experts.num_experts):
                found[name] = None
    return list(found)


def _without_weights(module: nn.Module) -> None:
    own: Any = module
    kinds = matrices_of(module)
    shapes = {kind: tuple(getattr(own, kind).shape[1:]) for kind in kinds}
    kind_of = type(module)
    if kind_of not in _CLASSES:
        _CLASSES[kind_of] = type(f"{kind_of.__name__}4bit", (Experts4bit, kind_of), {})
    transposed = bool(own.is_transposed)
    own.__class__ = _CLASSES[kind_of]
    own.compute_dtype, own.matrices = None, kinds
    own.scales, own.added, own._states = {}, {}, {}
    own._shapes = {k: (s[1], s[0]) if transposed else (s[0], s[1]) for k, s in shapes.items()}
    keep(own, own.num_experts)


def keep(module: nn.Module, num_experts: int) -> None:
    """Give experts on `meta` the sizes of as many of them.

    Args:
        module: of experts, packed or not.
        num_experts: how many it shall hold.
    """
    own: Any = module
    if num_experts != own.num_experts:
        own._is_expert_parallel = True  # for transformers' own products: some are held elsewhere
    own.num_experts = num_experts
    for kind, parameter in list(own.named_parameters(recurse=False)):
        shape, dtype = [num_experts, *parameter.shape[1:]], parameter.dtype
        if isinstance(own, Experts4bit) and kind in own.matrices:
            rows, columns = own.shape_of(kind)
            shape, dtype = [num_experts, (rows * columns + 1) // 2], torch.uint8
        empty = torch.empty(shape, dtype=dtype, device="meta")
        own.register_parameter(kind, nn.Parameter(empty, requires_grad=False))


# ---------------------------------------------------------------- what cannot be


def require_quantisable(causal_lm: Any) -> None:
    """Refuse an architecture whose experts would stay in 16 bits.

    Args:
        causal_lm: without weights, its linear layers as transformers makes them.

    Raises:
        UserError: naming the first of them.
    """
    linear, stacks = 0, list[tuple[int, str, nn.Module, Tensor]]()
    for path, module in causal_lm.named_modules():
        if isinstance(module, (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, Conv1D)):
            linear += sum(p.numel() for p in module.parameters(recurse=False))
            continue
        for kind, parameter in module.named_parameters(recurse=False):
            if kind in matrices_of(module) or kind.endswith("bias") or parameter.dim() < 2:
                continue
            if "Expert" in type(module).__name__ or (
                parameter.dim() == 3 and min(parameter.shape) > 1
            ):
                stacks.append((parameter.numel(), f"{path}.{kind}", module, parameter))
    if sum(size for size, *_ in stacks) > 0.1 * linear:
        _, name, module, parameter = stacks[0]
        raise UserError(
            f"model.quantization: nf4: {type(causal_lm).__name__} has experts in {name} "
            f"{tuple(parameter.shape)} of a class ({type(module).__name__}) that cannot be held in "
            "4 bits, and would stay in 16: set model.quantization to none, and "
            "parallel.zero_stage to 3 if that does not fit"
        )
