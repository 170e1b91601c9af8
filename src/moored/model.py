"""The policy: the frozen base with its adapters, and one forward for backbone and head.

Nothing here knows ZeRO, optimizers or files of a run.
"""

from __future__ import annotations

import difflib
import inspect
import logging
from collections.abc import Mapping
from dataclasses import dataclass
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
from safetensors import SafetensorError
from torch import nn

from moored.base import resolve_dtype
from moored.batch import Batch
from moored.config import AdapterConfig, Config
from moored.errors import UserError
from moored.forward import final_hidden, probe_batch
from moored.head import Head, attach_gradient
from moored.loading import load_base
from moored.mesh import Mesh
from moored.reference import adapters_off, dropout_off, require_identity
from moored.tensor_parallel import Sharding, whole_adapters

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class LossArguments:
    """What turns hidden states into the loss of one micro-batch.

    Attributes:
        ce_scale: factor of the summed cross-entropy, 1 / (targets of the global batch).
        kl_scale: factor of the summed KL, weight / (KL positions of the global batch).
        direction: `forward`, `reverse` or `jsd`.
        mask_target: whether the target is removed from both distributions (TMKL).
        temperature: divides the logits of the KL.
    """

    ce_scale: float
    kl_scale: float = 0.0
    direction: str = "forward"
    mask_target: bool = True
    temperature: float = 1.0


class PolicyModel(nn.Module):
    """Backbone and head in one module, so that one forward gathers both under ZeRO-3.

    Attributes:
        causal_lm: the PEFT model around the Hugging Face causal language model.
        compute_dtype: the dtype of the base's activations; adapters are kept in fp32.
        sharding: how the model is spread over ranks; None on one.
    """

    def __init__(
        self, causal_lm: PeftModel, compute_dtype: torch.dtype, sharding: Sharding | None = None
    ):
        super().__init__()
        self.causal_lm = causal_lm
        self.compute_dtype = compute_dtype
        self.sharding = sharding

    @property
    def head(self) -> Head:
        """The module in lm_head's place."""
        base: Any = self.causal_lm.get_base_model()
        head = base.get_output_embeddings()
        assert isinstance(head, Head)
        return head

    def forward(
        self,
        batch: Batch,
        *,
        reference_hidden: torch.Tensor | None = None,
        loss: LossArguments | None = None,
        drift: bool = False,
        generate: dict[str, Any] | None = None,
    ) -> Any:
        """Run the backbone, and what follows it.

        All uses pass through here because ZeRO-3 hangs its bookkeeping on the module's call.

        Args:
            batch: B x L tokens with N targets.
            reference_hidden: the base's final hidden states at the targets, [N, D].
            loss: if given, compute the loss.
            drift: if true, compare policy and reference instead.
            generate: if given, arguments of Hugging Face's `generate`; `batch` is ignored.

        Returns:
            By default the final hidden states at the targets, [N, D]; with `loss` the pair
            (loss, LossSums); with `drift` a DriftSums; with `generate` token ids.
        """
        with torch.autocast(
            self.head.weight.device.type,
            dtype=torch.bfloat16,
            enabled=self.compute_dtype == torch.bfloat16,
            cache_enabled=False,
        ):
            if generate is not None:
                return self.causal_lm.generate(**generate)
            hidden = final_hidden(self.causal_lm.get_base_model(), batch)
        if drift:
            assert reference_hidden is not None
            return self.head(hidden, reference_hidden, batch.targets, drift=True)
        if loss is None:
            return hidden
        grad_hidden, sums = self.head(
            hidden,
            reference_hidden,
            batch.targets,
            kl_mask=batch.kl_mask,
            ce_scale=loss.ce_scale,
            kl_scale=loss.kl_scale,
            direction=loss.direction,
            mask_target=loss.mask_target,
            temperature=loss.temperature,
        )
        return attach_gradient(hidden, grad_hidden, sums), sums

    def trainable(self) -> dict[str, nn.Parameter]:
        """The adapter's parameters by name, in the model's order."""
        return {n: p for n, p in self.named_parameters() if p.requires_grad}


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


def load_policy(path: Path, config: Config, mesh: Mesh, adapter: Path | None = None) -> PolicyModel:
    """Base, head and adapters, with the reference proved to be the base.

    Args:
        path: a local folder with the model.
        config: the recipe.
        mesh: the processes; the model is spread over its tensor-parallel axis. Collective.
        adapter: a PEFT folder whose adapter is loaded; None makes a fresh one by the recipe.

    Raises:
        UserError: see `load_base`, `add_adapters`; the adapters change the base; packing would
            let samples see each other.
    """
    causal_lm, sharding = load_base(path, config.model, mesh, config.parallel)
    dtype = resolve_dtype(config.model, mesh.device)
    vocab_size = causal_lm.config.get_text_config().vocab_size  # pyright: ignore
    batch = probe_batch(vocab_size, mesh.device)
    pristine = _pristine_hidden(causal_lm, batch, dtype)
    if config.data.packing:
        _require_isolation(causal_lm, batch, pristine, dtype, vocab_size)
    if adapter is None:
        label = f"{config.adapter.method} with init {config.adapter.init}"
        model = add_adapters(causal_lm, config.adapter, config.train.seed, sharding)
    else:
        label = str(adapter)
        model = open_adapter(causal_lm, adapter, sharding)
        made_for = model.peft_config["default"].base_model_name_or_path
        if made_for and made_for != config.model.name_or_path:
            log.warning(
                "%s was trained on %s, but is measured on %s",
                adapter,
                made_for,
                config.model.name_or_path,
            )
    policy = PolicyModel(model, dtype, sharding)
    policy.train()
    with adapters_off(policy):
        off = policy(batch)
    require_identity(pristine, off, adapter=label, where="before training")
    if adapter is None and not config.adapter.use_dora:
        with torch.no_grad(), dropout_off(policy):
            _require_neutral(policy(batch), off, label)
    _set_checkpointing(policy.causal_lm, config.train.gradient_checkpointing)
    return policy


def _require_neutral(on: torch.Tensor, off: torch.Tensor, adapter: str) -> None:
    if not torch.equal(on, off):
        raise UserError(
            f"adapter {adapter}: a fresh adapter already changes the model's output (by "
            f"{(on.double() - off.double()).abs().max().item():.3g}), so training would not "
            "start at the base: use adapter.init: default"
        )


def _pristine_hidden(causal_lm: nn.Module, batch: Batch, dtype: torch.dtype) -> torch.Tensor:
    on_bf16 = torch.autocast(
        batch.input_ids.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16
    )
    with torch.no_grad(), dropout_off(causal_lm), on_bf16:
        return final_hidden(causal_lm, batch)


def _require_isolation(
    causal_lm: Any, batch: Batch, pristine: torch.Tensor, dtype: torch.dtype, vocab_size: int
) -> None:
    """Change the first packed sample; the second one's hidden states must not move."""
    ids = batch.input_ids.clone()
    ids[:, :8] = (ids[:, :8] + 1) % vocab_size
    fields = {name: getattr(batch, name) for name in Batch.__slots__}
    moved = _pristine_hidden(causal_lm, Batch(**{**fields, "input_ids": ids}), dtype)
    first, second = (moved - pristine).float().abs().amax(dim=1).split(4)
    if second.max() > 1e-3 * pristine.float().abs().max() or not first.max() > 0:
        raise UserError(
            f"data.packing: {type(causal_lm).__name__} lets packed samples see each other "
            f"(attention {causal_lm.config._attn_implementation}): set data.packing: false"
        )


def _set_checkpointing(model: PeftModel, kind: str) -> None:
    if kind == "none":
        return
    causal_lm: Any = model.get_base_model()
    if "gradient_checkpointing_kwargs" not in inspect.signature(
        causal_lm.gradient_checkpointing_enable
    ).parameters or not getattr(causal_lm, "supports_gradient_checkpointing", False):
        raise UserError(
            f"train.gradient_checkpointing: {type(causal_lm).__name__} does not support it: "
            "set it to none"
        )
    reentrant = kind == "reentrant"
    causal_lm.gradient_checkpointing_enable(
        gradient_checkpointing_kwargs={"use_reentrant": reentrant}
    )
    if reentrant:
        # A reentrant segment has a backward only if its input requires grad.
        causal_lm.enable_input_require_grads()
