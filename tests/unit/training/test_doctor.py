"""What `moored doctor` says of a recipe's data, as a user sees it."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import tiny
from datakit import CHAT, jsonl


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> str:
    """Its output, to a file, for two sources to learn and one held out."""
    folder: Path = tmp_path_factory.mktemp("doctor")
    recipe = tiny.tiny_recipe(folder)
    unlearned = [CHAT[0], {**CHAT[1], "train": False}]
    long = [{"role": "user", "content": "hello " * 400}, CHAT[1]]
    rows = [{"messages": [*CHAT, *unlearned]}, {"messages": unlearned}, {"messages": long}]
    recipe["data"] = {
        "train": [
            {"path": jsonl(folder / "a.jsonl", rows)},
            {"path": jsonl(folder / "b.jsonl", [{"text": "hello there"}]), "streaming": True},
        ],
        "eval": [{"path": jsonl(folder / "e.jsonl", [{"messages": CHAT}])}],
        "max_length": 64,
        "max_dropped_fraction": 0.9,
    }
    recipe["train"] = {k: v for k, v in recipe["train"].items() if k != "epochs"} | {"steps": 2}
    done = subprocess.run(
        [sys.executable, "-m", "moored", "doctor", str(tiny.write_recipe(folder, recipe))],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "80", "HF_HUB_OFFLINE": "1"},
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_source_shows_one_sample_with_marks_that_a_log_keeps(told):
    assert "\x1b" not in told  # no colours in a file, so the marks say it
    asked = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    for label, shown in {
        "data.train.0": f"{asked}«hi<|im_end|>»",
        "data.train.1": "h«ello there<|im_end|>»",
        "data.eval.0": f"{asked}«hi<|im_end|>»",
    }.items():
        part = told[told.index(label) :]
        assert shown in part, part
    first = told[told.index("data.train.0") : told.index("data.train.1")]
    assert first.rstrip().endswith("«hi<|im_end|>»")  # nothing after it: the rest is not learned


def test_what_was_left_out_is_counted_with_its_reason(told):
    first = told[told.index("data.train.0") : told.index("data.train.1")]
    assert "a.jsonl: 1 samples" in first
    assert "left out: 1 longer than data.max_length=64, 1 without a token to learn" in first
    assert "left out: nothing" in told[told.index("data.train.1") :]
    assert "streamed" in told[told.index("data.train.1") :]


def test_the_counts_are_those_of_the_tokens(told):
    line = next(line for line in told.splitlines() if line.startswith("data.eval.0"))
    counts = [int(word) for word in line.replace(",", "").split() if word.isdigit()]
    assert counts[0] == 1
    assert 0 < counts[2] < counts[1]


def test_weights_are_not_loaded_where_they_do_not_fit(tmp_path):
    """A base of 500 GB by its config.json; a limit stands in for it, should it be tried."""
    recipe = tiny.tiny_recipe(tmp_path)
    path = Path(recipe["model"]["name_or_path"]) / "config.json"
    config = json.loads(path.read_text())
    sizes = {"hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 400}
    path.write_text(json.dumps(config | sizes))
    done = subprocess.run(
        [sys.executable, "-m", "moored", "doctor", str(tiny.write_recipe(tmp_path, recipe))],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        timeout=600,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (6 * 2**30, 6 * 2**30)),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "data.train.0" in done.stdout  # what needs no weights was looked at
    line = next(line for line in done.stdout.splitlines() if line.startswith("warning"))
    assert "GiB in each process" in line
    assert "were not loaded" in line
    assert "adapter  " not in done.stdout
