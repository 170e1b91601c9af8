"""What a card says, read from a run directory, a report, an adapter's files and a base's folder.

Weights are hashed here, never loaded. Names are made fit to publish: no path of this machine, no
credentials.
"""

from __future__ import annotations

import contextlib
import json
import math
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
from moored.export.card.markdown import FRONT_MATTER
from moored.models.hub import ResolvedModel
from moored.tracking.journal import CURSOR_NAME, JOURNAL_NAME, is_start, read_journal
from moored.tracking.provenance import address
from moored.tracking.run_directory import RunDirectory
from moored.utils import atomic_dir
from moored.utils.errors import MooredError
from moored.utils.log import redact

SMALL_BYTES = 64 << 20  # config and tokenizer files: always hashed
HASHED_BYTES = 20 * 10**9  # of weights: hashing them takes less than a minute
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?", re.ASCII)
_KEPT = (".safetensors", ".json", ".jinja", ".model", ".txt", ".py")
_FROZEN = ("randlora_A", "randlora_B")  # random bases, stored beside what is trained


def public(name: str) -> str:
    """A name as it may be published: the last part of a path, without secrets."""
    return redact(short_name(name))


def hub_name(name: str) -> str | None:
    """The name if it is one of a model or data set on the hub."""
    is_one = HUB_NAME.fullmatch(name) and ".." not in name and "--" not in name
    return name if is_one and not Path(name).exists() else None


def utc(seconds: float) -> str:
    """A time in ISO 8601."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


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
    what, option, others = "This adapter", "", ""
    if scale != 1:
        what, option = f"{what} at scale {scale:g}", f" --scale {scale:g}"
        others = " (the figures of its run are of scale 1)"
    missing = f"{what} was not measured{others}"
    if file is not None and file.is_file():
        try:
            report = Report.read(file)
        except MooredError as error:
            why = redact(str(error).splitlines()[0]).replace(str(file), file.name)
            missing = f"The report of this adapter cannot be read ({why})"
        else:
            if (arm := _arm_at(report, scale, name)) is not None:
                return Figures.of(report, arm, {n: _origin(c) for n, c in corpora.items()})
    measures = f"`moored evaluate {run}{option}` measures it, and exporting again shows it here"
    return Figures(missing=f"{missing}. {measures}.")


def _arm_at(report: Report, scale: float, name: str) -> str | None:
    scales = {arm: 1 if its.scale is None else its.scale for arm, its in report.arms.items()}
    arms = [arm for arm in scales if scales[arm] == scale]
    return arms[0] if len(arms) == 1 else name if name in arms else None


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
    sections, state = config.resolved(), run.state()
    spent = state.get("training") or {}
    training = TrainingFacts(
        regularizer=_public_paths(sections["regularizer"]),
        optim=sections["optim"],
        train=sections["train"],
        steps=spent.get("num_steps", state.get("step")),
        tokens=spent.get("tokens"),
        seconds=spent.get("seconds"),
        final_loss=spent.get("final_loss"),
    )
    events = [r for r in read_journal(run.path / JOURNAL_NAME) if r["kind"] == "event"]
    starts = [event for event in events if is_start(event)]
    ends = [event["time"] for event in events if event["event"] == "finish"]
    commits = [event["fields"].get("commit") for event in starts]
    provenance = Provenance(
        began=utc(starts[0]["time"]) if starts else None,
        ended=utc(ends[-1]) if ends else None,
        attempts=state.get("attempt"),
        recipe_sha256=config.fingerprint(),
        commits=tuple(dict.fromkeys(filter(None, commits))),
        versions=(starts[-1]["fields"].get("versions") if starts else None) or {},
        mlflow=tuple(_stores(run.path)),
    )
    return training, _data(config, {e["event"]: e["fields"] for e in events}), provenance


def _data(config: Config, events: Mapping[str, dict[str, Any]]) -> Data:
    """The sources of the recipe, with what the journal says of them."""
    trained, replayed = config.data.train, config.regularizer.replay
    total = events.get("dataset", {})
    counts = {name: total.get(name) for name in ("num_samples", "num_tokens")}
    said = events.get("sources", {}).get("sources", [])  # journals of before have none
    if len(said) != len(trained) == 1 and not trained[0].streaming:
        said = [counts]
    told = events.get("replayed_sources", {}).get("sources", [])
    return Data(
        sources=_sources(trained, said),
        replayed=_sources(replayed, told),
        sha256=total.get("digest"),
        **counts,
    )


def _sources(
    sources: Sequence[Source], said: Sequence[Mapping[str, Any]]
) -> tuple[SourceFacts, ...]:
    """A recipe's sources; where the journal is of other ones, nothing is said of them."""
    if len(said) != len(sources):
        said = [{}] * len(sources)
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


def _public_paths(value: Any, key: str = "") -> Any:
    """A section of the recipe whose paths, at any depth, are names."""
    if isinstance(value, list):
        return [_public_paths(item) for item in value]
    if isinstance(value, dict):
        return {name: _public_paths(item, name) for name, item in value.items()}
    return public(value) if key in ("path", "hub") and isinstance(value, str) else value


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


# ---------------------------------------------------------------- the files


def adapter_of(folder: Path) -> Adapter:
    """The facts of a PEFT folder, without its tensors."""
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    file = folder / "adapter_model.safetensors"
    method = str(config.get("peft_type") or "unknown").lower()
    prefix = "randlora" if method == "randlora" else "lora"
    targets = config.get("target_modules")
    with safe_open(file, framework="numpy") as tensors:
        trained = [name for name in tensors.keys() if not name.endswith(_FROZEN)]  # noqa: SIM118
        sizes = [math.prod(tensors.get_slice(name).get_shape()) for name in trained]
    return Adapter(
        method="dora" if config.get("use_dora") else method,
        r=config.get("r") or None,  # OFT's of which the blocks have a size
        alpha=config.get(f"{prefix}_alpha"),
        rslora=bool(config.get("use_rslora")),
        dropout=config.get(f"{prefix}_dropout"),
        target_modules=tuple(sorted(targets)) if isinstance(targets, list) else targets,
        num_parameters=sum(sizes),
        sha256=atomic_dir.sha256(file),
        bytes=file.stat().st_size,
    )


def base_of(model: ModelConfig, source: ResolvedModel, *, hash_all: bool) -> Base:
    """The base and the hashes of its files, none of which costs much to have.

    The hub's cache and folders that Moored made have the hashes of large files; other folders are
    hashed up to HASHED_BYTES of weights.

    Args:
        model: of the recipe.
        source: its files.
        hash_all: hash weights of any size.
    """
    from_index = source.origin.startswith(("hub:", "pypi:"))
    return Base(
        name=public(model.name_or_path),
        hub=hub_name(model.name_or_path),
        revision=source.revision,
        origin=redact(source.origin) if from_index else "files of the machine it was trained on",
        quantization=model.quantization,
        double_quantization=model.double_quantization if model.quantization == "nf4" else None,
        license=_license(source.path),
        files=_files(source.path, hash_all=hash_all),
    )


def _files(folder: Path, *, hash_all: bool) -> dict[str, File]:
    sealed: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError, KeyError):
        sealed = atomic_dir.read_manifest(folder)["files"]
    paths = [
        path
        for path in sorted(folder.iterdir())
        if path.is_file() and path.suffix in _KEPT and path.name != atomic_dir.MANIFEST
    ]
    weights = sum(path.stat().st_size for path in paths if path.suffix == ".safetensors")
    files: dict[str, File] = {}
    with atomic_dir.hashing("hashing the base", paths) as phase:
        for path in paths:
            size, blob, known = path.stat().st_size, path.resolve(), sealed.get(path.name, {})
            sha256, by = None, None
            if known.get("bytes") == size:
                sha256, by = known["sha256"], "moored"
            elif blob.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", blob.name):
                sha256, by = blob.name, "hub"
            elif hash_all or size <= SMALL_BYTES or weights <= HASHED_BYTES:
                sha256, by = atomic_dir.sha256(path, phase), "export"
            files[path.name] = File(bytes=size, sha256=sha256, by=by)
    return files


def _license(folder: Path) -> str | None:
    """What the front matter of the base's own card says."""
    with contextlib.suppress(OSError, ValueError, AttributeError, yaml.YAMLError):
        matter = FRONT_MATTER.match((folder / "README.md").read_text(encoding="utf-8"))
        stated = yaml.safe_load(matter[1]).get("license") if matter else None
        if isinstance(stated, str) and re.fullmatch(r"[\w.+-]{1,64}", stated, re.ASCII):
            return stated
    return None
