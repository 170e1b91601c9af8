"""What is evaluated, not trained on: held-out batches, prompts, windows of retention corpora.

How files are read and chats are masked is in the rooms behind it.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from moored.data.base_samples import BaseIdentity, drawn_samples
from moored.data.batch import Batch, batches_of
from moored.data.chat import ChatEncoder
from moored.data.reading import DataReader, resolve_text
from moored.data.samples import Encoder, SampleSet, load_samples
from moored.data.template import TemplateError
from moored.data.token_arrays import Sample, Tokens
from moored.data.token_cache import corpus_tokens
from moored.utils.errors import UserError, UserErrors

if TYPE_CHECKING:
    from moored.config import Config, Corpus
    from moored.data.records import Record

logger = logging.getLogger(__name__)
_T = TypeVar("_T")


def eval_samples(
    config: Config,
    tokenizer: Any,
    *,
    vocab_size: int | None = None,
    loaded: SampleSet | None = None,
) -> list[Sample]:
    """The samples of data.eval, at most `evaluation.max_examples`, taken evenly from its sources.

    Args:
        config: the recipe.
        tokenizer: of the model.
        vocab_size: rows of the model's embedding.
        loaded: all of data.eval, if that is there already.

    Raises:
        UserError: a file, field or sample is not as it must be; all problems at once.
    """
    if loaded is None:
        loaded = load_samples(
            config.data.eval, tokenizer, config.data, vocab_size, section="data.eval"
        )
    return _evenly(loaded.held, config.evaluation.max_examples)


def eval_batches(
    samples: Iterable[Sample],
    *,
    micro_batch_size: int,
    dp_rank: int,
    dp_size: int,
    pad_token_id: int,
    vocab_size: int | None = None,
) -> list[Batch]:
    """This rank's batches of some samples, padded in groups of like length.

    Every rank gets the same number of them, some perhaps without targets.
    """
    return batches_of(
        [[sample] for sample in samples],
        micro_batch_size=micro_batch_size,
        dp_rank=dp_rank,
        dp_size=dp_size,
        pad_token_id=pad_token_id,
        vocab_size=vocab_size,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A question to be answered by generation, and the answer it is compared with.

    Attributes:
        sample_id: of the held-out sample.
        input_ids: up to where the answer begins, the assistant's header included.
        completion: the reference answer, as text.
        stop_token_ids: what ends an answer: the template's end of turn, and end of sequence.
    """

    sample_id: str
    input_ids: list[int]
    completion: str
    stop_token_ids: tuple[int, ...]


def prompts(config: Config, tokenizer: Any, reader: DataReader | None = None) -> list[Prompt]:
    """The last answer of each sample of data.eval, as a question.

    Those longer than data.max_length, which training would not see either, are left out.

    Args:
        config: the recipe.
        tokenizer: of the model.
        reader: has read data.eval, or reads it for others, too.

    Raises:
        UserError: a sample is plain text, or not as it must be.
    """
    encoder = Encoder(tokenizer, config.data)
    problems: list[str] = []
    per_source: list[list[Record]] = []
    sources = (reader or DataReader(hold=False)).sources(config.data.eval, "data.eval", problems)
    for source in sources:
        records = (
            record
            for record in source.records(problems)
            if record.learned is None or record.learned[-1]  # else it is no answer to match
        )
        per_source.append(list(itertools.islice(records, config.evaluation.max_examples)))
    records = _evenly(per_source, config.evaluation.max_examples)
    asked: list[Prompt] = []
    for sample_id, record, tokens in encoder.encode(records):
        if record.kind == "text":
            problems.append(
                f"{record.where}: exact match needs a prompt, this is plain text: set "
                "evaluation.exact_match=false"
            )
        elif isinstance(tokens, str):
            problems.append(f"{record.where}: {tokens}")
        elif sample_id == record.sample_id:  # not an earlier turn of it
            try:
                asked.append(_prompt(encoder.chat, sample_id, record, tokens))
            except TemplateError as error:
                problems.append(f"{record.where}: {error}")
    if problems:
        raise UserErrors(problems)
    short = [prompt for prompt in asked if len(prompt.input_ids) <= config.data.max_length]
    if len(short) < len(asked):
        dropped = len(asked) - len(short)
        logger.warning("data.eval: %d prompts longer than data.max_length left out", dropped)
    if not short:
        raise UserError("data.eval: no prompt is left for exact match: raise data.max_length")
    return short


def _prompt(chat: ChatEncoder, sample_id: str, record: Record, tokens: Tokens) -> Prompt:
    *asked, answer = record.messages
    if chat.templates and not record.rendered:
        ids = chat.prompt_ids(asked, record.tools)
    else:
        ids = chat.text_ids(asked[0]["content"])
    return Prompt(
        sample_id=sample_id,
        input_ids=ids,
        completion=answer.get("content") or "",
        stop_token_ids=chat.ends_of(tokens),
    )


def retention_samples(
    name: str,
    corpus: Corpus,
    tokenizer: Any,
    *,
    keep: bool = False,
    place: str | None = None,
    base: BaseIdentity | None = None,
    reader: DataReader | None = None,
) -> list[Sample]:
    """A retention corpus as samples.

    With target `all`, the documents are joined and cut into windows of `window_tokens`, of which
    every token but the first is a target. With `last_word` (LAMBADA), each document is a sample, of
    which only the tokens of its last word are targets. Both stop at `max_tokens`. What was kept (by
    a call with `keep`) is read instead.

    Args:
        name: of the corpus and its samples.
        corpus: where the text is, and how much of it.
        tokenizer: of the model.
        keep: keep the tokens in the cache.
        place: in the recipe, for messages; by default `retention.NAME`.
        base: whose texts `base-samples` are.
        reader: has read the text, or reads it for others, too.

    Raises:
        UserError: it cannot be read, or is too short.
    """
    label = place or f"retention.{name}"
    if corpus.builtin == "base-samples":
        if base is None:
            raise UserError(f"{label}: base-samples are nothing without their base")
        return drawn_samples(name, corpus, base, label=label)
    documents = resolve_text(corpus, label, (reader or DataReader(hold=False)).corpus)
    chat = ChatEncoder(tokenizer)
    make = _windows if corpus.target == "all" else _last_words
    samples = corpus_tokens(
        name,
        corpus,
        documents,
        chat,
        lambda: list(make(name, documents, corpus, chat)),
        keep=keep,
    )
    if not samples:
        need = "two words in a document" if corpus.target == "last_word" else "two tokens"
        raise UserError(f"{label}: too short, {need} are the least: give another text")
    return samples


def anchor_samples(
    config: Config, tokenizer: Any, base: BaseIdentity, reader: DataReader | None = None
) -> list[Sample]:
    """The windows of `regularizer.anchors`; none where there are no anchors.

    Raises:
        UserError: as `retention_samples`; or a text of theirs is one that is measured.
    """
    regularizer = config.regularizer
    anchors = regularizer.anchors if regularizer.has_divergence else None
    if anchors is None:
        return []
    reader = reader or DataReader(hold=False)
    place = "regularizer.anchors"
    found = retention_samples("anchors", anchors, tokenizer, place=place, base=base, reader=reader)
    _require_apart(config, anchors, tokenizer, base, reader)
    return found


# ---------------------------------------------------------------- anchors are never measured

# Letters and digits of a passage: a shorter one may stand in two texts by chance.
LEAST_SHARED = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class _Text:
    """A text, where it is, and whether it is compared as a whole, however short it is."""

    text: str
    where: str
    whole: bool = True


def _require_apart(
    config: Config, anchors: Corpus, tokenizer: Any, base: BaseIdentity, reader: DataReader
) -> None:
    """Refuse anchors that share a text, a paragraph or a line with anything that is measured.

    Case, punctuation, blanks and how a text was cut into rows do not count.
    """
    measured: dict[str, Callable[[], Iterator[_Text]]] = {}
    corpora = {f"retention.{name}": corpus for name, corpus in config.retention.items()}
    if config.regularizer.budget is not None:
        corpora["regularizer.budget.probe"] = config.regularizer.budget.probe
    for where, corpus in corpora.items():
        if anchors.builtin is None or corpus.builtin is None:  # those are drawn apart
            measured[where] = partial(_texts, corpus, where, tokenizer, base, reader)
    if config.data.eval:
        measured["data.eval"] = partial(_held_out, config, reader)
    place, held, count = "regularizer.anchors", dict[bytes, str](), 0
    for one in _texts(anchors, place, tokenizer, base, reader) if measured else ():
        count += 1
        for digest in _passages(one):
            held.setdefault(digest, one.where)
    for where, texts in measured.items():
        shared = {
            held[digest]: one.where for one in texts() for digest in _passages(one) & held.keys()
        }
        if shared:
            first, other = next(iter(shared.items()))
            raise UserError(
                f"{place}: {len(shared)} of its {count} texts are also in {where}, such as {first} "
                f"in {other}: what is measured must not be held in training: take them out of one"
            )


def _texts(
    corpus: Corpus, place: str, tokenizer: Any, base: BaseIdentity, reader: DataReader
) -> Iterator[_Text]:
    """All that a corpus holds; of `base-samples` what the base wrote."""
    if corpus.builtin == "base-samples":
        for sample in drawn_samples("base-samples", corpus, base, label=place):
            text = tokenizer.decode(sample.input_ids[sample.label_mask], skip_special_tokens=True)
            # What a model writes in short, it writes again.
            yield _Text(text=text, where=sample.sample_id, whole=False)
        return
    for document in reader.corpus(corpus, place):
        if document.text.strip() and corpus.domain in (None, document.domain):
            yield _Text(text=document.text, where=document.where)


def _held_out(config: Config, reader: DataReader) -> Iterator[_Text]:
    """What data.eval asks and answers; what the hub streams is not read for this."""
    for source in reader.sources(config.data.eval, "data.eval", problems := []):
        if source.source.streaming and source.source.hub:
            continue
        for record in source.records(problems):
            if record.kind == "text":
                yield _Text(text=record.text, where=record.where)
            for message in record.messages:
                text = message.get("content")
                if isinstance(text, str):
                    yield _Text(text=text, where=record.where, whole=False)


def _passages(one: _Text) -> set[bytes]:
    """Hashes of a text, and of its paragraphs and lines that are long enough to tell it."""
    found: set[bytes] = set()
    parts = {one.text, *re.split(r"\n\s*\n", one.text), *one.text.splitlines()}
    for part in parts:
        words = "".join(re.findall(r"\w+", unicodedata.normalize("NFKC", part).casefold()))
        if len(words) >= LEAST_SHARED or (words and one.whole and part is one.text):
            found.add(hashlib.blake2b(words.encode("utf-8", "replace"), digest_size=16).digest())
    return found


def _windows(
    name: str, documents: list[str], corpus: Corpus, chat: ChatEncoder
) -> Iterator[Sample]:
    # No text has more than 32 characters a token for long: enough for max_tokens, and no more.
    text = "\n\n".join(document.strip("\n") for document in documents)[: 32 * corpus.max_tokens]
    start = len(chat.prefix)
    ids = chat.text_ids(text)[start : start + corpus.max_tokens]
    size = max(1, corpus.window_tokens - start)
    for number, first in enumerate(range(0, len(ids), size)):
        window = np.array([*chat.prefix, *ids[first : first + size]], dtype=np.int32)
        if len(window) > 1:
            mask = np.arange(len(window)) > 0
            yield Sample(sample_id=f"{name}:{number}", input_ids=window, label_mask=mask)


def _last_words(
    name: str, documents: list[str], corpus: Corpus, chat: ChatEncoder
) -> Iterator[Sample]:
    total = 0
    for number, document in enumerate(documents, 1):
        text = document.strip()
        word = text.split()[-1]
        start = len(text[: -len(word)].rstrip())  # the space before it is the word's
        if start == 0:
            continue
        encoded = chat.tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        ids = np.array([*chat.prefix, *encoded["input_ids"]], dtype=np.int32)
        stops = [0] * len(chat.prefix) + [stop for _, stop in encoded["offset_mapping"]]
        mask = np.array(stops) > start
        # A passage longer than a window keeps its end, behind the start token.
        cut = max(0, len(ids) - corpus.window_tokens)
        keep = np.r_[0 : len(chat.prefix), len(chat.prefix) + cut : len(ids)]
        ids, mask = ids[keep], mask[keep]
        total += len(ids)
        if total > corpus.max_tokens:
            return
        if mask[1:].any():
            yield Sample(sample_id=f"{name}:{number}", input_ids=ids, label_mask=mask)


def _evenly(sources: Sequence[Sequence[_T]], limit: int | None) -> list[_T]:
    """The first of each source, then the second of each, ..."""
    rounds = itertools.zip_longest(*sources, fillvalue=None)
    items = [item for round_ in rounds for item in round_ if item is not None]
    return items[:limit]
