"""Commands on jobs: plan and submit, and what runs inside of them.

Those on recipes and run directories are in `runs.py`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from moored.cli.options import (
    PATH,
    Command,
    check_overrides,
    load,
    recipe_arguments,
    resume_option,
)
from moored.utils.errors import UserError, UserErrors


def site_options(command: Command) -> Command:
    """Which site, how many nodes, for how long."""
    for option in (
        click.option("--dry-run", is_flag=True, help="Print the script; write and submit nothing."),
        click.option(
            "--set", "settings", multiple=True, metavar="KEY=VALUE", help="Change the profile."
        ),
        click.option("--time", help="Limit of one start, such as 4:00:00; the job chains."),
        click.option("--nodes", type=click.IntRange(1), default=1, show_default=True),
        click.option("--site", required=True, help="Name in slurm/sites, or path of a profile."),
    ):
        command = option(command)
    return command


def _site(site: str, settings: Sequence[str], time: str | None) -> tuple[str, Any]:
    from moored.slurm.site import load_site

    for text in settings:
        if "=" not in text:
            raise UserError(f"--set {text}: write KEY=VALUE, such as slurm.partition=long")
    return load_site(site, [*settings, *([f'slurm.time="{time}"'] if time else [])])


@click.command()
@recipe_arguments
@resume_option
@site_options
@click.option(
    "--stages",
    default="train",
    show_default=True,
    help="Of prepare,probe,train,evaluate,report,export: a chain, each after the one before.",
)
def submit(
    recipe: Path,
    overrides: tuple[str, ...],
    resume: bool,
    site: str,
    nodes: int,
    time: str | None,
    settings: tuple[str, ...],
    dry_run: bool,
    stages: str,
) -> None:
    """Submit a recipe to SLURM.

    Recipe and code are kept in the run directory, so that later edits do not change the job. It
    survives preemption, time limits and lost nodes, and goes on until the training is done.
    """
    config = load(recipe, overrides)
    name, profile = _site(site, settings, time)
    from moored.slurm.jobs import jobs_of, submit_run
    from moored.slurm.script import render
    from moored.slurm.site import profile_path
    from moored.tracking.run_directory import path_of

    file = profile_path(site)
    wanted = [stage for stage in stages.split(",") if stage]
    run = path_of(config)
    _warn_unless_planned(config, profile, nodes)
    if dry_run:
        jobs = jobs_of(config, profile, run, nodes=nodes, stages=wanted, profile=file)
        click.echo("\n".join(render(job, profile, name) for job in jobs.values()), nl=False)
        return
    submitted = submit_run(
        config, profile, name, nodes=nodes, stages=wanted, restart=not resume, profile=file
    )
    for job in submitted:
        click.echo(f"job {job.id:<8} {job.stage:<9} {job.log}")
    click.echo(f"run          {run}")
    click.echo(f"follow       moored status {run}; moored logs --follow {run}")


def _warn_unless_planned(config: Any, profile: Any, nodes: int) -> None:
    """One line where the recipe will not fit the site's GPUs."""
    from moored.plan import site_warning

    slurm = profile.slurm
    if (line := site_warning(config, slurm.gpu_type, slurm.gpus_per_node, nodes)) is not None:
        click.echo(f"warning: {line}", err=True)


@click.command()
@recipe_arguments
@click.option("--gpus", metavar="NxNAME", help="Of each node, such as 8xh100-80gb.")
@click.option("--site", help="Take them from a profile: its name in slurm/sites, or its path.")
@click.option("--nodes", type=click.IntRange(1), default=1, show_default=True)
@click.option(
    "--host-factor",
    type=click.FloatRange(0.1, 100),
    help="How much slower the hosts start kernels than the fastest one measured; default: 1.4, "
    "between 1 and 1.9, which were measured.",
)
@click.option("--json", "to_json", is_flag=True, help="Bytes and seconds, for programs.")
def plan(
    recipe: Path,
    overrides: tuple[str, ...],
    gpus: str | None,
    site: str | None,
    nodes: int,
    host_factor: float | None,
    to_json: bool,
) -> None:
    """Foretell memory, time and cost of a recipe on GPUs.

    From the model's config.json alone: no weights are read, nothing is started. What does not fit
    is refused with the nearest that does.
    """
    if (gpus is None) == (site is None):
        raise UserError("give either --gpus, such as 8xh100-80gb, or --site")
    config = load(recipe, overrides)
    from moored.plan import as_json, as_text, cluster_of, make_plan, site_cluster

    if site is not None:
        from moored.slurm.site import profile_path

        slurm, profile = _site(site, (), None)[1].slurm, profile_path(site)
        cluster = site_cluster(slurm.gpu_type, slurm.gpus_per_node, nodes, site, profile)
    else:
        cluster = cluster_of(gpus or "", nodes)
    found = make_plan(config, cluster, host_factor)
    click.echo(json.dumps(as_json(found), indent=1) if to_json else as_text(found))


@click.command()
@recipe_arguments
@click.option("--steps", type=click.IntRange(1), default=10, show_default=True, help="Timed ones.")
@click.option("--site", help="Keep what a plan learns beside this profile, for --site of a plan.")
@click.option("--out", type=PATH, help="File of figures; default: NAME-probe.json in output.dir.")
def probe(
    recipe: Path, overrides: tuple[str, ...], steps: int, site: str | None, out: Path | None
) -> None:
    """Run a few steps at true size with random weights.

    Memory and time by phase, beside what `moored plan` says. Nothing is downloaded, no data are
    read. On several GPUs under torchrun or launch/, or as a job: moored submit --stages probe.
    """
    config = load(recipe, overrides)
    profile = None
    if site is not None:
        from moored.slurm.site import profile_path

        profile = profile_path(site)
    from moored.training.probe import run

    run(config, steps=steps, out=out, profile=profile)


@click.command()
@recipe_arguments
@resume_option
@site_options
@click.option("--throttle", type=click.IntRange(0), default=0, help="Arms at a time; 0: all.")
def sweep(
    recipe: Path,
    overrides: tuple[str, ...],
    resume: bool,
    site: str,
    nodes: int,
    time: str | None,
    settings: tuple[str, ...],
    dry_run: bool,
    throttle: int,
) -> None:
    """Submit a recipe over a grid, as a job array with one report.

    Give keys several values: regularizer.kind=none,tmkl regularizer.weight=0.1,0.3 train.seed=0,1.
    Called again, it runs the arms that are not done yet.
    """
    check_overrides(overrides)
    name, profile = _site(site, settings, time)
    from moored.slurm.script import render
    from moored.slurm.sweep import arms_of, array_of, submit_sweep

    if dry_run:
        arms = arms_of(recipe, overrides)
        jobs = array_of(arms, profile, nodes=nodes, throttle=throttle, indices=range(len(arms)))
        click.echo("\n".join(render(job, profile, name) for job in jobs), nl=False)
        return
    folder, arms, submitted = submit_sweep(
        recipe, overrides, profile, name, nodes=nodes, throttle=throttle, restart=not resume
    )
    for job in submitted:
        click.echo(f"job {job.id:<8} {job.stage:<9} {job.log}")
    for arm in arms:
        click.echo(f"arm          {arm.name}")
    click.echo(f"sweep        {folder}")
    click.echo(f"follow       moored status {folder}")


@click.command()
@click.argument("runs", nargs=-1, type=PATH, metavar="[RUN]...")
def status(runs: tuple[Path, ...]) -> None:
    """Say how runs are: state, step, loss, time left.

    By default all of ./runs.
    """
    from moored.slurm.status import describe

    here = tuple(sorted(path.parent for path in Path("runs").glob("*/config.yaml")))
    if not (runs or here):
        raise UserError("no run in ./runs: name a run directory")
    said: list[str] = []
    errors: list[str] = []
    for run in runs or here:  # one that cannot be read must not hide the others
        try:
            said.append("\n".join(describe(run)))
        except UserError as error:
            errors.append(str(error))
    if said:
        click.echo("\n\n".join(said))
    if errors:
        raise UserErrors(errors)


@click.command()
@click.argument("run", type=PATH)
@click.option("--rank", type=click.IntRange(0), default=0, show_default=True)
@click.option("--lines", "-n", type=click.IntRange(0), default=20, show_default=True)
@click.option("--follow", "-f", is_flag=True, help="Go on until the run has ended.")
def logs(run: Path, rank: int, lines: int, follow: bool) -> None:
    """Show what a run's job and one of its ranks printed."""
    from moored.slurm.status import show_logs

    show_logs(run, sys.stdout, rank=rank, lines=lines, follow=follow)


@click.command()
@click.argument("run", type=PATH)
def cancel(run: Path) -> None:
    """End the jobs of a run.

    A running one saves first; submitting it again goes on from there.
    """
    from moored.slurm.status import cancel_jobs

    jobs = cancel_jobs(run)
    click.echo(f"cancelled {', '.join(jobs)}" if jobs else "nothing to cancel: no job is left")


@click.command(hidden=True)
@click.argument("run", type=click.Path(path_type=Path, exists=True))
@click.option("--out", type=PATH, required=True)
@click.option("--expect", type=click.Path(path_type=Path, exists=True), required=True)
def preflight(run: Path, out: Path, expect: Path) -> None:
    """Check this node of a job (for the job's script)."""
    from moored.slurm.preflight import check_node

    if not check_node(run, out, expect):
        raise click.exceptions.Exit(1)
