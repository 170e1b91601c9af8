"""Which processes work together, along which axis, and on which device.

What the launcher said is read by `environment.py`, the group of all processes is made by
`joining.py`. What ranks send each other is JSON, never a pickle, which would run what it is told to
in every rank that reads it. Nothing here knows a model or a recipe.
"""

# torch.distributed is typed in part only.
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false
from __future__ import annotations

import contextlib
import json
import logging
import re
import resource
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from moored.distributed.joining import joined, prove
from moored.utils.environment import rank_info, rendezvous_seconds
from moored.utils.errors import UserError

log = logging.getLogger(__name__)
WORD_SECONDS = 10.0  # between two words of a rank that waits for rank 0
LONGEST_PAUSE_SECONDS = 0.5  # between two looks at the store
RENDEZVOUS_SECONDS = 600.0  # until every process must have come: some are slow to start


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """One direction of the mesh: this process's place in it, and its collectives.

    Every collective is skipped at size 1, so that one process needs no special case.
    """

    name: str
    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum of `values` (any shape) over the axis; the argument is left as it was."""
        total = values.clone()
        if self.size > 1:
            dist.all_reduce(total, op=dist.ReduceOp.SUM, group=self.group)
        return total

    def concatenate(self, part: torch.Tensor, dim: int, sizes: Sequence[int]) -> torch.Tensor:
        """Every rank's part, joined along `dim`.

        Args:
            part: this rank's; the parts differ along `dim` at most.
            dim: where they are joined.
            sizes: each rank's length along `dim`, in rank order.
        """
        if self.size == 1:
            return part
        widest = max(sizes)
        mine = part.movedim(dim, 0).contiguous()
        if len(mine) < widest:
            mine = torch.cat([mine, mine.new_zeros(widest - len(mine), *mine.shape[1:])])
        parts = mine.new_empty(self.size * widest, *mine.shape[1:])
        # Its successor all_gather_single is absent from the older releases that we support.
        dist.all_gather_into_tensor(parts, mine, group=self.group)  # pyright: ignore
        if min(sizes) < widest:
            starts = range(0, len(parts), widest)
            parts = torch.cat([parts[i : i + n] for i, n in zip(starts, sizes, strict=True)])
        return parts.movedim(0, dim).contiguous()

    def sum_part(self, values: torch.Tensor, dim: int) -> torch.Tensor:
        """This rank's part along `dim` of the sum over the axis; equal parts (reduce-scatter)."""
        if self.size == 1:
            return values
        whole = values.movedim(dim, 0).contiguous()
        part = whole.new_empty(len(whole) // self.size, *whole.shape[1:])
        dist.reduce_scatter_tensor(part, whole, group=self.group)  # pyright: ignore
        return part.movedim(0, dim).contiguous()

    def exchange(self, values: torch.Tensor, split: int, join: int) -> torch.Tensor:
        """Deal `values` out along `split`, and join along `join` what the others deal (all-to-all).

        The axis's size divides the length along `split`; all ranks have the same shape.
        """
        if self.size == 1:
            return values
        sent = torch.stack(values.chunk(self.size, split))
        found = torch.empty_like(sent)
        dist.all_to_all_single(found, sent, group=self.group)
        return torch.cat(list(found.unbind(0)), join)

    def extremes(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Smallest and largest of each entry over the axis."""
        low, high = values.clone(), values.clone()
        if self.size > 1:
            dist.all_reduce(low, op=dist.ReduceOp.MIN, group=self.group)
            dist.all_reduce(high, op=dist.ReduceOp.MAX, group=self.group)
        return low, high

    def take_first_(self, values: torch.Tensor) -> torch.Tensor:
        """Overwrite `values` (any shape, contiguous) by those of the axis's first rank."""
        if self.size > 1:
            dist.broadcast(values, src=self._first, group=self.group)
        return values

    @property
    def _first(self) -> int:
        """The first rank of the axis, as all processes count."""
        return dist.get_global_rank(self.group, 0) if self.group is not None else 0

    def max(self, value: float, device: torch.device | None = None) -> float:
        """Largest `value` over the axis, the same on every rank."""
        if self.size == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.float64, device=device or _device())
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.group)
        return float(tensor.item())

    def gather(self, value: Any) -> list[Any]:
        """Every rank's `value` (small, what JSON can hold), in rank order, on every rank.

        Raises:
            TypeError: on every rank alike: some rank's value is none that JSON brings back.
        """
        data, fault = _bytes_of(value)
        if self.size == 1:
            if fault is not None:
                raise fault
            return [value]
        sizes = [int(length.item()) for length in self._all(self._length(data))]
        for rank, size in enumerate(sizes):
            _require_sent(size, rank, fault if rank == self.rank else None)
        padded = (data or b"").ljust(max(sizes))
        return [
            decoded(_raw(part)[:size], f"rank {rank}")
            for rank, (part, size) in enumerate(
                zip(self._all(_tensor(padded, self._carrier())), sizes, strict=True)
            )
        ]

    def broadcast(self, value: Any) -> Any:
        """Rank 0's `value` (small, what JSON can hold), on every rank; others' are not looked at.

        Raises:
            TypeError: on every rank alike: it is none that JSON brings back.
        """
        data, fault = _bytes_of(value) if self.rank == 0 else (b"", None)
        if self.size == 1:
            if fault is not None:
                raise fault
            return value
        length = self._length(data)
        dist.broadcast(length, src=self._first, group=self.group)
        size = int(length.item())
        _require_sent(size, 0, fault)
        sent = _tensor(data, self._carrier()) if self.rank == 0 else length.new_empty(size).byte()
        dist.broadcast(sent, src=self._first, group=self.group)
        return value if self.rank == 0 else decoded(_raw(sent), "rank 0")

    def _all(self, mine: torch.Tensor) -> list[torch.Tensor]:
        """Every rank's tensor; their shapes are equal."""
        parts = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(parts, mine, group=self.group)
        return parts

    def _length(self, data: bytes | None) -> torch.Tensor:
        return torch.tensor([_NOTHING if data is None else len(data)], device=self._carrier())

    def _carrier(self) -> torch.device:
        """Where a tensor must be for the collectives of this axis."""
        return _device() if dist.get_backend(self.group) == "nccl" else torch.device("cpu")

    def barrier(self) -> None:
        """Wait until every rank of the axis is here."""
        if self.size > 1:
            dist.barrier(group=self.group)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mesh:
    """The processes of a run, arranged as data-parallel x tensor-parallel.

    Attributes:
        world: all processes.
        dp: the processes that hold different data.
        tp: the processes that hold different slices of the same layers.
        zero_hpz: those of `dp` over which ZeRO-3 cuts the base; None: all.
        device: this process's device.
        first_on_machine: whether it is of the first tensor-parallel group of its machine.
        cp: neighbours along `dp` that hold different tokens of the same rows.
    """

    world: Axis
    dp: Axis
    tp: Axis
    device: torch.device
    first_on_machine: bool = True
    cp: Axis = Axis(name="cp")

    @property
    def share(self) -> dict[str, int]:
        """Which rows of a global batch this process has, as streams ask for it."""
        return {
            "dp_rank": self.dp.rank // self.cp.size,
            "dp_size": self.dp.size // self.cp.size,
        }

    zero_hpz: Axis | None = None

    @property
    def shards(self) -> Axis:
        """The processes over which ZeRO-3 cuts the base."""
        return self.zero_hpz or self.dp

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that prints, tracks and writes shared files."""
        return self.world.rank == 0

    def raise_on_all_ranks(self, error: BaseException | None) -> None:
        """Raise on every rank when any rank has failed, so that none waits for another.

        Args:
            error: this rank's own error, or None.

        Raises:
            BaseException: this rank's own error.
            UserError: another rank's error, with its rank named.
        """
        if self.world.size > 1:
            texts = self.world.gather(None if error is None else f"{error}")
        else:
            texts = []
        if error is not None:
            raise error
        for rank, text in enumerate(texts):
            if text is not None:
                raise UserError(f"rank {rank}: {text}")

    @contextlib.contextmanager
    def main_first(self, what: str = "prepare what all need") -> Generator[None]:
        """Run the body on rank 0 before the others: what it downloads or converts, they find.

        However long that takes: the others wait at the store and say so, not in a collective, which
        would end the run after its limit.

        Args:
            what: rank 0 does meanwhile, for those who wait; it follows "to".

        Raises:
            UserError: on the others, what rank 0 has failed with.
        """
        if self.world.size == 1:
            yield
            return
        store: Any = dist.distributed_c10d._get_default_store()  # pyright: ignore
        turn = f"moored/turn/{store.add(f'moored/turns/{self.world.rank}', 1)}"
        if self.is_main:
            try:
                yield
            except Exception as error:
                store.set(turn, f"-{error}")
                _wait_for_readers(store, turn, self.world.size - 1)
                raise
            store.set(turn, "+")
        else:
            _wait_for_main(store, turn, self.world, what)
            yield


def _wait_for_main(store: Any, turn: str, world: Axis, what: str) -> None:
    began = time.monotonic()
    due, pause = began + WORD_SECONDS, 0.01
    # In a log of many ranks one says it; the others' own logs have it, too.
    level = logging.WARNING if world.rank == 1 else logging.INFO
    while not store.check([turn]):
        time.sleep(pause)
        pause = min(1.5 * pause, LONGEST_PAUSE_SECONDS)
        if time.monotonic() >= due:
            due += WORD_SECONDS
            waited = time.monotonic() - began
            log.log(
                level, "rank %d waits for rank 0 to %s: %.0f s so far", world.rank, what, waited
            )
    said = store.get(turn).decode(errors="replace")
    if said != "+":
        store.add(f"{turn}/read", 1)
        raise UserError(f"rank 0: {said[1:]}")


def _wait_for_readers(store: Any, turn: str, number: int) -> None:
    """With rank 0 the store may end: the others read of the fault before, if they are there."""
    deadline = time.monotonic() + WORD_SECONDS
    while store.add(f"{turn}/read", 0) < number and time.monotonic() < deadline:
        time.sleep(0.05)


def alone(device: str = "cpu") -> Mesh:
    """The mesh of a process that meets no other."""
    world, dp, tp = (Axis(name=name) for name in ("world", "dp", "tp"))
    return Mesh(world=world, dp=dp, tp=tp, device=torch.device(device))


_NOTHING = -1  # in place of the length of a value that cannot be sent
_MOST_BYTES = 1 << 30  # of one value: who says more is none of ours


def _bytes_of(value: Any) -> tuple[bytes | None, TypeError | None]:
    """A value to send, or why it cannot be: the others must learn of it before all raise."""
    try:
        return encoded(value), None
    except TypeError as error:
        return None, error


def _require_sent(size: int, rank: int, fault: TypeError | None) -> None:
    if size == _NOTHING:
        raise fault or TypeError(f"rank {rank} was to send a value that is no JSON")
    if not 0 < size <= _MOST_BYTES:
        raise UserError(
            f"rank {rank} announced a value of {size} bytes: another program takes part in this "
            "run: start it again, where nobody else can connect to its processes (SECURITY.md)"
        )


def _tensor(data: bytes | None, device: torch.device) -> torch.Tensor:
    return torch.frombuffer(bytearray(data or b""), dtype=torch.uint8).to(device)


def _raw(part: torch.Tensor) -> bytes:
    return part.cpu().numpy().tobytes()


def _device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def start_mesh(
    tensor_parallel_degree: int = 1,
    timeout_seconds: float = 1800.0,
    *,
    wait_seconds: float = RENDEZVOUS_SECONDS,
    folder: Path | None = None,
    context_parallel_degree: int = 1,
    zero_hpz_partition_size: int | None = None,
) -> Mesh:
    """Join the processes that the launcher started and arrange them.

    Args:
        tensor_parallel_degree: processes that share one copy of the model. Neighbours by rank.
        timeout_seconds: how long a collective may wait for a rank before the run ends.
        wait_seconds: how long to wait for the other processes, unless the environment says it.
        folder: which all processes share, for the secret by which they know each other where the
            launcher gave them none; None: Moored's cache.
        context_parallel_degree: processes that share each row, neighbours along the data-parallel
            axis.
        zero_hpz_partition_size: neighbouring data-parallel ranks over which ZeRO-3 cuts the base;
            None: all of them.

    Raises:
        UserError: the environment is incomplete, the world does not divide, not all processes came,
            or a stranger is among them.
    """
    place, wait_seconds = rank_info(), rendezvous_seconds(wait_seconds)
    if place.world_size % tensor_parallel_degree:
        raise UserError(
            f"parallel.tensor_parallel_degree={tensor_parallel_degree} does not divide "
            f"the {place.world_size} processes: start a multiple of it"
        )
    shared = tensor_parallel_degree * context_parallel_degree
    if place.world_size % shared:
        raise UserError(
            f"parallel.context_parallel_degree={context_parallel_degree} x tensor_parallel_degree="
            f"{tensor_parallel_degree} = {shared} does not divide the {place.world_size} "
            "processes: start a multiple of it"
        )
    dp_size = place.world_size // tensor_parallel_degree
    hpz_size = zero_hpz_partition_size or dp_size
    if dp_size > 1 and dp_size % hpz_size:
        raise UserError(
            f"parallel.zero_hpz_partition_size={hpz_size} does not divide the {dp_size} "
            "data-parallel ranks: set it to the ranks of a machine, or leave it out"
        )
    device = torch.device("cpu")
    if torch.cuda.is_available():
        # With one GPU visible per task LOCAL_RANK counts tasks, not visible devices.
        device = torch.device("cuda", place.local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    first = place.local_rank < tensor_parallel_degree
    if dist.is_initialized():
        return _arranged(tensor_parallel_degree, context_parallel_degree, device, first, hpz_size)
    try:
        with joined(
            place,
            "nccl" if device.type == "cuda" else "gloo",
            timeout_seconds=timeout_seconds,
            rendezvous_seconds=wait_seconds,
            folder=folder,
        ) as key:
            mesh = _arranged(
                tensor_parallel_degree, context_parallel_degree, device, first, hpz_size
            )
            if key is not None:
                for axis in (mesh.world, mesh.dp, mesh.tp, mesh.cp, mesh.shards):
                    prove(axis, key)
    except UserError:
        leave_mesh()
        raise
    return mesh


def _arranged(
    tensor_parallel_degree: int,
    context_parallel_degree: int,
    device: torch.device,
    first: bool,
    hpz_size: int,
) -> Mesh:
    """The mesh of the group that is there."""
    world = Axis(name="world", rank=dist.get_rank(), size=dist.get_world_size())
    shape = (world.size // tensor_parallel_degree, tensor_parallel_degree)
    if tensor_parallel_degree == 1:
        dp, tp = Axis(name="dp", rank=world.rank, size=world.size), Axis(name="tp")
    else:
        grid = init_device_mesh(device.type, shape, mesh_dim_names=("dp", "tp"))
        dp, tp = (
            Axis(name=name, rank=grid.get_local_rank(name), size=size, group=grid.get_group(name))
            for name, size in zip(("dp", "tp"), shape, strict=True)
        )
    return Mesh(
        world=world,
        dp=dp,
        tp=tp,
        device=device,
        first_on_machine=first,
        cp=_neighbours("cp", dp, tensor_parallel_degree, context_parallel_degree),
        zero_hpz=(
            _neighbours("zero_hpz", dp, tensor_parallel_degree, hpz_size)
            if hpz_size < dp.size
            else None
        ),
    )


def _neighbours(name: str, dp: Axis, tensor_parallel_degree: int, degree: int) -> Axis:
    """This process's group of so many neighbours along the data-parallel axis. Collective."""
    if degree == 1:
        return Axis(name=name)
    groups = [
        [tensor_parallel_degree * (first + i) + tp for i in range(degree)]
        for first in range(0, dp.size, degree)
        for tp in range(tensor_parallel_degree)
    ]
    made = [dist.new_group(ranks) for ranks in groups]  # all processes make all of them
    mine = next(i for i, ranks in enumerate(groups) if dist.get_rank() in ranks)
    group = cast("dist.ProcessGroup", made[mine])
    return Axis(name=name, rank=dp.rank % degree, size=degree, group=group)


def degree_for(wanted: int) -> int:
    """The degree to measure with: 1 in a process alone, which then holds the whole model."""
    return wanted if rank_info().world_size > 1 else 1


_LOST_PEER = re.compile(
    r"(closed|reset) by peer|Broken pipe|[Tt]imed out|Socket Timeout|ncclRemoteError|remote process"
)


def is_lost_peer(error: BaseException) -> bool:
    """Whether it is what gloo and NCCL say of a process that is gone."""
    return isinstance(error, RuntimeError) and bool(_LOST_PEER.search(str(error)))


def leave_mesh() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory this process has held: of its GPU, or resident on a CPU machine."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# ---------------------------------------------------------------- values between ranks, as JSON


def encoded(value: Any) -> bytes:
    """JSON of a value, in the one way that all ranks write it; floats come back bit for bit.

    NaN and the infinities are written as Python's JSON does, since figures may be any of them.

    Args:
        value: None, booleans, numbers, strings, and lists and dicts (with string keys) of them.

    Raises:
        TypeError: it is something else, or contains it: tuples would come back as lists, and keys
            as strings, so who sends them says so.
    """
    require_plain(value)
    return json.dumps(value, separators=(",", ":"), ensure_ascii=True).encode("ascii")


def decoded(data: bytes, sender: str) -> Any:
    """The value again.

    Raises:
        UserError: it is no JSON, so that no rank of ours has sent it.
    """
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        raise UserError(
            f"what {sender} sent is no JSON: another program takes part in this run: start it "
            "again, where nobody else can connect to its processes (SECURITY.md)"
        ) from None


def require_plain(value: Any, place: str = "") -> None:
    """Refuse what JSON would not bring back as it is.

    Raises:
        TypeError: the first such part, with its place in the value.
    """
    if value is None or isinstance(value, str | int | float):
        return
    if isinstance(value, list):
        for index, each in enumerate(cast(list[Any], value)):
            require_plain(each, f"{place}[{index}]")
    elif isinstance(value, dict):
        for key, each in cast(dict[Any, Any], value).items():
            if not isinstance(key, str):
                raise TypeError(
                    f"the key {key!r} of value{place} is a {type(key).__name__}: ranks send each "
                    "other JSON, whose keys are strings"
                )
            require_plain(each, f"{place}[{key!r}]")
    else:
        raise TypeError(
            f"value{place} is a {type(value).__name__}: ranks send each other JSON: None, "
            "booleans, numbers, strings, lists, and dicts with string keys"
        )
