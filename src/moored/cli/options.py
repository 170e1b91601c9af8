"""What several commands take: a recipe with overrides, and what launchers add.

The commands themselves are in `runs.py` and `cluster.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from moored.utils.errors import UserError

if TYPE_CHECKING:
    from moored.config import Config

Command = TypeVar("Command", bound=Callable[..., Any])
PATH = click.Path(path_type=Path)


def launcher_argument(command: Command) -> Command:
    """Accepts what the deepspeed launcher adds to a command line; the environment has it too."""
    return click.option("--local_rank", "--local-rank", type=int, hidden=True, expose_value=False)(
        command
    )


def recipe_arguments(command: Command, *, required: bool = True) -> Command:
    """RECIPE [KEY=VALUE]..."""
    command = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")(command)
    command = click.argument("recipe", required=required, type=PATH)(command)
    return launcher_argument(command)


def optional_recipe_arguments(command: Command) -> Command:
    """[RECIPE] [KEY=VALUE]..."""
    return recipe_arguments(command, required=False)


def resume_option(command: Command) -> Command:
    """--resume/--restart."""
    return click.option(
        "--resume/--restart",
        "resume",
        default=True,
        help="Go on with an unfinished run (the default), or start over.",
    )(command)


def load(recipe: Path, overrides: Sequence[str]) -> Config:
    """The recipe of a command line."""
    check_overrides(overrides)
    from moored.config import load_config

    return load_config(recipe, overrides)


def check_overrides(overrides: Sequence[str]) -> None:
    """Refuse what is no KEY=VALUE."""
    for text in overrides:
        if "=" in text:
            continue
        if text.endswith((".yaml", ".yml")):
            raise UserError(f"{text}: a second recipe; start one command per recipe")
        raise UserError(
            f"{text!r} is not an override: write key=value, for example optim.learning_rate=1e-4"
        )
