"""Every shell script of the repository passes shellcheck, those inside other files too."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from dockerkit import ROOT, SCRIPTS, Definition


def _shell_scripts() -> list[Path]:
    """Every shell script of the repository, by its suffix or its first line."""
    outside = {".git", ".venv", "runs", "mlruns", "build", "dist", "node_modules", "__pycache__"}
    found: list[Path] = []
    for folder, folders, files in os.walk(ROOT):
        folders[:] = sorted(set(folders) - outside)
        for path in (Path(folder) / name for name in sorted(files)):
            if path.suffix in {".sh", ".bash", ".sbatch"}:
                found.append(path)
            elif not path.suffix:
                with path.open("rb") as file:
                    if re.match(rb"#!.*\b(ba|da)?sh\b", file.readline()):
                        found.append(path)
    # A template is no script before it is rendered.
    return [path for path in found if "{{ " not in path.read_text()]


def _shellcheck(*arguments: str, text: str | None = None) -> str:
    command = [str(SCRIPTS / "shellcheck"), "--external-sources", *arguments]
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def test_the_shell_scripts_are_found() -> None:
    names = {str(path.relative_to(ROOT)) for path in _shell_scripts()}
    assert {".ci/run", "docker/install.sh"} <= names


@pytest.mark.parametrize("path", _shell_scripts(), ids=lambda p: str(p.relative_to(ROOT)))
def test_shellcheck_accepts(path: Path) -> None:
    assert _shellcheck(str(path)) == ""


@pytest.mark.parametrize("section", ["post", "environment", "runscript", "test"])
def test_shellcheck_accepts_the_definition(section: str) -> None:
    assert _shellcheck("--shell=sh", "-", text=Definition().sections[section]) == ""


def test_shellcheck_does_look() -> None:
    assert "SC2086" in _shellcheck("--shell=sh", "-", text="cd $1\n")
