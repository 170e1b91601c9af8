"""This rank's quantised slices on disk, so that the next start reads instead of quantising.

They lie in bitsandbytes' own serialised form, in files of some 256 MB, sealed; the folder's name
holds everything that they depend on.
"""

# bitsandbytes is untyped in parts.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import bitsandbytes as bnb
import filelock
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from moored.distributed.mesh import Mesh
from moored.models.experts import Experts4bit, experts_of
from moored.models.weights import INDEX, AfterModule, Files, Loader
from moored.utils import atomic_dir
from moored.utils.environment import cache_folder, version_of

log = logging.getLogger(__name__)
FILE_BYTES = 2**28
FORMAT = 1


def load(
    causal_lm: nn.Module,
    loader: Loader,
    source: Path,
    mesh: Mesh,
    after: AfterModule | None = None,
) -> set[str]:
    """Fill the model from the cache, or from its source and the cache from it. Collective.

    The first tensor-parallel group of each machine writes. A cache that cannot be written costs a
    warning, not the run.

    Args:
        causal_lm: without weights, with this rank's sizes.
        loader: of the source.
        source: the model's folder.
        mesh: the processes.
        after: as in `Loader.load`.

    Returns:
        As `Loader.load`.
    """
    key = _key(loader, source, has_experts=bool(experts_of(causal_lm)))
    folder = cache_folder() / "quantized" / key
    fault = atomic_dir.verify(folder)
    if all(mesh.tp.gather(fault is None)):
        log.info("quantised weights from %s", folder)
        cached = dataclasses.replace(loader, files=Files(folder), layout=None, parts=None)
        return cached.load(causal_lm, after)
    if fault is not None and folder.exists():
        log.warning("%s is broken (%s): making it again", folder, fault)
    if fault is None or not mesh.first_on_machine:
        return loader.load(causal_lm, after)
    with _Writer(folder) as writer:

        def both(path: str, module: nn.Module) -> None:
            writer.add(path, module)
            if after is not None:
                after(path, module)

        return loader.load(causal_lm, both)


def _key(loader: Loader, source: Path, *, has_experts: bool) -> str:
    files = sorted(p for p in source.iterdir() if p.suffix in (".safetensors", ".json"))
    layout = loader.layout
    parts = [
        FORMAT,
        [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files],
        str(source.resolve()),
        [str(loader.dtype), loader.device.type, loader.double, True],  # of whole tensors
        None if layout is None else [loader.axis.rank, repr(sorted(layout.layers.items()))],
        [version_of(name) for name in ("torch", "transformers", "bitsandbytes")],
    ]
    if has_experts:
        parts.append("experts in 4 bits")
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
    place = "" if layout is None else f"-{loader.axis.rank}-of-{layout.degree}"
    return f"{source.name[:40]}-{digest}{place}"


class _Writer:
    """Writes modules as they are filled, a file at a time: no second copy of them exists."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._weight_map: dict[str, str] = {}
        self._pending: dict[str, Tensor] = {}
        self._stack = contextlib.ExitStack()
        self._new: Path | None = None  # None once it cannot be written

    def __enter__(self) -> Self:
        with self._or_without():
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            lock = filelock.FileLock(self.folder.parent / f".{self.folder.name}.lock", timeout=0)
            try:
                self._stack.enter_context(lock)
            except filelock.Timeout:
                return self  # another process writes it
            for left in self.folder.parent.glob(f".{self.folder.name}.*.tmp"):
                shutil.rmtree(left, ignore_errors=True)  # by a process that was killed
            self._new, facts = self._stack.enter_context(atomic_dir.publishing(self.folder))
            facts["format"] = FORMAT
        return self

    def __exit__(self, *error: Any) -> None:
        with self._or_without():
            if self._new is not None and error[0] is None:
                self._flush()
                index = json.dumps({"weight_map": self._weight_map})
                (self._new / INDEX).write_text(index)
                self._stack.close()
                return
        # Any error keeps the half folder from getting its name.
        abandoned = OSError("abandoned")
        with contextlib.suppress(OSError):
            self._stack.__exit__(OSError, abandoned, None)

    def add(self, path: str, module: nn.Module) -> None:
        """Take up the tensors of one module, submodules apart."""
        if self._new is None:
            return
        for name, tensor in _tensors(path, module):
            self._pending[name] = tensor.detach().cpu().clone()  # of its own: some are shared
        size = sum(tensor.nbytes for tensor in self._pending.values())
        if size >= FILE_BYTES:
            with self._or_without():
                self._flush()

    def _flush(self) -> None:
        if not self._pending or self._new is None:
            return
        name = f"model-{len(set(self._weight_map.values())):05d}.safetensors"
        try:
            save_file(self._pending, self._new / name, metadata={"format": "pt"})
        except SafetensorError as error:  # a full disk, too
            raise OSError(str(error)) from error
        self._weight_map.update(dict.fromkeys(self._pending, name))
        self._pending.clear()

    @contextlib.contextmanager
    def _or_without(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            log.warning("the quantised weights are not kept: %s: %s", self.folder, error)
            self._new = None
            self._pending.clear()


def _tensors(path: str, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    prefix = f"{path}." if path else ""
    packed = dict(module.held()) if isinstance(module, Experts4bit) else dict[str, Tensor]()
    yield from ((prefix + name, tensor) for name, tensor in packed.items())
    for kind, parameter in module.named_parameters(recurse=False):
        if kind in packed:
            continue
        if parameter.is_meta:  # tied, or missing
            continue
        yield prefix + kind, parameter.data
        state = getattr(parameter, "quant_state", None)
        if isinstance(parameter, bnb.nn.Params4bit) and state is not None:
            for what, tensor in state.as_dict(packed=True).items():
                yield f"{prefix}{kind}.{what}", tensor
    for kind, buffer in module.named_buffers(recurse=False):
        if kind not in module._non_persistent_buffers_set:
            yield prefix + kind, buffer
