"""A model whose layers are spread over ranks: sizes, hooks, and the adapters on it.

The layers stay what they were (bitsandbytes', torch's, PEFT's), only smaller; what is sent is sent
by hooks around them. Column layers share one entrance per region, so that a region costs one sum
in the forward and one in the backward. An adapter's matrix that every rank holds has its gradient
summed, the others are cut like the layer they adapt.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import bitsandbytes as bnb
import torch
from peft import LoraConfig
from peft.tuners import lora
from peft.tuners.lora.dora import DoraLinearLayer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from moored.distributed.mesh import Axis
from moored.loss.divergence import VocabShard
from moored.models.experts import keep
from moored.models.tensor_parallel import regions
from moored.models.tensor_parallel.layout import Sharded, ShardLayout, Split
from moored.sinelora import SineLayer
from moored.utils.errors import UserError


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
    for path, module in _as_created(causal_lm):
        base: Any = module.get_base_layer()
        layer = layout.layers.get(_plain(path))
        options: dict[str, Any] = {"config": config, "r": config.r, "lora_alpha": config.lora_alpha}
        if isinstance(module, lora.ParamWrapper):
            num = base.num_experts if layer is None else layer.split.whole
            holder: Any = nn.Module()
            holder.is_transposed = base.is_transposed
            sizes = [num, module.in_features, module.out_features]
            if not base.is_transposed:
                sizes = [num, module.out_features, module.in_features]
            hollow = nn.Parameter(torch.zeros(()).expand(sizes), requires_grad=False)
            holder.register_parameter(module.parameter_name, hollow)
            options["parameter_name"] = module.parameter_name
            whole: Any = lora.ParamWrapper(holder, "default", **options)
        else:
            whole = lora.Linear(_hollow(base, layer), "default", **options)
        for part in ("lora_A", "lora_B"):
            matrix: Any = getattr(whole, part)["default"].weight
            drawn[f"{path}.{part}"] = matrix.detach()
    return drawn


def _as_created(causal_lm: nn.Module) -> Iterator[tuple[str, Any]]:
    """PEFT's layers in the order in which it makes them: those around parameters last, inside out.

    By their paths.
    """
    layers = [(p, m) for p, m in causal_lm.named_modules() if isinstance(m, lora.LoraLayer)]
    yield from (pair for pair in layers if not isinstance(pair[1], lora.ParamWrapper))
    around = [pair for pair in layers if isinstance(pair[1], lora.ParamWrapper)]
    places = {_plain(path): place for place, (path, _) in reversed(list(enumerate(around)))}
    yield from sorted(around, key=lambda pair: (places[_plain(pair[0])], -len(pair[0])))


def _hollow(base: Any, layer: Sharded | None) -> nn.Linear:
    """A linear layer of the whole size, which takes no memory."""
    sizes = [base.out_features, base.in_features]
    if layer is not None:
        sizes[layer.split.dim] = layer.split.whole
    hollow: Any = nn.utils.skip_init(nn.Linear, sizes[1], sizes[0], bias=False, device="meta")
    dtype = base.weight.dtype if base.weight.dtype.is_floating_point else torch.float32
    zeros = torch.zeros((), dtype=dtype).expand(sizes)
    hollow.weight = nn.Parameter(zeros, requires_grad=False)
    return hollow


def _plain(path: str) -> str:
    """A module's own path; PEFT puts several layers around one module into one another."""
    return path.replace(".base_layer", "")


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


_ADAPTER = re.compile(
    r"^(?:causal_lm\.)?base_model\.model\.(?P<path>.+)\.lora_(?P<part>A|B|magnitude_vector)\b"
)


class Sharding:
    """One model's layout, seen from one rank.

    Attributes:
        layout: which rank holds what.
        axis: the tensor-parallel axis.
        sequence_parallel: residual stream and norms are dealt out by tokens, too.
    """

    def __init__(self, layout: ShardLayout, axis: Axis, *, sequence_parallel: bool = False):
        self.layout, self.axis, self.sequence_parallel = layout, axis, sequence_parallel
        self._sequence = regions.Sequence(axis)
        self._handles: list[RemovableHandle] = []
        self._ranks: dict[
            str, int
        ] = {}  # of the adapters of experts, by the paths of PEFT's layers

    # -- the base ---------------------------------------------------------------------------

    def narrow(self, causal_lm: nn.Module) -> None:
        """Give every sharded layer the sizes of this rank's share; the weights come later."""
        for path, layer in self.layout.layers.items():
            module: Any = causal_lm.get_submodule(path)
            size = layer.split.sizes[self.axis.rank]
            if layer.style == "experts":
                keep(module, size)
                continue
            for kind, parameter in list(module.named_parameters(recurse=False)):
                split = self.layout.of_parameter(f"{path}.{kind}")
                is_packed = kind == "weight" and isinstance(module, bnb.nn.Linear4bit)
                if split is not None and not is_packed:
                    shape = list(parameter.shape)
                    shape[split.dim] = size
                    empty = torch.empty(shape, dtype=parameter.dtype, device="meta")
                    module.register_parameter(kind, nn.Parameter(empty, requires_grad=False))
            if isinstance(module, nn.Embedding):
                module.num_embeddings, module.padding_idx = size, None
            elif layer.split.dim == 0:
                module.out_features = size
            else:
                module.in_features = size
                if self.axis.rank:  # in the sum, the first rank's share carries the bias
                    module.register_parameter("bias", None)

    def connect(self, causal_lm: nn.Module, *, by_tokens: bool | None = None) -> None:
        """Put the hooks around the layers, or around the adapters that they are in by now.

        Args:
            causal_lm: the model.
            by_tokens: whether it has sequence parallelism from now on; None: as before.
        """
        if by_tokens is not None:
            self.sequence_parallel = by_tokens
        while self._handles:
            self._handles.pop().remove()
        if self.sequence_parallel:
            for path in self.layout.blocks:  # what chooses experts sees every token, as they do
                self._before(causal_lm.get_submodule(path), self._sequence.collect)
                self._after(causal_lm.get_submodule(path), self._sequence.deal)
        for path in self.layout.regions:
            self._before(causal_lm.get_submodule(path), partial(self._enter, path=path))
        for path, layer in self.layout.layers.items():
            module = causal_lm.get_submodule(path)
            if layer.style == "vocabulary":
                if isinstance(module, nn.Embedding):
                    self._connect_embedding(module, layer.split)
                continue
            if layer.style == "experts":
                self._connect_experts(module, layer.split)
                self._after(module, partial(regions.reduce_from, axis=self.axis))
            if layer.style == "split":
                self._before(module, partial(regions.scatter_to, axis=self.axis, split=layer.split))
            if layer.style == "gathered":
                self._after(module, partial(regions.gather_from, axis=self.axis, split=layer.split))
            elif layer.sums_output:
                self._after(module, partial(self._leave, path=path))
        if self.sequence_parallel:
            stack: Any = causal_lm.get_submodule(self.layout.stack)
            self._before(stack[0], self._sequence.deal)
            self._after(stack[-1], self._sequence.collect)

    def _enter(self, x: Tensor, path: str) -> Tensor:
        if self.sequence_parallel and not self.layout.in_block(path):
            return self._sequence.copy_to(x)
        return regions.copy_to(x, self.axis)

    def _leave(self, x: Tensor, path: str) -> Tensor:
        if self.sequence_parallel and not self.layout.in_block(path):
            return self._sequence.reduce_from(x)
        return regions.reduce_from(x, self.axis)

    def _before(self, module: nn.Module, move: regions.Move) -> None:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if args:
                return (move(args[0]), *args[1:]), kwargs
            return args, kwargs | {"hidden_states": move(kwargs["hidden_states"])}

        self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def _after(self, module: nn.Module, move: regions.Move) -> None:
        def hook(_: nn.Module, _args: Any, output: Any) -> Any:
            return (move(output[0]), *output[1:]) if isinstance(output, tuple) else move(output)

        self._handles.append(module.register_forward_hook(hook))

    def _connect_embedding(self, module: nn.Embedding, split: Split) -> None:
        """Look up the rows held here, and let every other rank's be zeros in the sum."""
        start, stop = split.range_of(self.axis.rank)
        elsewhere: list[Tensor] = []

        def before(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
            (ids,) = args
            elsewhere.append((ids < start) | (ids >= stop))
            return ((ids - start).masked_fill(elsewhere[-1], 0),)

        def after(_: nn.Module, _args: Any, rows: Tensor) -> Tensor:
            return self.axis.sum(rows.masked_fill(elsewhere.pop().unsqueeze(-1), 0))

        self._handles.append(module.register_forward_pre_hook(before))
        self._handles.append(module.register_forward_hook(after))

    def _connect_experts(self, module: nn.Module, split: Split) -> None:
        """Number this rank's experts from 0, and put all others past the last."""
        start, stop = split.range_of(self.axis.rank)

        def before(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            hidden, index, weights = args
            elsewhere = (index < start) | (index >= stop)
            weights = regions.copy_to(weights, self.axis).masked_fill(elsewhere, 0)
            own = (index - start).masked_fill(elsewhere, stop - start)
            return regions.copy_to(hidden, self.axis), own, weights

        self._handles.append(module.register_forward_pre_hook(before))

    def vocabulary(self, lm_head: nn.Module, causal_lm: nn.Module) -> VocabShard:
        """The rows of the head that this rank holds."""
        path = next(path for path, module in causal_lm.named_modules() if module is lm_head)
        split = self.layout.layers[path].split
        return VocabShard(*split.range_of(self.axis.rank), split.whole, self.axis.group)

    # -- adapters ---------------------------------------------------------------------------

    def split_of(self, name: str) -> Split | None:
        """How a parameter of the adapter is cut; None where every rank holds all of it.

        Args:
            name: as in the policy, in the PEFT model or in a saved adapter.
        """
        layer, path, part = self._adapted(name)
        if layer is not None and layer.style == "experts":
            bounds = tuple(self._ranks[path] * bound for bound in layer.split.bounds)
            return Split(0 if part == "A" else 1, bounds)
        if layer is None or layer.sums_output != (part == "A"):
            return None
        return layer.split

    def _adapted(self, name: str) -> tuple[Sharded | None, str, str]:
        match = _ADAPTER.match(name)
        if match is None:
            raise ValueError(f"{name} is no parameter of a LoRA adapter")
        path = match["path"]
        return self.layout.layers.get(_plain(path)), path, match["part"]

    def _by_expert(self, name: str, tensor: Tensor) -> tuple[Tensor, Split] | None:
        """B of experts [O, r E] as [O, r, E], whose last dimension is cut; None for any other."""
        layer, path, part = self._adapted(name)
        if layer is None or layer.style != "experts" or part != "B":
            return None
        return tensor.view(len(tensor), self._ranks[path], -1), layer.split

    def local(self, name: str, whole: Tensor) -> Tensor:
        """This rank's part of a whole tensor of the adapter.

        Raises:
            ValueError: it has another size than the layout says.
        """
        split = self.split_of(name)
        if split is None:
            return whole
        if whole.shape[split.dim] != split.whole:
            raise ValueError(f"{name} has shape {tuple(whole.shape)}, not {split.whole} wide")
        if (found := self._by_expert(name, whole)) is not None:
            by_expert, experts = found
            start, stop = experts.range_of(self.axis.rank)
            return by_expert[..., start:stop].reshape(len(whole), -1)
        start, stop = split.range_of(self.axis.rank)
        return whole.narrow(split.dim, start, stop - start).contiguous()

    def whole(self, name: str, local: Tensor) -> Tensor:
        """The whole tensor from every rank's part. Collective."""
        split = self.split_of(name)
        if split is None:
            return local
        if (found := self._by_expert(name, local)) is not None:
            by_expert, experts = found
            joined = self.axis.concatenate(by_expert.contiguous(), 2, experts.sizes)
            return joined.reshape(len(local), -1)
        return self.axis.concatenate(local, split.dim, split.sizes)

    def adopt(self, causal_lm: nn.Module) -> None:
        """Take up the adapters that PEFT has put in, which have this rank's sizes already.

        Raises:
            UserError: an adapter whose result is not the same when it is spread.
        """
        for path, module in causal_lm.named_modules():
            if not isinstance(module, lora.LoraLayer):
                if hasattr(module, "base_layer"):
                    kind = type(module).__name__
                    raise UserError(
                        f"adapter: {kind} cannot be spread over ranks: use lora, or "
                        "parallel.tensor_parallel_degree 1"
                    )
                continue
            if any(module.lora_bias.values()):
                raise UserError(
                    "adapter: lora_bias cannot be spread over ranks: leave it out, or use "
                    "parallel.tensor_parallel_degree 1"
                )
            if isinstance(module, lora.ParamWrapper):
                self._ranks[path] = module.r["default"]
            layer = self.layout.layers.get(_plain(path))
            if layer is not None and layer.sums_output:
                adopt_row_layer(module, self.axis, layer.split)
            parameters: Any = module
            for name, parameter in parameters.named_parameters():
                full = f"base_model.model.{path}.{name}"
                if name.startswith("base_layer."):
                    continue  # of a layer that is visited by itself
                if "lora_" in name and self._has_partial_gradient(full):
                    parameter.register_hook(self.axis.sum)
        self.connect(causal_lm)

    def _has_partial_gradient(self, name: str) -> bool:
        layer, path, _ = self._adapted(name)
        if layer is None:
            # It has seen this rank's tokens only.
            return self.sequence_parallel and not self.layout.in_block(path)
        return self.split_of(name) is None
