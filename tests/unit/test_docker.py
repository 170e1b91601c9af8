"""The two image definitions: one base, one script, one set of versions, and nothing else inside.

No engine is here to build them, so what they consist of is checked part by part. The steps they run
are run for real in `test_docker_install.py`.
"""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import moored
from dockerkit import DOCKER, ROOT, SCRIPTS, Definition, Dockerfile, check

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONSTRAINTS = check.read_pins([DOCKER / "constraints.txt"])
INSIDE = "/opt/moored/"
STEPS = ["system", "packages", "moored", "check"]


@pytest.fixture(scope="module")
def dockerfile() -> Dockerfile:
    return Dockerfile()


@pytest.fixture(scope="module")
def definition() -> Definition:
    return Definition()


def test_both_are_the_same_image(dockerfile: Dockerfile, definition: Definition) -> None:
    assert definition.header == {"Bootstrap": "docker", "From": dockerfile.image}
    assert definition.arguments == dockerfile.arguments
    labels = dict(line.split(" ", 1) for line in definition.lines("labels"))
    assert labels == {**dockerfile.labels, "org.opencontainers.image.revision": "unknown"}
    assert labels["org.opencontainers.image.version"] == moored.__version__ == PROJECT["version"]
    assert labels["org.opencontainers.image.licenses"] == PROJECT["license"]

    assert definition.environment() == dockerfile.environment
    assert dockerfile.environment["PATH"] == f"{INSIDE}venv/bin:$PATH"


def test_both_run_the_steps_of_the_one_script(
    dockerfile: Dockerfile, definition: Definition
) -> None:
    expected = [f"bash {INSIDE}docker/install.sh {step}" for step in STEPS]
    assert dockerfile.all("RUN") == expected
    index = 'export TORCH_INDEX_URL="{}"'.format(dockerfile.arguments["TORCH_INDEX_URL"])
    assert definition.lines("post") == [index, *expected[:-1]]
    assert definition.lines("test") == [index, expected[-1]]


def test_the_script_meets_its_files_and_its_arguments(dockerfile: Dockerfile) -> None:
    """Each step of a layered build has what it reads, and the torch index is in scope."""
    names = [name for name, _ in dockerfile.instructions]
    runs = [i for i, name in enumerate(names) if name == "RUN"]
    index = next(
        i for i, (_, value) in enumerate(dockerfile.instructions) if "TORCH_INDEX_URL=" in value
    )
    assert names.index("FROM") < runs[0] < index < runs[1], "an ARG counts from where it stands"
    before_packages = [
        value for name, value in dockerfile.instructions[: runs[1]] if name == "COPY"
    ]
    assert before_packages == [
        f"docker/install.sh {INSIDE}docker/",
        f"docker/constraints*.txt {INSIDE}docker/",
        f"pyproject.toml {INSIDE}",
    ]
    assert f". {INSIDE}" in [value for _, value in dockerfile.instructions[runs[1] : runs[2]]]


def test_nothing_stands_between_srun_and_python(
    dockerfile: Dockerfile, definition: Definition
) -> None:
    assert dockerfile.all("ENTRYPOINT") == ["[]"], "the base image's own has to be taken away"
    assert definition.lines("runscript") == ['exec moored "$@"']
    user = dockerfile.all("USER")[-1]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user), "a number: the uid may have no name"
    assert dockerfile.instructions.index(("USER", user)) < max(
        i for i, (name, _) in enumerate(dockerfile.instructions) if name == "RUN"
    ), "the last step, the check, is not root's"


def test_caches_and_secrets_are_left_to_the_user(
    dockerfile: Dockerfile, definition: Definition
) -> None:
    texts = [(DOCKER / name).read_text() for name in ("Dockerfile", "moored.def", "install.sh")]
    for name in ("HF_HOME", "HF_HUB_CACHE", "MOORED_CACHE", "TORCH_EXTENSIONS_DIR", "HF_TOKEN"):
        for text in texts:
            assert not re.search(rf"^[^#\n]*\b{name}\b", text, flags=re.MULTILINE), name
    names = {*dockerfile.arguments, *dockerfile.environment, *definition.environment()}
    secret = re.compile("TOKEN|PASSWORD|SECRET|CREDENTIAL|_KEY", re.IGNORECASE)
    assert not [name for name in names if secret.search(name)]
    assert not re.search(r"://[^/\s]*@", "".join(texts)), "user names in an URL"


# What goes in.


def _ignored(path: str) -> bool:
    """Docker's rule: the last pattern that matches the path, or a folder above it, decides."""
    ignored = False
    above = [str(p) for p in (Path(path), *Path(path).parents) if p != Path(".")]
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        pattern = re.escape(line.removeprefix("!"))
        pattern = pattern.replace(r"\*\*/", "(?:.*/)?").replace(r"\*", "[^/]*")
        if any(re.fullmatch(pattern, candidate) for candidate in above):
            ignored = not line.startswith("!")
    return ignored


def _named_in_dockerignore() -> set[str]:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert next(line for line in lines if line and not line.startswith("#")) == "*"
    return {line[1:] for line in lines if line.startswith("!") and "/" not in line}


def test_what_is_copied_exists_and_is_in_sight(
    dockerfile: Dockerfile, definition: Definition
) -> None:
    for sources, target in dockerfile.copies():
        assert target.startswith(INSIDE)
        for source in sources:
            found = [path.relative_to(ROOT) for path in ROOT.glob(source)] if source != "." else []
            assert found or source == "."
            assert not [path for path in found if _ignored(str(path))]
    named = _named_in_dockerignore()
    assert not [name for name in named if not (ROOT / name).exists()]

    pairs = [line.split() for line in definition.lines("files")]
    assert [target for _, target in pairs] == [INSIDE + source for source, _ in pairs]
    copied = {source for source, _ in pairs}
    assert {source.split("/")[0] for source in copied} == named
    assert not [source for source in copied if not (ROOT / source).exists()]
    inside_docker = {
        str(path.relative_to(ROOT))
        for path in DOCKER.iterdir()
        if not _ignored(str(path.relative_to(ROOT)))
    }
    assert {source for source in copied if source.startswith("docker/")} == inside_docker
    assert {"recipes", "slurm", "launch", "src"} <= copied


@pytest.mark.parametrize(
    "path",
    [
        ".git/config",
        ".gitignore",
        ".venv/bin/python",
        ".env",
        ".netrc",
        "mlflow.db",
        "runs/a/journal.jsonl",
        "recipes/mine/runs/a/state.json",
        "recipes/.env",
        "slurm/sites/.env.local",
        "slurm/id.pem",
        "launch/.netrc",
        "docker/pip.conf",
        "docker/README.md",
        "src/moored.egg-info/PKG-INFO",
        "src/moored/__pycache__/cli.cpython-312.pyc",
        "tests/conftest.py",
    ],
)
def test_what_stays_out(path: str) -> None:
    assert _ignored(path)


@pytest.mark.parametrize(
    "path",
    [
        "src/moored/report/__init__.py",
        "recipes/quickstart/train.jsonl",
        "slurm/sites/example.yaml",
        "launch/local",
        "docker/install.sh",
        "docker/constraints-cu130.txt",
        "pyproject.toml",
    ],
)
def test_what_goes_in(path: str) -> None:
    assert not _ignored(path)


# Versions.


def test_base_image_and_torch_are_pinned_and_of_one_cuda(dockerfile: Dockerfile) -> None:
    tag = re.fullmatch(
        r"docker\.io/nvidia/cuda:(\d+)\.(\d+)\.\d+-\w+-ubuntu\d+\.\d+", dockerfile.image
    )
    assert tag, f"{dockerfile.image}: registry, name and full version, so that it means one image"
    build = f"cu{tag[1]}{tag[2]}"
    assert dockerfile.arguments["TORCH_INDEX_URL"] == f"https://download.pytorch.org/whl/{build}"
    pins = check.read_pins([DOCKER / f"constraints-{build}.txt"])
    assert pins["cuda-toolkit"].startswith(f"{tag[1]}.{tag[2]}.")
    assert not pins.keys() & CONSTRAINTS.keys()


@pytest.mark.parametrize("path", sorted(DOCKER.glob("constraints*.txt")), ids=lambda p: p.name)
def test_constraints_are_pins_and_nothing_else(path: Path) -> None:
    lines = [x for x in path.read_text().splitlines() if x and not x.startswith("#")]
    assert not [x for x in lines if not re.fullmatch(r"[\w.-]+==[0-9][\w.]*", x)]
    assert len(lines) == len(check.read_pins([path])), "a name stands twice"


def test_what_the_project_asks_for_is_pinned_within_its_ranges() -> None:
    extras = PROJECT["optional-dependencies"]
    for line in [*PROJECT["dependencies"], *(line for extra in extras.values() for line in extra)]:
        needed = Requirement(line)
        if needed.name != PROJECT["name"]:
            assert needed.specifier.contains(CONSTRAINTS[canonicalize_name(needed.name)]), line


def test_hadolint_accepts_the_dockerfile(tmp_path: Path) -> None:
    command = [str(SCRIPTS / "hadolint"), "--no-color"]
    good = [*command, str(DOCKER / "Dockerfile")]
    done = subprocess.run(good, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    (tmp_path / "Dockerfile").write_text("FROM debian\nRUN cd /tmp\n")
    bad = [*command, "Dockerfile"]
    done = subprocess.run(bad, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert "DL3006" in done.stdout
