"""The steps that make an image, run for real into a venv, and the check that they end with."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import moored
from dockerkit import DOCKER, ROOT, check

CONSTRAINTS = check.read_pins([DOCKER / "constraints.txt"])


def _run(step: str, venv: Path, home: Path, **more: str) -> subprocess.CompletedProcess[str]:
    environment = {
        "PATH": "/usr/bin:/bin",
        "HOME": str(home),
        "TMPDIR": os.environ.get("TMPDIR", "/tmp"),
        "MOORED_VENV": str(venv),
        # Whatever is not here already is an error, not a download.
        "PIP_INSTALL_FLAGS": "--no-index --no-build-isolation",
        "PIP_CONFIG_FILE": os.devnull,
        **more,
    }
    command = ["bash", str(DOCKER / "install.sh"), step]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def _files(folder: Path) -> set[Path]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc")
    return {path.relative_to(folder) for path in files}


def test_the_steps_make_a_whole_installation(tmp_path: Path) -> None:
    """All but `system`, into a fresh venv that sees this one's packages and holds Moored itself."""
    venv, home = tmp_path / "venv", tmp_path / "home"
    home.mkdir()
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    fresh = Path(sysconfig.get_path("purelib", vars={"base": str(venv)}))
    seen = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (fresh / "outer.pth").write_text("\n".join(seen))
    traces = [ROOT / "build", ROOT / "src" / "moored.egg-info"]
    before = [path.exists() and path.stat().st_mtime_ns for path in traces]

    for step in ("packages", "moored", "check"):
        done = _run(step, venv, home)
        assert done.returncode == 0, done.stdout + done.stderr
    assert f"moored {moored.__version__} is whole" in done.stdout

    said = subprocess.run(
        [venv / "bin" / "moored", "--version"], capture_output=True, text=True, check=True, cwd="/"
    )
    assert moored.__version__ in said.stdout
    where = subprocess.run(
        [venv / "bin" / "python", "-c", "import moored; print(moored.__file__)"],
        capture_output=True,
        text=True,
        check=True,
        cwd="/",
    )
    assert where.stdout.strip() == str(fresh / "moored" / "__init__.py")
    assert _files(fresh / "moored") == _files(ROOT / "src" / "moored")

    assert not list(home.rglob("*")), "nothing is written into a home"
    after = [path.exists() and path.stat().st_mtime_ns for path in traces]
    assert after == before, "nothing is left beside the sources"


def test_installed_versions_are_the_constraints() -> None:
    assert check.version_problems(CONSTRAINTS) == []
    needed = check.closure("moored", "train")
    assert len(needed) > 50
    assert {"torch", "deepspeed", "mlflow", "numpy"} <= needed.keys()


def test_the_check_sees_another_version_and_a_missing_pin() -> None:
    pins = {**CONSTRAINTS, "peft": "0.1"}
    del pins["numpy"]
    problems = check.version_problems(pins)
    assert len(problems) == 2
    assert "numpy" in problems[0]
    assert "no constraint names it" in problems[0]
    assert problems[1].endswith("the constraint is 0.1")


def test_the_check_sees_another_build_of_torch() -> None:
    (problem,) = check.build_problems("cu999")
    assert problem.endswith("build, but cu999 was asked for")
    assert check.build_problems("") == check.build_problems("nightly") == []


def test_a_step_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    done = _run("everything", tmp_path, tmp_path)
    assert done.returncode == 2
    assert "'everything'" in done.stderr
