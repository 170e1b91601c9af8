"""Commands that the benchmarks run in a process of their own."""

from __future__ import annotations

import subprocess
from typing import Any


def output_of(what: str, command: list[str], **options: Any) -> str:
    """What a command prints; ends this program with the end of its words if it fails.

    Args:
        what: it is, for the message.
        command: to run.
        options: of `subprocess.run`.
    """
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    if done.returncode:
        raise SystemExit(f"{what} failed:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return done.stdout
