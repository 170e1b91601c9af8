"""`moored evaluate`: finished runs, and adapters that any PEFT-based trainer wrote, measured again.

Never trains; what is measured is `evaluate.py`'s.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from moored.config import Config, load_config
from moored.distributed.mesh import Mesh, degree_for, start_mesh
from moored.evaluation.build_report import TrainedRun, to_report
from moored.evaluation.evaluate import Evaluation, build_suite, evaluate
from moored.evaluation.report import Figures, Report, labels_of, merge, show, write
from moored.evaluation.task_suite import require_harness
from moored.models.adapters import require_scale, scaled
from moored.models.base_files import resolve_base
from moored.models.engine import Engine, leave
from moored.models.policy import load_policy
from moored.tracking.journal import metrics
from moored.tracking.run_directory import RunDirectory
from moored.utils.errors import TrainingRefusedError, UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One adapter to measure.

    Attributes:
        adapter: its folder.
        config: the recipe to measure it by.
        trained_by: the recipe that made it; None for an adapter from elsewhere.
        name: of the arm in the report.
        run: the run that made it; None for an adapter from elsewhere.
        folder: of the report.
    """

    adapter: Path
    config: Config
    trained_by: Config | None
    name: str
    run: RunDirectory | None
    folder: Path


def run_command(
    targets: Sequence[str],
    *,
    recipe: Path | None = None,
    overrides: Sequence[str] = (),
    out: Path | None = None,
    scales: Sequence[float] = (),
    lm_eval: Sequence[str] = (),
    lm_eval_include: Path | None = None,
) -> None:
    """Measure finished runs by their own recipe (or by `recipe`), adapters by `recipe`.

    A report goes into the run, that of an adapter to `./report`; with `out` there. Where several
    would share a folder, each has one of its own below it. With `scales` each adapter is measured
    once per scale, and the report goes to `scales` instead of `report`. With `lm_eval` the
    evaluation harness runs these tasks as well (of its own, or in the folder `lm_eval_include`).

    Raises:
        UserError: a target is neither, or an adapter comes without a recipe; the harness is not
            installed, or has no such task.
    """
    for scale in scales:
        require_scale(scale)
    if lm_eval:
        require_harness("--lm-eval")
    kept = "scales" if scales else "report"
    opened = _open(targets, recipe, overrides, out, kept)
    mesh = start_mesh(
        _degree(opened),
        wait_seconds=max(target.config.parallel.rendezvous_seconds for target in opened),
        folder=opened[0].folder.parent,  # where the report goes, too
    )
    try:
        tasks = _harness().open_tasks(lm_eval, lm_eval_include, mesh) if lm_eval else None
        for target in opened:
            report = _measure(target, mesh, sorted(set(scales)) or [None], tasks)
            if mesh.is_main:
                _write(target, report, at_scales=bool(scales))
            mesh.world.barrier()
    finally:
        leave()


def _degree(targets: Sequence[Target]) -> int:
    """The degree of tensor parallelism that they are measured with, which changes no figure."""
    parallel = [target.config.parallel for target in targets]
    wanted = {p.tensor_parallel_degree for p in parallel}
    degree = degree_for(max(wanted))
    if degree > 1 and len(wanted) > 1:
        raise UserError(
            f"the targets have parallel.tensor_parallel_degree {sorted(wanted)}: add one for all, "
            f"such as parallel.tensor_parallel_degree={degree}"
        )
    return degree


def _open(
    targets: Sequence[str],
    recipe: Path | None,
    overrides: Sequence[str],
    out: Path | None,
    kept: str,
) -> list[Target]:
    paths = list(dict.fromkeys(Path(target).resolve() for target in targets))
    labels = dict(zip(paths, labels_of(paths), strict=True))
    bare = [path for path in paths if not RunDirectory(path).config.exists()]
    opened = []
    for path in paths:
        run = None if path in bare else RunDirectory(path)
        sharing = bare if out is None else paths
        folder = run.path / kept if run is not None and out is None else out or Path(kept)
        if path in sharing and len(sharing) > 1:
            folder = folder / labels[path]
        adapter = path if run is None else run.adapter
        _require_adapter(adapter, run)
        source = recipe or (None if run is None else run.config)
        if source is None:
            raise UserError(
                f"{path} is an adapter without a recipe: add --recipe RECIPE.yaml to say which "
                "base, which data and which retention texts"
            )
        config = load_config(source, list(overrides))
        trained_by, name = None, labels[path]
        if run is not None:
            trained_by = load_config(run.config)
            name = _arm_name(run, trained_by)
        opened.append(
            Target(
                adapter=adapter,
                config=config,
                trained_by=trained_by,
                name=name,
                run=run,
                folder=folder,
            )
        )
    return opened


def _require_adapter(adapter: Path, run: RunDirectory | None) -> None:
    if (adapter / "adapter_config.json").exists():
        return
    if run is None:
        raise UserError(
            f"{adapter} is neither a run directory (config.yaml) nor a PEFT adapter "
            "(adapter_config.json): name one of these"
        )
    if (run.path / "arms").is_dir():
        raise UserError(f"{run.path} is a comparison: name its arms, {run.path / 'arms'}/*")
    raise UserError(f"{run.path} has no adapter yet: start its `moored train` command again")


def _arm_name(run: RunDirectory, config: Config) -> str:
    with contextlib.suppress(UserError, StopIteration):  # a broken one is what is mended here
        return next(iter(Report.read(run.report / "report.json").arms))
    return run.path.name if run.path.parent.name == "arms" else config.regularizer.kind


def _harness() -> Any:
    """Imported when it is asked for: it is an extra, and takes its time."""
    from moored.evaluation import lm_eval_model

    return lm_eval_model


def _measure(target: Target, mesh: Mesh, scales: Sequence[float | None], tasks: Any) -> Report:
    config = target.config
    located = resolve_base(config.model, mesh)
    suite = build_suite(config, located, mesh)
    policy = load_policy(located.source.path, config, mesh, adapter=target.adapter)
    engine = Engine(policy, config, mesh)
    engine.keep_references(config, located.source.revision, located.vocab_size)
    try:
        ask: Any = partial(
            evaluate,
            engine,
            mesh=mesh,
            tokenizer=located.tokenizer,
            config=config.evaluation,
            pinpoint=True,
        )
        measured: dict[float | None, Evaluation] = {}
        run_tasks, base_figures = None, {}
        if tasks is not None:
            rows = config.evaluation.micro_batch_size
            asked = _harness().HarnessModel(engine, located, mesh, rows=rows)
            run_tasks = partial(_harness().run_tasks, asked, tasks)
        figures: dict[float | None, dict[str, Figures]] = {}
        for scale in scales:
            arm = _at_scale(target.name, scale)
            with scaled(policy.causal_lm, scale) if scale else contextlib.nullcontext():
                measured[scale] = ask(suite, arm=arm)
                if run_tasks is not None:
                    figures[scale] = run_tasks(base=False, arm=arm)
        if run_tasks is not None:
            base_figures = run_tasks(base=True)
        base_answered = None
        if suite.asks:
            base_answered = ask(suite.only_prompts(), base=True).answered
    finally:
        engine.close()
    training = {} if target.run is None else target.run.state().get("training", {})
    reports = {
        scale: to_report(
            config,
            located.source,
            _at_scale(target.name, scale),
            after,
            TrainedRun(**training),
            base_answered=base_answered,
            num_prompts=len(suite.prompts),
            trained_by=target.trained_by,
            scale=None if scale == 1.0 else scale,
            settings=suite.settings,
        )
        for scale, after in measured.items()
    }
    if tasks is not None:
        settings = _harness().settings_of(tasks)
        reports = {
            scale: report.with_lm_eval(base_figures, figures[scale], settings)
            for scale, report in reports.items()
        }
    found = list(reports.values())
    return merge(found) if len(found) > 1 else found[0]


def _at_scale(name: str, scale: float | None) -> str:
    """The name of an arm that is measured at a scale."""
    return name if scale in (None, 1.0) else f"{name}-scale{scale:g}"


def _write(target: Target, report: Report, *, at_scales: bool) -> None:
    curves = None if target.run is None else {target.name: metrics(target.run.path)}
    write(report, target.folder, curves=curves)
    run = target.run
    if run is not None and not at_scales and run.state().get("status") == "evaluation_failed":
        _finish(run, target.trained_by)  # this was what it lacked
    show(report, sys.stdout)
    print(f"report in {target.folder}")


def _finish(run: RunDirectory, trained_by: Config | None) -> None:
    """How the run would have ended, had its evaluation not failed."""
    budget = trained_by.regularizer.budget if trained_by else None
    broken = run.state().get("training", {}).get("budget_held") is False
    if budget is not None and broken and budget.when_broken == "stop":
        code = TrainingRefusedError.exit_code
        run.update_state(status="refused", reason="the budget was broken", exit_code=code)
    else:
        run.update_state(status="done", reason=None, exit_code=0)
