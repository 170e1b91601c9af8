"""The card's two files in an exported folder, and whose README stands there.

What they say is decided beside.
"""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path

from moored.export.card.facts import Card
from moored.export.card.markdown import JSON_NAME, MARK, markdown
from moored.utils import atomic_dir

README = "README.md"
BESIDE = "forgetting-card.md"  # where the README is its author's
_FRONT_MATTER = re.compile(r"\A\s*---\r?\n.*?\r?\n---\r?(?:\n|\Z)", re.S)
_PEFT_ADDS = ("### Framework versions", "- PEFT ")


def readme_of(adapter: Path) -> Path | None:
    """The README that somebody wrote for an adapter; None where there is none.

    PEFT's template with nothing filled in, and a card of ours that nobody changed, are none.

    Args:
        adapter: its folder.
    """
    readme = adapter / README
    if not readme.is_file():
        return None
    with contextlib.suppress(OSError, UnicodeDecodeError):
        content = readme.read_text(encoding="utf-8")
        if not content.strip() or _is_template(content):
            return None
        if MARK in content and not (adapter / BESIDE).exists() and _is_as_exported(readme):
            return None
    return readme


def _is_template(content: str) -> bool:
    """Whether every line is one that PEFT writes for an author to fill in."""
    from huggingface_hub import ModelCard, ModelCardData

    lines = _FRONT_MATTER.sub("", content).splitlines()
    template = set(ModelCard.from_template(ModelCardData()).text.splitlines())
    return all(line in template or line.startswith(_PEFT_ADDS) for line in lines)


def _is_as_exported(readme: Path) -> bool:
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        facts = json.loads((readme.parent / "export.json").read_text(encoding="utf-8"))
        return facts["files"][README]["sha256"] == atomic_dir.sha256(readme)
    return False


def write(card: Card, folder: Path, readme: Path | None = None) -> None:
    """Write the card as JSON and as a page.

    Args:
        card: what to write.
        folder: an existing one, without a README.
        readme: somebody's own, which stays the README; the page then stands beside it.
    """
    data = json.dumps(card.to_json(), indent=1, allow_nan=False)
    (folder / JSON_NAME).write_text(data + "\n", encoding="utf-8")
    if readme is not None:
        (folder / README).write_bytes(readme.read_bytes())
    page = folder / (README if readme is None else BESIDE)
    page.write_text(markdown(card), encoding="utf-8")
