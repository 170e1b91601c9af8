"""Values inside values: what Arrow fills is gone, and what JSON text holds is read."""

from __future__ import annotations

import datetime
import decimal
import json
import tempfile
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st

from datakit import jsonl, records, turn
from moored.utils.errors import UserErrors

U, A = turn("user", "q"), turn("assistant", "a")


def call(arguments: Any, **more: Any) -> dict[str, Any]:
    """A turn that calls a tool."""
    function = {"name": "f", "arguments": arguments} | more
    return {"role": "assistant", "tool_calls": [{"type": "function", "function": function}]}


def chat(arguments: Any) -> list[dict[str, Any]]:
    return [U, call(arguments), turn("tool", "3"), A]


def arguments_of(record: Any) -> Any:
    return record.messages[1]["tool_calls"][0]["function"]["arguments"]


def tool(parameters: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", "parameters": parameters}}


def problem(path: Any, **source: Any) -> str:
    with pytest.raises(UserErrors) as caught:
        records(path, **source)
    (line,) = caught.value.problems
    assert "\n" not in line
    assert len(line) < 300
    return line


def stored(folder: Path, rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The same rows in every way of storing them that fills structs: what to read, by name."""
    pq.write_table(pa.Table.from_pylist(rows), folder / "a.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(folder / "saved")
    hub = folder / "hub"
    hub.mkdir()
    pq.write_table(pa.Table.from_pylist(rows), hub / "train.parquet")
    return {
        "parquet": {"path": folder / "a.parquet"},
        "saved": {"path": folder / "saved", "hub": True},
        "hub": {"path": hub, "hub": True},
        "stream": {"path": hub, "hub": True, "streaming": True},
    }


def meaning(found: list[Any]) -> list[Any]:
    """Records without their names, keys in the order that they have."""
    return [
        json.dumps([one.kind, one.messages, one.tools, one.learned, one.text], sort_keys=True)
        for one in found
    ]


# ---------------------------------------------------------------- structs that Arrow fills

CITY = {"type": "object", "properties": {"city": {"type": "string", "enum": ["a", "b"]}}}
ADD = {"type": "object", "properties": {"n": {"type": "integer"}, "deep": {"items": [{"x": 1}]}}}
ROWS = [
    {"messages": chat({"city": "Paris"}), "tools": [tool(CITY), tool(ADD)]},
    {"messages": chat({"n": 1, "deep": [{"x": 1}, {"y": {"z": "w"}}, {}]}), "tools": [tool(ADD)]},
    {"messages": chat({}), "tools": None},
    {"messages": [U, A | {"loss": False}, U, A | {"reasoning_content": "r"}], "tools": [tool({})]},
]


@pytest.mark.parametrize("name", ["parquet", "saved", "hub", "stream"])
def test_what_arrow_fills_is_not_there(tmp_path, name):
    expected = records(jsonl(tmp_path / "a.jsonl", ROWS))
    assert expected[0].tools == [tool(CITY), tool(ADD)]
    assert arguments_of(expected[1]) == {"n": 1, "deep": [{"x": 1}, {"y": {"z": "w"}}, {}]}
    assert arguments_of(expected[2]) == {}
    found = records(**stored(tmp_path, ROWS)[name])
    assert meaning(found) == meaning(expected)


def test_a_null_that_was_written_stays_where_nothing_fills(tmp_path):
    written = {"a": None, "b": [None, {"c": None}]}
    (record,) = records(jsonl(tmp_path / "a.jsonl", [{"messages": chat(written)}]))
    assert arguments_of(record) == written
    as_text = [{"messages": chat(json.dumps(written))}, {"messages": chat('{"d": 1}')}]
    for name, source in stored(tmp_path, as_text).items():
        first, second = records(**source)
        assert arguments_of(first) == written, name
        assert arguments_of(second) == {"d": 1}, name


def test_json_columns_of_datasets_keep_what_was_written(tmp_path):
    """Of rows that no schema fits `datasets` makes JSON, in which nothing is filled."""
    rows = [{"messages": chat({"a": 1, "b": None})}, {"messages": chat({"a": "x"})}]
    hub = tmp_path / "hub"
    hub.mkdir()
    jsonl(hub / "train.jsonl", rows)
    expected = records(hub / "train.jsonl")
    assert arguments_of(expected[0]) == {"a": 1, "b": None}
    for options in ({}, {"streaming": True}):
        assert meaning(records(hub, hub=True, **options)) == meaning(expected)
    found = datasets.load_dataset(str(hub), split="train")
    assert "Json" in repr(found.features)
    found.to_parquet(tmp_path / "a.parquet")
    assert meaning(records(tmp_path / "a.parquet")) == meaning(expected)


def test_a_json_field_of_parquet_is_what_its_text_says(tmp_path):
    text = datasets.Value("string")
    called = {"name": text, "arguments": {"a": datasets.Json()}}
    turns = datasets.List({"role": text, "content": text, "tool_calls": datasets.List(called)})
    given: list[dict[str, Any]] = [{"a": 1}, {"a": "x"}, {"a": {"b": None}}, {}]
    answer = {"role": "assistant", "tool_calls": [{"name": "f", "arguments": a} for a in given]}
    dataset = datasets.Dataset.from_list(
        [{"messages": [U, answer]}], features=datasets.Features({"messages": turns})
    )
    dataset.to_parquet(tmp_path / "a.parquet")
    dataset.save_to_disk(tmp_path / "saved")
    for source in ({"path": tmp_path / "a.parquet"}, {"path": tmp_path / "saved", "hub": True}):
        (record,) = records(**source)
        assert [one["arguments"] for one in record.messages[1]["tool_calls"]] == given


def test_maps_are_objects(tmp_path):
    kind = pa.list_(
        pa.struct(
            {
                "role": pa.string(),
                "content": pa.string(),
                "tool_calls": pa.list_(
                    pa.struct({"name": pa.string(), "arguments": pa.map_(pa.string(), pa.int64())})
                ),
            }
        )
    )
    turns = [
        {"role": "user", "content": "q"},
        {
            "role": "assistant",
            "tool_calls": [
                {"name": "f", "arguments": [("a", 1), ("b", 2)]},
                {"name": "g", "arguments": []},
            ],
        },
    ]
    pq.write_table(pa.table({"messages": pa.array([turns], kind)}), tmp_path / "a.parquet")
    (record,) = records(tmp_path / "a.parquet")
    assert record.messages[1]["tool_calls"] == [
        {"name": "f", "arguments": {"a": 1, "b": 2}},
        {"name": "g", "arguments": {}},
    ]
    twice = [("a", 1), ("a", 2)]
    turns[1]["tool_calls"][0]["arguments"] = twice
    pq.write_table(pa.table({"messages": pa.array([turns], kind)}), tmp_path / "b.parquet")
    assert "b.parquet:1: not a readable parquet file" in problem(tmp_path / "b.parquet")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (datetime.datetime(2024, 7, 26), "holds a datetime"),
        (datetime.date(2024, 7, 26), "holds a date"),
        (decimal.Decimal("1.5"), "holds a Decimal"),
        (b"x", "holds bytes"),
        (float("nan"), "holds the number nan"),
    ],
)
def test_what_json_does_not_have_is_named(tmp_path, value, words):
    rows = [{"messages": chat({"a": [{"when": value}]}), "tools": [tool({"default": value})]}]
    for name, source in stored(tmp_path, rows).items():
        line = problem(**source)
        place = "messages[1].tool_calls[0].function.arguments.a[0].when"
        assert f":1: {place}: {words}, which is not JSON: write it as text" in line, name
    for row in rows:
        row["messages"] = [U, A]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "b.parquet")
    assert f"tools[0].function.parameters.default: {words}" in problem(tmp_path / "b.parquet")


NAMES = st.sampled_from(["a", "b", "c", "d"])
SHAPES = st.recursive(
    st.sampled_from(["text", "int", "bool"]),
    lambda inner: st.dictionaries(NAMES, inner, min_size=1) | inner.map(lambda shape: [shape]),
    max_leaves=6,
)


def values(shape: Any) -> st.SearchStrategy[Any]:
    """Values of one Arrow type; of a struct any of its keys may be absent, and none is null."""
    if isinstance(shape, dict):
        return st.fixed_dictionaries({}, optional={k: values(v) for k, v in shape.items()})
    if isinstance(shape, list):
        return st.lists(values(shape[0]), max_size=3)
    words = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=3)
    numbers = st.integers(-(2**63), 2**63 - 1)
    return {"text": words, "int": numbers, "bool": st.booleans()}[shape]


@st.composite
def tables(draw) -> list[dict[str, Any]]:
    arguments, parameters, extra = (
        draw(st.dictionaries(NAMES, SHAPES, min_size=1)) for _ in range(3)
    )
    rows = []
    for _ in range(draw(st.integers(1, 4))):
        messages = chat(draw(values(arguments)))
        messages[0] = messages[0] | {"extra": draw(values(extra))}
        schemas = draw(st.lists(values(parameters).map(tool), max_size=2))
        rows.append({"messages": messages, "tools": schemas})
    return rows


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(rows=tables())
def test_rows_mean_the_same_however_they_are_stored(rows):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        expected = meaning(records(jsonl(path / "a.jsonl", rows)))
        try:
            pq.write_table(pa.Table.from_pylist(rows), path / "a.parquet")
        except pa.ArrowNotImplementedError:  # a struct that has no field in any row
            reject()
        assert meaning(records(path / "a.parquet")) == expected
        datasets.Dataset.from_list(rows).save_to_disk(path / "saved")
        assert meaning(records(path / "saved", hub=True)) == expected


# ---------------------------------------------------------------- JSON text


def test_openai_writes_arguments_as_text(tmp_path):
    rows = [
        {"messages": chat('{"city": "Paris", "n": [1, null]}')},
        {"messages": chat("")},
        {"messages": chat(" {} ")},
        {"messages": chat({"city": '{"kept": "text"}'})},
    ]
    found = records(jsonl(tmp_path / "a.jsonl", rows))
    assert [arguments_of(one) for one in found] == [
        {"city": "Paris", "n": [1, None]},
        {},
        {},
        {"city": '{"kept": "text"}'},
    ]


def test_calls_turns_and_tools_may_be_text_at_every_level(tmp_path):
    schema = tool(CITY)
    as_object = {"messages": chat({"a": 1}), "tools": [schema]}
    plain = chat({"a": 1})
    calls = plain[1]["tool_calls"]
    function = calls[0]["function"]
    levels = {
        "messages": {"messages": json.dumps(plain), "tools": json.dumps([schema])},
        "turns": {"messages": [json.dumps(t) for t in plain], "tools": [json.dumps(schema)]},
        "calls": {
            "messages": [U, plain[1] | {"tool_calls": json.dumps(calls)}, *plain[2:]],
            "tools": [schema | {"function": json.dumps(schema["function"])}],
        },
        "call": {
            "messages": [U, plain[1] | {"tool_calls": [json.dumps(calls[0])]}, *plain[2:]],
            "tools": [tool(json.dumps(CITY))],
        },
        "function": {
            "messages": [
                U,
                plain[1] | {"tool_calls": [calls[0] | {"function": json.dumps(function)}]},
                *plain[2:],
            ],
            "tools": [schema],
        },
        "all": {
            "messages": json.dumps([U, call('{"a": 1}'), *plain[2:]]),
            "tools": json.dumps([json.dumps(tool(json.dumps(CITY)))]),
        },
    }
    expected = meaning(records(jsonl(tmp_path / "a.jsonl", [as_object])))
    for name, row in levels.items():
        found = records(jsonl(tmp_path / f"{name}.jsonl", [row]))
        assert meaning(found) == expected, name
        pq.write_table(pa.Table.from_pylist([row]), tmp_path / f"{name}.parquet")
        assert meaning(records(tmp_path / f"{name}.parquet")) == expected, name


def test_a_schema_beside_its_name_may_be_text(tmp_path):
    row = {"messages": [U, A], "tools": [{"name": "f", "parameters": json.dumps(CITY)}]}
    (record,) = records(jsonl(tmp_path / "a.jsonl", [row]))
    assert record.tools == [{"name": "f", "parameters": CITY}]


@pytest.mark.parametrize("none", [None, [], "", " ", "[]", "null"])
def test_no_tools_and_no_calls(tmp_path, none):
    row = {"messages": [U, A | {"tool_calls": none}], "tools": none}
    (record,) = records(jsonl(tmp_path / "a.jsonl", [row]))
    assert record.tools is None
    assert not record.messages[1].get("tool_calls")


BAD = {
    "arguments broken": (
        {"messages": chat('{"a": ')},
        "messages[1].tool_calls[0].arguments: holds text that is not JSON (Expecting value at "
        "character 7): write an object",
    ),
    "arguments not JSON": (
        {"messages": chat("{'a': 1}")},
        "arguments: holds text that is not JSON",
    ),
    "arguments of a list": (
        {"messages": chat("[1]")},
        "messages[1].tool_calls[0].arguments: holds text with a list in it: write an object",
    ),
    "arguments twice": (
        {"messages": chat(json.dumps(json.dumps({"a": 1})))},
        "arguments: holds text with text in it",
    ),
    "arguments null": ({"messages": chat(None)}, "arguments: holds null: write an object"),
    "arguments a list": ({"messages": chat([1])}, "arguments: holds a list: write an object"),
    "arguments too deep": ({"messages": chat('{"a":' * 5000)}, "arguments: holds text that is not"),
    "arguments deep": (
        {"messages": chat('{"a":' * 150 + "1" + "}" * 150)},
        "is nested more than 100 deep",
    ),
    "arguments not a number": ({"messages": chat('{"a": NaN}')}, "a: holds the number nan"),
    "half a character": ({"messages": chat('{"a": "\\ud83d"}')}, "lone surrogate"),
    "calls broken": (
        {"messages": [U, {"role": "assistant", "tool_calls": "[{"}]},
        "messages[1].tool_calls: holds text that is not JSON",
    ),
    "calls of an object": (
        {"messages": [U, {"role": "assistant", "tool_calls": '{"name": "f"}'}]},
        "messages[1].tool_calls: holds text with an object in it: write a list of calls",
    ),
    "call without a name": (
        {"messages": [U, {"role": "assistant", "tool_calls": '[{"arguments": {}}]'}]},
        "messages[1].tool_calls[0]: names no function",
    ),
    "messages broken": ({"messages": '[{"role": "user"'}, "messages: holds text that is not JSON"),
    "turn broken": ({"messages": ['{"role": "user"', A]}, "messages[0]: holds text that is not"),
    "tools broken": ({"messages": [U, A], "tools": "[{"}, "tools: holds text that is not JSON"),
    "tools words": ({"messages": [U, A], "tools": "a calculator"}, "tools: holds text that is not"),
    "tools an object": ({"messages": [U, A], "tools": tool({})}, "tools: holds an object: write a"),
    "tool a list": (
        {"messages": [U, A], "tools": [[1]]},
        "tools[0]: holds a list: write an object",
    ),
    "tool broken": ({"messages": [U, A], "tools": ["{"]}, "tools[0]: holds text that is not JSON"),
    "parameters broken": (
        {"messages": [U, A], "tools": [tool({}), tool("{")]},
        "tools[1].function.parameters: holds text that is not JSON",
    ),
}


@pytest.mark.parametrize(("row", "words"), BAD.values(), ids=BAD)
def test_text_that_is_not_the_json_wanted_is_refused(tmp_path, row, words):
    assert words in problem(jsonl(tmp_path / "a.jsonl", [row]))
