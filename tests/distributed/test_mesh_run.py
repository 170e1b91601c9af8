"""Whole runs on a dp x tp mesh: checkpoints and adapters belong to no mesh.

Tolerances as in test_tensor_parallel.py: a mesh changes the order of sums, nothing else.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, RandLoraConfig, get_peft_model
from safetensors.torch import load_file

from distributed.runner import mostly_long, run_distributed
from distributed.test_resume import Cut, losses
from moored.config import Config, load_config
from moored.data.stream import TrainStream
from moored.distributed.mesh import start_mesh
from moored.evaluation import evaluate_command
from moored.models.engine import Engine
from moored.models.loading import load_base
from moored.models.policy import load_policy
from moored.training import compare, train
from moored.utils.errors import TrainingRefusedError, UserError
from tiny import ALONE, tiny_recipe, write_recipe

STEPS, CUT = 6, 4
MODEL: dict[str, Any] = {
    "intermediate_size": 320,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
}
MESHES = {"1x1": (1, 1, 0), "1x2": (2, 2, 3), "2x2": (4, 2, 2)}  # world size, degree, stage
COLUMNS = ["loss", "ce_nats_per_token", "tmkl_nats_per_token", "grad_norm"]
PLACES = [("2x2", "1x1"), ("2x2", "1x2"), ("1x1", "2x2"), ("1x2", "2x2"), ("1x2", "1x1")]


def recipe_of(folder: Path, *overrides: str, mesh: str = "1x1") -> Config:
    recipe = tiny_recipe(folder, **MODEL)
    recipe["train"] |= {"steps": STEPS, "save_every": 2}
    _, degree, stage = MESHES[mesh]
    place = [f"parallel.tensor_parallel_degree={degree}", f"parallel.zero_stage={stage}"]
    return load_config(write_recipe(folder, recipe), [*place, *overrides])


def run_all(rank: int, world_size: int, runs: list[tuple[Config, Path, bool]]) -> None:
    """Each run whole, or cut off in the middle of step CUT + 1."""
    original, left = TrainStream.next_step, [0]

    def next_step(self: TrainStream, **place: int) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise Cut
        return original(self, **place)

    TrainStream.next_step = next_step  # type: ignore[method-assign]
    for config, path, cut in runs:
        left[0] = CUT if cut else STEPS
        with pytest.raises(Cut) if cut else contextlib.nullcontext():
            train.run(config, path=path, parent=path.parent)
    TrainStream.next_step = original


def run_on(mesh: str, runs: list[tuple[Config, Path, bool]]) -> None:
    if runs:
        run_distributed(run_all, MESHES[mesh][0], runs)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, chosen) -> Path:
    """Whole runs on every mesh, and runs that begin on one and end on another."""
    folder = tmp_path_factory.mktemp("meshes")
    extra = ["evaluation.exact_match=true", "evaluation.max_new_tokens=6"]
    places = chosen(PLACES)
    for mesh in MESHES:
        config = recipe_of(folder, mesh=mesh)
        whole = [(recipe_of(folder, *extra, mesh=mesh), folder / mesh, False)]
        whole = whole if mesh in ("1x1", *chosen(MESHES)) else []
        run_on(mesh, whole + [(config, folder / f"{a}-{b}", True) for a, b in places if a == mesh])
    for mesh in MESHES:
        config = recipe_of(folder, mesh=mesh)
        run_on(mesh, [(config, folder / f"{a}-{b}", False) for a, b in places if b == mesh])
    return folder


def arm_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "report/report.json").read_text())["arms"]["tmkl"]


def assert_same_run(run: Path, expected: Path) -> None:
    found, wanted = losses(run), losses(expected)
    assert sorted(found) == list(range(1, STEPS + 1))
    for step, values in wanted.items():
        for key in map("train/{}".format, COLUMNS):
            assert found[step][key] == pytest.approx(values[key], rel=1e-5, abs=1e-7), (step, key)
    adapter = load_file(run / "adapter/adapter_model.safetensors")
    for name, tensor in load_file(expected / "adapter/adapter_model.safetensors").items():
        assert (adapter[name] - tensor).norm() <= 1e-5 * tensor.norm() + 1e-9, name


@pytest.mark.parametrize("place", mostly_long(PLACES, ("1x2", "1x1")), ids="-".join)
def test_a_checkpoint_resumes_on_any_other_mesh(folder, place):
    assert_same_run(folder / "-".join(place), folder / "1x1")


@pytest.mark.parametrize("mesh", mostly_long(["1x2", "2x2"], "1x2"))
def test_evaluation_and_generation_give_the_same_figures_on_every_mesh(folder, mesh):
    assert_same_run(folder / mesh, folder / "1x1")
    found, expected = arm_of(folder / mesh), arm_of(folder / "1x1")
    for key in ("adaptation_ppl", "final_loss"):
        assert found[key] == pytest.approx(expected[key], rel=1e-5)
    for name in ("adaptation_exact_match", "exact_match_tally"):
        assert found[name] == expected[name] is not None
    for key in ("retention_ppl", "drift_nats_per_token", "drift_tmkl_nats_per_token"):
        for name, value in expected[key].items():
            assert found[key][name] == pytest.approx(value, rel=1e-4), (key, name)


@pytest.mark.long
@pytest.mark.parametrize("mesh", ["2x2"])
def test_stock_peft_loads_the_export_of_a_mesh_with_equal_logits(folder, mesh):
    config = recipe_of(folder)
    path = Path(config.model.name_or_path)
    ids = torch.arange(20)[None] + 5
    adapter = str(folder / mesh / "adapter")
    with torch.no_grad():
        base, _ = load_base(path, config.model, ALONE, config.parallel)
        stock = PeftModel.from_pretrained(base, adapter).eval()
        theirs = stock(input_ids=ids, use_cache=False).logits
        with stock.disable_adapter():
            assert (stock(input_ids=ids, use_cache=False).logits - theirs).abs().max() > 1e-3
    [first, second] = run_distributed(logits_of, 2, recipe_of(folder, mesh="1x2"), adapter, ids)
    assert torch.equal(first, second)
    assert (first - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def logits_of(rank: int, world_size: int, config: Config, adapter: str, ids: Any) -> torch.Tensor:
    mesh = start_mesh(config.parallel.tensor_parallel_degree)
    policy = load_policy(Path(config.model.name_or_path), config, mesh, adapter=Path(adapter))
    policy.eval()
    with torch.no_grad():
        return policy.causal_lm(input_ids=ids, use_cache=False).logits


def measure_again(rank: int, world_size: int, run: Path, out: Path) -> None:
    evaluate_command.run_command([str(run)], out=out)


@pytest.mark.parametrize("mesh", ["1x2"])
@pytest.mark.parametrize("world_size", mostly_long([1, 2], 1))
def test_a_run_of_a_mesh_is_measured_by_one_process_or_several(folder, tmp_path, world_size, mesh):
    run_distributed(measure_again, world_size, folder / mesh, tmp_path / "out")
    found = json.loads((tmp_path / "out/report.json").read_text())["arms"]["tmkl"]
    assert found["adaptation_ppl"] == pytest.approx(
        arm_of(folder / "1x1")["adaptation_ppl"], rel=1e-5
    )


@pytest.mark.long
def test_a_comparison_on_a_mesh(tmp_path):
    config = recipe_of(tmp_path, mesh="1x2")
    config = config.model_copy(update={"compare": recipe_with_arms(tmp_path).compare})
    run_distributed(compare_all, 2, config)
    report = json.loads((config.output.dir / "tiny/report/report.json").read_text())
    assert list(report["arms"]) == ["none", "tmkl"]


def recipe_with_arms(folder: Path) -> Config:
    recipe = tiny_recipe(folder, **MODEL) | {"compare": [{"kind": "none"}, {"kind": "tmkl"}]}
    return load_config(write_recipe(folder, recipe, "arms.yaml"), [])


def compare_all(rank: int, world_size: int, config: Config) -> None:
    compare.run(config)


# -- what is refused ---------------------------------------------------------------------------


def refused(rank: int, world_size: int, config: Config, folder: Path) -> None:
    with pytest.raises(UserError, match="degree=3 does not divide the 2 processes"):
        start_mesh(3)
    mesh = start_mesh(2)
    policy = load_policy(Path(config.model.name_or_path), config, mesh)
    engine = Engine(policy, config, mesh)
    engine.require_equal_replicas()
    name = next(name for name in policy.trainable() if "q_proj.lora_A" in name)
    with torch.no_grad():
        engine._engine.module.get_parameter(name).view(-1)[0] += 1e-6 * rank
    with pytest.raises(TrainingRefusedError, match=r"q_proj\.lora_A.*differs between the ranks"):
        engine.require_equal_replicas()
    engine.close()

    path = Path(config.model.name_or_path)
    base, _ = load_base(path, config.model, ALONE, config.parallel)
    foreign = folder / f"foreign-{rank}"
    get_peft_model(base, RandLoraConfig(r=4, target_modules=["q_proj"])).save_pretrained(foreign)
    with pytest.raises(UserError, match=r"foreign-. is RANDLORA, which cannot be spread"):
        load_policy(path, config, mesh, adapter=foreign)
    pickled = folder / f"bin-{rank}"
    shutil.copytree(path, pickled, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(load_file(path / "model.safetensors"), pickled / "pytorch_model.bin")
    with pytest.raises(UserError, match="the folder has no safetensors"):
        load_base(pickled, config.model, mesh, config.parallel)


@pytest.mark.long
def test_what_would_not_be_exact_is_refused(tmp_path):
    run_distributed(refused, 2, recipe_of(tmp_path, mesh="1x2"), tmp_path)
