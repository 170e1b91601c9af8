"""Adapters that other trainers wrote: which can be measured, exported and merged, and which not.

Nothing is loaded here; what they carry beside LoRA is put in its place by `saved.py`.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

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
