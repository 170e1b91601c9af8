"""The errors that end a run on purpose, each with its exit code.

No logic lives here: who raises them decides, and `cli/` prints them.
"""

from __future__ import annotations

from collections.abc import Sequence


class MooredError(Exception):
    """Base of all errors that Moored raises on purpose; `exit_code` is what the process returns."""

    exit_code = 1


class UserError(MooredError):
    """The recipe, the data or the machine is not as it must be: one line that names the fix."""

    exit_code = 2


class UserErrors(UserError):
    """Several problems found in one pass, so that they can be mended in one pass.

    Args:
        problems: one line each; the message shows the first ten and counts the rest.
    """

    def __init__(self, problems: Sequence[str]):
        self.problems = tuple(problems)
        shown = list(self.problems[:10])
        if len(self.problems) > 10:
            shown.append(f"... and {len(self.problems) - 10} more ({len(self.problems)} in all)")
        super().__init__("\n".join(shown))


class TrainingRefusedError(MooredError):
    """Training cannot go on without harm: non-finite updates, a broken forgetting budget."""

    exit_code = 3


class EvaluationFailedError(MooredError):
    """The adapter is trained and exported, but an evaluation after it failed."""

    exit_code = 4


class PeerLostError(MooredError):
    """A collective failed because another process of the run is gone."""

    exit_code = 1


class TakenOverError(MooredError):
    """Another process owns the run now; nothing more may be written by this one."""

    exit_code = 1


class PreemptedError(MooredError):
    """A signal asked the run to leave; its state is saved and it can be requeued."""

    exit_code = 75


def missing_package(error: ModuleNotFoundError) -> str:
    """What to install where a package of the extra `train` is not there.

    Raises:
        ModuleNotFoundError: the given one, if it is a module of Moored that is missing.
    """
    name = (error.name or "").split(".")[0]
    if name in ("", "moored"):
        raise error
    return (
        f"{name} is not installed: the losses and moored.plugin need torch alone, this command the "
        "rest: pip install 'moored[train]'"
    )
