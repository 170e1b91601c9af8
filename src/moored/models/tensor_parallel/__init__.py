"""One model spread over the ranks of a tensor-parallel group.

`layout.py` says who holds what, `regions.py` moves activations, `sharding.py` puts both to work
on a model and on what PEFT adds to it.
"""

from moored.models.tensor_parallel.layout import (
    NF4_BLOCK,
    Sharded,
    ShardLayout,
    Split,
    layout_of,
    why_not_by_tokens,
)
from moored.models.tensor_parallel.sharding import Sharding, whole_adapters

__all__ = [
    "NF4_BLOCK",
    "ShardLayout",
    "Sharded",
    "Sharding",
    "Split",
    "layout_of",
    "whole_adapters",
    "why_not_by_tokens",
]
