"""A recipe's data are read once per start, whoever needs them, and held no longer than that."""

from __future__ import annotations

import gc
import json
import logging
import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny
from datakit import CHAT, TOKENIZER, config, jsonl
from moored import data
from moored.config import Config
from moored.data import DataReader, load_samples, reading, token_cache
from moored.data.files import SourceReader
from moored.utils.errors import UserErrors


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MOORED_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokens"


class Spy:
    """How often the rows of each file were read."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.counts: dict[str, int] = {}
        rows = SourceReader.rows

        def counted(reader: SourceReader, skip: int = 0) -> Any:
            name = reader.files[0][0].name if reader.files else Path(str(reader.hub)).name
            self.counts[name] = self.counts.get(name, 0) + 1
            yield from rows(reader, skip)

        monkeypatch.setattr(SourceReader, "rows", counted)

    def taken(self) -> dict[str, int]:
        counts, self.counts = self.counts, {}
        return counts


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Spy:
    return Spy(monkeypatch)


def chat_rows(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [
        {"messages": [{"role": "user", "content": f"question {i}"}, CHAT[1]]}
        for i in range(start, start + count)
    ]


def recipe_in(folder: Path, **sections: Any) -> Config:
    return config(
        [{"path": jsonl(folder / "train.jsonl", chat_rows(40))}],
        data={"eval": [{"path": jsonl(folder / "eval.jsonl", chat_rows(10, 35))}]},
        **sections,
    )


def loaded(recipe: Config, reader: DataReader, **options: Any) -> data.SampleSet:
    size = len(TOKENIZER)
    return load_samples(recipe.data.train, TOKENIZER, recipe.data, size, reader=reader, **options)


# ---------------------------------------------------------------- a whole start

# Runs a command of `moored` and writes down how often the rows of each file were read.
COUNTED = """
import json, sys
from collections import Counter
from moored.data.files import SourceReader
counts, rows = Counter(), SourceReader.rows
def counted(reader, skip=0):
    counts[reader.files[0][0].name] += 1
    yield from rows(reader, skip)
SourceReader.rows = counted
from moored.cli import main
try:
    main(sys.argv[2:])
finally:
    with open(sys.argv[1], "w") as file:
        json.dump(counts, file)
"""


def test_a_start_reads_each_file_once(tmp_path, cache):
    """Of a real run, of `doctor` and of `evaluate`; tokens kept or not."""
    recipe = tiny.tiny_recipe(tmp_path)
    domains = [
        {"text": f"{name} text number {i} of this domain", "of": name}
        for i in range(20)
        for name in ("law", "tax")
    ]
    laws = jsonl(tmp_path / "laws.jsonl", domains)
    recipe["retention"]["laws"] = {"path": laws, "domain_field": "of", "window_tokens": 64}
    streamed = str(tiny.write_chats(tmp_path / "streamed.jsonl", 30, start=70))
    recipe["data"]["train"].append({"path": streamed, "streaming": True})
    replayed = str(tiny.write_chats(tmp_path / "old.jsonl", 12, start=50))
    recipe["regularizer"] = {"kind": "replay", "replay": [{"path": replayed}]}
    recipe["regularizer"]["replay_fraction"] = 0.5
    recipe["evaluation"] |= {"exact_match": True, "max_new_tokens": 2}
    recipe["train"]["steps"] = 2
    path = tiny.write_recipe(tmp_path, recipe)

    def counts(*arguments: str) -> dict[str, int]:
        done = subprocess.run(
            [sys.executable, "-c", COUNTED, str(tmp_path / "counts.json"), *arguments],
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads((tmp_path / "counts.json").read_text())

    texts = {"eval.jsonl": 1, "fox.txt": 1, "laws.jsonl": 1}
    # A streamed file is read to its end to check it, and then as training goes.
    whole = texts | {"train.jsonl": 1, "old.jsonl": 1, "streamed.jsonl": 2}
    assert counts("doctor", str(path)) == whole
    assert counts("train", str(path), "name=cold") == whole
    assert counts("prepare", str(path)) == whole
    # What is kept is known to be valid. Held-out records are asked, and compared with the others.
    assert counts("train", str(path), "name=warm") == texts | {"streamed.jsonl": 2}
    assert counts("evaluate", str(tmp_path / "runs" / "warm")) == texts
    for name in ("train.jsonl", "old.jsonl"):
        assert list(cache.glob(f"{name}-*"))


# ---------------------------------------------------------------- what is held


def test_what_is_held_gives_the_same_tokens(tmp_path, spy):
    recipe = recipe_in(tmp_path, evaluation={"exact_match": True})
    plain = load_samples(recipe.data.train, TOKENIZER, recipe.data, len(TOKENIZER))
    asked = data.prompts(recipe, TOKENIZER)
    spy.taken()
    reader = DataReader()
    assert reader.check(recipe) == {"data.train.0": 40, "data.eval.0": 10}
    assert loaded(recipe, reader).fingerprint() == plain.fingerprint()
    assert data.prompts(recipe, TOKENIZER, reader) == asked
    assert spy.taken() == {"train.jsonl": 1, "eval.jsonl": 1}


def test_what_has_no_room_is_read_again(tmp_path, spy, monkeypatch):
    recipe = recipe_in(tmp_path)
    plain = load_samples(recipe.data.train, TOKENIZER, recipe.data, len(TOKENIZER))
    spy.taken()
    monkeypatch.setattr(reading, "HELD_CHARACTERS", 2000)
    reader = DataReader()
    reader.check(recipe)
    assert loaded(recipe, reader).fingerprint() == plain.fingerprint()
    assert spy.taken() == {"train.jsonl": 2, "eval.jsonl": 1}
    held = [s._held for kept in reader._sources.values() for s in kept]
    assert sum(len(repr(record)) for records in held for record in records or ()) <= 2000


def test_records_are_gone_with_their_reader(tmp_path):
    recipe = recipe_in(tmp_path)
    reader = DataReader()
    reader.check(recipe)
    (source,) = reader.sources(recipe.data.train, "data.train", [])
    samples = loaded(recipe, reader)
    watched = weakref.ref(source)
    del reader, source
    gc.collect()
    assert watched() is None
    assert len(samples) == 40


def test_who_only_checks_holds_nothing(tmp_path):
    recipe = recipe_in(tmp_path)
    reader = DataReader(hold=False)
    reader.check(recipe)
    assert all(s._held is None for kept in reader._sources.values() for s in kept)


def test_a_file_that_changes_before_it_is_tokenised_keeps_no_tokens(tmp_path, cache):
    """Its records are those that were checked; under the new content they must not be kept."""
    recipe = recipe_in(tmp_path)
    reader = DataReader()
    reader.check(recipe)
    jsonl(tmp_path / "train.jsonl", chat_rows(7, 500))
    samples = loaded(recipe, reader, keep=True)
    assert len(samples) == 40
    assert not list(cache.glob("[!.]*"))
    assert len(loaded(recipe, DataReader(), keep=True)) == 7


def test_one_text_is_read_once_for_all_its_measures(tmp_path, spy):
    rows = [{"text": f"{name} number {i}", "of": name} for i in range(9) for name in "ab"]
    path = jsonl(tmp_path / "r.jsonl", rows)
    measures = {
        "whole": {"path": path},
        "words": {"path": path, "target": "last_word", "max_tokens": 99, "window_tokens": 9},
        "parts": {"path": path, "domain_field": "of"},
    }
    recipe = config([{"path": jsonl(tmp_path / "t.jsonl", chat_rows(3))}], retention=measures)
    plain = {
        part: data.retention_samples(part, corpus, TOKENIZER)
        for name, whole in recipe.retention.items()
        for part, corpus in data.by_domain(name, whole).items()
    }
    spy.taken()
    reader = DataReader()
    counts = reader.check(recipe)
    assert [counts[f"retention.{name}"] for name in measures] == [18, 18, 18]
    for name, whole in recipe.retention.items():
        for part, corpus in data.by_domain(name, whole, reader.corpus).items():
            again = data.retention_samples(part, corpus, TOKENIZER, reader=reader)
            for one, other in zip(plain.pop(part), again, strict=True):
                assert one.sample_id == other.sample_id
                np.testing.assert_array_equal(one.input_ids, other.input_ids)
    assert not plain
    assert spy.taken() == {"t.jsonl": 1, "r.jsonl": 2}  # its domains are other columns of it


# ---------------------------------------------------------------- what is known of kept tokens


def warnings_of(recipe: Config, caplog: pytest.LogCaptureFixture) -> tuple[Any, list[str]]:
    caplog.clear()
    counts = data.check_data(recipe)
    return counts, [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def test_rows_of_which_tokens_are_kept_are_known(tmp_path, spy, caplog):
    """Whoever kept them: counts, columns that are not read, and what is held out and learned."""
    rows = [row | {"note": "a word"} for row in chat_rows(40)]
    recipe = recipe_in(tmp_path)
    jsonl(tmp_path / "train.jsonl", rows)
    cold = warnings_of(recipe, caplog)
    assert spy.taken() == {"train.jsonl": 1, "eval.jsonl": 1}
    assert len(cold[1]) == 2
    assert "of 10 samples are learned, too" in cold[1][1]
    size = len(TOKENIZER)
    load_samples(recipe.data.train, TOKENIZER, recipe.data, size, keep=True)
    spy.taken()
    assert warnings_of(recipe, caplog) == cold
    assert spy.taken() == {"eval.jsonl": 1}
    other = recipe.model_copy(update={"data": recipe.data.model_copy(update={"max_length": 99})})
    assert warnings_of(other, caplog) == cold  # other tokens of the same rows
    assert spy.taken() == {"eval.jsonl": 1}
    reader = DataReader()
    reader.check(other)
    assert len(loaded(other, reader)) == 40
    assert spy.taken() == {"eval.jsonl": 1, "train.jsonl": 1}


CHANGES: dict[str, Any] = {
    "content": lambda path, source: jsonl(path, [*chat_rows(40), {"messages": []}]),
    "format": lambda path, source: source.update(format="text"),
    "fields": lambda path, source: source.update(fields={"messages": "chat"}),
    "ignore": lambda path, source: source.update(ignore=["messages"]),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_what_changes_the_rows_is_checked_again(tmp_path, change):
    path = tmp_path / "train.jsonl"
    source = {"path": jsonl(path, chat_rows(40))}
    recipe = config([source])
    load_samples(recipe.data.train, TOKENIZER, recipe.data, len(TOKENIZER), keep=True)
    data.check_data(recipe)
    change(path, source)
    with pytest.raises(UserErrors):
        data.check_data(config([source]))


@pytest.mark.parametrize("name", ["records.json", "wholes.npy", "prompts.npy", "manifest.json"])
def test_what_is_known_is_verified(tmp_path, spy, cache, caplog, name):
    recipe = recipe_in(tmp_path)
    cold = warnings_of(recipe, caplog)
    load_samples(recipe.data.train, TOKENIZER, recipe.data, len(TOKENIZER), keep=True)
    (folder,) = cache.glob("[!.]*")
    content = bytearray((folder / name).read_bytes())
    content[-3] ^= 1
    (folder / name).write_bytes(content)
    spy.taken()
    assert warnings_of(recipe, caplog) == cold
    assert spy.taken() == {"train.jsonl": 1, "eval.jsonl": 1}


def test_the_check_of_another_version_is_not_trusted(tmp_path, spy, monkeypatch):
    recipe = recipe_in(tmp_path)
    load_samples(recipe.data.train, TOKENIZER, recipe.data, len(TOKENIZER), keep=True)
    monkeypatch.setattr(token_cache, "_code", lambda: "other")
    spy.taken()
    data.check_data(recipe)
    assert spy.taken() == {"train.jsonl": 1, "eval.jsonl": 1}


# ---------------------------------------------------------------- who says what


def test_of_many_ranks_one_says_what_is_held_out_and_learned(tmp_path, caplog, monkeypatch):
    recipe = recipe_in(tmp_path)
    _, said = warnings_of(recipe, caplog)
    assert len(said) == 1
    for name, value in {"WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.setenv("RANK", "0")
    assert warnings_of(recipe, caplog)[1] == said
    monkeypatch.setenv("RANK", "1")
    assert warnings_of(recipe, caplog)[1] == []


def test_recipes_that_name_the_same_data_need_one_check(tmp_path):
    texts = {"path": jsonl(tmp_path / "t.jsonl", [{"text": "a"}])}

    def named(**sections: Any) -> str:
        return data.what_is_checked(recipe_in(tmp_path, **sections))

    assert named(train={"seed": 5}, optim={"learning_rate": 0.1}) == named()
    assert named(retention={"t": texts}) != named()
    assert named(regularizer={"kind": "replay", "replay": [texts]}) != named()
    assert named(evaluation={"exact_match": True}) != named()
    assert data.what_is_checked(config([texts])) != named()


def test_a_hub_that_cannot_be_reached_is_asked_once(tmp_path, monkeypatch):
    import datasets

    asked: list[str] = []
    load = datasets.load_dataset

    def counted(name: str, *arguments: Any, **options: Any) -> Any:
        asked.append(name)
        return load(name, *arguments, **options)

    monkeypatch.setattr(datasets, "load_dataset", counted)
    recipe = config([{"hub": "nobody/none"}])
    with pytest.raises(UserErrors) as caught:
        DataReader().check(recipe)
    (problem,) = caught.value.problems
    assert problem.startswith("data.train.0.hub=nobody/none: ")
    assert asked == ["nobody/none"]
