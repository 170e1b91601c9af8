"""What the tests of the images share: the two definitions, as Docker and Apptainer read them."""

from __future__ import annotations

import importlib.util
import re
import shlex
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

from dockerfile_parse import DockerfileParser

ROOT = Path(__file__).parents[1]
DOCKER = ROOT / "docker"
SCRIPTS = Path(sysconfig.get_path("scripts"))


def _load_check() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docker_check", DOCKER / "check.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


check = _load_check()


class Dockerfile:
    def __init__(self) -> None:
        parsed = DockerfileParser(path=str(DOCKER / "Dockerfile"))
        self.instructions = [
            (part["instruction"], part["value"])
            for part in parsed.structure
            if part["instruction"] != "COMMENT"
        ]
        self.arguments = dict(value.split("=", 1) for value in self.all("ARG"))
        self.labels: Mapping[str, str] = parsed.labels
        words = [word for value in self.all("ENV") for word in shlex.split(value)]
        self.environment = dict(word.split("=", 1) for word in words)
        self.image: str = parsed.baseimage

    def all(self, instruction: str) -> list[str]:
        return [value for name, value in self.instructions if name == instruction]

    def copies(self) -> list[tuple[list[str], str]]:
        words = [shlex.split(value) for value in self.all("COPY")]
        return [(line[:-1], line[-1]) for line in words]


class Definition:
    def __init__(self) -> None:
        text = (DOCKER / "moored.def").read_text()
        header, *parts = re.split(r"^%(\w+)\n", text, flags=re.MULTILINE)
        bodies = dict(zip(parts[::2], parts[1::2], strict=True))
        assert len(bodies) * 2 == len(parts), "a section stands twice"
        self.arguments = dict(
            line.strip().split("=", 1) for line in bodies["arguments"].splitlines() if line.strip()
        )
        fields = re.findall(r"^(\w+): *(.*)$", self._fill(header), flags=re.MULTILINE)
        self.header = dict(fields)
        self.sections = {name: self._fill(body) for name, body in bodies.items()}

    def _fill(self, text: str) -> str:
        return re.sub(r"\{\{ *(\w+) *\}\}", lambda found: self.arguments[found[1]], text)

    def lines(self, section: str) -> list[str]:
        return [line.strip() for line in self.sections[section].splitlines() if line.strip()]

    def environment(self) -> dict[str, str]:
        pairs = (line.removeprefix("export ").split("=", 1) for line in self.lines("environment"))
        return {name: value.strip('"') for name, value in pairs}
