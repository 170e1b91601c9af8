"""Commands on recipes and run directories, from doctor and prepare to train, report and sync.

Those that talk to SLURM are in `cluster.py`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from moored.cli.options import (
    PATH,
    launcher_argument,
    load,
    optional_recipe_arguments,
    recipe_arguments,
    resume_option,
)
from moored.utils.environment import own_rank
from moored.utils.errors import UserError
from moored.utils.log import redact


@click.command()
@recipe_arguments
@resume_option
@click.option("--run-dir", type=PATH, hidden=True)
@click.option("--arm-of", type=PATH, hidden=True)
def train(
    recipe: Path,
    overrides: tuple[str, ...],
    resume: bool,
    run_dir: Path | None,
    arm_of: Path | None,
) -> None:
    """Train one recipe.

    The same command is started by torchrun, deepspeed or srun on every process. A run that was
    interrupted goes on from its newest checkpoint.
    """
    config = load(recipe, overrides)
    from moored.training.train import run

    # What the jobs of `moored submit` and `moored sweep` say: where the run is, an arm of what.
    place: dict[str, Any] = {} if run_dir is None else {"path": run_dir}
    if run_dir is not None and arm_of is not None:
        place |= {"arm": run_dir.name, "parent": arm_of}
    _finished(run(config, restart=not resume, **place))


@click.command()
@recipe_arguments
@resume_option
def compare(recipe: Path, overrides: tuple[str, ...], resume: bool) -> None:
    """Train a recipe once per regularizer, with one report.

    The arms are the recipe's list under compare; by default none, kl and tmkl.
    """
    config = load(recipe, overrides)
    from moored.training.compare import run

    _finished(run(config, restart=not resume))


@click.command()
@click.argument("targets", nargs=-1, required=True, metavar="RUN|ADAPTER... [KEY=VALUE]...")
@click.option(
    "--recipe",
    type=PATH,
    help="Data and corpora for an adapter folder; a run directory brings its own.",
)
@click.option(
    "--out",
    type=PATH,
    help="Folder of the report; default: in the run, for an adapter ./report.",
)
@click.option(
    "--scale",
    "scales",
    multiple=True,
    type=float,
    help="Measure the adapter at this scale; may be repeated. 0 is the base, 1 as trained.",
)
@click.option(
    "--lm-eval",
    "tasks",
    metavar="TASK[,TASK]",
    help="Also run these tasks of the evaluation harness, before and after (extra: lm-eval).",
)
@click.option(
    "--lm-eval-include",
    "include",
    type=PATH,
    help="Folder with tasks of your own for --lm-eval.",
)
@launcher_argument
def evaluate(
    targets: tuple[str, ...],
    recipe: Path | None,
    out: Path | None,
    scales: tuple[float, ...],
    tasks: str | None,
    include: Path | None,
) -> None:
    """Measure retention, drift and adaptation.

    Runs, or adapters that any PEFT-based trainer wrote, before and after training. With --scale
    also at parts of what they add, which needs no training: the report says which to deploy.
    """
    names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    if tasks is not None and not names:
        raise UserError("--lm-eval names no task: write TASK or TASK,TASK")
    if include is not None and not names:
        raise UserError("--lm-eval-include does nothing by itself: add --lm-eval TASK")
    if include is not None and not include.is_dir():
        raise UserError(f"--lm-eval-include {include} is no folder: name one with YAML files")
    overrides = [text for text in targets if "=" in text and not Path(text).exists()]
    paths = [text for text in targets if text not in overrides]
    if not paths:
        raise UserError("nothing to evaluate: name a run directory or an adapter folder")
    for path in paths:
        if not Path(path).is_dir():
            raise UserError(f"{path} is no folder: name a run directory or an adapter folder")
    from moored.evaluation.evaluate_command import run_command

    run_command(
        paths,
        recipe=recipe,
        overrides=overrides,
        out=out,
        scales=scales,
        lm_eval=names,
        lm_eval_include=include,
    )


@click.command()
@click.argument("runs", nargs=-1, required=True, type=PATH, metavar="RUN...")
@click.option(
    "--out",
    type=PATH,
    help="Folder for report.html and plots; default: in the run, for several ./report.",
)
def report(runs: tuple[Path, ...], out: Path | None) -> None:
    """Show finished runs side by side.

    As a table, an HTML page and a plot of learning against forgetting.
    """
    from moored.evaluation.report import run_command

    run_command(list(runs), out)


@click.command()
@click.argument("run", type=PATH, metavar="RUN|ADAPTER")
@click.option(
    "--to",
    required=True,
    type=PATH,
    help="Folder to make; it must not exist, or be empty.",
)
@click.option("--merge", is_flag=True, help="A whole model instead of a PEFT adapter.")
@click.option(
    "--base",
    type=click.Choice(["w16", "nf4"]),
    help="Merge into the base's own weights (w16, the default), or into the dequantised 4-bit "
    "weights that were trained on.",
)
@click.option(
    "--scale", type=float, help="Factor of what the adapter adds, as `moored evaluate` recommends."
)
@click.option(
    "--recipe",
    type=PATH,
    help="Of an adapter from elsewhere: its base, and data to verify it on.",
)
@click.option(
    "--report",
    type=PATH,
    help="Of an adapter from elsewhere: what `moored evaluate` wrote, for its card.",
)
@launcher_argument
def export(
    run: Path,
    to: Path,
    merge: bool,
    base: str | None,
    scale: float | None,
    recipe: Path | None,
    report: Path | None,
) -> None:
    """Write a finished run's adapter for others, with a forgetting card.

    Or its base with the adapter merged into it. Stock PEFT and transformers load it in a fresh
    process and must compute what was trained; else nothing is written. An adapter from elsewhere
    needs the recipe of its base.
    """
    from moored.export import run_command

    run_command(run, to, merged=merge, base=base, scale=scale, recipe=recipe, report=report)


@click.command()
@optional_recipe_arguments
def doctor(recipe: Path | None, overrides: tuple[str, ...]) -> None:
    """Check the machine, and a recipe's data and model.

    Trains nothing. Under torchrun the rendezvous is checked too.
    """
    if recipe is not None and "=" in recipe.name and not recipe.exists():
        raise UserError(f"{recipe} is an override: name the recipe before it")
    config = None if recipe is None else load(recipe, overrides)
    from moored.training.doctor import run

    run(config)


@click.command()
@optional_recipe_arguments
@click.option("--offline-check", is_flag=True, help="Fetch nothing; only prove that all is here.")
@click.option(
    "--prune",
    "days",
    type=click.FloatRange(min=0),
    metavar="DAYS",
    help="Instead, remove tokens and hidden states unused for so long; takes no recipe.",
)
@click.option(
    "--references",
    "num_ranks",
    type=click.IntRange(min=1),
    metavar="RANKS",
    help="Also fill the reference cache for a run on so many data-parallel ranks.",
)
@click.option("--site", help="Fill the cache of this site profile (storage.cache).")
def prepare(
    recipe: Path | None,
    overrides: tuple[str, ...],
    offline_check: bool,
    days: float | None,
    num_ranks: int | None,
    site: str | None,
) -> None:
    """Bring here what a recipe needs, before its job starts.

    Model and data are fetched and verified, tokens are made and kept; then a fresh process without
    a network proves that nothing is missing.
    """
    if (recipe is None) == (days is None):
        raise UserError("give either a recipe, or --prune DAYS")
    if num_ranks is not None and (recipe is None or offline_check):
        raise UserError("--references computes: give a recipe, and no --offline-check")
    if site is not None:
        _use_caches(site)
    if days is not None:
        from moored.prepare import prune

        return prune(days)
    assert recipe is not None
    config = load(recipe, overrides)
    from moored.prepare import run

    run(config, only_check=offline_check, num_ranks=num_ranks)


@click.command()
@click.argument("run", type=PATH)
@click.option("--uri", help="MLflow server or store; default: the one of the run's recipe.")
def sync(run: Path, uri: str | None) -> None:
    """Replay the journal of a run to MLflow, with its arms if it is a comparison.

    What is there already is not sent again.
    """
    if not run.is_dir():
        raise UserError(f"{run} is not a run directory: name the folder that holds journal.jsonl")
    from moored.tracking import sync_run

    arms = sorted(journal.parent for journal in run.glob("arms/*/journal.jsonl"))
    summaries = [sync_run(each, uri) for each in [run, *arms]]
    click.echo(redact("\n".join(map(str, summaries))))
    if not all(summary.complete for summary in summaries):
        raise UserError("MLflow does not have everything yet: sync again")


@click.command(hidden=True)
@recipe_arguments
def where(recipe: Path, overrides: tuple[str, ...]) -> None:
    """Print the run directory of a recipe, whether it exists or not (for launchers)."""
    from moored.tracking.run_directory import path_of

    click.echo(str(path_of(load(recipe, overrides))))


def _finished(run_dir: Path) -> None:
    if own_rank() == 0:
        click.echo(str(run_dir))


def _use_caches(site: str) -> None:
    """Keep models and data where the jobs of a site look for them."""
    from moored.slurm.script import CACHES
    from moored.slurm.site import load_site

    cache = load_site(site)[1].storage.cache
    if cache is None:
        return
    folder = os.path.expandvars(cache)
    if "$" in folder:
        raise UserError(f"storage.cache of {site}: {cache}: export what it names, it is not set")
    os.environ |= {name: os.path.join(folder, part) for name, part in CACHES.items()}
