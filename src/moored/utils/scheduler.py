"""What is asked of SLURM, and told to it: the only caller of its commands.

What a job does is written by `slurm/script.py`; in which this process is, `environment.py` reads.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from moored.utils.errors import UserError

SECONDS = 60.0  # for a controller that is busy
WAITING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD")
# What of a shell's environment SLURM's commands take for options, before the lines of a script.
_OPTIONS = ("SBATCH_", "SALLOC_", "SRUN_", "SQUEUE_", "SINFO_", "SCANCEL_", "SCONTROL_")
# What of SLURM_* says which cluster answers, and as whom one asks; the rest is an enclosing job's,
# or an option of srun's. sbatch hands all of it on to the new job, where it would count again.
_KEPT = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_CLUSTERS", "SLURM_JWT", "SLURM_SACK_SOCKET")
_SHOWN = ("_FORMAT", "_BITSTR_LEN", "_TOPO_LEN", "_DEBUG_FLAGS", "_CONF_OUT")
ALIVE = (*WAITING, "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING")


def is_here() -> bool:
    """Whether this machine has SLURM's commands."""
    return shutil.which("scontrol") is not None and shutil.which("sbatch") is not None


def left_out() -> list[str]:
    """Variables by which this shell would have changed a job behind its script's back.

    Those that an enclosing job has set are not named, since nobody chose them, nor what says only
    how something is shown.
    """
    within = "SLURM_JOB_ID" in os.environ
    return sorted(
        name
        for name in os.environ
        if name.startswith("SBATCH_")
        or (_of_slurm(name) and not within and not name.endswith(_SHOWN))
    )


def _of_slurm(name: str) -> bool:
    return name.startswith("SLURM_") and name not in _KEPT


def _environment() -> dict[str, str]:
    """What SLURM's commands inherit: what they are told is in their arguments and in the script."""
    return {
        name: value
        for name, value in os.environ.items()
        if not (name.startswith(_OPTIONS) or _of_slurm(name))
    }


def jobs_facts(job: str) -> list[dict[str, str]]:
    """What SLURM knows of a job, by its own names (`JobState`, `Reason`, `NodeList`, ...).

    Returns:
        One entry for a job, one per element of an array (or per range that waits), none for a job
        that it does not know, or no longer.

    Raises:
        UserError: SLURM is not here, or does not answer.
    """
    done = _run(["scontrol", "--oneliner", "show", "job", job])
    if done.returncode:
        if "Invalid job id" in done.stderr:
            return []
        raise UserError(f"scontrol: {_in_a_line(done.stderr)}: ask again once SLURM answers")
    pattern = r"(\w[\w/:]*)=(.*?)(?=\s\w[\w/:]*=|\s*$)"
    return [dict(re.findall(pattern, line)) for line in done.stdout.splitlines() if line]


def job_states(job: str, name: str | None = None) -> list[str]:
    """`RUNNING`, `PENDING`, ... of a job or of an array's elements, each state once.

    Args:
        job: its id.
        name: its name: a job of another name has got an id that was given out anew.
    """
    facts = [f for f in jobs_facts(job) if name is None or f.get("JobName") == name]
    return sorted({f["JobState"] for f in facts})


def is_alive(job: str, name: str | None = None) -> bool:
    """Whether the job, or any element of the array, waits or runs.

    Raises:
        UserError: SLURM is not here, or does not answer.
    """
    return any(state in ALIVE for state in job_states(job, name))


def check(script: str, options: Sequence[str] = ()) -> str:
    """Has SLURM judge a script without submitting it.

    It judges by the nodes that are in service; where others may be what the job needs, the job is
    left to wait for them.

    Returns:
        What it says of when and where the job would start.

    Raises:
        UserError: it would refuse the job, or is not here.
    """
    done = _run(["sbatch", "--test-only", *options], text=script)
    if done.returncode:
        said = _in_a_line(done.stderr).replace("allocation failure: ", "")
        if "node configuration is not available" in said and _out_of_service(script):
            return said
        raise UserError(f"SLURM would refuse this job: {said}")
    return (done.stderr.strip().splitlines() or [""])[-1].removeprefix("sbatch: ")


def _out_of_service(script: str) -> bool:
    """Whether nodes of the script's partition, or of any, are drained, down or in maintenance."""
    partition = re.search(r"^#SBATCH (--partition=\S+)$", script, re.MULTILINE)
    command = ["sinfo", "--noheader", "--states=drain,down,fail,maint", "--format=%D"]
    return bool(_run([*command, *(partition.groups() if partition else ())]).stdout.strip())


def submit(script: Path, options: Sequence[str] = ()) -> str:
    """Submits a script; the id of the job.

    Raises:
        UserError: SLURM refuses it, or is not here.
    """
    done = _run(["sbatch", "--parsable", *options, str(script)])
    if done.returncode:
        raise UserError(f"sbatch {script}: {_in_a_line(done.stderr)}")
    return done.stdout.strip().partition(";")[0]  # a federation adds the cluster's name


def cancel(jobs: Sequence[str]) -> None:
    """Ends jobs, waiting or running; those that have ended already are no error.

    Raises:
        UserError: SLURM refuses, or is not here.
    """
    done = _run(["scancel", *jobs])
    if done.returncode and "Invalid job id" not in done.stderr:
        raise UserError(f"scancel {' '.join(jobs)}: {_in_a_line(done.stderr)}")


def _run(command: Sequence[str], text: str | None = None) -> subprocess.CompletedProcess[str]:
    try:
        done = subprocess.run(
            command,
            input=text,
            env=_environment(),
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
    except FileNotFoundError:
        raise UserError(
            f"{command[0]} is not on this machine: use a login node of the cluster (`moored submit "
            "--dry-run` shows a script anywhere)"
        ) from None
    except subprocess.TimeoutExpired:
        raise UserError(
            f"{command[0]} did not answer in {SECONDS:.0f} s: try again once SLURM answers"
        ) from None
    if done.returncode and re.search("configuration source|Unable to contact|MUNGE", done.stderr):
        raise UserError(
            f"SLURM does not answer here ({_in_a_line(done.stderr.strip().splitlines()[-1])}): try "
            "again once it does, and see that SLURM_CONF names its configuration if it must"
        )
    return done


def _in_a_line(text: str) -> str:
    """All that a command complained of; a site's own words come before SLURM's."""
    lines = [re.sub(r"^\w+: ((error|fatal): )?", "", line.strip()) for line in text.splitlines()]
    return "; ".join(dict.fromkeys(filter(None, lines))) or "no reason given"
