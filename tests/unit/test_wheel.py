"""What people install: the wheel, with torch alone beside it, and with everything."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from tiny import tiny_recipe, write_recipe

ROOT = Path(__file__).resolve().parents[2]
SITE = Path(sysconfig.get_path("purelib"))
HEAVY = ("transformers", "peft", "pydantic", "yaml", "click", "numpy", "datasets", "mlflow")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel that was made of it."""
    folder = tmp_path_factory.mktemp("built")
    source = folder / "source"
    kept = ("pyproject.toml", "README.md", "LICENSE", "src")
    for name in kept:
        place = ROOT / name
        if place.is_dir():
            ignored = shutil.ignore_patterns("*.egg-info", "__pycache__")
            shutil.copytree(place, source / name, ignore=ignored)
        else:
            source.mkdir(exist_ok=True)
            shutil.copy(place, source)
    command = [
        sys.executable,
        "-m",
        "build",
        "--no-isolation",
        "--outdir",
        str(folder),
        str(source),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def _python(folder: Path, wheel: Path) -> tuple[Path, Path]:
    """A fresh interpreter with the wheel installed, and where its packages lie."""
    venv.create(folder, with_pip=False)
    (site,) = folder.glob("lib/python*/site-packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    return folder / "bin" / "python", site


def _run(python: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: x for name, x in os.environ.items() if name != "PYTHONPATH"}
    command = [str(python), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def _needs(name: str, found: set[str]) -> set[str]:
    """A distribution and what it requires here, without extras."""
    if name in found:
        return found
    try:
        distribution = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return found  # of another platform
    found.add(name)
    for line in distribution.requires or []:
        if "extra ==" not in line:
            _needs(re.split(r"[^\w.-]", line, maxsplit=1)[0].lower(), found)
    return found


@pytest.fixture(scope="module")
def alone(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter that has the wheel, torch and what torch requires."""
    (wheel,) = built.glob("*.whl")
    python, site = _python(tmp_path_factory.mktemp("alone"), wheel)
    for name in _needs("torch", set()):
        for file in importlib.metadata.files(name) or []:
            top = SITE / file.parts[0]
            if file.parts[0] not in ("..", "__pycache__") and not (site / top.name).exists():
                (site / top.name).symlink_to(top)
    return python


def test_nothing_but_torch_is_required(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
        lines = archive.read(name).decode().splitlines()
    required = [line for line in lines if line.startswith("Requires-Dist") and "extra" not in line]
    assert [re.split(r"[^\w.-]", line.split(": ")[1])[0] for line in required] == ["torch"]
    assert any("extra == 'train'" in line or 'extra == "train"' in line for line in lines)


def test_the_sdist_has_what_the_wheel_needs(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    assert {"pyproject.toml", "LICENSE", "src/moored/plugin/attached.py"} <= names
    assert "src/moored/evaluation/report/templates" in {str(Path(name).parent) for name in names}


def test_with_torch_alone_the_losses_run(alone: Path) -> None:
    script = (
        "import sys, moored\n"
        "assert 'torch' not in sys.modules\n"
        "import moored.plugin\n"
        f"heavy = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "assert not heavy, heavy\n"
        "import torch\n"
        "h = torch.randn(5, 8, requires_grad=True); w = torch.randn(11, 8)\n"
        "y = torch.tensor([1, -100, 3, 4, 10])\n"
        "out = moored.linear_tmkl_loss(h, torch.randn(5, 8), w, y, kl_weight=0.5)\n"
        "out.loss.backward()\n"
        "s = (h.detach() @ w.T).requires_grad_()\n"
        "assert moored.tmkl_loss(s, s.detach(), y).kl.item() < 1e-6\n"
        "assert moored.plugin.Options(0.2).weight == 0.2\n"
        "print(h.grad.isfinite().all().item())\n"
    )
    done = _run(alone, "-W", "ignore", "-c", script)
    assert (done.returncode, done.stdout.strip()) == (0, "True"), done.stderr


def test_with_torch_alone_a_command_says_what_is_missing(alone: Path) -> None:
    for arguments in (["-m", "moored", "--help"], ["-m", "moored", "train", "recipe.yaml"]):
        done = _run(alone, *arguments)
        assert done.returncode == 2
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1
        assert "pip install 'moored[train]'" in done.stderr


def test_the_wheel_trains(built: Path, tmp_path: Path) -> None:
    """Beside all packages of the extra `train`, and without this checkout."""
    (wheel,) = built.glob("*.whl")
    python, site = _python(tmp_path / "venv", wheel)
    (site / "others.pth").write_text(f"{SITE}\n")
    help_text = _run(python, "-m", "moored", "--help")
    assert help_text.returncode == 0, help_text.stderr
    where = _run(python, "-c", "import moored; print(moored.__file__)").stdout.strip()
    assert where == str(site / "moored" / "__init__.py")
    recipe = tiny_recipe(tmp_path / "files")
    path = write_recipe(tmp_path, recipe)
    done = _run(python, "-m", "moored", "train", str(path), "train.steps=2")
    assert done.returncode == 0, done.stdout + done.stderr
    (state,) = tmp_path.glob("**/tiny/state.json")
    assert json.loads(state.read_text())["step"] == 2
