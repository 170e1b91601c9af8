"""ZeRO-3's part of the base: the frozen weights of a layer in equal parts, whole while at work.

Each decoder layer is one flat buffer of bytes, of which a rank keeps its part; one all-gather makes
it whole, for the forward and again for the backward, and the next layer is on its way meanwhile.
Embedding and head are such buffers, too. What is trained is not cut here: gradients and the
optimizer's state are DeepSpeed's (`zero.py`).
"""

# torch.distributed is typed in part only.
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false
from __future__ import annotations

import contextlib
import logging
import re
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from moored.distributed.mesh import Axis
from moored.models.experts import matrices_of

log = logging.getLogger(__name__)
_ALIGNMENT = 64  # bytes, of every weight in a buffer
_LAYER = re.compile(r".*?\.\d+(?=\.|$)")  # the path of a decoder layer, in that of what is in it
# Of the memory that is free, what a whole base may take for a generation: caches come on top.
_SHARE_FOR_GENERATION = 0.5


class Buffer:
    """Frozen weights that are gathered together: bytes, of which every rank keeps an equal part.

    While it is not whole its weights have their shapes and next to no storage.

    Args:
        name: of the module that needs them.
        weights: whole, on every rank the same.
        axis: the ranks.
    """

    def __init__(self, name: str, weights: Iterable[nn.Parameter], axis: Axis):
        self.name, self._axis = name, axis
        self._views: list[tuple[nn.Parameter, int, int, torch.dtype, torch.Size, Tensor]] = []
        start = 0
        for weight in weights:
            nbytes = weight.numel() * weight.element_size()
            # Floats that nobody gathered are no numbers; packed weights are asked (`nf4.py`).
            fill = float("nan") if weight.is_floating_point() else 0
            away = weight.data.new_full((1,), fill).expand(weight.shape)
            self._views.append((weight, start, nbytes, weight.dtype, weight.shape, away))
            start += -(-nbytes // _ALIGNMENT) * _ALIGNMENT
        self.nbytes = -(-start // (axis.size * _ALIGNMENT)) * axis.size * _ALIGNMENT
        first = self._views[0][0]
        size = self.nbytes // axis.size
        self.part = torch.zeros(size, dtype=torch.uint8, device=first.device)
        self._whole: Tensor | None = None
        self._arriving: Any = None
        begin = axis.rank * size
        for weight, start, nbytes, *_, away in self._views:
            low, high = max(start, begin), min(start + nbytes, begin + size)
            if low < high:
                self.part[low - begin : high - begin] = _bytes(weight)[low - start : high - start]
            weight.data = away
            # DeepSpeed would have rank 0 send it to all.
            weight.ds_status = "cut"  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def weights(self) -> list[nn.Parameter]:
        """What is in it."""
        return [weight for weight, *_ in self._views]

    def begin(self) -> None:
        """Have the parts sent, without waiting for them. Collective."""
        if self._whole is None:
            self._whole = self.part.new_empty(self.nbytes)
            self._arriving = dist.all_gather_into_tensor(
                self._whole, self.part, group=self._axis.group, async_op=True
            )

    def gather(self) -> None:
        """Make the weights whole. Collective."""
        self.begin()
        if self._arriving is not None:
            self._arriving.wait()
            self._arriving = None
            assert self._whole is not None
            for weight, start, nbytes, dtype, shape, _ in self._views:
                weight.data = self._whole[start : start + nbytes].view(dtype).view(shape)

    def release(self) -> None:
        """Let go of all but this rank's part."""
        if self._arriving is not None:
            self._arriving.wait()
            self._arriving = None
        elif self._whole is not None:
            for weight, *_, away in self._views:
                weight.data = away
        self._whole = None

    def restore(self) -> None:
        """Make the weights whole for good, in storage of their own. Collective."""
        self.gather()
        for weight in self.weights:
            weight.data = weight.data.clone()
        self._whole = None


class Partition:
    """Cuts the base over ranks, and has at most one layer whole beside the one at work.

    While the base loads, the weights of a linear layer or of experts are cut one by one, as soon as
    they are filled; `hand_over` then cuts the policy layer by layer.

    DeepSpeed is not asked: it hangs hooks on every module (6,650 at 80 layers) where one per layer
    will do, and gathers a layer weight by weight.

    Args:
        axis: the ranks; each holds other data.

    Attributes:
        fetched: how often each buffer was on its way when it was needed ("ahead"), was only then
            asked for ("late"), or whole since the call before ("held").
    """

    def __init__(self, axis: Axis):
        self.axis = axis
        self.fetched: Counter[tuple[str, str]] = Counter()
        self._loading: list[Buffer] = []
        self._handles: list[RemovableHandle] = []
        self._buffers: list[Buffer] = []  # empty until `hand_over`
        self._most_ahead = 0
        self._is_whole = False
        self._at_work: Buffer | None = None
        self._ahead: Buffer | None = None
        # In which order buffers are needed, by kind of call; what is ahead is found by that.
        self._orders: dict[Hashable, list[Buffer]] = {}
        self._order: list[Buffer] = []
        self._place = 0
        self._last: Buffer | None = None

    # -- while the base loads ----------------------------------------------------------------

    def __call__(self, path: str, module: nn.Module) -> None:
        """Cut the weights of a layer of the stack; leave every other module."""
        kinds = ("weight",) if isinstance(module, nn.Linear) else matrices_of(module)
        weights: list[nn.Parameter] = [getattr(module, kind) for kind in kinds]
        if not _LAYER.match(f"{path}.") or not weights or any(w.is_meta for w in weights):
            return
        buffer = Buffer(path, weights, self.axis)
        self._loading.append(buffer)
        self._handles += [
            module.register_forward_pre_hook(lambda *_: buffer.gather()),
            module.register_forward_hook(lambda *_: buffer.release()),
        ]

    # -- from then on --------------------------------------------------------------------------

    def hand_over(self, policy: nn.Module) -> None:
        """Cut the policy layer by layer, and gather each when it is called. Collective, once.

        Args:
            policy: with its adapters; no module may be added later on.
        """
        if self._buffers:
            return
        while self._handles:
            self._handles.pop().remove()
        loading = {id(weight): buffer for buffer in self._loading for weight in buffer.weights}
        users: dict[str, tuple[list[nn.Module], list[nn.Parameter]]] = {}
        keys: dict[int, str] = {}  # a tied table is one weight of several modules
        for path, module in policy.named_modules():
            layer = _LAYER.match(path)
            if layer is not None and layer[0] == path and not isinstance(module, nn.ModuleList):
                users.setdefault(path, ([], []))[0].append(module)
            for parameter in module.parameters(recurse=False):
                if parameter.requires_grad or parameter.dim() < 2:
                    continue
                key = keys.setdefault(id(parameter), layer[0] if layer is not None else path)
                modules, weights = users.setdefault(key, ([], []))
                if not any(parameter is weight for weight in weights):
                    weights.append(parameter)
                if layer is None:
                    modules.append(module)
        largest_layer = 0
        for key, (modules, weights) in users.items():
            if not weights:
                continue
            for weight in weights:
                if (buffer := loading.pop(id(weight), None)) is not None:
                    buffer.restore()
                    for other in buffer.weights:
                        loading.pop(id(other), None)
            buffer = Buffer(key, weights, self.axis)
            self._buffers.append(buffer)
            if _LAYER.match(key):
                largest_layer = max(largest_layer, buffer.nbytes)
            for module in modules:
                self._watch(module, buffer)
        self._loading = []
        self._most_ahead = largest_layer or max((b.nbytes for b in self._buffers), default=0)

    def _watch(self, module: nn.Module, buffer: Buffer) -> None:
        def before(*_: Any) -> None:
            self._need(buffer)

        def before_backward(_: Tensor) -> None:
            self._need(buffer)

        def after(_: nn.Module, inputs: Any, output: Any) -> None:
            # A layer's backward begins with its output's gradient.
            for tensor in output if isinstance(output, (tuple, list)) else (output,):
                if isinstance(tensor, Tensor) and tensor.requires_grad:
                    tensor.register_hook(before_backward)

        module.register_forward_pre_hook(before, prepend=True)
        module.register_forward_hook(after)

    def begin(self, kind: Hashable) -> None:
        """Say that a call begins which needs the same buffers as every other of its kind."""
        self._order, self._place, self._last = self._orders.setdefault(kind, []), 0, None

    def _need(self, buffer: Buffer) -> None:
        """Have a buffer whole, and the next one under way. Collective."""
        if self._is_whole or buffer is self._last:
            return
        self._last = buffer
        if self._place >= len(self._order) or self._order[self._place] is not buffer:
            del self._order[self._place :]  # it is another order than before: learn it
            self._order.append(buffer)
        self._place += 1
        where = {id(self._at_work): "held", id(self._ahead): "ahead"}
        self.fetched[buffer.name, where.get(id(buffer), "late")] += 1
        for other in (self._at_work, self._ahead):
            if other is not None and other is not buffer:
                other.release()
        buffer.gather()
        self._at_work, self._ahead = buffer, None
        following = self._order[self._place] if self._place < len(self._order) else buffer
        if following is not buffer and following.nbytes <= self._most_ahead:
            following.begin()
            self._ahead = following

    def release(self) -> None:
        """Let go of what is whole, until it is needed again."""
        for buffer in (self._at_work, self._ahead):
            if buffer is not None:
                buffer.release()
        self._at_work = self._ahead = self._last = None

    @contextlib.contextmanager
    def whole_if_it_fits(self, device: torch.device, world: Axis) -> Iterator[bool]:
        """Run the body with the whole base gathered, if every rank has room for it. Collective.

        Args:
            device: where it is.
            world: who must agree: all that generate in step where it does not fit.

        Yields:
            Whether it is.
        """
        if self._is_whole:
            yield True
            return
        size = sum(buffer.nbytes for buffer in self._buffers)
        fits = size <= _SHARE_FOR_GENERATION * _free_bytes(device, self.axis.size)
        if world.max(float(not fits), device):
            log.info("the base (%.1f GiB) is not gathered for a generation", size / 2**30)
            yield False
            return
        self.release()
        try:
            for buffer in self._buffers:
                buffer.begin()
            for buffer in self._buffers:
                buffer.gather()
            self._is_whole = True
            yield True
        finally:
            self._is_whole = False
            for buffer in self._buffers:
                buffer.release()

    @property
    def buffers(self) -> tuple[Buffer, ...]:
        """All that is cut so far."""
        return (*self._loading, *self._buffers)


def is_cut(parameter: nn.Parameter) -> bool:
    """Whether it is whole only while it is at work."""
    return hasattr(parameter, "ds_status")


def _bytes(weight: nn.Parameter) -> Tensor:
    return weight.data.contiguous().reshape(-1).view(torch.uint8)


def _free_bytes(device: torch.device, num_ranks: int) -> float:
    """Memory of this rank that nothing holds; without a GPU all may be on one machine."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return psutil.virtual_memory().available / num_ranks
