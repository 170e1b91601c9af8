"""Commands on jobs: submit, and what runs inside of them.

Those on recipes and run directories are in `runs.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from moored.commands.options import Command, load, recipe_arguments, resume_option
from moored.errors import UserError


def _site_options(command: Command) -> Command:
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
    from moored.submit.site import load_site

    for text in settings:
        if "=" not in text:
            raise UserError(f"--set {text}: write KEY=VALUE, such as slurm.partition=long")
    return load_site(site, [*settings, *([f"slurm.time={time}"] if time else [])])


@click.command()
@recipe_arguments
@resume_option
@_site_options
@click.option(
    "--stages",
    default="train",
    show_default=True,
    help="Of prepare,train,evaluate,report,export: a chain, each after the one before.",
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
    from moored.submit import jobs as room
    from moored.submit.script import render

    wanted = [stage for stage in stages.split(",") if stage]
    run = room.run_folder(config)
    if dry_run:
        jobs = room.jobs_of(config, profile, run, nodes=nodes, stages=wanted)
        click.echo("\n".join(render(job, profile, name) for job in jobs.values()), nl=False)
        return
    submitted = room.submit_run(
        config, profile, name, nodes=nodes, stages=wanted, restart=not resume
    )
    for job in submitted:
        click.echo(f"job {job.id:<8} {job.stage:<9} {job.log}")
    click.echo(f"run          {run}")
    click.echo(f"follow       moored status {run}; moored logs --follow {run}")


@click.command(hidden=True)
@click.argument("run", type=click.Path(path_type=Path, exists=True))
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--expect", type=click.Path(path_type=Path, exists=True), required=True)
def preflight(run: Path, out: Path, expect: Path) -> None:
    """Check this node of a job (for the job's script)."""
    from moored import preflight as room

    if not room.run(run, out, expect):
        raise click.exceptions.Exit(1)
