"""What a reader needs to repeat a run, taken from its recipe: label -> text.

Which figures came of it is not known here.
"""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING

from moored.utils.environment import version_of

if TYPE_CHECKING:
    from moored.config import Config

_PACKAGES = ("moored", "torch", "transformers", "peft", "bitsandbytes", "deepspeed")


def settings_of(config: Config) -> dict[str, str]:
    """The recipe in a few lines, and the versions that ran it. No secrets: no URIs, no tags."""
    adapter, optim, train, parallel = config.adapter, config.optim, config.train, config.parallel
    targets = adapter.target_modules
    targets = targets if isinstance(targets, str) else ", ".join(targets)
    batch = (
        f"{train.global_batch_sequences} sequences"
        if train.global_batch_sequences
        else f"{train.global_batch_tokens} tokens"
    )
    rate = f"{optim.learning_rate:g}, {optim.schedule}"
    if optim.warmup_steps:
        rate += f", {optim.warmup_steps} warm-up steps"
    return {
        "recipe": config.name,
        "adapter": f"{adapter.method}, r {adapter.r}, alpha {adapter.alpha:g}, "
        f"dropout {adapter.dropout:g}, {targets}",
        "learning rate": rate,
        "length": f"{train.steps} steps" if train.steps else f"{train.epochs:g} epochs",
        "global batch": batch,
        "longest sample": f"{config.data.max_length} tokens"
        + (", packed" if config.data.packing else ""),
        "parallel": f"ZeRO stage {parallel.zero_stage}, "
        f"tensor parallel degree {parallel.tensor_parallel_degree}",
        "versions": ", ".join(f"{name} {version_of(name)}" for name in _PACKAGES)
        + f", Python {platform.python_version()}",
    }
