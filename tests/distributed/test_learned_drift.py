"""The divergence on the training data, of every run: against dense fp64 arithmetic."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel

from distributed.runner import run_distributed
from moored.config import Config, load_config
from moored.data import load_samples
from moored.evaluation import evaluate_command
from moored.evaluation.evaluate import LEARNED_SAMPLES, build_suite
from moored.export import run_command as export
from moored.models.base_files import resolve_base
from moored.tracking.journal import metrics
from moored.training import train
from tiny import ALONE, tiny_recipe, write_chats, write_recipe


def recipe_of(folder: Path, **changes: Any) -> Config:
    recipe = tiny_recipe(folder, tie_word_embeddings=False, initializer_range=0.2)
    recipe["model"]["quantization"] = "none"
    recipe["adapter"] = {"r": 16, "alpha": 64.0}
    recipe["train"]["steps"] = 8
    return load_config(write_recipe(folder, recipe | changes))


def run_it(rank: int, world_size: int, config: Config) -> None:
    torch.distributed.destroy_process_group()  # a run makes and leaves its own
    train.run(config)


def again(rank: int, world_size: int, run: Path, folder: Path) -> None:
    torch.distributed.destroy_process_group()
    evaluate_command.run_command([str(run)])
    evaluate_command.run_command([str(run)], scales=[0.5], out=folder / "half")
    export(run, folder / "exported")


def arm_in(folder: Path) -> dict[str, Any]:
    (arm,) = json.loads((folder / "report.json").read_text())["arms"].values()
    return arm


def dense(folder: Path, config: Config, run: Path) -> tuple[float, float, int]:
    """Mean KL(base || adapted), the same without the true token, and the number of targets."""
    load = transformers.AutoModelForCausalLM.from_pretrained
    models = [load(folder / "model"), PeftModel.from_pretrained(load(folder / "model"), run)]
    located = resolve_base(config.model, ALONE)
    kl = masked = 0.0
    count = 0
    for sample in load_samples(config.data.train, located.tokenizer, config.data):
        ids = torch.tensor(sample.input_ids.tolist())
        with torch.no_grad():
            p, q = (torch.softmax(m.double()(ids[None]).logits[0].double(), -1) for m in models)
        for position in range(1, len(ids)):
            if not sample.label_mask[position]:
                continue
            base, adapted = p[position - 1], q[position - 1]
            kl += float((base * (base / adapted).log()).sum())
            others = torch.arange(len(base)) != ids[position]
            base, adapted = (x[others] / x[others].sum() for x in (base, adapted))
            masked += float((base * (base / adapted).log()).sum())
            count += 1
    return kl / count, masked / count, count


def test_every_run_measures_it_and_keeps_it(tmp_path):
    config = recipe_of(tmp_path, regularizer={"kind": "none"})
    run_distributed(run_it, 1, config)
    run = tmp_path / "runs/tiny"
    arm = arm_in(run / "report")
    kl, masked, count = dense(tmp_path, config, run / "adapter")
    # fp32 forwards: some 1e-6 of logits of order 10, averaged over hundreds of targets.
    assert arm["train_drift_nats_per_token"] == pytest.approx(kl, rel=1e-4)
    assert arm["train_drift_tmkl_nats_per_token"] == pytest.approx(masked, rel=1e-4)
    assert arm["num_train_drift_tokens"] == count
    assert kl > 0.05, "not a test"
    assert metrics(run)["train_drift/kl_nats_per_token"] == [(8, pytest.approx(kl, rel=1e-4))]
    assert "Divergence on the training data" in (run / "report/report.html").read_text()
    run_distributed(again, 1, run, tmp_path)
    kept = arm_in(run / "report")
    for key in ("train_drift_nats_per_token", "num_train_drift_tokens"):
        assert kept[key] == arm[key]
        assert arm_in(tmp_path / "half")[key] is None  # measured of the adapter as trained alone
    card = json.loads((tmp_path / "exported/forgetting-card.json").read_text())
    assert card["figures"]["train_kl_nats_per_token"] == arm["train_drift_nats_per_token"]
    assert "divergence on the training data is" in (tmp_path / "exported/README.md").read_text()


def test_two_ranks_measure_the_same_of_packed_rows(tmp_path):
    changes = {"regularizer": {"kind": "tmkl", "weight": 0.1, "token_fraction": 0.5}}
    config = recipe_of(tmp_path, **changes)
    config = load_config(tmp_path / "tiny.yaml", ["data.packing=true"])
    run_distributed(run_it, 2, config)
    run = tmp_path / "runs/tiny"
    arm = arm_in(run / "report")
    kl, masked, count = dense(tmp_path, config, run / "adapter")
    assert arm["num_train_drift_tokens"] == count  # all of them, whatever was drawn of them
    assert arm["train_drift_nats_per_token"] == pytest.approx(kl, rel=1e-3)
    assert arm["train_drift_tmkl_nats_per_token"] == pytest.approx(masked, rel=1e-3)


def test_samples_are_bounded_and_spread_over_all_sources(tmp_path):
    write_chats(tmp_path / "more.jsonl", 3 * LEARNED_SAMPLES)
    first = {"path": str(tmp_path / "train.jsonl")}
    more = {"path": str(tmp_path / "more.jsonl"), "streaming": True}
    for sources in ([first, more], [first, {**first, "weight": 2.0}]):
        recipe = tiny_recipe(tmp_path)
        recipe["data"]["train"] = sources
        config = load_config(write_recipe(tmp_path, recipe))
        located = resolve_base(config.model, ALONE)
        samples = load_samples(
            config.data.train, located.tokenizer, config.data, located.vocab_size
        )
        text = build_suite(config, located, ALONE, learned=samples).training
        assert text is not None
        found = list(text.sample_ids)
        assert len(set(found)) == len(found)
        if sources[1] is more:
            assert len(found) == LEARNED_SAMPLES
            share = sum(name.startswith("train.jsonl") for name in found) / len(found)
            assert share == pytest.approx(24 / (24 + 3 * LEARNED_SAMPLES), abs=0.02)
            assert found[-1] > "more.jsonl:18"  # up to the end of it
        else:
            assert len(found) == 2 * 24
