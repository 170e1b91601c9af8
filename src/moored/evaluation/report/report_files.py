"""Reports on disk: the three files of a report, and `moored report RUN ...` over finished runs.

What stands in them is decided by the rest of this room.
"""

from __future__ import annotations

import json
import logging
import platform
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moored.evaluation.report.results import Report, merge
from moored.evaluation.report.terminal import show
from moored.tracking import Tracker
from moored.tracking.journal import metrics
from moored.utils.atomic_dir import private_files, write_atomically
from moored.utils.environment import version_of
from moored.utils.errors import UserError

if TYPE_CHECKING:
    from moored.config import Config
    from moored.evaluation.report.drawing import Curves

log = logging.getLogger(__name__)


def write(report: Report, folder: Path, *, curves: Curves | None = None) -> Path:
    """Write report.json, report.html and frontier.png, each of them whole or not at all.

    Args:
        report: the figures.
        folder: made where it is not there.
        curves: arm -> metric -> (step, value), for the page.

    Returns:
        The folder.

    Raises:
        UserError: the figures contradict themselves, or the folder cannot be written.
    """
    # matplotlib takes half a second, of every rank's start if it stood above.
    from moored.evaluation.report.frontier import frontier_png
    from moored.evaluation.report.page import html

    folder = Path(folder)
    data = report.to_json()
    Report.from_json(data, source=f"figures for {folder / 'report.json'}")
    text = json.dumps(data, indent=1, allow_nan=False)
    # Each list of plain numbers on one line; strings hold no line breaks.
    numbers = re.compile(r"\[\n([^\[\]{}\"]*)\]")
    content = numbers.sub(lambda match: f"[{' '.join(match[1].split())}]", text) + "\n"
    try:
        with private_files():
            # The figures first: they cost a training run, the pictures can be drawn again.
            write_atomically(folder / "report.json", content.encode())
            write_atomically(folder / "report.html", html(report, curves).encode())
            write_atomically(folder / "frontier.png", frontier_png(report))
    except OSError as error:
        raise UserError(
            f"{folder}: the report cannot be written: {error.strerror or error}: choose another "
            "folder, or make room"
        ) from error
    return folder


def run_command(runs: Sequence[Path], out: Path | None = None) -> Path:
    """`moored report RUN ...`: the table on the terminal, the files in a folder.

    One run's own report is drawn anew, with the curves of its journal; several runs over one base
    become one report.

    Args:
        runs: run directories (of `train` or `compare`), or folders or files of reports.
        out: where to write; by default the run's own `report`, for several runs `./report`.

    Returns:
        The folder that was written.

    Raises:
        UserError: a run has no report, or the runs do not share a base.
    """
    runs = list(dict.fromkeys(Path(run).absolute() for run in runs))
    if not runs:
        raise UserError("no run given: name at least one run directory")
    whole = runs[0]
    if len(runs) == 1 and (arms := _arms(whole)):
        runs, out = arms, out or whole / "report"
    places = [_report_file(run) for run in runs]
    reports = [Report.read(place) for place in places]
    merged = merge(reports, labels=labels_of(runs)) if len(reports) > 1 else reports[0]
    # merge keeps the order of the arms, whatever it calls them.
    names = iter(merged.arms)
    curves = {
        next(names): _curves(run, name, alone=len(report.arms) == 1)
        for run, report in zip(runs, reports, strict=True)
        for name in report.arms
    }
    if out is None:
        out = places[0].parent if len(runs) == 1 else Path("report")
    write(merged, out, curves=curves)
    if out == whole / "report":
        Tracker.hand_over(whole, out, "report")
    show(merged, sys.stdout)
    print(f"\nreport  {out / 'report.html'}\nplot    {out / 'frontier.png'}", flush=True)
    return out


def _arms(run: Path) -> list[Path]:
    """The arms of a sweep, or of a comparison without a report of its own, that were measured."""
    if (run / "report" / "report.json").is_file() and not (run / "slurm" / "arms.json").is_file():
        return []
    arms = sorted(path for path in (run / "arms").glob("*") if path.is_dir())
    missing = [arm.name for arm in arms if not (arm / "report" / "report.json").is_file()]
    if arms and len(missing) == len(arms):
        raise UserError(f"{run}: none of its {len(arms)} arms has been measured yet: finish one")
    if missing:
        said = "%d of %d arms are not in the report, since they did not end: %s"
        log.warning(said, len(missing), len(arms), ", ".join(missing[:10]))
    return [arm for arm in arms if arm.name not in missing]


def _report_file(run: Path) -> Path:
    if run.is_file():
        return run
    if not run.is_dir():
        raise UserError(f"{run}: no such run directory: check the path")
    for place in (run / "report" / "report.json", run / "report.json"):
        if place.is_file():
            return place
    fix = "name a finished run, or finish this one"
    if (run / "adapter" / "adapter_config.json").is_file():
        fix = f"measure it with `moored evaluate {run}`"
    raise UserError(f"{run} has no report/report.json: {fix}")


def labels_of(runs: Sequence[Path]) -> list[str]:
    """Folder names, with as many parents as tell them apart."""
    for depth in range(1, 1 + max(len(run.parts) for run in runs)):
        labels = ["/".join(run.parts[-depth:]) for run in runs]
        if len(set(labels)) == len(labels):
            return labels
    return [str(run) for run in runs]


def _curves(run: Path, arm: str, *, alone: bool) -> dict[str, list[tuple[int, float]]]:
    """The journal of an arm: below a comparison in `arms/NAME`, else the run's own."""
    if run.is_file() or (run / "report.json").is_file():
        run = run.parent.parent if run.is_file() else run.parent
    # A name is no path: one from a foreign report must not lead out of the run.
    if Path(arm).name == arm and (run / "arms" / arm).is_dir():
        return metrics(run / "arms" / arm)
    return metrics(run) if alone else {}


_PACKAGES = ("moored", "torch", "transformers", "peft", "bitsandbytes", "deepspeed")


def settings_of(config: Config) -> dict[str, str]:
    """What repeats a run: its recipe in a few lines, and versions. No secrets: no URIs, no tags."""
    adapter, optim, train, parallel = config.adapter, config.optim, config.train, config.parallel
    targets = adapter.target_modules
    targets = targets if isinstance(targets, str) else ", ".join(targets)
    sequences, tokens = train.global_batch_sequences, train.global_batch_tokens
    warmup = f", {optim.warmup_steps} warm-up steps" if optim.warmup_steps else ""
    versions = [f"{name} {version_of(name)}" for name in _PACKAGES]
    return {
        "recipe": config.name,
        "adapter": f"{adapter.method}, r {adapter.r}, alpha {adapter.alpha:g}, "
        f"dropout {adapter.dropout:g}, {targets}",
        "learning rate": f"{optim.learning_rate:g}, {optim.schedule}{warmup}",
        "length": f"{train.steps} steps" if train.steps else f"{train.epochs:g} epochs",
        "global batch": f"{sequences} sequences" if sequences else f"{tokens} tokens",
        "longest sample": f"{config.data.max_length} tokens"
        + (", packed" if config.data.packing else ""),
        "parallel": f"ZeRO stage {parallel.zero_stage}, "
        f"tensor parallel degree {parallel.tensor_parallel_degree}",
        "versions": ", ".join([*versions, f"Python {platform.python_version()}"]),
    }
