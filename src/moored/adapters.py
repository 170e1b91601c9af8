"""PEFT's adapters on the frozen base: fresh ones by the recipe, and saved ones.

What they may not touch, the head and the embedding, is refused here; what spreads them over ranks
is `tensor_parallel`'s.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    load_peft_weights,
    set_peft_model_state_dict,
)
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError

from moored.config import AdapterConfig
from moored.errors import UserError
from moored.tensor_parallel import Sharding, whole_adapters


def product_norm(causal_lm: Any) -> torch.Tensor:
    """Squared Frobenius norm of what LoRA adds, sum over layers of ||s B A||^2, differentiable.

    ||B A||^2 = tr((B^T B) (A A^T)), of r x r matrices: the product is never formed.
    """
    norms: list[torch.Tensor] = []
    for layer in causal_lm.modules():
        if isinstance(layer, LoraLayer):
            for name in (name for name in layer.active_adapters if name in layer.lora_A):
                a: Any = layer.lora_A[name].weight  # [r, D_in]
                b: Any = layer.lora_B[name].weight  # [D_out, r]
                norms.append(layer.scaling[name] ** 2 * ((b.T @ b) * (a @ a.T)).sum())
    return torch.stack(norms).sum()


DRAWN = ("default", "gaussian", "orthogonal")  # initial values that depend on sizes alone


def add_adapters(
    causal_lm: Any, config: AdapterConfig, seed: int, sharding: Sharding | None = None
) -> PeftModel:
    """Put the recipe's adapters into the base, in fp32, initialised from `seed`.

    Args:
        causal_lm: the base.
        config: the recipe's.
        seed: of the initial values, which are the same on every mesh.
        sharding: how the base is spread.

    Raises:
        UserError: PEFT refuses the settings, or the head or the embedding would be adapted.
    """
    if config.init in ("eva", "lora_ga"):
        raise UserError(
            f"adapter.init: {config.init} is computed from data beforehand, which is not done "
            "here: use default or gaussian"
        )
    if sharding is not None and config.init not in DRAWN:
        raise UserError(
            f"adapter.init: {config.init} is computed from whole weights of the base, which are "
            f"spread over ranks: use {' or '.join(DRAWN)}"
        )
    init: Any = True if config.init == "default" else config.init
    targets: Any = config.target_modules
    if not isinstance(targets, str):
        targets = list(targets)
        _require_known(causal_lm, targets)
        _refuse_head(causal_lm, targets)
    try:
        lora = LoraConfig(
            r=config.r,
            lora_alpha=config.alpha,  # pyright: ignore[reportArgumentType]
            lora_dropout=config.dropout,
            target_modules=targets,
            use_rslora=config.use_rslora,
            use_dora=config.use_dora,
            init_lora_weights=init,
            task_type="CAUSAL_LM",
        )
        torch.manual_seed(seed)
        model = get_peft_model(causal_lm, lora, autocast_adapter_dtype=True)
    except torch.OutOfMemoryError:
        raise
    except (ValueError, ImportError, TypeError, KeyError, RuntimeError) as error:
        raise UserError(
            f"adapter: {' '.join(str(error).split())[:300]}: change adapter.target_modules or "
            "adapter.init"
        ) from error
    assert isinstance(model, PeftModel)
    if sharding is not None:
        sharding.adopt(causal_lm)
        _set_parts(model, sharding, whole_adapters(causal_lm, sharding.layout, lora, seed))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
            if "lora" not in name:
                raise UserError(f"adapter: {name} of the base would be trained: adapt it by LoRA")
    return model


def open_adapter(causal_lm: Any, folder: Path, sharding: Sharding | None = None) -> PeftModel:
    """Put a saved PEFT adapter on the base, in fp32.

    Raises:
        UserError: PEFT cannot read it, or it does not fit this base.
    """
    try:
        tensors = load_peft_weights(str(folder), device="cpu")
        written = set(tensors)
        if sharding is None:
            model = PeftModel.from_pretrained(
                causal_lm, str(folder), is_trainable=True, autocast_adapter_dtype=True
            )
        else:
            model = _open_parts(causal_lm, folder, sharding, tensors)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise UserError(f"{folder}: not an adapter for this base: {' '.join(lines[:2])}") from error
    expected = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    if own := sorted(name for name in written - expected if "lora" not in name):
        raise UserError(
            f"{folder}: carries weights of the base itself ({own[0]}), which the reference shares: "
            "save it again without them (save_embedding_layers=False)"
        )
    if odd := sorted(written ^ expected):
        where = "it lacks" if odd[0] in expected else "the base has no place for"
        raise UserError(
            f"{folder}: not an adapter for this base: {where} {odd[0]} ({len(odd)} such tensors): "
            "name the base that it was trained on"
        )
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def require_scale(factor: float) -> None:
    """Raise UserError unless an adapter can be deployed at this scale."""
    if not (math.isfinite(factor) and factor > 0):
        raise UserError(f"--scale {factor:g}: a finite number above 0 is needed (0 is the base)")


@contextlib.contextmanager
def scaled(model: PeftModel, factor: float) -> Iterator[None]:
    """All that the adapters add, times `factor`: 0 is the base, 1 what was trained.

    W + factor * BA interpolates base and adapted weights (WiSE-FT, arXiv 2109.01903).

    Raises:
        UserError: the adapters' effect is not linear in such a factor.
    """
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    if any(any(layer.use_dora.values()) for layer in layers):
        raise UserError(_NO_SCALE)
    before = [dict(layer.scaling) for layer in layers]
    try:
        for layer, scaling in zip(layers, before, strict=True):
            layer.scaling.update({name: factor * value for name, value in scaling.items()})
        yield
    finally:
        for layer, scaling in zip(layers, before, strict=True):
            layer.scaling.update(scaling)


def write_scaled(adapter: Path, folder: Path, factor: float) -> None:
    """Copy a saved LoRA adapter with its alpha times `factor`; its matrices stay as they are.

    Raises:
        UserError: as `scaled`.
    """
    config = json.loads((adapter / "adapter_config.json").read_text())
    if config.get("peft_type") != "LORA" or config.get("use_dora"):
        raise UserError(_NO_SCALE)
    config["lora_alpha"] *= factor
    config["alpha_pattern"] = {
        k: factor * v for k, v in (config.get("alpha_pattern") or {}).items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True))
    name = "adapter_model.safetensors"
    shutil.copyfile(adapter / name, folder / name)


_NO_SCALE = "--scale: only LoRA without DoRA is linear in a scale of the adapter: leave it out"


def _open_parts(
    causal_lm: Any, folder: Path, sharding: Sharding, tensors: dict[str, torch.Tensor]
) -> PeftModel:
    """As `PeftModel.from_pretrained`, of a base whose layers have this rank's sizes."""
    config = PeftConfig.from_pretrained(str(folder))
    config.inference_mode = False
    model = get_peft_model(causal_lm, config, autocast_adapter_dtype=True)
    assert isinstance(model, PeftModel)
    sharding.adopt(causal_lm)
    own = {name for name in tensors if "lora" in name}
    parts = {name: sharding.local(name, tensors[name]) for name in own}
    set_peft_model_state_dict(model, parts)
    return model


def _set_parts(model: PeftModel, sharding: Sharding, whole: Mapping[str, torch.Tensor]) -> None:
    """Give this rank's parts of whole matrices to the adapters; DoRA's magnitudes stay."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            path = name.removeprefix("base_model.model.").removesuffix(".default.weight")
            if path in whole:
                parameter.copy_(sharding.local(name, whole[path]))


def _require_known(causal_lm: Any, targets: list[str]) -> None:
    """PEFT is content if any of the names is found."""
    names = [name for name, _ in causal_lm.named_modules()]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            last = {name.rpartition(".")[2] for name in names}
            close = difflib.get_close_matches(target, sorted(last), 1)
            hint = f"did you mean {close[0]}?" if close else "see the model's own names"
            raise UserError(f"adapter.target_modules: no module is named {target}: {hint}")


def _refuse_head(causal_lm: Any, targets: list[str]) -> None:
    frozen = {
        id(causal_lm.get_output_embeddings()): "output head",
        id(causal_lm.get_input_embeddings()): "token embedding",
    }
    for name, module in causal_lm.named_modules():
        for target in targets:
            if id(module) in frozen and (name == target or name.endswith(f".{target}")):
                raise UserError(
                    f"adapter.target_modules: {target} is the {frozen[id(module)]}, which the "
                    "reference shares and the loss keeps frozen: remove it from the list"
                )
