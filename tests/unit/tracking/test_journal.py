"""The journal: what is written can be read, whatever happens to the writer or the disk."""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moored.tracking.journal import Fence, Follower, Journal, encode, metrics, read_journal


def point(step: int, attempt: int = 1, **values: float) -> dict:
    record = {"time": float(step), "kind": "metrics", "step": step, "attempt": attempt}
    return record | {"values": values}


def start(attempt: int) -> dict:
    return {"time": 0.0, "kind": "event", "event": "start", "attempt": attempt, "fields": {}}


def write(path: Path, *records: dict) -> None:
    journal = Journal(path)
    for record in records:
        journal.write(record)
    journal.close()


@given(
    value=st.floats(),
    name=st.text(min_size=1),
    step=st.integers(0, 2**40),
    text=st.text(),
)
@settings(max_examples=200, deadline=None)
def test_a_record_survives_the_line(value: float, name: str, step: int, text: str) -> None:
    line = encode(point(step, **{"value": value}) | {"values": {name: value}, "note": text})
    assert "\n" not in line
    strict = json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    found = float(strict["values"][name])
    assert found == value or (math.isnan(found) and math.isnan(value))
    assert strict["note"] == text


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 5e-324, 0.1 + 0.2])
def test_the_reader_gives_floats_back(tmp_path: Path, value: float) -> None:
    write(tmp_path / "journal.jsonl", point(3, loss=value))
    [record] = read_journal(tmp_path / "journal.jsonl")
    assert repr(record["values"]["loss"]) == repr(value)


def test_what_json_does_not_know_becomes_text(tmp_path: Path) -> None:
    write(tmp_path / "journal.jsonl", start(1) | {"fields": {"path": Path("a/b"), "x": [math.inf]}})
    [record] = read_journal(tmp_path / "journal.jsonl")
    assert record["fields"] == {"path": "a/b", "x": ["Infinity"]}


def test_every_prefix_of_the_file_can_be_read(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    write(path, start(1), *(point(i, loss=i / 7, ärger=-1.0) for i in range(4)))
    whole = path.read_bytes()
    records = list(read_journal(path))
    assert len(records) == 5
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        complete = whole[:size].count(b"\n")
        assert list(read_journal(path)) == records[:complete]


def test_a_torn_line_does_not_swallow_the_next_writers_first(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    write(path, point(0, loss=1.0), point(1, loss=2.0))
    path.write_bytes(path.read_bytes()[:-9])
    write(path, start(2), point(1, 2, loss=3.0))
    assert metrics(tmp_path) == {"loss": [(0, 1.0), (1, 3.0)]}


def test_foreign_lines_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    foreign = [
        b"\xff\xfe\x00garbage",
        b"[]",
        b"3",
        b"null",
        b"{}",
        b'{"kind":"metrics","attempt":1,"time":1,"step":"x","values":{}}',
        b'{"kind":"metrics","attempt":1,"time":1,"step":1,"values":{"a":null}}',
        b'{"kind":"metrics","attempt":1,"time":1,"step":1,"values":[1]}',
        b'{"kind":"metrics","time":1,"step":1,"values":{"a":1}}',
        b'{"kind":"event","attempt":1,"time":1}',
        b'{"kind":"event","attempt":1,"time":1,"event":"x","fields":[]}',
    ]
    path.write_bytes(b"\n".join(foreign) + b"\n" + encode(point(1, a=2.0)).encode() + b"\n")
    assert metrics(tmp_path) == {"a": [(1, 2.0)]}


def test_the_last_attempt_wins_and_a_superseded_one_is_fenced_off(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    write(
        path,
        start(1),
        *(point(i, 1, loss=i) for i in range(5)),
        start(2),
        point(3, 2, loss=30.0),
        point(5, 1, loss=-1.0),  # attempt 1 was cut off from the network, and goes on
        point(4, 2, loss=40.0),
    )
    expected = [(0, 0.0), (1, 1.0), (2, 2.0), (3, 30.0), (4, 40.0)]
    assert metrics(tmp_path) == {"loss": expected}


def test_a_fence_takes_a_restart_from_attempt_one() -> None:
    fence = Fence()
    assert fence.admits(start(3))
    assert not fence.admits(point(1, 2, loss=0.0))
    assert fence.admits(start(1))
    assert fence.admits(point(1, 1, loss=0.0))


def test_system_metrics_are_apart(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    write(path, point(1, loss=2.0), point(9, cpu=50.0) | {"kind": "system"})
    assert metrics(tmp_path) == {"loss": [(1, 2.0)]}
    assert metrics(tmp_path, "system") == {"cpu": [(9, 50.0)]}


def test_a_follower_waits_for_the_end_of_a_line(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    follower = Follower(path)
    assert follower.read() == []
    line = (encode(point(1, loss=1.0)) + "\n").encode()
    path.write_bytes(line + line[:10])
    [first] = follower.read()
    assert first.end == follower.offset == len(line)
    assert follower.read() == []
    path.write_bytes(line + line)
    [second] = follower.read()
    assert second.end == 2 * len(line)


def test_a_follower_reads_in_windows_smaller_than_a_line(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    write(path, *(point(i, **{f"metric{k}": 1.0 for k in range(50)}) for i in range(20)))
    follower, steps = Follower(path), []
    while lines := follower.read(max_bytes=100):
        steps += [line.record["step"] for line in lines]
    assert steps == list(range(20))


def test_writers_do_not_mix_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"

    def many(attempt: int) -> None:
        journal = Journal(path)
        for i in range(300):
            journal.write(point(i, attempt, **{f"value/{k}": float(i) for k in range(40)}))
        journal.close()

    threads = [threading.Thread(target=many, args=(1,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(list(read_journal(path))) == 4 * 300


def test_a_killed_writer_loses_nothing_it_had_written(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib\n"
        "from moored.tracking.journal import Journal\n"
        "journal = Journal(pathlib.Path(sys.argv[1]))\n"
        "for i in range(10**9):\n"
        "    journal.write({'time': 0, 'kind': 'metrics', 'step': i, 'attempt': 1, 'values': {}})\n"
        "    print(i, flush=True)\n"
    )
    path = tmp_path / "journal.jsonl"
    command = [sys.executable, "-c", code, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        while int(writer.stdout.readline()) < 200:
            pass
        writer.send_signal(signal.SIGKILL)
        said = [line for line in writer.stdout.read().split("\n") if line]
    last = int(said[-2]) if len(said) > 1 else 200
    steps = [record["step"] for record in read_journal(path)]
    assert steps == list(range(len(steps)))
    assert len(steps) > last


def test_a_full_disk_delays_lines_and_loses_none(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))
        for i in range(50):
            journal.write(point(i, loss=1.0))  # from some step on, it tears a line, then fails
        assert path.stat().st_size <= 500
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    journal.write(point(50, loss=1.0))
    journal.close()
    assert [step for step, _ in metrics(tmp_path)["loss"]] == list(range(51))


def test_a_journal_is_private_and_no_link(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        Journal(tmp_path / "journal.jsonl").close()
    finally:
        os.umask(before)
    assert (tmp_path / "journal.jsonl").stat().st_mode & 0o777 == 0o600
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="link"):
        Journal(tmp_path / "link.jsonl")


def test_a_line_costs_microseconds(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    values = {f"train/metric_{k}": 0.123456789 * k for k in range(10)}
    costs = []
    for step in range(500):
        began = time.perf_counter()
        journal.write(point(step, **values))
        costs.append(time.perf_counter() - began)
    journal.close()
    assert sorted(costs)[250] < 1e-3  # measured: about 20 microseconds
