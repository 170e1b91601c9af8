"""What an adapter does to the tensors of its base, by PEFT's own layers, one tensor at a time.

Nothing of PEFT's arithmetic is repeated, and no tensor of the base is read or written here.
"""

# PEFT and accelerate are typed in part only.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

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
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from moored.models.elsewhere import failures_named, read_settings, require_mergeable
from moored.models.saved import plain_name, require_all
from moored.utils.errors import UserError

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
