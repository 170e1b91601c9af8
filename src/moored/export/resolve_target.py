"""What `moored export` is given, checked: a finished run, or an adapter and the recipe of its base.

Nothing is written here.
"""

from __future__ import annotations

import contextlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moored.config import Config, load_config
from moored.models.base_files import BaseFiles
from moored.tracking.run_directory import RunDirectory
from moored.training import checkpoint
from moored.utils import atomic_dir
from moored.utils.errors import UserError

log = logging.getLogger(__name__)

ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
FINISHED = ("done", "evaluation_failed")  # the latter has its adapter, and lacks figures


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportInput:
    """What is exported.

    Attributes:
        path: as the user named it: a run directory, or an adapter's folder.
        run: the run; None for an adapter from elsewhere.
        config: the run's recipe, or the one that says which base an adapter is for.
        adapter: its folder.
        report: the file or folder that the user named; None: a run's own.
    """

    path: Path
    run: RunDirectory | None
    config: Config
    adapter: Path
    report: Path | None = None

    @property
    def name(self) -> str:
        """The run's name, or that of the adapter's folder."""
        return self.config.name if self.run is not None else self.path.resolve().name

    def report_file(self, scale: float) -> Path | None:
        """Where the figures of the adapter at a scale are, if they were measured."""
        if self.run is not None:
            return (self.run.report if scale == 1 else self.run.path / "scales") / "report.json"
        if self.report is None or self.report.is_file():
            return self.report
        return self.report / "report.json"


def open_input(path: Path, recipe: Path | None, report: Path | None) -> ExportInput:
    """Check what is to be exported.

    Raises:
        UserError: it is neither a finished run nor an adapter with a recipe.
    """
    run = RunDirectory(path)
    if run.config.is_file():
        for name, value in (("--recipe", recipe), ("--report", report)):
            if value is not None:
                raise UserError(f"{name} {value}: {path} is a run, which has its own: leave it out")
        return ExportInput(path=path, run=run, config=_finished(run), adapter=run.adapter)
    if not (path / ADAPTER[0]).is_file():
        raise UserError(
            f"{path} is not a run directory: name a folder that holds config.yaml and state.json, "
            "such as runs/NAME, or a PEFT adapter"
        )
    if recipe is None:
        raise UserError(
            f"{path} is an adapter without a recipe: add --recipe RECIPE.yaml to say which base it "
            "is for and on which data to verify it, or name the run above it"
        )
    if not (path / ADAPTER[1]).is_file():
        raise UserError(
            f"{path / ADAPTER[1]} is missing: save the adapter again with PEFT's save_pretrained"
        )
    given = ExportInput(
        path=path, run=None, config=load_config(recipe), adapter=path, report=report
    )
    file = given.report_file(1.0)
    if file is not None and not file.is_file():
        raise UserError(
            f"--report {report}: no such report: name what `moored evaluate {path} --recipe "
            f"{recipe}` wrote, such as ./report"
        )
    return given


def _finished(run: RunDirectory) -> Config:
    path = run.path
    if (path / "arms").is_dir():
        raise UserError(f"{path} is a comparison: name one of its arms, {path / 'arms'}/*")
    config = load_config(run.config)
    state = run.state()
    status = state.get("status", "not started")
    if status not in FINISHED and not _was_refused_at_its_end(run, state):
        step = (
            f" after step {state['step']} of {state['num_steps']}" if "num_steps" in state else ""
        )
        why = f" ({' '.join(str(state['reason']).split())[:160]})" if state.get("reason") else ""
        go_on = "start its `moored train` command again, which goes on from the newest checkpoint"
        if status == "running":
            go_on = f"wait for it, or {go_on}"
        elif status == "refused" and not _is_through(state):
            go_on = "mend that in the recipe, and train it with another name=... or --restart"
        raise UserError(f"{path} is not finished, its status is {status}{step}{why}: {go_on}")
    _require_whole(run, state)
    return config


def _was_refused_at_its_end(run: RunDirectory, state: dict[str, Any]) -> bool:
    """Whether all steps were made and the adapter exported, before its budget was found broken."""
    exported = all((run.adapter / name).is_file() for name in ADAPTER)
    return state.get("status") == "refused" and _is_through(state) and exported


def _is_through(state: dict[str, Any]) -> bool:
    return "step" in state and state["step"] == state.get("num_steps")


def _require_whole(run: RunDirectory, state: dict[str, Any]) -> None:
    """The adapter is there, and is that of the last checkpoint, whose hash is known."""
    for name in ADAPTER:
        if not (run.adapter / name).is_file():
            raise UserError(
                f"{run.adapter / name} is missing: copy it from the newest checkpoint, "
                f"{run.checkpoints}/*/adapter"
            )
    last = checkpoint.folder_of(run.checkpoints, state.get("step", 0))
    with contextlib.suppress(OSError, ValueError, KeyError):  # checkpoints may have been removed
        expected = atomic_dir.read_manifest(last)["files"][f"adapter/{ADAPTER[1]}"]["sha256"]
        if expected != atomic_dir.sha256(run.adapter / ADAPTER[1]):
            raise UserError(
                f"{run.adapter / ADAPTER[1]} is not as it was written: copy it again from "
                f"{last / 'adapter'}"
            )


def base_of(config: Config, base: str | None, *, merged: bool) -> str | None:
    """What is merged into; None: nothing is merged.

    Raises:
        UserError: the option would have no effect, or there is no such base.
    """
    if not merged:
        if base is not None:
            raise UserError(f"--base {base} says what is merged into: add --merge, or leave it out")
        return None
    if base == "nf4" and config.model.quantization == "none":
        raise UserError("--base nf4: the run's base is not quantised: leave --base out")
    return base or "w16"


def warn_of_another_base(run: RunDirectory | None, config: Config, located: BaseFiles) -> None:
    """Say where the base is not quite the one that the adapter was trained on."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        file = None if run is None else run.report / "report.json"
        trained = json.loads(file.read_text())["base"]["revision"] if file else None
        if trained is not None and trained != located.source.revision:
            log.warning(
                "%s was %s when the run was evaluated, and is %s now",
                config.model.name_or_path,
                trained,
                located.source.revision,
            )
