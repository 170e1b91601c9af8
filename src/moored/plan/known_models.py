"""Sizes of well-known models by name, so that a plan needs neither a download nor a network.

A row is what config.json of the repository at its right says; `tests/unit/plan` holds the totals
of parameters. Fine-tuned and renamed models of the same sizes are found by their own config.json.
"""

from __future__ import annotations

import re
from typing import Any

_FIELDS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "vocab_size", "tie_word_embeddings"),
)
# model_type; D, I, L, heads, key/value heads, features of a head, V, tied; the repository; names
# that share its sizes, and what else its config.json has that counts.
_ROWS: tuple[tuple[str, tuple[int, ...], str, tuple[str, ...], dict[str, Any]], ...] = (
    ("llama", (2048, 8192, 16, 32, 8, 64, 128256, 1), "meta-llama/Llama-3.2-1B", (), {}),
    ("llama", (3072, 8192, 28, 24, 8, 128, 128256, 1), "meta-llama/Llama-3.2-3B", (), {}),
    ("llama", (4096, 14336, 32, 32, 8, 128, 128256, 0), "meta-llama/Llama-3.1-8B",
     ("Meta-Llama-3-8B", "Meta-Llama-3.1-8B"), {}),
    ("llama", (8192, 28672, 80, 64, 8, 128, 128256, 0), "meta-llama/Llama-3.1-70B",
     ("Llama-3.3-70B", "Meta-Llama-3-70B", "Meta-Llama-3.1-70B"), {}),
    ("llama", (16384, 53248, 126, 128, 8, 128, 128256, 0), "meta-llama/Llama-3.1-405B",
     ("Meta-Llama-3.1-405B",), {}),
    ("llama", (576, 1536, 30, 9, 3, 64, 49152, 1), "HuggingFaceTB/SmolLM2-135M", (), {}),
    ("llama", (960, 2560, 32, 15, 5, 64, 49152, 1), "HuggingFaceTB/SmolLM2-360M", (), {}),
    ("llama", (2048, 8192, 24, 32, 32, 64, 49152, 1), "HuggingFaceTB/SmolLM2-1.7B", (), {}),
    ("qwen2", (896, 4864, 24, 14, 2, 64, 151936, 1), "Qwen/Qwen2.5-0.5B", (), {}),
    ("qwen2", (1536, 8960, 28, 12, 2, 128, 151936, 1), "Qwen/Qwen2.5-1.5B", (), {}),
    ("qwen2", (2048, 11008, 36, 16, 2, 128, 151936, 1), "Qwen/Qwen2.5-3B", (), {}),
    ("qwen2", (3584, 18944, 28, 28, 4, 128, 152064, 0), "Qwen/Qwen2.5-7B", (), {}),
    ("qwen2", (5120, 13824, 48, 40, 8, 128, 152064, 0), "Qwen/Qwen2.5-14B", (), {}),
    ("qwen2", (5120, 27648, 64, 40, 8, 128, 152064, 0), "Qwen/Qwen2.5-32B", (), {}),
    ("qwen2", (8192, 29568, 80, 64, 8, 128, 152064, 0), "Qwen/Qwen2.5-72B", (), {}),
    ("qwen3", (1024, 3072, 28, 16, 8, 128, 151936, 1), "Qwen/Qwen3-0.6B", (), {}),
    ("qwen3", (2048, 6144, 28, 16, 8, 128, 151936, 1), "Qwen/Qwen3-1.7B", (), {}),
    ("qwen3", (2560, 9728, 36, 32, 8, 128, 151936, 1), "Qwen/Qwen3-4B", (), {}),
    ("qwen3", (4096, 12288, 36, 32, 8, 128, 151936, 0), "Qwen/Qwen3-8B", (), {}),
    ("qwen3", (5120, 17408, 40, 40, 8, 128, 151936, 0), "Qwen/Qwen3-14B", (), {}),
    ("qwen3", (5120, 25600, 64, 64, 8, 128, 151936, 0), "Qwen/Qwen3-32B", (), {}),
    ("qwen3_moe", (2048, 6144, 48, 32, 4, 128, 151936, 0), "Qwen/Qwen3-30B-A3B", (),
     {"moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8}),
    ("mistral", (4096, 14336, 32, 32, 8, 128, 32000, 0), "mistralai/Mistral-7B-v0.1",
     ("Mistral-7B-Instruct-v0.1", "Mistral-7B-Instruct-v0.2"), {}),
    ("mistral", (4096, 14336, 32, 32, 8, 128, 32768, 0), "mistralai/Mistral-7B-v0.3",
     ("Mistral-7B-Instruct-v0.3",), {}),
    ("mistral", (5120, 14336, 40, 32, 8, 128, 131072, 0), "mistralai/Mistral-Nemo-Base-2407",
     ("Mistral-Nemo-Instruct-2407",), {}),
    ("mixtral", (4096, 14336, 32, 32, 8, 128, 32000, 0), "mistralai/Mixtral-8x7B-v0.1",
     ("Mixtral-8x7B-Instruct-v0.1",), {"num_local_experts": 8, "num_experts_per_tok": 2}),
    ("gemma2", (2304, 9216, 26, 8, 4, 256, 256000, 1), "google/gemma-2-2b", (), {}),
    ("gemma2", (3584, 14336, 42, 16, 8, 256, 256000, 1), "google/gemma-2-9b", (), {}),
    ("gemma2", (4608, 36864, 46, 32, 16, 128, 256000, 1), "google/gemma-2-27b", (), {}),
    ("gemma3_text", (1152, 6912, 26, 4, 1, 256, 262144, 1), "google/gemma-3-1b-pt", (), {}),
    ("phi3", (3072, 8192, 32, 32, 32, 96, 32064, 0), "microsoft/Phi-3-mini-4k-instruct",
     ("Phi-3-mini-128k-instruct", "Phi-3.5-mini-instruct"), {}),
    ("phi3", (5120, 17920, 40, 40, 10, 128, 100352, 0), "microsoft/phi-4", (), {}),
    ("phi", (2560, 10240, 32, 32, 32, 80, 51200, 0), "microsoft/phi-2", (), {}),
)  # fmt: skip
_SUFFIXES = re.compile(r"-(instruct|chat|base|it|pt)$")


def known_config(name: str) -> tuple[str, dict[str, Any]] | None:
    """The repository that a hub name is known by, and the sizes of its config.json; or None."""
    return _TABLE.get(_plain(name))


def known_names() -> list[str]:
    """The repositories of the table."""
    return [row[2] for row in _ROWS]


def _plain(name: str) -> str:
    return _SUFFIXES.sub("", name.rpartition("/")[2].lower())


def _table() -> dict[str, tuple[str, dict[str, Any]]]:
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for kind, sizes, repository, others, more in _ROWS:
        config = {"model_type": kind, "dtype": "bfloat16", **dict(zip(_FIELDS, sizes, strict=True))}
        config["tie_word_embeddings"] = bool(config["tie_word_embeddings"])
        for name in (repository, *others):
            found[_plain(name)] = (repository, config | more)
    return found


_TABLE = _table()
