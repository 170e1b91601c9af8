"""What an adapter does to the tensors of its base, by PEFT's own layers, and how far it moves them.

Nothing of PEFT's arithmetic is repeated: tensors are changed one at a time, by its own layers. How
far is a Frobenius norm, of which nothing of the size of dW is made (`adapters.product_squares`).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict, load_peft_weights
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper, get_pattern_key
from safetensors.torch import load_file
from torch import Tensor, nn

from moored.export.card.facts import Delta, Deltas
from moored.models.adapters import product_squares
from moored.models.open_adapters import (
    failures_named,
    plain_name,
    read_settings,
    require_all,
    require_mergeable,
)
from moored.models.weights import Files
from moored.utils.errors import UserError
from moored.utils.progress import Phase

Change = Callable[[Tensor], Tensor]  # of the base's values in fp32, which it may overwrite


@dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
    """What becomes of a base's tensors, by their names in the model.

    Attributes:
        of: each tensor's, one after the other.
        tied: names of tensors that PEFT keeps tied to a changed one.
    """

    of: Mapping[str, Sequence[Change]]
    tied: frozenset[str]


def changes_of(model: Any, adapter: Path, read: Callable[[str], Tensor]) -> Changes:
    """What a saved adapter does to its base.

    Args:
        model: the base without weights, all of it on `meta`; used up.
        adapter: a PEFT folder.
        read: gives a tensor of the base by its name in the model.

    Raises:
        UserError: PEFT cannot read it or it does not fit, or what it does cannot be merged.
    """
    require_mergeable(adapter)
    known = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    with failures_named(adapter, "not an adapter for this base"):
        tensors = load_peft_weights(str(adapter), device="cpu")
        owned = {name: plain for name in tensors if (plain := plain_name(name)) in known}
        _hollow(model, set(owned.values()))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Found missing adapter keys")  # see `require_all`
            peft = PeftModel.from_pretrained(model, str(adapter))
        expected = get_peft_model_state_dict(peft, save_embedding_layers=False)
    require_all(adapter, set(tensors), set(expected), owned)
    changes: dict[str, list[Change]] = {}
    tied, shared = set[str](), model.all_tied_weights_keys
    # What the file has in place of the base's own comes first: layers add to it.
    for name, plain in owned.items():
        if name in dict(peft.named_parameters(remove_duplicate=False)):
            base, value = read(plain), tensors[name]
            if not torch.equal(value.to(base.dtype), base):
                source = shared.get(plain, plain)
                tied |= {other for other, of in shared.items() if of == source}
                changes[source] = [_replaced_by(value)]
    for path, module in peft.named_modules():
        for name, change in _changes(path, module, adapter):
            if change is None:
                tied.add(name)
            elif name not in known:
                raise UserError(f"{adapter}: adapts {name}, which the base does not have")
            else:
                changes.setdefault(name, []).append(change)
    if not changes:
        kind = read_settings(adapter).get("peft_type")
        raise UserError(f"{adapter}: --merge: {kind} changes no weights: export it without --merge")
    return Changes(of=changes, tied=frozenset(tied))


def _hollow(model: Any, filled: Collection[str]) -> None:
    """Parameters in fp32 on the CPU that take no memory, for PEFT to build its layers by.

    Those that an adapter's file has values for are whole, so that PEFT can write into them.
    """
    whole = {id(model.get_parameter(name)) for name in filled}
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in made:
                zeros = torch.zeros((), dtype=torch.float32).expand(parameter.shape)
                zeros = zeros.clone() if id(parameter) in whole else zeros
                made[id(parameter)] = nn.Parameter(zeros, requires_grad=False)
            setattr(module, name, made[id(parameter)])


def _changes(path: str, module: Any, adapter: Path) -> Iterator[tuple[str, Change | None]]:
    """The base's tensors that a layer changes, by name, and how; None: as it does another's."""
    plain = plain_name(path)
    if isinstance(module, ModulesToSaveWrapper):
        for name, tensor in module.modules_to_save["default"].named_parameters():
            yield f"{plain}.{name}", _replaced_by(tensor)
    elif isinstance(module, BaseTunerLayer):
        if getattr(module, "tied_adapter", None):
            yield f"{plain}.weight", None
            return
        for attribute in _attributes(module, plain, adapter):
            yield f"{plain}.{attribute}", _merged_by(module, attribute, adapter)


def _attributes(layer: Any, path: str, adapter: Path) -> list[str]:
    """The parameters of its base that a layer changes."""
    base = layer.get_base_layer()
    if isinstance(layer, ParamWrapper):
        return [layer.parameter_name]
    own = {name for name, _ in base.named_parameters(recurse=False)}
    if "weight" not in own:
        raise UserError(
            f"{adapter}: --merge: {path} is a {type(base).__name__} without a weight of "
            "its own: export the adapter (without --merge)"
        )
    has_bias = any(layer.lora_bias.values()) if isinstance(layer, LoraLayer) else "bias" in own
    if has_bias and "bias" not in own:
        raise UserError(
            f"{adapter}: --merge: its lora_bias adds to {path}, which has no bias in the "
            "base: export the adapter (without --merge)"
        )
    return ["weight", "bias"] if has_bias else ["weight"]


def _merged_by(layer: Any, attribute: str, adapter: Path) -> Change:
    def change(weight: Tensor) -> Tensor:
        base = layer.get_base_layer()
        before = dict(base.named_parameters(recurse=False))
        for name in {"weight", "bias", attribute} & before.keys():
            value = weight if name == attribute else torch.zeros(before[name].shape)
            setattr(base, name, nn.Parameter(value, requires_grad=False))
        try:
            with failures_named(adapter, "--merge"):
                layer.merge(safe_merge=False)
            return getattr(layer.get_base_layer(), attribute).data
        finally:
            for name, parameter in before.items():
                setattr(base, name, parameter)
            layer.merged_adapters.clear()

    return change


def _replaced_by(tensor: Tensor) -> Change:
    return lambda _: tensor.detach().float().clone()


# ---------------------------------------------------------------- how far the weights move

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


def adapter_deltas(folder: Path, source: Path, *, read_base: bool) -> Deltas:
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
    return deltas_summary("adapter", moved)


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


def deltas_summary(of: str, moved: Sequence[Moved]) -> Deltas:
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
