"""`regularizer.positions: all` from the recipe to an update, with a tiny real model.

The expected losses are put together in fp64 from Hugging Face's own logits, sample by sample: no
packing, no chunks, no batch of ours.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dense_reference import divergence, per_row
from distributed.runner import run_distributed
from moored.adapted import adapters_off, dropout_off
from moored.config import Config, load_config
from moored.data.batch import Batch, Sample, collate
from moored.distributed.mesh import start_mesh
from moored.models.engine import Engine
from moored.models.policy import load_policy
from moored.tracking.journal import metrics
from moored.training import train
from moored.training.step import train_step
from moored.utils.errors import UserErrors
from tiny import ALONE, tiny_recipe, write_recipe


def config_of(folder: Path, *overrides: str) -> Config:
    return load_config(write_recipe(folder, tiny_recipe(folder)), list(overrides))


def samples() -> list[Sample]:
    """Prompts of several lengths, answers inside, tokens behind the last answer."""
    generator, out = np.random.default_rng(3), []
    for i, (length, answer) in enumerate([(9, (4, 9)), (14, (6, 10)), (6, (1, 6)), (11, (9, 11))]):
        ids = generator.integers(3, 259, length).astype(np.int32)
        place = np.arange(length)
        drawn = generator.random(length) < 0.7
        out.append(
            Sample(
                sample_id=f"s{i}",
                input_ids=ids,
                label_mask=(place >= answer[0]) & (place < answer[1]),
                kl_mask=drawn if i else None,
            )
        )
    return out


def engine_of(config: Config) -> Engine:
    """A policy that has left its base."""
    policy = load_policy(Path(config.model.name_or_path), config, ALONE)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return Engine(policy, config, ALONE)


def logits_of(engine: Engine, sample: Sample) -> tuple[Tensor, Tensor]:
    """What both models say of a sample by itself, by Hugging Face's forward, [n, V] each."""
    ids = torch.from_numpy(sample.input_ids.astype(np.int64))[None]
    model = engine.policy.causal_lm
    with torch.no_grad(), dropout_off(engine.policy):
        policy = model(input_ids=ids, use_cache=False).logits[0].double()
        with adapters_off(engine.policy):
            base = model(input_ids=ids, use_cache=False).logits[0].double()
    return policy, base


def expected(engine: Engine, config: Config, weight: float) -> dict[str, float]:
    """Sums over all samples, divided by global counts."""
    regularizer = config.regularizer
    ces, kls, alone = [], [], []
    for sample in samples():
        s, t = logits_of(engine, sample)
        drawn = np.ones(len(sample), dtype=bool) if sample.kl_mask is None else sample.kl_mask
        for at in range(len(sample) - 1):
            target = torch.tensor([int(sample.input_ids[at + 1])])
            if sample.label_mask[at + 1]:
                ce, kl = per_row(
                    s[at : at + 1], t[at : at + 1], target, direction=regularizer.direction
                )
                ces.append(ce)
                kls += [kl] if drawn[at + 1] else []
            elif drawn[at + 1]:
                alone.append(divergence(s[at], t[at], regularizer.direction)[None])
    ce, kl, kl_prompt = (float(torch.cat(x).mean()) for x in (ces, kls, alone))
    prompt_weight = regularizer.prompt_weight * weight / regularizer.weight
    loss = ce + weight * kl + prompt_weight * kl_prompt
    return {"loss": loss, "ce": ce, "kl": kl, "kl_prompt": kl_prompt}


LAYOUTS = {
    "alone": [[[0]], [[1]], [[2]], [[3]]],
    "padded": [[[0], [1], [2], [3]]],
    "packed": [[[2, 0], [1, 3]]],
    "accumulated": [[[3, 2], [0]], [[1]], []],
}


def batches_of(layout: str) -> list[Batch]:
    made = samples()
    return [
        collate([[made[i] for i in row] for row in rows], 0, all_positions=True)
        for rows in LAYOUTS[layout]
    ]


def updates(_rank: int, _world_size: int, configs: list[Config]) -> None:
    start_mesh(1)
    for config in configs:
        engine, norms = engine_of(config), []
        for weight in (0.5, 1.5):  # a schedule moves both weights
            want = expected(engine, config, weight)
            for layout in LAYOUTS:
                stats = train_step(
                    engine,
                    batches_of(layout),
                    ALONE,
                    step=0,
                    regularizer=config.regularizer,
                    learning_rate=0.0,
                    seed=0,
                    weight=weight,
                )
                # fp32 hidden states of 64 features and logits of about 300: some 1e-6.
                for name, value in want.items():
                    assert getattr(stats, name) == pytest.approx(value, rel=2e-5), (layout, name)
                norms.append(stats.grad_norm)
        assert np.ptp(norms[:4]) < 1e-4 * norms[0]
        engine.close()


def test_an_update_is_the_dense_loss_however_its_samples_are_laid(tmp_path: Path) -> None:
    given = (
        *("regularizer.positions=all", "regularizer.prompt_weight=0.6", "regularizer.weight=0.5"),
        *("data.packing=true", "model.quantization=none"),
    )
    configs = [
        config_of(tmp_path, *given, f"regularizer.direction={direction}")
        for direction in ("forward", "reverse", "jsd")
    ]
    run_distributed(updates, 1, configs)


def anchor_samples() -> list[Sample]:
    generator = np.random.default_rng(9)
    return [
        Sample(
            sample_id=f"a{i}",
            input_ids=generator.integers(3, 259, length).astype(np.int32),
            label_mask=np.zeros(length, dtype=bool),
        )
        for i, length in enumerate([7, 12, 5])
    ]


def with_anchors(_rank: int, _world_size: int, config: Config) -> None:
    """Beside both other terms, each over its own count."""
    start_mesh(1)
    engine, anchors = engine_of(config), anchor_samples()
    terms = []
    for sample in anchors:
        s, t = logits_of(engine, sample)
        terms += [divergence(s[at], t[at], "forward") for at in range(len(sample) - 1)]
    kl_anchors = float(torch.stack(terms).mean())
    how: dict[str, Any] = {"regularizer": config.regularizer, "learning_rate": 0.0, "seed": 0}
    for weight in (0.5, 1.5):
        want = expected(engine, config, weight)
        loss = want["loss"] + 2.5 * weight / 0.5 * kl_anchors
        for layout in ([[[0], [1], [2]]], [[[2, 1]], [[0]], []], [[[0]], [[1]], [[2]]]):
            anchored = [
                collate([[anchors[i] for i in row] for row in rows], 0, all_positions=True)
                for rows in layout
            ]
            stats = train_step(
                engine,
                batches_of("accumulated"),
                ALONE,
                step=0,
                weight=weight,
                anchored=anchored,
                **how,
            )
            assert stats.loss == pytest.approx(loss, rel=2e-5)
            assert stats.kl_anchors == pytest.approx(kl_anchors, rel=2e-5)
            for name in ("ce", "kl", "kl_prompt"):
                assert getattr(stats, name) == pytest.approx(want[name], rel=2e-5), name
            assert stats.num_tokens == sum(len(sample) for sample in samples())
    engine.close()


def test_anchors_are_a_term_of_their_own(tmp_path: Path) -> None:
    given = (
        *("regularizer.positions=all", "regularizer.weight=0.5", "data.packing=true"),
        f"regularizer.anchors={{path: {tmp_path / 'fox.txt'}, window_tokens: 32, weight: 2.5}}",
        "model.quantization=none",
    )
    run_distributed(with_anchors, 1, config_with(tmp_path, *given))


def config_with(folder: Path, *overrides: str) -> Config:
    """Without the retention text that the anchors are."""
    recipe = tiny_recipe(folder)
    recipe["retention"] = {}
    return load_config(write_recipe(folder, recipe), list(overrides))


def test_a_run_with_anchors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three windows beside six samples, on every second step; the base runs once for each."""
    monkeypatch.setenv("MOORED_CACHE", str(tmp_path / "cache"))
    anchors = f"{{path: {tmp_path / 'fox.txt'}, max_tokens: 96, window_tokens: 32, fraction: 0.5}}"
    given = (
        *("reference.cache=true", "reference.match=sample", "regularizer.every=2"),
        *("data.eval=[]", "train.steps=8", "train.micro_batch_size=6"),
    )
    configs = {
        tmp_path / "anchored": config_with(tmp_path, f"regularizer.anchors={anchors}", *given),
        tmp_path / "alone": config_with(tmp_path, *given),
    }
    run_distributed(train_each, 1, configs)
    found = {run.name: metrics(run) for run in configs}
    curve = found["anchored"]["train/kl_anchors_nats_per_token"]
    assert [value > 0 for _, value in curve] == [True] * len(curve)
    assert "train/kl_anchors_nats_per_token" not in found["alone"]
    ce = [[value for _, value in found[run]["train/ce_nats_per_token"]] for run in found]
    assert ce[0][:2] == ce[1][:2], "the first divergence acts in the second update"
    assert ce[0][2:] != ce[1][2:]
    journal = (tmp_path / "anchored" / "journal.jsonl").read_text().replace(" ", "")
    # Of the four updates with a divergence: all anchors once; 24 samples in four steps, of eight.
    assert '"read":3,"computed":5' in journal


def every_second(_rank: int, _world_size: int, config: Config) -> None:
    start_mesh(1)
    engine = engine_of(config)
    how: dict[str, Any] = {"regularizer": config.regularizer, "learning_rate": 0.0, "seed": 0}
    first, second = (
        train_step(engine, batches_of("padded"), ALONE, step=step, **how) for step in range(2)
    )
    assert (first.kl, first.kl_prompt) == (None, None)
    assert first.loss == pytest.approx(first.ce, rel=1e-9)
    assert second.ce == first.ce
    assert second.kl is not None
    assert second.kl_prompt is not None
    # Every second step, with twice the weights: here of 1 each.
    assert second.loss == pytest.approx(second.ce + 2 * (second.kl + second.kl_prompt), rel=1e-6)
    engine.close()


def test_steps_without_a_divergence_look_at_the_targets_alone(tmp_path: Path) -> None:
    config = config_of(tmp_path, "regularizer.positions=all", "regularizer.every=2")
    run_distributed(every_second, 1, config)


def train_each(_rank: int, _world_size: int, configs: dict[Path, Config]) -> None:
    for path, config in configs.items():
        train.run(config, path=path, parent=path.parent)


def test_a_run_with_the_cache_is_the_run_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other positions are drawn in each of three epochs, but the base runs in the first alone."""
    monkeypatch.setenv("MOORED_CACHE", str(tmp_path / "cache"))
    recipe = tiny_recipe(tmp_path)
    recipe["train"] = {"epochs": 3} | {k: v for k, v in recipe["train"].items() if k != "steps"}
    recipe["regularizer"] |= {"positions": "all", "token_fraction": 0.5}
    recipe["data"]["eval"], recipe["retention"] = [], {}
    path = write_recipe(tmp_path, recipe)
    overrides = {"without": [], "with": ["reference.cache=true", "reference.match=sample"]}
    configs = {tmp_path / name: load_config(path, given) for name, given in overrides.items()}
    run_distributed(train_each, 1, configs)
    found = {run.name: metrics(run) for run in configs}
    curve = found["without"]["train/kl_prompt_nats_per_token"]
    assert len(curve) == 12
    assert curve[0][1] == 0.0
    assert min(value for _, value in curve[1:]) > 0
    for name in ("train/loss", "train/tmkl_nats_per_token", "train/kl_prompt_nats_per_token"):
        mine, theirs = (np.array(found[run][name])[:, 1] for run in ("with", "without"))
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-6)
    said = (tmp_path / "with" / "journal.jsonl").read_text()
    assert '"read":24,"computed":12' in said.replace(" ", "")


def test_what_would_have_no_effect_is_refused(tmp_path: Path) -> None:
    for given, why in (
        (["regularizer.prompt_weight=2"], "nothing but targets is held"),
        (["regularizer.kind=none", "regularizer.positions=all"], "kind is none"),
        (
            ["regularizer.kind=asft", "regularizer.weight=0", "regularizer.positions=all"],
            "weight is 0, so there is no divergence",
        ),
        (
            [
                "regularizer.positions=all",
                "data.train.0.format=text",
                "evaluation.exact_match=false",
            ],
            "every source of data.train has format text",
        ),
        (["regularizer.positions=all", "regularizer.prompt_weight=0"], "greater than 0"),
        (["regularizer.kind=kl", "regularizer.target_weight=0.5"], "these are parts of tmkl"),
        (["regularizer.kind=eaft", "regularizer.anchors={builtin: base-samples}"], "kind is eaft"),
        (["regularizer.anchors={path: fox.txt, target: all}"], "every token of an anchor counts"),
        (
            ["regularizer.anchors={builtin: base-samples, window_tokens: 65}"],
            "65 is more than data.max_length 64",
        ),
        (
            [f"regularizer.anchors={{path: {tmp_path / 'fox.txt'}, window_tokens: 32}}"],
            "regularizer.anchors: is also in retention.fox: what is measured must not be held",
        ),
        (
            [f"regularizer.anchors={{path: {tmp_path / 'eval.jsonl'}, window_tokens: 32}}"],
            "regularizer.anchors: is also in data.eval.0",
        ),
        (
            ["regularizer.direction=jsd", "regularizer.target_weight=0.5"],
            "only the forward divergence has such parts, not jsd: set direction to forward",
        ),
        (
            ["regularizer.direction=reverse", "regularizer.rest_factor=base"],
            "only the forward divergence has such parts, not reverse",
        ),
    ):
        with pytest.raises(UserErrors, match=why):
            config_of(tmp_path, *given)
    assert config_of(tmp_path, "regularizer.kind=kl", "regularizer.positions=all")


def test_anchors_whose_text_is_measured_under_another_name_are_refused(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)
    (tmp_path / "copy.txt").write_text((tmp_path / "fox.txt").read_text() + "\n")
    anchors = {"path": str(tmp_path / "copy.txt"), "window_tokens": 32}
    recipe["regularizer"]["anchors"] = anchors
    config = load_config(write_recipe(tmp_path, recipe))
    with pytest.raises(RuntimeError, match=r"anchors: 1 of its 1 texts are also in retention.fox"):
        run_distributed(train_each, 1, {tmp_path / "run": config})


def test_data_of_which_all_is_learned_are_refused(tmp_path: Path) -> None:
    """A text whose format is found by looking at it."""
    recipe = tiny_recipe(tmp_path)
    recipe["data"]["train"] = [{"path": str(tmp_path / "fox.txt")}]
    recipe["regularizer"]["positions"] = "all"
    config = load_config(write_recipe(tmp_path, recipe))
    with pytest.raises(RuntimeError, match=r"positions is all, but every token of .* is learned"):
        run_distributed(train_each, 1, {tmp_path / "run": config})
