"""What a probe measured on a cluster's own GPUs, beside the site's profile, and what it changes.

A plan errs in three ways that one probe can tell: its shares of the GPU's figures, the speed of the
host, and what a step takes beside the tensors that are counted. The measuring is `probe.py`'s.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moored.utils.atomic_dir import write_json
from moored.utils.errors import UserError

MOST = 20.0  # a plan that is wrong by more was not of the same machine


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """Measured over planned, on one kind of GPU.

    Attributes:
        gpu: the GPU, as plans name it.
        gpu_factor: of the seconds in which a GPU computes and sends.
        host_factor: of the seconds in which a processor starts kernels, over those of the fastest
            machine that was measured (see `step_time`).
        memory_factor: of the bytes that torch allocates at most.
        recipe: the probed recipe, by name.
        date: when, in ISO 8601.
    """

    gpu: str
    gpu_factor: float
    host_factor: float
    memory_factor: float
    recipe: str
    date: str

    def __str__(self) -> str:
        return (
            f"probed with {self.recipe} on {self.date}: GPU {self.gpu_factor:.2f}, host "
            f"{self.host_factor:.2f}, memory {self.memory_factor:.2f} times what is planned without"
        )


def calibration_file(profile: Path) -> Path:
    """Where the probes of a site are kept: beside its profile, `NAME.probe.json`."""
    return profile.with_name(f"{profile.stem}.probe.json")


def keep(calibration: Calibration, profile: Path) -> Path:
    """Keep what was measured beside a site's profile; one for each kind of GPU, the newest.

    Raises:
        UserError: the folder cannot be written.
    """
    path = calibration_file(profile)
    known = [one for one in _read(path) if one.gpu != calibration.gpu]
    try:
        write_json(path, {"probes": [asdict(one) for one in (*known, calibration)]})
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror or error}): copy the site's profile into a "
            "folder of yours and give its path by --site"
        ) from error
    return path


def kept(profile: Path, gpu: str) -> Calibration | None:
    """What was measured on a site's GPUs of that name; None where nothing was.

    Raises:
        UserError: the file is there, and broken.
    """
    return next((one for one in _read(calibration_file(profile)) if one.gpu == gpu), None)


def _read(path: Path) -> list[Calibration]:
    try:
        probes: list[dict[str, Any]] = json.loads(path.read_text())["probes"]
        found = [Calibration(**one) for one in probes]
        factors = [(x.gpu_factor, x.host_factor, x.memory_factor) for x in found]
        if any(not 1 / MOST <= f <= MOST for each in factors for f in each):
            raise ValueError("a factor is out of bounds")
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no record of probes ({error}): remove it") from error
    return found
