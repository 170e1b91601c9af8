"""Bad data: every problem is one line with file, line, field and fix, before the model loads."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import chats
from datakit import CHAT, TOKENIZER, config, jsonl, load, turn
from moored import data
from moored.data import formats
from moored.data.samples import load_samples
from moored.utils.errors import UserError, UserErrors

GOOD = '{"prompt": "a", "completion": "b"}'


def chat_line(*messages: Any) -> str:
    return json.dumps({"messages": list(messages)})


U, A = turn("user", "q"), turn("assistant", "a")
# name: (file name, content, place, field or cause, fix)
BAD: dict[str, tuple[str, bytes | str, str, str, str]] = {
    "broken line": (
        "a.jsonl",
        f'{GOOD}\n{{"prompt": "a", \n{GOOD}',
        "a.jsonl:2",
        "broken JSON at column",
        "write one JSON object a line",
    ),
    "list line": (
        "a.jsonl",
        f"{GOOD}\n1\n",
        "a.jsonl:2",
        "holds the number 1, not an object",
        "write",
    ),
    "list file as lines": ("a.jsonl", f"[{GOOD}]", "a.jsonl:1", "one JSON list", "rename to .json"),
    "number": (
        "a.jsonl",
        '{"prompt": 5, "completion": "b"}',
        "a.jsonl:1",
        "prompt: holds the number 5",
        "convert it to a string",
    ),
    "null": (
        "a.jsonl",
        '{"prompt": "a", "completion": null}',
        "a.jsonl:1",
        "completion: holds null",
        "fill it",
    ),
    "list of turns as prompt": (
        "a.jsonl",
        json.dumps({"prompt": [U], "completion": "b"}),
        "a.jsonl:1",
        "prompt: holds a list of turns",
        "messages list",
    ),
    "misspelt column": (
        "a.jsonl",
        '{"promt": "a", "completion": "b"}',
        "a.jsonl:1",
        "no field 'prompt', found 'promt', 'completion'; did you mean 'promt'?",
        "set data.train.0.fields.prompt=promt",
    ),
    "other columns": (
        "a.jsonl",
        '{"question": "a", "answer": "b"}',
        "a.jsonl:1",
        "found 'question', 'answer'",
        "data.train.0.fields={prompt: ..., completion: ...}",
    ),
    "empty file": ("a.jsonl", "", "a.jsonl:1", "the file is empty", "fill it"),
    "blank text file": ("a.txt", " \n", "a.txt:1", "the file is empty", "fill it"),
    "empty list": ("a.json", "[]", "a.json:1", "the file is empty", "fill it"),
    "both formats": (
        "a.jsonl",
        json.dumps({"prompt": "a", "messages": [U, A]}),
        "a.jsonl:1",
        "has both 'messages' and 'prompt'",
        "data.train.0.format=messages (or prompt_completion)",
    ),
    "two users": (
        "a.jsonl",
        chat_line(U, U, A),
        "a.jsonl:1",
        "messages[1].role: 'user' comes after user",
        "merge or reorder",
    ),
    "system late": (
        "a.jsonl",
        chat_line(U, turn("system", "s"), A),
        "a.jsonl:1",
        "messages[1].role: 'system' comes after user",
        "merge or reorder",
    ),
    "assistant first": (
        "a.jsonl",
        chat_line(A, U, A),
        "a.jsonl:1",
        "messages[0].role: 'assistant' comes first",
        "merge or reorder",
    ),
    "user last": (
        "a.jsonl",
        chat_line(U, A, U),
        "a.jsonl:1",
        "messages[2].role: the last turn is 'user'",
        "end with the assistant's answer",
    ),
    "unknown role": (
        "a.jsonl",
        chat_line(turn("human", "q"), A),
        "a.jsonl:1",
        "messages[0].role: 'human' is unknown",
        "did you mean 'user'",
    ),
    "ShareGPT": (
        "a.jsonl",
        chat_line({"from": "human", "value": "q"}, A),
        "a.jsonl:1",
        "messages[0]: has from and value",
        "rename them to role and content",
    ),
    "no content": (
        "a.jsonl",
        chat_line({"role": "user", "contents": "q"}, A),
        "a.jsonl:1",
        "messages[0]: no field 'content'",
        "did you mean 'contents'",
    ),
    "empty content": (
        "a.jsonl",
        chat_line(U, turn("assistant", " \n")),
        "a.jsonl:1",
        "messages[1].content: is empty",
        "fill it",
    ),
    "parts": (
        "a.jsonl",
        chat_line(turn("user", [{"type": "text"}]), A),
        "a.jsonl:1",
        "messages[0].content: holds a list (of parts)",
        "join the parts",
    ),
    "turn is text": (
        "a.jsonl",
        chat_line("q", A),
        "a.jsonl:1",
        "messages[0]: holds text, not an object",
        "write",
    ),
    "chat is text": (
        "a.jsonl",
        '{"messages": "hello"}',
        "a.jsonl:1",
        "messages: holds text, not a list",
        "write",
    ),
    "no turns": ("a.jsonl", '{"messages": []}', "a.jsonl:1", "messages: is empty", "write"),
    "weighted turn": (
        "a.jsonl",
        chat_line(U, A | {"weight": 0.5}),
        "a.jsonl:1",
        "messages[1].weight: holds the number 0.5: a turn is learned (true or 1) or not",
        "remove it",
    ),
    "empty prompt": (
        "a.jsonl",
        '{"prompt": "", "completion": "b"}',
        "a.jsonl:1",
        "prompt: is empty",
        "fill it",
    ),
    "half a character": (
        "a.jsonl",
        f'{GOOD}\n{{"prompt": "x\\ud83d", "completion": "b"}}',
        "a.jsonl:2",
        "prompt: holds half a character (lone surrogate \\ud83d at character 2)",
        "repair the text",
    ),
    "half a key": (
        "a.jsonl",
        chat_line(U, A | {"name": "\ud83d"}),
        "a.jsonl:1",
        "lone surrogate",
        "repair",
    ),
    "binary": ("a.jsonl", b"\x00\x01\x02binary", "a.jsonl:1", "is not a text file", "NUL"),
    "binary text": ("a.txt", b"\x7fELF\x00\x00", "a.txt:1", "is not a text file", "NUL"),
    "gzip": ("a.jsonl", b"\x1f\x8b\x08\x00abc", "a.jsonl:1", "is gzip-compressed", "gunzip"),
    "utf-16": ("a.json", json.dumps([1]).encode("utf-16"), "a.json:1", "is UTF-16", "iconv"),
    "latin-1": (
        "a.jsonl",
        GOOD.encode() + b"\n" + '{"text": "é"}'.encode("latin-1"),
        "a.jsonl:2",
        "not UTF-8 (byte 0xe9 at column 11)",
        "convert",
    ),
    "latin-1 text": (
        "a.txt",
        "ok\né".encode("latin-1"),
        "a.txt:2",
        "not UTF-8 (byte 0xe9)",
        "convert",
    ),
    "object file": (
        "a.json",
        '{\n"prompt": "a",\n"completion": "b"\n}',
        "a.json:1",
        "holds one object, not a list",
        "write",
    ),
    "broken list": (
        "a.json",
        f"[\n{GOOD},\n{{]",
        "a.json:3",
        "broken JSON at column 2",
        "mend it here",
    ),
    "open list": ("a.json", f"[\n{GOOD}\n", "a.json:3", "does not end with ']'", "mend it here"),
    "list of lists": (
        "a.json",
        f"[{GOOD},\n[1]]",
        "a.json:2",
        "holds a list, not an object",
        "write",
    ),
    "nested too deep": ("a.jsonl", '{"a":' * 100_000, "a.jsonl:1", "JSON", "object"),
    "not parquet": (
        "a.parquet",
        "hello",
        "a.parquet:1",
        "not a readable parquet file",
        "write it again",
    ),
}


@pytest.mark.parametrize(("name", "content", "place", "cause", "fix"), BAD.values(), ids=BAD)
def test_bad_files(tmp_path, monkeypatch, name, content, place, cause, fix):
    monkeypatch.chdir(tmp_path)
    payload = content if isinstance(content, bytes) else content.encode()
    (tmp_path / name).write_bytes(payload)
    recipe = config([{"path": str(tmp_path / name)}])
    with pytest.raises(UserErrors) as caught:
        data.check_data(recipe)
    (problem,) = caught.value.problems
    assert caught.value.exit_code == 2
    assert "\n" not in problem
    assert problem.startswith(f"{place}: ")
    assert cause in problem
    assert fix in problem
    assert len(problem) < 300
    with pytest.raises(UserError) as loading:  # and without the check before
        load_samples(recipe.data.train, TOKENIZER, recipe.data)
    assert str(loading.value) == str(caught.value)


def parquet(path: Path, **columns: Any) -> dict[str, str]:
    pq.write_table(pa.table(columns), path)
    return {"path": str(path)}


def missing(tmp_path: Path) -> dict[str, str]:
    jsonl(tmp_path / "train.jsonl", [])
    return {"path": str(tmp_path / "trian.jsonl")}


def folder(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.csv").write_text("a,b")
    return {"path": str(tmp_path / "folder")}


def csv(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "a.csv").write_text("a,b")
    return {"path": str(tmp_path / "a.csv")}


def pipe(tmp_path: Path) -> dict[str, str]:
    os.mkfifo(tmp_path / "a.jsonl")
    return {"path": str(tmp_path / "a.jsonl")}


def loop(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "a.jsonl").symlink_to(tmp_path / "a.jsonl")
    return {"path": str(tmp_path / "a.jsonl")}


def text_with_fields(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "a.txt").write_text("hello")
    return {"path": str(tmp_path / "a.txt"), "fields": {"text": "body"}}


def streamed_json(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "a.json").write_text('[{"text": "hello"}]')
    return {"path": str(tmp_path / "a.json"), "streaming": True}


def no_split(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "hub").mkdir()
    jsonl(tmp_path / "hub" / "train.jsonl", [{"text": "hello"}])
    return {"hub": str(tmp_path / "hub"), "split": "validation"}


BAD_SOURCES = {
    "missing": (
        missing,
        r"data\.train\.0\.path=trian\.jsonl: no such file.*did you mean train\.jsonl\?",
    ),
    "no data in folder": (
        folder,
        r"data\.train\.0\.path=folder: no \.jsonl.* file in this directory",
    ),
    "unknown suffix": (
        csv,
        r"data\.train\.0\.path=a\.csv: unknown kind of file '\.csv': convert it",
    ),
    "pipe": (pipe, r"a\.jsonl: not a regular file: copy it"),
    "unreadable": (loop, r"a\.jsonl: (cannot be read: |no such file)"),
    "int column": (
        lambda p: parquet(p / "a.parquet", prompt=[1, 2], completion=["a", "b"]),
        r"a\.parquet:1: column 'prompt' holds int64, not text: convert the column",
    ),
    "null cell": (
        lambda p: parquet(p / "a.parquet", text=["a", None]),
        r"a\.parquet:2: text: holds null",
    ),
    "missing parquet column": (
        lambda p: parquet(p / "a.parquet", texts=["a"]),
        r"a\.parquet:1: no field 'text', found 'texts'; did you mean 'texts'\?",
    ),
    "empty parquet": (
        lambda p: parquet(p / "a.parquet", text=pa.array([], pa.string())),
        r"a\.parquet:1: the file is empty",
    ),
    "fields of plain text": (
        text_with_fields,
        r"data\.train\.0\.fields: a \.txt file is plain text",
    ),
    "streamed json": (streamed_json, r"data\.train\.0\.streaming: only jsonl, parquet and hub"),
    "hub offline": (
        lambda p: {"hub": "nobody/no-such-dataset"},
        r"data\.train\.0\.hub=nobody/no-such-dataset: .*: load it once .* or give a local copy",
    ),
    "unknown split": (
        no_split,
        r"data\.train\.0\.hub=.*: check data\.train\.0\.subset and \.split",
    ),
}


@pytest.mark.parametrize(("make", "message"), BAD_SOURCES.values(), ids=BAD_SOURCES)
def test_bad_sources(tmp_path, monkeypatch, make, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserErrors) as caught:
        data.check_data(config([make(tmp_path)]))
    (problem,) = caught.value.problems
    assert re.search(message, problem), problem
    assert "\n" not in problem


def test_a_line_too_long_is_refused_and_the_next_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "MAX_LINE_BYTES", 2**20)
    path = tmp_path / "a.jsonl"
    path.write_text(f"{GOOD}\n" + "x" * (3 * 2**20) + f"\nbroken\n{GOOD}\n")
    with pytest.raises(UserErrors) as caught:
        data.check_data(config([{"path": str(path)}]))
    first, second = caught.value.problems
    assert re.search(r"a\.jsonl:2: longer than 1 MiB: write one sample a line", first)
    assert re.search(r"a\.jsonl:3: broken JSON", second)


def test_all_problems_of_all_sources_are_counted_and_ten_are_shown(tmp_path):
    first = jsonl(tmp_path / "a.jsonl", [{"prompt": "", "completion": ""}] * 7)
    second = jsonl(tmp_path / "b.jsonl", [{"text": "fine"}, {"text": 1}])
    eval_file = jsonl(tmp_path / "c.jsonl", [{"messages": []}])
    recipe = config(
        [{"path": first}, {"path": str(tmp_path / "none.jsonl")}, {"path": second}],
        data={"eval": [{"path": eval_file}], "chat_template": tmp_path / "none.jinja"},
        retention={"book": {"path": str(tmp_path / "none.txt")}},
    )
    with pytest.raises(UserErrors) as caught:
        data.check_data(recipe)
    problems = caught.value.problems
    assert len(problems) == 14 + 1 + 1 + 1 + 1 + 1
    lines = str(caught.value).splitlines()
    assert len(lines) == 11
    assert lines[-1] == "... and 9 more (19 in all)"
    for expected in (
        r"data\.chat_template=.*none\.jinja: cannot be read: No such file",
        r"data\.train\.1\.path=.*none\.jsonl: no such file",
        r"a\.jsonl:7: completion: is empty",
        r"b\.jsonl:2: text: holds the number 1",
        r"c\.jsonl:1: messages: is empty",
        r"retention\.book\.path=.*none\.txt: no such file",
    ):
        assert any(re.search(expected, problem) for problem in problems), expected


def test_a_file_of_nothing_but_problems_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr("moored.data.records.MAX_PROBLEMS", 5)
    path = jsonl(tmp_path / "a.jsonl", [{}] * 50)
    with pytest.raises(UserErrors) as caught:
        data.check_data(config([{"path": path}]))
    assert len(caught.value.problems) == 6
    assert "gave up after 5 problems" in caught.value.problems[-1]


def test_template_problems_name_the_line(tmp_path):
    tokenizer = chats.tokenizer(chats.GEMMA)
    rows = [{"messages": CHAT}] + [{"messages": [turn("system", "s"), *CHAT]}] * 12
    path = jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(UserErrors) as caught:
        load(path, tokenizer)
    assert len(caught.value.problems) == 12
    assert re.search(r"a\.jsonl:2: .*System role not supported.*first user turn", str(caught.value))


def test_exact_match_needs_prompts(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"text": "hello"}])
    recipe = config(
        [{"path": path}], data={"eval": [{"path": path}]}, evaluation={"exact_match": True}
    )
    with pytest.raises(UserError, match=r"data\.eval\.0: exact match needs prompts"):
        data.check_data(recipe)
    with pytest.raises(UserError, match=r"a\.jsonl:1: exact match needs a prompt"):
        data.prompts(recipe, TOKENIZER)


def test_checking_counts_what_is_there_and_needs_no_torch(tmp_path):

    path = jsonl(tmp_path / "a.jsonl", [{"text": "hello"}] * 3)
    code = (
        "import sys; from moored.config import load_config;"
        "from moored.data import check_data;"
        f"print(check_data(load_config({str(tmp_path / 'r.yaml')!r})), 'torch' in sys.modules)"
    )
    recipe = {
        "model": {"name_or_path": "x"},
        "data": {"train": [{"path": path}]},
        "retention": {"book": {"builtin": "python-reference"}},
        "train": {"steps": 1, "global_batch_sequences": 1},
    }
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    counts, has_torch = out.stdout.rsplit(" ", 1)
    assert re.fullmatch(r"\{'data.train.0': 3, 'retention.book': [1-9]\d+\}", counts)
    assert has_torch.strip() == "False"


def test_an_empty_spare_column_is_no_second_format(tmp_path):
    rows = [
        {"prompt": "a", "completion": "b", "text": ""},
        {"messages": [], "prompt": "a", "completion": "b"},
        {"prompt": "", "text": "b"},
    ]
    assert len(load(jsonl(tmp_path / "a.jsonl", rows))) == 3


def problems_of(path: Path, **sections: Any) -> str:
    with pytest.raises(UserError) as caught:
        data.check_data(config([{"path": str(path)}], **sections))
    return str(caught.value)


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ({"prompt": pa.array([b"\xff"], pa.binary()).view(pa.string())}, "a.parquet:1"),
        ({"when": pa.array([2**62], pa.timestamp("us"))}, "found 'when'"),
        ([("text", ["a"]), ("text", ["b"])], "two columns 'text'"),
    ],
)
def test_odd_parquet_files(tmp_path, table, says):
    pairs = table if isinstance(table, list) else list(table.items())
    columns = [pa.array(values) for _, values in pairs]
    pq.write_table(pa.Table.from_arrays(columns, [n for n, _ in pairs]), tmp_path / "a.parquet")
    assert says in problems_of(tmp_path / "a.parquet")


def test_a_folder_says_what_it_leaves_out(tmp_path, caplog):
    jsonl(tmp_path / "a.jsonl", [json.loads(GOOD)])
    for name in ("b.jsonl.gz", "c.csv", "README.md"):
        (tmp_path / name).write_text("x")
    os.mkfifo(tmp_path / "p.jsonl")
    assert len(load(tmp_path)) == 1
    assert "3 files beside the data are not read (README.md, b.jsonl.gz, c.csv)" in caplog.text
    (tmp_path / "a.jsonl").unlink()
    assert "no .jsonl, .json, .parquet, .txt, .md file" in problems_of(tmp_path)


def test_options_that_a_plain_text_would_ignore(tmp_path):
    (tmp_path / "a.txt").write_text("some words")
    for option in ({"limit": 1}, {"format": "prompt_completion"}, {"fields": {"text": "b"}}):
        with pytest.raises(UserError, match="is plain text"):
            load(tmp_path / "a.txt", source=option)


def test_a_template_that_is_no_jinja_is_one_line_with_its_place(tmp_path):
    jsonl(tmp_path / "a.jsonl", [{"messages": CHAT}] * 20)
    template = tmp_path / "t.jinja"
    template.write_text("\n{{ messages }")
    text = problems_of(tmp_path / "a.jsonl", data={"chat_template": str(template)})
    assert len(text.splitlines()) == 1
    assert re.search(r"data\.chat_template=.*t\.jinja:2: not a Jinja template", text)
    template.write_text("\ufeff" + chats.CHATML, encoding="utf-8")
    marked = load(tmp_path / "a.jsonl", chat_template=str(template))
    assert marked.fingerprint() == load(tmp_path / "a.jsonl").fingerprint()


@pytest.mark.parametrize("call", ["f()", {"function": "f"}, {"function": {"name": None}}])
def test_a_tool_call_names_a_function(tmp_path, call):
    chat = [U, {"role": "assistant", "tool_calls": [call]}]
    path = jsonl(tmp_path / "a.jsonl", [{"messages": chat}])
    assert "messages[1].tool_calls[0]: names no function" in problems_of(Path(path))


def test_a_limit_of_a_folder_of_texts_counts_documents(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(f"words of {name}")
    assert len(load(tmp_path, source={"limit": 2})) == 2
