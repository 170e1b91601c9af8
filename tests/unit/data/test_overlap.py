"""Held-out samples that are learned, too: counted, and said where the recipe is checked."""

from __future__ import annotations

import logging
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from datakit import config, jsonl, turn
from moored import data


def pair(number: int, answer: str = "a") -> dict[str, Any]:
    return {"prompt": f"q{number}", "completion": answer}


def chat(number: int) -> dict[str, Any]:
    return {"messages": [turn("user", f" q{number}"), turn("assistant", "a\n")]}


def warnings(caplog, train: list[Any], held_out: list[Any]) -> list[str]:
    caplog.clear()
    with caplog.at_level(logging.DEBUG):
        data.check_data(config(train, data={"eval": held_out}))
    return [one.getMessage() for one in caplog.records if one.levelno == logging.WARNING]


def test_what_is_learned_and_held_out_is_counted(tmp_path, caplog, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train = {"path": jsonl(tmp_path / "t.jsonl", [pair(n) for n in range(20)] + [{"text": "t"}])}
    held = [pair(30), chat(3), {"text": "t "}, pair(4, "other"), {"text": "q5"}]
    (same, alike) = warnings(caplog, [train], [{"path": jsonl(tmp_path / "e.jsonl", held)}])
    assert same == (
        "data.eval: 2 of 5 samples are learned, too, since data.train has them (e.jsonl:2, "
        "e.jsonl:3): take them out of one of both"
    )
    assert alike == (
        "data.eval: 1 of 5 samples have the prompt of a sample of data.train with another answer "
        "(e.jsonl:4)"
    )


def test_all_of_it_learned_is_said_loudly(tmp_path, caplog):
    path = jsonl(tmp_path / "t.jsonl", [pair(n) for n in range(9)])
    (line,) = warnings(caplog, [{"path": path}], [{"path": path, "limit": 4}])
    assert line.startswith("data.eval: ALL 4 SAMPLES ARE LEARNED, TOO: ")
    pq.write_table(pa.Table.from_pylist([chat(1), chat(2)]), tmp_path / "e.parquet")
    local = {"path": path, "streaming": True}
    (line,) = warnings(caplog, [local], [{"path": str(tmp_path / "e.parquet")}])
    assert line.startswith("data.eval: ALL 2 SAMPLES ARE LEARNED, TOO: ")


def test_nothing_in_common_is_no_warning(tmp_path, caplog):
    train = [{"path": jsonl(tmp_path / "t.jsonl", [pair(1)]), "limit": 1}]
    held_out = [{"path": jsonl(tmp_path / "e.jsonl", [pair(2)])}]
    assert warnings(caplog, train, held_out) == []
    assert "data.eval: none of 1 samples is in data.train" in caplog.text
    assert warnings(caplog, train, []) == []


def test_tools_and_earlier_turns_are_part_of_a_sample(tmp_path, caplog):
    tool = {"type": "function", "function": {"name": "f"}}
    train = [chat(1), {"messages": [*chat(1)["messages"], *chat(2)["messages"]]}]
    held = [chat(1) | {"tools": [tool]}, chat(2)]
    paths = [jsonl(tmp_path / f"{i}.jsonl", rows) for i, rows in enumerate((train, held))]
    assert warnings(caplog, *([{"path": path}] for path in paths)) == []


def test_what_the_hub_streams_is_left_out_and_said(tmp_path, caplog):
    (tmp_path / "ds").mkdir()
    jsonl(tmp_path / "ds" / "train.jsonl", [pair(1)])
    held_out = [{"path": jsonl(tmp_path / "e.jsonl", [pair(2)])}]
    (line,) = warnings(caplog, [{"hub": str(tmp_path / "ds"), "streaming": True}], held_out)
    assert line.startswith("data.eval: of data.train.0, which the hub streams, only the first rows")
