"""PEFT's adapters on the frozen base: fresh ones by the recipe, in fewer passes, and their scale.

What they may not touch, the head and the embedding, is refused here; saved ones are
`open_adapters.py`'s. What spreads them over ranks is `tensor_parallel`'s. SineLoRA, which PEFT
lacks, is `sinelora.py`'s.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import logging
import math
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import (
    LoraConfig,
    OFTConfig,
    PeftConfig,
    PeftModel,
    RandLoraConfig,
    RandLoraModel,
    get_peft_model,
    load_peft_weights,
)
from peft.tuners import lora
from peft.tuners.lora import LoraLayer
from peft.tuners.oft import OFTLayer
from peft.tuners.randlora import RandLoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import Tensor, nn

from moored.config import AdapterConfig
from moored.models.experts import Experts4bit, Routed, experts_of, matrices_of
from moored.models.partition import is_cut
from moored.models.tensor_parallel import Sharding, whole_adapters
from moored.sinelora import SineLoraConfig
from moored.utils.errors import UserError

log = logging.getLogger(__name__)


class AddingLinear(nn.Linear):
    """The product with B; called as a module, so that ZeRO-3's hooks gather its weight."""

    def forward(self, input: Tensor, onto: Tensor | None = None) -> Tensor:
        """Product of `input` [..., r], added to `onto` [..., out_features] where that is given."""
        if onto is None:
            return super().forward(input)
        rows, added = onto.flatten(0, -2), input.flatten(0, -2)
        return torch.addmm(rows, added, self.weight.t()).view(onto.shape)


class _Fused:
    """What becomes of a PEFT layer's forward where one plain adapter is on."""

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base's output for x [..., in_features], and what the active adapters add."""
        active = [name for name in self.active_adapters if name in self.lora_A]
        special = args or kwargs or self.disable_adapters or self.merged or self.lora_variant
        if special or len(active) != 1 or not self._is_plain(active[0], x):
            return super().forward(x, *args, **kwargs)  # pyright: ignore
        (name,) = active
        low = self.lora_A[name](self.lora_dropout[name](x)) * self.scaling[name]
        return self.lora_B[name](low, self.base_layer(x))

    def _is_plain(self: Any, name: str, x: Tensor) -> bool:
        """Whether base and adapter compute in the dtype of x."""
        device = x.device.type
        on = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if on else self.lora_A[name].weight.dtype
        return x.dtype == dtype and isinstance(self.lora_B[name], AddingLinear)


class FusedLinear(_Fused, lora.Linear):
    """LoRA on a linear layer in full precision."""


class FusedLinear4bit(_Fused, lora.Linear4bit):  # pyright: ignore[reportGeneralTypeIssues]
    """LoRA on a linear layer of bitsandbytes in 4 bits."""


class ExpertLora(lora.ParamWrapper):
    """PEFT's LoRA on a projection of experts, each with its own A and B, beside packed weights.

    PEFT itself adds the product of A and B to the weights before they are used, which packed ones
    cannot be; here each expert's two products are added to its output.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The experts' output, with what the active adapters add."""
        experts: Any = self.get_base_layer()
        if self.disable_adapters or not self._active():
            return self.base_layer(x, *args, **kwargs)
        experts.added[self.parameter_name] = self.added
        try:
            return self.base_layer(x, *args, **kwargs)
        finally:
            del experts.added[self.parameter_name]

    def _active(self) -> list[str]:
        return [name for name in self.active_adapters if name in self.lora_A]

    def added(self, x: Tensor, routed: Routed) -> Tensor:
        """What is added to the product of x [S, I], in its dtype: [S, O]."""
        parts = [self._added_by(name, x, routed) for name in self._active()]
        return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)

    def _added_by(self, name: str, x: Tensor, routed: Routed) -> Tensor:
        A, B = self.factors(name)
        A, B = A.to(x.dtype) * self.scaling[name], B.to(x.dtype)
        a, b = A.unbind(), B.unbind()
        pieces = [x[start:stop] @ a[e].t() @ b[e].t() for e, start, stop in routed.groups]
        if pieces:
            return torch.cat(pieces)
        # No token came to the experts held here: their gradients are zeros, not absent.
        return x.new_zeros(0, B.shape[1]) + 0 * (A.sum() + B.sum())

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """A [E, r, I] and B [E, O, r] of each expert, as PEFT lays them out; views."""
        A: Any = self.lora_A[name].weight  # [E r, I]
        B: Any = self.lora_B[name].weight  # [O, r E]
        num, rank = self.num_experts, self.r[name]
        by_expert = B.view(B.shape[0], rank, num).permute(2, 0, 1)
        return A.view(num, rank, A.shape[1]), by_expert


@contextlib.contextmanager
def experts_shown_whole(causal_lm: nn.Module) -> Iterator[None]:
    """Show PEFT packed experts in the sizes that they stand for, while it puts adapters on them.

    Afterwards its layers on them are such as compute beside packed weights.
    """
    packed = [m for m in causal_lm.modules() if isinstance(m, Experts4bit)]
    held = [{kind: getattr(m, kind) for kind in m.matrices} for m in packed]
    for module in packed:
        device = getattr(module, module.matrices[0]).device
        for kind in module.matrices:
            rows, columns = module.shape_of(kind)
            own: Any = module
            sizes = (columns, rows) if own.is_transposed else (rows, columns)
            hollow = torch.zeros((), device=device).expand(module.num_experts, *sizes)
            module.register_parameter(kind, nn.Parameter(hollow, requires_grad=False))
    try:
        yield
    finally:
        for module, parameters in zip(packed, held, strict=True):
            for kind, parameter in parameters.items():
                module.register_parameter(kind, parameter)
    layers: Iterator[Any] = causal_lm.modules()
    for layer in layers:
        if type(layer) is lora.ParamWrapper and isinstance(layer.get_base_layer(), Experts4bit):
            layer.__class__ = ExpertLora


_FUSED: dict[type, type] = {lora.Linear: FusedLinear, lora.Linear4bit: FusedLinear4bit}


def fuse(model: nn.Module) -> int:
    """Turn PEFT's LoRA layers of `model` into such ones, in place; returns how many.

    What is not plain LoRA on a linear layer stays as it is: DoRA and other variants, biases of the
    adapter, convolutions (GPT-2's Conv1D among them) and embeddings.
    """
    changed = 0
    for module in model.modules():
        kind, layer = _FUSED.get(type(module)), module
        if kind is None or layer.lora_variant or layer.fan_in_fan_out:  # pyright: ignore
            continue
        parts: Any = layer.lora_B
        for part in parts.values():
            if type(part) is nn.Linear and part.bias is None:
                part.__class__ = AddingLinear
                module.__class__ = kind
        changed += type(module) is kind
    return changed


BASES = ("randlora_A", "randlora_B")  # random and frozen; one pair for all layers


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
    targets, parameters = _targets(causal_lm, config, sharding)
    try:
        settings = _settings(config, targets, parameters, seed)
        torch.manual_seed(seed)
        with experts_shown_whole(causal_lm), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Invalid `oft_block_size`")  # refused below
            model = get_peft_model(causal_lm, settings, autocast_adapter_dtype=True)
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
        assert isinstance(settings, LoraConfig)  # the recipe refuses the others on such a mesh
        _set_parts(model, sharding, whole_adapters(causal_lm, sharding.layout, settings, seed))
    _require_blocks(model, config.oft_block_size)
    own = str(model.base_model.prefix)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and own not in name:
            raise UserError(f"adapter: {name} of the base would be trained: adapt it by LoRA")
    return for_training(model)


def _require_blocks(model: PeftModel, size: int) -> None:
    """OFT's blocks fill the inputs of a layer; PEFT would take others where they do not."""
    for name, layer in model.named_modules():
        inputs = int(layer.in_features or 0) if isinstance(layer, OFTLayer) else 0
        if inputs % size:
            path = name.removeprefix("base_model.model.")
            raise UserError(
                f"adapter.oft_block_size: {size} does not divide the {inputs} inputs of {path}: "
                "take a number that divides those of all adapted layers"
            )


def _targets(
    causal_lm: Any, config: AdapterConfig, sharding: Sharding | None
) -> tuple[Any, list[str]]:
    """PEFT's target_modules and target_parameters: linear layers, and experts if they are named.

    "all-linear" is the linear layers; PEFT would add experts and routers in some mixtures of
    experts, and not in others.
    """
    experts, targets = experts_of(causal_lm), config.target_modules
    if not experts:
        if isinstance(targets, str):
            return targets, []
        _require_known(causal_lm, list(targets))
        _refuse_head(causal_lm, list(targets))
        return list(targets), []
    head = causal_lm.get_output_embeddings()
    linear = [
        name
        for name, module in causal_lm.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    ]
    if isinstance(targets, str):
        leaves = sorted({name.rpartition(".")[2] for name in linear})
        taken = [leaf for leaf in leaves if _is_taken(causal_lm, leaf)]
        if taken:
            log.warning(
                "adapter.target_modules: all-linear leaves %s out, which PEFT takes for experts in "
                "a %s",
                ", ".join(taken),
                type(causal_lm).__name__,
            )
        return [leaf for leaf in leaves if leaf not in taken], []
    stacks = [f"{path}.{kind}" for path, m in experts.items() for kind in matrices_of(m)]
    modules, parameters = list[str](), list[str]()
    for target in targets:
        of_experts = _named(target, stacks)
        of_linear = _named(target, linear)
        if of_experts and (not of_linear or "experts" in target):
            parameters.append(".".join(of_experts[0].split(".")[-2:]))
            continue
        if _is_taken(causal_lm, target):
            what = sorted({".".join(name.split(".")[-2:]) for name in stacks})
            raise UserError(
                f"adapter.target_modules: {target} is taken by PEFT for a part of the experts or "
                f"their router in a {type(causal_lm).__name__}: name {' and '.join(what)} for the "
                "experts, or leave it out"
            )
        modules.append(target)
    _require_known(causal_lm, modules)
    _refuse_head(causal_lm, modules)
    if parameters:
        _require_expert_lora(config, experts.values(), sharding)
    return modules, parameters


def _require_expert_lora(
    config: AdapterConfig, experts: Iterable[nn.Module], sharding: Sharding | None
) -> None:
    """Experts take plain LoRA; where they are not packed, PEFT's own, on whole weights only."""
    if config.method != "lora" or config.dropout:
        raise UserError(
            "adapter.target_modules: experts take LoRA without dropout only: set adapter.method to "
            "lora and adapter.dropout to 0, or leave the experts out"
        )
    in_parts = any(is_cut(p) for m in experts for p in m.parameters(recurse=False))
    is_packed = all(isinstance(module, Experts4bit) for module in experts)
    if (sharding is not None or in_parts) and not is_packed:
        raise UserError(
            "adapter.target_modules: experts in full precision are adapted on whole weights only: "
            "set model.quantization to nf4, or parallel.tensor_parallel_degree to 1 and "
            "parallel.zero_stage to 2"
        )


def _named(target: str, names: list[str]) -> list[str]:
    return [name for name in names if name == target or name.endswith(f".{target}")]


def _is_taken(causal_lm: Any, target: str) -> bool:
    """Whether PEFT takes a name for one of an older transformers, of experts or their router."""
    settings = LoraConfig(target_modules=[target])
    try:
        convert_peft_config_for_transformers(settings, causal_lm, None)
    except ValueError:  # it wants all parts of what is one tensor by now
        return True
    return target not in (settings.target_modules or ())


def _settings(config: AdapterConfig, targets: Any, parameters: list[str], seed: int) -> PeftConfig:
    """The recipe's adapter in PEFT's words."""
    shared: dict[str, Any] = {"target_modules": targets, "task_type": "CAUSAL_LM"}
    if config.method == "oft":
        return OFTConfig(
            oft_block_size=config.oft_block_size,
            use_cayley_neumann=config.use_cayley_neumann,
            **shared,
        )
    shared["r"] = config.r
    if config.method == "randlora":
        # The bases are kept with the adapter: drawn again from the key they may differ, since PEFT
        # draws and normalises them in what half precision the machine has.
        return RandLoraConfig(
            randlora_alpha=config.alpha,  # pyright: ignore[reportArgumentType]
            randlora_dropout=config.dropout,
            projection_prng_key=seed,
            save_projection=True,
            **shared,
        )
    shared |= {
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "use_rslora": config.use_rslora,
        "init_lora_weights": True if config.init == "default" else config.init,
    }
    if parameters:
        shared["target_parameters"] = parameters
    if config.method == "sinelora":
        return SineLoraConfig(omega=config.omega, **shared)
    return LoraConfig(use_dora=config.method == "dora", **shared)


def frozen_buffers(model: PeftModel) -> dict[str, Tensor]:
    """RandLoRA's bases in the model itself, by their names in an adapter's file."""
    tuner: Any = model.base_model
    if not isinstance(tuner, RandLoraModel):
        return {}
    return {f"base_model.{name}": getattr(tuner, name)["default"] for name in BASES}


def frozen_tensors(model: PeftModel) -> dict[str, Tensor]:
    """What an adapter needs beside what is trained, on the CPU, by its names in the file.

    RandLoRA's bases, once: PEFT itself would write them again for every layer that refers to them.
    """
    found = {name: tensor.cpu() for name, tensor in frozen_buffers(model).items()}
    for name, tensor in found.items():
        half = tensor.bfloat16()  # as PEFT draws them, before it casts the adapter to fp32
        if torch.equal(half.to(tensor.dtype), tensor):
            found[name] = half
    return found


def load_frozen(model: PeftModel, folder: Path) -> None:
    """Put what `frozen_tensors` gave, and a saved adapter holds, back in its place.

    Raises:
        UserError: the adapter is of another recipe.
    """
    own = frozen_buffers(model)
    saved = load_peft_weights(str(folder), device="cpu") if own else {}
    for name, tensor in own.items():
        if name not in saved or saved[name].shape != tensor.shape:
            raise UserError(f"{folder}: no fitting {name}: resume with the recipe that wrote it")
        tensor.copy_(saved[name])


def for_training(model: PeftModel) -> PeftModel:
    """With adapters in fp32, activations in their own dtype, and no pass that is not needed."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    _keep_dtype(model)
    fuse(model)
    return model


def _keep_dtype(model: PeftModel) -> None:
    """Adapters in fp32 other than LoRA's may return fp32 for an input in bf16."""

    def as_input(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        like = args[0].dtype if args and isinstance(args[0], Tensor) else None
        is_other = isinstance(output, Tensor) and like is not None and like.is_floating_point
        return output.to(like) if is_other else output

    for module in model.modules():
        if isinstance(module, BaseTunerLayer) and not isinstance(module, LoraLayer):
            assert isinstance(module, nn.Module)
            module.register_forward_hook(as_input)


def require_scale(factor: float) -> None:
    """Raise UserError unless an adapter can be deployed at this scale."""
    if not (math.isfinite(factor) and factor > 0):
        raise UserError(f"--scale {factor:g}: a finite number above 0 is needed (0 is the base)")


@contextlib.contextmanager
def scaled(model: PeftModel, factor: float) -> Iterator[None]:
    """All that the adapters add, times `factor`: 0 is the base, 1 what was trained.

    W + factor * dW interpolates base and adapted weights (WiSE-FT, arXiv 2109.01903).

    Raises:
        UserError: the adapters' effect is not linear in such a factor.
    """
    layers = [m for m in model.modules() if isinstance(m, (LoraLayer, RandLoraLayer))]
    causal_lm: Any = model.get_base_model()
    kinds = (AuxiliaryTrainingWrapper, BaseTunerLayer)
    num = sum(isinstance(m, kinds) for m in model.modules())
    variants = any(isinstance(layer, LoraLayer) and layer.lora_variant for layer in layers)
    head = isinstance(causal_lm.get_output_embeddings(), LoraLayer)
    if num > len(layers) or variants or head or getattr(model, "replaced", ()):
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
    """Copy a saved adapter with its alpha times `factor`; its matrices stay as they are.

    Raises:
        UserError: as `scaled`.
    """
    config = json.loads((adapter / "adapter_config.json").read_text())
    alpha = _ALPHA.get(config.get("peft_type"))
    if alpha is None or any(config.get(k) not in (None, False, "none", [], {}) for k in _FIXED):
        raise UserError(_NO_SCALE)
    config[alpha] *= factor
    if "alpha_pattern" in config:
        pattern = config["alpha_pattern"] or {}
        config["alpha_pattern"] = {k: factor * v for k, v in pattern.items()}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True))
    name = "adapter_model.safetensors"
    shutil.copyfile(adapter / name, folder / name)


_ALPHA = {"LORA": "lora_alpha", "SINELORA": "lora_alpha", "RANDLORA": "randlora_alpha"}
# What an adapter may have that no alpha scales.
_FIXED = ("use_dora", "modules_to_save", "trainable_token_indices", "bias", "layer_replication")
_NO_SCALE = (
    "--scale: LoRA, RandLoRA and SineLoRA alone are linear in a scale of the adapter, this one is "
    "not: leave it out"
)


def _set_parts(model: PeftModel, sharding: Sharding, whole: Mapping[str, Tensor]) -> None:
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


def product_norm(causal_lm: Any) -> torch.Tensor:
    """Squared Frobenius norm of what LoRA adds, sum over layers of ||s B A||^2, differentiable."""
    norms: list[torch.Tensor] = []
    for layer in causal_lm.modules():
        if isinstance(layer, LoraLayer):
            for name in (name for name in layer.active_adapters if name in layer.lora_A):
                norms.append(layer.scaling[name] ** 2 * _layer_squares(layer, name))
    return torch.stack(norms).sum()


def _layer_squares(layer: Any, name: str) -> torch.Tensor:
    if isinstance(layer, lora.ParamWrapper) and layer.num_experts > 1:
        pairs = zip(*ExpertLora.factors(layer, name), strict=True)  # pyright: ignore
        return torch.stack([product_squares(a, b) for a, b in pairs]).sum()
    a: Any = layer.lora_A[name].weight  # [r, D_in]
    b: Any = layer.lora_B[name].weight  # [D_out, r]
    return product_squares(a, b)


def product_squares(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """||B A||_F^2 of a [r, in] and b [out, r].

    tr((B^T B) (A A^T)), of r x r matrices: the product is never formed.
    """
    return ((b.T @ b) * (a @ a.T)).sum()
