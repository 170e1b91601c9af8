"""What a job needs, kept beside its run when it is submitted: recipe, code, what it expects.

So an edit between submission and start changes nothing, and a file that changed all the same is
noticed (`preflight.py`).
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import moored
from moored.config import Config
from moored.config.local_files import fingerprints, input_files
from moored.slurm.site import Site
from moored.tracking.run_directory import RunDirectory
from moored.utils.atomic_dir import replacing, write_atomically
from moored.utils.environment import PACKAGES, installed_versions
from moored.utils.json_files import write_json


def keep_recipe(config: Config, run: Path) -> None:
    """Write the resolved recipe into the run's folder for the job."""
    folder = RunDirectory(run).slurm
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_atomically(folder / "recipe.yaml", config.dump_yaml().encode())


def keep_code(folder: Path) -> None:
    """Copy this package into `folder/slurm/code`, in the place of an earlier copy."""
    source = Path(moored.__file__).resolve().parent
    code = RunDirectory(folder).slurm / "code"
    if source.is_relative_to(code.resolve()):
        return  # submitted by a job: it runs the copy already
    with replacing(code) as new:
        shutil.copytree(source, new / "moored", ignore=shutil.ignore_patterns("__pycache__"))


def keep_expectations(configs: Sequence[Config], folder: Path, site: Site) -> None:
    """Write what every node must find, for `moored preflight`."""
    same_python = site.container.runtime == "none" and site.environment.python is None
    expected = {
        "files": fingerprints(dict.fromkeys(path for c in configs for path in input_files(c))),
        "versions": installed_versions(("python", *PACKAGES)) if same_python else {},
        "gpus": site.slurm.gpus_per_node,
        "min_free_gib": site.storage.min_free_gib,
        "min_bandwidth_gbit": site.network.min_bandwidth_gbit,
        "max_clock_skew_seconds": site.network.max_clock_skew_seconds,
    }
    write_json(RunDirectory(folder).slurm / "expected.json", expected)
