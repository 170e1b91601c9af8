"""The command line: its commands by name, its errors as one line each, its exit codes.

What a command takes is in `cluster.py` and `runs.py`. Nothing slow is imported before it is needed:
`--help` answers at once, also on a login node.
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
from collections.abc import Sequence
from typing import NoReturn

import click

from moored import __version__
from moored.cli import cluster, runs
from moored.cli.options import launcher_argument
from moored.utils.environment import own_rank
from moored.utils.errors import (
    MooredError,
    PreemptedError,
    TrainingRefusedError,
    UserError,
    UserErrors,
    missing_package,
)
from moored.utils.log import redact, setup

log = logging.getLogger(__name__)

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
            shown = [known for known, command in self.commands.items() if not command.hidden]
            near = difflib.get_close_matches(name, shown, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            if name.endswith((".yaml", ".yml")):
                hint = f"; did you mean `moored train {name}`?"
            known = ", ".join(sorted(shown))
            raise click.UsageError(f"no command {name!r}{hint or f': there are {known}'}", ctx)
        return super().resolve_command(ctx, args)


@click.group(
    cls=_Group,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="moored", message="%(prog)s %(version)s")
@click.option("--debug", is_flag=True, help="Show the traceback of every error.")
@launcher_argument
def cli(debug: bool) -> None:
    """Fine-tune language models with QLoRA without letting them drift from their base.

    A recipe is a YAML file; KEY=VALUE overrides a part of it, for example
    optim.learning_rate=1e-4 or data.train.0.limit=100.
    """


for _command in (
    *(runs.train, runs.compare, runs.evaluate, runs.report, runs.export, runs.sync),
    *(runs.doctor, runs.prepare, runs.where),
    *(
        cluster.plan,
        cluster.probe,
        cluster.submit,
        cluster.sweep,
        cluster.status,
        cluster.logs,
        cluster.cancel,
    ),
    cluster.preflight,
):
    cli.add_command(_command)


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
    # Micro-batches of many lengths leave holes in a GPU's memory that no later one fits into.
    older = "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"
    if not any(name in os.environ for name in older):
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    try:
        if not {"-h", "--help", "--version"} & set(args):
            setup(own_rank(), None)
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
            click.echo(redact(traceback.format_exc()), err=True, nl=False)
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
    except ModuleNotFoundError as error:
        try:
            _complain([missing_package(error)], debug=debug)
        except ModuleNotFoundError:
            return _bug()
        return UserError.exit_code
    except Exception:
        return _bug()


def _bug() -> int:
    log.error("%s", traceback.format_exc(), extra={"printed": True})
    who = f"rank {own_rank()}: " if own_rank() else ""
    click.echo(
        f"{redact(traceback.format_exc())}error: {who}this is a bug in Moored: please report it "
        "with the lines above, the recipe and the output of `moored doctor`",
        err=True,
    )
    return 1


def _complain(messages: Sequence[str], *, debug: bool) -> None:
    """Prints each message as one line `error: ...`; under a launcher, once rather than N times."""
    log.debug("ended by an error: %s", traceback.format_exc())
    for message in messages:
        log.error("%s", " ".join(message.split()), extra={"printed": True})
    prefix = "error: "
    if own_rank() != 0:
        time.sleep(SILENT_SECONDS)
        prefix = f"error: rank {own_rank()}: "
    with contextlib.suppress(OSError):
        if debug:
            click.echo(redact(traceback.format_exc()), err=True, nl=False)
        for message in messages:
            if own_rank() != 0 and message.startswith("rank 0: "):
                continue  # rank 0 told us of it, and prints it itself
            line = redact(" ".join(message.split()))
            click.echo(line if line.startswith("... and ") else f"{prefix}{line}", err=True)
