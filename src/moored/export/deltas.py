"""How far an adapter moves the weights, by Frobenius norms: of its product, or as merged.

Nothing of the size of dW is made for an adapter, see `adapters.product_squares`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file
from torch import Tensor

from moored.export.card.facts import Delta, Deltas
from moored.models.adapters import product_squares
from moored.models.elsewhere import read_settings
from moored.models.weights import Files
from moored.utils.progress import Phase

PREFIX = "base_model.model."


@dataclass(frozen=True, slots=True, kw_only=True)
class Moved:
    """Squared Frobenius norms of one matrix.

    Attributes:
        name: the matrix's module.
        delta: dW.
        weight: W; None: it was not read.
        rounding: what rounding to the written dtype changed; None: nothing was written.
    """

    name: str
    delta: float
    weight: float | None = None
    rounding: float | None = None


def squares(tensor: Tensor) -> float:
    """The squared Frobenius norm, summed row by row in fp64 without an fp64 copy."""
    rows = torch.linalg.vector_norm(tensor.float().reshape(len(tensor), -1), dim=1)
    return rows.double().square().sum().item()


def squared_distance(a: Tensor, b: Tensor) -> float:
    """`squares` of a - b, which is made in pieces."""
    pieces = zip(a.split(256), b.split(256), strict=True) if a.dim() < 3 else zip(a, b, strict=True)
    return sum(squares(x - y) for x, y in pieces)


def of_adapter(folder: Path, source: Path, *, read_base: bool) -> Deltas:
    """What a saved adapter adds to its base's weights.

    Args:
        folder: of the adapter.
        source: of the base.
        read_base: read the base's adapted weights, for norms relative to theirs.
    """
    config = read_settings(folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    other = _not_a_plain_product(config, tensors)
    if other is not None:
        return Deltas(of="adapter", missing=other)
    files = Files(source) if read_base else None
    moved: list[Moved] = []
    keys = [key for key in sorted(tensors) if key.endswith(".lora_A.weight")]
    with Phase("measuring how far the weights moved", len(keys), "matrices") as phase:
        for key in phase.over(keys):
            module = key.removesuffix(".lora_A.weight")
            a, b = tensors[key], tensors[f"{module}.lora_B.weight"]
            name = module.removeprefix(PREFIX)
            product = max(0.0, product_squares(a.double(), b.double()).item())
            weight = None
            if files is not None:
                weight = _weight_squares(files, f"{name}.weight", a.shape[1] * b.shape[0])
            moved.append(Moved(name=name, delta=_scale(config, name) ** 2 * product, weight=weight))
    return summary("adapter", moved)


def _weight_squares(files: Files, name: str, size: int) -> float | None:
    """`squares` of a stored weight; packed codes have another size, and say nothing of it."""
    if name not in files.names:
        return None
    stored = files.whole(name)
    return squares(stored) if stored.numel() == size and stored.is_floating_point() else None


def _not_a_plain_product(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str | None:
    """Why dW is not scale * B A, as far as the files say; None where it is."""
    if config.get("peft_type") != "LORA":
        return "the adapter is not LoRA"
    if config.get("use_dora"):
        return "DoRA changes magnitudes, too, which only merging shows"
    variants = [k for k, v in config.items() if k.startswith("use_") and v and k != "use_rslora"]
    variants += [k for k in ("target_parameters", "alora_invocation_tokens") if config.get(k)]
    if variants:
        return f"the adapter is LoRA with {variants[0]}"
    for key, tensor in tensors.items():
        module, _, kind = key.rpartition(".lora_")
        other = f"{module}.lora_{'B' if kind.startswith('A') else 'A'}.weight"
        if kind not in ("A.weight", "B.weight") or other not in tensors or tensor.dim() != 2:
            return f"the adapter has more than products of two matrices ({key})"
        rank = tensor.shape[0 if kind == "A.weight" else 1]
        if rank != _setting(config, "rank_pattern", "r", module.removeprefix(PREFIX)):
            return f"the rank of {key} is not that of its configuration"
    return None


def _setting(config: Mapping[str, Any], patterns: str, default: str, name: str) -> Any:
    pattern = config.get(patterns) or {}
    return pattern.get(get_pattern_key(list(pattern), name), config[default])


def _scale(config: Mapping[str, Any], name: str) -> float:
    rank = _setting(config, "rank_pattern", "r", name)
    alpha = _setting(config, "alpha_pattern", "lora_alpha", name)
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def summary(of: str, moved: Sequence[Moved]) -> Deltas:
    """What became of matrices, as a card has it: in all, by kind, and which moved most."""
    if not moved:
        return Deltas(of=of, missing="the adapter changes no matrix")
    kinds: dict[str, list[Moved]] = {}
    for one in moved:
        kinds.setdefault(one.name.rpartition(".")[2], []).append(one)
    largest = max(moved, key=lambda one: _size(_delta([one])))
    total, written = _delta(moved), [one.rounding for one in moved if one.rounding is not None]
    rounding = None
    if len(written) == len(moved) and total.norm > 0:
        rounding = math.sqrt(sum(written)) / total.norm
    return Deltas(
        of=of,
        total=total,
        by_module={kind: _delta(kinds[kind]) for kind in sorted(kinds)},
        largest=largest.name,
        largest_delta=_delta([largest]),
        rounding=rounding,
    )


def _delta(moved: Sequence[Moved]) -> Delta:
    norm = math.sqrt(sum(one.delta for one in moved))
    weights = [one.weight for one in moved if one.weight is not None]
    known = len(weights) == len(moved) and sum(weights) > 0
    relative = norm / math.sqrt(sum(weights)) if known else None
    return Delta(count=len(moved), norm=norm, relative=relative)


def _size(delta: Delta) -> float:
    return delta.norm if delta.relative is None else delta.relative
