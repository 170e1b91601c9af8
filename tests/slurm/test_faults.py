"""What befalls jobs: each goes on to the adapter of an undisturbed run, bit for bit."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from slurmkit import SAVED, STEPS, Desk, Job, until
from trackkit import Server


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
    job.at_step(SAVED)
    desk.sh("srun", "--nodes=4", "--exclusive", "--partition=urgent", "sleep", "3")
    job.done()
    assert job.num_attempts() == 2
    assert "stopped by a signal" in job.log()
    require_equal(job, undisturbed)
    assert tracked(job, server).info.status == "FINISHED"


def test_short_limits_chain(desk: Desk, undisturbed: Job) -> None:
    """SLURM warns 59 s before the two minutes are over, or up to a minute earlier."""
    sets = ("slurm.time=00:02:00", "slurm.warn_seconds=59")
    job = desk.submit("limited", "train.save_every=1000", sets=sets)
    journal = job.run / "journal.jsonl"
    until(lambda: journal.exists() and "train/loss" in journal.read_text(), 90, job.words)
    with job.held():
        until(lambda: "warned by a signal" in job.log(), 90, job.words)
    # Once it has gone on, there is time: a slow machine does few steps in two minutes.
    until(lambda: job.num_attempts() >= 2, 120, job.words)
    desk.sh("bash", "-c", f"scontrol update JobId={job.ids[0]} TimeLimit=00:10:00 || true")
    job.done(200)
    assert job.num_attempts() >= 2
    require_equal(job, undisturbed)


def test_cancelled_and_submitted_again(desk: Desk, undisturbed: Job) -> None:
    job = desk.submit("cancelled")
    job.at_step(SAVED)
    assert f"cancelled {job.ids[0]}" in desk.moored("cancel", str(job.run))
    job.ended()
    assert job.state()["status"] == "preempted"
    assert "left at that" in job.log()  # a cancelled job does not come back by itself
    said = desk.moored("status", str(job.run))
    assert "preempted" in said
    job = desk.submit("cancelled").done()
    assert job.num_attempts() == 2
    require_equal(job, undisturbed)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_is_killed(desk: Desk, undisturbed: Job, rank: int) -> None:
    job = desk.submit(f"killed-{rank}")
    job.at_step(SAVED)
    job.kill(rank)
    job.done()
    assert job.num_attempts() == 2
    require_equal(job, undisturbed)


@pytest.mark.parametrize("which", ["with the script", "without it"])
def test_a_node_dies(desk: Desk, undisturbed: Job, which: str) -> None:
    job = desk.submit(f"node-{which.replace(' ', '-')}")
    job.at_step(SAVED)
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
    job = desk.submit("successor", sets=("slurm.requeue=false",))
    job.at_step(SAVED)
    desk.sh("scancel", "--signal=USR1", "--batch", job.ids[0])
    until(lambda: job.state().get("status") == "preempted", 30, "the save")
    successor = until(lambda: successor_of(job), 90, "the successor")
    until(lambda: job.state().get("status") == "done", 90, job.words)
    assert successor != job.ids[0]
    assert f"job       {successor} (train)" in desk.moored("status", str(job.run))
    require_equal(job, undisturbed)


def test_what_waits_for_a_job_waits_for_its_successor(desk: Desk) -> None:
    options = ("--stages=train,report", "--set=slurm.requeue=false")
    job = desk.submit("waited-for", *options)
    job.at_step(SAVED)
    desk.sh("scancel", "--signal=USR1", "--batch", job.ids[0])
    until(lambda: successor_of(job), 90, job.words)
    assert job.slurm_states(job.ids[1]) == {"PENDING"}
    job.ended(200)
    assert job.state()["status"] == "done"
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
        for arm in arms:
            arm.at_step(SAVED)
            stack.enter_context(arm.held())
        desk.sh("scancel", "--signal=USR1", "--batch", array)
    successors = [until(lambda a=arm: successor_of(a), 90, arm.words) for arm in arms]
    status = desk.moored("status", str(sweep))
    assert all(f"job       {job} (train)" in status for job in successors)
    Job(desk, sweep, [report, *successors]).ended(200)
    assert [arm.state()["status"] for arm in arms] == ["done", "done"]
    figures = json.loads((sweep / "report/report.json").read_text())
    assert sorted(figures["arms"]) == [arm.run.name for arm in arms]


def test_a_controller_that_is_away_for_a_while(desk: Desk, undisturbed: Job) -> None:
    job = desk.submit("without-controller")
    job.at_step(SAVED)
    desk.cluster.stop_controller()
    try:
        job.kill(1)
        until(lambda: "Unable to contact slurm controller" in job.log(), 60, job.log)
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
    facts = subprocess.run(
        ["scontrol", "-o", "show", "job", job.ids[0]],
        env=desk.environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "ExitCode=3:0" in facts
