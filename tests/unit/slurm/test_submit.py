"""Site profiles, job scripts and sweeps, without SLURM; with it they are in tests/slurm."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moored.cli import main
from moored.config import load_config
from moored.slurm import jobs as room
from moored.slurm.script import Job, render
from moored.slurm.site import REFERENCE_HEAD, Site, load_site, slurm_folder
from moored.slurm.site import _seconds as limit_seconds
from moored.slurm.snapshot import fingerprints, input_files, missing_and_changed
from moored.slurm.sweep import arms_of, array_of, split_values, submit_sweep
from moored.tracking.run_directory import path_of
from moored.utils.errors import UserError, UserErrors
from tiny import write_recipe

GOLDEN = Path(__file__).parents[2] / "golden" / "slurm"
ROOT = Path(__file__).parents[3]
SITES = sorted(path.stem for path in (slurm_folder() / "sites").glob("*.yaml"))


def job(**changes: object) -> Job:
    values: dict = {
        "title": "quickstart: train",
        "name": "quickstart",
        "folder": Path("/project/runs/quickstart"),
        "python": "/project/venv/bin/python",
        "nodes": 2,
    }
    return Job(**(values | changes))


CASES = {site: (site, job()) for site in SITES} | {
    "sweep": (
        "gpu-modules",
        job(
            title="quickstart: a sweep of 3 arms",
            arms=tuple(
                Path(f"/project/runs/quickstart/arms/tmkl-weight{w}") for w in (0.1, 0.3, 1)
            ),
            indices=(0, 2),
            throttle=2,
            ship_later=True,
        ),
    ),
    "export": (
        "gpu-apptainer",
        job(
            title="quickstart: export",
            kind="cpu",
            file="export",
            commands=(("export", "/project/runs/quickstart", "--to", "/project/out put"),),
        ),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_scripts_are_as_they_were(case: str) -> None:
    """`MOORED_GOLDEN=write` writes them anew: look at the difference before committing it."""
    site, what = CASES[case]
    name, profile = load_site(site)
    text = render(what, profile, name)
    path = GOLDEN / f"{case}.sbatch"
    if os.environ.get("MOORED_GOLDEN") == "write":
        path.write_text(text)
    assert text == path.read_text()
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)


def test_every_golden_script_has_a_case() -> None:
    assert {path.stem for path in GOLDEN.glob("*.sbatch")} == set(CASES)


def test_the_page_of_site_profiles_is_true() -> None:
    from moored.config.recipe_docs import reference

    assert reference(Site, REFERENCE_HEAD) == (ROOT / "docs" / "site.md").read_text(), (
        "run python -m moored.slurm.site > docs/site.md"
    )


HOSTILE = st.text(
    st.sampled_from(list("a/ .'\"`$(){}[]*?!#&|;<>~%=,:@-\\\n\t\0é")), min_size=1, max_size=30
)


@given(HOSTILE)
def test_a_path_reaches_bash_as_it_is_or_is_refused(name: str) -> None:
    folder = Path("/work") / f"x{name}"
    try:
        text = render(job(folder=folder), load_site("cpu")[1], "cpu")
    except UserError:
        assert re.search(r"[\x00-\x1f\x7f\\]", str(folder))
        return
    line = next(line for line in text.splitlines() if line.startswith("run="))
    done = subprocess.run(
        ["bash", "-c", f'{line}\nprintf %s "$run"'], capture_output=True, check=True
    )
    assert done.stdout.decode() == str(folder)
    output = next(line for line in text.splitlines() if "--output=" in line)
    assert "\n" not in output
    inner = output.partition('"')[2].rpartition('"')[0].replace('\\"', '"').replace("%%", "%")
    assert inner == f"{folder}/slurm/job-%j.log"


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("slurm.partition=a b", "expected a name of SLURM's"),
        ("slurm.partition=$(id)", "expected a name of SLURM's"),
        ("slurm.account=a;b", "expected a name of SLURM's"),
        ("slurm.time=soon", "expected a time such as"),
        ("slurm.time=03:00", "03:00 is 180 s, and SLURM would warn at once"),
        ("slurm.time=04:00", "(warn_seconds is 180, and it comes up to 60 s early)"),
        ("slurm.options=[--wrap=x y]", "expected an option of sbatch"),
        ('slurm.options=["--comment=a\\n#SBATCH --uid=0"]', "expected an option of sbatch"),
        ("slurm.gpu_type=h100", "would be ignored, since gpus_per_node is 0"),
        ("slurm.partitoin=a", "unknown key; did you mean partition?"),
        ("environment.variables.MY_API_KEY=x", "looks like a secret"),
        ("environment.variables.a-b=x", "expected the name of a variable"),
        ("storage.cache=relative", "expected an absolute path"),
        ("storage.cache=/x/$(id)", "expected an absolute path"),
        ("storage.scratch=/x/`id`", "expected an absolute path"),
        ("mlflow.uri=http://me:pw@host", "holds a user or password"),
        ("container.runtime=pyxis", "image: is missing"),
        ("container.image=x", "would be ignored, since runtime is none"),
    ],
)
def test_profiles_are_strict(setting: str, says: str) -> None:
    with pytest.raises(UserErrors) as caught:
        load_site("cpu", [setting])
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("limit", "seconds"),
    [
        ("30", 1800),
        ("30:20", 1820),
        ("01:30:20", 5420),
        ("2-12", 60 * 3600),
        ("2-12:30", 60 * 3600 + 1800),
        ("1-00:00:01", 86401),
    ],
)
def test_limits_are_read_as_slurm_does(limit: str, seconds: int) -> None:
    assert limit_seconds(limit) == seconds


def test_what_a_site_sources_may_use_unset_variables() -> None:
    """Scripts of conda and of environment modules do."""
    sets = ["environment.setup=['echo $SURELY_NOT_SET', 'echo reached']"]
    text = render(job(), load_site("cpu", sets)[1], "cpu")
    head = text[: text.index("export SLURM_EXPORT_ENV")] + "echo $SURELY_NOT_SET\n"
    done = subprocess.run(["bash", "-c", head], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["reached"]
    assert "unbound variable" in done.stderr


def test_journals_are_sent_although_there_is_nothing_to_report(tmp_path: Path) -> None:
    commands = (("report", str(tmp_path)), ("sync", str(tmp_path)))
    what = job(kind="cpu", file="report", folder=tmp_path, commands=commands)
    text = render(what, load_site("cpu")[1], "cpu")
    head = "SLURM_JOB_ID=1 SLURM_JOB_NODELIST=x; srun() { echo $*; [[ $* != *report* ]]; }\n"
    done = subprocess.run(["bash", "-c", head + text], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"moored sync {tmp_path}" in done.stdout


def test_a_recipe_in_the_place_of_a_site_is_named(recipe: Path) -> None:
    says = rf"--site {recipe}: this is a recipe, and a site profile is needed: name one of cpu, "
    with pytest.raises(UserError, match=says) as caught:
        load_site(str(recipe))
    assert "\n" not in str(caught.value)
    with pytest.raises(UserErrors, match="train: unknown key"):  # of the command line alone
        load_site("cpu", ["train.steps=3"])


def test_an_unknown_site_is_told_what_there_is() -> None:
    with pytest.raises(UserError, match=r"did you mean gpu-pyxis\?.*there are cpu, "):
        load_site("gpu-pyxsi")


def test_a_profile_that_is_none(tmp_path: Path) -> None:
    for name, text, says in (
        ("a.yaml", "# nothing\n", "the profile is empty: copy one from"),
        ("a.conf", "slurm: {}\n", "a profile's name ends in .yaml"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=says):
            load_site(str(tmp_path / name))


def test_a_profile_by_its_path(tmp_path: Path) -> None:
    path = tmp_path / "my cluster.yaml"
    path.write_text("slurm: {partition: fast, time: '2:00:00'}\n")
    name, site = load_site(str(path), ["slurm.account=us"])
    assert (name, site.slurm.partition, site.slurm.account) == ("my cluster", "fast", "us")


def test_secrets_are_passed_on_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "canary-5cf1")
    monkeypatch.setenv("HF_TOKEN", "canary-77aa")
    for site in SITES:
        text = render(job(), load_site(site)[1], site)
        assert "canary" not in text
        assert "MLFLOW_TRACKING_PASSWORD" in text


# ---------------------------------------------------------------- sweeps


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a", ["a"]),
        ("a,b", ["a", "b"]),
        ("[a,b],[c]", ["[a,b]", "[c]"]),
        ('"a,b",c', ['"a,b"', "c"]),
        ("{a: 1, b: 2},3", ["{a: 1, b: 2}", "3"]),
        ("a,", ["a", ""]),
    ],
)
def test_values_are_cut_at_commas(text: str, parts: list[str]) -> None:
    assert split_values(text) == parts


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "data.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    values = {
        "model": {"name_or_path": "somewhere"},
        "data": {"train": [{"path": "data.jsonl"}]},
        "train": {"steps": 5, "global_batch_sequences": 1},
        "output": {"dir": str(tmp_path / "runs")},
    }
    return write_recipe(tmp_path, values)


def test_a_grid_has_every_arm_once(recipe: Path) -> None:
    texts = ["regularizer.kind=none,tmkl", "regularizer.weight=0.1,0.3", "train.seed=0,1", "name=s"]
    arms = arms_of(recipe, texts)
    assert [arm.name for arm in arms] == [
        "none-seed0",
        "none-seed1",
        "tmkl-weight0.1-seed0",
        "tmkl-weight0.1-seed1",
        "tmkl-weight0.3-seed0",
        "tmkl-weight0.3-seed1",
    ]
    assert {arm.config.name for arm in arms} == {"s"}
    assert arms[-1].config.regularizer.weight == 0.3
    array, report = array_of(arms, load_site("cpu")[1], nodes=1, throttle=2, indices=[1, 4])
    text = render(array, load_site("cpu")[1], "cpu")
    assert "#SBATCH --array=1,4%2" in text
    assert shlex.split(next(x for x in text.splitlines() if x.startswith("arms=("))[6:-1]) == [
        str(path_of(arms[0].config) / "arms" / arm.name) for arm in arms
    ]
    assert report.commands[0] == ("report", str(path_of(arms[0].config)))


@pytest.mark.parametrize(
    ("texts", "says"),
    [
        (["train.seed=1"], "nothing is swept"),
        (["train.seed=1,"], "a value between commas"),
        (["name=a,b"], "is the same for all arms"),
        (["track.uri=a,b"], "is the same for all arms"),
        (["train.seed=0,x"], "expected an integer"),
        (["train.sed=0,1"], "did you mean seed"),
    ],
)
def test_a_wrong_grid(recipe: Path, texts: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        arms_of(recipe, texts)


def test_names_of_arms_are_folders(recipe: Path) -> None:
    texts = ["adapter.target_modules=[q_proj],[k_proj, v_proj],all-linear"]
    names = [arm.name for arm in arms_of(recipe, texts)]
    assert len(set(names)) == 3
    assert all(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) for name in names)


# ---------------------------------------------------------------- inputs


def test_inputs_that_change_are_noticed(recipe: Path) -> None:
    config = load_config(recipe)
    files = input_files(config)
    assert files == [recipe.parent / "data.jsonl"]
    expected = fingerprints(files)
    assert missing_and_changed(expected) == ([], [])
    files[0].write_text('{"prompt": "a", "completion": "c"}\n')
    assert missing_and_changed(expected) == ([], [str(files[0])])
    files[0].unlink()
    assert missing_and_changed(expected) == ([str(files[0])], [])


def test_both_ends_of_a_big_file_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moored.slurm.snapshot.WHOLE_BYTES", 100)
    monkeypatch.setattr("moored.slurm.snapshot.END_BYTES", 20)
    path = tmp_path / "weights"
    path.write_bytes(bytes(200))
    expected = fingerprints([path])
    for place in (0, 199):
        path.write_bytes(bytes(place) + b"x" + bytes(199 - place))
        assert missing_and_changed(expected)[1] == [str(path)]


def test_what_a_chain_consists_of(recipe: Path) -> None:
    config, site = load_config(recipe), load_site("cpu")[1]
    run = path_of(config)
    jobs = room.jobs_of(config, site, run, nodes=3, stages=["export", "train"])
    assert [(stage, j.kind, j.nodes) for stage, j in jobs.items()] == [
        ("train", "train", 3),
        ("export", "cpu", 3),
    ]
    assert len({j.label for j in jobs.values()}) == 2
    assert len({j.script for j in jobs.values()}) == 2
    with pytest.raises(UserError, match=r"--stages trian: there are prepare, probe, train"):
        room.jobs_of(config, site, run, nodes=1, stages=["trian"])
    with pytest.raises(UserError, match=r"--stages names none: there are prepare, probe, train"):
        room.jobs_of(config, site, run, nodes=1, stages=[])


def test_a_limit_may_be_minutes(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["submit", str(recipe), "--site=cpu", "--time=30", "--dry-run"])
    assert "#SBATCH --time=30\n" in capsys.readouterr().out


def test_nothing_is_lost_by_what_cannot_be_meant(recipe: Path) -> None:
    """A restart without training; a sweep where a run is; a run where a sweep is."""
    config, (name, site) = load_config(recipe), load_site("cpu")
    run = path_of(config)
    (run / "slurm").mkdir(parents=True)
    (run / "config.yaml").write_text("")
    with pytest.raises(UserError, match="--restart would remove the trained run"):
        room.submit_run(config, site, name, stages=["report"], restart=True)
    exported = room.export_folder(run) / "adapter_config.json"
    exported.parent.mkdir()
    exported.touch()
    with pytest.raises(UserError, match="-export is there already"):
        room.submit_run(config, site, name, stages=["train", "export"], restart=True)
    (run / "adapter").mkdir()
    with pytest.raises(UserError, match=r"is a run: choose another name=.*by `moored train`"):
        submit_sweep(recipe, ["train.seed=0,1"], site, name)
    (run / "adapter").rename(run / "adapter-of-none")
    (run / "arms/none").mkdir(parents=True)
    (run / "adapter-of-none").rename(run / "arms/none/adapter")
    with pytest.raises(UserError, match=r"is a comparison: choose another .*`moored compare`"):
        room.submit_run(config, site, name)
    (run / "slurm/arms.json").write_text('{"arms": []}')
    shutil.rmtree(run / "arms")
    with pytest.raises(UserError, match=r"is a sweep: choose another name=.*`moored sweep`"):
        room.submit_run(config, site, name)


def test_a_mesh_that_cannot_be_is_refused_before_the_queue(recipe: Path) -> None:
    config, site = load_config(recipe, ["parallel.tensor_parallel_degree=2"]), load_site("cpu")[1]
    run = path_of(config)
    with pytest.raises(UserError, match="=2 does not divide 3 nodes x 1 processes"):
        room.jobs_of(config, site, run, nodes=3, stages=["train"])
    assert room.jobs_of(config, site, run, nodes=2, stages=["train"])


def test_runs_are_tracked_where_the_site_says(recipe: Path) -> None:
    site = load_site("cpu", ["mlflow.uri=http://here:5000"])[1]
    assert room.for_site(load_config(recipe), site).track.uri == "http://here:5000"
    own = load_config(recipe, ["track.uri=sqlite:////x.db"])
    assert room.for_site(own, site).track.uri == "sqlite:////x.db"
    assert room.ships_to_file(own)
    assert not room.ships_to_file(room.for_site(load_config(recipe), site))
    arms = arms_of(recipe, ["train.seed=0,1"])
    array, _ = array_of(arms, site, nodes=1, throttle=0, indices=[0, 1])
    assert not array.ship_later
