"""What a run is made of, as the journal's start event: recipe, versions, commit, host, address.

All of it is free of secrets; how it reaches MLflow is `shipper.py`'s matter.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import re
import socket
import subprocess
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

from moored.config import Config
from moored.tracking.journal import JOURNAL_NAME, first_start
from moored.tracking.run_directory import RunDirectory
from moored.utils.environment import installed_versions
from moored.utils.log import redact

PACKAGES = ("python", "moored", "torch", "transformers", "peft", "bitsandbytes", "deepspeed")
PACKAGES += ("mlflow",)
_GIT_SECONDS = 2.0
# A key that names a secret. `num_memory_tokens` and `max_tokens` do not.
_SECRET_KEY = re.compile(r"(?i)(?:^|[._-])(?:token|password|passwd|secret|api_?key|credentials?)$")


def start_fields(
    config: Config, run_dir: Path, uri: str, parent: Path | None, arms: Sequence[Config] = ()
) -> dict[str, Any]:
    """The fields of a start event.

    Args:
        config: the recipe.
        run_dir: the run directory; its journal, if there is one, gives the run's identity.
        uri: the tracking store's address.
        parent: run directory of the comparison that this run is an arm of.
        arms: recipes of a run that is all arms: it has the parameters that they share.
    """
    kind = RunDirectory(run_dir).kind
    shared = [set(params(arm, kind).items()) for arm in arms]
    first = first_start(run_dir / JOURNAL_NAME)
    return {
        "uid": first["fields"].get("uid") if first else uuid.uuid4().hex,
        "name": config.name if parent is None else f"{config.name} {run_dir.name}",
        "experiment": config.track.experiment,
        "uri": address(uri) if config.track.mlflow else None,
        "parent": None if parent is None else str(parent.absolute()),
        "params": {
            name: text
            for name, text in params(config, kind).items()
            if all((name, text) in each for each in shared)
        },
        "config": scrub(config.dump_yaml(), uri),
        "tags": {name: scrub(text, uri) for name, text in _without_secrets(config.track.tags)},
        "versions": installed_versions(PACKAGES),
        "commit": _commit(),
        "slurm_job_id": os.environ.get("SLURM_JOB_ID"),
        "user": _user(),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "pid_began": psutil.Process().create_time(),
    }


def tracking_uri(config: Config) -> str:
    """The recipe's store, else `MLFLOW_TRACKING_URI`, else a SQLite file beside the runs."""
    default = f"sqlite:///{config.output.dir.absolute()}/mlflow.db"
    return absolute(config.track.uri or os.environ.get("MLFLOW_TRACKING_URI") or default)


def absolute(uri: str) -> str:
    """The same store, whatever the working directory: relative SQLite paths are completed."""
    prefix = "sqlite:///"
    if uri.startswith(prefix) and not uri.startswith(prefix + "/"):
        return prefix + os.path.abspath(uri.removeprefix(prefix))
    return uri


def address(uri: str) -> str:
    """The URI without what may be secret: the part before `@`, and the query."""
    parts = urlsplit(uri)
    if "@" not in parts.netloc and not parts.query:
        return uri
    clean = parts._replace(netloc=parts.netloc.rpartition("@")[2], query="")
    return clean.geturl()


def scrub(text: str, uri: str) -> str:
    """`text` without the credentials of `uri` or any other secret that is known."""
    parts = urlsplit(uri)
    secrets = [uri] if address(uri) != uri else []
    with contextlib.suppress(ValueError):
        secrets += [parts.netloc.rpartition("@")[0], parts.password or "", parts.query]
    for secret in secrets:
        if len(secret) > 3:
            text = text.replace(secret, address(uri) if secret == uri else "***")
    return redact(text)


def params(config: Config, kind: str = "run") -> dict[str, str]:
    """What has an effect on a run, as flat text: `optim.learning_rate` -> `0.0002`.

    Where it is tracked is left out.

    Args:
        config: the recipe.
        kind: of the run directory: a comparison trains its arms, which have all that they inherit;
            any other run trains what the recipe says, and has no arms.
    """
    idle = {"track", "compare", "compare_seeds"}
    if kind == "comparison":
        idle = {"track", "regularizer"} | ({"train.seed"} if config.compare_seeds else set[str]())
    texts = {
        key: value if isinstance(value, str) else json.dumps(value)
        for key, value in config.flat().items()
        if not {key, key.partition(".")[0]} & idle
    }
    return dict(_without_secrets(texts))


def _without_secrets(texts: dict[str, str]) -> list[tuple[str, str]]:
    return [(k, "***" if _SECRET_KEY.search(k) and v else redact(v)) for k, v in texts.items()]


def _user() -> str | None:
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):  # a container's user may have no name
        return None


def _commit() -> str | None:
    """The git commit of the working directory, None outside of a repository."""
    command = ["git", "rev-parse", "--verify", "HEAD"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_GIT_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
