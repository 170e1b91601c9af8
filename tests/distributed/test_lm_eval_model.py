"""The evaluation harness on base and policy: local tasks, against dense fp64 arithmetic."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from lm_eval.api.instance import Instance
from peft import PeftModel

from distributed.runner import run_distributed
from moored.config import Config, load_config
from moored.distributed.mesh import start_mesh
from moored.evaluation import evaluate_command
from moored.evaluation.lm_eval_model import HarnessModel, open_tasks
from moored.models.base_files import resolve_base
from moored.models.engine import Engine, leave
from moored.models.policy import load_policy
from moored.training import train
from moored.utils.errors import UserError
from tiny import ALONE, tiny_recipe, tiny_tokenizer, write_recipe

CHOICES = ["fox", "lazy dog", "one two three"]
DOCS = [
    {"text": f"the quick brown fox {word} count", "label": i % 3, "answer": word}
    for i, word in enumerate(["jumps", "over", "two four", "dog", "user", "the the", "one"])
]
TASKS = {
    "choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": CHOICES,
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc"}],
    },
    "rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}],
    },
    "writing": {
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["o"], "max_gen_toks": 6},
        "metric_list": [{"metric": "exact_match"}],
    },
}


def write_tasks(folder: Path) -> Path:
    folder.mkdir()
    docs = folder / "docs.jsonl"
    docs.write_text("".join(json.dumps(doc) + "\n" for doc in DOCS))
    for name, task in TASKS.items():
        source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(docs)}}}
        settings = {"task": f"local_{name}", "test_split": "test"} | source | task
        (folder / f"{name}.yaml").write_text(json.dumps(settings))  # JSON is YAML
    return folder


def log_likelihoods(model: torch.nn.Module, ids: list[int]) -> list[float]:
    """Of each token but the first, in fp64."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    logs = torch.log_softmax(logits.double(), dim=-1)
    return [float(logs[i, token]) for i, token in enumerate(ids[1:])]


def of_continuation(model: torch.nn.Module, context: str, continuation: str) -> float:
    tokenizer = tiny_tokenizer()
    before = tokenizer.encode(context)
    whole = tokenizer.encode(context + continuation)
    return sum(log_likelihoods(model, whole)[len(before) - 1 :])


def expected_figures(model: torch.nn.Module) -> dict[str, dict[str, float]]:
    tokenizer = tiny_tokenizer()
    right = []
    for doc in DOCS:
        scores = [of_continuation(model, doc["text"], f" {choice}") for choice in CHOICES]
        right.append(scores.index(max(scores)) == doc["label"])
    share, count = sum(right) / len(right), len(right)
    nats = words = 0.0
    for doc in DOCS:
        ids = [tokenizer.eos_token_id, *tokenizer.encode(doc["text"])]
        nats += sum(log_likelihoods(model, ids))
        words += len(doc["text"].split())
    return {
        "local_choice": {
            "acc": share,
            "acc_stderr": math.sqrt(share * (1 - share) / (count - 1)),
        },
        "local_rolling": {"word_perplexity": math.exp(-nats / words)},
    }


def dense(folder: Path, run: Path | None = None) -> torch.nn.Module:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model")
    return (
        model if run is None else PeftModel.from_pretrained(model, str(run / "adapter"))
    ).double()


def recipe_of(folder: Path) -> Config:
    recipe = tiny_recipe(folder, tie_word_embeddings=False, initializer_range=0.2)
    recipe["model"]["quantization"] = "none"
    recipe["adapter"] = {"r": 16, "alpha": 64.0}
    recipe["regularizer"] = {"kind": "none"}
    recipe["train"]["steps"] = 12
    return load_config(write_recipe(folder, recipe))


NAMES = [f"local_{name}" for name in TASKS]


def asking(rank: int, world_size: int, config: Config, folder: Path) -> None:
    torch.distributed.destroy_process_group()  # a run makes and leaves its own
    run = train.run(config)
    evaluate_command.run_command([str(run)], lm_eval=NAMES, lm_eval_include=folder / "tasks")
    assert_report(folder, run)
    assert_likelihoods(config, folder, run)


def asking_again(rank: int, world_size: int, run: Path, folder: Path) -> None:
    torch.distributed.destroy_process_group()
    options = {"lm_eval": NAMES, "lm_eval_include": folder / "tasks", "out": folder / "two"}
    evaluate_command.run_command([str(run)], **options)


def assert_report(folder: Path, run: Path) -> None:
    report = json.loads((run / "report/report.json").read_text())
    base, arm = report["base"]["lm_eval"], report["arms"]["none"]["lm_eval"]
    for found, model in ((base, dense(folder)), (arm, dense(folder, run))):
        assert list(found) == NAMES
        for task, figures in expected_figures(model).items():
            for metric, value in figures.items():
                assert found[task][metric] == pytest.approx(value, rel=1e-5), (task, metric)
        assert found["local_writing"]["exact_match_stderr"] is not None
    assert base["local_rolling"] != arm["local_rolling"], "not a test"
    assert "lm_eval 0.4" in report["settings"]["evaluation harness"]
    page = (run / "report/report.html").read_text()
    assert "Evaluation harness" in page
    assert "local_choice" in page


def assert_likelihoods(config: Config, folder: Path, run: Path) -> None:
    """Token by token sums, greedy or not, and what a greedy continuation is."""
    mesh = start_mesh(1)
    located = resolve_base(config.model, mesh)
    policy = load_policy(located.source.path, config, mesh, adapter=run / "adapter")
    engine = Engine(policy, config, mesh)
    model = HarnessModel(engine, located, mesh, rows=3)
    pairs = [(doc["text"], f" {choice}") for doc in DOCS for choice in CHOICES]
    pairs += [("", "the lazy dog"), ("the ", "fox"), pairs[0]]
    requests = [
        Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=0) for pair in pairs
    ]
    for base in (False, True):
        model.base = base
        plain = dense(folder, None if base else run)
        found = model.loglikelihood(requests, disable_tqdm=True)
        for (context, continuation), (value, _) in zip(pairs[:-3], found, strict=False):
            expected = of_continuation(plain, context, continuation)
            # fp32 forward: some 1e-6 of logits of order 10, summed over a few tokens.
            assert value == pytest.approx(expected, abs=5e-5)
        ids = [tiny_tokenizer().eos_token_id, *tiny_tokenizer().encode("the lazy dog")]
        assert found[-3][0] == pytest.approx(sum(log_likelihoods(plain, ids)), abs=5e-5)
        assert found[-2][0] == pytest.approx(of_continuation(plain, "the", " fox"), abs=5e-5)
        assert found[-1] == found[0]
        # What is generated is greedy, token by token; until a stop it is what was generated.
        prompt = DOCS[0]["text"]
        full, cut = model.generate_until(
            [
                Instance(
                    request_type="generate_until",
                    doc={},
                    arguments=(prompt, {"until": until, "max_gen_toks": 4}),
                    idx=0,
                )
                for until in ([], ["e", " "])
            ]
        )
        ids = tiny_tokenizer().encode(prompt)
        for _ in range(4):
            with torch.no_grad():
                token = int(
                    plain(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()
                )
            ids.append(token)
            if token == tiny_tokenizer().eos_token_id:
                break
        written = tiny_tokenizer().decode(ids, skip_special_tokens=True).removeprefix(prompt)
        assert full == written
        assert cut == written.split("e")[0].split(" ")[0]
    engine.close()
    leave()


def test_figures_and_likelihoods_are_those_of_dense_arithmetic(tmp_path):
    write_tasks(tmp_path / "tasks")
    config = recipe_of(tmp_path)
    run_distributed(asking, 1, config, tmp_path)
    # On two ranks, of which each has its share of the requests.
    run = config.output.dir / "tiny"
    run_distributed(asking_again, 2, run, tmp_path)
    one, two = (
        json.loads((folder / "report.json").read_text())
        for folder in (run / "report", tmp_path / "two")
    )
    for found, expected in ((two["base"], one["base"]), (two["arms"]["none"], one["arms"]["none"])):
        for task, figures in expected["lm_eval"].items():
            assert list(found["lm_eval"][task]) == list(figures)
            for metric, value in figures.items():
                close = value if value is None else pytest.approx(value, rel=1e-5)
                assert found["lm_eval"][task][metric] == close, (task, metric)


def test_unknown_tasks_and_a_missing_extra_are_one_line(tmp_path, monkeypatch):
    include = write_tasks(tmp_path / "tasks")
    assert list(open_tasks(["local_choice"], include, ALONE)["tasks"]) == ["local_choice"]
    for name, words in (
        ("local_choise", r"--lm-eval local_choise: lm_eval .* has no such task"),
        ("local_gone", r"--lm-eval local_gone: .*: fetch its data once"),
    ):
        task: dict[str, Any] = {"task": "local_gone", "test_split": "test"} | TASKS["choice"]
        gone = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "gone.jsonl"}}}
        (include / "gone.yaml").write_text(json.dumps(task | gone))
        with pytest.raises(UserError, match=words) as caught:
            open_tasks([name], include, ALONE)
        assert "\n" not in str(caught.value)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"pip install -c docker/constraints.txt -e '\.\[lm-eval\]'"
    ):
        evaluate_command.run_command([str(tmp_path)], lm_eval=["local_choice"])
