"""Retention texts: the documents of a recipe's corpus, from a file, the hub, or by a known name.

How files are decoded is `formats.py`'s matter, how documents become tokens `heldout.py`'s. No torch
here.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from moored.config.inputs import KNOWN_TEXTS, Corpus
from moored.data.files import Row, SourceReader, open_one
from moored.data.nested import missing_problem, text_problem
from moored.utils.errors import UserError, UserErrors

MOST_DOMAINS = 20  # of one corpus: a report must stay one that a person reads


@dataclass(frozen=True, slots=True, kw_only=True)
class CorpusDocument:
    """One text of a corpus, which may be blank, and the domain that it is of."""

    text: str
    domain: str | None = None


def read_corpus(corpus: Corpus, label: str = "retention") -> list[CorpusDocument]:
    """All documents of a retention corpus, in order, whatever their domain.

    Of `base-samples` there are none: they are tokens, and `base_samples.py`'s matter.

    Args:
        corpus: of the recipe.
        label: its place there, for messages.

    Raises:
        UserError: it cannot be found or read.
    """
    if corpus.builtin == "python-reference":
        return _python_reference()
    if corpus.builtin == "base-samples":
        return []
    problems: list[str] = []
    reader = _reader(corpus, label, problems)
    try:
        documents = _documents(corpus, label, reader, problems)
    except UserError as error:
        if corpus.builtin is None:
            raise
        why = str(error).removeprefix(f"{label}.hub=").partition(": load it once")[0]
        raise UserError(
            f"{label}.builtin={corpus.builtin}: {why}: run `moored prepare` with this recipe where "
            "the hub can be reached, or give a local copy as path instead of builtin"
        ) from error
    if problems:
        raise UserErrors(problems)
    return documents


CorpusReader = Callable[[Corpus, str], list[CorpusDocument]]  # `read_corpus`, or who reads it once


def resolve_text(
    corpus: Corpus, label: str = "retention", read: CorpusReader = read_corpus
) -> list[str]:
    """The texts of a retention corpus, in order; blank ones are left out.

    Args:
        corpus: of the recipe.
        label: its place there, for messages.
        read: reads it.

    Raises:
        UserError: it cannot be found or read, or holds no text.
    """
    texts = [
        document.text
        for document in read(corpus, label)
        if document.text.strip() and corpus.domain in (None, document.domain)
    ]
    if not texts and corpus.builtin != "base-samples":
        of = f" of {corpus.domain_field}={corpus.domain}" if corpus.domain is not None else ""
        raise UserError(f"{label}: holds no text{of}: give another path, hub or split")
    return texts


def by_domain(name: str, corpus: Corpus, read: CorpusReader = read_corpus) -> dict[str, Corpus]:
    """The corpora that one of a recipe stands for, by name: itself, or one for each domain.

    Args:
        name: of the corpus.
        corpus: of the recipe.
        read: reads it.

    Raises:
        UserError: it cannot be read, or its column has too many values.
    """
    field = corpus.domain_field
    if field is None or corpus.domain is not None or corpus.builtin is not None:
        return {name: corpus}
    label = f"retention.{name}"
    domains = dict.fromkeys(document.domain for document in read(corpus, label))
    values = [domain for domain in domains if domain is not None]
    if len(values) > MOST_DOMAINS:
        raise UserError(
            f"{label}.domain_field={field}: {len(values)} different values, where 1 to "
            f"{MOST_DOMAINS} make domains: name another column, or one value as domain"
        )
    named = {f"{name}/{re.sub(r'[^A-Za-z0-9_.-]+', '-', value)[:40]}": value for value in values}
    if len(named) < len(values):
        raise UserError(
            f"{label}.domain_field={field}: values that differ only in signs other than letters "
            "and digits: rename them"
        )
    return {key: corpus.model_copy(update={"domain": value}) for key, value in named.items()}


def _domain(row: Row, field: str | None) -> str | None:
    value = row.value.get(field or "")
    return str(value).strip() or None if isinstance(value, (str, int)) else None


def _reader(corpus: Corpus, label: str, problems: list[str]) -> SourceReader | None:
    known = KNOWN_TEXTS.get(corpus.builtin or "")
    hub, subset, split = (known or corpus).hub, (known or corpus).subset, (known or corpus).split
    columns = tuple(filter(None, (corpus.text_field, corpus.domain_field)))
    return open_one(
        label, corpus.path, hub, subset, split, corpus.revision, columns, set(), problems
    )


def _documents(
    corpus: Corpus, label: str, reader: SourceReader | None, problems: list[str]
) -> list[CorpusDocument]:
    documents: list[CorpusDocument] = []
    for row in reader.rows() if reader else ():
        text = row.value.get("text" if row.plain else corpus.text_field)
        if row.problem is None and not row.plain and corpus.text_field not in row.value:
            problem = missing_problem(corpus.text_field, row.value, f"{label}.text_field={{}}")
        else:
            problem = row.problem or text_problem(text, corpus.text_field, blank_is_fine=True)
        domain = _domain(row, corpus.domain_field)
        if problem is None and corpus.domain_field is not None and domain is None:
            problem = f"no domain in {corpus.domain_field}: give one, or leave domain_field out"
        if problem:
            problems.append(f"{row.where}: {problem}")
        else:
            assert isinstance(text, str)
            documents.append(CorpusDocument(text=text, domain=domain))
    return documents


def _python_reference() -> list[CorpusDocument]:
    from pydoc_data.topics import topics

    return [CorpusDocument(text=topics[topic]) for topic in sorted(topics)]
