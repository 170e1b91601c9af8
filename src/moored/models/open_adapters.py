"""Saved adapters on the frozen base: Moored's own, and those of other trainers.

Which adapters of others can be measured, exported and merged is said here, too. They may carry an
output head, embeddings or tensors of the base itself: all of it is on and off with the adapter, so
that the reference stays the base. What cannot be so is refused.
"""

from __future__ import annotations

import contextlib
import json
import re
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import (
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    load_peft_weights,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from safetensors import SafetensorError
from torch import Tensor, nn

from moored.adapted import Replaced, on_with_adapters
from moored.loss.head import Head
from moored.models.adapters import experts_shown_whole, for_training
from moored.models.tensor_parallel import Sharding
from moored.utils.errors import UserError

_REWRITING = ("pissa", "olora", "corda", "loftq", "lora_ga")
_EXPORT = "export it as it is (moored export, without --merge)"


@contextlib.contextmanager
def failures_named(adapter: Path, what: str) -> Iterator[None]:
    """Make one line of what PEFT raises.

    Raises:
        UserError: PEFT failed; the adapter, `what` and PEFT's first words.
    """
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except (
        OSError,
        ValueError,
        RuntimeError,
        LookupError,
        TypeError,
        AttributeError,
        AssertionError,
        ImportError,
        SafetensorError,
    ) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        said = " ".join(lines[:2])[:300] or type(error).__name__
        raise UserError(f"{adapter}: {what}: {said}") from error


def read_settings(adapter: Path) -> dict[str, Any]:
    """The adapter's own settings.

    Raises:
        UserError: they cannot be read.
    """
    path = adapter / "adapter_config.json"
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): save the adapter again") from error
    if not isinstance(settings, dict):
        raise UserError(f"{path} is no table of settings: save the adapter again")
    return settings


def require_language_model(adapter: Path) -> dict[str, Any]:
    """The settings of an adapter that is one for a causal language model, beside its base.

    Raises:
        UserError: it is for another task, or PEFT changes the base to load it.
    """
    settings = read_settings(adapter)
    task = settings.get("task_type")
    if task not in (None, "CAUSAL_LM"):
        raise UserError(
            f"{adapter}: its task_type is {task}, but Moored has causal language models only: use "
            "an adapter whose task_type is CAUSAL_LM"
        )
    start = settings.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_REWRITING):
        raise UserError(
            f"{adapter}: its init_lora_weights is {start}, by which PEFT rewrites the base under "
            "it, so that with the adapter off it would not be the base: save it as plain LoRA, by "
            "PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )
    if settings.get("layer_replication"):
        raise UserError(
            f"{adapter}: its layer_replication makes a model with more layers than its base, so "
            "that none is left to compare or verify it with: use it with PEFT as it is"
        )
    return settings


def require_measurable(adapter: Path) -> dict[str, Any]:
    """The settings of an adapter that acts on hidden states wherever it stands.

    Raises:
        UserError: it acts through PEFT's forward or generation only, or changes the base's layers.
    """
    settings = require_language_model(adapter)
    if why := _outside_of_layers(settings):
        raise UserError(
            f"{adapter}: cannot be measured against its base: {why}, of which Moored's forward "
            f"knows nothing: {_EXPORT}"
        )
    return settings


def require_mergeable(adapter: Path) -> None:
    """Refuse what no weights of the base could stand for.

    Raises:
        UserError: what the adapter does is not a matter of weights.
    """
    settings = require_language_model(adapter)
    if why := _outside_of_layers(settings):
        raise UserError(f"{adapter}: --merge: {why}, which no weights stand for: {_EXPORT}")
    if settings.get("peft_type") == "OSF":
        raise UserError(
            f"{adapter}: --merge: OSF takes the base's weights apart when it is loaded, all of "
            "them: merge it by PEFT's merge_and_unload"
        )


def _outside_of_layers(settings: dict[str, Any]) -> str | None:
    """What an adapter does that is not done by its layers alone; None where they do it all."""
    kind = settings.get("peft_type")
    if kind in ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING") or (
        kind in ("CPT", "CARTRIDGE", "ADAPTION_PROMPT")
    ):
        return f"{kind} puts tokens before the text"
    if kind in ("XLORA", "POLY", "SHADOW"):
        return f"{kind} mixes its layers anew for every text"
    if settings.get("alora_invocation_tokens"):
        return "aLoRA (alora_invocation_tokens) acts on what follows its invocation only"
    return None


ON_A_MESH = ("LORA", "SINELORA")


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """A saved adapter on its base.

    Attributes:
        model: PEFT's.
        head: of the policy, which has the base's beside it; None where the base's serves both.
    """

    model: PeftModel
    head: Head | None


def open_adapter(causal_lm: Any, folder: Path, sharding: Sharding | None = None) -> Opened:
    """Put a saved PEFT adapter on the base, in fp32.

    Args:
        causal_lm: the base, our head in place.
        folder: of the adapter.
        sharding: how the base is spread.

    Raises:
        UserError: PEFT cannot read it, or it does not fit this base.
    """
    with failures_named(folder, "not an adapter for this base"):
        tensors = load_peft_weights(str(folder), device="cpu")
        if sharding is not None:
            _require_plain(folder, tensors)
        owned = _base_tensors(causal_lm, tensors) if sharding is None else {}
        head = causal_lm.get_output_embeddings()
        if sharding is None:
            with (
                _plain_head(causal_lm),
                experts_shown_whole(causal_lm),
                warnings.catch_warnings(),
            ):
                # What is missing is looked for below; biases are off with the adapter here.
                warnings.filterwarnings("ignore", "Found missing adapter keys")
                is_prompt = PeftConfig.from_pretrained(str(folder)).is_prompt_learning
                model = PeftModel.from_pretrained(
                    causal_lm,
                    str(folder),
                    is_trainable=not is_prompt,  # PEFT trains none that was saved
                    autocast_adapter_dtype=True,
                )
        else:
            model = _open_parts(causal_lm, folder, sharding, tensors)
        expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    require_all(folder, set(tensors), set(expected), owned)
    replaced = [r for r in owned.values() if not torch.equal(r.base, r.own())]
    on_with_adapters(model, replaced)
    model = for_training(model)
    base = {id(r.parameter): r.base for r in replaced}
    if {id(head.weight), id(head.bias)} & base.keys():
        weight, bias = (base.get(id(p), p) for p in (head.weight, head.bias))
        assert weight is not None
        return Opened(
            model=model, head=head.with_own(weight, bias).with_own(head.weight, head.bias)
        )
    if causal_lm.get_output_embeddings() is head:
        return Opened(model=model, head=None)
    with failures_named(folder, "its output head cannot be measured"):
        return Opened(model=model, head=_head_of(causal_lm.get_output_embeddings(), head))


# ---------------------------------------------------------------- what the file holds


def _base_tensors(causal_lm: Any, names: Iterable[str]) -> dict[str, Replaced]:
    """Parameters of the base that a file has values for, by the file's names, as they are."""
    known = dict(causal_lm.named_parameters(remove_duplicate=False))
    plain = {name: plain_name(name) for name in names}
    return {
        name: Replaced(parameter=known[own], base=known[own].detach().clone())
        for name, own in plain.items()
        if own in known
    }


def plain_name(name: str) -> str:
    """A module or tensor of the base by its own name, of that in PEFT's model or file."""
    parts = name.removeprefix("base_model.model.").split(".")
    return ".".join(p for p in parts if p not in ("base_layer", "original_module", "token_adapter"))


def require_all(folder: Path, written: set[str], expected: set[str], base: Iterable[str]) -> None:
    """Refuse an adapter whose file lacks tensors, or has others.

    Args:
        folder: of the adapter.
        written: names of the tensors in its file.
        expected: names of those that PEFT would write.
        base: names in the file that are of the base itself.

    Raises:
        UserError: they are not the same.
    """
    written, expected = _without_references(written), _without_references(expected)
    if odd := sorted((written ^ expected) - set(base)):
        where = "it lacks" if odd[0] in expected else "the base has no place for"
        raise UserError(
            f"{folder}: not an adapter for this base: {where} {odd[0]} ({len(odd)} such tensors): "
            "name the base that it was trained on"
        )


def _without_references(names: Iterable[str]) -> set[str]:
    """The names in a RandLoRA adapter without those by which each layer refers to the bases."""
    return {name for name in names if not re.search(r"\.model\..*\.randlora_[AB]$", name)}


# ---------------------------------------------------------------- heads


@contextlib.contextmanager
def _plain_head(causal_lm: Any) -> Iterator[None]:
    """Show PEFT a linear lm_head, as it knows it; ours comes back where PEFT left that alone."""
    head = causal_lm.get_output_embeddings()
    linear = nn.Linear(head.in_features, head.out_features, bias=False, device="meta")
    linear.weight = head.weight
    linear.register_parameter("bias", head.bias)
    causal_lm.set_output_embeddings(linear)
    yield
    if causal_lm.get_output_embeddings() is linear:
        causal_lm.set_output_embeddings(head)


def _head_of(layer: Any, base: Head) -> Head:
    """What PEFT's layer in lm_head's place amounts to while the adapter is on."""
    if isinstance(layer, TrainableTokensWrapper):
        return base.with_own(layer.token_adapter.get_merged_weights(["default"]), None)
    if isinstance(layer, ModulesToSaveWrapper):
        layer = layer.modules_to_save["default"]
    if not isinstance(layer, BaseTunerLayer):
        return base.with_own(layer.weight, layer.bias)
    linear: Any = layer.get_base_layer()
    before = {name: p for name, p in linear.named_parameters(recurse=False)}
    try:
        for name, parameter in before.items():
            values = nn.Parameter(parameter.detach().float().clone(), requires_grad=False)
            setattr(linear, name, values)
        layer.merge()  # pyright: ignore[reportCallIssue]
        return base.with_own(linear.weight, linear.bias)
    finally:
        for name, parameter in before.items():
            setattr(linear, name, parameter)
        layer.merged_adapters.clear()


# ---------------------------------------------------------------- on a mesh


def _require_plain(folder: Path, tensors: Iterable[str]) -> None:
    kind = str(PeftConfig.from_pretrained(str(folder)).peft_type).removeprefix("PeftType.")
    odd = sorted(name for name in tensors if "lora" not in name or "embedding" in name)
    if kind not in ON_A_MESH or odd:
        what = f"carries {odd[0]}" if kind in ON_A_MESH else f"is {kind}"
        raise UserError(
            f"parallel.tensor_parallel_degree: {folder} {what}, which cannot be spread over ranks: "
            "measure it with parallel.tensor_parallel_degree=1"
        )


def _open_parts(
    causal_lm: Any, folder: Path, sharding: Sharding, tensors: dict[str, Tensor]
) -> PeftModel:
    """As `PeftModel.from_pretrained`, of a base whose layers have this rank's sizes."""
    config = PeftConfig.from_pretrained(str(folder))
    config.inference_mode = False
    with experts_shown_whole(causal_lm):
        model = get_peft_model(causal_lm, config, autocast_adapter_dtype=True)
    assert isinstance(model, PeftModel)
    sharding.adopt(causal_lm)
    parts = {name: sharding.local(name, tensor) for name, tensor in tensors.items()}
    set_peft_model_state_dict(model, parts)
    return model
