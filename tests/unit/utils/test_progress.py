"""How far something long is: lines in a log, bars on a terminal, nothing from anybody else."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from moored.data.files import open_sources
from moored.utils import atomic_dir, progress
from moored.utils.errors import UserError
from moored.utils.progress import VARIABLE, Phase, watch
from ptykit import left_on, on_a_terminal


@pytest.fixture
def lines(caplog, monkeypatch):
    """What is said, at every opportunity."""
    monkeypatch.setenv(VARIABLE, "0")
    caplog.set_level(logging.INFO, "moored.utils.progress")
    return lambda: [record.getMessage() for record in caplog.records]


def test_lines_say_what_how_far_since_when_and_until_when(lines):
    with Phase("measuring fox", 4, "batches") as phase:
        for _ in phase.over(range(3)):
            time.sleep(0.01)
    assert lines() == [
        f"measuring fox: {n} of 4 batches, 0:00:00 so far, about 0:00:00 left" for n in (1, 2, 3)
    ]


def test_the_rest_is_estimated_from_what_was_done(lines, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with Phase("measuring fox", 200, "batches") as phase:
        now[0] += 90
        phase.tick()  # nothing is done yet: no guess
        phase.advance(50)
        now[0] += 3600
        phase.advance(1000)  # more than was expected
    assert lines() == [
        "measuring fox: 0 of 200 batches, 0:01:30 so far",
        "measuring fox: 50 of 200 batches, 0:01:30 so far, about 0:04:30 left",
        "measuring fox: 200 of 200 batches, 1:01:30 so far, about 0:00:00 left",
    ]


def test_a_total_may_be_unknown_or_counted_when_it_is_needed(lines):
    counted = []

    def count() -> int:
        counted.append(1)
        return 3000

    with Phase("tokenising", None, "rows") as phase:
        phase.advance(1200)
    with Phase("waiting") as phase:
        phase.tick()
    with Phase("tokenising", count, "rows") as phase:
        phase.advance(1000)
        phase.advance(1000)
    with Phase("hashing", 2.5, "GB") as phase:
        phase.advance(1.26)
    assert lines() == [
        "tokenising: 1,200 rows, 0:00:00 so far",
        "waiting: 0:00:00 so far",
        "tokenising: 1,000 of 3,000 rows, 0:00:00 so far, about 0:00:00 left",
        "tokenising: 2,000 of 3,000 rows, 0:00:00 so far, about 0:00:00 left",
        "hashing: 1.3 of 2.5 GB, 0:00:00 so far, about 0:00:00 left",
    ]
    assert counted == [1]


def test_nothing_is_said_within_the_interval(lines, monkeypatch):
    monkeypatch.setenv(VARIABLE, "30")
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    counted: list[int] = []
    with Phase("measuring", lambda: counted.append(1), "batches") as phase:
        for _ in phase.over(range(239)):
            now[0] += 0.125
    assert lines() == []
    assert counted == []  # nor counted, which costs time
    with Phase("measuring", 3000, "batches") as phase:
        for _ in phase.over(range(750)):
            now[0] += 0.125
    assert [line.split(":")[1] for line in lines()] == [
        " 240 of 3,000 batches, 0",
        " 480 of 3,000 batches, 0",
        " 720 of 3,000 batches, 0",
    ]
    monkeypatch.setenv(VARIABLE, "inf")
    with Phase("measuring", 3, "batches") as phase:
        now[0] += 1e9
        phase.advance()
    assert len(lines()) == 3


def test_other_ranks_and_a_phase_that_is_over_are_silent(lines, monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "12345")
    with Phase("measuring", 3, "batches") as phase:
        phase.advance()
    assert lines() == []
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ZeroDivisionError), phase:
        phase.advance(1 / 0)
    phase.advance()
    assert lines() == []
    with phase:
        phase.advance()
    assert len(lines()) == 1


@pytest.mark.parametrize("value", ["soon", "-1", "nan"])
def test_an_interval_that_is_none_is_refused(monkeypatch, value):
    monkeypatch.setenv(VARIABLE, value)
    with pytest.raises(UserError, match=rf"^{VARIABLE}={value} is not a number of seconds"):
        Phase("measuring")


def test_no_thread_is_started(lines):
    before = threading.active_count()
    with Phase("measuring", 3, "batches") as phase:
        phase.advance()
        assert threading.active_count() == before


# ---------------------------------------------------------------- other processes


def test_a_process_is_watched_and_says_all_that_it_has_to_say(lines, monkeypatch):
    monkeypatch.setattr(progress, "WATCH_SECONDS", 0.05)
    code = (
        "import sys, time; time.sleep(0.3); text = sys.stdin.read(); print(text[::-1]); "
        "print('x' * 200_000, file=sys.stderr); sys.stdout.flush(); time.sleep(0.6); sys.exit(3)"
    )
    long = "abc" * 100_000
    done = watch([sys.executable, "-c", code], "asking", given=long)
    assert (done.returncode, done.stdout, len(done.stderr)) == (3, f"{long[::-1]}\n", 200_001)
    assert len(lines()) >= 3
    assert all(re.fullmatch(r"asking: 0:\d\d:\d\d so far", line) for line in lines())


def test_a_watched_process_ends_with_who_watches_it(monkeypatch):
    started = []

    class Popen(subprocess.Popen):
        def communicate(self, *arguments, **options):
            started.append(self)
            raise KeyboardInterrupt

    monkeypatch.setattr(progress.subprocess, "Popen", Popen)
    with pytest.raises(KeyboardInterrupt):
        watch([sys.executable, "-c", "import time; time.sleep(600)"], "asking")
    assert started[0].wait(timeout=60) != 0


# ---------------------------------------------------------------- files


def test_hashing_says_how_much_is_read(lines, tmp_path, monkeypatch):
    monkeypatch.setattr(atomic_dir, "BLOCK_BYTES", 1000)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a").write_bytes(bytes(2500))
    (folder / "b").write_bytes(bytes(1500))
    atomic_dir.seal(folder)
    assert len(lines()) == 5
    assert lines()[0].startswith("hashing what was written: 0.0 of 0.0 GB, ")
    assert atomic_dir.verify(folder) is None
    assert len(lines()) == 10
    assert lines()[-1].startswith("verifying folder: ")
    (folder / "b").write_bytes(bytes(1499) + b"x")
    assert "other content" in (atomic_dir.verify(folder) or "")


def test_a_folder_that_another_process_makes_is_waited_for_aloud(lines, tmp_path, monkeypatch):
    monkeypatch.setattr(atomic_dir, "WATCH_SECONDS", 0.05)
    code = (
        "import sys, time; from pathlib import Path; from moored.utils import atomic_dir\n"
        "def make(new):\n"
        "    (new / 'a').write_text('a'); print('made', flush=True); sys.stdin.read(); return {}\n"
        "atomic_dir.make_once(Path(sys.argv[1]), make)"
    )
    folder = tmp_path / "folder"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None and other.stdin is not None  # noqa: PT018
        assert other.stdout.readline() == b"made\n"
        with pytest.raises(UserError, match="has been held for 0 s"):
            atomic_dir.make_once(folder, lambda new: {}, timeout=0.3)
        other.stdin.close()
        atomic_dir.make_once(folder, lambda new: pytest.fail("made twice"), timeout=600)
    said = "waiting for another process that makes folder: 0:00:00 so far"
    assert lines().count(said) >= 3


@pytest.mark.parametrize("limit", [None, 2])
@pytest.mark.parametrize(
    ("name", "expected"), [("a.jsonl", 3), ("a.parquet", 3), ("a.json", None), ("folder", 6)]
)
def test_rows_are_counted_without_reading_them(tmp_path, name, expected, limit):
    import pyarrow
    import pyarrow.parquet

    from moored.config import Source

    rows = '{"text": "a"}\n{"text": "b"}\n{"text": "c"}\n'
    (tmp_path / "a.jsonl").write_text(rows)
    (tmp_path / "a.json").write_text("[" + ",".join(rows.splitlines()) + "]")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "b", "c"]}), tmp_path / "a.parquet")
    (tmp_path / "folder").mkdir()
    for part in ("1", "2"):
        (tmp_path / "folder" / f"{part}.jsonl").write_text(rows)
    problems: list[str] = []
    source = Source(path=str(tmp_path / name), limit=limit)
    (reader,) = open_sources([source], "data.train", problems)
    assert not problems
    assert reader.count() == (expected if limit is None or expected is None else limit)
    if expected is not None and limit is None:
        assert sum(1 for _ in reader.rows()) == expected
    for path in tmp_path.rglob("a.*"):
        path.unlink()
    if name != "folder":
        assert reader.count() is None  # who reads it says so


# ---------------------------------------------------------------- a terminal


SCENE = """
import logging, sys, time
from moored.utils import log
from moored.utils import progress
log.setup(0, None)
say = logging.getLogger("moored.scene").info
progress.REFRESH_SECONDS = 0.0
step = {'loss': 1.5, 'ce': 1.0, 'kl': 0.5, 'tokens_per_second': 1000.0}
with progress.Phase("loading [red] the base", 2, "weights") as phase:
    phase.advance()
    say("amid a bar")
    phase.advance()
say("between")
with progress.Progress(4, 0, enabled=True) as steps:
    steps.update(**step)
    with progress.Phase("measuring fox", 3, "batches") as phase:
        for _ in phase.over(range(3)):
            say("amid two bars")
            print("to stdout")
    for _ in range(3):
        steps.update(**step)
say("after")
"""


def test_bars_come_and_go_and_lines_stand_above_them():
    out, seen = on_a_terminal("-c", SCENE, **{VARIABLE: "0"})
    assert out == b"to stdout\n" * 3
    assert "loading [red] the base" in seen
    assert "1 of 2 weights" in seen
    assert re.search(r"measuring fox.*2 of 3 batches.*━.*left", seen, re.S)
    assert "so far" not in seen  # that is for the file
    words = [re.sub(r"^\[?[\d:]{8}\]? INFO\s+", "", line) for line in left_on(seen)]
    bars = [line for line in words if "━" in line]
    assert len(bars) == 1
    assert re.match(r"step 4/4 ━+ loss 1.5000  ce 1.0000  kl 0.5000  1,000 tok/s  0:00:0", bars[0])
    assert [line for line in words if line not in bars] == [
        "amid a bar", "between", *["amid two bars"] * 3, "after",
    ]  # fmt: skip


def test_what_is_soon_over_has_no_bar_on_a_terminal():
    _, seen = on_a_terminal("-c", SCENE, **{VARIABLE: "30"})
    assert "measuring fox" not in seen
    assert "step" in seen


def test_a_terminal_that_cannot_redraw_has_lines():
    _, seen = on_a_terminal("-c", SCENE, term="dumb", **{VARIABLE: "0"})
    assert "━" not in seen
    assert "measuring fox: 2 of 3 batches, 0:00:00 so far" in " ".join(seen.split())
    assert "step 4/4  loss 1.5000" in seen


def test_the_file_has_the_lines_that_the_terminal_has_as_bars(tmp_path: Path):
    scene = SCENE.replace(
        "log.setup(0, None)", f"from pathlib import Path; log.setup(0, Path({str(tmp_path)!r}))"
    )
    on_a_terminal("-c", scene, **{VARIABLE: "0"})
    kept = (tmp_path / "logs" / "rank-0.log").read_text()
    assert "measuring fox: 2 of 3 batches, 0:00:00 so far, about 0:00:00 left" in kept
