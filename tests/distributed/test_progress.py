"""How far an evaluation is: by `moored evaluate` as people and jobs call it."""

from __future__ import annotations

import json
import math
import re
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from forking import finished, moored, moored_ranks
from moored.evaluation.instructions import TASKS
from moored.utils.errors import PreemptedError
from moored.utils.progress import VARIABLE
from ptykit import left_on, on_a_terminal
from tiny import TEXT, tiny_recipe, write_recipe

LOUD = {VARIABLE: "0"}
QUIET = {VARIABLE: "7200"}  # longer than anything here takes on a busy machine
LINE = re.compile(r"INFO (?P<what>.+): (?P<done>[\d,.]+) of (?P<total>[\d,.]+) (?P<unit>\S+), ")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A finished run with two texts, exact match and instructions; and it said nothing."""
    folder = tmp_path_factory.mktemp("progress")
    recipe = tiny_recipe(folder)
    other = folder / "other.txt"
    other.write_text("\n\n".join(f"{TEXT[i % 2]} number {i}" for i in range(90)))
    recipe["retention"]["other"] = {"path": str(other), "window_tokens": 32}
    recipe["evaluation"] |= {"exact_match": True, "max_new_tokens": 3, "micro_batch_size": 2}
    recipe["evaluation"] |= {"instructions": True, "instruction_tokens": 3}
    _, said = finished(moored("train", str(write_recipe(folder, recipe)), **QUIET))
    assert "so far" not in said
    return folder / "runs" / "tiny"


def said_by(stderr: str) -> dict[str, list[tuple[float, float, str]]]:
    """What was done -> (how much, of how much, of what) of each of its lines."""
    found: dict[str, list[tuple[float, float, str]]] = {}
    for line in stderr.splitlines():
        if match := LINE.search(line):
            done, total = (float(match[name].replace(",", "")) for name in ("done", "total"))
            found.setdefault(match["what"], []).append((done, total, match["unit"]))
    return found


def report(run: Path) -> dict[str, Any]:
    return json.loads((run / "report" / "report.json").read_text())


def num_batches(run: Path, ranks: int = 1) -> dict[str, int]:
    """Of each thing that is measured or asked; two rows a batch.

    Of a window of n tokens n - 1 are scored, which the report counts.
    """
    tokens = report(run)["base"]["num_tokens"]
    rows = {
        f"measuring retention.{name} (tmkl and base)": math.ceil(tokens[name] / (window - 1))
        for name, window in {"fox": 64, "other": 32}.items()
    }
    rows["measuring data.eval (tmkl and base)"] = 6
    for who in ("tmkl", "base"):
        rows |= {f"answering data.eval ({who})": 6}
        rows |= {f"answering the instructions ({who})": len(TASKS)}
    return {what: math.ceil(count / (2 * ranks)) for what, count in rows.items()}


@pytest.fixture(scope="module")
def quiet(run) -> tuple[str, dict[str, Any]]:
    """What an evaluation prints and reports; and it said nothing of how far it was."""
    before = report(run)
    out, said = finished(moored("evaluate", str(run), **QUIET))
    assert "so far" not in said
    assert before["arms"]["tmkl"]["retention_ppl"] == report(run)["arms"]["tmkl"]["retention_ppl"]
    return out, report(run)


def test_an_evaluation_says_of_which_text_and_arm_how_much_is_done(run, quiet):
    out, err = finished(moored("evaluate", str(run), **LOUD))
    assert (out, report(run)) == quiet, "stdout has results alone, and no figure depends on it"
    said = said_by(err)
    expected = num_batches(run)
    assert {what: lines[-1] for what, lines in said.items() if what in expected} == {
        what: (total, total, "batches") for what, total in expected.items()
    }
    for what in expected:
        counts = [done for done, _, _ in said[what]]
        assert counts == sorted(counts)
        assert set(counts) >= set(range(1, expected[what] + 1)), "one batch after the other"
    done, total, unit = said["loading the base"][-1]
    assert done == total > 10_000
    assert unit == "weights"
    assert said["tokenising eval.jsonl"][-1] == (6, 6, "rows")


def test_one_rank_speaks_of_its_share(run):
    _, err = finished(*moored_ranks(2, "evaluate", str(run), **LOUD))
    expected = num_batches(run, ranks=2)
    said = said_by(err)
    for what, total in expected.items():
        assert said[what][-1] == (total, total, "batches")
    # Where each batch has one line, a second rank's would be seen.
    counted = Counter(said["measuring data.eval (tmkl and base)"])
    assert set(counted.values()) == {1}


@pytest.mark.long
def test_an_evaluation_on_a_terminal_has_bars_that_go(run, quiet):
    out, seen = on_a_terminal("-m", "moored", "evaluate", str(run), **LOUD)
    assert out.decode() == quiet[0]
    assert re.search(r"measuring retention\.fox \(tmkl and base\).* \d+ of \d+ batches.*━", seen)
    assert "so far" not in seen
    assert not [line for line in left_on(seen) if "━" in line or "batches" in line]


def stopped(command: list[str], what: str) -> tuple[int, str]:
    """Exit code and stderr of a command that gets SIGTERM as soon as it says that it is at it."""
    with moored(*command, **LOUD) as process:
        process.says(f"{what}: 3 of")
        process.send_signal(signal.SIGTERM)
        return process.wait(), process.stderr


@pytest.mark.parametrize("command", ["train", pytest.param("evaluate", marks=pytest.mark.long)])
def test_a_signal_amid_an_evaluation_ends_it_at_once(tmp_path, command):
    recipe = tiny_recipe(tmp_path)
    long = tmp_path / "long.txt"
    long.write_text("\n\n".join(f"{TEXT[i % 2]} number {i}" for i in range(4000)))
    recipe["retention"] = {"long": {"path": str(long), "window_tokens": 16, "max_tokens": 40_000}}
    recipe["evaluation"] |= {"micro_batch_size": 1}
    path = str(write_recipe(tmp_path, recipe))
    target, arm, code = path, "adapted", PreemptedError.exit_code
    if command == "evaluate":
        finished(moored("train", path, "retention.long.max_tokens=64"))
        target, arm, code = str(tmp_path / "runs" / "tiny"), "tmkl", -signal.SIGTERM
    overrides = ["retention.long.max_tokens=40000"] if command == "evaluate" else []
    what = f"measuring retention.long ({arm} and base)"
    returned, said = stopped([command, target, *overrides], what)
    assert returned == code
    done, total, _ = said_by(said)[what][-1]
    assert total > 2000
    assert done < total / 2, "what was left was measured all the same"
    if command == "train":
        assert "stopped by a signal after step 4 of 4; step 4 is saved" in said


@pytest.mark.long
def test_an_export_says_how_far_it_is(run, tmp_path):
    command = ["export", str(run), "--merge", "--to", str(tmp_path / "merged")]
    out, err = finished(moored(*command, **LOUD))
    assert "so far" not in out
    said = said_by(err)
    for what in ("loading the base", "merging into the w16 weights", "hashing the base"):
        done, total, _ = said[what][-1]
        assert done == total, what
    assert "hashing what is exported" in said
    for what in ("the merged model", "the adapter on its base"):
        assert f"a fresh process loads {what} and computes its logits: 0:0" in err


@pytest.mark.long
def test_what_is_prepared_says_how_far_it_is(tmp_path):
    recipe = tiny_recipe(tmp_path)
    drawn = {"builtin": "base-samples", "max_tokens": 300, "window_tokens": 32}
    recipe["retention"]["own"] = drawn
    recipe["reference"] = {"cache": True}
    path = str(write_recipe(tmp_path, recipe))
    environment = {**LOUD, "MOORED_CACHE": str(tmp_path / "cache")}
    out, err = finished(moored("prepare", path, "--references", "1", **environment))
    assert "so far" not in out
    said = said_by(err)
    done, total, unit = said["drawing texts from the base"][-1]
    assert (done, total, unit) == (300, 300, "tokens")
    assert said["hidden states of the base"][-1] == (4, 4, "steps")
    assert said["checking train.jsonl"][-1] == (24, 24, "rows")
    assert said["tokenising train.jsonl"][-1] == (24, 24, "rows")
    assert "a process without a network looks for all of it: 0:00:0" in err
