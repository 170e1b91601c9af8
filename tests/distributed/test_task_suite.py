"""The suite of general tasks: local ones of the harness, against dense fp64 arithmetic."""

from __future__ import annotations

import contextlib
import json
import math
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from peft import PeftModel

from distributed.runner import run_distributed
from moored.config import load_config
from moored.config.running import GENERAL_TASKS
from moored.evaluation import evaluate_command
from moored.evaluation.task_suite import (
    PREFERRED_FILTER,
    PREFERRED_METRIC,
    TaskSuite,
    open_task_suite,
)
from moored.models.base_files import resolve_base
from moored.prepare.items import find_everything
from moored.tracking.journal import metrics
from moored.training import compare, train
from moored.utils.errors import UserError
from tiny import ALONE, CHATML, tiny_recipe, tiny_tokenizer, write_recipe

CHOICES = ["fox", "lazy dog", "one two three"]
WORDS = ["jumps", "over", "two four", "dog", "user", "the the", "one", "lazy", "brown", "quick"]
NAMES = ["local_choice", "local_halves", "local_writing"]


def documents(count: int = 10, start: int = 0) -> list[dict[str, Any]]:
    return [
        {"text": f"the quick {WORDS[i]} fox {i}", "label": (i + start) % 3, "answer": WORDS[i][0]}
        for i in range(count)
    ]


def write_tasks(folder: Path) -> Path:
    """A task with choices (whose lengths differ), a group of two, and one that is written."""
    folder.mkdir()
    choice = {
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": CHOICES,
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    plain = choice | {"metric_list": [{"metric": "acc"}], "num_fewshot": 1}
    writing = {
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{answer}}",
        "description": "Write one letter.",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6},
        "filter_list": [
            {"name": "whole", "filter": [{"function": "take_first"}]},
            {
                "name": "flexible-extract",
                "filter": [
                    {"function": "regex", "regex_pattern": "([a-z])"},
                    {"function": "take_first"},
                ],
            },
        ],
        "metric_list": [{"metric": "exact_match"}],
    }
    for name, task, docs in (
        ("local_choice", choice, documents()),
        ("local_half_one", plain, documents(6)),
        ("local_half_two", plain, documents(4, start=1)),
        ("local_writing", writing, documents()),
    ):
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(doc) + "\n" for doc in docs))
        source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(path)}}}
        settings = {"task": name, "test_split": "test"} | source | task
        (folder / f"{name}.yaml").write_text(json.dumps(settings))  # JSON is YAML
    group = {"group": "local_halves", "task": ["local_half_one", "local_half_two"]}
    (folder / "halves.yaml").write_text(json.dumps(group))
    return folder


def recipe_of(folder: Path, **changes: Any) -> dict[str, Any]:
    recipe = tiny_recipe(folder, tie_word_embeddings=False, initializer_range=0.2)
    recipe["model"]["quantization"] = "none"
    recipe["adapter"] = {"r": 16, "alpha": 64.0}
    recipe["regularizer"] = {"kind": "none"}
    recipe["train"]["steps"] = 12
    recipe["evaluation"] = {
        "before": False,
        "suite": NAMES,
        "suite_include": str(folder / "tasks"),
        "suite_limit": 8,
    }
    if not (folder / "tasks").exists():
        write_tasks(folder / "tasks")
    for key, value in changes.items():
        section, _, option = key.partition("__")
        recipe[section] = recipe.get(section, {}) | {option: value}
    return recipe


# ---------------------------------------------------------------- written plainly


def dense(folder: Path, run: Path | None = None) -> torch.nn.Module:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model")
    return (
        model if run is None else PeftModel.from_pretrained(model, str(run / "adapter"))
    ).double()


def turn(role: str, text: str) -> str:
    return f"<|im_start|>{role}\n{text}<|im_end|>\n"


def likelihood(model: torch.nn.Module, context: str, continuation: str) -> float:
    tokenizer = tiny_tokenizer()
    before, whole = tokenizer.encode(context.rstrip()), tokenizer.encode(context + continuation)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([whole]), use_cache=False).logits[0]
    logs = torch.log_softmax(logits.double(), dim=-1)
    return sum(float(logs[i - 1, whole[i]]) for i in range(len(before), len(whole)))


def written(model: torch.nn.Module, context: str, limit: int) -> str:
    tokenizer = tiny_tokenizer()
    ids = tokenizer.encode(context)
    start = len(ids)
    for _ in range(limit):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
        ids.append(int(logits.argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids[start:], skip_special_tokens=True).split("\n")[0]


def spread(count: int, limit: int) -> list[int]:
    return (
        [int((i + 0.5) * count / limit) for i in range(limit)] if count > limit else [*range(count)]
    )


def expected_scores(model: torch.nn.Module) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {name: [] for name in NAMES}
    ask = "<|im_start|>assistant\n"
    lengths = np.array([len(choice) for choice in CHOICES])
    for i in spread(10, 8):
        doc = documents()[i]
        context = turn("user", doc["text"]) + ask
        each = np.array([likelihood(model, context, choice) for choice in CHOICES])
        found["local_choice"].append(float((each / lengths).argmax() == doc["label"]))
        context = turn("system", "Write one letter.") + turn("user", doc["text"]) + ask
        letters = [c for c in written(model, context, 6) if c.isascii() and c.islower()]
        found["local_writing"].append(float(bool(letters) and letters[0] == doc["answer"]))
    return found


# ---------------------------------------------------------------- runs


def run_it(rank: int, world_size: int, path: Path, overrides: tuple[str, ...] = ()) -> None:
    torch.distributed.destroy_process_group()  # a run makes and leaves its own
    train.run(load_config(path, list(overrides)))


def measure_it(rank: int, world_size: int, run: Path, out: Path, overrides: list[str]) -> None:
    torch.distributed.destroy_process_group()
    evaluate_command.run_command([str(run)], overrides=overrides, out=out)


def compare_it(rank: int, world_size: int, path: Path) -> list[bool]:
    """Whom the suite was asked of, in turn: whether the base."""
    torch.distributed.destroy_process_group()
    asked: list[bool] = []
    ask = TaskSuite.ask

    def counted(self: TaskSuite, *args: Any, base: bool, **options: Any) -> Any:
        asked.append(base)
        return ask(self, *args, base=base, **options)

    TaskSuite.ask = counted
    try:
        compare.run(load_config(path))
    finally:
        TaskSuite.ask = ask
    return asked


def report_in(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text())


def test_scores_are_those_of_dense_arithmetic_in_the_chat_template(tmp_path):
    path = write_recipe(tmp_path, recipe_of(tmp_path))
    run_distributed(run_it, 1, path)
    run = tmp_path / "runs/tiny"
    report = report_in(run / "report")
    arm = report["arms"]["none"]
    for found, model in ((report["base"], dense(tmp_path)), (arm, dense(tmp_path, run))):
        expected = expected_scores(model)
        assert list(found["suite"]) == NAMES
        for name in ("local_choice", "local_writing"):
            assert found["suite"][name]["scores"] == expected[name], name
        assert len(found["suite"]["local_halves"]["scores"]) == 8
    assert report["base"]["suite"] != arm["suite"], "not a test"
    kinds = {name: (task["metric"], task["chance"]) for name, task in arm["suite"].items()}
    assert kinds == {
        "local_choice": ("acc_norm", pytest.approx(1 / 3)),
        "local_halves": ("acc", pytest.approx(1 / 3)),
        "local_writing": ("exact_match (flexible-extract)", 0.0),
    }
    assert_mean(report)
    told = report["settings"]["general tasks"]
    assert "as chats" in told
    assert "local_halves (8 of 10 questions, 1-shot)" in told
    page = (run / "report/report.html").read_text()
    assert "General tasks" in page
    assert "local_writing" in page
    curves = metrics(run)
    assert curves["eval/suite_mean_fraction"][-1][1] == pytest.approx(arm["suite_mean"])
    assert curves["eval/suite_change_fraction"][-1][1] == pytest.approx(arm["suite_change"])


def assert_mean(report: dict[str, Any]) -> None:
    """The mean above a guess, its interval, and the paired change, in the plainest way."""
    base, arm = report["base"], report["arms"]["none"]

    def above(task: dict[str, Any]) -> float:
        return (np.mean(task["scores"]) - task["chance"]) / (1 - task["chance"])

    for found in (base, arm):
        tasks = list(found["suite"].values())
        errors = [
            np.std(t["scores"], ddof=1) / math.sqrt(len(t["scores"])) / (1 - t["chance"])
            for t in tasks
        ]
        mean, error = np.mean([above(t) for t in tasks]), np.linalg.norm(errors) / len(tasks)
        assert found["suite_mean"] == pytest.approx(mean)
        ends = mean - 1.959964 * error, mean + 1.959964 * error
        assert found["suite_mean_interval"] == pytest.approx(ends)
    errors = []
    for name, task in arm["suite"].items():
        gained = np.array(task["scores"]) - np.array(base["suite"][name]["scores"])
        gained = np.array([*gained, *[np.sqrt(0.5), -np.sqrt(0.5)]])  # half a question each way
        errors.append(np.sqrt(gained.var() / len(gained)) / (1 - task["chance"]))
    change, error = arm["suite_mean"] - base["suite_mean"], np.linalg.norm(errors) / len(errors)
    assert arm["suite_change"] == pytest.approx(change)
    ends = change - 1.959964 * error, change + 1.959964 * error
    assert arm["suite_change_interval"] == pytest.approx(ends)


@pytest.mark.parametrize(
    "overrides",
    [
        ["parallel.zero_stage=3"],
        pytest.param(["parallel.tensor_parallel_degree=2"], marks=pytest.mark.long),
    ],
    ids=["zero-3", "tensor-parallel"],
)
def test_two_ranks_score_as_one(tmp_path, overrides):
    path = write_recipe(tmp_path, recipe_of(tmp_path, train__steps=4))
    run_distributed(run_it, 1, path)
    run = tmp_path / "runs/tiny"
    run_distributed(measure_it, 2, run, tmp_path / "two", overrides)
    one, two = report_in(run / "report"), report_in(tmp_path / "two")
    assert two["base"]["suite"] == one["base"]["suite"]
    assert two["arms"]["none"]["suite"] == one["arms"]["none"]["suite"]


def test_arms_of_a_comparison_ask_the_base_once(tmp_path):
    recipe = recipe_of(tmp_path, train__steps=2, evaluation__before=True)
    recipe["compare"] = [{"kind": "none"}, {"kind": "tmkl"}]
    assert run_distributed(compare_it, 1, write_recipe(tmp_path, recipe)) == [[True, False, False]]
    folder = tmp_path / "runs/tiny"
    report = report_in(folder / "report")
    assert {len(arm["suite"]) for arm in report["arms"].values()} == {3}
    assert report["base"]["suite"] == report_in(folder / "arms/tmkl/report")["base"]["suite"]
    for arm in report["arms"]:  # of the base at step 0, then of the arm
        curve = metrics(folder / "arms" / arm)["eval/suite_mean_fraction"]
        assert [step for step, _ in curve] == [0, 2]
        assert curve[0][1] == pytest.approx(report["base"]["suite_mean"])


def test_what_the_suite_needs_is_listed_and_found_without_a_network(tmp_path, monkeypatch):
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("no network")

    config = load_config(write_recipe(tmp_path, recipe_of(tmp_path)))
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    items = {item.what: item for item in find_everything(config)}
    halves = items["evaluation.suite.local_halves"]
    assert halves.note == "8 of 10 questions"
    assert halves.identity.startswith("sha256:")
    assert halves.where == ", ".join(
        str(tmp_path / "tasks" / f"local_half_{name}.jsonl") for name in ("one", "two")
    )
    other = tmp_path / "tasks/local_half_two.jsonl"
    other.write_text(other.read_text().replace("jumps", "walks"))
    again = {item.what: item for item in find_everything(config)}
    assert again["evaluation.suite.local_halves"].identity != halves.identity
    same = "evaluation.suite.local_choice"
    assert again[same].identity == items[same].identity


def test_questions_are_spread_over_all_parts_of_a_group(tmp_path):
    config = load_config(write_recipe(tmp_path, recipe_of(tmp_path)), ["evaluation.suite_limit=5"])
    suite = open_task_suite(config, resolve_base(config.model, ALONE), ALONE)
    assert suite is not None
    asked = {task.name: task.questions for task in suite.tasks}
    assert asked["local_choice"] == {"local_choice": [1, 3, 5, 7, 9]}
    assert asked["local_halves"] == {"local_half_one": [1, 3, 5], "local_half_two": [1, 3]}


def test_the_general_tasks_are_the_harness_s_and_judged_as_documented():
    """Their data are not opened: only what the harness's own files say of them."""
    manager = TaskManager()
    page = (Path(__file__).parents[2] / "docs/evaluation.md").read_text()
    for name in GENERAL_TASKS:
        assert name in manager.all_tasks, name
        assert f"| `{name}` |" in page
    index = manager.task_index
    found = {}
    for name in GENERAL_TASKS:
        leaf = "mmlu_anatomy" if name == "mmlu" else name
        settings = load_yaml(index[leaf].yaml_path, resolve_func=False)
        metrics = [item["metric"] for item in settings["metric_list"]]
        filters = [item["name"] for item in settings.get("filter_list") or ()]
        found[name] = (
            PREFERRED_METRIC if PREFERRED_METRIC in metrics else metrics[0],
            (PREFERRED_FILTER if PREFERRED_FILTER in filters else ""),
        )
    assert found == {
        "arc_challenge": ("acc_norm", ""),
        "hellaswag": ("acc_norm", ""),
        "mmlu": ("acc", ""),
        "truthfulqa_mc1": ("acc", ""),
        "gsm8k": ("exact_match", "flexible-extract"),
    }


ALTERNATING = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}" + CHATML
)


def test_a_template_without_a_system_turn_is_given_its_text_with_the_question(tmp_path):
    (tmp_path / "no-system.jinja").write_text(ALTERNATING)
    recipe = recipe_of(tmp_path, data__chat_template=str(tmp_path / "no-system.jinja"))
    recipe["evaluation"]["suite"] = ["local_writing"]
    recipe["train"]["steps"] = 1
    recipe["optim"]["warmup_steps"] = 0
    run_distributed(run_it, 1, write_recipe(tmp_path, recipe))
    found = report_in(tmp_path / "runs/tiny/report")["base"]["suite"]["local_writing"]["scores"]
    model, expected = dense(tmp_path), []
    for i in spread(10, 8):
        doc = documents()[i]
        context = turn("user", f"Write one letter.\n\n{doc['text']}") + "<|im_start|>assistant\n"
        letters = [c for c in written(model, context, 6) if c.isascii() and c.islower()]
        expected.append(float(bool(letters) and letters[0] == doc["answer"]))
    assert found == expected


def broken(folder: Path, name: str) -> None:
    """Tasks that no suite can hold, by what is wrong with them."""
    path = folder / "local_choice.jsonl"
    source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(path)}}}
    task = {"task": name, "test_split": "test", "doc_to_text": "{{text}}"} | source
    task |= {
        "local_gone": {
            "output_type": "multiple_choice",
            "doc_to_choice": CHOICES,
            "doc_to_target": "label",
            "dataset_kwargs": {"data_files": {"test": str(folder / "gone.jsonl")}},
        },
        "local_rolling": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "word_perplexity"}],
        },
        "local_single": {
            "output_type": "multiple_choice",
            "doc_to_choice": ["fox"],
            "doc_to_target": 0,
            "metric_list": [{"metric": "acc"}],
        },
    }[name]
    (folder / f"{name}.yaml").write_text(json.dumps(task))


@pytest.mark.parametrize(
    ("suite", "says"),
    [
        (
            ["local_choise"],
            r"evaluation.suite local_choise: lm_eval .* has no such task: .*include",
        ),
        (["local_gone"], r"evaluation.suite local_gone: .*`moored prepare` brings its data"),
        (["local_rolling"], r"evaluation.suite local_rolling: it has no metric that is a mean"),
        (["local_single"], r"evaluation.suite local_single: a question has 1 choices"),
        (["local_halves", "local_half_one"], r"local_half_one is in local_halves and in"),
    ],
)
def test_what_cannot_be_asked_is_one_line_before_anything_is_trained(tmp_path, suite, says):
    recipe = recipe_of(tmp_path)
    recipe["evaluation"]["suite"] = suite
    with contextlib.suppress(KeyError):
        broken(tmp_path / "tasks", suite[0])
    config = load_config(write_recipe(tmp_path, recipe))
    with pytest.raises(UserError, match=says) as caught:
        open_task_suite(config, resolve_base(config.model, ALONE), ALONE)
    assert "\n" not in str(caught.value)


def test_a_missing_extra_is_named_with_its_command(tmp_path, monkeypatch):
    config = load_config(write_recipe(tmp_path, recipe_of(tmp_path)))
    located = resolve_base(config.model, ALONE)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"evaluation.suite needs .*/pip install .*\[lm-eval\]"):
        open_task_suite(config, located, ALONE)
