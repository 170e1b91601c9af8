"""What stands beside the divergences: each against its formula, written in the plainest way."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

import moored
from moored.adapted import adapters_off
from moored.config import Config, Regularizer, load_config
from moored.data import TrainStream, load_samples
from moored.data.batch import Batch, collate
from moored.loss.divergence import Objective, Scales
from moored.models.base_files import resolve_base
from moored.models.policy import PolicyModel, load_policy
from moored.training.step import needs_kl, objective_of, weight_at
from moored.utils.errors import UserErrors
from tiny import ALONE, tiny_recipe, write_recipe, write_text


def config_of(folder: Path, *overrides: str) -> Config:
    return load_config(write_recipe(folder, tiny_recipe(folder)), list(overrides))


def trained(config: Config) -> PolicyModel:
    """A policy whose adapters are no longer 0."""
    policy = load_policy(Path(config.model.name_or_path), config, ALONE)
    g = torch.Generator().manual_seed(3)
    for parameter in policy.trainable().values():
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=g)
    return policy


def first_batch(config: Config) -> Batch:
    return stream_of(config).next_step(dp_rank=0, dp_size=1)[0]


def stream_of(config: Config) -> TrainStream:
    located = resolve_base(config.model, ALONE)
    samples = load_samples(config.data.train, located.tokenizer, config.data, located.vocab_size)
    return TrainStream(config, located.tokenizer, samples)


@pytest.mark.parametrize("extra", ["adapter.use_rslora=false", "adapter.use_rslora=true"])
def test_l2_is_the_squared_norm_of_the_product_and_so_is_its_gradient(tmp_path, extra):
    config = config_of(tmp_path, "regularizer.kind=l2", "regularizer.weight=0.3", extra)
    policy, batch = trained(config), first_batch(config)
    scale = 8.0 / (math.sqrt(4) if extra.endswith("true") else 4)

    def gradients(l2_scale: float) -> tuple[float, dict[str, torch.Tensor]]:
        policy.zero_grad()
        how = {"objective": Objective(), "scales": Scales(1e-6), "l2_scale": l2_scale}
        loss, _ = policy(batch, use=PolicyModel.loss, **how)
        loss.backward()
        return float(loss.detach()), {n: p.grad.clone() for n, p in policy.trainable().items()}

    loss, with_penalty = gradients(0.3)
    without, plain = gradients(0.0)
    factors = {n: p.detach().double().requires_grad_() for n, p in policy.trainable().items()}
    norm = sum(
        (scale * factors[n.replace("lora_A", "lora_B")] @ a).square().sum()
        for n, a in factors.items()
        if "lora_A" in n
    )
    (0.3 * norm).backward()
    assert policy.product_norm() == pytest.approx(float(norm), rel=1e-5)
    assert loss - without == pytest.approx(0.3 * float(norm), rel=1e-5)
    for name, factor in factors.items():
        ours, theirs = (with_penalty[name] - plain[name]).double(), factor.grad
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm(), name


def test_the_first_tokens_of_each_answer_weigh_differently(tmp_path):
    config = config_of(tmp_path, "data.packing=true")
    policy, batch = trained(config), first_batch(config)
    with torch.no_grad(), adapters_off(policy):
        reference = policy(batch)
    objective = Objective(first_tokens=2, first_tokens_factor=5.0)
    how = {"objective": objective, "scales": Scales(0.01, 0.5)}
    loss, sums = policy(batch, use=PolicyModel.loss, reference_hidden=reference, **how)
    rows = policy(batch, use=PolicyModel.drift, reference_hidden=reference)
    weights, place = [], 0
    for at, before in zip(batch.target_index, [-9, *batch.target_index[:-1]], strict=True):
        place = place + 1 if at == before + 1 else 0
        weights.append(5.0 if place < 2 else 1.0)
    assert 5.0 in weights
    assert 1.0 in weights
    expected = 0.01 * rows.ce_policy.sum() + 0.5 * (torch.tensor(weights) * rows.tmkl).sum()
    assert float(loss.detach()) == pytest.approx(float(expected), rel=1e-5)
    assert float(sums.kl_sum) == pytest.approx(float(rows.tmkl.sum()), rel=1e-5)


@pytest.mark.parametrize(("kind", "weighting"), [("asft", "probability"), ("eaft", "entropy")])
def test_baselines_that_weigh_targets_do_so_in_the_policy(tmp_path, kind, weighting):
    """Gradients of the adapters, against the weighted cross-entropy by Hugging Face's forward."""
    config = config_of(tmp_path, f"regularizer.kind={kind}")
    policy, batch = trained(config), first_batch(config)
    objective = objective_of(config.regularizer)
    assert objective.ce_weighting == weighting
    loss, _ = policy(batch, use=PolicyModel.loss, objective=objective, scales=Scales(0.1))
    loss.backward()
    ours = {n: p.grad.clone() for n, p in policy.trainable().items()}
    policy.zero_grad()
    logits = (
        policy.causal_lm(
            input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False
        )
        .logits.flatten(0, 1)[batch.target_index]
        .double()
    )
    p = logits.softmax(1)
    if kind == "asft":
        weights = p.gather(1, batch.targets[:, None]).squeeze(1)
    else:
        top = p.sort(1, descending=True).values[:, :20]
        top = top / top.sum(1, keepdim=True)
        weights = -(top * top.log()).sum(1) / math.log(20)
    ce = torch.nn.functional.cross_entropy(logits, batch.targets, reduction="none")
    expected = 0.1 * (weights.detach() * ce).sum()
    expected.backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    for name, parameter in policy.trainable().items():
        assert (ours[name] - parameter.grad).norm() <= 1e-4 * parameter.grad.norm(), name


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ({"kind": "none"}, Objective(mask_target=False)),
        ({"kind": "tmkl"}, Objective()),
        (
            {"kind": "tmkl", "direction": "jsd", "temperature": 2.0, "token_weighting": "entropy"},
            Objective(direction="jsd", temperature=2.0, kl_weighting="entropy"),
        ),
        (
            {"kind": "kl", "direction": "reverse", "first_tokens": 3, "first_tokens_factor": 2.0},
            Objective("reverse", False, first_tokens=3, first_tokens_factor=2.0),
        ),
        ({"kind": "asft"}, Objective(mask_target=False, ce_weighting="probability")),
        ({"kind": "eaft"}, Objective(mask_target=False, ce_weighting="entropy")),
        ({"kind": "stm", "max_perplexity": 4.0}, Objective(mask_target=False)),
        (
            {"kind": "mol", "direction": "reverse", "anchors": {"path": "general.txt"}},
            Objective("reverse", mask_target=False),
        ),
    ],
)
def test_what_a_recipe_says_is_what_is_descended(recipe, expected):
    if "first_tokens" not in recipe:
        expected = replace(expected, first_tokens_factor=Regularizer().first_tokens_factor)
    assert objective_of(Regularizer(**recipe)) == expected


def test_an_option_of_the_loss_is_handed_on_by_those_between_recipe_and_maths():
    """They name none of them: a new one touches the recipe, the objective and the maths alone."""
    options = {option.name for option in fields(Objective)}
    assert options > {"direction", "temperature"}
    for path in ("training/step", "models/engine", "models/policy", "models/zero", "loss/chunks"):
        words = set(re.findall(r"\w+", (Path(moored.__file__).parent / f"{path}.py").read_text()))
        assert not words & options, path


def test_the_weight_over_the_steps():
    plain = Regularizer(kind="tmkl", weight=2.0)
    assert [weight_at(step, 10, plain) for step in (0, 5, 9)] == [2.0, 2.0, 2.0]
    falling = Regularizer(kind="tmkl", weight=2.0, schedule="linear", end_ratio=0.5)
    assert [weight_at(step, 10, falling) for step in (0, 5)] == [2.0, 1.5]
    assert weight_at(10, 10, falling) == 1.0
    rising = Regularizer(kind="l2", weight=1.0, schedule="cosine", end_ratio=3.0)
    values = [weight_at(step, 10, rising) for step in range(11)]
    assert values == sorted(values)
    assert values[5] == pytest.approx(2.0)
    assert values[10] == pytest.approx(3.0)
    warm = Regularizer(kind="kl", weight=1.0, warmup_steps=4)
    assert [weight_at(step, 10, warm) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_a_part_of_the_targets_is_drawn_anew_each_step_and_alike_on_every_mesh(tmp_path):
    overrides = ("regularizer.token_fraction=0.3", "train.epochs=3", "train.steps=null")
    config = config_of(tmp_path, *overrides)
    streams = [stream_of(config) for _ in range(3)]
    num_kl, num_targets, drawn = 0, 0, []
    for _ in range(12):
        (whole,) = (streams[0].next_step(dp_rank=0, dp_size=1),)
        halves = [
            batch
            for rank in range(2)
            for batch in streams[1 + rank].next_step(dp_rank=rank, dp_size=2)
        ]
        kept = [
            sorted(
                (int(y), bool(k))
                for batch in batches
                for y, k in zip(batch.targets, batch.kl_mask, strict=True)
            )
            for batches in (whole, halves)
        ]
        assert kept[0] == kept[1]
        drawn.append(kept[0])
        num_kl += sum(batch.num_kl for batch in whole)
        num_targets += sum(batch.num_targets for batch in whole)
    # Four standard deviations of a share drawn so often.
    assert abs(num_kl / num_targets - 0.3) < 4 * math.sqrt(0.3 * 0.7 / num_targets)
    # The second pass over the same samples draws others.
    passes = [sorted(itertools.chain(*drawn[i : i + 4])) for i in (0, 4)]
    assert [y for y, _ in passes[0]] == [y for y, _ in passes[1]]
    assert passes[0] != passes[1]


def test_replayed_rows_come_beside_each_batch(tmp_path):
    old = write_text(tmp_path / "old.txt")
    config = config_of(
        tmp_path, "regularizer.kind=replay", f"regularizer.replay=[{{path: {old}}}]",
        "regularizer.replay_fraction=0.5",
    )  # fmt: skip
    located = resolve_base(config.model, ALONE)
    stream = TrainStream.of_replay(config, located.tokenizer, located.vocab_size, 4)
    assert stream.total_steps() == 4
    for _ in range(4):
        batches = stream.next_step(dp_rank=0, dp_size=1)
        ids = [name for batch in batches for name in batch.sample_ids]
        assert len(ids) == 3  # of 6 rows
        assert all(name.startswith("old.txt") for name in ids)
        assert collate([], 0).num_targets == 0


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["regularizer.kind=replay"], "regularizer.replay: kind is replay, but there is no text"),
        (
            ["regularizer.kind=l2", "parallel.zero_stage=3"],
            "l2 is not done with parallel.zero_stage",
        ),
        (["regularizer.kind=l2", "adapter.method=dora"], "l2 is not done with adapter.method"),
        (
            ["regularizer.kind=eaft", "regularizer.weight=2"],
            "regularizer.weight: would be ignored, since kind is eaft",
        ),
        (
            ["regularizer.budget={retention_increase_pct: 1, drift_nats_per_token: 1}"],
            "exclude each other: keep one",
        ),
        (["regularizer.budget={every: 3}"], "is missing: set one of them"),
        (
            ["regularizer.budget={retention_increase_pct: 1}", "regularizer.schedule=cosine"],
            "regularizer.schedule: would be ignored, since budget moves the weight",
        ),
        (["regularizer.end_ratio=0.5"], "regularizer.end_ratio: would be ignored"),
        (["regularizer.budget={retention_increase_pct: 1, probe: {}}"], "path, hub or builtin"),
        (["regularizer.token_fraction=0"], "greater than 0"),
        (["regularizer.every=9"], "regularizer.every: 9 is more than train.steps 4"),
        (
            ["compare=[{kind: none}, {kind: l2}]", "adapter.method=randlora"],
            "compare.1.kind: l2 is not done with adapter.method",
        ),
        (
            ["regularizer.budget={retention_increase_pct: 1, probe: {path: TRAINED}}"],
            "regularizer.budget.probe: is also in data.train: a budget needs text that is not",
        ),
        (
            [
                "regularizer.budget={retention_increase_pct: 1, "
                "probe: {path: TRAINED, domain_field: d, domain: law}}"
            ],
            "regularizer.budget.probe: is also in data.train",
        ),
        (
            [
                "regularizer.budget={retention_increase_pct: 1, "
                "probe: {path: a.jsonl, domain_field: d}}"
            ],
            "budget.probe.domain_field: a probe is one text: name one of its domains",
        ),
        (
            ["regularizer.warmup_steps=4"],
            "regularizer.warmup_steps: 4 is not less than train.steps 4",
        ),
        (
            ["regularizer.budget={retention_increase_pct: 1}", "regularizer.end_ratio=0.1"],
            "regularizer.end_ratio: would be ignored",
        ),
        (
            [
                "compare=[{kind: none}, {kind: replay, replay: [{path: old.txt}], "
                "budget: {retention_increase_pct: 1, probe: {path: old.txt}}}]"
            ],
            "compare.1.budget.probe: is also in compare.1.replay",
        ),
    ],
)
def test_what_makes_no_sense_is_refused_in_a_line(tmp_path, overrides, says):
    trained = str(tmp_path / "train.jsonl")
    with pytest.raises(UserErrors) as caught:
        config_of(tmp_path, *(override.replace("TRAINED", trained) for override in overrides))
    assert any(says in problem for problem in caught.value.problems), caught.value.problems
    assert len(caught.value.problems) == 1


def test_what_an_arm_does_not_take_over_is_no_fault_of_its_own(tmp_path):
    arms = "compare=[{kind: none}, {budget: {retention_increase_pct: 3}}]"
    config = config_of(tmp_path, "regularizer.schedule=linear", "regularizer.end_ratio=0.1", arms)
    assert [arm.schedule for arm in config.compare] == ["constant", "constant"]


def test_asft_without_its_kl_is_dft_and_needs_no_reference(tmp_path):
    regularizer = config_of(tmp_path, "regularizer.kind=asft", "regularizer.weight=0").regularizer
    assert not needs_kl(0, regularizer)
    assert needs_kl(0, regularizer.model_copy(update={"weight": 0.1}))


def test_a_corpus_that_the_probe_is_a_domain_of_is_watched(tmp_path):
    config = config_of(
        tmp_path,
        "retention={a: {path: b.jsonl, domain_field: d}, b: {path: b.jsonl, domain_field: d, "
        "domain: art}, c: {path: c.jsonl}}",
        "regularizer.budget={retention_increase_pct: 1, probe: {path: b.jsonl, domain_field: d, "
        "domain: law}}",
    )
    assert config.budget_watched() == ["a"]
