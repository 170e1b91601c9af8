"""The plug-in for axolotl's YAML.

plugins: [moored.plugin.Axolotl]
tmkl: {weight: 0.2}
"""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel

from moored.plugin.callback import TMKL
from moored.plugin.plugin_options import Options


class Arguments(BaseModel):
    """What the plug-in reads of the YAML: `tmkl`, the options of `Options` by their names."""

    tmkl: dict[str, Any] = {}


class Axolotl(BasePlugin):
    """Adds the callback to axolotl's trainer, with the options under `tmkl`."""

    def get_input_args(self) -> str:
        """Where axolotl finds the keys that it lets through."""
        return "moored.plugin.axolotl.Arguments"

    def register(self, cfg: dict[str, Any]) -> None:
        """Refuse options out of their range before a model is loaded."""
        Options(**(cfg.get("tmkl") or {}))

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[TMKL]:
        """The callback, of supervised fine-tuning alone."""
        return [TMKL(**dict(cfg.tmkl or {}))]
