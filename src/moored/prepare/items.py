"""All that a recipe needs before its weights load, found as a run finds it: what, where, how large.

Nothing is fetched that is here already, and nothing is kept; that is `prepare_command.py`'s.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from moored.config import Config, Corpus, Source
from moored.data import (
    BaseIdentity,
    DataReader,
    HeldSource,
    SampleSet,
    TrainStream,
    load_samples,
    resolve_text,
)
from moored.data.base_samples import drawn_folder
from moored.data.heldout import anchor_samples
from moored.data.token_cache import content_of_texts
from moored.distributed.mesh import alone
from moored.evaluation.evaluate import build_suite
from moored.evaluation.task_suite import SuiteTask
from moored.models.base_files import resolve_base
from moored.models.loading import require_architecture, require_layout
from moored.utils import atomic_dir


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One thing that the recipe needs.

    Attributes:
        what: its place in the recipe.
        where: its folder, file or name on the hub.
        num_bytes: of its files; of a corpus, of its text.
        identity: a hash of its content, or the model's revision.
        note: counts, and whether its tokens are kept.
    """

    what: str
    where: str
    num_bytes: int
    identity: str
    note: str = ""


def find_everything(config: Config) -> list[Item]:
    """All that a run resolves before its weights load, in the order in which it does.

    Raises:
        UserError: something is missing or not as it must be.
    """
    mesh = alone()
    reader = DataReader()
    reader.check(config)
    located = resolve_base(config.model, mesh)
    require_model(located.source.path, config)
    items = [
        Item(
            what="model",
            where=str(located.source.path),
            num_bytes=size_of(located.source.path),
            identity=located.source.revision,
        )
    ]
    if config.data.chat_template is not None:
        items.append(_template(Path(config.data.chat_template)))
    for section, sources in config.sources().items():
        samples = load_samples(
            sources,
            located.tokenizer,
            config.data,
            located.vocab_size,
            section=section,
            reader=reader,
        )
        items += _sources(sources, samples, reader)
        if section == "data.train":
            TrainStream(config, located.tokenizer, samples).total_steps()
    suite = build_suite(config, located, mesh, reader)
    if suite.tasks is not None:
        items += map(_suite_task, suite.tasks.tasks)
    base = BaseIdentity(model=config.model, revision=located.source.revision)
    anchor_samples(config, located.tokenizer, base, reader)
    return items + [_corpus(place, c, base, reader) for place, c in config.corpora().items()]


def require_model(folder: Path, config: Config) -> None:
    """Refuse a model that transformers does not know, or that cannot be spread as is wanted.

    A model's own code is fetched by this, too.

    Raises:
        UserError: why.
    """
    if config.parallel.tensor_parallel_degree > 1:
        require_layout(folder, config.model, config.parallel)
    else:
        require_architecture(folder, config.model)


def size_of(folder: Path) -> int:
    """Bytes of the files below a folder, links followed."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _template(path: Path) -> Item:
    return Item(
        what="data.chat_template",
        where=str(path),
        num_bytes=path.stat().st_size,
        identity=f"sha256:{atomic_dir.sha256(path)}",
    )


def _sources(sources: Sequence[Source], samples: SampleSet, reader: DataReader) -> Iterator[Item]:
    opened = reader.sources(sources, samples.section, [])
    for index, (records, held) in enumerate(zip(opened, samples.sources, strict=True)):
        note, content = "streamed", records.content
        if isinstance(held, HeldSource):
            kept = "kept" if held.kept_in is not None else "not kept"
            note = f"{len(held):,} samples, {held.num_tokens:,} tokens, {kept}"
        yield Item(
            what=f"{samples.section}.{index}",
            where=str(records.source.path or records.source.hub),
            num_bytes=content.num_bytes if content else 0,
            identity=f"sha256:{content.digest}" if content else "unknown",
            note=note,
        )


def _suite_task(task: SuiteTask) -> Item:
    return Item(
        what=f"evaluation.suite.{task.name}",
        where=task.source,
        num_bytes=task.num_bytes,
        identity=f"sha256:{task.digest}",
        note=f"{task.num_asked:,} of {task.num_questions:,} questions",
    )


def _corpus(place: str, corpus: Corpus, base: BaseIdentity, reader: DataReader) -> Item:
    if corpus.builtin == "base-samples":
        folder = drawn_folder(corpus, base)
        facts = atomic_dir.read_manifest(folder)
        [file] = facts["files"].values()
        return Item(
            what=place,
            where=str(folder),
            num_bytes=file["bytes"],
            identity=f"sha256:{file['sha256']}",
            note=f"{facts['num_texts']:,} texts, {facts['num_tokens']:,} tokens",
        )
    documents = resolve_text(corpus, place, reader.corpus)
    content = content_of_texts(documents)
    return Item(
        what=place,
        where=corpus.path or corpus.hub or f"builtin {corpus.builtin}",
        num_bytes=content.num_bytes,
        identity=f"sha256:{content.digest}",
        note=f"{len(documents):,} documents",
    )
