"""Rivals that look at the base, from the recipe to an update, with a tiny real model.

The expected losses and gradients are put together in fp64 from Hugging Face's own logits, sample by
sample: no packing, no chunks, no batch of ours.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dense_reference import divergence
from distributed.runner import run_distributed
from distributed.test_positions import (
    LAYOUTS,
    anchor_samples,
    config_of,
    config_with,
    engine_of,
    logits_of,
    samples,
    train_each,
)
from moored.adapted import dropout_off
from moored.config import Config, Regularizer
from moored.data.batch import Batch, collate
from moored.distributed.mesh import start_mesh
from moored.models.engine import Engine
from moored.tracking.journal import metrics
from moored.training.step import StepStats, train_step, weight_at
from moored.utils.errors import UserErrors
from tiny import ALONE


def update_of(
    engine: Engine, batches: list[Batch], regularizer: Regularizer, **more: Any
) -> tuple[StepStats, dict[str, Tensor]]:
    """An update that changes nothing, and the gradients that it would have been made by."""
    grads: dict[str, Tensor] = {}
    step = engine.step

    def watched(learning_rate: float) -> float:
        for name, parameter in engine.policy.trainable().items():
            assert parameter.grad is not None, name
            grads[name] = parameter.grad.clone()
        return step(learning_rate)

    how: dict[str, Any] = {"step": 0, "learning_rate": 0.0, "seed": 0, **more}
    engine.step = watched  # type: ignore[method-assign]
    try:
        return train_step(engine, batches, ALONE, regularizer=regularizer, **how), grads
    finally:
        engine.step = step  # type: ignore[method-assign]


def with_gradients(engine: Engine, loss: Tensor) -> dict[str, Tensor]:
    engine.policy.zero_grad()
    loss.backward()
    found = {n: p.grad.clone() for n, p in engine.policy.trainable().items() if p.grad is not None}
    engine.policy.zero_grad()
    return found


def policy_logits(engine: Engine, ids: np.ndarray) -> Tensor:
    """By Hugging Face's forward, [n, V], with a graph."""
    tokens = torch.from_numpy(ids.astype(np.int64))[None]
    with dropout_off(engine.policy):
        return engine.policy.causal_lm(input_ids=tokens, use_cache=False).logits[0].double()


def same_gradients(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Both are fp32 through the same layers: some 30 products of up to 256 terms, as 3e-5."""
    assert ours.keys() == theirs.keys()
    whole = sum(float(grad.norm() ** 2) for grad in theirs.values()) ** 0.5
    assert whole > 0
    for name, grad in theirs.items():
        assert (ours[name] - grad).norm() <= 3e-5 * whole, name


# ---------------------------------------------------------------- low-perplexity targets


def surprises(engine: Engine) -> list[dict[int, float]]:
    """Of each sample: the place of each learned token, and its perplexity under the base."""
    found = []
    for sample in samples():
        p = torch.softmax(logits_of(engine, sample)[1], 1)
        places = [at for at in range(1, len(sample)) if sample.label_mask[at]]
        found.append({at: 1 / float(p[at - 1, int(sample.input_ids[at])]) for at in places})
    return found


def selected(_rank: int, _world_size: int, config: Config) -> dict[str, float]:
    """Thresholds between which every target, some and none are learned, in each layout."""
    start_mesh(1)
    engine = engine_of(config)
    by_sample = surprises(engine)
    known = sorted(value for one in by_sample for value in one.values())
    between = [(a * b) ** 0.5 for a, b in pairwise(known)]
    fewest = min(max(one.values()) for one in by_sample)  # one sample is learned whole, others not
    some = next(value for value in between if value > fewest)
    empty = next(value for value in between if value > known[0])
    assert any(min(one.values()) > empty for one in by_sample), "a sample of which none is learned"
    shares = {}
    for most in (some, empty, 2 * known[-1], 0.5 * (1 + known[0])):
        kept = [sorted(at for at, value in one.items() if value <= most) for one in by_sample]
        number = sum(len(places) for places in kept)
        ces = []
        for sample, places in zip(samples(), kept, strict=True):
            s = policy_logits(engine, sample.input_ids)
            log_p = s - torch.logsumexp(s, 1, keepdim=True)
            ces += [-log_p[at - 1, int(sample.input_ids[at])] for at in places]
        regularizer = config.regularizer.model_copy(update={"max_perplexity": most})
        wanted = torch.stack(ces).sum() / number if number else None
        want = 0.0 if wanted is None else float(wanted.detach())
        exact = {} if wanted is None else with_gradients(engine, wanted)
        for layout, micro_batches in LAYOUTS.items():
            made = samples()
            batches = [
                collate([[made[i] for i in row] for row in rows], 0) for rows in micro_batches
            ]
            stats, grads = update_of(engine, batches, regularizer)
            assert stats.loss == pytest.approx(want, rel=2e-5), (layout, most)
            assert stats.ce == pytest.approx(want, rel=2e-5)
            assert stats.num_targets == number
            assert stats.learned_fraction == pytest.approx(number / len(known))
            assert stats.num_tokens == sum(len(sample) for sample in made)
            assert (stats.kl, stats.applied) == (None, True)
            if wanted is None:
                assert all(torch.count_nonzero(grad) == 0 for grad in grads.values())
            else:
                same_gradients(grads, exact)
        shares[f"{most:.6g}"] = number / len(known)
    engine.close()
    return shares


def test_targets_that_surprise_the_base_are_not_learned(tmp_path: Path) -> None:
    config = config_of(tmp_path, "regularizer.kind=stm", "model.quantization=none")
    (shares,) = run_distributed(selected, 1, config)
    some, few, every, none = shares.values()
    assert 0 < few < some < every == 1.0
    assert none == 0.0


def on_4_bits(_rank: int, _world_size: int, configs: list[Config]) -> list[list[float]]:
    """Losses of three updates; with a cache the base runs for the first alone."""
    start_mesh(1)
    found = []
    for config in configs:
        engine = engine_of(config)
        engine.keep_references(config, "one", 259)
        made = samples()
        batches = [collate([[made[i]] for i in rows], 0) for rows in ((0, 1), (2, 3))]
        how: dict[str, Any] = {"regularizer": config.regularizer, "learning_rate": 1e-2, "seed": 0}
        found.append([train_step(engine, batches, ALONE, step=i, **how).loss for i in range(3)])
        if engine.references is not None:
            assert (engine.references.num_computed, engine.references.num_read) == (2, 4)
        engine.close()
    return found


def test_the_base_says_so_once_where_its_states_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOORED_CACHE", str(tmp_path / "cache"))
    stm = ("regularizer.kind=stm", "regularizer.max_perplexity=270")
    plain, cached, everything = (
        config_of(tmp_path, *stm),
        config_of(tmp_path, *stm, "reference.cache=true"),
        config_of(tmp_path, "regularizer.kind=none"),
    )
    ((without, with_cache, all_learned),) = run_distributed(
        on_4_bits, 1, [plain, cached, everything]
    )
    assert with_cache == without
    assert all_learned != without


def test_a_run_that_learns_nothing_is_refused(tmp_path: Path) -> None:
    given = ("regularizer.kind=stm", "regularizer.max_perplexity=1.001", "retention={}")
    config = config_of(tmp_path, *given)
    why = r"4 updates in a row \(last at step 4\): no target has a perplexity under the base of at"
    with pytest.raises(RuntimeError, match=why):
        run_distributed(train_each, 1, {tmp_path / "run": config})
    curve = metrics(tmp_path / "run")["train/learned_targets_fraction"]
    assert [value for _, value in curve] == [0.0] * len(curve)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["regularizer.kind=stm", "regularizer.max_perplexity=1"], "greater than 1"),
        (["regularizer.max_perplexity=3"], "max_perplexity: would be ignored, since kind is tmkl"),
        (["regularizer.kind=stm", "regularizer.weight=2"], "weight: would be ignored"),
        (["regularizer.kind=stm", "regularizer.every=2"], "every: would be ignored"),
    ],
)
def test_what_has_no_meaning_for_it_is_refused(tmp_path: Path, given: list[str], says: str) -> None:
    with pytest.raises(UserErrors, match=says):
        config_of(tmp_path, *given)


# ---------------------------------------------------------------- KL on anchors, and nowhere else


def of_task_and_anchors(engine: Engine, direction: str) -> tuple[Tensor, Tensor]:
    """The cross-entropy of the one and the divergence of the other, each a mean, with a graph."""
    ces, kls = [], []
    for sample in samples():
        log_p = torch.log_softmax(policy_logits(engine, sample.input_ids), 1)
        places = [at for at in range(1, len(sample)) if sample.label_mask[at]]
        ces += [-log_p[at - 1, int(sample.input_ids[at])] for at in places]
    for sample in anchor_samples():
        s, (_, t) = policy_logits(engine, sample.input_ids), logits_of(engine, sample)
        kls += [divergence(s[at], t[at], direction) for at in range(len(sample) - 1)]
    return torch.stack(ces).mean(), torch.stack(kls).mean()


def anchored(_rank: int, _world_size: int, configs: list[Config]) -> None:
    """Cross-entropy on the task's rows, the divergence on the anchors', each over its own count."""
    start_mesh(1)
    made, anchors = samples(), anchor_samples()
    for config in configs:
        engine = engine_of(config)
        for weight in (2.5, 0.5):  # as a schedule or a budget moves it
            ce, kl = of_task_and_anchors(engine, config.regularizer.direction)
            want = ce + weight * kl
            exact = with_gradients(engine, want)
            for micro_batches in LAYOUTS.values():
                batches = [
                    collate([[made[i] for i in r] for r in rows], 0) for rows in micro_batches
                ]
                beside = [
                    collate([[anchors[i] for i in row] for row in rows], 0, all_positions=True)
                    for rows in ([[0, 1], [2]], [])
                ]
                stats, grads = update_of(
                    engine, batches, config.regularizer, anchored=beside, weight=weight
                )
                assert stats.loss == pytest.approx(float(want.detach()), rel=2e-5)
                assert stats.ce == pytest.approx(float(ce.detach()), rel=2e-5)
                assert stats.kl_anchors == pytest.approx(float(kl.detach()), rel=2e-5)
                assert (stats.kl, stats.kl_prompt, stats.weight) == (None, None, weight)
                same_gradients(grads, exact)
        engine.close()


def anchors_of(folder: Path, **more: object) -> str:
    options = {"path": folder / "fox.txt", "window_tokens": 32, **more}
    inner = ", ".join(f"{key}: {value}" for key, value in options.items())
    return f"regularizer.anchors={{{inner}}}"


def test_the_task_is_learned_and_the_anchors_are_held(tmp_path: Path) -> None:
    mol = ("regularizer.kind=mol", anchors_of(tmp_path, weight=2.5), "model.quantization=none")
    configs = [
        config_with(tmp_path, *mol, f"regularizer.direction={direction}")
        for direction in ("forward", "reverse", "jsd")
    ]
    run_distributed(anchored, 1, configs)


def every_second(_rank: int, _world_size: int, config: Config) -> None:
    start_mesh(1)
    engine = engine_of(config)
    batches = [collate([[sample] for sample in samples()], 0)]
    beside = [collate([[sample] for sample in anchor_samples()], 0, all_positions=True)]
    (first, _), (second, _) = (
        update_of(engine, batches, config.regularizer, anchored=beside, step=step)
        for step in range(2)
    )
    assert (first.kl_anchors, first.loss) == (None, pytest.approx(first.ce, rel=1e-9))
    assert second.kl_anchors is not None
    # Every second step with twice the weight, here of 0.75.
    assert second.loss == pytest.approx(second.ce + 1.5 * second.kl_anchors, rel=1e-6)
    engine.close()


def test_its_weight_is_that_of_the_anchors(tmp_path: Path) -> None:
    mol = ("regularizer.kind=mol", anchors_of(tmp_path, weight=0.75))
    run_distributed(every_second, 1, config_with(tmp_path, *mol, "regularizer.every=2"))
    regularizer = config_with(tmp_path, *mol, "regularizer.schedule=linear").regularizer
    assert [weight_at(step, 4, regularizer) for step in (0, 2, 4)] == [0.75, 0.375, 0.0]
    budget = "regularizer.budget={retention_increase_pct: 1}"
    assert config_with(tmp_path, *mol, budget).regularizer.kl_weight == 0.75


def test_a_run_runs_the_base_on_its_anchors_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOORED_CACHE", str(tmp_path / "cache"))
    given = (
        *("reference.cache=true", "reference.match=sample", "data.eval=[]", "train.steps=4"),
        *("regularizer.kind=mol", anchors_of(tmp_path, max_tokens=96, fraction=0.5)),
        "train.micro_batch_size=6",
    )
    path = tmp_path / "mol"
    run_distributed(train_each, 1, {path: config_with(tmp_path, *given)})
    curves = metrics(path)
    # Three windows beside each six rows, always the same three; nothing of the task.
    assert '"read":3,"computed":1' in (path / "journal.jsonl").read_text().replace(" ", "")
    held = [value for _, value in curves["train/kl_anchors_nats_per_token"]]
    assert held[0] == 0.0
    assert min(held[1:]) > 0
    assert {value for _, value in curves["train/regularizer_weight"]} == {1.0}
    assert "train/mol_nats_per_token" not in curves
    report = json.loads((path / "report" / "report.json").read_text())
    (arm,) = report["arms"].values()
    assert (arm["kind"], arm["weight"], arm["direction"]) == ("mol", 1.0, "forward")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["regularizer.kind=mol"], "anchors: kind is mol, but there is no text on which the base"),
        (["regularizer.weight=2"], "weight: would be ignored, since kind is mol, whose weight is"),
        (["regularizer.positions=all"], "positions: would be ignored, since kind is mol"),
        (["regularizer.first_tokens=2"], "first_tokens: would be ignored, since kind is mol"),
        (["regularizer.every=9"], "every: 9 is more than train.steps 4"),
    ],
)
def test_what_anchors_alone_do_not_know_is_refused(
    tmp_path: Path, given: list[str], says: str
) -> None:
    more = [] if given == ["regularizer.kind=mol"] else ["regularizer.kind=mol"]
    anchors = [anchors_of(tmp_path)] if more else []
    with pytest.raises(UserErrors, match=says):
        config_with(tmp_path, *given, *more, *anchors)


def test_an_arm_of_another_kind_takes_over_what_it_knows(tmp_path: Path) -> None:
    arms = "compare=[{kind: none}, {kind: mol}, {kind: tmkl}, {kind: stm}]"
    held = (anchors_of(tmp_path), "regularizer.weight=0.25", arms)
    none, mol, tmkl, stm = config_with(tmp_path, *held).compare
    assert none.anchors is stm.anchors is None
    assert mol.anchors == tmkl.anchors is not None
    assert (mol.kl_weight, tmkl.kl_weight) == (1.0, 0.25)
