"""Reports on the terminal and on disk, and `moored report`."""

from __future__ import annotations

import io
import json
import os
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from moored.config import load_config
from moored.evaluation.report import Report, run_command, settings_of, show, table, write
from moored.utils.errors import UserError
from report_cases import arm, base, measured, one, report_of, strict_json, three, where

PLAIN = arm("none", 1.0, 61.6, 9.8)


def rendered(report: Report, width: int = 80) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width).print(table(report))
    return stream.getvalue()


def test_table_with_exact_match_and_instructions_fits_80_columns():
    asked = {"adaptation_exact_match": 0.5, "instruction_following": 0.25}
    arms = {name: replace(arm, **asked) for name, arm in three().arms.items()}
    text = rendered(replace(three(), base=replace(three().base, **asked), arms=arms))
    assert max(map(len, text.splitlines())) <= 80
    rows = [line.split() for line in text.splitlines()]
    assert ["none", "1.000", "50.0%", "25.0%", "+136%", "0.0400", "212"] in rows


def test_table_fits_80_columns():
    text = rendered(three())
    assert max(map(len, text.splitlines())) <= 80
    rows = [line.split() for line in text.splitlines()]
    assert ["none", "1.000", "61.60", "+136%", "9.800", "+133%", "0.0400", "212"] in rows
    assert ["tmkl", "1.018", "26.80", "+2.7%", "4.250", "+1.2%", "0.0400", "212"] in rows
    assert ["base", "13.50", "26.10", "4.200"] in rows
    assert "TMKL learned about as much" in text


def test_table_of_many_corpora_shows_the_worst():
    before = {f"corpus{i}": 10.0 for i in range(5)}
    result = replace(
        arm("tmkl", 1.0),
        retention_ppl=before,
        retention_increase_pct={name: float(i) for i, name in enumerate(before)},
    )
    text = rendered(Report(base=base(retention_ppl=before), arms={"tmkl": result}))
    assert "+4.0%" in text
    assert "corpus4" in text
    assert "corpus3" not in text


def test_terminal_gets_no_control_characters_and_no_markup():
    evil = "\x1b[31mred\x1b[0m[bold]b[/bold]\u202e\x07"
    report = Report(base=base(), arms={evil: replace(PLAIN, kind=evil)})
    stream = io.StringIO()
    show(report, stream)
    assert not any(c in stream.getvalue() for c in "\x1b\u202e\x07")
    assert "[bold]b" in stream.getvalue()


def test_plain_text_where_there_is_no_terminal():
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")  # cannot say →
    show(three(), stream)
    stream.flush()
    text = raw.getvalue().decode("ascii")
    assert "|tmkl |" in text
    assert "\x1b" not in text


def test_write_makes_private_whole_files(tmp_path):
    folder = write(three(), tmp_path / "run" / "report")
    assert sorted(p.name for p in folder.iterdir()) == [
        "frontier.png",
        "report.html",
        "report.json",
    ]
    assert {stat.S_IMODE(p.stat().st_mode) for p in folder.iterdir()} == {0o600}
    assert Report.read(folder / "report.json") == three()
    strict_json((folder / "report.json").read_text())


def test_report_json_keeps_lists_of_numbers_on_a_line(tmp_path):
    odd = '[\n 1,\n 2 ] "['
    full = measured("tmkl", 1.018, 26.8, 4.25, where={"python-reference": where(odd)})
    report = Report(base=base(), arms={odd: full})
    text = (write(report, tmp_path) / "report.json").read_text()
    assert Report.from_json(strict_json(text)) == report
    assert '"num_tokens": [25, 25, ' in text
    assert len(text.splitlines()) < 250


def test_write_refuses_contradictions_and_leaves_the_old_report(tmp_path):
    write(three(), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    wrong = replace(PLAIN, retention_increase_pct={"python-reference": 1.36})
    with pytest.raises(UserError, match="the perplexities give 136"):
        write(report_of(wrong), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        write(three(), tmp_path / "file")


def journal(run: Path, end: float, kind: str = "tmkl") -> None:
    run.mkdir(parents=True)
    lines = [
        {
            "kind": "metrics",
            "attempt": 1,
            "time": 1.0 + step,
            "step": step,
            "values": {
                "train/ce_nats_per_token": end + 1 / step,
                f"train/{kind}_nats_per_token": 0.1,
            },
        }
        for step in range(1, 6)
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (run / "journal.jsonl").write_text(text + '{"kind": "metr')


def test_command_on_one_run_draws_the_journal(tmp_path, capsys):
    run = tmp_path / "run"
    journal(run, 0.1)
    write(one("tmkl"), run / "report")
    assert "Cross-entropy" not in (run / "report" / "report.html").read_text()
    assert run_command([run]) == run / "report"
    assert "Cross-entropy" in (run / "report" / "report.html").read_text()
    printed = capsys.readouterr().out
    assert "1.018" in printed
    assert str(run / "report" / "report.html") in printed


def test_command_on_a_comparison_finds_the_arms(tmp_path):
    run = tmp_path / "quickstart"
    for i, name in enumerate(("none", "kl", "tmkl")):
        journal(run / "arms" / name, float(i))
    write(three(), run / "report")
    page = (run_command([run], tmp_path / "out") / "report.html").read_text()
    # One curve an arm in the panel of the cross-entropy: its last value is in the tooltip.
    for name, last in (("none", "0.2000"), ("kl", "1.2000"), ("tmkl", "2.2000")):
        assert f"<title>{name}: {last} at the end</title>" in page


def test_command_on_several_runs_merges_them(tmp_path, monkeypatch):
    for seed in (0, 1):
        journal(tmp_path / f"seed{seed}", float(seed))
        write(one("tmkl", seed=seed), tmp_path / f"seed{seed}" / "report")
    monkeypatch.chdir(tmp_path)
    runs = [tmp_path / "seed0", tmp_path / "seed1" / "report" / "report.json", Path("seed0")]
    assert run_command(runs) == Path("report")
    assert list(Report.read(Path("report/report.json")).arms) == ["tmkl-seed0", "tmkl-seed1"]
    page = Path("report/report.html").read_text()
    assert "<title>tmkl-seed0: 0.2000 at the end</title>" in page
    assert "<title>tmkl-seed1: 1.2000 at the end</title>" in page


def test_command_does_not_follow_an_arm_out_of_the_run(tmp_path):
    journal(tmp_path / "outside", 0.5)
    (tmp_path / "run" / "arms").mkdir(parents=True)
    arms = {"../../outside": PLAIN, "tmkl": PLAIN}
    write(Report(base=base(), arms=arms), tmp_path / "run" / "report")
    folder = run_command([tmp_path / "run"])
    assert "at the end</title>" not in (folder / "report.html").read_text()


def test_command_errors_are_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    for runs, message in (
        ([], "no run given"),
        ([tmp_path / "nowhere"], "no such run directory"),
        ([tmp_path / "empty"], "name a finished run"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            run_command(runs)
        assert "\n" not in str(caught.value)


def test_settings_come_from_the_recipe(tmp_path):
    recipe = tmp_path / "narrow.yaml"
    recipe.write_text(
        "model: {name_or_path: m}\n"
        "data: {train: [{path: train.jsonl}], max_length: 128}\n"
        "optim: {learning_rate: 0.002, warmup_steps: 8}\n"
        "train: {steps: 80, global_batch_sequences: 4}\n"
        "track: {uri: 'http://secret.example:5000', tags: {t: secret}}\n"
    )
    found = settings_of(load_config(recipe))
    assert found["recipe"] == "narrow"
    assert found["learning rate"] == "0.002, cosine, 8 warm-up steps"
    assert found["length"] == "80 steps"
    assert "torch " in found["versions"]
    assert "secret" not in repr(found)
    assert Report.from_json(replace(three(), settings=found).to_json()).settings == found


def test_needs_no_torch_no_mlflow_and_no_display(tmp_path):
    code = (
        "import sys; from pathlib import Path\n"
        "from moored.evaluation.report import write; from report_cases import three\n"
        "write(three(), Path(sys.argv[1]))\n"
        "print({'torch', 'mlflow', 'deepspeed', 'matplotlib.pyplot'} & set(sys.modules))\n"
    )
    env = {k: v for k, v in os.environ.items() if k != "DISPLAY"} | {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "MPLBACKEND": "TkAgg",
    }
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env=env,
        capture_output=True,
        text=True,
        check=True,
        timeout=600,
    )
    assert done.stdout.strip() == "set()"
    assert (tmp_path / "frontier.png").stat().st_size > 10_000
