"""`moored submit`: a recipe becomes a job, or a chain of jobs, on a run directory of its own.

The text of a job is `script.py`'s; a sweep's array is put together in `sweep.py`.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from moored.config import Config
from moored.data import check_data
from moored.slurm.script import CACHES, Job, render
from moored.slurm.site import Site
from moored.slurm.snapshot import input_files, keep_code, keep_expectations, keep_recipe
from moored.tracking.run_directory import (
    RunDirectory,
    locked,
    open_run,
    path_of,
    require_kind,
)
from moored.utils import scheduler
from moored.utils.atomic_dir import write_atomically, write_json
from moored.utils.errors import UserError

log = logging.getLogger(__name__)

STAGES = ("prepare", "probe", "train", "evaluate", "report", "export")
_CACHES = (*CACHES, "HF_HUB_CACHE", "HF_DATASETS_CACHE", "XDG_CACHE_HOME")


@dataclass(frozen=True, slots=True, kw_only=True)
class Submitted:
    """One job that SLURM has taken.

    Attributes:
        stage: what it does.
        id: SLURM's.
        name: by which it is known again: a cluster that was set up anew gives out ids again.
        log: what its script prints.
    """

    stage: str
    id: str
    name: str
    log: Path


def jobs_of(
    config: Config,
    site: Site,
    run: Path,
    *,
    nodes: int,
    stages: Sequence[str],
    profile: Path | None = None,
) -> dict[str, Job]:
    """The jobs of a run by stage, in their order.

    Args:
        config: the recipe.
        site: where they run.
        run: the run directory.
        nodes: of a job that uses GPUs.
        stages: of `STAGES`.
        profile: the site's file, beside which a probe keeps what a plan learns.
    """
    unknown = [stage for stage in stages if stage not in STAGES]
    if unknown or not stages:
        said = f"--stages {unknown[0]}" if unknown else "--stages names none"
        raise UserError(f"{said}: there are {', '.join(STAGES)}")
    world, degree = nodes * site.slurm.ranks, config.parallel.tensor_parallel_degree
    if world % degree:
        raise UserError(
            f"parallel.tensor_parallel_degree={degree} does not divide {nodes} nodes x "
            f"{site.slurm.ranks} processes: change --nodes, or slurm.ranks_per_node of the site"
        )
    shared = degree * config.parallel.context_parallel_degree
    if world % shared:
        raise UserError(
            f"parallel.context_parallel_degree={config.parallel.context_parallel_degree} x "
            f"tensor_parallel_degree={degree} = {shared} does not divide {nodes} nodes x "
            f"{site.slurm.ranks} processes: change --nodes, or slurm.ranks_per_node of the site"
        )
    base = Job(
        title=f"{config.name}: train",
        name=config.name,
        folder=run,
        python=sys.executable,
        nodes=nodes,
        caches={n: os.path.abspath(v) for n in _CACHES if (v := os.environ.get(n))},
        binds=binds_of(config, site),
    )
    here, recipe = str(run), str(RunDirectory(run).slurm / "recipe.yaml")
    kept = () if profile is None else ("--site", str(profile.absolute()))
    commands = {
        "prepare": ("prepare", recipe),
        "probe": ("probe", recipe, "--out", str(run / "probe.json"), *kept),
        "evaluate": ("evaluate", here),
        "report": ("report", here),
        "export": ("export", here, "--to", str(export_folder(run))),
    }
    jobs: dict[str, Job] = {}
    for stage in STAGES:
        if stage not in stages:
            continue
        jobs[stage] = (
            base
            if stage == "train"
            else replace(
                base,
                title=f"{config.name}: {stage}",
                kind="gpu" if stage in ("probe", "evaluate") else "cpu",
                commands=(commands[stage],),
                file=stage,
            )
        )
    return jobs


def binds_of(config: Config, site: Site) -> tuple[Path, ...]:
    """What a container must see beside the run: data, a local model, caches."""
    if site.container.runtime == "none":
        return ()
    folders = {config.output.dir, *(path.parent for path in input_files(config))}
    for name in _CACHES:
        if os.environ.get(name):
            folders.add(Path(os.environ[name]).absolute())
    return tuple(sorted(folders))


def for_site(config: Config, site: Site) -> Config:
    """The recipe as the site tracks it: to its server, unless the recipe names another store."""
    if site.mlflow.uri is None or config.track.uri is not None or not config.track.mlflow:
        return config
    track = config.track.model_copy(update={"uri": site.mlflow.uri})
    return config.model_copy(update={"track": track})


def ships_to_file(config: Config) -> bool:
    """Whether the runs of this recipe are tracked in a SQLite file, which takes one writer."""
    uri = config.track.uri or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:"
    return config.track.mlflow and urlsplit(uri).scheme == "sqlite"


def submit_run(
    config: Config,
    site: Site,
    site_name: str,
    *,
    nodes: int = 1,
    stages: Sequence[str] = ("train",),
    restart: bool = False,
    profile: Path | None = None,
) -> list[Submitted]:
    """Check, keep and submit a run, and what shall follow it.

    Returns:
        The jobs, in their order; each starts once the one before it has ended well.

    Raises:
        UserError: the run is done, or queued; or SLURM refuses a job. Nothing is left in the queue.
    """
    config, run = for_site(config, site), path_of(config)
    jobs = jobs_of(config, site, run, nodes=nodes, stages=stages, profile=profile)
    scripts = {stage: render(job, site, site_name) for stage, job in jobs.items()}
    if restart and "train" not in jobs:
        raise UserError(
            "--restart would remove the trained run, and no stage trains it again: leave it out, "
            "or add train to --stages"
        )
    if "export" in jobs and any(export_folder(run).glob("*")):
        raise UserError(
            f"{export_folder(run)} is there already, and export would fail after all else: remove "
            "it, or leave export out of --stages"
        )
    require_kind(RunDirectory(run), "run")
    say_what_is_left_out()
    check_data(config)
    require_free(run)
    for script in scripts.values():
        scheduler.check(script)
    with locked(run):
        directory = open_run(config, run, restart=restart)
        if "train" in jobs and directory.state().get("status") == "done":
            raise UserError(f"{run} is finished already: --restart starts over")
        forget_attempts(directory.slurm)
        keep_recipe(config, run)
        keep_code(run)
        keep_expectations([config], run, site)
        for stage, script in scripts.items():
            write_atomically(jobs[stage].script, script.encode())
    submitted = submit_chain(list(jobs.items()))
    remember(run, submitted, site_name=site_name, nodes=nodes, ranks=site.slurm.ranks)
    return submitted


def export_folder(run: Path) -> Path:
    """Where the stage `export` writes."""
    return run.with_name(f"{run.name}-export")


def submit_chain(jobs: Sequence[tuple[str, Job]], condition: str = "afterok") -> list[Submitted]:
    """Submit jobs so that each starts after the one before; all or none.

    Args:
        jobs: stage and job, in their order.
        condition: `afterok`: once it has ended well; `afterany`: once it has ended.
    """
    submitted: list[Submitted] = []
    try:
        for stage, job in jobs:
            options = ["--kill-on-invalid-dep=yes"]
            if submitted:
                single = ",singleton" if job.kind == "train" and not job.arms else ""
                options.append(f"--dependency={condition}:{submitted[-1].id}{single}")
            job_id = scheduler.submit(job.script, options)
            log = job.script.with_name(f"{job.file}-{job_id}{'_*' if job.arms else ''}.log")
            submitted.append(Submitted(stage=stage, id=job_id, name=job.label, log=log))
    except UserError:
        if submitted:
            scheduler.cancel([job.id for job in submitted])
        raise
    return submitted


def say_what_is_left_out() -> None:
    """Name the options of the shell that do not get into a job: its script has them all."""
    if names := scheduler.left_out():
        log.warning(
            "%s of this shell %s left out: a job asks for what its site profile says; --set "
            "slurm.KEY=VALUE changes that",
            ", ".join(names),
            "are" if names[1:] else "is",
        )


def require_free(folder: Path) -> None:
    """Refuse a run directory on which a job waits or runs.

    Raises:
        UserError: there is one; or SLURM cannot be asked.
    """
    for job in remembered(folder):
        if scheduler.is_alive(job["id"], job["name"]):
            raise UserError(
                f"{folder} has job {job['id']} ({job['stage']}) in the queue: wait for it, "
                f"`moored cancel {folder}`, or choose another name=..."
            )


def remember(folder: Path, submitted: Sequence[Submitted], **facts: Any) -> None:
    """Keep which jobs work on a run, for `moored status` and its like."""
    jobs = [asdict(job) | {"log": str(job.log)} for job in submitted]
    kept = {"jobs": jobs, "submitted": round(time.time(), 3), **facts}
    write_json(RunDirectory(folder).slurm / "jobs.json", kept)


def remembered(folder: Path) -> list[dict[str, str]]:
    """The jobs that work on a run, or did; also one that a job submitted in its own place."""
    slurm = RunDirectory(folder).slurm
    try:
        jobs = list(json.loads((slurm / "jobs.json").read_text())["jobs"])
    except (OSError, ValueError, KeyError, TypeError):
        return []
    array = next((job for job in jobs if job["stage"] == "train"), None)
    if array is not None:
        if (successor := _successor(folder)) is not None:
            array |= {"id": successor, "log": str(slurm / f"job-{successor}.log")}
        for arm in sorted((folder / "arms").glob("*/slurm/continued")):
            if (successor := _successor(arm.parents[1])) is not None:
                log = str(slurm / f"job-{successor}_*.log")
                jobs.append(array | {"id": successor, "log": log})
    return jobs


def submitted_ranks(folder: Path) -> int:
    """How many processes the run was submitted for; 0 where it was not."""
    try:
        facts = json.loads((RunDirectory(folder).slurm / "jobs.json").read_text())
        return int(facts["nodes"] * facts["ranks"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def _successor(run: Path) -> str | None:
    """The id of the job that a run's job submitted in its own place."""
    try:
        job = (RunDirectory(run).slurm / "continued").read_text().strip().partition(";")[0]
    except OSError:
        return None
    return job if job.isdigit() else None


def forget_attempts(slurm: Path) -> None:
    """Remove what earlier jobs counted: who submits anew has mended something."""
    for name in ("idle", "excluded", "bad", "ended", "continued"):
        (slurm / name).unlink(missing_ok=True)
    shutil.rmtree(slurm / "preflight", ignore_errors=True)
