"""The commands: what is given is checked and handed to the room that does it.

No logic lives here, and nothing slow is imported before a command needs it: `--help` answers at
once, also on a login node.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

from moored import __version__
from moored.errors import (
    MooredError,
    PreemptedError,
    TrainingRefusedError,
    UserError,
    UserErrors,
)
from moored.launched import own_rank

if TYPE_CHECKING:
    from moored.config import Config

log = logging.getLogger(__name__)
Command = TypeVar("Command", bound=Callable[..., Any])

# How long a rank other than 0 waits before it prints its own error: when rank 0 had it too, the
# launcher ends this process in the meantime, and the error stands in the log once, not N times.
SILENT_SECONDS = 3.0
# What no code of ours can mend: one line, not a traceback.
_OF_THE_MACHINE = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS}


class _Group(click.Group):
    """A group that names the command that was probably meant."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if self.get_command(ctx, name) is None and not name.startswith("-"):
            near = difflib.get_close_matches(name, self.list_commands(ctx), n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            if name.endswith((".yaml", ".yml")):
                hint = f"; did you mean `moored train {name}`?"
            known = ", ".join(self.list_commands(ctx))
            raise click.UsageError(f"no command {name!r}{hint or f': there are {known}'}", ctx)
        return super().resolve_command(ctx, args)


def _launcher_argument(command: Command) -> Command:
    """Accepts what the deepspeed launcher adds to a command line; the environment has it too."""
    return click.option("--local_rank", "--local-rank", type=int, hidden=True, expose_value=False)(
        command
    )


def _recipe_arguments(command: Command) -> Command:
    command = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")(command)
    command = click.argument("recipe", type=click.Path(path_type=Path))(command)
    return _launcher_argument(command)


def _resume_option(command: Command) -> Command:
    return click.option(
        "--resume/--restart",
        "resume",
        default=True,
        help="Go on with an unfinished run (the default), or start over.",
    )(command)


@click.group(
    cls=_Group,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="moored", message="%(prog)s %(version)s")
@click.option("--debug", is_flag=True, help="Show the traceback of every error.")
@_launcher_argument
def cli(debug: bool) -> None:
    """Fine-tune language models with QLoRA without letting them drift from their base.

    A recipe is a YAML file; KEY=VALUE overrides a part of it, for example
    optim.learning_rate=1e-4 or data.train.0.limit=100.
    """


@cli.command()
@_recipe_arguments
@_resume_option
@click.option("--run-dir", type=click.Path(path_type=Path), hidden=True)
@click.option("--arm-of", type=click.Path(path_type=Path), hidden=True)
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
    config = _load(recipe, overrides)
    from moored import train as room

    # What the jobs of `moored submit` and `moored sweep` say: where the run is, an arm of what.
    place: dict[str, Any] = {} if run_dir is None else {"path": run_dir}
    if run_dir is not None and arm_of is not None:
        place |= {"arm": run_dir.name, "parent": arm_of}
    _finished(room.run(config, restart=not resume, **place))


@cli.command()
@_recipe_arguments
@_resume_option
def compare(recipe: Path, overrides: tuple[str, ...], resume: bool) -> None:
    """Train a recipe once per regularizer, with one report.

    The arms are the recipe's list under compare; by default none, kl and tmkl.
    """
    config = _load(recipe, overrides)
    from moored import compare as room

    _finished(room.run(config, restart=not resume))


@cli.command()
@click.argument("targets", nargs=-1, required=True, metavar="RUN|ADAPTER... [KEY=VALUE]...")
@click.option(
    "--recipe",
    type=click.Path(path_type=Path),
    help="Data and corpora for an adapter folder; a run directory brings its own.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Folder of the report; default: in the run, for an adapter ./report.",
)
@_launcher_argument
def evaluate(targets: tuple[str, ...], recipe: Path | None, out: Path | None) -> None:
    """Measure retention, drift and adaptation.

    Runs, or adapters that any PEFT-based trainer wrote, before and after training.
    """
    overrides = [text for text in targets if "=" in text and not Path(text).exists()]
    paths = [text for text in targets if text not in overrides]
    if not paths:
        raise UserError("nothing to evaluate: name a run directory or an adapter folder")
    for path in paths:
        if not Path(path).is_dir():
            raise UserError(f"{path} is no folder: name a run directory or an adapter folder")
    from moored import remeasure as room

    room.run_command(paths, recipe=recipe, overrides=overrides, out=out)


@cli.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RUN...")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Folder for report.html and plots; default: in the run, for several ./report.",
)
def report(runs: tuple[Path, ...], out: Path | None) -> None:
    """Show finished runs side by side.

    As a table, an HTML page and a plot of learning against forgetting.
    """
    from moored import report as room

    room.run_command(list(runs), out)


@cli.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--to",
    required=True,
    type=click.Path(path_type=Path),
    help="Folder to make; it must not exist, or be empty.",
)
@click.option("--merge", is_flag=True, help="A whole model instead of a PEFT adapter.")
@click.option(
    "--base",
    type=click.Choice(["w16", "nf4"]),
    help="Merge into the base's own weights (w16, the default), or into the dequantised 4-bit "
    "weights that were trained on.",
)
@_launcher_argument
def export(run: Path, to: Path, merge: bool, base: str | None) -> None:
    """Write a finished run's adapter for others.

    Or its base with the adapter merged into it. Stock PEFT and transformers load it in a fresh
    process and must compute what was trained; else nothing is written.
    """
    from moored import export as room

    room.run_command(run, to, merged=merge, base=base)


@cli.command()
@click.argument("recipe", required=False, type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@_launcher_argument
def doctor(recipe: Path | None, overrides: tuple[str, ...]) -> None:
    """Check the machine, and a recipe's data and model.

    Trains nothing. Under torchrun the rendezvous is checked too.
    """
    if recipe is not None and "=" in recipe.name and not recipe.exists():
        raise UserError(f"{recipe} is an override: name the recipe before it")
    config = None if recipe is None else _load(recipe, overrides)
    from moored import doctor as room

    room.run(config)


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


@cli.command()
@_recipe_arguments
@_resume_option
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
    config = _load(recipe, overrides)
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


@cli.command()
@click.argument("run", type=click.Path(path_type=Path, exists=True))
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--expect", type=click.Path(path_type=Path, exists=True), required=True)
def preflight(run: Path, out: Path, expect: Path) -> None:
    """Check this node of a job (for the job's script)."""
    from moored import preflight as room

    if not room.run(run, out, expect):
        raise click.exceptions.Exit(1)


@cli.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--uri", help="MLflow server or store; default: the one of the run's recipe.")
def sync(run: Path, uri: str | None) -> None:
    """Replay the journal of a run to MLflow, with its arms if it is a comparison.

    What is there already is not sent again.
    """
    if not run.is_dir():
        raise UserError(f"{run} is not a run directory: name the folder that holds journal.jsonl")
    from moored import track as room

    arms = sorted(journal.parent for journal in run.glob("arms/*/journal.jsonl"))
    summaries = [room.sync(each, uri) for each in [run, *arms]]
    click.echo(_redact("\n".join(map(str, summaries))))
    if not all(summary.complete for summary in summaries):
        raise UserError("MLflow does not have everything yet: sync again")


def _load(recipe: Path, overrides: Sequence[str]) -> Config:
    _check_overrides(overrides)
    from moored.config import load_config

    return load_config(recipe, overrides)


def _check_overrides(overrides: Sequence[str]) -> None:
    for text in overrides:
        if "=" in text:
            continue
        if text.endswith((".yaml", ".yml")):
            raise UserError(f"{text}: a second recipe; start one command per recipe")
        raise UserError(
            f"{text!r} is not an override: write key=value, for example optim.learning_rate=1e-4"
        )


def _finished(run_dir: Path) -> None:
    if own_rank() == 0:
        click.echo(str(run_dir))


def _redact(text: str) -> str:
    from moored.log import redact

    return redact(text)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Runs a command line and exits with the code of the contract (docs: exit codes).

    Args:
        arguments: without the program's name; by default those of the process.
    """
    args = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in args
    # Also after the command: `moored train r.yaml --debug` is where people write it.
    args = [arg for arg in args if arg != "--debug"]
    sys.exit(_run(args, debug=debug))


def _run(args: list[str], *, debug: bool) -> int:
    # Threads that spin while they wait starve each other where other processes run too: on two busy
    # cores training was two to four times slower. Read by OpenMP when torch loads it.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        if not {"-h", "--help", "--version"} & set(args):
            from moored import log as logs

            logs.setup(own_rank(), None)
        code = cli.main(args=args, prog_name="moored", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.ctx.get_help() if error.ctx else error.format_message(), err=True)
        return 2
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        see = f" (see `{context.command_path} --help`)" if context else ""
        message = error.format_message()
        _complain([f"{message[:1].lower()}{message[1:].rstrip('.')}{see}"], debug=debug)
        return error.exit_code
    except UserErrors as error:
        _complain(str(error).splitlines(), debug=debug)
        return error.exit_code
    except (PreemptedError, TrainingRefusedError) as error:
        # All ranks agreed on it: once is enough.
        if own_rank() == 0:
            _complain([str(error)], debug=debug)
        return error.exit_code
    except MooredError as error:
        _complain([str(error)], debug=debug)
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        if debug:
            click.echo(_redact(traceback.format_exc()), err=True, nl=False)
        click.echo("interrupted", err=True)
        return 130
    except BrokenPipeError:
        # The reader of our output is gone (`moored report ... | head`): nobody is left to tell.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        return 1
    except OSError as error:
        if error.errno not in _OF_THE_MACHINE:
            return _bug()
        _complain([f"{error.filename or 'output'}: {error.strerror}"], debug=debug)
        return UserError.exit_code
    except Exception:
        return _bug()


def _bug() -> int:
    log.debug("%s", traceback.format_exc())
    who = f"rank {own_rank()}: " if own_rank() else ""
    click.echo(
        f"{_redact(traceback.format_exc())}error: {who}this is a bug in Moored: please report it "
        "with the lines above, the recipe and the output of `moored doctor`",
        err=True,
    )
    return 1


def _complain(messages: Sequence[str], *, debug: bool) -> None:
    """Prints each message as one line `error: ...`; under a launcher, once rather than N times."""
    log.debug("ended by an error: %s", traceback.format_exc())
    prefix = "error: "
    if own_rank() != 0:
        time.sleep(SILENT_SECONDS)
        prefix = f"error: rank {own_rank()}: "
    with contextlib.suppress(OSError):
        if debug:
            click.echo(_redact(traceback.format_exc()), err=True, nl=False)
        for message in messages:
            if own_rank() != 0 and message.startswith("rank 0: "):
                continue  # rank 0 told us of it, and prints it itself
            line = _redact(" ".join(message.split()))
            click.echo(line if line.startswith("... and ") else f"{prefix}{line}", err=True)
