"""Data: sources to a resumable stream of global batches, held-out batches, prompts, corpora.

From files to batches: `formats` and `files` read, `records` validates, `reading` does
so once for all who ask, `chat` masks, `samples` tokenises and holds, `stream` orders, `batch`
collates, `heldout` evaluates. What this front door names is imported when it is asked for, so that
validation on a login node loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moored.data.base_samples import BaseIdentity
    from moored.data.heldout import (
        Prompt,
        eval_batches,
        eval_samples,
        prompts,
        retention_samples,
    )
    from moored.data.reading import DataReader, by_domain, check_data, resolve_text, what_is_checked
    from moored.data.samples import SampleSet, load_samples, pad_token_id
    from moored.data.stop_tokens import TurnEnd, turn_ends
    from moored.data.stream import Prefetcher, TrainStream
    from moored.data.token_arrays import HeldSource

_FILE_OF = {
    "BaseIdentity": "base_samples",
    "by_domain": "reading",
    "resolve_text": "reading",
    "Prompt": "heldout",
    "eval_batches": "heldout",
    "eval_samples": "heldout",
    "prompts": "heldout",
    "retention_samples": "heldout",
    "DataReader": "reading",
    "check_data": "reading",
    "what_is_checked": "reading",
    "SampleSet": "samples",
    "load_samples": "samples",
    "pad_token_id": "samples",
    "Prefetcher": "stream",
    "TrainStream": "stream",
    "HeldSource": "token_arrays",
    "TurnEnd": "stop_tokens",
    "turn_ends": "stop_tokens",
}

__all__ = [
    "BaseIdentity",
    "DataReader",
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
    "what_is_checked",
]


def __getattr__(name: str) -> Any:
    if name not in _FILE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_FILE_OF[name]}"), name)
