"""Moored: QLoRA fine-tuning that does not drift from its base.

The losses are loaded when they are first used; importing this package loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moored.loss.head import linear_tmkl_loss
    from moored.loss.tmkl import TMKLOutput, VocabShard, tmkl_loss

__version__ = "0.1.0"
__all__ = ["TMKLOutput", "VocabShard", "__version__", "linear_tmkl_loss", "tmkl_loss"]

_HOMES = {
    "TMKLOutput": "moored.loss.tmkl",
    "VocabShard": "moored.loss.tmkl",
    "linear_tmkl_loss": "moored.loss.head",
    "tmkl_loss": "moored.loss.tmkl",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
