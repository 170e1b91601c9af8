"""This rank's quantised slices on disk, so that the next start reads instead of quantising.

They lie in bitsandbytes' own serialised form, in files of some 256 MB, sealed; the folder's name
holds everything that they depend on.
"""

# bitsandbytes is untyped in parts.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
from safetensors.torch import save_file
from torch import Tensor, nn

from moored import sealed
from moored.mesh import Mesh
from moored.sources import cache_folder
from moored.weights import INDEX, Files, Loader

log = logging.getLogger(__name__)
FILE_BYTES = 2**28
FORMAT = 1


def load(causal_lm: nn.Module, loader: Loader, source: Path, mesh: Mesh) -> set[str]:
    """Fill the model from the cache, or from its source and the cache from it. Collective.

    Args:
        causal_lm: without weights, with this rank's sizes.
        loader: of the source.
        source: the model's folder.
        mesh: the processes.

    Returns:
        As `Loader.load`.
    """
    folder = cache_folder() / "quantized" / _key(loader, source)
    fault = sealed.fault_of(folder)
    if all(mesh.tp.gather(fault is None)):
        log.info("quantised weights from %s", folder)
        cached = dataclasses.replace(loader, files=Files(folder), layout=None)
        return cached.load(causal_lm)
    absent = loader.load(causal_lm)
    sealed.make_once(folder, lambda new: _write(causal_lm, new))
    return absent


def _key(loader: Loader, source: Path) -> str:
    files = sorted(p for p in source.iterdir() if p.suffix in (".safetensors", ".json"))
    layout = loader.layout
    parts = [
        FORMAT,
        [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files],
        str(source.resolve()),
        [str(loader.dtype), loader.device.type, loader.double, loader.whole_scales],
        None if layout is None else [loader.axis.rank, repr(sorted(layout.layers.items()))],
        [version(name) for name in ("torch", "transformers", "bitsandbytes")],
    ]
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
    place = "" if layout is None else f"-{loader.axis.rank}-of-{layout.degree}"
    return f"{source.name[:40]}-{digest}{place}"


def _write(causal_lm: nn.Module, folder: Path) -> dict[str, Any]:
    """Write what the model holds, a file at a time, so that no second copy of it exists."""
    weight_map: dict[str, str] = {}
    pending: dict[str, Tensor] = {}
    size = 0

    def flush() -> None:
        nonlocal size
        if pending:
            name = f"model-{len(set(weight_map.values())):05d}.safetensors"
            save_file(pending, folder / name, metadata={"format": "pt"})
            weight_map.update(dict.fromkeys(pending, name))
            pending.clear()
            size = 0

    for name, tensor in _tensors(causal_lm):
        pending[name] = tensor.detach().cpu().clone()  # of its own: some are shared
        size += tensor.numel() * tensor.element_size()
        if size >= FILE_BYTES:
            flush()
    flush()
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return {"format": FORMAT}


def _tensors(causal_lm: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in causal_lm.named_parameters():
        if parameter.is_meta:  # tied, or missing
            continue
        yield name, parameter.data
        state = getattr(parameter, "quant_state", None)
        if isinstance(parameter, bnb.nn.Params4bit) and state is not None:
            for kind, tensor in state.as_dict(packed=True).items():
                yield f"{name}.{kind}", tensor
    for path, module in causal_lm.named_modules():
        for kind, buffer in module.named_buffers(recurse=False):
            if kind not in module._non_persistent_buffers_set:
                yield f"{path}.{kind}", buffer
