"""What befalls jobs: each goes on to the adapter of an undisturbed run, bit for bit."""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from slurmkit import SAVED, STEPS, Desk, Job, facts, until
from trackkit import Server

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def undisturbed(cluster: Any, recipe: Path) -> Job:
    job = Desk(cluster, recipe).submit("undisturbed").done()
    assert job.num_attempts() == 1
    return job


def require_equal(job: Job, expected: Job) -> None:
    """The same adapter and the same losses, every step once."""
    mine, theirs = job.adapter(), expected.adapter()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert job.losses() == expected.losses()
    assert [step for step, _ in job.losses()] == list(range(1, STEPS + 1))


def tracked(job: Job, server: Server) -> Any:
    """The one run of the job in MLflow, asked through its REST API; every step once."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(server.uri)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    found = client.search_runs(experiments, f"run_name = '{job.run.name}'")
    assert len(found) == 1
    history = client.get_metric_history(found[0].info.run_id, "train/loss")
    assert sorted(point.step for point in history) == list(range(1, STEPS + 1))
    return found[0]


def successor_of(arm: Job) -> str:
    path = arm.run / "slurm/continued"  # there, and empty, before SLURM has answered
    return path.read_text().strip() if path.is_file() else ""


def test_preempted_by_a_higher_partition(desk: Desk, undisturbed: Job, server: Server) -> None:
    tracking = ("track.mlflow=true", "track.experiment=faults")
    sets = ("slurm.partition=spare", f"mlflow.uri={server.uri}")
    job = desk.submit("preempted", *tracking, sets=sets)
    urgent = ("--nodes=4", "--exclusive", "--partition=urgent", "--wrap=sleep 3")
    with job.held_at(SAVED):
        desk.sh("sbatch", "--output=/dev/null", *urgent)
        until(lambda: "PreemptTime=None" not in facts(desk, job.ids[0]), job.words)
    job.done()
    assert job.num_attempts() == 2
    assert "stopped by a signal" in job.log()
    require_equal(job, undisturbed)
    assert tracked(job, server).info.status == "FINISHED"


def test_short_limits_chain(desk: Desk, undisturbed: Job) -> None:
    """SLURM warns 59 s before the time is over, or up to a minute earlier."""
    sets = ("slurm.time=00:20:00", "slurm.warn_seconds=59")
    job = desk.submit("limited", "train.save_every=1000", sets=sets)
    journal = job.run / "journal.jsonl"
    until(lambda: journal.exists() and "train/loss" in journal.read_text(), job.words)
    with job.held():
        # As if it had been started with so little: how long a machine takes to the first step
        # is not known before.
        used = re.search(r"RunTime=(\d+):(\d+):", facts(desk, job.ids[0]))
        assert used
        minutes = 60 * int(used[1]) + int(used[2]) + 2
        desk.sh("scontrol", "update", f"JobId={job.ids[0]}", f"TimeLimit={minutes}")
        until(lambda: "warned by a signal" in job.log(), job.words)
    until(lambda: "Restarts=0" not in facts(desk, job.ids[0]), job.words)
    desk.sh("scontrol", "update", f"JobId={job.ids[0]}", "TimeLimit=20")
    job.done()
    assert job.num_attempts() >= 2
    require_equal(job, undisturbed)


def test_cancelled_and_submitted_again(desk: Desk, undisturbed: Job) -> None:
    job = desk.submit("cancelled")
    with job.held_at(SAVED):
        assert f"cancelled {job.ids[0]}" in desk.moored("cancel", str(job.run))
    job.ended()
    assert job.state()["status"] == "preempted"
    assert "left at that" in job.log()  # a cancelled job does not come back by itself
    said = desk.moored("status", str(job.run))
    assert "preempted" in said
    job = desk.submit("cancelled").done()
    assert job.num_attempts() == 2
    require_equal(job, undisturbed)


def test_rank_0_is_killed(desk: Desk, undisturbed: Job) -> None:
    """Another rank: below, while the controller is away."""
    job = desk.submit("killed")
    with job.held_at(SAVED):
        job.kill(0)
    job.done()
    assert job.num_attempts() == 2
    require_equal(job, undisturbed)


@pytest.mark.parametrize("which", ["with the script", "without it"])
def test_a_node_dies(desk: Desk, undisturbed: Job, which: str) -> None:
    job = desk.submit(f"node-{which.replace(' ', '-')}")
    with job.held_at(SAVED):
        nodes = desk.sh("squeue", "--noheader", "-j", job.ids[0], "-o", "%N").strip()
        names = desk.sh("scontrol", "show", "hostnames", nodes).split()
        node = names[0] if which == "with the script" else names[-1]
        assert desk.cluster.crash(node) > 0
    job.done()
    assert job.num_attempts() == 2
    require_equal(job, undisturbed)


def test_a_job_that_gets_nowhere_gives_up(desk: Desk) -> None:
    sets = ("environment.python=/no/such/python", "slurm.max_idle_attempts=1")
    job = desk.submit("nowhere", sets=sets)
    job.ended()
    assert job.slurm_states() == {"FAILED"}
    assert "1 starts in a row saved no new step: giving up" in job.log()
    assert job.log().count(": giving up") == job.log().count(", start ") == 1
    assert "giving up" in desk.moored("status", str(job.run))


def test_a_job_that_may_not_be_requeued_submits_its_successor(desk: Desk, undisturbed: Job) -> None:
    """And what waits for the job waits for that."""
    options = ("--stages=train,report", "--set=slurm.requeue=false")
    job = desk.submit("successor", *options)
    with job.held_at(SAVED):
        desk.sh("scancel", "--signal=USR1", "--batch", job.ids[0])
    until(lambda: job.state().get("status") == "preempted", job.words)
    successor = until(lambda: successor_of(job), job.words)
    assert job.slurm_states(job.ids[1]) == {"PENDING"}
    until(lambda: job.state().get("status") == "done", job.words)
    assert successor != job.ids[0]
    assert f"job       {successor} (train)" in desk.moored("status", str(job.run))
    require_equal(job, undisturbed)
    job.ended()
    assert job.slurm_states(job.ids[0]) == {"FAILED"}
    assert job.slurm_states(job.ids[1]) == {"COMPLETED"}, job.words()


def test_a_report_waits_for_the_successors_of_arms(desk: Desk) -> None:
    said = desk.moored(
        "sweep",
        str(desk.recipe),
        "name=succeeded",
        "train.seed=0,1",
        "--site=minicluster",
        "--set=slurm.preflight=false",
        "--set=slurm.requeue=false",
    )
    sweep = desk.recipe.parent / "runs/succeeded"
    array, report = re.findall(r"^job (\d+)", said, re.M)
    arms = [Job(desk, arm, [array]) for arm in sorted((sweep / "arms").iterdir())]
    with contextlib.ExitStack() as stack:  # the first must not be through before the second
        running = list(arms)
        while running:
            saved = until(lambda: [a for a in running if a.is_at(SAVED)], arms[0].words)
            stack.enter_context(saved[0].held())
            running.remove(saved[0])
        desk.sh("scancel", "--signal=USR1", "--batch", array)
    successors = [until(lambda a=arm: successor_of(a), arm.words) for arm in arms]
    status = desk.moored("status", str(sweep))
    assert all(f"job       {job} (train)" in status for job in successors)
    Job(desk, sweep, [report, *successors]).ended()
    assert [arm.state()["status"] for arm in arms] == ["done", "done"]
    figures = json.loads((sweep / "report/report.json").read_text())
    assert sorted(figures["arms"]) == [arm.run.name for arm in arms]


def test_a_rank_is_killed_while_the_controller_is_away(desk: Desk, undisturbed: Job) -> None:
    job = desk.submit("without-controller")
    with job.held_at(SAVED):
        desk.cluster.stop_controller()
        job.kill(1)
    try:
        until(lambda: "Unable to contact slurm controller" in job.log(), job.log)
    finally:
        desk.cluster.start()
    job.done()
    assert job.num_attempts() == 2
    require_equal(job, undisturbed)


def test_a_refused_run_is_not_started_again(desk: Desk) -> None:
    job = desk.submit("refused", "regularizer.weight=1e38")
    job.ended()
    assert job.state()["status"] == "refused", job.words()
    assert job.num_attempts() == 1
    assert "ExitCode=3:0" in facts(desk, job.ids[0])
