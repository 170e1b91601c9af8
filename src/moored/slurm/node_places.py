"""Where the folder `slurm/` lies: in a checkout beside the package, else where it was installed."""

from __future__ import annotations

import sysconfig
from pathlib import Path

from moored.utils.errors import UserError

TEMPLATE = "train.sbatch.j2"


def slurm_folder() -> Path:
    """The folder of the templates and of `sites/`.

    Raises:
        UserError: the installation lacks it.
    """
    checkout = Path(__file__).resolve().parents[3] / "slurm"
    installed = Path(sysconfig.get_path("data")) / "share" / "moored" / "slurm"
    for folder in (checkout, installed):
        if (folder / TEMPLATE).is_file():
            return folder
    raise UserError(f"{installed} is missing: install moored again (pip install --force-reinstall)")
