"""Folders with splits: which files are read, which are said to be left out, which are refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import datasets
import pytest

from datakit import config, jsonl, records
from moored import data
from moored.config import load_config
from moored.data.files import open_sources
from moored.utils.errors import UserError, UserErrors

README = """---
license: mit
configs:
- config_name: default
  data_files:
  - split: train
    path: part/a-*
  - split: held
    path: [part/b.jsonl, "more/**"]
---
# About
"""


def folder(path: Path, *names: str, readme: str | None = None) -> Path:
    """Files that each hold their own name as a text."""
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        jsonl(path / name, [{"text": name}])
    if readme is not None:
        (path / "README.md").write_text(readme)
    return path


def read(path: Path, **source: Any) -> list[str]:
    return [one.text for one in records(path, **source)]


def problem(path: Path, section: str = "train", **source: Any) -> str:
    """The one line about a folder."""
    sources = [{"path": str(path)} | source]
    other = [{"path": jsonl(path.parent / "other.jsonl", [{"text": "other"}])}]
    recipe = config(sources) if section == "train" else config(other, data={section: sources})
    with pytest.raises(UserErrors) as caught:
        data.check_data(recipe)
    (line,) = caught.value.problems
    assert "\n" not in line
    assert line.startswith(f"data.{section}.0")
    return line


LAYOUTS: dict[str, tuple[str, ...]] = {
    "shards": (
        "data/train-00000-of-00002.jsonl",
        "data/train-00001-of-00002.jsonl",
        "data/test-00000-of-00001.jsonl",
        "data/validation-00000-of-00001.jsonl",
    ),
    "named shards": (
        "data/train-00000-of-00001.jsonl",
        "data/train_sft-00000-of-00001.jsonl",
        "data/test_sft-00000-of-00001.jsonl",
    ),
    "files": ("train.jsonl", "test.jsonl", "validation.jsonl"),
    "other words": ("x_training.jsonl", "x-eval.jsonl", "my dev.jsonl"),
    "numbered": ("data/train-00000.jsonl", "data/train-00001.jsonl", "data/valid-00000.jsonl"),
    "folders": ("train/a.jsonl", "train/b/c.jsonl", "val-1/a.jsonl", "evaluation/a.jsonl"),
    "deep": ("en/train.jsonl", "de/train.jsonl", "de/test.jsonl"),
    "none": ("a.jsonl", "b/trainer.jsonl", "b/contest.jsonl", "latest/x.jsonl", "c/devil.jsonl"),
}


@pytest.mark.parametrize("names", LAYOUTS.values(), ids=LAYOUTS)
def test_a_folder_is_read_by_split_as_the_hub_would_be(tmp_path, names, caplog):
    path = folder(tmp_path / "test-data" / "ds", *names)
    hub: Any = datasets.load_dataset(str(path))
    theirs = {split: sorted(rows["text"]) for split, rows in hub.items()}
    assert sorted(name for found in theirs.values() for name in found) == sorted(names)
    for split, expected in theirs.items():
        if len(theirs) > 1:
            assert sorted(read(path, split=split)) == expected
        if split == "train":
            caplog.clear()
            assert sorted(read(path)) == expected
            said = [r.message for r in caplog.records if "is read, left out: " in r.message]
            assert len(said) == (len(theirs) > 1)
            assert all(other in said[0] for other in theirs if said and other != "train")
    assert sorted(read(path, split="all")) == sorted(names)


def test_a_readme_of_the_hub_says_which_files_are_which(tmp_path, caplog):
    names = ("part/a-1.jsonl", "part/a-2.jsonl", "part/b.jsonl", "more/x/c.jsonl", "train.jsonl")
    path = folder(tmp_path / "ds", *names, readme=README)
    assert read(path) == ["part/a-1.jsonl", "part/a-2.jsonl"]
    assert "left out: held (2 files), 1 file of no split (train.jsonl)" in caplog.text
    assert read(path, split="held") == ["more/x/c.jsonl", "part/b.jsonl"]
    theirs = datasets.load_dataset(str(path), split="held")
    assert sorted(theirs["text"]) == read(path, split="held")


@pytest.mark.parametrize(
    "data_files",
    [
        "'*.jsonl'",
        "['a.jsonl', 'b.jsonl']",
        "[{split: train, path: [a.jsonl, b.jsonl]}]",
    ],
)
def test_a_readme_may_say_it_in_every_way_of_the_hub(tmp_path, data_files):
    readme = f"---\nconfigs:\n- config_name: x\n  data_files: {data_files}\n---\n"
    path = folder(tmp_path / "ds", "a.jsonl", "b.jsonl", readme=readme)
    assert read(path, split="train") == ["a.jsonl", "b.jsonl"]
    assert len(datasets.load_dataset(str(path), split="train")) == 2


@pytest.mark.parametrize(
    "readme",
    [
        "words",
        "---\n: [\n---\n",
        "---\nconfigs: 3\n---\n",
        "---\nconfigs:\n- data_files: [{split: train, path: ../*.jsonl}]\n---\n",
        "---\nconfigs:\n- data_files: [{split: train, path: /etc/*}]\n---\n",
        "---\nconfigs:\n- config_name: x\n---\n",
    ],
)
def test_a_readme_that_says_nothing_is_for_people(tmp_path, readme):
    jsonl(tmp_path / "out.jsonl", [{"text": "out"}])
    path = folder(tmp_path / "ds", "train.jsonl", "test.jsonl", readme=readme)
    assert read(path) == ["train.jsonl"]


def test_files_about_the_data_are_not_data(tmp_path):
    path = folder(tmp_path / "ds", "data/train-00000-of-00001.jsonl")
    for name in ("dataset_infos.json", "dataset_info.json", "config.json"):
        (path / name).write_text('{\n"a": 1\n}')
    assert read(path) == ["data/train-00000-of-00001.jsonl"]


def test_names_above_the_folder_do_not_matter(tmp_path):
    path = folder(tmp_path / "test" / "eval-1", "a.jsonl", "b.jsonl")
    assert read(path) == ["a.jsonl", "b.jsonl"]
    path = folder(tmp_path / "ds" / "test", "a.jsonl")
    assert read(path) == ["a.jsonl"]
    assert read(tmp_path / "ds" / "test" / "a.jsonl") == ["a.jsonl"]


def test_a_folder_of_plain_texts_has_splits_too(tmp_path):
    for name in ("train", "test"):
        (tmp_path / f"{name}.txt").write_text(name)
    assert read(tmp_path) == ["train"]
    (tmp_path / "train.txt").unlink()
    (tmp_path / "testing.md").write_text("how to test")
    (tmp_path / "usage.md").write_text("how to use")
    assert "has no file of split train, it has test (2 files): set data.train.0.split to one" in (
        problem(tmp_path)
    )
    assert read(tmp_path, split="all") == ["test", "how to test", "how to use"]


REFUSED = {
    "no such split": (
        ("train.jsonl", "test.jsonl"),
        {"split": "validation"},
        r"path=\S+: has no file of split validation, it has test \(1 file\), train \(1 file\): set "
        r"data\.train\.0\.split to one of them, or to all",
    ),
    "only others": (("test.jsonl", "dev.jsonl"), {}, "has no file of split train, it has "),
    "a part of a split": (("train.jsonl", "test.jsonl"), {"split": "train[:10]"}, "has no file of"),
    "no splits": (("a.jsonl",), {"split": "train"}, r"split=train: no file of \S+ names a split"),
    "files of none": (
        ("train.jsonl", "a.jsonl", "b.jsonl"),
        {},
        r"has train \(1 file\), and 2 files of no split \(a\.jsonl, b\.jsonl\): set "
        r"data\.train\.0\.split=train to leave the others out, or data\.train\.0\.split=all",
    ),
    "both": (
        ("train/test.jsonl", "train/a.jsonl"),
        {},
        r"train/test\.jsonl looks like test and train: name files one by one, or set .*split=all",
    ),
}


@pytest.mark.parametrize(("names", "source", "words"), REFUSED.values(), ids=REFUSED)
def test_what_may_be_of_another_split_is_never_learned_silently(tmp_path, names, source, words):
    path = folder(tmp_path / "ds", *names)
    assert re.search(words, problem(path, **source))


def test_the_fixes_that_are_named(tmp_path, caplog):
    path = folder(tmp_path / "ds", "train.jsonl", "a.jsonl")
    assert read(path, split="train") == ["train.jsonl"]
    assert "split train is read, left out: 1 file of no split (a.jsonl)" in caplog.text
    assert read(path, split="all") == ["a.jsonl", "train.jsonl"]


def test_several_configurations_are_the_hubs(tmp_path):
    configs = "".join(
        f"- config_name: {name}\n  data_files: [{{split: train, path: {name}.jsonl}}]\n"
        for name in ("en", "de")
    )
    path = folder(tmp_path / "ds", "en.jsonl", "de.jsonl", readme=f"---\nconfigs:\n{configs}---\n")
    assert "has 2 configurations (en, de): give the folder as hub, with the name of one" in (
        problem(path)
    )
    assert read(path, hub=True, subset="de") == ["de.jsonl"]


def test_one_file_has_no_splits(tmp_path):
    path = folder(tmp_path, "a.jsonl") / "a.jsonl"
    with pytest.raises(ValueError, match="ignored, since path is one file, without splits: remove"):
        config([{"path": str(path), "split": "train"}])


def test_held_out_data_say_which_of_the_splits_they_are(tmp_path):
    path = folder(tmp_path / "ds", "train.jsonl", "test.jsonl")
    assert re.search(
        r"path=\S+: has .*, and does not say which is held out: set data\.eval\.0\.split=test",
        problem(path, "eval"),
    )
    recipe = config([{"path": str(path)}], data={"eval": [{"path": str(path), "split": "test"}]})
    readers = {
        section: [
            file.name for reader in open_sources(sources, section, []) for file, _ in reader.files
        ]
        for section, sources in recipe.sources().items()
    }
    assert readers == {"data.train": ["train.jsonl"], "data.eval": ["test.jsonl"]}
    alone = folder(tmp_path / "alone", "test.jsonl")
    assert data.check_data(config([{"path": str(path)}], data={"eval": [{"path": str(alone)}]}))
    learned = folder(tmp_path / "learned", "train.jsonl")
    assert "set data.eval.0.split=train" in problem(learned, "eval")


def test_hub_sources_are_of_the_split_train_unless_they_say(tmp_path):
    path = folder(tmp_path / "ds", "train.jsonl", "test.jsonl")
    assert config([{"hub": str(path)}]).data.train[0].split == "train"
    assert read(path, hub=True) == ["train.jsonl"]
    assert read(path, hub=True, split="test") == ["test.jsonl"]


# ---------------------------------------------------------------- what save_to_disk wrote


@pytest.fixture
def saved(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one = datasets.Dataset.from_list([{"text": "a"}])
    datasets.DatasetDict({"train": one, "test": one}).save_to_disk("all")
    one.save_to_disk("one")
    one.save_to_disk("data/deep/one")
    jsonl(tmp_path / "data" / "a.jsonl", [{"text": "a"}])
    return tmp_path


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("all", "data.train.0.path=all: was written by Dataset.save_to_disk: give it as "
         "data.train.0.hub=all instead of path"),
        ("one", "path=one: was written by Dataset.save_to_disk: give it as data.train.0.hub=one"),
        ("all/test", "give it as data.train.0.hub=all/test instead of path"),
        ("data", "path=data: deep/one in it was written by Dataset.save_to_disk: give it as "
         "data.train.0.hub=data/deep/one instead of path"),
        ("one/data-00000-of-00001.arrow", "give its folder as data.train.0.hub=one instead"),
    ],
)  # fmt: skip
def test_a_saved_data_set_is_given_as_hub(saved, path, words):
    line = problem(saved / path)
    assert words in line
    hub = re.search(r"hub=(\S+)", line)
    assert hub is not None
    assert read(Path(hub[1]), hub=True) == ["a"]


def test_a_saved_data_set_of_texts_is_given_as_hub(saved):
    corpus = {"book": {"path": str(saved / "one")}}
    with pytest.raises(UserError) as caught:
        data.check_data(config([{"path": str(saved / "data" / "a.jsonl")}], retention=corpus))
    assert str(caught.value).endswith("give it as retention.book.hub=one instead of path")


def test_a_folder_given_as_hub_is_beside_the_recipe(saved, monkeypatch):
    (saved / "elsewhere").mkdir()
    monkeypatch.chdir(saved / "elsewhere")
    (saved / "recipe.yaml").write_text(
        "model: {name_or_path: none/none}\ntrain: {steps: 1, global_batch_sequences: 1}\n"
        "data:\n  train:\n  - hub: data/deep/one\n  - hub: ./one\n  - hub: some/name\n"
        "retention: {book: {hub: all}}\n"
    )
    recipe = load_config(saved / "recipe.yaml")
    assert [source.hub for source in recipe.data.train] == [
        str(saved / "data" / "deep" / "one"),
        str(saved / "one"),
        "some/name",
    ]
    assert data.resolve_text(recipe.retention["book"]) == ["a"]
