"""The card as a page, the README of a model on the Hugging Face hub, and its files in a folder.

What the page says is in `templates/card.md.j2`. Names come from recipes and files of others: none
may end a cell, a line or the front matter, or become a link, HTML, a picture or a formula. So
whatever the template has between braces is escaped, unless a filter from here made it harmless.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import re
import urllib.parse
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jinja2
import yaml

from moored.evaluation.report import rise_pct, words
from moored.export.card.facts import Card, End
from moored.utils import atomic_dir
from moored.utils.atomic_dir import write_json

MARK = "<!-- forgetting card, written by moored export -->"
JSON_NAME = "forgetting-card.json"
README = "README.md"
CARD_NAME = "forgetting-card.md"  # where the README is its author's
FRONT_MATTER = re.compile(r"\A\s*---\r?\n(.*?)\r?\n---\r?(?:\n|\Z)", re.S)
_PEFT_ADDS = ("### Framework versions", "- PEFT ")
_SPECIAL = re.compile(r"([\\`*_\[\]<>|~&#$!{}@])")
_PLAIN = re.compile(r"[A-Za-z0-9_./ +=,:@#()-]+")
_PLAIN_TOKEN = re.compile(r"[\w<>|/\[\]:.-]{1,40}")


# ---------------------------------------------------------------- what is harmless


class Md(str):
    """Markdown that is finished: it is not escaped again."""


def text(value: object, limit: int = 120) -> Md:
    """A name or sentence as prose, whatever characters it holds; 0: however long."""
    return value if isinstance(value, Md) else _escaped(words.clean(str(value), limit))


def _escaped(shown: str) -> Md:
    escaped = _SPECIAL.sub(r"\\\1", shown)
    return Md(escaped.replace("://", r"\://").replace("www.", r"www\."))


def code(value: object, limit: int = 120) -> Md:
    """A name as code where its characters allow that, else as prose."""
    shown = words.clean(str(value), limit)
    is_plain = _PLAIN.fullmatch(shown) and shown.strip() == shown
    return Md(f"`{shown}`") if is_plain else text(value, limit)


def commands(sentence: str) -> Md:
    """A sentence with commands in it; what stands between backticks is code."""
    parts = words.clean(sentence).split("`")
    return Md("".join(code(p, 0) if i % 2 else _escaped(p) for i, p in enumerate(parts)))


def codes(names: Iterable[str], limit: int = 120) -> Md:
    """Names as code, with commas."""
    return Md(", ".join(code(name, limit) for name in names))


def tokens(ends: Iterable[End]) -> Md:
    """Tokens as they are; `code` would write the bars of many otherwise, for tables."""
    names = (end.token for end in ends)
    return Md(", ".join(f"`{n}`" if _PLAIN_TOKEN.fullmatch(n) else code(n) for n in names))


def one_line(wrapped: str) -> Md:
    """A paragraph whose source has several lines."""
    return Md(re.sub(r"[ \n]+", " ", wrapped).strip(" "))


def commas(lines: str) -> Md:
    """The lines that are not empty, with commas."""
    return Md(", ".join(line for line in lines.split("\n") if line))


def figure(show: Callable[[Any], str]) -> Callable[..., Md]:
    """A filter that shows a figure, or says that there is none."""
    return lambda value, none="not measured": Md(none if value is None else show(value))


def _size(norm: float) -> str:
    return f"{norm:.3g}" if math.isfinite(norm) else words.ppl(norm)


def _share(part: float) -> str:
    return f"{100 * part:.3g}\u00a0%" if math.isfinite(part) else words.ppl(part)


# ---------------------------------------------------------------- the page


def page(card: Card) -> str:
    """The page, front matter and all."""
    body = _template().render(card=card, mark=Md(MARK), json_name=Md(JSON_NAME))
    body = re.sub(r"\n{3,}", "\n\n", body).strip()
    return f"{front_matter(card)}\n{body}\n"


class _Environment(jinja2.Environment):
    concat = staticmethod(lambda parts: Md("".join(parts)))  # what a macro made is finished


@functools.cache
def _template() -> jinja2.Template:
    environment = _Environment(
        loader=jinja2.PackageLoader("moored.export.card"),
        finalize=lambda value: text(value, 0),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for show in (words.ppl, words.percent, words.nats, words.fraction, words.count, words.duration):
        environment.filters[show.__name__] = figure(show)
    environment.filters |= {"size": figure(_size), "share": figure(_share), "as": format}
    for make in (text, code, codes, commands, tokens, one_line, commas, words.kind_name):
        environment.filters[make.__name__] = make
    environment.filters["url"] = lambda name: Md(urllib.parse.quote(name))
    environment.globals["rise_pct"] = rise_pct
    return environment.get_template("card.md.j2")


def front_matter(card: Card) -> str:
    """The YAML by which the hub files a model, between its dashes."""
    is_adapter, hub = card.kind == "adapter", card.base.hub
    relation = "adapter" if is_adapter else "finetune"
    method = card.adapter.method
    tags = ["moored", method] + (["lora"] if method == "dora" else [])
    tags += [f"base_model:{relation}:{hub}"] if hub else []
    sources = (*card.data.sources, *card.data.replayed) if card.data else ()
    values: dict[str, Any] = {
        "base_model": hub,
        "base_model_relation": relation if hub else None,
        "datasets": list(dict.fromkeys(source.hub for source in sources if source.hub)),
        "library_name": "peft" if is_adapter else "transformers",
        "license": card.base.license,
        "pipeline_tag": "text-generation",
        "tags": sorted(words.clean(tag) for tag in tags),
    }
    values = {key: value for key, value in values.items() if value}
    # One line per value: a line that is nothing but dashes would end the front matter.
    return f"---\n{yaml.safe_dump(values, width=10**6, allow_unicode=True)}---\n"


# ---------------------------------------------------------------- its files


def write(card: Card, folder: Path, readme: Path | None = None) -> None:
    """Write the card as JSON and as a page.

    Args:
        card: what to write.
        folder: an existing one, without a README.
        readme: somebody's own, which stays the README; the page then stands beside it.
    """
    write_json(folder / JSON_NAME, card.to_json())
    if readme is not None:
        (folder / README).write_bytes(readme.read_bytes())
    name = README if readme is None else CARD_NAME
    (folder / name).write_text(page(card), encoding="utf-8")


def readme_of(adapter: Path) -> Path | None:
    """The README that somebody wrote for an adapter; None where there is none.

    PEFT's template with nothing filled in, and a card of ours that nobody changed, are none.

    Args:
        adapter: its folder.
    """
    readme = adapter / README
    with contextlib.suppress(OSError, UnicodeDecodeError):
        content = readme.read_text(encoding="utf-8")
        if not content.strip() or _is_template(content):
            return None
        if MARK in content and not (adapter / CARD_NAME).exists() and _is_as_exported(readme):
            return None
    return readme if readme.is_file() else None


def _is_template(content: str) -> bool:
    """Whether every line is one that PEFT writes for an author to fill in."""
    from huggingface_hub import ModelCard, ModelCardData

    lines = FRONT_MATTER.sub("", content, count=1).splitlines()
    template = set(ModelCard.from_template(ModelCardData()).text.splitlines())
    return all(line in template or line.startswith(_PEFT_ADDS) for line in lines)


def _is_as_exported(readme: Path) -> bool:
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        facts = json.loads((readme.parent / "export.json").read_text(encoding="utf-8"))
        return facts["files"][README]["sha256"] == atomic_dir.sha256(readme)
    return False
