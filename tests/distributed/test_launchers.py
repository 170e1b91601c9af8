"""The same command under every launcher: one process, torchrun and DeepSpeed's give one result."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from forking import finished, free_port, moored
from moored.tracking.journal import read_journal
from tiny import tiny_recipe, write_recipe


def launch(launcher: str, arguments: list[str]) -> None:
    """Run `moored ARGUMENTS` under a launcher with two processes."""
    bin_dir = Path(sys.executable).parent
    if launcher == "torchrun":
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node=2", "-m", "moored"]
    else:
        command = [str(bin_dir / "deepspeed"), "--num_gpus=2", "--master_addr=127.0.0.1"]
        command += [f"--master_port={free_port()}", "--module", "moored"]
    done = subprocess.run(
        [*command, *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PATH": f"{bin_dir}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def losses(run: Path) -> list[float]:
    return [
        line["values"]["train/loss"]
        for line in read_journal(run / "journal.jsonl")
        if line["kind"] == "metrics" and "train/loss" in line["values"]
    ]


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> tuple[Path, Path]:
    """The recipe, and its run in one process."""
    folder = tmp_path_factory.mktemp("launchers")
    recipe = tiny_recipe(folder)
    recipe["evaluation"] |= {"exact_match": True, "max_new_tokens": 4}
    recipe["evaluation"] |= {"instructions": True, "instruction_tokens": 4}
    path = write_recipe(folder, recipe)
    finished(moored("train", str(path), "name=alone"))
    return path, folder / "runs" / "alone"


@pytest.mark.parametrize(
    ("launcher", "stage"), [("torchrun", 3), pytest.param("deepspeed", 2, marks=pytest.mark.long)]
)
def test_two_processes_equal_one(alone, launcher, stage):
    """Tolerances: the derivation stands in test_zero.py."""
    path, expected = alone
    launch(launcher, ["train", str(path), f"name={launcher}", f"parallel.zero_stage={stage}"])
    run = path.parent / "runs" / launcher
    assert losses(run) == pytest.approx(losses(expected), rel=1e-5)
    adapter = load_file(run / "adapter/adapter_model.safetensors")
    for name, tensor in load_file(expected / "adapter/adapter_model.safetensors").items():
        assert (adapter[name] - tensor).norm() <= 1e-5 * tensor.norm(), name
    figures = json.loads((run / "report/report.json").read_text())["arms"]["tmkl"]
    reference = json.loads((expected / "report/report.json").read_text())["arms"]["tmkl"]
    for key in ("adaptation_ppl", "adaptation_exact_match"):
        assert figures[key] == pytest.approx(reference[key], rel=1e-4), key
    # A near tie may turn one answer, and so one of the 67 constraints.
    followed = reference["instruction_following"]
    assert figures["instruction_following"] == pytest.approx(followed, abs=1.1 / 67)
    assert figures["retention_ppl"] == pytest.approx(reference["retention_ppl"], rel=1e-4)


def test_evaluate_measures_a_run_and_a_bare_adapter_again(alone):
    path, run = alone
    before = json.loads((run / "report/report.json").read_text())
    finished(moored("evaluate", str(run), "--out", str(path.parent / "again")))
    again = json.loads((path.parent / "again/report.json").read_text())
    assert again["arms"]["tmkl"]["retention_ppl"] == pytest.approx(
        before["arms"]["tmkl"]["retention_ppl"], rel=1e-6
    )
    assert again["base"]["retention_ppl"] == pytest.approx(before["base"]["retention_ppl"])
    out = path.parent / "bare"
    finished(moored("evaluate", str(run / "adapter"), "--recipe", str(path), "--out", str(out)))
    (bare,) = json.loads((out / "report.json").read_text())["arms"].values()
    assert bare["retention_ppl"] == pytest.approx(before["arms"]["tmkl"]["retention_ppl"], rel=1e-6)
