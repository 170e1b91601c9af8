"""`moored probe` and random weights: the same on any mesh, and what a plan learns of it."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml

from distributed.runner import run_distributed
from forking import finished, moored
from moored.config import Config, ModelConfig, load_config
from moored.distributed.mesh import start_mesh
from moored.models.engine import Engine, leave
from moored.models.hub import resolve_model
from moored.models.policy import load_policy
from moored.models.weights import STD, RandomFiles
from moored.plan import as_json, as_text, cluster_of, make_plan
from moored.plan.architecture import find_architecture
from moored.plan.calibration import Calibration, calibration_file, keep, kept
from moored.plan.memory_terms import torch_peak, total
from moored.plan.step_time import step_time
from moored.plan.workload import Workload
from moored.training import probe
from moored.training.probe import WARMUP, Probed, _batch, calibration_of
from moored.training.step import StepStats, train_step
from moored.utils.errors import UserError
from tiny import ALONE, ARCHITECTURES, SMALLEST

SIZES = SMALLEST | {"vocab_size": 300, "max_position_embeddings": 256}


def described(folder: Path, architecture: str = "llama", **settings: object) -> Path:
    """A folder that holds a config.json and nothing else."""
    folder.mkdir(parents=True)
    ARCHITECTURES[architecture](**(SIZES | settings)).save_pretrained(folder)
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    return folder


def probed_recipe(folder: Path, architecture: str = "llama", **sections: dict) -> dict:
    recipe: dict = {
        "name": "tiny",
        "model": {
            "name_or_path": str(described(folder / "model", architecture)),
            "dtype": "float32",
            "weights": "random",
        },
        "adapter": {"r": 4, "alpha": 8.0},
        "data": {"train": [{"path": str(folder / "none.jsonl")}], "max_length": 32},
        "regularizer": {"kind": "tmkl", "weight": 1.0},
        "parallel": {"zero_stage": 0},
        "train": {"steps": 4, "global_batch_sequences": 4, "micro_batch_size": 2},
        "output": {"dir": str(folder / "runs")},
    }
    for name, section in sections.items():
        recipe[name] = recipe.get(name, {}) | section
    return recipe


# ---------------------------------------------------------------- weights


@pytest.mark.parametrize("tied", [True, False])
def test_any_slice_is_cut_from_the_same_whole(tmp_path, tied):
    with torch.device("meta"):
        config = ARCHITECTURES["llama"](**SIZES, tie_word_embeddings=tied)
        model = transformers.AutoModelForCausalLM.from_config(config)
    files = RandomFiles(model, torch.device("cpu"))
    assert ("lm_head.weight" in files.names) is not tied
    name = "model.layers.1.mlp.down_proj.weight"
    whole = files.whole(name)
    assert files.shape(name) == [64, 128] == list(whole.shape)
    with files.open(name) as stored:
        assert torch.equal(stored[3:17, 5:90], whole[3:17, 5:90])
        assert torch.equal(stored[:, 64:], whole[:, 64:])
        assert torch.equal(stored[10:20], whole[10:20])
    assert not torch.equal(whole, files.whole("model.layers.0.mlp.down_proj.weight"))
    assert torch.equal(files.whole("model.norm.weight"), torch.ones(64))
    words = files.whole("model.embed_tokens.weight")
    assert words.std().item() == pytest.approx(STD, rel=0.02)
    assert abs(words.mean().item()) < 5 * STD / math.sqrt(words.numel())
    # No two rows or columns go together, which would make a model of lower rank.
    alike = torch.corrcoef(words) - torch.eye(len(words))
    assert alike.abs().max() < 0.7


def test_large_tensors_are_made_in_pieces(monkeypatch):
    class Large:
        def __init__(self):
            self.all_tied_weights_keys = {}

        def named_parameters(self):
            yield "a.weight", torch.empty(300, 70, device="meta")
            yield "experts.gate_up_proj", torch.empty(4, 30, 20, device="meta")

    files = RandomFiles(Large(), torch.device("cpu"))
    at_once = [files.whole(name) for name in sorted(files.names)]
    monkeypatch.setattr("moored.models.weights._ROWS_AT_A_TIME", 128)
    for name, whole in zip(sorted(files.names), at_once, strict=True):
        assert torch.equal(files.whole(name), whole)
        with files.open(name) as stored:
            assert torch.equal(stored[1:3, 4:9], whole[1:3, 4:9])


def losses_of(rank: int, world: int, recipe: dict) -> list[tuple[float, float]]:
    config = Config.model_validate(recipe)
    mesh = start_mesh(config.parallel.tensor_parallel_degree)
    try:
        policy = load_policy(resolve_model(config.model).path, config, mesh)
        engine = Engine(policy, config, mesh)
        batches = [_batch((2, 32), 300, seed) for seed in range(2)]
        mine = batches[mesh.dp.rank :: mesh.dp.size]
        stats = [
            train_step(
                engine,
                mine,
                mesh,
                step=step,
                regularizer=config.regularizer,
                learning_rate=1e-2,
                seed=0,
            )
            for step in range(3)
        ]
        return [(one.loss, one.kl or 0.0) for one in stats]
    finally:
        leave()


@pytest.mark.long
def test_random_weights_are_the_same_on_every_mesh(tmp_path, monkeypatch):
    monkeypatch.setenv("MOORED_CACHE", str(tmp_path / "cache"))
    alone = losses_of_one(probed_recipe(tmp_path / "one"))
    for name, parallel in (
        ("tp", {"tensor_parallel_degree": 2, "zero_stage": 0}),
        ("z3", {"zero_stage": 3}),
    ):
        recipe = probed_recipe(tmp_path / name, parallel=parallel)
        for each in run_distributed(losses_of, 2, recipe):
            for (loss, kl), (expected, expected_kl) in zip(each, alone, strict=True):
                assert loss == pytest.approx(expected, rel=1e-5)
                assert kl == pytest.approx(expected_kl, rel=1e-3, abs=1e-7)
    assert alone[-1][1] > 0


def losses_of_one(recipe: dict) -> list[tuple[float, float]]:
    return run_distributed(losses_of, 1, recipe)[0]


def test_what_describes_a_model_comes_along_and_no_weight(tmp_path, monkeypatch):
    monkeypatch.setenv("MOORED_CACHE", str(tmp_path / "cache"))
    folder = described(tmp_path / "model")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model.safetensors").write_text("no weights")
    found = resolve_model(ModelConfig(name_or_path=str(folder), weights="random"))
    assert {path.name for path in found.path.iterdir()} >= {"config.json", "tokenizer.json"}
    assert not (found.path / "model.safetensors").exists()
    assert found.revision.startswith("random:")
    assert str(folder) in found.origin


def test_a_known_name_needs_no_file(tmp_path, monkeypatch):
    monkeypatch.setenv("MOORED_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    found = resolve_model(ModelConfig(name_or_path="Qwen/Qwen2.5-0.5B", weights="random"))
    config = transformers.AutoConfig.from_pretrained(found.path)
    assert (config.hidden_size, config.num_hidden_layers) == (896, 24)
    with pytest.raises(UserError, match="none of the known models"):
        resolve_model(ModelConfig(name_or_path="nobody/knows", weights="random"))


def test_layers_that_are_converted_when_read_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("MOORED_CACHE", str(tmp_path / "cache"))
    (tmp_path / "model").mkdir()
    transformers.GPT2Config(vocab_size=300, n_embd=64, n_layer=2, n_head=4).save_pretrained(
        tmp_path / "model"
    )
    recipe = probed_recipe(tmp_path / "other")
    recipe["model"]["name_or_path"] = str(tmp_path / "model")
    config = Config.model_validate(recipe)
    with pytest.raises(UserError, match=r"weights=random: the layers of GPT2LMHeadModel"):
        load_policy(resolve_model(config.model).path, config, ALONE)


@pytest.mark.parametrize("option", [{"cache_quantized": True}, {"mirror": "pypi:a"}])
def test_options_of_files_are_idle_beside_random_weights(tmp_path, option):
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(probed_recipe(tmp_path, model=option)))
    with pytest.raises(Exception, match="weights is random"):
        load_config(path)


# ---------------------------------------------------------------- the command


def test_a_probe_measures_a_recipe_and_says_where(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(probed_recipe(tmp_path, data={"packing": True})))
    cache = str(tmp_path / "cache")
    said, _ = finished(moored("probe", str(path), "--steps", "2", MOORED_CACHE=cache))
    assert "tiny with random weights on 1 x cpu, micro-batches of 64 tokens" in said
    facts = json.loads((tmp_path / "runs/tiny-probe.json").read_text())
    measured = facts["measured"]
    assert measured["micro_batches"] == 2
    assert measured["tokens"] == 64
    assert 0 < measured["forward_seconds"] < measured["micro_batch_seconds"]
    assert measured["step_seconds"] == pytest.approx(
        2 * measured["micro_batch_seconds"] + measured["update_seconds"]
    )
    # Random weights know nothing: the loss is about that of equal chances.
    assert measured["loss"] == pytest.approx(math.log(300), rel=0.1)
    assert "planned" not in facts


# ---------------------------------------------------------------- what a plan learns

GPUS = "1xh100-80gb"


def of_8b(folder: Path) -> Config:
    path = folder / "r.yaml"
    values = {
        "name": "eight",
        "model": {"name_or_path": "meta-llama/Llama-3.1-8B"},
        "data": {"train": [{"hub": "a/b"}], "max_length": 4096, "packing": True},
        "train": {"steps": 100, "global_batch_sequences": 8, "micro_batch_size": 2},
        "parallel": {"zero_stage": 0},
    }
    path.write_text(yaml.safe_dump(values))
    return load_config(path)


def measured(config: Config, *, gpu: float, host: float, memory: float) -> Probed:
    """A probe of a machine that is so many times slower and fuller than a plan says."""
    architecture, work = find_architecture(config.model), Workload.of(config)
    cluster = cluster_of(GPUS)
    planned = step_time(architecture, work, cluster, host_factor=1.0)
    return Probed(
        device="NVIDIA H100 80GB HBM3",
        world=1,
        tokens=8192,
        micro_batches=4,
        load_seconds=1.0,
        loaded_bytes=1,
        peak_bytes=round(memory * torch_peak(architecture, work, 1)),
        reserved_bytes=1,
        micro_batch_seconds=max(gpu * (planned.gpu + planned.sent), host * planned.host),
        forward_seconds=0.5,
        reference_seconds=0.2,
        host_seconds=host * planned.host,
        update_seconds=0.01,
        loss=1.0,
    )


def test_a_calibrated_plan_says_what_was_measured(tmp_path):
    config = of_8b(tmp_path)
    architecture, work = find_architecture(config.model), Workload.of(config)
    probed = measured(config, gpu=1.3, host=1.1, memory=1.07)
    learned = calibration_of(probed, architecture, work, cluster_of(GPUS), "eight")
    assert learned.gpu_factor == pytest.approx(1.3, abs=1e-3)
    assert learned.host_factor == pytest.approx(1.1, abs=1e-3)
    assert learned.memory_factor == pytest.approx(1.07, abs=1e-3)
    plain = make_plan(config, cluster_of(GPUS))
    better = make_plan(config, dataclasses.replace(cluster_of(GPUS), calibration=learned))
    assert better.time.gpu == pytest.approx(1.3 * plain.time.gpu, rel=1e-3)
    assert max(better.time.gpu, better.time.host) == pytest.approx(
        probed.micro_batch_seconds, rel=1e-3
    )
    assert total(better.memory) == pytest.approx(1.07 * total(plain.memory), rel=1e-3)
    assert "probed with eight" in as_text(better)
    assert as_json(better)["cluster"]["calibration"]["host_factor"] == learned.host_factor
    assert as_json(plain)["cluster"]["calibration"] is None


def test_where_the_processor_was_the_limit_nothing_is_learned_of_the_gpu(tmp_path):
    config = of_8b(tmp_path)
    probed = measured(config, gpu=1.0, host=50.0, memory=1.0)
    architecture, work = find_architecture(config.model), Workload.of(config)
    learned = calibration_of(probed, architecture, work, cluster_of(GPUS), "eight")
    assert learned.gpu_factor == 1.0
    assert learned.host_factor == pytest.approx(50, rel=1e-3)


def learned(gpu: str = "h100-80gb", factor: float = 1.2) -> Calibration:
    return Calibration(
        gpu=gpu,
        gpu_factor=factor,
        host_factor=1.5,
        memory_factor=1.1,
        recipe="eight",
        date="2026-11-30T12:00:00+00:00",
    )


def test_a_sites_probes_are_kept_one_for_each_gpu(tmp_path):
    profile = tmp_path / "mine.yaml"
    assert kept(profile, "h100-80gb") is None
    keep(learned(), profile)
    keep(learned("a100-80gb"), profile)
    keep(learned(factor=1.4), profile)
    assert kept(profile, "h100-80gb") == learned(factor=1.4)
    assert kept(profile, "a100-80gb") == learned("a100-80gb")


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"probes": [{}]}', '{"probes": 1}', '{"probes": [{"gpu": 1}]}']
)
def test_a_broken_record_is_named(tmp_path, text):
    calibration_file(tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(UserError, match=r"mine\.probe\.json is no record of probes .*: remove it"):
        kept(tmp_path / "mine.yaml", "h100-80gb")
    keep(learned(), tmp_path / "other.yaml")
    path = calibration_file(tmp_path / "other.yaml")
    path.write_text(path.read_text().replace("1.2", "1e9"))
    with pytest.raises(UserError, match="out of bounds"):
        kept(tmp_path / "other.yaml", "h100-80gb")


def test_a_plan_of_a_site_takes_its_probe(tmp_path):
    site = tmp_path / "mine.yaml"
    site.write_text("description: mine\nslurm: {gpu_type: h100-80gb, gpus_per_node: 1}\n")
    of_8b(tmp_path)
    arguments = ("plan", str(tmp_path / "r.yaml"), "--site", str(site), "--json")
    before, _ = finished(moored(*arguments))
    keep(learned(), site)
    after, _ = finished(moored(*arguments))
    memory = [json.loads(said)["memory"]["bytes"] for said in (before, after)]
    assert memory[1] == pytest.approx(1.1 * memory[0], rel=1e-6)


def test_a_job_probes_and_keeps_it_with_its_site(tmp_path):
    site = tmp_path / "mine.yaml"
    site.write_text("description: mine\nslurm: {gpu_type: h100-80gb, gpus_per_node: 2}\n")
    of_8b(tmp_path)
    arguments = ("submit", str(tmp_path / "r.yaml"), "--site", str(site), "--dry-run")
    said, _ = finished(moored(*arguments, "--stages", "probe", cwd=tmp_path))
    assert "--gres=gpu:h100-80gb:2" in said
    assert f"--out {tmp_path}/runs/eight/probe.json --site {site}" in said


Steps = list[tuple[float, float]]


def steps_of(rank: int, world: int, recipe: dict, folder: Path) -> tuple[Steps, Steps]:
    """(loss, gradient's norm) of each step: of a plain train, and of what the probe timed."""
    plain = Config.model_validate(recipe | {"regularizer": recipe["regularizer"] | {"every": 1}})
    mesh = start_mesh(1)
    engine = Engine(load_policy(resolve_model(plain.model).path, plain, mesh), plain, mesh)
    expected = [
        train_step(
            engine,
            [_batch((2, 32), 300, seed) for seed in (0, 1)],
            mesh,
            step=step,
            regularizer=plain.regularizer,
            learning_rate=plain.optim.learning_rate,
            seed=plain.train.seed,
        )
        for step in range(WARMUP + 3)
    ]
    engine.close()
    seen: list[StepStats] = []

    def stepping(*arguments: Any, **named: Any) -> StepStats:
        seen.append(train_step(*arguments, **named))
        return seen[-1]

    probe.train_step = stepping
    try:
        probed = probe.run(Config.model_validate(recipe), steps=3, out=folder / "probe.json")
    finally:
        probe.train_step = train_step
    assert probed.loss == seen[len(expected) - 1].loss
    return (
        [(stats.loss, stats.grad_norm) for stats in expected],
        [(stats.loss, stats.grad_norm) for stats in seen[: len(expected)]],
    )


@pytest.mark.parametrize(
    "regularizer",
    [
        {"kind": "tmkl", "weight": 0.7, "every": 3, "temperature": 2.0, "target_weight": 0.5},
        pytest.param({"kind": "kl", "weight": 2.0, "direction": "jsd"}, marks=pytest.mark.long),
    ],
    ids=lambda one: one["kind"],
)
def test_the_probes_steps_are_those_of_a_plain_train(tmp_path, regularizer):
    """With random weights and its own rows; its KL in every step, so that each is alike."""
    recipe = probed_recipe(tmp_path, regularizer=regularizer)
    [(expected, found)] = run_distributed(steps_of, 1, recipe, tmp_path)
    assert found == expected
    assert len({loss for loss, _ in found}) == len(found) == WARMUP + 3, "it descends"
