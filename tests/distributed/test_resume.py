"""A run that was cut off ends as the uninterrupted one did: bit for bit, at the same world size."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from distributed.runner import mostly_long, run_distributed
from forking import finished, moored_ranks
from moored.config import Config, load_config
from moored.data.stream import TrainStream
from moored.tracking.journal import read_journal
from moored.training import train
from tiny import tiny_recipe, write_recipe

STEPS, CUT = 6, 4  # saved after 2 and 4; the cut comes in step 4 (counted from 0)


class Cut(Exception):
    """Stands for the end of the process in the middle of a step."""


def losses(run_dir: Path) -> dict[int, dict[str, float]]:
    """Every logged loss, norm and rate by step; a repeated step must repeat its values."""
    found: dict[int, dict[str, float]] = {}
    for line in read_journal(run_dir / "journal.jsonl"):
        if line["kind"] != "metrics" or "train/loss" not in line["values"]:
            continue
        values = {k: v for k, v in line["values"].items() if k.startswith("train/")}
        assert found.setdefault(line["step"], values) == values, f"step {line['step']} changed"
    return found


def final(run_dir: Path) -> dict[str, torch.Tensor]:
    """The exported adapter and the last optimizer state."""
    last = run_dir / f"checkpoints/step-{STEPS:08d}"
    return load_file(run_dir / "adapter/adapter_model.safetensors") | load_file(
        last / "optimizer.safetensors"
    )


def assert_identical(resumed: Path, uninterrupted: Path) -> None:
    assert losses(resumed) == losses(uninterrupted)
    assert sorted(losses(resumed)) == list(range(1, STEPS + 1))
    expected = final(uninterrupted)
    found = final(resumed)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    assert any(tensor.abs().max() > 0 for tensor in expected.values())


def recipe_of(folder: Path, *overrides: str) -> Config:
    recipe = tiny_recipe(folder)
    recipe["train"] |= {"steps": STEPS, "save_every": 2}
    recipe["adapter"]["dropout"] = 0.1  # random numbers must come back too
    recipe["retention"], recipe["data"]["eval"] = {}, []
    return load_config(write_recipe(folder, recipe), list(overrides))


def cut_and_resume(
    rank: int, world_size: int, configs: dict[Any, Config], folder: Path
) -> dict[Any, dict[str, Any]]:
    """Run without a break, then with one; each rank's samples, by stream, step by step."""
    seen: dict[str, list[list[str]]] = {}
    original, after = TrainStream.next_step, [10**9]

    def spying(self: TrainStream, **place: int) -> Any:
        batches = original(self, **place)
        steps = seen.setdefault(self.samples.section, [])
        if len(steps) == after[0] and self.samples.section == "data.train":
            raise Cut
        steps.append([name for batch in batches for name in batch.sample_ids])
        return batches

    TrainStream.next_step = spying  # type: ignore[method-assign]
    results = {}
    for case, config in configs.items():
        place = folder / "-".join(map(str, case))
        seen.clear()
        train.run(config, path=place / "whole", parent=folder)
        whole, after[0] = dict(seen), CUT
        seen.clear()
        with pytest.raises(Cut):
            train.run(config, path=place / "cut", parent=folder)
        after[0] = 10**9
        for steps in seen.values():
            del steps[CUT:]  # the newest checkpoint has seen so many
        train.run(config, path=place / "cut", parent=folder)
        results[case] = {"whole": whole, "cut": dict(seen)}
    return results


# Beside the plain run: replayed text, and a budget whose controller measures between saves.
MORE = {
    "replay": ("regularizer.kind=replay", "regularizer.replay=[{path: fox.txt}]"),
    "budget": (
        "regularizer.budget={retention_increase_pct: 0.5, every: 1, probe: {path: fox.txt, "
        "window_tokens: 64}, when_broken: continue}",
    ),
    "anchors": (
        "regularizer.anchors={path: fox.txt, window_tokens: 32}",
        *("regularizer.positions=all", "regularizer.token_fraction=0.5"),
    ),
    "mol": (
        *("regularizer.kind=mol", "regularizer.schedule=linear"),
        "regularizer.anchors={path: fox.txt, window_tokens: 32}",
    ),
    "stm": ("regularizer.kind=stm", "regularizer.max_perplexity=280"),
    "fraction": ("regularizer.token_fraction=0.5", "regularizer.schedule=linear"),
}
CASES = [
    *(("float32", 0, name) for name in MORE),
    ("float32", 0, "none"),
    ("float32", 1, "none"),
    ("float32", 2, "none"),
    ("float32", 3, "none"),
    ("bfloat16", 0, "none"),
    ("bfloat16", 1, "none"),
    ("bfloat16", 2, "none"),
    ("bfloat16", 3, "none"),
    ("float32", 1, "optimizer"),
    ("float32", 2, "optimizer"),
    ("float32", 3, "optimizer"),
    ("bfloat16", 2, "optimizer"),
    ("bfloat16", 3, "optimizer"),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, chosen) -> tuple[Path, list[dict[Any, dict[str, Any]]]]:
    """All cases in one pair of processes, whose start costs more than a tiny run."""
    folder = tmp_path_factory.mktemp("runs")
    configs = {
        case: recipe_of(
            folder,
            f"model.dtype={case[0]}",
            f"parallel.zero_stage={case[1]}",
            *(
                (text.replace("fox.txt", str(folder / "fox.txt")) for text in MORE[case[2]])
                if case[2] in MORE
                else (f"parallel.offload={case[2]}",)
            ),
        )
        for case in chosen(CASES)
    }
    return folder, run_distributed(cut_and_resume, 2, configs, folder)


@pytest.mark.parametrize(
    "case",
    mostly_long(
        CASES,
        ("float32", 0, "budget"),
        ("float32", 0, "anchors"),
        ("bfloat16", 3, "none"),
    ),
)
def test_resume_is_bit_exact(runs, case):
    folder, ranks = runs
    for rank in ranks:
        assert rank[case]["cut"] == rank[case]["whole"], "the order of the samples changed"
    place = folder / "-".join(map(str, case))
    assert_identical(place / "cut", place / "whole")


@pytest.mark.parametrize(
    ("world_size", "stage"), [(1, 2), pytest.param(2, 3, marks=pytest.mark.long)]
)
def test_kill_9_in_the_middle_then_the_same_command_again(tmp_path, world_size, stage):
    config = recipe_of(tmp_path)
    recipe = json.loads((tmp_path / "tiny.yaml").read_text())
    recipe["parallel"]["zero_stage"] = stage
    path = str(write_recipe(tmp_path, recipe))

    finished(*moored_ranks(world_size, "train", path, "name=whole"))
    killed = moored_ranks(world_size, "train", path, "name=killed")
    journal = config.output.dir / "killed" / "journal.jsonl"
    try:
        while not (journal.exists() and b'"step":3' in journal.read_bytes().replace(b" ", b"")):
            assert [one.poll() for one in killed] == [None] * world_size, killed[0].stderr
            time.sleep(0.002)
    finally:
        for process in killed:
            process.kill()
    state = json.loads((config.output.dir / "killed" / "state.json").read_text())
    assert state["status"] == "running", "it ended before it could be killed: not a test"

    finished(*moored_ranks(world_size, "train", path, "name=killed"))
    assert_identical(config.output.dir / "killed", config.output.dir / "whole")
    state = json.loads((config.output.dir / "killed" / "state.json").read_text())
    assert (state["status"], state["attempt"]) == ("done", 2)


def test_a_process_that_is_lost_is_named_by_the_others(tmp_path):
    recipe_of(tmp_path)
    recipe = json.loads((tmp_path / "tiny.yaml").read_text())
    recipe["train"]["steps"] = 100_000
    path = str(write_recipe(tmp_path, recipe))
    ranks = moored_ranks(2, "train", path, "name=lost")
    run = tmp_path / "runs" / "lost"
    try:
        while not ((run / "journal.jsonl").exists() and losses(run)):
            assert [rank.poll() for rank in ranks] == [None] * 2, ranks[0].stderr
            time.sleep(0.05)
        ranks[1].kill()
        _, error = ranks[0].communicate()
    finally:
        for rank in ranks:
            rank.kill()
    assert ranks[0].returncode == 1
    assert "error: rank 0 lost another process of the run" in error
    assert "Traceback" not in error
    state = json.loads((run / "state.json").read_text())
    assert (state["status"], state["reason"][:13]) == ("failed", "PeerLostError")
