"""What is asked of SLURM, and told to it: the only caller of its commands.

What a job does is written by `submit/`; which job this process is in, `launched.py` reads.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from moored.errors import UserError

SECONDS = 60.0  # for a controller that is busy
WAITING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD")
ALIVE = (*WAITING, "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING")


def is_here() -> bool:
    """Whether this machine has SLURM's commands."""
    return shutil.which("scontrol") is not None and shutil.which("sbatch") is not None


def job_facts(job: str) -> dict[str, str] | None:
    """What SLURM knows of a job, by its own names (`JobState`, `Reason`, `NodeList`, ...).

    Returns:
        None for a job that it does not know, or no longer.

    Raises:
        UserError: SLURM is not here, or does not answer.
    """
    done = _run(["scontrol", "--oneliner", "show", "job", job])
    if done.returncode:
        if "Invalid job id" in done.stderr:
            return None
        raise UserError(f"scontrol: {_last_line(done.stderr)}: ask again once SLURM answers")
    facts = re.findall(r"(\w[\w/:]*)=(.*?)(?=\s\w[\w/:]*=|\s*$)", done.stdout.splitlines()[0])
    return dict(facts)


def job_state(job: str) -> str | None:
    """`RUNNING`, `PENDING`, ...; None for a job that SLURM does not know, or no longer."""
    facts = job_facts(job)
    return None if facts is None else facts["JobState"]


def is_alive(job: str) -> bool:
    """Whether the job waits or runs.

    Raises:
        UserError: SLURM is not here, or does not answer.
    """
    return job_state(job) in ALIVE


def element_states(array: str) -> dict[int, str]:
    """State of each element of a job array, by its index; those it has forgotten are left out."""
    done = _run(["squeue", "--noheader", "--array", "--states=all", "-j", array, "-o", "%K %T"])
    lines = [line.split() for line in done.stdout.splitlines()] if not done.returncode else []
    return {int(line[0]): line[1] for line in lines if len(line) == 2 and line[0].isdigit()}


def check(script: str, options: Sequence[str] = ()) -> str:
    """Has SLURM judge a script without submitting it.

    Returns:
        What it says of when and where the job would start.

    Raises:
        UserError: it would refuse the job, or is not here.
    """
    done = _run(["sbatch", "--test-only", *options], text=script)
    said = _last_line(done.stderr)
    if done.returncode:
        raise UserError(f"SLURM would refuse this job: {said.removeprefix('allocation failure: ')}")
    return said.removeprefix("sbatch: ")


def submit(script: Path, options: Sequence[str] = ()) -> str:
    """Submits a script; the id of the job.

    Raises:
        UserError: SLURM refuses it, or is not here.
    """
    done = _run(["sbatch", "--parsable", *options, str(script)])
    if done.returncode:
        raise UserError(f"sbatch {script}: {_last_line(done.stderr)}")
    return done.stdout.strip().partition(";")[0]  # a federation adds the cluster's name


def cancel(jobs: Sequence[str]) -> None:
    """Ends jobs, waiting or running; those that have ended already are no error.

    Raises:
        UserError: SLURM refuses, or is not here.
    """
    done = _run(["scancel", *jobs])
    if done.returncode and "Invalid job id" not in done.stderr:
        raise UserError(f"scancel {' '.join(jobs)}: {_last_line(done.stderr)}")


def _run(
    command: Sequence[str], text: str | None = None, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command,
            input=text,
            env=environment,
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
    except FileNotFoundError:
        raise UserError(
            f"{command[0]} is not on this machine: submit from a login node of the cluster, or add "
            "--dry-run to see the script"
        ) from None
    except subprocess.TimeoutExpired:
        raise UserError(
            f"{command[0]} did not answer in {SECONDS:.0f} s: try again once SLURM answers"
        ) from None


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return re.sub(r"^\w+: (error: )?", "", lines[-1]) if lines else "no reason given"
