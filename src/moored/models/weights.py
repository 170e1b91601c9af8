"""From safetensors into a model without weights, one tensor at a time, this rank's slices only.

Linear layers are quantised on the way, in pieces, so that a process never holds more than what it
keeps and one tensor. Nothing is known here of architectures: names and shapes are the model's.
"""

# safetensors and bitsandbytes are untyped in parts.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import bitsandbytes.functional as bnb_functional
import torch
from safetensors import safe_open
from torch import Tensor, nn

from moored.distributed.mesh import Axis
from moored.models import nf4
from moored.models.conversions import Part, index_of
from moored.models.experts import Experts4bit, ExpertScales, matrices_of, pack
from moored.models.tensor_parallel import ShardLayout, Split
from moored.utils.progress import Phase

log = logging.getLogger(__name__)
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
PIECE = {"cpu": 2**20, "cuda": 2**24}  # elements that are cast and quantised at a time
AfterModule = Callable[[str, nn.Module], None]
_STATE = "weight.quant_state.bitsandbytes__nf4"


class Files:
    """The tensors of a folder with safetensors, by name.

    A file is mapped only while one tensor is read, so that its pages count for no longer; what
    cannot be mapped is read by place.

    Attributes:
        names: of all tensors; empty where the folder has no safetensors.
    """

    def __init__(self, folder: Path):
        self._of: Mapping[str, Path] = {}
        if (folder / INDEX).is_file():
            weight_map = json.loads((folder / INDEX).read_text()).get("weight_map")
            if not isinstance(weight_map, dict):
                raise OSError(f"{INDEX} has no weight_map")
            self._of = {name: folder / file for name, file in weight_map.items()}
        elif (folder / SINGLE).is_file():
            with _opened(folder / SINGLE) as file:
                self._of = {name: folder / SINGLE for name in file.keys()}  # noqa: SIM118
        self.names = frozenset(self._of)

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[Any]:
        """A slice object of one tensor: `get_shape()` and indexing."""
        try:
            with _opened(self._of[name]) as file:
                yield file.get_slice(name)
        except FileNotFoundError as error:
            raise OSError(f"{self._of[name].name} is missing, which should hold {name}") from error

    def shape(self, name: str) -> list[int]:
        """The shape of a tensor, which is not read."""
        with self.open(name) as stored:
            return list(stored.get_shape())

    def shapes(self) -> dict[str, list[int]]:
        """The shapes of all tensors, by name; each file is opened once."""
        of_file: dict[Path, list[str]] = {}
        for name, file in self._of.items():
            of_file.setdefault(file, []).append(name)
        found: dict[str, list[int]] = {}
        for path, names in of_file.items():
            try:
                with _opened(path) as file:
                    found |= {name: list(file.get_slice(name).get_shape()) for name in names}
            except FileNotFoundError as error:
                raise OSError(f"{path.name} is missing, which should hold {names[0]}") from error
        return found

    def dtype(self, name: str) -> str:
        """The type of a tensor, by safetensors' name for it; it is not read."""
        with self.open(name) as stored:
            return stored.get_dtype()

    def whole(self, name: str) -> Tensor:
        """A tensor of its own, all of it."""
        with self.open(name) as stored:
            return _slice(stored, None, 0).clone()


def _opened(path: Path) -> Any:
    """A file of safetensors: mapped, or, where the machine maps none of its size, read by place.

    A model in one file may have more bytes than a process may map (`ulimit -v`, SLURM's --mem,
    strict overcommitment); what is read of it at a time is a few rows or one tensor.
    """
    try:
        return safe_open(path, framework="pt")
    except (OSError, MemoryError, RuntimeError) as error:
        if not is_out_of_address_space(error):
            raise
    log.info("%s: this machine does not map a file of that size: it is read by place", path.name)
    return _ReadByPlace(path)


def is_out_of_address_space(error: BaseException) -> bool:
    """Whether it is what safetensors and torch say of a file that cannot be mapped."""
    is_said = "Cannot allocate memory" in str(error)
    return is_said or getattr(error, "errno", None) == errno.ENOMEM


class _ReadByPlace:
    """What safetensors' file objects do, by reading at offsets: no mapping.

    Raises:
        OSError: the header is none, or not that of a file of this size.
    """

    def __init__(self, path: Path):
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115  (`__exit__` closes it)
        try:
            size = path.stat().st_size
            first = self._file.read(8)
            length = int.from_bytes(first, "little")
            if len(first) < 8 or not 2 <= length <= min(size - 8, _LONGEST_HEADER):
                raise OSError(f"{path.name}: its header is broken")
            try:
                header = json.loads(_read(self._file, 8, length))
                header.pop("__metadata__", None)
                self._tensors = {
                    name: _PlacedTensor(self._file, 8 + length, **entry)
                    for name, entry in header.items()
                }
            except (ValueError, TypeError, AttributeError, KeyError) as error:
                raise OSError(f"{path.name}: its header is broken ({error})") from error
            end = max((tensor.end for tensor in self._tensors.values()), default=8 + length)
            if end != size:
                raise OSError(f"{path.name}: has {size} bytes, but its header says {end}")
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> _ReadByPlace:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def keys(self) -> list[str]:
        return list(self._tensors)

    def get_slice(self, name: str) -> _PlacedTensor:
        if name not in self._tensors:
            raise OSError(f"{self._file.name} has no tensor {name}")
        return self._tensors[name]


class _PlacedTensor:
    """What safetensors' slice objects do: rows are read, and cut further in memory."""

    def __init__(
        self, file: Any, start: int, *, dtype: str, shape: list[int], data_offsets: list[int]
    ):
        self._file, self._dtype, self._shape = file, dtype, shape
        self._kind = _KINDS[dtype]
        first, last = data_offsets
        self._start, self.end = start + first, start + last
        if not 0 <= first <= last or last - first != math.prod(shape) * self._kind.itemsize:
            raise ValueError(f"a tensor of shape {shape} in {dtype} has {last - first} bytes")

    def get_shape(self) -> list[int]:
        return list(self._shape)

    def get_dtype(self) -> str:
        return self._dtype

    def __getitem__(self, index: Any) -> Tensor:
        parts = index if isinstance(index, tuple) else (index,)
        rows = range(self._shape[0] if self._shape else 1)
        if self._shape and isinstance(parts[0], slice):
            rows = rows[parts[0]]
            parts = (slice(None), *parts[1:])
        row_bytes = math.prod(self._shape[1:]) * self._kind.itemsize
        data = _read(self._file, self._start + rows.start * row_bytes, len(rows) * row_bytes)
        shape = [len(rows), *self._shape[1:]] if self._shape else []
        if not data:
            return torch.empty(shape, dtype=self._kind)[parts]
        return torch.frombuffer(data, dtype=torch.uint8).view(self._kind).view(shape)[parts]


def _read(file: Any, start: int, length: int) -> bytearray:
    """Bytes of a file; the system hands over 2 GiB at a time at most."""
    data = bytearray(length)
    view, done = memoryview(data), 0
    file.seek(start)
    while done < length:
        got = file.readinto(view[done:])
        if not got:
            raise OSError(f"{file.name} ends at byte {start + done}, {length - done} too early")
        done += got
    return data


_LONGEST_HEADER = 100_000_000  # bytes, as safetensors has it
_KINDS = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


class RandomFiles(Files):
    """Tensors that no file holds, of the shapes and in the precision of a model's parameters.

    A value is a function of the tensor's name and of its place there, so that any slice, on any
    rank, is cut from the same whole. Norms are 1, biases and what else has one dimension 0.

    Attributes:
        names: of the parameters, without those that are tied to another.
    """

    def __init__(self, model: Any, device: torch.device):
        tied = model.all_tied_weights_keys
        self._shapes = {
            name: tuple(p.shape) for name, p in model.named_parameters() if name not in tied
        }
        self._device = device
        self.names = frozenset(self._shapes)

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[Any]:
        """As of a file."""
        yield _RandomTensor(name, self._shapes[name], self._device)

    def shapes(self) -> dict[str, list[int]]:
        """Those of the model."""
        return {name: list(shape) for name, shape in self._shapes.items()}


STD = 0.02  # of random matrices: what most models are initialised with
_ROWS_AT_A_TIME = 2**22  # elements


class _RandomTensor:
    """What safetensors' slice objects do, of a tensor that is made when it is cut."""

    def __init__(self, name: str, shape: tuple[int, ...], device: torch.device):
        self._shape, self._device = shape, device
        self._is_norm = "norm" in name and name.endswith("weight")
        self._seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "big")

    def get_shape(self) -> list[int]:
        return list(self._shape)

    def get_dtype(self) -> str:
        return "F32"

    def __getitem__(self, index: Any) -> Tensor:
        if len(self._shape) < 2:
            whole = torch.full(self._shape, float(self._is_norm), device=self._device)
            return whole[index]
        where = index if isinstance(index, tuple) else (index,)
        axes = [range(size) for size in self._shape]
        for axis, part in enumerate(where):
            if part is not Ellipsis:
                axes[axis] = axes[axis][part]
        columns = torch.arange(math.prod(self._shape[1:]), device=self._device)
        columns = columns.view(self._shape[1:])
        for axis, part in enumerate(axes[1:]):
            columns = columns.narrow(axis, part.start, len(part))
        out = torch.empty((len(axes[0]), *columns.shape), device=self._device)
        step = max(1, _ROWS_AT_A_TIME // max(1, columns.numel()))
        per_row = math.prod(self._shape[1:])
        for first in range(0, len(axes[0]), step):
            rows = torch.arange(first, min(first + step, len(axes[0])), device=self._device)
            places = (rows + axes[0].start) * per_row
            out[rows] = self._values(places.view(-1, *[1] * columns.dim()) + columns)
        return out

    def _values(self, places: Tensor) -> Tensor:
        """Uniform values of standard deviation STD: a mix of bits (murmur3's) of each place."""
        bits = places.to(torch.int32) ^ (self._seed - 2**31)
        for factor in (0x85EBCA6B - 2**32, 0xC2B2AE35 - 2**32):
            bits = (bits ^ ((bits >> 15) & 0x1FFFF)) * factor
        bits = bits ^ ((bits >> 16) & 0xFFFF)
        return bits.float() * (STD * 3**0.5 / 2**31)


class ShapeError(RuntimeError):
    """A tensor of another shape than the model's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loader:
    """Puts the tensors of a folder into a model on `meta`.

    Attributes:
        files: the tensors.
        dtype: of everything that is not packed.
        device: where it goes.
        double: whether scales are quantised, too.
        layout: which rank holds what; None for the whole model on every rank.
        axis: the tensor-parallel axis.
        keep_fp32: parts of names that stay in fp32.
        parts: by the model's names, how its tensors come of the files'; None where both are the
            same.
    """

    files: Files
    dtype: torch.dtype
    device: torch.device
    double: bool
    layout: ShardLayout | None
    axis: Axis
    keep_fp32: frozenset[str] = frozenset()
    parts: Mapping[str, Part] | None = None

    def load(self, model: nn.Module, after: AfterModule | None = None) -> set[str]:
        """Fill the model.

        Args:
            model: on `meta`, with this rank's sizes.
            after: called with each module's path and the module, once it is filled.

        Returns:
            The names of parameters that have no tensor, still on `meta`: tied ones, or missing.

        Raises:
            ShapeError: a tensor has another shape than the model's.
            OSError, SafetensorError: a file cannot be read.
        """
        absent: set[str] = set()
        sizes = [sum(p.numel() for p in m.parameters(recurse=False)) for m in model.modules()]
        with Phase("loading the base", sum(sizes), "weights") as phase:
            for (path, module), size in zip(model.named_modules(), sizes, strict=True):
                absent |= self._load_module(module, path)
                if after is not None:
                    after(path, module)
                phase.advance(size)
        return absent

    def _load_module(self, module: nn.Module, path: str) -> set[str]:
        absent: set[str] = set()
        for kind, parameter in list(module.named_parameters(recurse=False)):
            name = f"{path}.{kind}" if path else kind
            if not self._has(name):
                absent.add(name)
            elif isinstance(module, bnb.nn.Linear4bit) and kind == "weight":
                self._load_packed(module, path)
            elif isinstance(module, Experts4bit) and kind in module.matrices:
                self._load_experts(module, path, kind)
            else:
                self._load_plain(module, kind, name, parameter)
        for kind, buffer in list(module.named_buffers(recurse=False)):
            name = f"{path}.{kind}" if path else kind
            if self._has(name):
                buffer = self._whole(name).to(buffer.dtype)
            module.register_buffer(
                kind,
                buffer.to(self.device),
                persistent=kind not in module._non_persistent_buffers_set,
            )
        return absent

    # -- names of the files and of the model ------------------------------------------------

    def _has(self, name: str) -> bool:
        """Whether the files hold a tensor of the model."""
        return name in (self.files.names if self.parts is None else self.parts)

    def _stored(self, name: str) -> str | None:
        """The one tensor of the files that is a tensor of the model; None where it is made."""
        part = self.parts[name] if self.parts is not None else None
        if part is None:
            return name
        return part.stored[0] if part.there is None else None

    @contextlib.contextmanager
    def _open(self, name: str) -> Iterator[Any]:
        """A slice object of one tensor of the model, as `Files.open` has it."""
        stored = self._stored(name)
        if stored is None:
            yield _Made(self._whole(name))
            return
        with self.files.open(stored) as found:
            yield found

    def _whole(self, name: str) -> Tensor:
        """One tensor of the model, all of it."""
        stored = self._stored(name)
        if stored is not None:
            return self.files.whole(stored)
        assert self.parts is not None
        return self._made(self.parts[name], name)

    def _made(self, part: Part, name: str) -> Tensor:
        return part.to_model({key: self.files.whole(key) for key in part.stored})[name]

    def _split(self, name: str) -> Split | None:
        return self.layout.of_parameter(name) if self.layout else None

    def _load_plain(self, module: nn.Module, kind: str, name: str, parameter: Tensor) -> None:
        split = self._split(name)
        dtype = torch.float32 if any(p in name for p in self.keep_fp32) else self.dtype
        if kind in matrices_of(module) and self._one_by_one(name):
            tensor = torch.empty(parameter.shape, dtype=dtype, device=self.device)
            for held, matrix in enumerate(self._of_experts(name, list(parameter.shape))):
                tensor[held] = matrix
        else:
            with self._open(name) as stored:
                expected = list(parameter.shape)
                if split is not None:
                    expected[split.dim] = split.whole
                _require_shape(name, stored.get_shape(), expected)
                tensor = _slice(stored, split, self.axis.rank)
                tensor = tensor.to(device=self.device, dtype=dtype, copy=True).contiguous()
        setattr(module, kind, nn.Parameter(tensor, requires_grad=False))

    # -- experts ----------------------------------------------------------------------------

    def _load_experts(self, module: Experts4bit, path: str, kind: str) -> None:
        """Quantise this rank's experts one by one, or take up codes of the cache."""
        name = f"{path}.{kind}"
        pieces = {what: f"{name}.{what}" for what in ("absmax", "nested_absmax", "offset")}
        if pieces["absmax"] in self.files.names:
            found = {
                what: self.files.whole(key).to(self.device)
                for what, key in pieces.items()
                if key in self.files.names
            }
            packed, scales = self.files.whole(name).to(self.device), ExpertScales(**found)
        else:
            rows, columns = module.shape_of(kind)
            own: Any = module
            turned = bool(own.is_transposed)
            as_stored = [columns, rows] if turned else [rows, columns]
            matrices = self._of_experts(name, [module.num_experts, *as_stored])
            packed, scales = pack(
                (matrix.t() if turned else matrix for matrix in matrices),
                module.num_experts,
                (rows, columns),
                self.dtype,
                self.device,
                double=self.double,
            )
        module.install(kind, packed, scales, self.dtype)

    def _of_experts(self, name: str, shape: list[int]) -> Iterator[Tensor]:
        """The matrices of this rank's experts, as the model lays them out, one after the other.

        Args:
            name: of the model's tensor.
            shape: of this rank's share of it.
        """
        split = self._split(name)
        first = split.range_of(self.axis.rank)[0] if split else 0
        if self._one_by_one(name):
            assert self.parts is not None
            part, whole = self.parts[name], split.whole if split else shape[0]
            stored = {index_of(key) for key in part.stored}
            if stored != set(range(whole)):
                raise ShapeError(
                    f"{name} has {len(stored)} experts in its files, but config.json says {whole}"
                )
            for expert in range(first, first + shape[0]):
                one = part.of_expert(expert)
                matrix = self._made(one, name)
                _require_shape(f"{name} of expert {expert}", list(matrix.shape), [1, *shape[1:]])
                yield matrix[0]
            return
        with self._open(name) as stored:
            whole = [split.whole if split else shape[0], *shape[1:]]
            _require_shape(name, stored.get_shape(), whole)
            for expert in range(first, first + shape[0]):
                yield stored[expert : expert + 1][0]

    def _one_by_one(self, name: str) -> bool:
        return self.parts is not None and self.parts[name].one_by_one

    # -- 4-bit layers -----------------------------------------------------------------------

    def _load_packed(self, layer: bnb.nn.Linear4bit, path: str) -> None:
        name = f"{path}.weight"
        split = self._split(name)
        whole = [layer.out_features, layer.in_features]
        if split is not None:
            whole[split.dim] = split.whole
        if f"{path}.{_STATE}" in self.files.names:
            codes, state = self._cut_quantised(path, (whole[0], whole[1]), split)
        else:
            codes = self._quantise(name, (whole[0], whole[1]), split)
            state = self._state(codes, split)
        nf4.install(layer, codes.packed, state)

    def _quantise(self, name: str, whole: tuple[int, int], split: Split | None) -> nf4.Codes:
        rows, columns = _ranges(whole, split, self.axis.rank)
        shape = (rows[1] - rows[0], columns[1] - columns[0])
        with self._open(name) as stored:
            _require_shape(name, stored.get_shape(), list(whole))
            pieces = (
                stored[rows[0] + a : rows[0] + b, columns[0] : columns[1]]
                for a, b in nf4.rows_of(shape, PIECE.get(self.device.type, 2**20))
            )
            return nf4.quantize(pieces, shape, self.dtype, self.device)

    def _state(self, codes: nf4.Codes, split: Split | None) -> Any:
        """Under double quantisation a slice has the scales of the whole, cut in fp32."""
        if split is None or not self.double:
            return nf4.state_of(codes, self.dtype, double=self.double)
        mine = _as_blocks(codes, split)
        per_rank = [size * mine.shape[split.dim] // codes.shape[split.dim] for size in split.sizes]
        whole = self.axis.concatenate(mine, split.dim, per_rank)
        rounded = nf4.rounded(whole.flatten()).view_as(whole)
        start = sum(per_rank[: self.axis.rank])
        own = _own(rounded.narrow(split.dim, start, per_rank[self.axis.rank]))
        return nf4.state_of(nf4.Codes(codes.packed, own, codes.shape), self.dtype, double=False)

    def _cut_quantised(
        self, path: str, whole: tuple[int, int], split: Split | None
    ) -> tuple[nf4.Codes, Any]:
        """Codes that a checkpoint holds already; cut with their scales in fp32."""
        name = f"{path}.weight"
        parts = {
            key.removeprefix(f"{path}."): self.files.whole(key)
            for key in self.files.names
            if key.startswith(f"{name}.")
        }
        state: Any = bnb_functional.QuantState.from_dict(parts, device=self.device)
        _require_shape(name, list(state.shape), list(whole))
        with self.files.open(name) as stored:
            if split is None:
                packed = stored[:].to(self.device, copy=True)
                return nf4.Codes(packed, state.absmax, whole), state
            if whole[1] % 2 or state.blocksize != nf4.BLOCK:
                raise ShapeError(
                    f"{name} is packed in blocks of {state.blocksize} over {whole[1]} columns, "
                    "which cannot be cut"
                )
            packed = stored[:].view(torch.uint8).view(whole[0], -1)
            rows, columns = _ranges(whole, split, self.axis.rank)
            mine = packed[rows[0] : rows[1], columns[0] // 2 : columns[1] // 2]
            mine = mine.to(self.device, copy=True).contiguous().view(-1, 1)
        scales = state.absmax
        if state.nested:
            scales = bnb_functional.dequantize_blockwise(scales, state.state2) + state.offset
        shape = (rows[1] - rows[0], columns[1] - columns[0])
        if split.dim == 0:
            first = rows[0] * whole[1] // nf4.BLOCK
            own = scales[first : first + shape[0] * shape[1] // nf4.BLOCK]
        else:
            by_row = scales.view(whole[0], -1)
            own = by_row[:, columns[0] // nf4.BLOCK : columns[1] // nf4.BLOCK]
        codes = nf4.Codes(mine, _own(own).float(), shape)
        return codes, nf4.state_of(codes, self.dtype, double=False)


class _Made:
    """A tensor that was converted, as a slice object of safetensors."""

    def __init__(self, tensor: Tensor):
        self._tensor = tensor

    def get_shape(self) -> list[int]:
        return list(self._tensor.shape)

    def __getitem__(self, place: Any) -> Tensor:
        return self._tensor[place]


def _own(part: Tensor) -> Tensor:
    """A copy of a part, flat: a view of rows would keep the whole alive."""
    return part.clone(memory_format=torch.contiguous_format).flatten()


def _as_blocks(codes: nf4.Codes, split: Split) -> Tensor:
    """Scales in a shape that can be joined along the split dimension."""
    return codes.scales if split.dim == 0 else codes.scales.view(codes.shape[0], -1)


def _ranges(
    whole: tuple[int, int], split: Split | None, rank: int
) -> tuple[tuple[int, int], tuple[int, int]]:
    """This rank's rows and columns."""
    ranges = [(0, whole[0]), (0, whole[1])]
    if split is not None:
        ranges[split.dim] = split.range_of(rank)
    return ranges[0], ranges[1]


def _slice(stored: Any, split: Split | None, rank: int) -> Tensor:
    if split is None:
        return stored[:] if stored.get_shape() else stored[...]
    start, stop = split.range_of(rank)
    return stored[start:stop] if split.dim == 0 else stored[:, start:stop]


def _require_shape(name: str, stored: list[int], expected: list[int]) -> None:
    if list(stored) != list(expected):
        raise ShapeError(f"{name} has shape {stored}, but config.json says {expected}")
