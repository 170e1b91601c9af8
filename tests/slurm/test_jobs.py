"""What a user does with jobs: two nodes, checks, chains, sweeps, odd names, the same run twice."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moored.slurm.script import Job as Script
from moored.slurm.script import render
from moored.slurm.site import load_site
from slurmkit import SAVED, Desk, Job, until
from trackkit import Server

SHORT = ("train.steps=6", "train.save_every=3")


@pytest.fixture(scope="module")
def one_process(recipe: Path) -> Path:
    desk = Desk.__new__(Desk)
    desk.recipe, desk.environment = recipe, dict(os.environ)
    desk.moored("train", str(recipe), "name=one-process", *SHORT)
    return recipe.parent / "runs/one-process"


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.long)])
def test_two_nodes_equal_one_process(
    desk: Desk, one_process: Path, server: Server, ranks: int
) -> None:
    """Tolerances: as derived in test_zero.py. One run in MLflow, with metrics of each node."""
    name = f"two-by-{ranks}"
    sets = (
        f"slurm.ranks_per_node={ranks}",
        f"mlflow.uri={server.uri}",
        "environment.variables.MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL='0.5'",
        "slurm.preflight=true",
    )
    tracking = ("track.mlflow=true", f"track.experiment={name}", "train.micro_batch_size=1")
    job = desk.submit(name, *SHORT, *tracking, "parallel.zero_stage=2", sets=sets).done()
    expected = Job(desk, one_process, [])
    assert [loss for _, loss in job.losses()] == pytest.approx(
        [loss for _, loss in expected.losses()], rel=1e-5
    )
    theirs = expected.adapter()
    for tensor_name, tensor in job.adapter().items():
        wanted = theirs[tensor_name]
        assert (tensor - wanted).norm() <= 1e-5 * wanted.norm(), tensor_name

    from mlflow.tracking import MlflowClient

    client = MlflowClient(server.uri)
    experiment = client.get_experiment_by_name(name)
    assert experiment is not None
    [run] = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    nodes = {key.split("/")[1] for key in run.data.metrics if re.match(r"system/node\d/", key)}
    assert len(nodes) == 2
    for node in nodes:
        assert f"system/{node}/cpu_utilization_percentage" in run.data.metrics
    checks = sorted((job.run / "slurm/preflight").glob("*/node?"))
    assert [path.read_text().split("\n")[0] for path in checks] == ["ok", "ok"]
    assert "all-reduce" in checks[0].read_text()


def in_node(desk: Desk, node: str, *command: str) -> None:
    """Run something in the name spaces of a node."""
    pid = (desk.cluster.root / "run" / f"slurmd.{node}.pid").read_text().strip()
    subprocess.run(["nsenter", f"--target={pid}", "--mount", "--uts", *command], check=True)


@pytest.mark.long
def test_an_unfit_node_is_named_and_left_out(desk: Desk, tmp_path: Path) -> None:
    """One node does not see the data."""
    folder = tmp_path / "data"
    folder.mkdir()
    data = folder / "train.jsonl"
    data.write_text((desk.recipe.parent / "train.jsonl").read_text())
    in_node(desk, "node1", "mount", "-t", "tmpfs", "tmpfs", str(folder))
    try:
        sets = ("slurm.preflight=true",)
        job = desk.submit("unfit", *SHORT, f"data.train.0.path={data}", sets=sets).done()
    finally:
        in_node(desk, "node1", "umount", str(folder))
    assert f"node1: bad: {data} cannot be read here" in job.log()
    assert (job.run / "slurm/excluded").read_text().split() == ["node1"]
    assert "excluded  node1" in desk.moored("status", str(job.run))
    assert job.num_attempts() == 1
    assert job.log().count(", start ") == 2


@pytest.mark.long
def test_where_every_node_is_unfit_the_job_gives_up(desk: Desk) -> None:
    """It does not wait for ever for nodes that it has excluded itself."""
    sets = (
        "slurm.preflight=true",
        "environment.python=/no/such/python",
        "slurm.exclude='node[2-4]'",
    )
    job = desk.submit("unfit-all", *SHORT, nodes=1, sets=sets)
    job.ended()
    assert "without node1 too few nodes are left: trying them again" in job.log()
    assert "3 starts in a row saved no new step: giving up" in job.log()
    assert job.log().count(", start ") == 3


@pytest.mark.long
def test_data_that_changed_end_the_job(desk: Desk, tmp_path: Path) -> None:
    data = tmp_path / "train.jsonl"
    data.write_text((desk.recipe.parent / "train.jsonl").read_text())
    sets = ("slurm.preflight=true", "slurm.options=[--hold]")
    job = desk.submit("changed", *SHORT, f"data.train.0.path={data}", sets=sets)
    data.write_text(data.read_text().replace("fox", "ox"))
    desk.sh("scontrol", "release", job.ids[0])
    job.ended()
    assert job.slurm_states() == {"FAILED"}
    assert f"{data} changed after the job was submitted: submit it again" in job.log()
    assert "changed after" in desk.moored("status", str(job.run))


@pytest.mark.long
def test_the_model_is_staged_on_each_node(desk: Desk, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    sets = ("slurm.preflight=true", f"storage.scratch={scratch}/$SLURMD_NODENAME")
    job = desk.submit("staged", *SHORT, sets=sets).done()
    copies = sorted(scratch.glob("*/moored-models/*/model.safetensors"))
    assert len(copies) == 2, job.words()
    assert "not staged" not in (job.run / "logs/rank-1.log").read_text()
    original = (desk.recipe.parent / "model/model.safetensors").read_bytes()
    assert copies[0].read_bytes() == original


@pytest.mark.long
def test_edits_after_submission_change_nothing(desk: Desk, tmp_path: Path) -> None:
    """Recipe and code are those of the submission."""
    text = desk.recipe.read_text()
    recipe = tmp_path / "edited.yaml"
    recipe.write_text(text)
    desk = Desk(desk.cluster, recipe)
    sets = ("slurm.options=[--hold]",)
    job = desk.submit("edited", *SHORT, f"output.dir={tmp_path}", nodes=1, sets=sets)
    recipe.write_text("broken: [")
    desk.sh("scontrol", "release", job.ids[0])
    job.done()
    assert job.state()["num_steps"] == 6
    code = job.run / "slurm/code/moored"
    assert (code / "training/train.py").is_file()
    lines = (job.run / "logs/rank-0.log").read_text()
    assert str(job.run) in lines


@pytest.mark.long
def test_the_same_run_twice(desk: Desk) -> None:
    job = desk.submit("twice", nodes=1)
    with job.held_at(SAVED):
        direct = desk.moored("train", str(desk.recipe), "name=twice", code=2)
        of_job = rf"is in use by job {job.ids[0]}, process \d+ on node\d: wait for it"
        assert re.search(of_job, direct)
        said = desk.moored("submit", str(desk.recipe), "name=twice", "--site=minicluster", code=2)
        assert f"has job {job.ids[0]} (train) in the queue" in said
        assert said.count("\n") == 1
        # Past `moored submit`: SLURM makes it wait.
        second = desk.sh("sbatch", "--parsable", str(job.run / "slurm/job.sbatch")).strip()
        assert job.slurm_states(second) == {"PENDING"}
    job.done()
    until(lambda: job.slurm_states(second) == {"COMPLETED"}, job.words)
    assert job.num_attempts() == 1
    arguments = ("submit", str(desk.recipe), "name=twice")
    said = desk.moored(*arguments, "--site=minicluster", code=2)
    assert "is finished already: --restart starts over" in said


@pytest.mark.long
def test_hostile_names_are_harmless(desk: Desk, tmp_path: Path) -> None:
    """Blanks, quotes, dollars and percents in every path, through a real sbatch."""
    folder = tmp_path / 'it\'s "a" $(touch pwned) `touch pwned` 100% &;|#~*'
    folder.mkdir()
    data = folder / "train $(touch pwned).jsonl"
    data.write_text((desk.recipe.parent / "train.jsonl").read_text())
    recipe = folder / "a recipe.yaml"
    recipe.write_text(desk.recipe.read_text())
    desk = Desk(desk.cluster, recipe)
    overrides = (
        f"output.dir={json.dumps(str(folder))}",
        f"data.train.0.path={json.dumps(str(data))}",
    )
    job = desk.submit("odd", *SHORT, *overrides, sets=("slurm.preflight=true",)).done()
    assert job.run.parent == folder
    assert job.log().count("the run is done") == 1
    assert not [path for path in (*tmp_path.rglob("pwned"), Path("/pwned")) if path.exists()]
    said = desk.moored("submit", str(recipe), "name=$(x)", "--site=minicluster", code=2)
    assert "use letters, digits" in said
    said = desk.moored(
        "submit", str(recipe), "name=x", 'output.dir="a\\nb"', "--site=minicluster", code=2
    )
    assert "cannot be given a path with line breaks" in said


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(name=st.text(st.characters(exclude_characters="/"), min_size=1, max_size=30))
def test_sbatch_takes_every_script(desk: Desk, name: str) -> None:
    from moored.utils.errors import UserError

    profile, site = load_site("minicluster")
    script = Script(title="x", name="x", folder=Path("/tmp") / f"x{name}", python="python3")
    try:
        text = render(script, site, profile)
        encoded = text.encode()
    except (UserError, UnicodeEncodeError):
        return
    done = subprocess.run(
        ["sbatch", "--test-only"],
        input=encoded,
        env=desk.environment,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_slurm_refuses_before_anything_is_kept(desk: Desk) -> None:
    said = desk.moored(
        "submit", str(desk.recipe), "name=big", "--site=minicluster", "--nodes=99", code=2
    )
    assert said.startswith("error: SLURM would refuse this job: ")
    assert not (desk.recipe.parent / "runs/big").exists()


@pytest.mark.long
def test_a_job_may_wait_for_nodes_in_maintenance(desk: Desk) -> None:
    nodes = "nodename=node[1-4]"
    desk.sh("scontrol", "update", nodes, "state=drain", "reason=test")
    try:
        job = desk.submit("maintained", *SHORT, nodes=1)
        assert job.slurm_states() == {"PENDING"}
    finally:
        desk.sh("scontrol", "update", nodes, "state=resume")
    job.done()


@pytest.mark.long
def test_secrets_reach_the_job_and_nothing_else(desk: Desk) -> None:
    canary = "canary-5cf1b2"
    shown = (
        'environment.setup=["[[ $MLFLOW_TRACKING_PASSWORD == canary-5cf1?2 ]] && echo it-is-here"]'
    )
    job = desk.submit("secret", *SHORT, nodes=1, sets=(shown,), MLFLOW_TRACKING_PASSWORD=canary)
    job.done()
    assert "it-is-here" in job.log()
    for path in filter(Path.is_file, job.run.rglob("*")):
        assert canary.encode() not in path.read_bytes(), path


@pytest.mark.long
def test_a_chain(desk: Desk) -> None:
    said = desk.moored(
        "submit",
        str(desk.recipe),
        "name=chain",
        *SHORT,
        "--site=minicluster",
        "--set=slurm.preflight=false",
        "--stages=prepare,train,evaluate,report,export",
        MOORED_CACHE=str(desk.recipe.parent / "cache"),
    )
    job = Job(desk, desk.recipe.parent / "runs/chain", re.findall(r"^job (\d+)", said, re.M))
    assert len(job.ids) == 5
    job.ended()
    for each in job.ids:
        assert job.slurm_states(each) == {"COMPLETED"}, job.words()
    exported = desk.recipe.parent / "runs/chain-export"
    assert (exported / "adapter_model.safetensors").is_file()


@pytest.mark.long
def test_a_sweep_with_an_arm_that_is_rerun_alone(desk: Desk) -> None:
    arguments = (
        "sweep",
        str(desk.recipe),
        "name=sweep",
        "regularizer.weight=0.1,0.5,2",
        "track.mlflow=true",
        "--site=minicluster",
        "--set=slurm.preflight=false",
        "--throttle=2",
    )
    said = desk.moored(*arguments)
    sweep = desk.recipe.parent / "runs/sweep"
    array, report = re.findall(r"^job (\d+)", said, re.M)
    arms = {name: Job(desk, sweep / "arms" / name, [array]) for name in os.listdir(sweep / "arms")}
    assert sorted(arms) == ["tmkl-weight0.1", "tmkl-weight0.5", "tmkl-weight2"]
    with arms["tmkl-weight0.5"].held_at(SAVED):
        desk.sh("scancel", f"{array}_1")
    whole = Job(desk, sweep, [array, report])
    whole.ended()
    log = (sweep / f"slurm/report-{report}.log").read_text()
    assert "1 of 3 arms are not in the report, since they did not end: tmkl-weight0.5" in log
    table = desk.moored("status", str(sweep))
    assert re.search(r"tmkl-weight0.5 +preempted", table)
    assert table.count(" done ") == 2

    again = desk.moored(*arguments)
    assert re.findall(r"^arm +(.+)$", again, re.M) == ["tmkl-weight0.5"]
    ids = re.findall(r"^job (\d+)", again, re.M)
    Job(desk, sweep, ids).ended()
    figures = json.loads((sweep / "report/report.json").read_text())
    assert sorted(figures["arms"]) == sorted(arms)
    assert (sweep / "report/frontier.png").read_bytes().startswith(b"\x89PNG")
    assert {name: job.num_attempts() for name, job in arms.items()} == {
        "tmkl-weight0.1": 1,
        "tmkl-weight0.5": 2,
        "tmkl-weight2": 1,
    }

    from mlflow.tracking import MlflowClient

    client: Any = MlflowClient(f"sqlite:///{sweep.parent}/mlflow.db")
    experiment = client.get_experiment_by_name("moored")
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert len(runs) == 4
    parent = runs["sweep"].info.run_id
    children = [run for name, run in runs.items() if name != "sweep"]
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent}
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    assert client.list_artifacts(parent, "report")


@pytest.mark.long
def test_a_mended_recipe_is_submitted_under_the_same_name(desk: Desk) -> None:
    """Where no step was made yet, by a run or by any arm of a sweep, and no job is in the queue."""
    missing = f"model.name_or_path={desk.recipe.parent}/nomodel"
    failed = desk.submit("mended", missing, *SHORT, nodes=1)
    failed.ended()
    assert (failed.state()["status"], failed.state()["exit_code"]) == ("failed", 2), failed.words()
    mended = desk.submit("mended", *SHORT, nodes=1).done()
    assert mended.num_attempts() == 1

    held = desk.submit("held", *SHORT, nodes=1, sets=("slurm.options=[--hold]",))
    train = ("train", str(desk.recipe), "name=held", *SHORT, "train.seed=5")
    assert "holds a run of another recipe" in desk.moored(*train, code=2)
    desk.sh("scancel", *held.ids)

    sweep = desk.recipe.parent / "runs/mended-sweep"
    options = ("--site=minicluster", "--set=slurm.preflight=false")
    arguments = ("sweep", str(desk.recipe), "name=mended-sweep", *SHORT, *options)
    for overrides in ((missing, "train.seed=0,1"), ("train.seed=2,3",)):
        said = desk.moored(*arguments, *overrides)
        Job(desk, sweep, re.findall(r"^job (\d+)", said, re.M)).ended()
    assert {path.name: Job(desk, path, []).state()["status"] for path in sweep.glob("arms/*")} == {
        "tmkl-seed2": "done",
        "tmkl-seed3": "done",
    }
    assert "nomodel" not in (sweep / "config.yaml").read_text()
    assert "nomodel" not in (sweep / "journal.jsonl").read_text()


@pytest.mark.long
def test_apptainer_is_called_with_what_it_needs(desk: Desk, tmp_path: Path) -> None:
    """A stand-in for the runtime, which has no package here: it notes its arguments and goes on."""
    image, noted = tmp_path / "moored.sif", tmp_path / "noted"
    image.write_text("")
    program = tmp_path / "bin/apptainer"
    program.parent.mkdir()
    program.write_text(
        f'#!/bin/bash\nprintf "%s\\n" "$@" >"{noted}.$SLURM_PROCID.$$"\n'
        f'while [[ $1 != {image} ]]; do shift; done\nshift\nexec "$@"\n'
    )
    program.chmod(0o755)
    sets = (
        "container.runtime=apptainer",
        f"container.image={image}",
        f"container.python={sys.executable}",
        f"environment.setup=['export PATH={program.parent}:$PATH']",
        "slurm.preflight=true",
    )
    job = desk.submit("contained", *SHORT, sets=sets).done()
    calls = [path.read_text().split("\n") for path in tmp_path.glob("noted.*")]
    assert len(calls) == 4  # two nodes checked, two ranks
    for call in calls:
        assert call[0] == "exec"
        binds = {call[i + 1] for i, word in enumerate(call) if word == "--bind"}
        assert f"{job.run}:{job.run}" in binds
        assert f"{desk.recipe.parent}:{desk.recipe.parent}" in binds


@pytest.mark.long
def test_pyxis_is_given_what_it_needs(desk: Desk, tmp_path: Path) -> None:
    """A stand-in for the plugin in a real srun: it takes the options, and starts no container."""
    noted = tmp_path / "noted"
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/bash\nenv | grep ^STUB_ | sort >"{noted}.$SLURM_STEPID.$SLURM_PROCID"\n'
        f'exec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    sets = (
        "container.runtime=pyxis",
        "container.image=/images/moored.sqsh",
        "container.options=[--no-container-mount-home]",
        f"container.python={python}",
        "container.mounts=['/data:/data']",
        f"storage.cache={tmp_path}/cache-$USER",
    )
    environment = {"MOORED_CACHE": str(tmp_path / "cache")}
    job = desk.submit("pyxis", *SHORT, sets=sets, **environment).done()
    for path in sorted(tmp_path.glob("noted.*")):
        image, mounts, names, home = path.read_text().splitlines()
        assert image == "STUB_0=/images/moored.sqsh"
        mounted = mounts.removeprefix("STUB_1=").split(",")
        assert f"{job.run}:{job.run}" in mounted
        cache = tmp_path / "cache-root"
        assert {f"{cache}:{cache}", "/data:/data"} <= set(mounted)
        assert (cache / "huggingface").is_dir()
        assert {"PYTHONPATH", "MOORED_LAUNCH", "HF_HOME"} <= set(names[7:].split(","))
        assert home == "STUB_3=given"
    assert len(list(tmp_path.glob("noted.*"))) == 2
