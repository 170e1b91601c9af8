"""Rows of ShareGPT and Alpaca, what stands beside a chat, and columns that must not be lost."""

from __future__ import annotations

import json
import logging
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from datakit import PLAIN_TOKENIZER, TOKENIZER, config, jsonl, load, records, turn
from moored import data
from moored.data.layouts import MEDIA, PARTS
from moored.utils.errors import UserErrors

U, A = turn("user", "q"), turn("assistant", "a")
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
PAIR = {"prompt": "q", "completion": "a"}


def said(role: str, value: Any, **more: Any) -> dict[str, Any]:
    return {"from": role, "value": value} | more


def read(tmp_path, *rows: dict[str, Any], **source: Any) -> list[Any]:
    return records(jsonl(tmp_path / "a.jsonl", list(rows)), **source)


def problem(tmp_path, row: dict[str, Any], **source: Any) -> str:
    with pytest.raises(UserErrors) as caught:
        read(tmp_path, row, **source)
    (line,) = caught.value.problems
    assert "\n" not in line
    assert len(line) < 400
    assert "a.jsonl:1: " in line
    return line


# ---------------------------------------------------------------- ShareGPT


@pytest.mark.parametrize("column", ["conversations", "conversation"])
@pytest.mark.parametrize("user", ["human", "user"])
@pytest.mark.parametrize("assistant", ["gpt", "assistant", "bot", "model", "chatgpt"])
def test_sharegpt_is_read(tmp_path, column, user, assistant):
    row = {column: [said("system", "s"), said(user, "q"), said(assistant, "a")]}
    (record,) = read(tmp_path, row)
    assert record.messages == (turn("system", "s"), U, A)
    assert (record.kind, record.tools, record.unread) == ("messages", None, ())


def test_sharegpts_columns_may_hold_our_turns_or_json_text(tmp_path):
    rows = [{"conversations": turns} for turns in ([U, A], json.dumps([U, A]))]
    rows += [{"messages": turns} for turns in ([said("human", "q"), said("gpt", "a")], [U, A])]
    rows += [{"conversations": json.dumps([said("human", "q"), said("gpt", "a")])}]
    assert [one.messages for one in read(tmp_path, *rows)] == [(U, A)] * 5
    (record,) = read(tmp_path, {"talk": [said("human", "q"), said("gpt", "a")]},
                     fields={"messages": "talk"})  # fmt: skip
    assert record.messages == (U, A)


def test_sharegpts_calls_and_answers_of_tools(tmp_path):
    call = {"name": "f", "arguments": {"a": 1}}
    as_text = call | {"arguments": '{"a": 1}'}
    for value in (json.dumps(call), call, json.dumps(as_text), json.dumps([call])):
        row = {
            "conversations": [
                said("human", "q"),
                said("function_call", value),
                said("observation", "3"),
                said("gpt", "a", loss=False),
            ],
            "tools": json.dumps([TOOL]),
            "system": "s",
        }
        (record,) = read(tmp_path, row)
        calls = [{"type": "function", "function": call}]
        assert record.messages == (
            turn("system", "s"),
            U,
            {"role": "assistant", "tool_calls": calls},
            turn("tool", "3"),
            A,
        )
        assert record.tools == [TOOL]
        assert record.learned == (False, False, True, False, False)


@pytest.mark.parametrize(
    ("turns", "words"),
    [
        ([said("alien", "q"), said("gpt", "a")], "conversations[0].from: 'alien' is unknown: use"),
        ([said("human", "q"), said("function_call", "f(1)")],
         "conversations[1].value: holds text that is not JSON"),
        ([said("human", "q"), said("function_call", '{"name": "f"}')],
         "conversations[1].value: a function_call has a name and arguments, this is an object"),
        ([said("human", "q"), said("function_call", "[1]")], "this is the number 1"),
        ([said("human", "q"), said("function_call", '{"name": "f", "arguments": "x"}')],
         "conversations[1].tool_calls[0].arguments: holds text that is not JSON"),
        ([said("human", "q"), said("gpt", "a", weight=0.5)], "conversations[1].weight: holds the"),
        ([said("human", "q"), said("human", "a")], "conversations[1].role: 'user' comes after"),
        ([said("human", "q"), said("gpt", None)], "conversations[1].content: holds null"),
        ([said("human", "q"), A], "conversations[0]: has from and value (ShareGPT): rename"),
        ([], "conversations: is empty"),
    ],
)  # fmt: skip
def test_sharegpt_that_is_not_as_it_must_be(tmp_path, turns, words):
    assert words in problem(tmp_path, {"conversations": turns})


# ---------------------------------------------------------------- Alpaca


@pytest.mark.parametrize("given", [None, "", " ", "about", "absent"])
def test_alpaca_is_read(tmp_path, given):
    row = {"instruction": "q", "output": "a"} | ({} if given == "absent" else {"input": given})
    (record,) = read(tmp_path, row)
    asked = "q\n\nabout" if given == "about" else "q"
    assert record.messages == (turn("user", asked), A)
    assert (record.kind, record.unread) == ("prompt_completion", ())


def test_alpaca_is_learned_with_and_without_a_template(tmp_path):
    row = {"instruction": "hello ", "input": "", "output": "there"}
    path = jsonl(tmp_path / "a.jsonl", [row])
    (sample,) = load(path, PLAIN_TOKENIZER)
    assert PLAIN_TOKENIZER.decode(sample.input_ids) == "<s>hello there<|endoftext|>"
    (sample,) = load(path)
    assert TOKENIZER.decode(sample.input_ids[sample.label_mask]) == "there<|im_end|>"


@pytest.mark.parametrize("as_text", [False, True])
def test_alpacas_system_and_history(tmp_path, as_text):
    history: Any = [["q1", "a1"], ["q2", "a2"]]
    row = {
        "instruction": "q",
        "output": "a",
        "system": "s",
        "history": json.dumps(history) if as_text else history,
    }
    (record,) = read(tmp_path, row)
    earlier = [turn("user", "q1"), turn("assistant", "a1"), turn("user", "q2")]
    assert record.messages == (turn("system", "s"), *earlier, turn("assistant", "a2"), U, A)
    assert (record.kind, record.learned) == ("messages", None)
    (record,) = read(tmp_path, row | {"system": "", "history": []})
    assert record.messages == (U, A)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"instruction": "q", "output": ""}, "output: is empty"),
        ({"instruction": "", "output": "a"}, "instruction: is empty"),
        ({"instruction": "q", "output": 3}, "output: holds the number 3"),
        ({"instruction": "q", "output": "a", "input": 3}, "input: holds the number 3"),
        ({"instruction": "q", "output": "a", "history": "x"}, "history: holds text that is not"),
        ({"instruction": "q", "output": "a", "history": [["q"]]}, "history: entry 0 is a list"),
        ({"instruction": "q", "output": "a", "history": [[1, "a"]]}, "history[0].content: holds"),
        ({"instruction": "q", "output": "a", "system": 1}, "system: holds the number 1"),
    ],
)
def test_alpaca_that_is_not_as_it_must_be(tmp_path, row, words):
    assert words in problem(tmp_path, row)


# ---------------------------------------------------------------- which layout


@pytest.mark.parametrize(
    ("row", "fixes"),
    [
        (
            {"messages": [U, A], "conversations": [said("human", "q"), said("gpt", "x")]},
            {"ignore=[conversations]": "a", "ignore=[messages]": "x"},
        ),
        (
            {"instruction": "q", "output": "a", "text": "x"},
            {"ignore=[instruction, output]": "x", "ignore=[text]": "a"},
        ),
        (
            {"instruction": "q", "output": "x", "conversations": [U, A]},
            {"ignore=[instruction, output]": "a", "ignore=[conversations]": "x"},
        ),
        ({"text": "x", "messages": [U, A]}, {"format=messages": "a", "text": None}),
    ],
)
def test_rows_of_two_layouts_say_which_is_meant(tmp_path, row, fixes):
    line = problem(tmp_path, row)
    assert "a.jsonl:1: has both " in line
    for fix, expected in fixes.items():
        assert fix in line
        name, _, names = fix.partition("=[")
        if name == "ignore":
            (record,) = read(tmp_path, row, ignore=names.rstrip("]").split(", "))
            assert (record.text or record.messages[-1]["content"]) == expected


def test_what_fields_map_is_no_other_layout(tmp_path):
    row = {"instruction": "q", "output": "a", "input": ""}
    (record,) = read(tmp_path, row, fields={"prompt": "instruction", "completion": "output"})
    assert record.messages == (U, A)


def test_the_same_rows_in_parquet_and_of_the_hub(tmp_path):
    rows = [
        {
            "conversations": [said("human", "q"), said("gpt", "a")],
            "system": "s",
            "tools": json.dumps([TOOL]),
            "id": "x y",
            "n": 3,
        }
    ] * 2
    alpaca = [{"instruction": "q", "input": "i", "output": "a", "source": "some place"}]
    for name, given in (("sharegpt", rows), ("alpaca", alpaca)):
        expected = read(tmp_path, *given)
        folder = tmp_path / name
        folder.mkdir()
        pq.write_table(pa.Table.from_pylist(given), folder / "train.parquet")
        datasets.Dataset.from_list(given).save_to_disk(tmp_path / f"{name}-saved")
        for source in (
            {"path": folder / "train.parquet"},
            {"path": folder, "hub": True},
            {"path": folder, "hub": True, "streaming": True},
            {"path": tmp_path / f"{name}-saved", "hub": True},
        ):
            found = records(**source)
            for one, other in zip(found, expected, strict=True):
                assert one.messages == other.messages
                assert one.tools == other.tools
                assert (
                    one.unread == other.unread == (("id",) if name == "sharegpt" else ("source",))
                )


# ---------------------------------------------------------------- beside a chat or a pair


def test_a_system_turn_and_tools_stand_beside_chats_and_pairs(tmp_path):
    chat = {"messages": [U, A | {"loss": False}, U, A], "system": "s", "tools": [TOOL]}
    first, second = read(tmp_path, chat, PAIR | {"system": "s", "tools": [TOOL]})
    assert first.messages == (turn("system", "s"), U, A, U, A)
    assert first.learned == (False, False, False, False, True)
    assert second.messages == (turn("system", "s"), U, A)
    assert (second.kind, second.tools) == ("messages", [TOOL])
    (record,) = read(tmp_path, {"messages": [U, A], "rules": "s", "functions": [TOOL]},
                     fields={"system": "rules", "tools": "functions"})  # fmt: skip
    assert (record.messages, record.tools) == ((turn("system", "s"), U, A), [TOOL])
    for none in (None, "", " "):
        (record,) = read(tmp_path, PAIR | {"system": none, "tools": []})
        assert (record.kind, record.messages) == ("prompt_completion", (U, A))


def test_two_system_turns_are_one_too_many(tmp_path):
    row = {"messages": [turn("system", "t"), U, A], "system": "s"}
    assert "system: the chat has a system turn of its own: keep one" in problem(tmp_path, row)


# ---------------------------------------------------------------- what is not read


def filled(name: str) -> Any:
    return [{"path": "a.png"}] if name in MEDIA else "some words"


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("row", [PAIR, {"messages": [U, A]}], ids=["pair", "chat"])
def test_a_part_of_the_sample_is_not_lost_silently(tmp_path, name, row):
    line = problem(tmp_path, row | {name: filled(name)})
    assert f"a.jsonl:1: {name}: would be lost, as it is a part of the sample and not read" in line
    assert f"set data.train.0.ignore=[{name}]" in line
    (record,) = read(tmp_path, row | {name: filled(name)}, ignore=[name])
    assert (record.messages, record.unread) == ((U, A), ())
    for empty in (None, "", " ", []):
        assert read(tmp_path, row | {name: empty})


def test_the_parts_that_are_lost_are_named_together_and_in_parquet_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    row = {"question": "q", "answer": "a", "input": "i", "reasoning": "r", "images": [b"x"], "n": 1}
    fields = {"prompt": "question", "completion": "answer"}
    pq.write_table(pa.Table.from_pylist([row]), "a.parquet")
    with pytest.raises(UserErrors) as caught:
        records("a.parquet", fields=fields)
    assert str(caught.value) == (
        "a.parquet:1: input, reasoning, images: would be lost, as they are a part of the sample "
        "and not read: map them with data.train.0.fields, write them into what is read, or set "
        "data.train.0.ignore=[input, reasoning, images]"
    )
    (record,) = records("a.parquet", fields=fields, ignore=["input", "reasoning", "images"])
    assert (record.messages, record.unread) == ((U, A), ())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("loss", False),
        ("train", 0),
        ("weight", 0.0),
        ("loss_mask", [0, 1]),
        ("masked", True),
        ("label", False),
    ],
)
def test_a_row_that_says_not_this_is_refused(tmp_path, name, value):
    line = problem(tmp_path, PAIR | {name: value})
    assert f"{name}: holds " in line
    assert f"take the row out, mark its turns, or set data.train.0.ignore=[{name}]" in line
    pq.write_table(pa.Table.from_pylist([PAIR | {name: value}]), tmp_path / "a.parquet")
    with pytest.raises(UserErrors, match=f"{name}: holds "):
        records(tmp_path / "a.parquet")
    for fine in (True, 1, 2.31, None, "train"):
        if name != "masked" or fine is not True:
            assert read(tmp_path, PAIR | {name: fine})


def test_other_columns_with_text_are_named_once(tmp_path, caplog):
    rows = [
        PAIR | {"id": "x", "n": 1, "meta": {"from": "book"}, "none": "", "flags": [True]},
        PAIR | {"id": "y", "late": ["words"]},
    ]
    recipe = config([{"path": jsonl(tmp_path / "a.jsonl", rows)}])
    assert data.check_data(recipe) == {"data.train.0": 2}
    (line,) = [one.getMessage() for one in caplog.records if one.levelno == logging.WARNING]
    assert line == (
        "data.train.0 (a.jsonl): columns with text that are not read: 'id', 'meta', 'late'; map "
        "them with fields, or list them as ignore"
    )
    caplog.clear()
    quiet = {"path": str(tmp_path / "a.jsonl"), "ignore": ["id", "meta", "late"]}
    assert data.check_data(config([quiet])) == {"data.train.0": 2}
    assert not caplog.records


def test_of_a_text_all_else_is_only_named(tmp_path, caplog):
    path = jsonl(tmp_path / "a.jsonl", [{"text": "t", "input": "i", "reasoning": "r"}])
    data.check_data(config([{"path": path}]))
    assert "columns with text that are not read: 'input', 'reasoning'" in caplog.text


def test_a_column_is_read_or_ignored():
    with pytest.raises(ValueError, match=r"q is read as prompt \(fields\): take it out of one"):
        config([{"path": "a.jsonl", "fields": {"prompt": "q"}, "ignore": ["q"]}])
