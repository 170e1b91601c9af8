"""The base's final hidden states on disk: computed once, read by later epochs and by a whole sweep.

The base is frozen, so what it makes of a sample never changes. Kept are its final hidden states at
the targets (2 D bytes per target in bf16), not its logits (2 V). A folder belongs to one base on
one kind of device, down to the bits of a probe; in it lie safetensors files of some 64 MB, each
written whole or not at all, with a digest of every record. What cannot be read, or is not what was
written, is computed again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import threading
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moored.config import Config
from moored.data.batch import Batch
from moored.distributed.mesh import Axis, Mesh
from moored.utils.environment import cache_folder, versions_of

log = logging.getLogger(__name__)
FORMAT = 2
FILE_BYTES = 2**26
FACTS = "facts.json"
_OPEN_FILES = 64


def references_folder() -> Path:
    """Where every base has its folder."""
    return cache_folder() / "reference"


def open_cache(
    config: Config, revision: str, mesh: Mesh, probe: Tensor, *, by_tokens: bool
) -> ReferenceCache:
    """The cache of a run's base, made if there is none.

    Args:
        config: the recipe.
        revision: of the model, see `ResolvedModel`.
        mesh: the processes; the first of each tensor-parallel group writes.
        probe: the base's final hidden states [n, D] on a fixed batch: other bits, another folder.
        by_tokens: whether tokens are spread over tensor-parallel ranks, too.
    """
    facts = facts_of(config, revision, mesh.device, probe, by_tokens=by_tokens)
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    name = Path(config.model.name_or_path).name[:40]
    # Where forwards are collective, either all ranks run them or none does.
    axis = mesh.world if config.parallel.zero_stage == 3 else mesh.tp
    return ReferenceCache(
        references_folder() / f"{name}-{digest}",
        facts=facts,
        like=probe,
        by_batch=config.reference.match == "batch",
        max_bytes=int(config.reference.max_gib * 2**30),
        writes=mesh.tp.rank == 0,
        agree=partial(_on_all_ranks, axis, mesh.device),
    )


def _on_all_ranks(axis: Axis, device: torch.device, hits: list[bool]) -> list[bool]:
    """Which of the hits every rank of the axis has. Collective."""
    if axis.size == 1 or not hits:
        return hits
    return axis.extremes(torch.tensor(hits, dtype=torch.uint8, device=device))[0].bool().tolist()


def facts_of(
    config: Config, revision: str, device: torch.device, probe: Tensor, *, by_tokens: bool
) -> dict[str, Any]:
    """Everything that changes a bit of the base's hidden states, but the tokens."""
    model = config.model.model_dump(mode="json", exclude={"cache_quantized", "mirror"})
    on_gpu = device.type == "cuda"
    return {
        "format": FORMAT,
        "model": model,
        "revision": revision,
        "parallel": {
            "tensor_parallel_degree": config.parallel.tensor_parallel_degree,
            "sequence_parallel": by_tokens,
            "quantization_statistics": "whole",  # as older caches have it
        },
        "device": torch.cuda.get_device_name(device) if on_gpu else device.type,
        "versions": versions_of(("torch", "transformers", "bitsandbytes")),
        "probe": hashlib.sha256(_bytes(probe.cpu())).hexdigest(),
    }


class ReferenceCache:
    """The kept hidden states of one base.

    Args:
        folder: of this base; shared by runs and ranks.
        facts: what it belongs to, for people to read.
        like: hidden states [n, D] of the right width and dtype.
        by_batch: a record serves only the very micro-batch that it came from, so that it has the
            bits that would be computed; else the sample wherever it is laid, whose bits may differ
            by rounding.
        max_bytes: of all folders beside this one; nothing is added beyond it.
        writes: whether this rank adds to it.
        agree: of which micro-batches this rank and all that share its forwards have what they
            need, from whether this one has it.

    Attributes:
        num_read: micro-batches whose hidden states were read.
        num_computed: those that the base was run for, and that were handed to `keep`.
    """

    def __init__(
        self,
        folder: Path,
        *,
        facts: dict[str, Any],
        like: Tensor,
        by_batch: bool,
        max_bytes: int,
        writes: bool = True,
        agree: Callable[[list[bool]], list[bool]] = list,
    ):
        self.folder, self._by_batch, self._max_bytes = folder, by_batch, max_bytes
        self._like = torch.empty((0, like.shape[1]), dtype=like.dtype)
        self._writes, self._agree = writes, agree
        self._pin = like.is_cuda
        self._found: dict[str, Path] = {}
        self._seen: set[Path] = set()
        self._scanned_at = -1
        self._pending: dict[str, Tensor] = {}
        # What is on its way from the device: whose records, the copy, and whether it has come.
        self._arriving: list[tuple[list[tuple[str, slice]], Tensor, torch.cuda.Event | None]] = []
        # What was read ahead, of this step and the next: not every step asks for it.
        self._ahead: deque[dict[tuple[str, ...], Tensor]] = deque([{}, {}], maxlen=2)
        self._lock = threading.Lock()
        self._opened = lru_cache(_OPEN_FILES)(_open)
        self.num_read = self.num_computed = 0
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / FACTS).write_text(json.dumps(facts, indent=1) + "\n")  # marks its use, too
        except OSError as error:
            self._stop_writing(error)

    def find(self, batch: Batch) -> Tensor | None:
        """The base's final hidden states at the batch's targets, [N, D] on the CPU, if kept.

        Of the ranks that share the base's forwards all find it, or none does; then all compute and
        `keep` it. Collective over them.

        Args:
            batch: better with its tensors on the CPU.
        """
        return self.find_all([batch])[0]

    def find_all(self, batches: Sequence[Batch]) -> list[Tensor | None]:
        """`find` of several batches, in one collective."""
        found = [self._find(batch) for batch in batches]
        agreed = self._agree([hidden is not None for hidden in found])
        self.num_read += sum(agreed)
        return [hidden if hit else None for hidden, hit in zip(found, agreed, strict=True)]

    def _find(self, batch: Batch) -> Tensor | None:
        records = list(self._records(batch))
        key = tuple(name for name, _ in records)
        with self._lock:
            self._take_arrived()
            ahead = next((step.pop(key) for step in self._ahead if key in step), None)
            return self._read(records) if ahead is None else ahead

    def keep(self, batch: Batch, hidden: Tensor) -> None:
        """Add what the base made of a batch, [N, D], unless it is there or the cache is full.

        The host does not wait for a GPU: the copy is waited for once somebody asks for what is
        kept, or it is written.
        """
        self.num_computed += 1
        records = list(self._records(batch))
        with self._lock:
            if self._writes and not all(self._knows(name) for name, _ in records):
                self._arriving.append((records, *_begin_copy(hidden.detach())))

    def read_ahead(self, batches: Sequence[Batch]) -> None:
        """Bring what is kept of a step into memory (pinned, for a GPU), for `find`.

        In any thread, and before the step; what it does not ask for is let go of.
        """
        step: dict[tuple[str, ...], Tensor] = {}
        with self._lock:
            self._ahead.append(step)
        for batch in batches:
            records = list(self._records(batch))
            with self._lock:  # for which a step waits, that may not wait for the device
                self._take_arrived(wait=False)
                found = self._read(records)
                if found is not None:
                    key = tuple(name for name, _ in records)
                    step[key] = found.pin_memory() if self._pin else found

    def has(self, batch: Batch) -> bool:
        """Whether everything of the batch is kept (unless it proves to be broken)."""
        records = list(self._records(batch))
        with self._lock:
            self._take_arrived()
            self._rescan(records)
            return all(self._knows(name) for name, _ in records)

    def flush(self) -> None:
        """Write what waits to be written."""
        with self._lock:
            self._take_arrived()
            self._flush()

    def _take_arrived(self, *, wait: bool = True) -> None:
        """Take up the copies from the device; all have come, where an update lies between."""
        arriving, self._arriving = self._arriving, []
        for records, hidden, copied in arriving:
            if copied is not None and not wait and not copied.query():
                self._arriving.append((records, hidden, copied))
                continue
            if copied is not None:
                copied.synchronize()
            self._add(records, hidden.to("cpu"))

    def _flush(self) -> None:
        if not self._pending or not self._writes:
            return
        pending, self._pending = self._pending, {}
        size = sum(tensor.nbytes for tensor in pending.values())
        if self._used() + size > self._max_bytes:
            limit = self._max_bytes / 2**30
            self._stop_writing(f"more than reference.max_gib, {limit:g}, would be used")
            return
        path = self.folder / f"{uuid.uuid4().hex}.safetensors"
        draft = path.with_suffix(".draft")
        try:
            digests = {name: _digest(tensor) for name, tensor in pending.items()}
            save_file(pending, draft, metadata=digests)
            draft.replace(path)
        except (OSError, SafetensorError) as error:
            draft.unlink(missing_ok=True)
            self._stop_writing(error)
            return
        self._seen.add(path)
        self._found |= dict.fromkeys(pending, path)

    def _used(self) -> int:
        """Bytes of this folder and those beside it, from which others take files meanwhile."""
        used = 0
        for path in self.folder.parent.glob("*/*.safetensors"):
            with contextlib.suppress(FileNotFoundError):
                used += path.stat().st_size
        return used

    def _records(self, batch: Batch) -> Iterator[tuple[str, slice]]:
        """Name of each sample's record, and which of the N targets are its own.

        What the base says of a target depends on the tokens of its sample up to there alone.
        """
        tensors = (batch.input_ids, batch.position_ids, batch.target_index)
        ids, positions, index = (tensor.cpu().numpy() for tensor in tensors)
        ids = ids.reshape(-1)
        whole = b""
        if self._by_batch:
            layout = np.asarray(positions.shape).tobytes() + positions.tobytes()
            whole = hashlib.blake2b(layout + ids.tobytes(), digest_size=16).digest()
        starts = np.flatnonzero(positions.reshape(-1) == 0)
        bounds = np.searchsorted(index, np.append(starts, ids.size))
        for start, first, end in zip(starts, bounds[:-1], bounds[1:], strict=True):
            if first < end:
                targets = index[first:end]
                text = ids[start : targets[-1] + 1].tobytes() + (targets - start).tobytes()
                # Where each begins is said by their lengths: equal bytes are equal records.
                lengths = np.asarray([targets[-1] + 1 - start, len(targets)]).tobytes()
                # The same sample may lie in a micro-batch twice, with other bits in each place.
                place = whole + start.tobytes() if self._by_batch else b""
                name = hashlib.blake2b(place + lengths + text, digest_size=16).hexdigest()
                yield name, slice(int(first), int(end))

    def _knows(self, name: str) -> bool:
        return name in self._pending or name in self._found

    def _rescan(self, records: list[tuple[str, slice]]) -> None:
        """Look for other ranks' and runs' files, if something is missing and the folder changed."""
        if all(self._knows(name) for name, _ in records):
            return
        try:
            changed_at = self.folder.stat().st_mtime_ns
            if changed_at == self._scanned_at:
                return
            self._scanned_at = changed_at
            for path in set(self.folder.glob("*.safetensors")) - self._seen:
                self._seen.add(path)
                try:
                    names = self._opened(path).metadata() or {}
                except (OSError, SafetensorError) as error:
                    self._set_aside(path, str(error))
                    continue
                self._found |= dict.fromkeys(names, path)
        except OSError as error:
            log.warning("reference cache %s cannot be read: %s", self.folder, error)

    def _read(self, records: list[tuple[str, slice]]) -> Tensor | None:
        self._rescan(records)
        if not all(self._knows(name) for name, _ in records):
            return None
        parts: list[Tensor] = []
        for name, rows in records:
            part = self._pending.get(name)
            if part is None:
                part = self._read_one(name, rows.stop - rows.start)
            if part is None:
                return None
            parts.append(part)
        return torch.cat([self._like, *parts])

    def _read_one(self, name: str, num_rows: int) -> Tensor | None:
        path = self._found[name]
        try:
            file = self._opened(path)
            tensor: Tensor = file.get_tensor(name)
            is_whole = file.metadata().get(name) == _digest(tensor)
        except (OSError, SafetensorError, AttributeError) as error:
            self._set_aside(path, str(error))
            return None
        like = self._like
        if is_whole and tensor.dtype == like.dtype and tensor.shape == (num_rows, like.shape[1]):
            return tensor
        self._set_aside(path, "it has other content than was written")
        return None

    def _set_aside(self, path: Path, why: str) -> None:
        """Take a broken file out of use; it is renamed, since others may have it open."""
        log.warning("reference cache: %s is broken (%s): computing its part again", path, why)
        self._found = {name: at for name, at in self._found.items() if at != path}
        if self._writes:
            try:
                path.replace(path.with_suffix(".broken"))
            except OSError as error:
                log.debug("%s: %s", path, error)

    def _add(self, records: list[tuple[str, slice]], hidden: Tensor) -> None:
        # A copy of each part: a view would keep the whole batch.
        self._pending |= {
            name: hidden[rows].clone() for name, rows in records if not self._knows(name)
        }
        if sum(tensor.nbytes for tensor in self._pending.values()) >= FILE_BYTES:
            self._flush()

    def _stop_writing(self, why: object) -> None:
        log.warning(
            "nothing more is added to the reference cache %s: %s: the base is run where it has "
            "nothing; make room (`moored prepare --prune DAYS`), or raise reference.max_gib",
            self.folder,
            why,
        )
        self._writes = False
        self._pending = {}


def _begin_copy(hidden: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """A copy on the CPU, and what says that it is whole; elsewhere it is copied later."""
    if not hidden.is_cuda:
        return hidden, None
    copy = torch.empty(hidden.shape, dtype=hidden.dtype, pin_memory=True)
    copy.copy_(hidden, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()
    return copy, copied


def _open(path: Path) -> Any:
    return safe_open(path, framework="pt")


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().view(torch.uint8).numpy().data


def _digest(tensor: Tensor) -> str:
    # Of gigabytes per second, unlike a cryptographic one; it guards against damage, not malice.
    return xxhash.xxh3_128_hexdigest(_bytes(tensor))
