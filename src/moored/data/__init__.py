"""Data: sources to a resumable stream of global batches, held-out batches, prompts, corpora.

`formats`, `files` and `corpora` read, `records` validates (they and all below without torch),
`chat` masks, `encode` tokenises, `samples` holds, `stream` orders, `prefetch` keeps one step in store,
`heldout` evaluates. What this front door names is imported when it is asked for, so that validation
on a login node loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moored.data.base_samples import BaseIdentity
    from moored.data.corpora import by_domain, resolve_text
    from moored.data.encode import HeldSource
    from moored.data.ends import TurnEnd, turn_ends
    from moored.data.heldout import (
        Prompt,
        eval_batches,
        eval_samples,
        prompts,
        retention_samples,
    )
    from moored.data.prefetch import Prefetcher
    from moored.data.records import check_data
    from moored.data.samples import SampleSet, load_samples, pad_token_id
    from moored.data.stream import TrainStream

_ROOMS = {
    "Prefetcher": "prefetch",
    "BaseIdentity": "base_samples",
    "HeldSource": "encode",
    "TurnEnd": "ends",
    "turn_ends": "ends",
    "by_domain": "corpora",
    "resolve_text": "corpora",
    "Prompt": "heldout",
    "eval_batches": "heldout",
    "eval_samples": "heldout",
    "prompts": "heldout",
    "retention_samples": "heldout",
    "check_data": "records",
    "SampleSet": "samples",
    "load_samples": "samples",
    "pad_token_id": "samples",
    "TrainStream": "stream",
}

__all__ = [
    "BaseIdentity",
    "HeldSource",
    "Prefetcher",
    "Prompt",
    "SampleSet",
    "TrainStream",
    "TurnEnd",
    "by_domain",
    "check_data",
    "eval_batches",
    "eval_samples",
    "load_samples",
    "pad_token_id",
    "prompts",
    "resolve_text",
    "retention_samples",
    "turn_ends",
]


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_ROOMS[name]}"), name)
