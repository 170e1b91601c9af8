"""Which base: from a name to files on this machine, its tokenizer, its limits, its precision.

No weights are read here; that is `loading.py`'s.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

from moored.config import ModelConfig
from moored.distributed.mesh import Mesh
from moored.models.hub import ResolvedModel, resolve_model, staged
from moored.utils.errors import UserError

log = logging.getLogger(__name__)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseFiles:
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


def resolve_base(config: ModelConfig, mesh: Mesh) -> BaseFiles:
    """Find (download, convert) the model once, and read its tokenizer; no weights are loaded.

    Raises:
        UserError: it cannot be had, or has no usable tokenizer.
    """
    transformers.utils.logging.disable_progress_bar()
    with mesh.main_first("find, download or convert the model"):
        source = staged(resolve_model(config))
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
    return BaseFiles(
        source=source,
        tokenizer=tokenizer,
        vocab_size=hf_config.vocab_size,
        max_positions=positions if isinstance(positions, int) and positions > 0 else None,
        rotary=bool(rotary),
    )


def require_positions(located: BaseFiles, lengths: Mapping[str, int]) -> None:
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
