"""The same run for several regularisers, and one report over them.

Each arm is an ordinary run below the comparison's own directory; nothing is trained here.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

from rich.console import Console

from moored.config import Config
from moored.evaluation.generate import answered_in
from moored.evaluation.report import Report, merge, show, write
from moored.models.engine import leave
from moored.tracking import Tracker
from moored.tracking.journal import metrics
from moored.tracking.run_directory import RunDirectory, path_of
from moored.training import train
from moored.training.lifecycle import (
    asked_to_stop,
    ending,
    join_mesh,
    open_run_on_all_ranks,
    signals_seen,
    start_tracking,
)
from moored.utils.errors import PreemptedError, TrainingRefusedError
from moored.utils.log import setup


def run(config: Config, *, restart: bool = False) -> Path:
    """Train every arm of `config.compare`, with every seed, and report on them together.

    An interrupted comparison goes on where it stopped; finished arms are not run again.

    Returns:
        The comparison's directory: `arms/NAME/` are run directories, `report/` is over all.

    Raises:
        TrainingRefusedError: arms were refused (a broken budget, say); the others went on, and are
            reported on together with those that were refused after they were measured.
        MooredError: an arm's; the arms before it are kept.
    """
    os.umask(0o077)
    mesh = join_mesh(config)
    path = path_of(config)
    with contextlib.ExitStack() as stack:
        stack.callback(leave)
        directory, attempt = open_run_on_all_ranks(
            stack, config, path, mesh, restart=restart, kind="comparison"
        )
        setup(mesh.world.rank, path)
        stack.callback(setup, mesh.world.rank, path)  # an arm logs to its own file, to its end
        tracker = start_tracking(config, path, attempt, mesh)
        stack.enter_context(ending(directory, tracker, mesh))
        signals = stack.enter_context(signals_seen())  # between arms; an arm has its own
        base_answered = None  # generated once, by the first arm
        measured: list[str] = []
        refused: list[str] = []
        for name, arm in config.arms().items():
            if asked_to_stop(mesh, signals):
                raise PreemptedError(
                    f"stopped by a signal before arm {name}: start the same command again to go on"
                )
            if mesh.is_main:
                Console(stderr=True).rule(f"arm {name}")
            place = directory.arm(name)
            try:
                train.run(arm, path=place.path, arm=name, parent=path, base_answered=base_answered)
            except TrainingRefusedError as error:
                refused.append(f"arm {name}: {error}")
            file = place.report / "report.json"
            if mesh.world.broadcast(file.exists()):  # who broke a budget in the end has one, too
                base_answered = answered_in(Report.read(file).base)
                measured.append(name)
        if mesh.is_main and measured:
            _report(directory, measured, tracker)
        mesh.world.barrier()
        if refused:
            raise TrainingRefusedError("; ".join(refused))
    return path


def _report(directory: RunDirectory, names: list[str], tracker: Tracker) -> None:
    arms = {name: directory.arm(name) for name in names}
    report = merge([Report.read(arm.report / "report.json") for arm in arms.values()])
    curves = {name: metrics(arm.path) for name, arm in arms.items()}
    write(report, directory.report, curves=curves)
    tracker.artifact(directory.report, "report")
    show(report, sys.stdout)
