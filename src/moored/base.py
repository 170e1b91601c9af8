"""The frozen base: from a name to a loaded model, quantised, with our head in lm_head's place.

Adapters and training are not known here.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from safetensors import SafetensorError
from torch import nn

from moored.batch import Batch
from moored.config import ModelConfig
from moored.errors import UserError
from moored.head import Head
from moored.linear4bit import make_zero_safe
from moored.mesh import Mesh
from moored.reference import dropout_off
from moored.sources import ResolvedModel, resolve_model

log = logging.getLogger(__name__)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True, kw_only=True)
class Located:
    """A model's files on this machine, and what the data needs of them.

    Attributes:
        source: the local folder, its revision and where it came from.
        tokenizer: the model's.
        vocab_size: rows of its embedding; token ids lie below it.
        max_positions: the longest row it was made for, in tokens; None where none is stated.
        rotary: positions are rotations, of which there is no end, not rows of a table.
    """

    source: ResolvedModel
    tokenizer: transformers.PreTrainedTokenizerBase
    vocab_size: int
    max_positions: int | None = None
    rotary: bool = True


def locate(config: ModelConfig, mesh: Mesh) -> Located:
    """Find (download, convert) the model once, and read its tokenizer; no weights are loaded.

    Raises:
        UserError: it cannot be had, or has no usable tokenizer.
    """
    transformers.utils.logging.disable_progress_bar()
    with mesh.main_first():
        source = resolve_model(config)
    tokenizer = load_tokenizer(source.path, config)
    try:
        hf_config = transformers.AutoConfig.from_pretrained(
            source.path, trust_remote_code=config.trust_remote_code
        ).get_text_config()
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(
            f"model.name_or_path={config.name_or_path}: its config.json cannot be used with "
            f"transformers {transformers.__version__}: {str(error).splitlines()[0]}"
        ) from error
    positions = getattr(hf_config, "max_position_embeddings", None)
    rotary = getattr(hf_config, "rope_parameters", None) or getattr(hf_config, "rope_theta", None)
    return Located(
        source=source,
        tokenizer=tokenizer,
        vocab_size=hf_config.vocab_size,
        max_positions=positions if isinstance(positions, int) and positions > 0 else None,
        rotary=bool(rotary),
    )


def require_positions(located: Located, lengths: Mapping[str, int]) -> None:
    """Refuse rows that are longer than the model has positions.

    Rotary positions go on past the length that the model was trained with, if badly: a warning.

    Args:
        located: the model.
        lengths: the longest row in tokens, by the option of the recipe that allows it.

    Raises:
        UserError: the model has a table of positions, and a row is longer.
    """
    for option, length in lengths.items():
        limit = located.max_positions
        if limit is None or length <= limit:
            continue
        text = f"{option} allows rows of {length} tokens, but the model has {limit} positions"
        if not located.rotary:
            raise UserError(f"{text}: set it to {limit} or less")
        log.warning("%s (max_position_embeddings): longer rows are beyond its training", text)


def resolve_dtype(config: ModelConfig, device: torch.device) -> torch.dtype:
    """`auto` is bf16 on a GPU and fp32 on a CPU, where bf16 products are far slower."""
    if config.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return DTYPES[config.dtype]


def load_tokenizer(path: Path, config: ModelConfig) -> transformers.PreTrainedTokenizerBase:
    """The model's tokenizer from a local folder.

    Raises:
        UserError: the folder has no tokenizer, or one that needs remote code.
    """
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            path, trust_remote_code=config.trust_remote_code
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(
            f"model.name_or_path={config.name_or_path}: no usable tokenizer: "
            f"{str(error).splitlines()[0]}"
        ) from error
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"model.name_or_path={config.name_or_path}: its tokenizer has no end-of-sequence "
            "token, so the model could never learn to stop: set eos_token in tokenizer_config.json"
        )
    return tokenizer


def load_base(path: Path, config: ModelConfig, device: torch.device) -> nn.Module:
    """The frozen base from a local folder, quantised as the recipe says, head in place.

    Raises:
        UserError: the architecture cannot be loaded, or computes its logits in a way that the
            head does not know.
    """
    dtype = resolve_dtype(config, device)
    try:
        hf_config = transformers.AutoConfig.from_pretrained(
            path, trust_remote_code=config.trust_remote_code
        )
        _without_dropout(hf_config)
        load: Any = transformers.AutoModelForCausalLM.from_pretrained  # may return a pair
        causal_lm, loaded = load(
            path,
            config=hf_config,
            dtype=dtype,
            attn_implementation=None if config.attention == "auto" else config.attention,
            trust_remote_code=config.trust_remote_code,
            device_map={"": device},
            output_loading_info=True,
            **_quantization(hf_config, config, dtype),
        )
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise UserError(
            f"model.name_or_path={config.name_or_path}: cannot be loaded as a causal language "
            f"model: {str(error).splitlines()[0]}"
        ) from error
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"model.name_or_path={config.name_or_path}: does not fit into the memory of {device} "
            f"({str(error).splitlines()[0][:160]}): free it, or take nf4 or a smaller model"
        ) from error
    except (SafetensorError, RuntimeError) as error:
        raise UserError(
            f"model.name_or_path={config.name_or_path}: its weights are broken or not those of its "
            f"config.json ({str(error).splitlines()[0]}): copy or download the model again"
        ) from error
    absent = sorted({*loaded["missing_keys"], *(key for key, *_ in loaded["mismatched_keys"])})
    if absent:
        raise UserError(
            f"model.name_or_path={config.name_or_path}: {len(absent)} tensors are missing from its "
            f"weights (first: {absent[0]}), and would be random: copy or download the model again"
        )
    causal_lm.requires_grad_(False)
    causal_lm.config.use_cache = False
    num_layers = make_zero_safe(causal_lm, dtype)
    if config.quantization == "nf4":
        _require_quantized(causal_lm, num_layers)
    _install_head(causal_lm, device)
    return causal_lm


def _quantization(hf_config: Any, config: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    """What to tell transformers of it; nothing where the checkpoint is in NF4 already.

    Raises:
        UserError: the checkpoint is quantised otherwise than the recipe says.
    """
    label = f"model.name_or_path={config.name_or_path}"
    own: Any = getattr(hf_config, "quantization_config", None)
    if own is None:
        if config.quantization == "none":
            return {}
        return {
            "quantization_config": transformers.BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=config.double_quantization,
                bnb_4bit_compute_dtype=dtype,
            )
        }
    own = own if isinstance(own, dict) else own.to_dict()
    if not (own.get("load_in_4bit") and own.get("bnb_4bit_quant_type") == "nf4"):
        bits = "8-bit " if own.get("load_in_8bit") else ""
        raise UserError(
            f"{label}: its weights are quantised already ({bits}{own.get('quant_method')}), and "
            "not to NF4: give the unquantised model"
        )
    if config.quantization != "nf4":
        raise UserError(f"{label}: its weights are in NF4 already: set model.quantization to nf4")
    double = bool(own.get("bnb_4bit_use_double_quant"))
    if double != config.double_quantization:
        raise UserError(
            f"{label}: its weights are in NF4 already, {'with' if double else 'without'} double "
            f"quantisation: set model.double_quantization to {str(double).lower()}"
        )
    return {}


def _without_dropout(hf_config: Any) -> None:
    """The base is frozen: its own dropout would only part the policy from the reference."""
    for part in {id(part): part for part in (hf_config, hf_config.get_text_config())}.values():
        for name, value in list(vars(part).items()):
            if ("dropout" in name or "pdrop" in name) and isinstance(value, float):
                setattr(part, name, 0.0)


def _require_quantized(causal_lm: Any, num_layers: int) -> None:
    """A 4-bit base must be one: some architectures have layers that bitsandbytes passes by."""
    name = type(causal_lm).__name__
    if num_layers == 0:
        raise UserError(
            f"{name}: none of its layers can be held in 4 bits: set model.quantization to none"
        )
    vocabulary = [causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings()]
    known = {id(p) for module in vocabulary if module is not None for p in module.parameters()}
    large = {
        key: p.numel() * p.element_size()
        for key, p in causal_lm.named_parameters()
        if p.dim() > 1 and p.is_floating_point() and id(p) not in known
    }
    packed = sum(p.numel() for p in causal_lm.parameters() if p.dtype == torch.uint8)
    if sum(large.values()) > 0.1 * packed:
        log.warning(
            "%s: %.2f GB in %d tensors are not held in 4 bits (first: %s), beside %.2f GB that are",
            name,
            sum(large.values()) / 1e9,
            len(large),
            next(iter(large)),
            packed / 1e9,
        )


def final_hidden(causal_lm: Any, batch: Batch) -> torch.Tensor:
    """The backbone's final hidden states at the batch's targets, [N, D].

    Samples are kept apart by `position_ids` alone, which transformers honours only with
    `attention_mask=None` and `use_cache=False`.
    """
    backbone = getattr(causal_lm, causal_lm.base_model_prefix)
    output = backbone(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        attention_mask=None,
        use_cache=False,
    )
    hidden = output.last_hidden_state
    return hidden.reshape(-1, hidden.shape[-1])[batch.target_index]


def probe_batch(vocab_size: int, device: torch.device) -> Batch:
    """Two packed samples of 8 tokens; every second position has its next token as target."""
    ids = (torch.arange(16) * 7919 + 3) % vocab_size
    index = torch.tensor([0, 2, 4, 6, 8, 10, 12, 14])
    return Batch(
        input_ids=ids[None],
        position_ids=torch.arange(8).repeat(2)[None],
        target_index=index,
        targets=ids[index + 1],
        kl_mask=torch.ones(len(index), dtype=torch.bool),
        sample_ids=("probe-a", "probe-b"),
        num_targets=len(index),
        num_kl=len(index),
        num_tokens=16,
    ).to(device)


def _install_head(causal_lm: Any, device: torch.device) -> None:
    name = type(causal_lm).__name__
    lm_head = causal_lm.get_output_embeddings()
    if not isinstance(lm_head, nn.Linear) or type(lm_head) is not nn.Linear:
        raise UserError(
            f"{name}: its output layer is {type(lm_head).__name__}, not a plain linear lm_head: "
            "use a causal language model with an unquantised lm_head"
        )
    config = causal_lm.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)
    softcap = getattr(config, "final_logit_softcapping", None)
    head = Head(
        cast(nn.Parameter, lm_head.weight), lm_head.bias, logit_scale=scale, logit_softcap=softcap
    )
    batch = probe_batch(lm_head.weight.shape[0], device)
    try:
        with torch.no_grad(), dropout_off(causal_lm):
            full = causal_lm(
                input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False
            ).logits[0, batch.target_index]
            hidden = final_hidden(causal_lm, batch)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, AttributeError, ValueError, IndexError) as error:
        raise UserError(
            f"{name}: a trial forward fails ({str(error).splitlines()[0][:160]}): this "
            "architecture is not supported (or not in 4 bits: try model.quantization none)"
        ) from error
    if not bool(torch.isfinite(hidden).all() and torch.isfinite(full).all()):
        raise UserError(
            f"{name}: its hidden states or logits are not finite: the weights are broken, or "
            f"overflow in {full.dtype}: download the model again, or set model.dtype to float32"
        )
    ours = head(hidden).float() * scale
    if softcap is not None:
        ours = softcap * torch.tanh(ours / softcap)
    # The two differ by the rounding of the logits to the model's dtype alone.
    bound = 4 * torch.finfo(full.dtype).eps * max(1.0, full.abs().max().item())
    if (ours - full.float()).abs().max().item() > bound:
        raise UserError(
            f"{name}: its forward does more to the logits than a soft cap or a scale, which the "
            "loss would not see: this architecture is not supported"
        )
    causal_lm.set_output_embeddings(head)
