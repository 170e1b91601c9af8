"""Retention texts: the documents of a recipe's corpus, from a file, the hub, or by a known name.

How files are decoded is `formats.py`'s matter, how documents become tokens `heldout.py`'s. No torch
here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moored.config.inputs import KNOWN_TEXTS
from moored.data.files import Reader, missing_problem, open_one, text_problem
from moored.errors import UserError, UserErrors

if TYPE_CHECKING:
    from moored.config import Corpus


def resolve_text(corpus: Corpus, label: str = "retention") -> list[str]:
    """The documents of a retention corpus, in order; blank ones are left out.

    Of `base-samples` there are none: they are tokens, and `drawn.py`'s matter.

    Raises:
        UserError: it cannot be found or read, or holds no text.
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
    if not documents:
        raise UserError(f"{label}: holds no text: give another path, hub or split")
    return documents


def _reader(corpus: Corpus, label: str, problems: list[str]) -> Reader | None:
    known = KNOWN_TEXTS.get(corpus.builtin or "")
    hub, subset, split = (known or corpus).hub, (known or corpus).subset, (known or corpus).split
    columns = (corpus.text_field,)
    return open_one(
        label, corpus.path, hub, subset, split, corpus.revision, columns, set(), problems
    )


def _documents(corpus: Corpus, label: str, reader: Reader | None, problems: list[str]) -> list[str]:
    documents: list[str] = []
    for row in reader.rows() if reader else ():
        text = row.value.get("text" if row.plain else corpus.text_field)
        if row.problem is None and not row.plain and corpus.text_field not in row.value:
            problem = missing_problem(corpus.text_field, row.value, f"{label}.text_field={{}}")
        else:
            problem = row.problem or text_problem(text, corpus.text_field, blank_is_fine=True)
        if problem:
            problems.append(f"{row.where}: {problem}")
        elif isinstance(text, str) and text.strip():
            documents.append(text)
    return documents


def _python_reference() -> list[str]:
    from pydoc_data.topics import topics

    return [topics[topic] for topic in sorted(topics)]
