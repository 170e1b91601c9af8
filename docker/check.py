"""Whether an installed Moored is whole: it starts, all of it imports, versions are the pinned ones.

The last step of `install.sh`, so of every image: `python check.py CONSTRAINTS.txt ...`. It says all
that is wrong, not only the first thing. No training is tried here: that is what the tests are for.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import pkgutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name


def read_pins(paths: Iterable[str | os.PathLike[str]]) -> dict[str, str]:
    """Name to version, from files of `name==version` lines."""
    lines = (line.strip() for path in paths for line in Path(path).read_text().splitlines())
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(name): version for name, version in pairs}


def closure(name: str, *extras: str) -> dict[str, str | None]:
    """All that an installed distribution needs, in the end: name to version, None if absent.

    Requirements for another platform or Python are left out, extras that somebody asks for are not.
    """
    found: dict[str, str | None] = {}
    seen: set[tuple[str, str]] = set()
    todo = [(canonicalize_name(name), extra) for extra in ("", *extras)]
    while todo:
        current, extra = todo.pop()
        if (current, extra) in seen:
            continue
        seen.add((current, extra))
        try:
            distribution = importlib.metadata.distribution(current)
        except importlib.metadata.PackageNotFoundError:
            found[current] = None
            continue
        found[current] = distribution.version
        for line in distribution.requires or []:
            needed = Requirement(line)
            if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                todo += [(canonicalize_name(needed.name), e) for e in ("", *needed.extras)]
    return found


def version_problems(pins: Mapping[str, str]) -> list[str]:
    """What is missing, not pinned or at another version than the pinned one; a line each.

    CUDA's libraries may be unpinned where no pins for this build of torch were given.
    """
    unpinned = () if "cuda-toolkit" in pins else ("cuda-", "nvidia-")
    problems: list[str] = []
    for name, version in sorted(closure("moored", "train").items()):
        pin = pins.get(name)
        if version is None:
            problems.append(f"{name} is needed, but not installed")
        elif pin is None:
            if name != "moored" and not name.startswith(unpinned):
                problems.append(f"{name} {version} is installed, but no constraint names it")
        # Unlike comparing the texts, this takes 2.13.0+cu130 for a 2.13.0.
        elif not SpecifierSet(f"=={pin}").contains(version, prereleases=True):
            problems.append(f"{name} {version} is installed, but the constraint is {pin}")
    return problems


def start_problems() -> list[str]:
    """Whether the command beside this Python says its version."""
    command = [str(Path(sys.executable).parent / "moored"), "--version"]
    version = importlib.metadata.version("moored")
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        return [f"{command[0]} cannot be started: {error}"]
    if done.returncode or version not in done.stdout:
        return [f"moored --version gave {done.returncode}, {done.stdout!r}: {done.stderr.strip()}"]
    return []


def import_problems() -> list[str]:
    """Whether every module of Moored imports, hence all it needs."""
    import moored

    problems: list[str] = []
    for module in pkgutil.walk_packages(moored.__path__, "moored."):
        if not module.name.endswith(".__main__"):
            try:
                importlib.import_module(module.name)
            except Exception as error:  # whatever a broken package raises
                theirs = module.name.startswith("moored.plugin.")  # for trainers that are not here
                if theirs and getattr(error, "name", None) in ("axolotl", "trl"):
                    continue
                problems.append(f"import {module.name}: {type(error).__name__}: {error}")
    return problems


def build_problems(torch_build: str) -> list[str]:
    """Whether torch is the build asked for (cu130, cpu); other names say nothing."""
    import torch

    cuda = torch.version.cuda
    found = f"cu{cuda.replace('.', '')}" if cuda else "cpu"
    if torch_build.startswith(("cu", "cpu")) and found != torch_build:
        return [f"torch is a {found} build, but {torch_build} was asked for"]
    return []


def main() -> None:
    """Check everything, and say it."""
    problems = version_problems(read_pins(sys.argv[1:])) + start_problems()
    problems += import_problems() + build_problems(os.environ.get("TORCH_BUILD", ""))
    for problem in problems:
        print(f"check: {problem}", file=sys.stderr)
    if problems:
        sys.exit(1)
    print(f"check: moored {importlib.metadata.version('moored')} is whole")


if __name__ == "__main__":
    main()
