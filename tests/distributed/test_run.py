"""Whole runs: how they end, what they leave, and what the next command makes of that.

The runs of one test share a process, since starting one costs more than a tiny run.
"""

from __future__ import annotations

import json
import math
import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from distributed.runner import run_distributed
from moored.config import Config, load_config
from moored.data import TrainStream
from moored.evaluation import evaluate, evaluate_command
from moored.export import run_command as export
from moored.tracking.journal import metrics, read_journal
from moored.training import compare, setup, train
from moored.utils.errors import (
    EvaluationFailedError,
    PreemptedError,
    TrainingRefusedError,
    UserError,
)
from tiny import tiny_recipe, write_chats, write_recipe


def recipe_of(folder: Path, *overrides: str, **sections: Any) -> Config:
    recipe = tiny_recipe(folder)
    recipe["compare"] = [{"kind": "none"}, {"kind": "tmkl", "weight": 0.5}]
    for name, values in sections.items():
        recipe[name] |= values
    return load_config(write_recipe(folder, recipe), list(overrides))


def state(run: Path) -> dict[str, Any]:
    return json.loads((run / "state.json").read_text())


def report(run: Path) -> dict[str, Any]:
    return json.loads((run / "report/report.json").read_text())


def in_one_process(test: Callable[[Path], None], folder: Path) -> None:
    run_distributed(_alone, 1, test, folder, timeout=300)


def _alone(rank: int, world_size: int, test: Callable[[Path], None], folder: Path) -> None:
    torch.distributed.destroy_process_group()  # a run makes and leaves its own
    test(folder)


# -- a comparison ------------------------------------------------------------------------------


def comparing(folder: Path) -> None:
    config = recipe_of(folder, "evaluation.exact_match=true", "evaluation.max_new_tokens=4")
    path = compare.run(config)
    arms = report(path)["arms"]
    assert list(arms) == ["none", "tmkl"]
    assert arms["tmkl"]["weight"] == 0.5
    assert state(path)["status"] == "done"
    assert all(state(path / "arms" / name)["status"] == "done" for name in arms)
    page = (path / "report/report.html").read_text()
    assert page.count('<svg class="plot panel') >= 2
    assert (path / "report/frontier.png").read_bytes().startswith(b"\x89PNG")
    for arm in arms.values():
        figures_fit_together(arm)
    before = (path / "arms/tmkl/adapter/adapter_model.safetensors").stat().st_mtime_ns
    compare.run(config)  # a finished one is left as it is
    assert (path / "arms/tmkl/adapter/adapter_model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="is a comparison: name its arms"):
        evaluate_command.run_command([str(path)])

    # Adapters alone: what made them is not known, and each has a report of its own.
    for name in arms:
        shutil.copytree(path / "arms" / name / "adapter", folder / name)
    targets = [str(folder / name) for name in arms]
    with pytest.raises(UserError, match="without a recipe"):
        evaluate_command.run_command(targets)
    evaluate_command.run_command(targets, recipe=folder / "tiny.yaml", out=folder / "out")
    for name in arms:
        [(label, arm)] = json.loads((folder / "out" / name / "report.json").read_text())[
            "arms"
        ].items()
        assert (label, arm["kind"], arm["weight"], arm["seed"]) == (name, "adapter", None, None)
        expected = arms[name]["adaptation_ppl"]
        assert arm["adaptation_ppl"] == pytest.approx(expected, rel=1e-6)


def figures_fit_together(arm: dict[str, Any]) -> None:
    """What is known of a text's blocks, stretches, tokens and examples adds up to its figures."""
    blocks, where = arm["retention_blocks"]["fox"], arm["where"]["fox"]
    num_tokens, drift = sum(blocks["num_tokens"]), arm["drift_nats_per_token"]["fox"]
    ppl, base_ppl = (math.exp(sum(blocks[k]) / num_tokens) for k in ("ce", "ce_base"))
    assert ppl == pytest.approx(arm["retention_ppl"]["fox"], rel=1e-6)
    assert 100 * (ppl / base_ppl - 1) == pytest.approx(
        arm["retention_increase_pct"]["fox"], rel=1e-4
    )
    low, high = arm["retention_increase_interval_pct"]["fox"]
    assert low < arm["retention_increase_pct"]["fox"] < high
    assert sum(blocks["kl"]) / num_tokens == pytest.approx(drift, rel=1e-6)
    assert 0 < arm["drift_alternatives_nats_per_token"]["fox"] < drift
    stretches = where["stretches"]
    assert sum(s["num_tokens"] for s in stretches) == num_tokens
    total = sum(s["num_tokens"] * s["drift"] for s in stretches)
    assert total / num_tokens == pytest.approx(drift, rel=1e-6)
    assert 0 < sum(token["share"] for token in where["tokens"]) <= 1 + 1e-9
    drifts = [spot["drift"] for spot in where["spots"]]
    assert drifts == sorted(drifts, reverse=True)
    assert len(drifts) == 8
    assert drifts[0] > drift


def test_a_comparison_and_its_adapters(tmp_path):
    in_one_process(comparing, tmp_path)


# -- scales ------------------------------------------------------------------------------------


def scaling(folder: Path) -> None:
    """Parts of an adapter: as measured in place, so as exported and loaded from disk."""
    config = recipe_of(folder)
    path = train.run(config)
    trained = report(path)["arms"]["tmkl"]
    evaluate_command.run_command([str(path)], scales=[1.0, 0.5, 1e-9])
    assert report(path)["arms"] == {"tmkl": trained}  # the run's own report stays
    # By another recipe: what trained it is still its own.
    other = recipe_of(folder, "regularizer.kind=none", train={"seed": 9})
    (folder / "other.yaml").write_text(other.dump_yaml())
    evaluate_command.run_command([str(path)], recipe=folder / "other.yaml", out=folder / "other")
    again = json.loads((folder / "other/report.json").read_text())["arms"]
    own = ("kind", "weight", "seed", "setting", "adapter", "direction")
    assert [again["tmkl"][key] for key in own] == [trained[key] for key in own]
    scales = json.loads((path / "scales/report.json").read_text())
    arms, base = scales["arms"], scales["base"]
    assert {name: arm["scale"] for name, arm in arms.items()} == {
        "tmkl-scale1e-09": 1e-9,
        "tmkl-scale0.5": 0.5,
        "tmkl": None,
    }
    assert arms["tmkl"]["adaptation_ppl"] == trained["adaptation_ppl"]
    least = arms["tmkl-scale1e-09"]
    assert least["adaptation_ppl"] == pytest.approx(base["adaptation_ppl"], rel=1e-6)
    assert least["drift_nats_per_token"]["fox"] < 1e-9
    half = arms["tmkl-scale0.5"]
    drifts = [arm["drift_nats_per_token"]["fox"] for arm in (least, half, arms["tmkl"])]
    assert drifts == sorted(drifts)
    assert drifts[1] < 0.6 * drifts[2]
    assert "scales of the adapter" in (path / "scales/report.html").read_text()

    export(path, folder / "half", scale=0.5)
    settings = json.loads((folder / "half/adapter_config.json").read_text())
    assert settings["lora_alpha"] == config.adapter.alpha / 2
    assert json.loads((folder / "half/export.json").read_text())["scale"] == 0.5
    evaluate_command.run_command(
        [str(folder / "half")], recipe=path / "config.yaml", out=folder / "out"
    )
    [exported] = json.loads((folder / "out/report.json").read_text())["arms"].values()
    assert exported["adaptation_ppl"] == pytest.approx(half["adaptation_ppl"], rel=1e-6)
    for bad in (0.0, -1.0, float("nan")):
        with pytest.raises(UserError, match=r"--scale .*: a finite number above 0"):
            evaluate_command.run_command([str(path)], scales=[bad])
        with pytest.raises(UserError, match=r"--scale .*: a finite number above 0"):
            export(path, folder / "bad", scale=bad)
    dora = recipe_of(folder / "dora", adapter={"method": "dora"}, train={"steps": 2})
    path = train.run(dora)
    with pytest.raises(UserError, match="this one is not: leave it out"):
        evaluate_command.run_command([str(path)], scales=[0.5])
    with pytest.raises(UserError, match="this one is not: leave it out"):
        export(path, folder / "bad", scale=0.5)
    assert not (folder / "bad").exists()


def test_parts_of_an_adapter(tmp_path):
    in_one_process(scaling, tmp_path)


# -- ends --------------------------------------------------------------------------------------


def failing_to_evaluate(folder: Path) -> None:
    config = recipe_of(folder)
    measure = train._measure

    def broken(run: Any, suite: Any, **options: Any) -> Any:
        raise RuntimeError("out of something")

    train._measure = broken
    with pytest.raises(EvaluationFailedError, match="moored evaluate"):
        train.run(config)
    train._measure = measure
    run = config.output.dir / "tiny"
    assert state(run)["status"] == "evaluation_failed"
    (run / "report").mkdir(exist_ok=True)
    (run / "report/report.json").write_text("")  # as a crash may leave it
    assert (run / "adapter/adapter_model.safetensors").exists()
    evaluate_command.run_command([str(run)])  # what the error says
    assert (state(run)["status"], state(run)["exit_code"]) == ("done", 0)
    [(name, arm)] = report(run)["arms"].items()
    assert (name, arm["num_steps"]) == ("tmkl", 4)
    assert arm["tokens_per_second"] > 0
    assert '<svg class="plot panel' in (run / "report/report.html").read_text(), (
        "the curves are lost"
    )


def test_the_remedy_for_a_failed_evaluation(tmp_path):
    in_one_process(failing_to_evaluate, tmp_path)


def stopped_while_evaluating(folder: Path) -> None:
    config = recipe_of(folder, train={"save_every": 100})
    drift = evaluate.Engine.drift

    def signalled(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return drift(*arguments)

    for every, step in ((2, 2), (None, 4)):
        evaluate.Engine.drift = signalled
        stopped = recipe_of(folder, f"name=every{every}", evaluation={"every": every})
        with pytest.raises(PreemptedError, match=f"after step {step} of 4; step {step} is saved"):
            train.run(stopped)
        run = config.output.dir / f"every{every}"
        assert state(run)["status"] == "preempted"
        evaluate.Engine.drift = drift
        train.run(stopped)
        assert state(run)["status"] == "done"
        found = metrics(run)["eval/adaptation_perplexity"]
        assert [at for at, _ in found] == sorted({step, 4}), "what was stopped was left out"


def test_a_signal_during_an_evaluation_saves_and_leaves(tmp_path):
    in_one_process(stopped_while_evaluating, tmp_path)


def on_a_full_disk(folder: Path) -> None:
    config = recipe_of(folder, adapter={"r": 16}, train={"save_every": 1})
    run = config.output.dir / "tiny"
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Between the size of the adapter, which is exported, and of the optimizer's three times that.
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, limits[1]))
    train.run(config)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert state(run)["status"] == "done"
    adapter = (run / "adapter/adapter_model.safetensors").stat().st_size
    assert 100_000 < adapter < 300_000 < 3 * adapter, "not a test"
    assert list((run / "checkpoints").iterdir()) == [], "half a checkpoint was left"
    journal = (run / "journal.jsonl").read_text()
    assert journal.count('"checkpoint_failed"') == 4


def test_a_disk_too_full_for_checkpoints_does_not_end_a_run(tmp_path):
    in_one_process(on_a_full_disk, tmp_path)


def poisoned(folder: Path) -> None:
    config = recipe_of(folder, train={"steps": 6})
    load = setup.load_policy

    def poisoning(*arguments: Any) -> Any:
        policy = load(*arguments)
        next(iter(policy.trainable().values())).register_hook(lambda grad: grad * float("nan"))
        return policy

    setup.load_policy = poisoning
    with pytest.raises(TrainingRefusedError, match="5 updates in a row"):
        train.run(config)
    run = config.output.dir / "tiny"
    assert state(run)["status"] == "refused"
    assert "samples of this rank: train.jsonl:" in (run / "logs/rank-0.log").read_text()


def test_updates_that_are_not_finite_end_the_run(tmp_path):
    in_one_process(poisoned, tmp_path)


def over_budget(folder: Path) -> None:
    budget = "{retention_increase_pct: 1e-6, every: 1, max_weight: 0.01, probe: {path: FOX}}"
    budget = budget.replace("FOX", str(folder / "fox.txt"))
    text = f"regularizer.budget={budget}"
    optim = {"learning_rate": 0.05}
    config = recipe_of(folder, text, "regularizer.weight=0.01", optim=optim, train={"steps": 20})
    # Given up as soon as the greatest weight has been too little three times in a row.
    with pytest.raises(TrainingRefusedError, match=r"broken: after step \d+ .*last step is saved"):
        train.run(config)
    run = config.output.dir / "tiny"
    assert state(run)["status"] == "refused"
    step = state(run)["step"]
    assert step < 20
    assert (run / f"checkpoints/step-{step:08d}/adapter/adapter_model.safetensors").exists()
    with pytest.raises(UserError, match=r"status is refused after .*: mend that in the recipe"):
        export(run, folder / "exported")
    measured = [
        line["values"] for line in read_journal(run / "journal.jsonl")
        if line["kind"] == "metrics" and "budget/weight" in line["values"]
    ]  # fmt: skip
    assert len(measured) == step
    assert [values["budget/weight"] for values in measured][-3:] == [0.01] * 3
    assert measured[-1]["budget/retention_increase_pct"] > 0

    # Measured at the end alone, it is trained, exported and reported before it is refused.
    late = [text.replace("every: 1", "every: 100"), "name=late", "regularizer.weight=0.001"]
    with pytest.raises(TrainingRefusedError, match="the budget was broken: after step 4"):
        train.run(recipe_of(folder, *late, optim=optim))
    run = config.output.dir / "late"
    assert state(run)["status"] == "refused"
    assert (run / "adapter/adapter_model.safetensors").exists()
    assert report(run)["arms"]["tmkl"]["budget_held"] is False
    export(run, folder / "exported")
    assert "was **not held**" in (folder / "exported/README.md").read_text()
    card = json.loads((folder / "exported/forgetting-card.json").read_text())
    assert card["figures"]["budget_held"] is False
    with open(run / "adapter/adapter_model.safetensors", "r+b") as file:
        file.truncate(100)
    with pytest.raises(UserError, match="is not as it was written: copy it again from"):
        export(run, folder / "again")

    # Given up at the last step: the same.
    last = [text, "name=last", "regularizer.weight=0.01", "train.steps=3"]
    with pytest.raises(TrainingRefusedError, match=r"after step 3 .*the adapter is in"):
        train.run(recipe_of(folder, *last, optim=optim))
    run = config.output.dir / "last"
    assert (run / "adapter/adapter_model.safetensors").exists()
    assert report(run)["arms"]["tmkl"]["budget_held"] is False

    # Or goes on, if the recipe says so.
    on = [late[0].replace("every", "when_broken: continue, every"), "name=on", late[2]]
    train.run(recipe_of(folder, *on, optim=optim))
    assert state(config.output.dir / "on")["status"] == "done"
    [arm] = report(config.output.dir / "on")["arms"].values()
    assert arm["budget_held"] is False
    assert arm["budget"] == "1e-06 % of perplexity on fox.txt"
    assert arm["budget_lost"] > 1e-6


def test_a_broken_budget_ends_the_run_as_the_recipe_says(tmp_path):
    in_one_process(over_budget, tmp_path)


def drift_budget(folder: Path) -> None:
    """Nats per token of the base's own distribution, on the text that the report measures, too."""
    probe = f"{{path: {folder / 'fox.txt'}, max_tokens: 2000, window_tokens: 64}}"
    budget = (
        "regularizer.budget={drift_nats_per_token: 0.004, every: 1, tolerance: 0.5, "
        f"max_weight: 300, probe: {probe}}}"
    )
    free = ["regularizer.kind=none", "name=free", "train.steps=40"]
    drifts = {}
    for overrides in (free, [budget, "regularizer.weight=3", "train.steps=40"]):
        run = train.run(recipe_of(folder, *overrides, optim={"learning_rate": 0.005}))
        [arm] = report(run)["arms"].values()
        drifts[run.name] = arm["drift_nats_per_token"]["fox"]
    assert drifts["free"] > 0.02, "nothing to hold"
    assert arm["budget"] == "0.004 nats per token on fox.txt"
    assert arm["budget_held"] is True
    assert arm["budget_lost"] == pytest.approx(drifts["tiny"], rel=1e-5)
    assert 0.001 < drifts["tiny"] < 0.006


def test_a_budget_of_drift_is_held(tmp_path):
    in_one_process(drift_budget, tmp_path)


def every_second_step(folder: Path) -> None:
    """At the first step policy and base are equal, so a KL there moves nothing."""
    runs = []
    for name, every, weight in (("second", 2, 0.5), ("all", 1, 1.0)):
        text = [f"regularizer.every={every}", f"regularizer.weight={weight}", f"name={name}"]
        runs.append(train.run(recipe_of(folder, *text, "train.steps=2", optim={"eps": 1e-3})))
    shown = [
        [line["values"] for line in read_journal(run / "journal.jsonl")
         if line["kind"] == "metrics" and "train/loss" in line["values"]]
        for run in runs
    ]  # fmt: skip
    assert "train/tmkl_nats_per_token" not in shown[0][0]
    for name in ("train/loss", "train/tmkl_nats_per_token", "train/regularizer_weight"):
        assert shown[0][1][name] == pytest.approx(shown[1][1][name], rel=1e-6)
    assert shown[0][1]["train/tmkl_nats_per_token"] > 0
    first, second = (load_file(run / "adapter/adapter_model.safetensors") for run in runs)
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], rtol=1e-5, atol=1e-7)


def test_a_divergence_on_every_second_step_acts_with_twice_its_weight(tmp_path):
    in_one_process(every_second_step, tmp_path)


def one_arm_over_budget(folder: Path) -> None:
    budget = (
        f"compare.0.budget={{retention_increase_pct: 1.0e-6, max_weight: 0.01, every: 100, "
        f"probe: {{path: {folder / 'fox.txt'}, max_tokens: 2000, window_tokens: 64}}}}"
    )
    optim = {"learning_rate": 0.05}
    arms = [budget, "compare.0.kind=tmkl", "compare.0.weight=0.001", "compare.1.kind=none"]
    arms.append("compare_seeds=[4]")
    config = recipe_of(folder, *arms, optim=optim)
    with pytest.raises(
        TrainingRefusedError, match="arm tmkl-seed4: the budget was broken: after step 4"
    ):
        compare.run(config)
    path = config.output.dir / "tiny"
    assert (state(path)["status"], state(path)["exit_code"]) == ("refused", 3)
    assert state(path / "arms/tmkl-seed4")["status"] == "refused"
    assert state(path / "arms/none-seed4")["status"] == "done"
    arms = report(path)["arms"]
    held = {name: arm["budget_held"] for name, arm in arms.items()}
    assert held == {"tmkl-seed4": False, "none-seed4": None}
    assert [arm["seed"] for arm in arms.values()] == [4, 4]
    page = (path / "report/report.html").read_text()
    assert "The budget of tmkl-seed4 (1e-06 % of perplexity on fox.txt) was BROKEN" in page


def test_an_arm_that_breaks_its_budget_does_not_keep_the_others_from_running(tmp_path):
    in_one_process(one_arm_over_budget, tmp_path)


def on_other_data(folder: Path) -> None:
    config = recipe_of(folder, train={"save_every": 2})
    seen = TrainStream.next_step

    def cut(self: Any, **place: int) -> Any:
        if self.step == 3:
            raise KeyboardInterrupt
        return seen(self, **place)

    TrainStream.next_step = cut
    with pytest.raises(KeyboardInterrupt):
        train.run(config)
    assert state(config.output.dir / "tiny")["status"] == "interrupted"
    TrainStream.next_step = seen
    write_chats(folder / "train.jsonl", count=25)
    with pytest.raises(UserError, match="not those that the run began with"):
        train.run(config)
    write_chats(folder / "train.jsonl")
    train.run(config)
    assert state(config.output.dir / "tiny")["status"] == "done"


def test_a_run_goes_on_with_the_data_that_it_began_with(tmp_path):
    in_one_process(on_other_data, tmp_path)


def with_an_endless_warm_up(folder: Path) -> None:
    config = recipe_of(folder, train={"steps": None, "epochs": 1.0}, optim={"warmup_steps": 1000})
    with pytest.raises(UserError, match=r"warmup_steps=1000, but the run has 4 steps"):
        train.run(config)


def test_a_warm_up_longer_than_the_epochs_is_refused(tmp_path):
    in_one_process(with_an_endless_warm_up, tmp_path)


def out_of_memory(folder: Path) -> None:
    config = recipe_of(folder)

    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    evaluate.Engine.forward = full
    with pytest.raises(UserError, match=r"out of memory.*Lower train\.micro_batch_size"):
        train.run(config)
    assert state(config.output.dir / "tiny")["status"] == "failed"


def test_a_full_device_says_what_to_lower(tmp_path):
    in_one_process(out_of_memory, tmp_path)
