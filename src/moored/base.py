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
    quantization = None
    if config.quantization == "nf4":
        quantization = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=config.double_quantization,
            bnb_4bit_compute_dtype=dtype,
        )
    try:
        causal_lm = transformers.AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            quantization_config=quantization,
            attn_implementation=None if config.attention == "auto" else config.attention,
            trust_remote_code=config.trust_remote_code,
            device_map={"": device},
        )
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise UserError(
            f"model.name_or_path={config.name_or_path}: cannot be loaded as a causal language "
            f"model: {str(error).splitlines()[0]}"
        ) from error
    except SafetensorError as error:
        raise UserError(
            f"model.name_or_path={config.name_or_path}: its weights are broken ({error}): copy or "
            "download the model again"
        ) from error
    causal_lm.requires_grad_(False)
    causal_lm.config.use_cache = False
    make_zero_safe(causal_lm)
    _install_head(causal_lm, device)
    return causal_lm


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
    with torch.no_grad(), dropout_off(causal_lm):
        full = causal_lm(
            input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False
        ).logits[0, batch.target_index]
        hidden = final_hidden(causal_lm, batch)
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
