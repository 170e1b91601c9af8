"""What a card says, read from a run directory, a report, an adapter's files and a base's folder.

Weights are hashed here, never loaded. Names are made fit to publish: no path of this machine, no
credentials.
"""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml
from safetensors import safe_open

from moored.config import Config, Corpus, ModelConfig, Source
from moored.config.inputs import short_name
from moored.evaluation.report import Report
from moored.export.card.facts import (
    Adapter,
    Base,
    Data,
    Figures,
    File,
    Provenance,
    SourceFacts,
    TrainingFacts,
)
from moored.models.hub import ResolvedModel
from moored.tracking.cursor import CURSOR_NAME
from moored.tracking.journal import JOURNAL_NAME, is_start, read_journal
from moored.tracking.provenance import address
from moored.tracking.run_directory import RunDirectory
from moored.utils import atomic_dir
from moored.utils.errors import MooredError
from moored.utils.log import redact

SMALL_BYTES = 64 << 20  # config and tokenizer files: always hashed
HASHED_BYTES = 20 * 10**9  # of weights: hashing them takes less than a minute
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?", re.ASCII)
_KEPT = (".safetensors", ".json", ".jinja", ".model", ".txt", ".py")


def public(name: str) -> str:
    """A name as it may be published: the last part of a path, without secrets."""
    return redact(short_name(name))


def hub_name(name: str) -> str | None:
    """The name if it is one of a model or data set on the hub."""
    is_one = HUB_NAME.fullmatch(name) and ".." not in name and "--" not in name
    return name if is_one and not Path(name).exists() else None


# ---------------------------------------------------------------- figures


def figures_for(
    run: str, file: Path | None, scale: float, corpora: Mapping[str, Corpus], name: str = ""
) -> Figures:
    """The figures of an adapter at a scale, or why there are none.

    Args:
        run: what to call it in the command that measures it.
        file: the report; None: the user named none.
        scale: 1 as trained.
        corpora: retention texts of the recipe.
        name: the arm that is meant if the report holds several at this scale.
    """
    option = "" if scale == 1 else f" --scale {scale:g}"
    measures = f"`moored evaluate {run}{option}` measures it, and exporting again shows it here"
    at = "This adapter" if scale == 1 else f"This adapter at scale {scale:g}"
    not_measured = f"{at} was not measured"
    if scale != 1:
        not_measured += " (the figures of its run are of scale 1)"
    if file is None or not file.is_file():
        return Figures(missing=f"{not_measured}. {measures}.")
    try:
        report = Report.read(file)
    except MooredError as error:
        why = redact(str(error).splitlines()[0]).replace(str(file), file.name)
        return Figures(missing=f"The report of this adapter cannot be read ({why}). {measures}.")
    arms = [n for n, a in report.arms.items() if (1.0 if a.scale is None else a.scale) == scale]
    if len(arms) > 1:
        arms = [arm for arm in arms if arm == name]
    if not arms:
        return Figures(missing=f"{not_measured}. {measures}.")
    return Figures.of(report, arms[0], {n: _origin(corpus) for n, corpus in corpora.items()})


def _origin(corpus: Corpus) -> str:
    if corpus.builtin is not None:
        return "built in"
    if corpus.path is not None:
        return public(corpus.path)
    parts = (public(corpus.hub or ""), corpus.subset, corpus.split)
    return ", ".join(part for part in parts if part)


# ---------------------------------------------------------------- the run


def of_run(run: RunDirectory, config: Config) -> tuple[TrainingFacts, Data, Provenance]:
    """How a run trained, on what, and with which code; from its recipe, state and journal."""
    sections = config.resolved()
    spent = run.state().get("training") or {}
    training = TrainingFacts(
        regularizer=_public_paths(sections["regularizer"]),
        optim=sections["optim"],
        train=sections["train"],
        steps=spent.get("num_steps", run.state().get("step")),
        tokens=spent.get("tokens"),
        seconds=spent.get("seconds"),
        final_loss=spent.get("final_loss"),
    )
    starts: list[dict[str, Any]] = []
    last: dict[str, dict[str, Any]] = {}
    ended: float | None = None
    for record in read_journal(run.path / JOURNAL_NAME):
        if record["kind"] != "event":
            continue
        last[record["event"]] = record["fields"]
        if is_start(record):
            starts.append(record)
        elif record["event"] == "finish":
            ended = record["time"]
    newest = starts[-1]["fields"] if starts else {}
    provenance = Provenance(
        began=utc(starts[0]["time"]) if starts else None,
        ended=None if ended is None else utc(ended),
        attempts=run.state().get("attempt"),
        recipe_sha256=config.fingerprint(),
        commits=tuple(dict.fromkeys(c for start in starts if (c := start["fields"].get("commit")))),
        versions=newest.get("versions") or {},
        mlflow=tuple(_stores(run.path)),
    )
    return training, _data(config, last), provenance


def _data(config: Config, events: Mapping[str, dict[str, Any]]) -> Data:
    """The sources of the recipe, with what the journal says of them."""
    all_of_them = events.get("dataset", {})
    said = events.get("sources", {}).get("sources", [])  # journals of before have none
    if len(said) != len(config.data.train):
        is_all = len(config.data.train) == 1 and not config.data.train[0].streaming
        counts = {name: all_of_them.get(name) for name in ("num_samples", "num_tokens")}
        said = [counts if is_all else {}] * len(config.data.train)
    replayed = config.regularizer.replay
    told = events.get("replayed_sources", {}).get("sources", [])
    return Data(
        sources=_sources(config.data.train, said),
        replayed=_sources(replayed, told if len(told) == len(replayed) else [{}] * len(replayed)),
        num_samples=all_of_them.get("num_samples"),
        num_tokens=all_of_them.get("num_tokens"),
        sha256=all_of_them.get("digest"),
    )


def _sources(
    sources: Sequence[Source], said: Sequence[Mapping[str, Any]]
) -> tuple[SourceFacts, ...]:
    return tuple(
        SourceFacts(
            name=redact(told.get("name") or public(source.path or source.hub or "")),
            hub=None if source.hub is None else hub_name(source.hub),
            revision=source.revision,
            format=source.format,
            passes=source.weight,
            streamed=source.streaming,
            num_samples=told.get("num_samples"),
            num_tokens=told.get("num_tokens"),
            num_dropped=told.get("num_dropped"),
            sha256=told.get("digest"),
        )
        for source, told in zip(sources, said, strict=True)
    )


def _public_paths(value: Any) -> Any:
    """A section of the recipe whose paths, at any depth, are names."""
    if isinstance(value, list):
        return [_public_paths(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {
        key: public(item)
        if key in ("path", "hub") and isinstance(item, str)
        else _public_paths(item)
        for key, item in value.items()
    }


def _stores(run: Path) -> list[dict[str, str]]:
    """The run in each MLflow store: a server by its address, what is no address by its scheme."""
    with contextlib.suppress(OSError, ValueError, KeyError, AttributeError, TypeError):
        targets = json.loads((run / CURSOR_NAME).read_text(encoding="utf-8"))["targets"]
        return [
            {"uri": _store(uri), "run_id": str(cursor["run_id"])}
            for uri, cursor in targets.items()
            if cursor.get("run_id")
        ]
    return []


def _store(uri: str) -> str:
    scheme = urlsplit(uri).scheme
    if scheme in ("http", "https"):
        return redact(address(uri))
    return f"{scheme or 'file'}:"  # a path, or what a scheme of its own makes of the rest


def utc(seconds: float) -> str:
    """A time in ISO 8601."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


# ---------------------------------------------------------------- the files


def adapter_of(folder: Path) -> Adapter:
    """The facts of a PEFT folder, without its tensors."""
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    file = folder / "adapter_model.safetensors"
    method = str(config.get("peft_type") or "unknown").lower()
    targets = config.get("target_modules")
    with safe_open(file, framework="numpy") as tensors:
        shapes = {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
    frozen = ("randlora_A", "randlora_B")  # random bases, stored beside what is trained
    sizes = [_elements(shape) for name, shape in shapes.items() if not name.endswith(frozen)]
    return Adapter(
        method="dora" if config.get("use_dora") else method,
        r=config.get("r"),
        alpha=config.get("randlora_alpha" if method == "randlora" else "lora_alpha"),
        rslora=bool(config.get("use_rslora")),
        dropout=config.get("randlora_dropout" if method == "randlora" else "lora_dropout"),
        target_modules=tuple(sorted(targets)) if isinstance(targets, list) else targets,
        num_parameters=sum(sizes),
        sha256=atomic_dir.sha256(file),
        bytes=file.stat().st_size,
    )


def _elements(shape: list[int]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size


def base_of(model: ModelConfig, source: ResolvedModel, *, hash_all: bool) -> Base:
    """The base and the hashes of its files, none of which costs much to have.

    The hub's cache and folders that Moored made have the hashes of large files; other folders are
    hashed up to HASHED_BYTES of weights.

    Args:
        model: of the recipe.
        source: its files.
        hash_all: hash weights of any size.
    """
    hub = hub_name(model.name_or_path)
    from_index = source.origin.startswith(("hub:", "pypi:"))
    return Base(
        name=public(model.name_or_path),
        hub=hub,
        revision=source.revision,
        origin=redact(source.origin) if from_index else "files of the machine it was trained on",
        quantization=model.quantization,
        double_quantization=model.double_quantization if model.quantization == "nf4" else None,
        license=_license(source.path),
        files=_files(source.path, hash_all=hash_all),
    )


def _files(folder: Path, *, hash_all: bool) -> dict[str, File]:
    sealed_files: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError, KeyError):
        sealed_files = atomic_dir.read_manifest(folder)["files"]
    paths = [
        path
        for path in sorted(folder.iterdir())
        if path.is_file() and path.suffix in _KEPT and path.name != atomic_dir.MANIFEST
    ]
    weights = sum(path.stat().st_size for path in paths if path.suffix == ".safetensors")
    found: dict[str, File] = {}
    with atomic_dir.hashing("hashing the base", paths) as phase:
        for path in paths:
            size, blob = path.stat().st_size, path.resolve()
            if (known := sealed_files.get(path.name, {})).get("bytes") == size:
                found[path.name] = File(bytes=size, sha256=known["sha256"], by="moored")
            elif blob.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", blob.name):
                found[path.name] = File(bytes=size, sha256=blob.name, by="hub")
            elif hash_all or size <= SMALL_BYTES or weights <= HASHED_BYTES:
                found[path.name] = File(
                    bytes=size, sha256=atomic_dir.sha256(path, phase), by="export"
                )
            else:
                found[path.name] = File(bytes=size)
    return found


def _license(folder: Path) -> str | None:
    """What the front matter of the base's own card says."""
    with contextlib.suppress(OSError, ValueError, AttributeError, yaml.YAMLError):
        text = (folder / "README.md").read_text(encoding="utf-8")
        matter = re.match(r"\s*---\r?\n(.*?)\r?\n---(?:\r?\n|$)", text, re.S)
        stated = yaml.safe_load(matter.group(1)).get("license") if matter else None
        if isinstance(stated, str) and re.fullmatch(r"[\w.+-]{1,64}", stated, re.ASCII):
            return stated
    return None
