"""The proof that a recipe needs no network: a process that has none finds everything.

In it every name lookup and every connection fails. It prints what `items.py` finds, or what is
missing, as one JSON object.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moored.config import Config, load_config
from moored.prepare.items import Item, find_everything
from moored.utils.errors import MooredError, UserError, UserErrors
from moored.utils.log import redact
from moored.utils.progress import watch

log = logging.getLogger(__name__)
_MAIN = "from moored.prepare.offline import main; main()"
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "PIP_NO_INDEX": "1",
}


def prove(config: Config) -> list[Item]:
    """Have a fresh process without a network find everything.

    Raises:
        UserErrors: what it could not find, in its words.
    """
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "recipe.yaml"
        recipe.write_text(config.dump_yaml(), encoding="utf-8")
        done = watch(
            [sys.executable, "-P", "-c", _MAIN, str(recipe)],
            "a process without a network looks for all of it",
            env=os.environ | OFFLINE,
        )
    try:
        said: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        problems, items = said["problems"], [Item(**item) for item in said["items"]]
    except (ValueError, KeyError, IndexError, TypeError):
        log.debug("%s", done.stderr)
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise MooredError(f"the process without a network broke down: {redact(last)}") from None
    if problems:
        raise UserErrors([f"without a network: {problem}" for problem in problems])
    return items


# ---------------------------------------------------------------- in that process


def _refuse_network(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook: what would reach another machine fails, whoever asks."""
    if event in ("socket.getaddrinfo", "socket.gethostbyname") or (
        event == "socket.connect" and arguments[0].family in (socket.AF_INET, socket.AF_INET6)
    ):
        raise OSError("there is no network in this check")


def main() -> None:
    """Look for what the recipe needs; the last line of stdout is the answer."""
    sys.addaudithook(_refuse_network)
    answer: dict[str, Any] = {"problems": [], "items": []}
    try:
        answer["items"] = [asdict(item) for item in find_everything(load_config(sys.argv[1]))]
    except UserErrors as error:
        answer["problems"] = list(error.problems)
    except UserError as error:
        answer["problems"] = [str(error)]
    print(f"\n{json.dumps(answer)}")
