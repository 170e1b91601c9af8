"""A process without a network: `python -m moored.prepare.offline RECIPE.yaml`.

In it every name lookup and every connection fails. It prints what `items.py` finds, or what is
missing, as one JSON object. Who starts it is `prepare_command.py`.
"""

from __future__ import annotations

import json
import socket
import sys
from dataclasses import asdict
from typing import Any

from moored.config import load_config
from moored.prepare.items import find_everything
from moored.utils.errors import UserError, UserErrors


def _refuse_network(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook: what would reach another machine fails, whoever asks."""
    if event in ("socket.getaddrinfo", "socket.gethostbyname") or (
        event == "socket.connect" and arguments[0].family in (socket.AF_INET, socket.AF_INET6)
    ):
        raise OSError("there is no network in this check")


def main() -> None:
    """The command line; the last line of stdout is the answer."""
    sys.addaudithook(_refuse_network)
    answer: dict[str, Any] = {"problems": [], "items": []}
    try:
        answer["items"] = [asdict(item) for item in find_everything(load_config(sys.argv[1]))]
    except UserErrors as error:
        answer["problems"] = list(error.problems)
    except UserError as error:
        answer["problems"] = [str(error)]
    print(f"\n{json.dumps(answer)}")


if __name__ == "__main__":
    main()
