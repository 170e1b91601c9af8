"""Steps of srun that a user starts by hand, and what his shell may not do to a job."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from slurmkit import MOORED, SECONDS, Desk, Job, facts, until

pytestmark = pytest.mark.long

SHORT = ("train.steps=6", "train.save_every=3")
DOCTOR = shlex.join([*MOORED, "doctor"])


def step(desk: Desk, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["srun", *command],
        env=desk.environment | variables,
        cwd=desk.recipe.parent,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )


@pytest.mark.parametrize("nodes", [1, 2])
def test_a_step_by_hand_knows_its_own(desk: Desk, nodes: int, tmp_path: Path) -> None:
    """No script of ours gave it a secret: rank 0 leaves one, and takes it away again."""
    run = ["train", str(desk.recipe), f"name=by-hand-{nodes}", *SHORT]
    done = step(desk, f"--nodes={nodes}", "--ntasks=2", *MOORED, *run)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not list((desk.recipe.parent / "runs").glob(".meeting*"))
    cache = tmp_path / "cache"
    done = step(desk, f"--nodes={nodes}", "--ntasks=2", *MOORED, "doctor", MOORED_CACHE=str(cache))
    assert "processes   2, all-reduce works on cpu" in done.stdout, done.stderr
    assert not cache.exists()


def test_one_process_of_an_interactive_step(desk: Desk, tmp_path: Path) -> None:
    """`srun -n 4 --pty bash`: one of four has a shell. It says so, and what helps does help."""
    script = f"""
    if [ "$SLURM_PROCID" != 0 ]; then until [ -e {tmp_path}/over ]; do sleep 1; done; exit; fi
    trap 'touch {tmp_path}/over' EXIT
    MOORED_RENDEZVOUS_SECONDS=20 {DOCTOR}
    echo "alone it ended with $?"
    env -u SLURM_STEP_ID {DOCTOR}
    srun --overlap --ntasks=4 {DOCTOR}
    """
    done = step(desk, "--ntasks=4", "--nodes=1", "bash", "-c", script)
    said = done.stdout + done.stderr
    assert re.search(
        r"rank 0 of 4 waits for ranks 1-3, for \d+ s more \(parallel\.rendezvous_seconds, or "
        r"MOORED_RENDEZVOUS_SECONDS\); to run one process alone: `env -u SLURM_STEP_ID moored",
        done.stderr,
    ), said
    assert done.stderr.count("error: rank 0 of 4 waited 20 s for ranks 1-3 ") == 1, said
    assert "alone it ended with 2" in said
    assert "processes   1, all-reduce works on cpu" in said
    assert "processes   4, all-reduce works on cpu" in said


def test_the_shell_changes_no_job(desk: Desk) -> None:
    """sbatch would put each of these before the lines of the script, --test-only as well."""
    shell = {
        "SBATCH_PARTITION": "nowhere",
        "SBATCH_TIMELIMIT": "1-00:00:00",
        "SBATCH_ARRAY_INX": "0-3",
        "SBATCH_JOB_NAME": "another",
        "SBATCH_OUTPUT": "/dev/null",
        "SBATCH_REQUEUE": "no",
        "SBATCH_WAIT": "1",
        "SLURM_CPU_BIND": "nonsense",  # of srun: sbatch hands it on to the job
        "SQUEUE_FORMAT": "%i",  # is only shown
    }
    job = desk.submit("shell", *SHORT, nodes=1, **shell)
    found = facts(desk, job.ids[0])
    assert "Partition=train " in found
    assert "TimeLimit=00:30:00 " in found
    assert "ArrayJobId" not in found
    assert "JobName=moored-shell-" in found
    job.done()
    assert "start 0, on node" in job.log()
    said = desk.moored(
        *("submit", str(desk.recipe), "name=shell-2", "--site=minicluster", *SHORT), **shell
    )
    names = ", ".join(sorted(set(shell) - {"SQUEUE_FORMAT"}))
    assert said.count(f"{names} of this shell are left out: a job asks for what its site ") == 1
    assert "nowhere" not in said


def test_a_job_submitted_from_a_job_is_none_of_its_parts(desk: Desk) -> None:
    """What SLURM has told the enclosing job about itself would be options of the new one's srun."""
    submit = ["submit", str(desk.recipe), "name=inner", *SHORT, "--site=minicluster"]
    shown = "echo it knows of ${SLURM_STEP_ID:-nothing} ${SLURM_MEM_PER_CPU:-nothing}"
    sets = ["--set=slurm.memory_per_node=600M", "--set=slurm.preflight=false"]
    sets.append(f'--set=environment.setup=["{shown}"]')
    done = step(
        desk,
        *("--ntasks=2", "--nodes=1", "--mem-per-cpu=100", "--cpus-per-task=2", "bash", "-c"),
        f'[ "$SLURM_PROCID" != 0 ] || {shlex.join([*MOORED, *submit, *sets])}',
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert "left out" not in said  # nobody chose these
    job = Job(desk, desk.recipe.parent / "runs/inner", re.findall(r"^job (\d+)", said, re.M)).done()
    assert "it knows of nothing nothing\n" in job.log()


def test_the_secret_of_a_job_is_in_its_environment_alone(desk: Desk) -> None:
    """Every start has its own; neither commands nor SLURM's records nor the run hold one."""
    job = desk.submit("secret", "train.steps=100000", "train.save_every=3")
    job.at_step(3)
    until(lambda: len(job.tasks()) == 2, job.words)
    found = set()
    for pid in job.tasks().values():
        text = Path(f"/proc/{pid}/environ").read_text()
        found.add(re.findall(r"MOORED_MEETING_SECRET=([0-9a-f]{64})\0", text)[0])
    (secret,) = found
    for line in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            assert secret.encode() not in line.read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue
    assert secret not in facts(desk, job.ids[0])
    for path in job.run.rglob("*"):
        assert not path.is_file() or secret.encode() not in path.read_bytes(), path
    desk.sh("scontrol", "requeue", job.ids[0])
    until(lambda: job.state().get("attempt", 1) > 1 and job.tasks(), job.words)
    again = Path(f"/proc/{job.tasks()[0]}/environ").read_text()
    assert "MOORED_MEETING_SECRET=" in again
    assert secret not in again
