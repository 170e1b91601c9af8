"""Recipes: what is accepted, what is refused and in which words, and the way to a file and back."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from moored.config import Config, Regularizer, arm_names, load_config, validation
from moored.config.document import dump
from moored.config.recipe import read_recipe
from moored.config.recipe_docs import reference
from moored.config.section import Key, Section
from moored.config.validation import section_at
from moored.utils.errors import UserError, UserErrors

MINIMAL = """\
model: {name_or_path: some/model}
data:
  train:
    - path: train.jsonl
train: {steps: 100, global_batch_sequences: 8}
"""
# Every section, list and mapping that a recipe can have, so that each of its keys can be mutated.
FULL: dict[str, Any] = {
    "name": "full",
    "model": {"name_or_path": "some/model", "revision": "main"},
    "adapter": {"r": 8, "target_modules": ["q_proj"]},
    "data": {
        "train": [{"path": "a.jsonl"}, {"hub": "some/data", "fields": {"prompt": "question"}}],
        "eval": [{"hub": "some/data", "split": "test"}],
    },
    "regularizer": {
        "kind": "replay",
        "weight": 0.5,
        "replay": [{"path": "old.txt"}],
        "budget": {"drift_nats_per_token": 0.1, "probe": {"path": "probe.txt"}},
    },
    "reference": {"cache": True, "max_gib": 5.0},
    "retention": {"reference": {"builtin": "python-reference"}, "wiki": {"hub": "wikitext"}},
    "optim": {"learning_rate": 1e-3, "betas": [0.9, 0.95]},
    "parallel": {"zero_stage": 3, "offload": "optimizer"},
    "train": {"steps": 100, "global_batch_sequences": 8},
    "evaluation": {"exact_match": True, "every": 50},
    "track": {"tags": {"team": "a"}},
    "output": {"dir": "out"},
    "compare": [
        {"kind": "none"},
        {"kind": "tmkl", "direction": "jsd", "anchors": {"path": "anchors.txt"}},
    ],
}


def write(folder: Path, text: str, name: str = "recipe.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def problems(path: Path, *overrides: str) -> list[str]:
    """The problems of a recipe, without the path in front."""
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    lines = caught.value.problems if isinstance(caught.value, UserErrors) else [str(caught.value)]
    return [line.replace(str(path), path.name) for line in lines]


def test_defaults_of_a_minimal_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    config = load_config(write(tmp_path / "sub", MINIMAL, "my_run.yaml"))
    assert config.name == "my_run"
    assert config.model.quantization == "nf4"
    assert config.regularizer == Regularizer(kind="tmkl", weight=1.0, direction="forward")
    assert config.data.train[0].path == str(tmp_path / "sub" / "train.jsonl")
    assert config.output.dir == tmp_path / "runs"
    assert config.optim.learning_rate == 2e-4
    assert config.optim.betas == (0.9, 0.999)
    assert [arm.kind for arm in config.compare] == ["none", "kl", "tmkl"]


def test_a_config_cannot_be_changed(tmp_path):
    config = load_config(write(tmp_path, MINIMAL))
    with pytest.raises(ValidationError, match="frozen"):
        config.optim.learning_rate = 1.0  # pyright: ignore[reportAttributeAccessIssue]


# --- unknown keys, at every depth


def section_keys(data: Any, key: Key = ()) -> Iterator[Key]:
    if isinstance(data, dict):
        if section_at(Config, key) is not None:
            yield key
        for name, value in data.items():
            yield from section_keys(value, (*key, name))
    elif isinstance(data, list):
        for index, value in enumerate(data):
            yield from section_keys(value, (*key, index))


def known_keys() -> list[tuple[Key, str]]:
    found: list[tuple[Key, str]] = []
    for key in section_keys(FULL):
        section = section_at(Config, key)
        assert section is not None
        found.extend((key, name) for name in section.model_fields)
    return found


KNOWN_KEYS = known_keys()


def test_the_full_recipe_reaches_every_section():
    reached = {section_at(Config, key) for key, _ in KNOWN_KEYS}
    sections: set[type[Section]] = set()
    pending: list[type[Section]] = [Section]
    while pending:
        sections.update(pending)
        pending = [child for parent in pending for child in parent.__subclasses__()]
    in_schema = {s for s in sections if s.__module__.startswith("moored.config")} - {Section}
    assert reached == in_schema


@st.composite
def misspelt(draw: st.DrawFn) -> tuple[Key, str, str]:
    """A key somewhere in the recipe with one edit: dropped, doubled, swapped or wrong letter."""
    key, name = draw(st.sampled_from(KNOWN_KEYS))
    at = draw(st.integers(0, len(name) - 1))
    edit = draw(st.sampled_from(["drop", "double", "swap", "replace", "upper", "dash"]))
    changed = {
        "drop": name[:at] + name[at + 1 :],
        "double": name[:at] + name[at] + name[at:],
        "swap": name[:at] + name[at : at + 2][::-1] + name[at + 2 :],
        "replace": name[:at] + "x" + name[at + 1 :],
        "upper": name.upper(),
        "dash": name.replace("_", "-"),
    }[edit]
    return key, name, changed


@given(misspelt())
@settings(max_examples=200, deadline=None)
def test_every_misspelt_key_is_caught_with_the_right_name(tmp_path_factory, case):
    key, name, changed = case
    section = section_at(Config, key)
    assert section is not None
    if changed in section.model_fields or not changed:
        return
    data = read_recipe(FULL_PATH(tmp_path_factory)).data
    at: Any = data
    for part in key:
        at = at[part]
    at[changed] = 1
    path = write(tmp_path_factory.mktemp("mutated"), dump(data))
    found = problems(path)
    dotted = ".".join(str(part) for part in (*key, changed))
    assert len(found) == 1, found
    assert f": {dotted}: unknown key" in found[0]
    if len(name) >= 4:
        # A neighbour may be nearer by chance; then that one is named. Something always is.
        suggestion = found[0].rpartition("did you mean ")[2].rstrip("?")
        assert suggestion == name or suggestion in {n for _, n in KNOWN_KEYS}, found
        if len(name) >= 6 and not changed.startswith("x"):
            assert suggestion == name, found


def FULL_PATH(factory: pytest.TempPathFactory) -> Path:
    path = factory.getbasetemp() / "full.yaml"
    if not path.exists():
        path.write_text(dump(FULL))
    return path


def test_the_full_recipe_is_valid(tmp_path_factory):
    load_config(FULL_PATH(tmp_path_factory))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("learning_rate: 1", "did you mean optim.learning_rate?"),
        ("lr_schedule: x", "unknown key"),
        ("zero_stage: 1", "did you mean parallel.zero_stage?"),
        ("qwertz: 1", "the keys here are name, model, adapter"),
    ],
)
def test_a_key_of_another_section_is_found_there(tmp_path, line, words):
    (found,) = problems(write(tmp_path, MINIMAL + line + "\n"))
    assert found.startswith("recipe.yaml:6: ")
    assert words in found


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("global_batch_size: 1", "did you mean train.global_batch_sequences?"),
        ("total_batch_size: 1", "did you mean train.global_batch_sequences?"),
        ("per_device_train_batch_size: 1", "did you mean train.micro_batch_size?"),
        ("per-device-train-batch-size: 1", "did you mean train.micro_batch_size?"),
        ("per_device_eval_batch_size: 1", "did you mean evaluation.micro_batch_size?"),
        ("gradient_accumulation_steps: 1", "train.global_batch_sequences over micro_batch_size"),
        ("lr: 1", "did you mean optim.learning_rate?"),
        ("lr_scheduler_type: x", "did you mean optim.schedule?"),
        ("warmup_steps: 1", "did you mean optim.warmup_steps?"),
        ("warmup_ratio: 0.1", "set optim.warmup_steps, in steps"),
        ("num_train_epochs: 1", "did you mean train.epochs?"),
        ("max_steps: 1", "did you mean train.steps?"),
        ("max_seq_length: 1", "did you mean data.max_length?"),
        ("cutoff_len: 1", "did you mean data.max_length?"),
        ("lora_r: 1", "did you mean adapter.r?"),
        ("lora_rank: 1", "did you mean adapter.r?"),
        ("lora_alpha: 1", "did you mean adapter.alpha?"),
        ("lora_dropout: 1", "did you mean adapter.dropout?"),
        ("target_modules: 1", "did you mean adapter.target_modules?"),
        ("lora_target_modules: 1", "did you mean adapter.target_modules?"),
        ("model_name_or_path: x", "did you mean model.name_or_path?"),
        ("dataset: x", "did you mean data.train?"),
        ("bf16: true", "did you mean model.dtype?"),
        ("load_in_4bit: true", "did you mean model.quantization?"),
        ("eval_steps: 1", "did you mean evaluation.every?"),
        ("deepspeed: x", "did you mean parallel.zero_stage?"),
        ("output_dir: x", "did you mean output.dir?"),
    ],
)
def test_what_other_trainers_call_an_option_finds_ours(tmp_path, line, words):
    (found,) = problems(write(tmp_path, MINIMAL + line + "\n"))
    assert found.startswith("recipe.yaml:6: ")
    assert f"unknown key; {words}" in found


def test_every_name_of_other_trainers_leads_to_an_option():
    paths = dict(validation._leaves(Config, ()))
    assert {path for path in validation._PEERS.values() if path not in paths} == set()
    assert not set(validation._PEERS) & set(validation._INSTEAD)


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ("train", "did you mean global_batch_sequences?"),
        ("optim", "did you mean train.global_batch_sequences?"),
    ],
)
def test_the_option_of_the_same_section_is_named_alone(tmp_path, section, words):
    data = read_recipe(write(tmp_path, MINIMAL)).data
    data.setdefault(section, {})["global_batch_size"] = 8
    data["train"].pop("global_batch_sequences", None)
    found = problems(write(tmp_path, dump(data)))
    assert any(f"{section}.global_batch_size: unknown key; {words}" in line for line in found)
    assert len(found) == (1 if section == "train" else 2), found


# --- everything at once, each with its line


def test_all_problems_are_reported_in_the_order_of_the_file(tmp_path):
    text = """\
nmae: x
model: {name_or_path: 5, dtype: bfloat}
data:
  train: [{path: a.jsonl, hub: b}]
  max_length: "12"
optim:
  learning_rate: -1
  warmup_steps: 100
train:
  steps: 100
  global_batch_sequences: 4
  seed: 1.5
  seed: 2
parallel: {offload: optimizer, zero_stage: 0}
"""
    found = problems(write(tmp_path, text), "optim.eps=0", "optm.eps=1")
    places = [line.split(": ")[0] + " " + line.split(": ")[1] for line in found]
    assert places == [
        "recipe.yaml:1 nmae",
        "recipe.yaml:2 model.name_or_path",
        "recipe.yaml:2 model.dtype",
        "recipe.yaml:4 data.train.0.hub",
        "recipe.yaml:5 data.max_length",
        "recipe.yaml:7 optim.learning_rate",
        "recipe.yaml:8 optim.warmup_steps",
        "recipe.yaml:12 train.seed",
        "recipe.yaml:13 train.seed",
        "recipe.yaml:14 parallel.offload",
        "command line optim.eps",
        "command line optm",
    ]


def test_missing_sections_do_not_hide_other_problems(tmp_path):
    found = problems(write(tmp_path, "optim: {learning_rate: 2}\n"))
    assert {line.split(": ")[1] for line in found} == {
        "optim.learning_rate",
        "model",
        "data",
        "train",
    }
    assert any("steps or epochs" in line for line in found)


def test_a_wrong_value_is_not_reported_again_as_a_broken_relation(tmp_path):
    text = MINIMAL.replace("steps: 100", "steps: many")
    assert problems(write(tmp_path, text)) == [
        "recipe.yaml:5: train.steps: expected an integer, got 'many'"
    ]


def test_more_than_ten_problems_are_counted(tmp_path):
    extra = "".join(f"qq{i}: 1\n" for i in range(15))
    with pytest.raises(UserErrors) as caught:
        load_config(write(tmp_path, MINIMAL + extra))
    shown = str(caught.value).splitlines()
    assert len(shown) == 11
    assert shown[-1] == "... and 5 more (15 in all)"


# --- values that YAML makes of what people write


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-3", 1e-3), ("1E-3", 1e-3), ("5e-05", 5e-5), (".01", 0.01), ("1.", 1.0), ("+0.5", 0.5)],
)
def test_numbers_are_numbers(tmp_path, text, value):
    path = write(tmp_path, f"{MINIMAL}optim: {{learning_rate: {text}}}\n")
    assert load_config(path).optim.learning_rate == value
    config = load_config(write(tmp_path, MINIMAL), [f"optim.learning_rate={text}"])
    assert config.optim.learning_rate == value


@pytest.mark.parametrize("text", ["yes", "no", "on", "off", "2024-01-01", "1:30", "0x10", "1_000"])
def test_words_stay_words(tmp_path, text):
    path = write(tmp_path, f"{MINIMAL}track: {{tags: {{a: {text}}}}}\n")
    assert load_config(path).track.tags == {"a": text}


@pytest.mark.parametrize("key", ["on", "no", "null", "1", "y"])
def test_keys_stay_words(tmp_path, key):
    path = write(tmp_path, f"{MINIMAL}retention: {{{key}: {{builtin: python-reference}}}}\n")
    assert list(load_config(path).retention) == [key]


@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf", "1e999", "-1e-3", "0", "1.5"])
def test_learning_rates_that_cannot_be(tmp_path, value):
    (found,) = problems(write(tmp_path, f"{MINIMAL}optim: {{learning_rate: {value}}}\n"))
    assert "recipe.yaml:6: optim.learning_rate: must be" in found


def test_null_takes_the_clipping_away_and_survives_the_dump(tmp_path):
    config = load_config(write(tmp_path, f"{MINIMAL}optim: {{max_grad_norm: null}}\n"))
    assert config.optim.max_grad_norm is None
    again = load_config(write(tmp_path, config.dump_yaml(), "again.yaml"))
    assert again.optim.max_grad_norm is None


def test_only_max_grad_norm_says_something_by_being_null():
    """`dump_yaml` leaves out every other null: their default must be null."""
    meaningful: set[str] = set()
    for key, name in KNOWN_KEYS:
        section = section_at(Config, key)
        assert section is not None
        field = section.model_fields[name]
        if type(None) in get_args(field.annotation) and field.default is not None:
            meaningful.add(name)
    assert meaningful == {"max_grad_norm"}


def test_an_alias_bomb_is_refused_before_it_expands(tmp_path):
    bomb = "a: &a [x, x]\n" + "".join(
        f"b{i}: &b{i} [{', '.join([f'*b{i - 1}' if i else '*a'] * 9)}]\n" for i in range(40)
    )
    (found,) = problems(write(tmp_path, bomb))
    assert found.startswith("recipe.yaml:1: anchors and aliases")


def test_a_python_tag_does_not_run(tmp_path):
    canary = tmp_path / "canary"
    text = f"name: !!python/object/apply:os.system ['touch {canary}']\n"
    (found,) = problems(write(tmp_path, text))
    assert "the tag !!python/object/apply:os.system is not allowed" in found
    (found,) = problems(
        write(tmp_path, MINIMAL), f"name=!!python/object/apply:os.system ['touch {canary}']"
    )
    assert "is not allowed" in found
    assert not canary.exists()


def test_a_deeply_nested_file_is_refused(tmp_path):
    (found,) = problems(write(tmp_path, "a: " + "[" * 5000 + "]" * 5000))
    assert "nested too deeply" in found


@pytest.mark.parametrize("escape", [r'"\0"', r'"a\ud800"'])
def test_characters_that_no_file_holds(tmp_path, escape):
    (found, *_) = problems(write(tmp_path, f"{MINIMAL}track: {{experiment: {escape}}}\n"))
    assert "recipe.yaml:6: track.experiment: holds a character" in found


def test_a_huge_file_is_not_read(tmp_path):
    (found,) = problems(write(tmp_path, "# " + "x" * (2 << 20)))
    assert "larger than 1 MiB" in found


# --- paths


def test_paths_of_the_file_are_relative_to_it_and_overrides_to_the_shell(tmp_path, monkeypatch):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "here" / "base").mkdir(parents=True)
    text = MINIMAL + (
        "output: {dir: out}\n"
        "retention: {a: {path: ../text.txt}, b: {path: ~/text.txt}, c: {path: /abs/text.txt}}\n"
    )
    path = write(tmp_path / "recipes", text.replace("some/model", "./base"))
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", "/home/someone")
    config = load_config(path)
    assert config.model.name_or_path == str(tmp_path / "recipes" / "base")
    assert config.output.dir == tmp_path / "recipes" / "out"
    assert [corpus.path for corpus in config.retention.values()] == [
        str(tmp_path / "text.txt"),
        "/home/someone/text.txt",
        "/abs/text.txt",
    ]
    config = load_config(
        path,
        ["data.train=[{path: x.jsonl}]", "output.dir=o", "model.name_or_path=base"],
    )
    assert config.data.train[0].path == str(tmp_path / "here" / "x.jsonl")
    assert config.output.dir == tmp_path / "here" / "o"
    assert config.model.name_or_path == str(tmp_path / "here" / "base")


def test_a_hub_name_stays_a_hub_name_unless_there_is_such_a_folder(tmp_path):
    path = write(tmp_path, MINIMAL)
    assert load_config(path).model.name_or_path == "some/model"
    (tmp_path / "some" / "model").mkdir(parents=True)
    assert load_config(path).model.name_or_path == str(tmp_path / "some" / "model")


@pytest.mark.parametrize(
    ("file", "name"),
    [("a b.yaml", "a-b"), ("-x.yaml", "x"), ("ö.yaml", "run"), ("v1.2.yml", "v1.2")],
)
def test_the_name_comes_from_the_file(tmp_path, file, name):
    assert load_config(write(tmp_path, MINIMAL, file)).name == name


# --- overrides


def test_overrides_of_scalars_lists_and_mappings(tmp_path):
    path = write(tmp_path, MINIMAL.replace("train.jsonl", "a.jsonl\n    - path: b.jsonl"))
    config = load_config(
        path,
        [
            "optim.learning_rate=1e-4",
            "data.train.1.weight=2",
            "retention={wiki: {hub: wikitext}}",
            "retention.mine.builtin=python-reference",
            "compare=[{kind: none}, {kind: tmkl}]",
            "track.tags.note=a=b",
            "name=other",
        ],
    )
    assert config.optim.learning_rate == 1e-4
    assert [source.weight for source in config.data.train] == [1.0, 2.0]
    assert list(config.retention) == ["wiki", "mine"]
    assert [arm.kind for arm in config.compare] == ["none", "tmkl"]
    assert config.track.tags == {"note": "a=b"}
    assert config.name == "other"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optim.learning_rat=1", "optim.learning_rat: unknown key; did you mean learning_rate?"),
        ("nonsense", "'nonsense' is not an override: write key=value"),
        ("=1", "an override is key=value with a dotted key"),
        ("optim..eps=1", "an override is key=value with a dotted key"),
        ("optim.eps=[", "optim.eps: not valid YAML"),
        ("optim.eps=*x", "optim.eps: anchors and aliases"),
        ("optim.betas={a: 1, a: 2}", "given twice"),
        ("data.train.1.weight=2", "data.train has 1 entries, so data.train.1 does not exist"),
        ("data.train.first.weight=2", "data.train is a list: 'first' is not an index"),
        ("data.train.-1.weight=2", "data.train is a list: '-1' is not an index"),
        ("train.steps.x=2", "train.steps is 100, so it has no key 'x'"),
        ("train.steps=10.0", "train.steps: expected an integer, got 10.0: write 10"),
        ("data.packing=yes", "data.packing: expected true or false, got 'yes': write true"),
        ("model.revision=0123", "model.revision: expected text, got 123: put it in quotes"),
        ("optim=5", "optim: expected a mapping (key: value), got 5"),
    ],
)
def test_overrides_that_are_wrong(tmp_path, override, words):
    found = problems(write(tmp_path, MINIMAL), override)
    assert any(line.startswith("command line: ") and words in line for line in found), found
    assert len(found) == 1


def test_the_same_key_twice_on_the_command_line(tmp_path):
    (found,) = problems(write(tmp_path, MINIMAL), "train.steps=5", "train.steps=6")
    assert "train.steps: given twice" in found


def test_an_override_takes_the_place_of_its_alternative(tmp_path):
    path = write(tmp_path, MINIMAL)
    config = load_config(path, ["train.epochs=2", "train.global_batch_tokens=4096"])
    assert (config.train.steps, config.train.epochs) == (None, 2.0)
    assert config.train.global_batch_sequences is None
    config = load_config(path, ["data.train.0.hub=some/data"])
    assert (config.data.train[0].path, config.data.train[0].hub) == (None, "some/data")
    (found,) = problems(path, "train.epochs=2", "train.steps=5")
    assert "steps and epochs exclude each other" in found


def test_an_override_that_switches_off_takes_the_options_of_the_file_along(tmp_path):
    text = MINIMAL + "regularizer: {kind: tmkl, weight: 0.5, direction: jsd}\n"
    path = write(tmp_path, text)
    config = load_config(path, ["regularizer.kind=none"])
    assert config.regularizer == Regularizer(kind="none")
    assert config.regularizer.kl_weight == 0.0
    (found,) = problems(path, "regularizer.kind=none", "regularizer.weight=2")
    assert "command line: regularizer.weight: would be ignored, since kind is none" in found


# --- compare


def test_arms_take_what_they_leave_out_from_the_regularizer(tmp_path):
    text = MINIMAL + (
        "regularizer: {kind: kl, weight: 0.5, temperature: 2}\n"
        "compare: [{kind: none}, {weight: 3}, {kind: tmkl}, {kind: tmkl, temperature: 1.0}]\n"
    )
    config = load_config(write(tmp_path, text))
    assert config.compare == [
        Regularizer(kind="none"),
        Regularizer(kind="kl", weight=3.0, temperature=2.0),
        Regularizer(kind="tmkl", weight=0.5, temperature=2.0),
        Regularizer(kind="tmkl", weight=0.5, temperature=1.0),
    ]
    assert load_config(write(tmp_path, MINIMAL), ["regularizer.weight=7"]).compare[1].weight == 7


def test_every_arm_of_a_comparison_has_every_seed(tmp_path):
    config = load_config(write(tmp_path, MINIMAL), ["compare_seeds=[3, 5]"])
    arms = config.arms()
    kinds = ("none", "kl", "tmkl")
    assert list(arms) == [f"{kind}-seed{seed}" for kind in kinds for seed in (3, 5)]
    assert (arms["kl-seed5"].regularizer.kind, arms["kl-seed5"].train.seed) == ("kl", 5)
    assert arms["kl-seed3"].setting() == arms["kl-seed5"].setting() != arms["tmkl-seed5"].setting()
    assert arms["kl-seed3"].fingerprint() != arms["kl-seed5"].fingerprint()
    alone = load_config(write(tmp_path, MINIMAL))
    assert list(alone.arms()) == list(kinds)
    assert alone.fingerprint() == config.fingerprint()
    assert (
        "compare_seeds: holds a seed twice"
        in problems(write(tmp_path, MINIMAL), "compare_seeds=[1,1]")[0]
    )


@pytest.mark.parametrize(
    ("override", "is_same"),
    [
        ("train.seed=9", True),
        ("parallel.zero_stage=1", True),
        ("evaluation.micro_batch_size=3", True),
        ("retention={x: {builtin: python-reference}}", True),
        ("name=other", True),
        ("optim.learning_rate=0.5", False),
        ("regularizer.every=2", False),
        ("adapter.r=4", False),
        ("train.steps=7", False),
    ],
)
def test_a_setting_is_a_recipe_but_for_its_seed(tmp_path, override, is_same):
    path = write(tmp_path, MINIMAL)
    assert (load_config(path, [override]).setting() == load_config(path).setting()) == is_same


def test_arm_names_say_what_varies():
    def names(*arms: dict[str, Any]) -> list[str]:
        return arm_names([Regularizer.model_validate(arm) for arm in arms])

    assert names({"kind": "none"}, {"kind": "kl"}, {"kind": "tmkl"}) == ["none", "kl", "tmkl"]
    assert names({"kind": "kl"}, {"kind": "tmkl", "weight": 2.0}) == ["kl", "tmkl"]
    assert names({"weight": 0.5}, {"weight": 2.0}, {"kind": "kl"}) == [
        "tmkl-weight0.5",
        "tmkl-weight2",
        "kl",
    ]
    assert names({"direction": "jsd"}, {"direction": "reverse", "every": 4}) == [
        "tmkl-jsd-every1",
        "tmkl-reverse-every4",
    ]


@given(
    st.lists(
        st.builds(
            Regularizer,
            kind=st.sampled_from(["kl", "tmkl"]),
            weight=st.floats(1e-6, 1e6),
            direction=st.sampled_from(["forward", "reverse", "jsd"]),
            temperature=st.sampled_from([0.5, 1.0, 2.0]),
            every=st.integers(1, 9),
        ),
        max_size=5,
        unique_by=lambda arm: str(arm),
    )
)
@settings(deadline=None)
def test_arm_names_are_unique_folder_names(arms):
    names = arm_names(arms)
    assert len(set(names)) == len(arms)
    assert all(Path(name).name == name and not name.startswith((".", "-")) for name in names)


# --- the resolved copy

# Text that YAML would take for something else, and text that is hard to quote.
WORDS = ["1e-3", "yes", "no", "null", "~", "on", "0123", "1_0", "2024-01-01", "true", ".inf", "<<"]
SIGNS = ["a: b", "# x", "- x", "*x", "&x", "!!x", "{a}", "[a]", "'", '"', "=", "%", "@", "`", "|"]
SPACE = ["a\nb", "a\tb", " a ", "\\", "ünï 🐢", "\u2028", "\x85", "\ufeff", "x" * 300]
AWKWARD = st.one_of(
    st.sampled_from(WORDS + SIGNS + SPACE),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1),
)


def floats(low: float, high: float, **options: Any) -> st.SearchStrategy[float]:
    return st.floats(low, high, allow_nan=False, **options)


@st.composite
def any_recipe(draw: st.DrawFn) -> dict[str, Any]:
    kind = draw(st.sampled_from(["none", "kl", "tmkl"]))
    regularizer: dict[str, Any] = {"kind": kind}
    if kind != "none":
        regularizer["weight"] = draw(floats(1e-9, 1e9))
        regularizer["direction"] = draw(st.sampled_from(["forward", "reverse", "jsd"]))
    hub: dict[str, Any] = {"hub": draw(AWKWARD), "split": draw(AWKWARD), "format": "messages"}
    hub["fields"] = {"messages": draw(AWKWARD)}
    optim: dict[str, Any] = {
        "learning_rate": draw(floats(0, 1, exclude_min=True)),
        "betas": [draw(floats(0, 0.999)), draw(floats(0, 0.999))],
        "max_grad_norm": draw(st.none() | floats(1e-3, 1e3)),
    }
    length = {"steps": draw(st.integers(1, 10**9))}
    if draw(st.booleans()):
        length = {"epochs": draw(floats(1e-3, 1e3))}
    return {
        "model": {"name_or_path": draw(AWKWARD), "revision": draw(st.none() | AWKWARD)},
        "adapter": {"target_modules": draw(st.lists(AWKWARD, min_size=1, max_size=3))},
        "data": {"train": [hub], "packing": draw(st.booleans())},
        "regularizer": regularizer,
        "retention": {"wiki": {"path": draw(AWKWARD)}},
        "optim": optim,
        "train": {**length, "global_batch_sequences": draw(st.integers(1, 10**6))},
        "track": {"experiment": draw(AWKWARD), "tags": draw(st.dictionaries(AWKWARD, AWKWARD))},
    }


@given(any_recipe())
@settings(max_examples=60, deadline=None)
def test_the_resolved_copy_loads_as_an_equal_config(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("round")
    config = load_config(write(folder, dump(data)))
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    again = load_config(write(elsewhere, config.dump_yaml(), "config.yaml"))
    assert again == config
    assert again.fingerprint() == config.fingerprint()
    assert again.dump_yaml() == config.dump_yaml()
    assert config.track.experiment == data["track"]["experiment"]
    assert config.track.tags == data["track"]["tags"]


# What older versions had, its default, another value, and what is said of that.
GONE = [
    ("adapter.use_dora", "false", "true", "set adapter.method to dora"),
    ("optim.min_lr_ratio", "0", "0.1", "or set optim.schedule to constant"),
    ("regularizer.budget.min_weight", "1.0e-3", "0.01", "the least weight is 0.001: remove it"),
    ("compare.0.budget.min_weight", "0.001", "0", "the least weight is 0.001: remove it"),
    ("parallel.quantization_statistics", "whole", "slice", "so that the base is one: remove it"),
    ("parallel.replica_check_every", "50", "10", "compared every 50 steps: remove it"),
    ("train.max_nonfinite_updates", "5", "1", "five refused updates in a row end the run: remove"),
    ("evaluation.num_examples", "8", "0", "8 worst of each text: remove it"),
]


@pytest.mark.parametrize(("key", "default", "other", "instead"), GONE)
def test_an_option_that_is_gone(tmp_path, key, default, other, instead):
    recipe = f"{MINIMAL}regularizer: {{budget: {{retention_increase_pct: 1.0}}}}\n"
    recipe += "compare:\n  - {kind: kl, budget: {retention_increase_pct: 2.0}}\n"
    config = load_config(write(tmp_path, recipe))
    section, _, name = key.rpartition(".")
    assert load_config(tmp_path / "recipe.yaml", [f"{key}={default}"]) == config
    nested = yaml.safe_load(recipe)
    at = nested
    for part in section.split("."):
        at = at[int(part)] if isinstance(at, list) else at.setdefault(part, {})
    at[name] = yaml.safe_load(default)
    copy = write(tmp_path, yaml.safe_dump(nested), "config.yaml")
    assert load_config(copy, ["name=recipe"]) == config  # as older run directories have it
    at[name] = yaml.safe_load(other)
    [problem] = problems(write(tmp_path, yaml.safe_dump(nested)))
    assert re.fullmatch(
        rf"recipe\.yaml:\d+: {re.escape(key)}: is no option any more: .*{instead}.*", problem
    )


def test_every_option_that_is_gone_is_tried():
    tried = {re.sub(r"\.\d+\.", ".*.", key) for key, *_ in GONE}
    assert tried == {".".join(map(str, place)) for place in validation.REMOVED}


def test_the_full_recipe_comes_back_from_its_copy(tmp_path, tmp_path_factory):
    config = load_config(FULL_PATH(tmp_path_factory))
    again = load_config(write(tmp_path, config.dump_yaml(), "config.yaml"))
    assert again == config
    assert config.flat()["optim.betas"] == "[0.9, 0.95]"
    assert config.flat()["data.train.1.fields.prompt"] == "question"
    assert not {"data.train.0.fields", "data.train.0.ignore"} & config.flat().keys()  # empty


@pytest.mark.parametrize(
    ("override", "same"),
    [
        ("optim.learning_rate=1e-4", False),
        ("regularizer.weight=2", False),
        ("train.seed=1", False),
        ("data.train.0.limit=3", False),
        ("model.revision=abc", False),
        ("name=other", True),
        ("output.dir=elsewhere", True),
        ("track.mlflow=false", True),
        ("train.save_every=7", True),
        ("train.log_every=7", True),
        ("compare=[{kind: tmkl}]", True),
    ],
)
def test_the_fingerprint_is_of_what_determines_the_numbers(tmp_path, override, same):
    path = write(tmp_path, MINIMAL)
    one, two = load_config(path), load_config(path, [override])
    assert (one.fingerprint() == two.fingerprint()) is same
    changed = one.changed_keys(two)
    assert changed == ([] if same else [override.partition("=")[0]])


def test_spelling_a_default_out_changes_no_fingerprint(tmp_path):
    text = MINIMAL + "regularizer: {kind: tmkl, weight: 1}\noptim: {learning_rate: 0.0002}\n"
    one, two = load_config(write(tmp_path, MINIMAL)), load_config(write(tmp_path, text, "b.yaml"))
    assert one.fingerprint() == two.fingerprint()


def test_reading_a_recipe_loads_no_torch(tmp_path):
    path = write(tmp_path, MINIMAL)
    code = (
        "import sys; from moored.config import load_config; "
        f"load_config({str(path)!r}); "
        "heavy = {'torch', 'transformers', 'mlflow', 'deepspeed', 'numpy'} & set(sys.modules); "
        "sys.exit(str(heavy) if heavy else 0)"
    )
    source = Path(validation.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(source), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


# --- whatever stands in a recipe, the answer is a config or a list of problems

ANYTHING = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-3, 3),
        st.floats(),
        st.sampled_from(["", "none", "tmkl", "yes", "1", "a/b", "[key]", "0", "{message}", "%s"]),
    ),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["path", "hub", "kind", "weight", "train", "a b", "[key]", "", "0"]),
            inner,
            max_size=3,
        )
    ),
    max_leaves=6,
)


@given(
    st.lists(st.tuples(st.sampled_from(KNOWN_KEYS), ANYTHING), min_size=1, max_size=4),
    st.lists(
        st.tuples(st.sampled_from(KNOWN_KEYS), ANYTHING).map(
            lambda case: (".".join(str(p) for p in (*case[0][0], case[0][1])), case[1])
        ),
        max_size=2,
    ),
)
@settings(max_examples=300, deadline=None)
def test_no_value_anywhere_crashes_the_loader(tmp_path_factory, values, overrides):
    data = read_recipe(FULL_PATH(tmp_path_factory)).data
    for (key, name), value in values:
        at: Any = data
        try:
            for part in key:
                at = at[part]
            at[name] = value
        except (KeyError, IndexError, TypeError):
            continue  # an earlier value took this section away
    path = tmp_path_factory.getbasetemp() / "anything.yaml"
    path.write_text(dump(data), encoding="utf-8")
    try:
        config = load_config(path, [f"{key}={json.dumps(value)}" for key, value in overrides])
    except UserErrors as error:
        wrong = error.problems
        assert wrong
        assert [p for p in wrong if "\n" in p or not p.startswith((f"{path}:", "command l"))] == []
    else:
        again = write(tmp_path_factory.mktemp("again"), config.dump_yaml())
        assert load_config(again) == config


@given(st.text(max_size=60) | st.binary(max_size=60).map(lambda raw: raw.decode("latin-1")))
@settings(max_examples=300, deadline=None)
def test_no_text_crashes_the_reader(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "text.yaml"
    path.write_bytes(text.encode("utf-8", errors="surrogatepass"))
    with pytest.raises(UserError):
        load_config(path)
    good = write(tmp_path_factory.mktemp("good"), MINIMAL)
    with contextlib.suppress(UserError):  # it may be valid; nothing else may be raised
        load_config(good, [f"name={text}", f"{text}=1"])


def test_the_reference_of_recipes_is_what_the_schema_says():
    page = Path(__file__).parents[3] / "docs" / "recipe.md"
    assert page.read_text(encoding="utf-8") == reference(), (
        "run python -m moored.config.recipe_docs > docs/recipe.md"
    )


def test_the_reference_shows_the_defaults_that_are_made():
    page = reference()
    assert "| `{builtin: python-reference, max_tokens: 2048}` |" in page
    assert "default: `[{kind: none}, {kind: kl}, {kind: tmkl}]`" in page
    assert "| `eval` | sections, see below | empty |" in page


def test_an_override_must_not_take_an_earlier_one_along(tmp_path):
    recipe = write(tmp_path, MINIMAL)
    with pytest.raises(UserError, match=r"optim: replaces optim\.learning_rate=1e-3"):
        load_config(recipe, ["optim.learning_rate=1e-3", "optim={eps: 1e-8}"])
    both = load_config(recipe, ["optim={eps: 1e-6}", "optim.learning_rate=1e-3"])
    assert (both.optim.eps, both.optim.learning_rate) == (1e-6, 1e-3)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("optim.lr=1e-3", "did you mean learning_rate?"),
        ("adapter.lora_alpha=8", "did you mean alpha?"),
        ("train.lr=1e-3", "did you mean optim.learning_rate?"),
        ("data.train=a.jsonl", "write [{path: a.jsonl}]"),
    ],
)
def test_what_other_trainers_call_it(tmp_path, override, says):
    assert says in "\n".join(problems(write(tmp_path, MINIMAL), override))


def test_a_known_text_has_its_own_place_on_the_hub(tmp_path):
    corpus = "{builtin: wikitext-103, revision: abc, subset: x, split: y}"
    found = problems(write(tmp_path, f"{MINIMAL}retention: {{wiki: {corpus}}}\n"))
    assert len(found) == 2
    for option, line in zip(("split", "subset"), sorted(found), strict=True):
        assert f"retention.wiki.{option}: would be ignored, since builtin wikitext-103" in line


def test_the_resolved_copy_of_a_known_text_says_how_it_is_measured(tmp_path):
    config = load_config(write(tmp_path, f"{MINIMAL}retention: {{last: {{builtin: lambada}}}}\n"))
    assert config.resolved()["retention"]["last"] == {
        "builtin": "lambada",
        "max_tokens": 100_000,
        "window_tokens": 512,
        "target": "last_word",
    }


def test_an_arm_without_what_it_would_inherit_stays_without_it(tmp_path):
    text = (
        MINIMAL
        + """
regularizer: {kind: tmkl, first_tokens: 4, budget: {retention_increase_pct: 1}}
compare:
  - {kind: tmkl, budget: null, first_tokens: null, schedule: linear, end_ratio: 0.5}
  - {kind: tmkl}
  - {kind: none}
"""
    )
    config = load_config(write(tmp_path, text))
    assert [arm.budget is None for arm in config.compare] == [True, False, True]
    again = load_config(write(tmp_path, config.dump_yaml(), "again.yaml"))
    assert again.compare == config.compare
    assert again.regularizer == config.regularizer


def test_arms_of_one_kind_are_named_by_all_that_tells_them_apart(tmp_path):
    text = (
        MINIMAL
        + """
compare:
  - {kind: tmkl, weight: 0.5}
  - {kind: tmkl, weight: 0.5, token_fraction: 0.25}
  - {kind: tmkl, weight: 0.5, token_weighting: entropy, first_tokens: 4}
  - {kind: tmkl, weight: 0.5, budget: {retention_increase_pct: 1.5}}
  - {kind: replay, replay: [{path: a.jsonl}]}
  - {kind: replay, replay: [{path: b.jsonl}]}
  - {kind: eaft}
"""
    )
    config = load_config(write(tmp_path, text))
    names = arm_names(config.compare)
    assert len(config.arms()) == len(set(names)) == len(names)
    assert names[:4] == [
        "tmkl",
        "tmkl-tokenfraction0.25",
        "tmkl-tokenweightingentropy-firsttokens4",
        "tmkl-budget1.5",
    ]
    assert names[4:] == ["replay-replay0", "replay-replay1", "eaft"]
    # What a name does not say is counted.
    text = (
        MINIMAL
        + """
compare:
  - {budget: {retention_increase_pct: 3, probe: {path: a.txt}}}
  - {budget: {retention_increase_pct: 3, probe: {path: b.txt}}}
  - {budget: {drift_nats_per_token: 3}}
  - {weight: 0.12345671}
  - {weight: 0.12345672}
"""
    )
    config = load_config(write(tmp_path, text, "same.yaml"))
    names = arm_names(config.compare)
    assert len(config.arms()) == len(set(names)) == 5
    assert {"tmkl-weight1-budget3-1", "tmkl-weight1-budget3-3"} <= set(names)
    assert all(Path(name).name == name for name in names)


@pytest.mark.parametrize(
    ("suite", "says"),
    [
        (
            "arc_challenge",
            "'arc_challenge' is no suite: write general, or .* such as \\[arc_challenge",
        ),
        ([], "expected general, or a list of tasks"),
        (["gsm8k", ""], "expected general, or a list of tasks"),
        (["gsm8k", "gsm8k"], "holds gsm8k twice"),
        (3, "expected general, or a list of tasks"),
    ],
)
def test_a_suite_is_general_or_a_list_of_tasks(tmp_path, suite, says):
    path = write(tmp_path, MINIMAL)
    (problem,) = problems(path, f"evaluation.suite={json.dumps(suite)}")
    assert re.search(f"evaluation.suite.*{says}", problem), problem


def test_options_of_a_suite_that_is_not_asked_are_refused(tmp_path):
    path = write(tmp_path, MINIMAL)
    assert (
        load_config(path).fingerprint()
        == load_config(path, ["evaluation.suite=null"]).fingerprint()
    )
    general = load_config(path, ["evaluation.suite=general", "evaluation.suite_limit=50"])
    assert general.evaluation.suite_tasks[0] == "arc_challenge"
    assert load_config(path).evaluation.suite_tasks == ()
    (problem,) = problems(path, "evaluation.suite_limit=50")
    assert "suite is null" in problem
