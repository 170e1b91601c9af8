"""What the command lines of `local` and `multinode` share; what they mean is `_launch.py`'s."""

from __future__ import annotations

import argparse
import contextlib
import math
import re
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

from _launch import USER_ERROR, Host


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, as those of `moored` are."""

    def error(self, message: str) -> NoReturn:
        """End with the line and the code of a user's error."""
        print(f"error: {message} (see `{self.prog} --help`)", file=sys.stderr)
        sys.exit(USER_ERROR)


def positive(text: str) -> int:
    """A whole number from 1."""
    with contextlib.suppress(ValueError):
        if (number := int(text)) > 0:
            return number
    raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1, such as 2")


def gib(text: str) -> float:
    """An amount of GiB."""
    with contextlib.suppress(ValueError):
        if math.isfinite(number := float(text)) and number >= 0:
            return number
    raise argparse.ArgumentTypeError(f"{text!r} is no number from 0, such as 1.5")


def words(text: str) -> tuple[str, ...]:
    """A command and its arguments, as a shell parts them."""
    with contextlib.suppress(ValueError):
        if parts := shlex.split(text):
            return tuple(parts)
    raise argparse.ArgumentTypeError(f"{text!r} is no command, such as 'ssh -p 2222'")


def run_arguments(
    parser: argparse.ArgumentParser,
) -> tuple[argparse.Namespace, tuple[str, ...]]:
    """Add what every launcher takes, and parse: the options, and the recipe with its overrides."""
    parser.add_argument(
        "--attempts",
        type=positive,
        default=3,
        metavar="K",
        help="give up after K starts in a row that saved no new step (default: %(default)s)",
    )
    parser.add_argument(
        "--min-free-gib",
        type=gib,
        default=1.0,
        metavar="GIB",
        help="room that the run directory must have (default: %(default)g)",
    )
    parser.add_argument("recipe", metavar="RECIPE", help="as for `moored train`")
    parser.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE")
    arguments = parser.parse_intermixed_args()
    return arguments, (arguments.recipe, *arguments.overrides)


def read_hosts(text: str) -> tuple[Host, ...]:
    """`h1,h2:4`: two machines, the second with four ranks."""
    return _distinct(_host(part) for part in text.split(",") if part.strip())


def read_hostfile(path: Path) -> tuple[Host, ...]:
    """One machine a line, as DeepSpeed and MPI have it: `h1 slots=4`, `h1:4` or `h1`."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is no text"
        raise ValueError(
            f"--hostfile {path}: {why}: name a file with lines such as `node1 slots=4`"
        ) from error
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    return _distinct(_host(line) for line in lines if line)


def _host(text: str) -> Host:
    # A name that began with a dash would be an option of ssh.
    found = re.fullmatch(r"\s*((?!-)[\w.@-]+)(?:(?::|\s+slots=)(\d+))?\s*", text)
    if not found or found[2] == "0":
        raise ValueError(f"{text!r} is no host: write NAME, NAME:RANKS or NAME slots=RANKS")
    return Host(name=found[1], slots=int(found[2]) if found[2] else None)


def _distinct(hosts: Iterable[Host]) -> tuple[Host, ...]:
    found = tuple(hosts)
    names = [host.name for host in found]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise ValueError(f"{twice} is named twice: write {twice}:RANKS for several ranks")
    if not found:
        raise ValueError("no host is named: write NAME, NAME:RANKS or NAME slots=RANKS")
    return found
