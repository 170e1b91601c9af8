"""Target-masked KL in the trainer that you have: three lines, and nothing of its own is replaced.

    from moored.plugin import TMKL
    trainer.add_callback(TMKL(weight=0.2))
    trainer.train()

`attach` is the same for a loop of your own. Importing this package loads torch at most; the model's
libraries are loaded when there is a model.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moored.plugin.attached import Attached, attach, detach
    from moored.plugin.axolotl import Axolotl
    from moored.plugin.callback import TMKL
    from moored.plugin.plugin_options import Options

__all__ = ["TMKL", "Attached", "Axolotl", "Options", "attach", "detach"]

_HOMES = {
    "Attached": "attached",
    "Axolotl": "axolotl",
    "Options": "plugin_options",
    "TMKL": "callback",
    "attach": "attached",
    "detach": "attached",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
