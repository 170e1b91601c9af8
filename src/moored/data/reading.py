"""The data of a recipe, read once: each source and each corpus checked, and held for who needs it.

What a row means is `records.py`'s matter. Nothing is tokenised here and no torch is needed, so that
a login node checks a recipe, too.
"""

from __future__ import annotations

import itertools
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2

from moored.config.inputs import KNOWN_TEXTS, Corpus
from moored.data.files import Row, SourceReader, display, open_one, open_sources
from moored.data.layouts import missing_problem, text_problem
from moored.data.records import Digests, Record, Summary, read_records, report_overlap
from moored.data.token_cache import Content, content, kept_summary
from moored.utils.environment import own_rank
from moored.utils.errors import UserError, UserErrors
from moored.utils.progress import Phase

if TYPE_CHECKING:
    from moored.config import Config, Corpus, Source


MOST_DOMAINS = 20  # of one corpus: a report must stay one that a person reads


@dataclass(frozen=True, slots=True, kw_only=True)
class CorpusDocument:
    """One text of a corpus, which may be blank, the domain that it is of, and where it is."""

    text: str
    domain: str | None = None
    where: str = ""  # as messages name it


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
            documents.append(CorpusDocument(text=text, domain=domain, where=row.where))
    return documents


def _python_reference() -> list[CorpusDocument]:
    from pydoc_data.topics import topics

    return [CorpusDocument(text=topics[topic], where=f"topic {topic}") for topic in sorted(topics)]


logger = logging.getLogger(__name__)

_MARKS = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")
HELD_CHARACTERS = 64 * 2**20  # of records, as `repr` has them; each takes about 3 bytes in memory
STREAM_CHECKED = 1000  # rows of a streamed hub dataset that are checked at the start


@dataclass(slots=True)
class CharacterBudget:
    """How many characters of records may still be held, by all sources together."""

    characters: int


class RecordSource:
    """The valid records of a source, read from its files once and held where there is room.

    Args:
        reader: of its rows.
        source: of the recipe.
        budget: shared with other sources.

    Attributes:
        summary: of its records; None as long as nobody has read them to the end.
    """

    def __init__(self, reader: SourceReader, source: Source, budget: CharacterBudget):
        self.reader = reader
        self.source = source
        self.summary: Summary | None = None
        self._budget = budget
        self._held: list[Record] | None = None

    @property
    def name(self) -> str:
        """The prefix of its records' ids."""
        return self.reader.name

    @property
    def label(self) -> str:
        """Its place in the recipe: `data.train.0`."""
        return self.reader.label

    @property
    def content(self) -> Content | None:
        """What its files held when it was read, or before: tokens are kept under it."""
        return self._content[0]

    @cached_property
    def _content(self) -> tuple[Content | None, str]:
        """The same, or why the hub does not give it: who knows does not wait for it again."""
        try:
            return content(self.reader), ""
        except UserError as error:
            return None, str(error)

    def records(self, problems: list[str]) -> Iterator[Record]:
        """The records; of a stream of the hub, the first ones.

        Args:
            problems: what is wrong with the other rows, where they are read, is appended.
        """
        if self._held is not None:
            yield from self._held
            return
        records: Iterable[Record] = read_records(self.reader, self.source, problems)
        if self.reader.hub is not None and self.reader.streaming:
            records = itertools.islice(records, STREAM_CHECKED)
        held: list[Record] | None = None
        summary, room = Summary(), self._budget.characters
        if room and not self.reader.streaming:
            # Asked before a row is read: a file that is changed later has another content.
            held, problem = [], self._content[1]
            if problem:
                problems.append(problem)
                records = ()
        for record in records:
            summary.add(record)
            if held is not None:
                room -= len(repr(record))
                if room > 0:
                    held.append(record)
                else:
                    held = None  # whoever wants them next reads them again
            yield record
        self.summary = summary
        if held is not None:
            self._budget.characters, self._held = room, held

    def check(
        self, problems: list[str], digests: Digests | None = None, *, if_kept: bool = True
    ) -> Summary:
        """Reads all records, and says what they are like.

        Args:
            problems: what is wrong with the other rows is appended.
            digests: takes them in.
            if_kept: also where tokens of the same rows are kept, so that they are known already.
        """
        if not if_kept and (known := kept_summary(self)) is not None:
            self.summary, kept = known
            if digests is not None:
                digests.wholes, digests.prompts = kept.wholes, kept.prompts
            return self.summary
        with Phase(f"checking {self.name}", self.reader.count, "rows") as phase:
            records = phase.over(self.records(problems))
            for _ in records if digests is None else digests.over(records):
                pass
        assert self.summary is not None, "all of them were read"
        return self.summary


class DataReader:
    """Reads what a recipe names: each source and each corpus once, whoever asks for it first.

    Args:
        hold: keep what was read in memory, for whoever asks for it next. Of sources no more than
            HELD_CHARACTERS; what is beyond is read again.
    """

    def __init__(self, *, hold: bool = True):
        self._hold = hold
        self._budget = CharacterBudget(HELD_CHARACTERS if hold else 0)
        self._sources: dict[str, list[RecordSource]] = {}
        self._corpora: dict[str, list[CorpusDocument]] = {}

    def sources(
        self, sources: Sequence[Source], section: str, problems: list[str]
    ) -> list[RecordSource]:
        """The sources of a section of the recipe.

        Args:
            sources: of the recipe.
            section: their place in it, for messages: `data.train`.
            problems: what cannot be found is appended.
        """
        # What is replayed may be what is learned. What is held out has its own rules for splits.
        kind = "held out" if section == "data.eval" else "learned"
        key = json.dumps([kind, *(source.model_dump_json() for source in sources)])
        if key in self._sources:
            return self._sources[key]
        count = len(problems)
        opened = [
            RecordSource(reader, sources[int(reader.label.rsplit(".", 1)[1])], self._budget)
            for reader in open_sources(sources, section, problems)
        ]
        if len(problems) == count:
            self._sources[key] = opened
        return opened

    def corpus(self, corpus: Corpus, place: str) -> list[CorpusDocument]:
        """The documents of a retention corpus, as `corpora.read_corpus` gives them."""
        key = corpus.model_dump_json(exclude={"max_tokens", "window_tokens", "target", "domain"})
        documents = self._corpora.get(key)
        if documents is None:
            documents = read_corpus(corpus, place)
            if self._hold:
                self._corpora[key] = documents
        return documents

    def check(self, config: Config) -> dict[str, int]:
        """Reads everything that a recipe names; see `check_data`."""
        problems = streaming_problems(config)
        read_template(config.data.chat_template, problems)
        counts: dict[str, int] = {}
        # All ranks read the same data: how much is held out and learned, too, one of them tells.
        is_compared = bool(config.data.eval) and own_rank() == 0
        learned: list[Digests] = []
        held_out: list[Digests] = []
        streamed: list[str] = []
        for section, sources in config.sources().items():
            for source in self.sources(sources, section, problems):
                digests = None
                if is_compared and section == "data.eval":
                    digests = Digests(places=[])
                    held_out.append(digests)
                elif is_compared and section == "data.train":
                    digests = Digests()
                    learned.append(digests)
                    if source.reader.hub and source.reader.streaming:
                        streamed.append(source.label)
                # What is held out is asked for again, as records: it is read in any case.
                summary = source.check(problems, digests, if_kept=section == "data.eval")
                counts[source.label] = summary.num_records
                problems += _complaints(source, summary, section, config)
        for place, corpus in config.corpora().items():
            try:
                counts[place] = len(resolve_text(corpus, place, self.corpus))
            except UserErrors as errors:
                problems += errors.problems
            except UserError as error:
                problems.append(str(error))
        if problems:
            raise UserErrors(problems)
        report_overlap(learned, held_out, streamed)
        return counts


def _complaints(
    source: RecordSource, summary: Summary, section: str, config: Config
) -> Iterator[str]:
    """What is wrong with a source of valid records; what should be looked at is logged."""
    if summary.unread:
        logger.warning(
            "%s (%s): columns with text that are not read: %s; map them with fields, or list them "
            "as ignore",
            source.label,
            source.name,
            ", ".join(repr(name) for name in summary.unread),
        )
    if summary.has_text and section == "data.eval" and config.evaluation.exact_match:
        yield (
            f"{source.label}: exact match needs prompts, but this source is plain text: set "
            "evaluation.exact_match=false"
        )


def check_data(config: Config) -> dict[str, int]:
    """Reads and validates every file of the recipe: format, fields, types, roles, emptiness.

    Of a streamed hub dataset only the first rows are checked. A source whose tokens are kept was
    valid when they were made, and is not read again while its files hold the same. How many
    held-out samples are learned, too, and which columns with text are not read is logged.

    Returns:
        How many samples each source has, by its place in the recipe (retention: documents).

    Raises:
        UserErrors: all problems of all sources, each naming file and line.
    """
    return DataReader(hold=False).check(config)


def what_is_checked(config: Config) -> str:
    """All of a recipe that `check_data` looks at: recipes that are equal in it need one check."""
    sources = {
        place: [source.model_dump(mode="json") for source in sources]
        for place, sources in config.sources().items()
    }
    corpora = {place: one.model_dump(mode="json") for place, one in config.corpora().items()}
    others = [str(config.data.chat_template), config.evaluation.exact_match]
    return json.dumps([sources, corpora, others], sort_keys=True)


def streaming_problems(config: Config) -> list[str]:
    """Streamed sources where the number of their samples would have to be known."""
    problems = [
        f"data.eval.{index}.streaming: evaluation reads everything at the start: remove it"
        for index, source in enumerate(config.data.eval)
        if source.streaming
    ]
    for index, source in enumerate(config.data.train):
        if source.streaming and source.hub and not source.limit and len(config.data.train) > 1:
            problems.append(
                f"data.train.{index}.streaming: beside other sources its size must be known, to "
                f"weigh it: set data.train.{index}.limit"
            )
    return problems


def read_template(path: Path | None, problems: list[str]) -> str | None:
    """The chat template of the recipe, or None.

    Args:
        path: of a file.
        problems: why it cannot be used is appended.
    """
    if path is None:
        return None
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        problems.append(f"data.chat_template={display(Path(path))}: cannot be read: {reason}")
        return None
    if not text.strip():
        problems.append(f"data.chat_template={display(Path(path))}: the file is empty: fill it")
        return None
    try:
        # What transformers adds to the language: these marks, and the tags of loop controls.
        extensions = ["jinja2.ext.loopcontrols"]
        jinja2.Environment(extensions=extensions).parse(_MARKS.sub("", text))
    except jinja2.TemplateSyntaxError as error:
        place = f"data.chat_template={display(Path(path))}:{error.lineno}"
        problems.append(f"{place}: not a Jinja template ({error.message}): mend it here")
        return None
    return text
