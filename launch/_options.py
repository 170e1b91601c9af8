"""What the command lines of `local` and `multinode` share; what they mean is `_launch.py`'s."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable
from pathlib import Path

from _launch import Host


def positive(text: str) -> int:
    """A whole number from 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return number


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
        type=float,
        default=1.0,
        metavar="GIB",
        help="room that the run directory must have (default: %(default)g)",
    )
    parser.add_argument("recipe", metavar="RECIPE", help="as for `moored train`")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    arguments = parser.parse_intermixed_args()
    return arguments, (arguments.recipe, *arguments.overrides)


def read_hosts(text: str) -> tuple[Host, ...]:
    """`h1,h2:4`: two machines, the second with four ranks."""
    return _distinct(_host(part) for part in text.split(",") if part.strip())


def read_hostfile(path: Path) -> tuple[Host, ...]:
    """One machine a line, as DeepSpeed and MPI have it: `h1 slots=4`, `h1:4` or `h1`."""
    lines = (line.partition("#")[0].strip() for line in path.read_text().splitlines())
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
        raise ValueError("no host is named")
    return found
