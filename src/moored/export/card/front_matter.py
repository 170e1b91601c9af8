"""The front matter of a card's page: the YAML by which the Hugging Face hub files a model.

What the page says is in `markdown.py`.
"""

from __future__ import annotations

from typing import Any

import yaml

from moored.evaluation.report.words import clean
from moored.export.card.facts import Card


def front_matter(card: Card) -> str:
    """The YAML that the hub reads, between its dashes."""
    is_adapter, hub = card.kind == "adapter", card.base.hub
    relation = "adapter" if is_adapter else "finetune"
    method = card.adapter.method
    tags = ["moored", method] + (["lora"] if method == "dora" else [])
    tags += [f"base_model:{relation}:{hub}"] if hub else []
    values: dict[str, Any] = {
        "base_model": hub,
        "base_model_relation": relation if hub else None,
        "datasets": _datasets(card),
        "library_name": "peft" if is_adapter else "transformers",
        "license": card.base.license,
        "pipeline_tag": "text-generation",
        "tags": sorted(clean(tag) for tag in tags),
    }
    values = {key: value for key, value in values.items() if value}
    # One line per value: a line that is nothing but dashes would end the front matter.
    return f"---\n{yaml.safe_dump(values, width=10**6, allow_unicode=True)}---\n"


def _datasets(card: Card) -> list[str]:
    """On the hub, each once: what was trained on, and what was replayed."""
    sources = (*card.data.sources, *card.data.replayed) if card.data else ()
    return list(dict.fromkeys(source.hub for source in sources if source.hub))
