"""ZeRO 0 to 3 over real processes gives the losses and the adapter of one process.

Derived tolerance. Everything is fp32 and the same numbers are summed in another order:
micro-batches within a rank, then ranks. A gradient is a sum of K = 6 per-sample terms, each with
the rounding of its own backward, so its error is about K * 2**-24 ~ 4e-7 of the terms' norm, here
below 0.1: 4e-8. Adam with eps = 1e-3 (tiny.py) moves the weights by lr * m / (sqrt(v) + eps), so an
error e of the gradient moves them by at most 2 * lr * e / eps per step: in four steps at lr = 5e-3
by 2e-6 in norm. Hence 1e-5, relative: losses each, adapters in the 2-norm.

Importing torch, transformers and DeepSpeed costs each process more than training a tiny model: so
all cases of one world size share its processes, and each test looks at its own case.
"""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distributed.runner import mostly_long, run_distributed
from moored.config import Config, load_config
from moored.data import BaseIdentity, TrainStream
from moored.data.batch import Batch, Sample, batches_of
from moored.data.heldout import anchor_samples
from moored.distributed.mesh import Mesh, start_mesh
from moored.loss.divergence import Objective, Scales
from moored.models import engine as engines
from moored.models import loading
from moored.models.base_files import resolve_base
from moored.models.engine import Engine
from moored.models.engine import adamw as plain_adamw
from moored.models.policy import load_policy
from moored.training import checkpoint
from moored.training.step import StepStats, objective_of, train_step
from moored.utils.errors import UserError
from tiny import tiny_recipe, write_recipe

STEPS = 3


def global_batch(step: int, vocab_size: int = 259) -> list[list[Sample]]:
    """Six samples of unequal length and unequal numbers of targets."""
    generator = np.random.default_rng(step)
    rows = []
    for i, length in enumerate([5, 17, 9, 30, 12, 7]):
        mask = generator.random(length) < (0.2 + 0.15 * i)
        mask[-1] = True
        ids = generator.integers(3, vocab_size, length).astype(np.int32)
        rows.append([Sample(sample_id=f"{step}:{i}", input_ids=ids, label_mask=mask)])
    return rows


def build(config: Config) -> tuple[Mesh, Engine]:
    parallel = config.parallel
    mesh = start_mesh(
        parallel.tensor_parallel_degree,
        context_parallel_degree=parallel.context_parallel_degree,
        zero_hpz_partition_size=parallel.zero_hpz_partition_size,
    )
    policy = load_policy(Path(config.model.name_or_path), config, mesh)
    return mesh, Engine(policy, config, mesh)


def train(config: Config) -> dict:
    """Three updates; what every rank must agree on."""
    mesh, engine = build(config)
    stats = [step_once(engine, mesh, config, step) for step in range(STEPS)]
    result = {
        "loss": [s.loss for s in stats],
        "kl": [s.kl or 0.0 for s in stats],
        "kl_prompt": [s.kl_prompt or 0.0 for s in stats],
        "kl_anchors": [s.kl_anchors or 0.0 for s in stats],
        "grad_norm": [s.grad_norm for s in stats],
        "penalty": [s.penalty or 0.0 for s in stats],
        "weight": [s.weight for s in stats],
        "learned": [1.0 if s.learned_fraction is None else s.learned_fraction for s in stats],
        "adapter": engine.adapter_tensors(),
        "optimizer": engine.optimizer_tensors(),
        "written": engine.optimizer_tensors(wanted=mesh.is_main),
    }
    engine.close()
    return result


def step_once(engine: Engine, mesh: Mesh, config: Config, step: int) -> StepStats:
    return train_step(
        engine,
        local_batches(config, mesh, step),
        mesh,
        step=step,
        regularizer=config.regularizer,
        learning_rate=5e-3,
        seed=config.train.seed,
        replayed=replayed_batches(config, mesh, step),
        anchored=anchored_batches(config, mesh, step),
    )


def replayed_batches(config: Config, mesh: Mesh, step: int) -> list[Batch]:
    if config.regularizer.kind != "replay":
        return []
    located = resolve_base(config.model, mesh)
    stream = TrainStream.of_replay(config, located.tokenizer, located.vocab_size, STEPS)
    for _ in range(step):
        stream.next_step(dp_rank=0, dp_size=1)
    return stream.next_step(**mesh.share)


def anchored_batches(config: Config, mesh: Mesh, step: int) -> list[Batch]:
    if config.regularizer.anchors is None:
        return []
    located = resolve_base(config.model, mesh)
    base = BaseIdentity(model=config.model, revision=located.source.revision)
    windows = anchor_samples(config, located.tokenizer, base)
    stream = TrainStream.of_anchors(config, located.tokenizer, windows, max(STEPS, step + 1))
    for _ in range(step):
        stream.next_step(dp_rank=0, dp_size=1)
    return stream.next_step(**mesh.share)


def local_batches(config: Config, mesh: Mesh, step: int) -> list[Batch]:
    rows = global_batch(step)
    if config.regularizer.token_fraction < 1:
        rows = [[replace(one, kl_mask=one.input_ids % 3 > 0) for one in row] for row in rows]
    return batches_of(
        rows,
        micro_batch_size=config.train.micro_batch_size,
        **mesh.share,
        pad_token_id=0,
        all_positions=config.regularizer.holds_prompt,
    )


def train_each(rank: int, world_size: int, configs: dict[Any, Config]) -> dict[Any, dict]:
    return {case: train(config) for case, config in configs.items()}


def by_case(results: list[dict[Any, dict]]) -> dict[Any, list[dict]]:
    """case -> what each rank returned."""
    return {case: [ranks[case] for ranks in results] for case in results[0]}


def recipe_config(folder: Path, *overrides: str) -> Config:
    return load_config(write_recipe(folder, tiny_recipe(folder)), list(overrides))


def assert_same(run: dict, expected: dict) -> None:
    for key in ("loss", "kl", "kl_prompt", "kl_anchors", "grad_norm"):
        if key not in expected:  # by who trained without them
            continue
        np.testing.assert_allclose(run[key], expected[key], rtol=1e-5, atol=1e-7, err_msg=key)
    for name, tensor in expected["adapter"].items():
        distance = (run["adapter"][name] - tensor).norm() / tensor.norm()
        assert distance < 1e-5, f"{name}: {distance}"
    assert run["optimizer"].keys() == expected["optimizer"].keys()


def largest_buffers(rank: int, world_size: int, configs: dict[int, Config]) -> dict[int, int]:
    """Most elements that were asked for at once, by stage."""
    empty, sizes = torch.empty, {stage: [0] for stage in configs}
    for stage, config in configs.items():

        def spied(*size: Any, to: list[int] = sizes[stage], **options: Any) -> torch.Tensor:
            made = empty(*size, **options)
            to.append(made.numel())
            return made

        torch.empty = spied
        try:
            train(config)
        finally:
            torch.empty = empty
    return {stage: max(found) for stage, found in sizes.items()}


def test_zero_asks_for_no_buffer_of_gigabytes(tmp_path):
    """By default DeepSpeed's bucket of gradients has 5e8 elements, whatever is trained."""
    configs = {s: recipe_config(tmp_path, f"parallel.zero_stage={s}") for s in (1, 2, 3)}
    [found] = run_distributed(largest_buffers, 1, configs)
    assert found.keys() == {1, 2, 3}
    assert all(0 < size <= 2**24 for size in found.values()), found


CHECKPOINTING = ["none", "reentrant", "non_reentrant"]
# Every stage with every kind of checkpointing, and with offload where the recipe takes it.
STAGES = [
    *((stage, kind) for stage in range(4) for kind in CHECKPOINTING),
    *((stage, "offload") for stage in (1, 2, 3)),
    (3, "half"),
]
# Rows of unequal length in every micro-batch, and weights that depend on the policy.
BASELINES = {
    "l2": ("regularizer.kind=l2", "regularizer.weight=3"),
    "eaft": ("regularizer.kind=eaft",),
    "asft": ("regularizer.kind=asft", "regularizer.weight=0.5"),
    "stm": ("regularizer.kind=stm", "regularizer.max_perplexity=270"),
    "replay": (
        "regularizer.kind=replay",
        "regularizer.replay=[{path: FOLDER/fox.txt}]",
        "regularizer.replay_fraction=0.5",
    ),
    "entropy": ("regularizer.token_weighting=entropy", "regularizer.first_tokens=2"),
    "anchors": (
        "regularizer.anchors={path: FOLDER/train.jsonl, text_field: prompt, window_tokens: 24, "
        "weight: 30.0}",
    ),
    "mol": (
        "regularizer.kind=mol",
        "regularizer.anchors={path: FOLDER/train.jsonl, text_field: prompt, window_tokens: 24, "
        "weight: 30.0}",
    ),
    "prompt": (
        "regularizer.positions=all",
        "regularizer.prompt_weight=0.7",
        "regularizer.token_fraction=0.6",
        "regularizer.first_tokens=2",
    ),
}
ALONE = (1, 1, 0)  # world, micro-batch, stage
SPLITS = [(1, 6, 0), (1, 4, 2), (2, 3, 3), (4, 1, 2)]


def of_split(folder: Path, split: tuple[int, int, int]) -> Config:
    _, size, stage = split
    overrides = (f"train.micro_batch_size={size}", f"parallel.zero_stage={stage}")
    return recipe_config(folder, *overrides)


def of_stage(folder: Path, stage: int, kind: str) -> Config:
    more = {
        "offload": ("parallel.offload=optimizer",),
        "half": ("train.gradient_checkpointing=non_reentrant", "train.checkpointed_layers=0.5"),
    }.get(kind, (f"train.gradient_checkpointing={kind}",))
    return recipe_config(folder, f"parallel.zero_stage={stage}", *more)


def of_baseline(folder: Path, name: str, *more: str) -> Config:
    overrides = (text.replace("FOLDER", str(folder)) for text in BASELINES[name])
    return recipe_config(folder, *more, *overrides)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory, chosen) -> dict:
    """The reference: stage 0, no checkpointing, micro-batches of one sequence; and other splits."""
    folder = tmp_path_factory.mktemp("one")
    splits = [ALONE, *(split for split in chosen(SPLITS) if split[0] == 1)]
    configs: dict[Any, Config] = {split: of_split(folder, split) for split in splits}
    configs |= {name: of_baseline(folder, name) for name in chosen(BASELINES)}
    return by_case(run_distributed(train_each, 1, configs))


@pytest.fixture(scope="module")
def expected(one_process) -> dict:
    return one_process[ALONE][0]


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory, chosen) -> dict:
    folder = tmp_path_factory.mktemp("two")
    configs: dict[Any, Config] = {case: of_stage(folder, *case) for case in chosen(STAGES)}
    for name in chosen(BASELINES):
        configs[name] = of_baseline(folder, name, "parallel.zero_stage=2")
    for split in chosen(SPLITS):
        if split[0] == 2:
            configs[split] = of_split(folder, split)
    return by_case(run_distributed(train_each, 2, configs))


@pytest.fixture(scope="module")
def four_processes(tmp_path_factory, chosen) -> dict:
    folder = tmp_path_factory.mktemp("four")
    configs = {split: of_split(folder, split) for split in chosen(SPLITS) if split[0] == 4}
    return by_case(run_distributed(train_each, 4, configs)) if configs else {}


@pytest.mark.parametrize(
    "case",
    mostly_long(
        STAGES, (0, "none"), (1, "none"), (2, "reentrant"), (3, "non_reentrant"), (2, "offload")
    ),
)
def test_two_processes_equal_one(two_processes, expected, case):
    first, second = two_processes[case]
    assert_same(first, expected)
    for name, tensor in first["adapter"].items():
        assert torch.equal(tensor, second["adapter"][name]), f"{name} differs between the ranks"
    assert first["loss"] == second["loss"]
    assert second["written"] == {}
    assert first["written"].keys() == first["optimizer"].keys()
    for name, tensor in first["written"].items():
        assert torch.equal(tensor, first["optimizer"][name]), name


@pytest.mark.parametrize("split", mostly_long(SPLITS, (1, 6, 0), (2, 3, 3)))
def test_the_split_of_a_global_batch_does_not_matter(
    one_process, two_processes, four_processes, expected, split
):
    """Unequal token counts per micro-batch included: 4 ranks have 2 batches of 1 or 0 samples."""
    by_world = {1: one_process, 2: two_processes, 4: four_processes}
    assert_same(by_world[split[0]][split][0], expected)


@pytest.mark.parametrize(
    "name", mostly_long(BASELINES, "stm", "mol", "replay", "prompt", "anchors")
)
def test_baselines_are_the_same_over_ranks(one_process, two_processes, expected, name):
    found = two_processes[name][0]
    assert_same(found, one_process[name][0])
    for key in ("penalty", "weight", "learned"):
        np.testing.assert_allclose(found[key], one_process[name][0][key], rtol=1e-5)
    for key, of in (("kl_prompt", ["prompt"]), ("kl_anchors", ["anchors", "mol"])):
        assert (min(found[key][1:]) > 0) == (name in of)
    assert all((0 < share < 1) == (name == "stm") for share in found["learned"])
    pairs = [(found["adapter"][n], tensor) for n, tensor in expected["adapter"].items()]
    distance = sum(float((a - b).norm() ** 2) for a, b in pairs) ** 0.5
    # Fifty times what the order of sums explains.
    assert distance > 5e-4 * sum(float(b.norm() ** 2) for _, b in pairs) ** 0.5


def gradients(rank: int, world_size: int, configs: dict[int, Config]) -> dict[int, dict]:
    """The summed gradients themselves, before any optimizer touches them (stage 0)."""
    results = {}
    for case, config in configs.items():
        mesh, engine = build(config)
        num_targets = sum(sample.num_targets for row in global_batch(0) for sample in row)
        generator = torch.Generator().manual_seed(1)
        for parameter in engine.policy.trainable().values():  # at B = 0, A has no gradient
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
        batches = local_batches(config, mesh, 0)
        for i, batch in enumerate(batches):
            reference = engine.reference(batch)
            scales = Scales(1 / num_targets, 0.5 / num_targets)
            loss, _ = engine.forward(batch, reference, Objective(), scales)
            engine.backward(loss, last=i == len(batches) - 1)
        results[case] = {n: p.grad.clone() for n, p in engine.policy.trainable().items()}
        engine.close()
    return results


@pytest.mark.long
def test_the_gradient_of_a_global_batch_is_one_number(tmp_path):
    """Micro-batches of 1, 2 and 6 samples on 1, 2 and 4 ranks."""
    found = {}
    for world_size, sizes in {1: (1, 2, 6), 2: (2, 1), 4: (1,)}.items():
        configs = {
            size: recipe_config(tmp_path, f"train.micro_batch_size={size}") for size in sizes
        }
        for rank, by_size in enumerate(run_distributed(gradients, world_size, configs)):
            found |= {(world_size, size, rank): g for size, g in by_size.items()}
    expected = found.pop((1, 1, 0))
    for case, gradient in found.items():
        for name, tensor in expected.items():
            assert tensor.norm() > 0, name
            distance = (gradient[name] - tensor).norm() / tensor.norm()
            assert distance < 1e-5, f"world, micro-batch, rank {case}, {name}: {distance}"


def poisoned(rank: int, world_size: int, configs: dict[Any, Config]) -> dict[Any, dict]:
    """The last rank's gradient becomes nan in the second of three updates."""
    results = {}
    for case, config in configs.items():
        mesh, engine = build(config)
        adapters, applied = [], []
        for step in range(3):
            handles = []
            if step == 1 and rank == world_size - 1:
                parameter = next(iter(engine.policy.trainable().values()))
                handles.append(parameter.register_hook(lambda grad: grad * float("nan")))
            applied.append(step_once(engine, mesh, config, step).applied)
            for handle in handles:
                handle.remove()
            adapters.append(engine.adapter_tensors())
        optimizer = engine.optimizer_tensors()
        engine.close()
        results[case] = {"applied": applied, "adapters": adapters, "optimizer": optimizer}
    return results


@pytest.mark.long
def test_a_poisoned_update_is_refused_on_all_ranks_alike(tmp_path):
    cases = [(stage, "none") for stage in range(4)] + [(s, "optimizer") for s in (1, 2, 3)]
    configs = {
        (stage, offload): recipe_config(
            tmp_path, f"parallel.zero_stage={stage}", f"parallel.offload={offload}"
        )
        for stage, offload in cases
    }
    for case, ranks in by_case(run_distributed(poisoned, 2, configs)).items():
        for result in ranks:
            assert result["applied"] == [True, False, True], case
            first, second, third = result["adapters"]
            for name in first:
                assert torch.equal(first[name], second[name]), (case, name)
                assert torch.isfinite(third[name]).all(), (case, name)
            assert any(not torch.equal(second[name], third[name]) for name in first), case
            steps = {v.item() for k, v in result["optimizer"].items() if k.endswith(".step")}
            assert steps == {2.0}, f"{case}: a refused update must not count for Adam"


def rehearsed(rank: int, world_size: int, configs: dict[Any, Config]) -> dict[Any, list[dict]]:
    """Two updates without a rehearsal, and with one before the first and one before the second."""
    results: dict[Any, list[dict]] = {}
    for case, config in configs.items():
        for rehearses in (False, True):
            mesh, engine = build(config)
            largest = batches_of(
                [global_batch(7)[3]] * 2, micro_batch_size=2, dp_rank=0, dp_size=1, pad_token_id=0
            )[0]
            losses, states = [], []
            for step in range(2):
                if rehearses:
                    torch.manual_seed(step)
                    before = torch.get_rng_state()
                    kind = config.regularizer.kind
                    objective = objective_of(config.regularizer)
                    engine.rehearse(
                        largest, objective, with_kl=kind == "tmkl", l2_scale=float(kind == "l2")
                    )
                    assert torch.equal(torch.get_rng_state(), before)
                    assert all(p.grad is None for p in engine.policy.trainable().values())
                losses.append(step_once(engine, mesh, config, step).loss)
                states.append(engine.optimizer_tensors())
            engine.close()
            results.setdefault(case, []).append({"losses": losses, "states": states})
    return results


REHEARSED = {
    **{f"stage {stage}": (f"parallel.zero_stage={stage}",) for stage in range(4)},
    "offload": ("parallel.zero_stage=2", "parallel.offload=optimizer"),
    "l2": BASELINES["l2"],
    "dropout": ("parallel.zero_stage=2", "adapter.dropout=0.2"),
}


@pytest.fixture(scope="module")
def with_rehearsal(tmp_path_factory, chosen) -> dict[Any, list[dict]]:
    folder = tmp_path_factory.mktemp("rehearsed")
    configs = {name: recipe_config(folder, *REHEARSED[name]) for name in chosen(REHEARSED)}
    return run_distributed(rehearsed, 2, configs)[0]


@pytest.mark.parametrize("name", mostly_long(REHEARSED, "stage 0", "stage 2", "stage 3"))
def test_a_rehearsal_leaves_no_trace(with_rehearsal, name):
    without, with_one = with_rehearsal[name]
    assert without["losses"] == with_one["losses"]
    for before, after in zip(without["states"], with_one["states"], strict=True):
        assert before.keys() == after.keys()
        for key, tensor in before.items():
            assert torch.equal(after[key], tensor), key


def fused_adamw(groups: list[list[torch.nn.Parameter]], config: Config) -> torch.optim.AdamW:
    """As on a GPU: torch has the same kernel for a CPU."""
    plain = plain_adamw(groups, config)
    assert not plain.defaults["fused"]
    names = ("lr", "betas", "eps", "weight_decay")
    parameters = [{"params": group} for group in groups]
    return torch.optim.AdamW(parameters, fused=True, **{n: plain.defaults[n] for n in names})


def fused(rank: int, world_size: int, configs: dict[int, Config]) -> dict[int, list[dict]]:
    """Four updates in one go, without and with the fused optimizer, and two and two with it."""
    results = {}
    for stage, config in configs.items():
        found = []
        for make, stops in ((plain_adamw, False), (fused_adamw, False), (fused_adamw, True)):
            engines.adamw = make
            mesh, engine = build(config)
            for step in range(4):
                if stops and step == 2:
                    kept = engine.optimizer_tensors()
                    engine.close()
                    policy = load_policy(Path(config.model.name_or_path), config, mesh)
                    checkpoint.load_masters(kept, policy)
                    engine = Engine(policy, config, mesh)
                    engine.load_optimizer_tensors(kept)
                step_once(engine, mesh, config, step)
            found.append(engine.optimizer_tensors())
            engine.close()
        results[stage] = found
    return results


def test_the_fused_optimizer_of_a_gpu_makes_the_same_updates_and_resumes(tmp_path):
    configs = {stage: recipe_config(tmp_path, f"parallel.zero_stage={stage}") for stage in range(4)}
    [results] = run_distributed(fused, 1, configs)
    for stage, (plain, whole, resumed) in results.items():
        for name, tensor in plain.items():
            distance = (whole[name] - tensor).norm() / tensor.norm()
            assert distance < 1e-5, f"{stage}, {name}: {distance}"
            assert torch.equal(resumed[name], whole[name]), (stage, name)


def leave_bitsandbytes_layers(model: torch.nn.Module, dtype: torch.dtype) -> int:
    """Leave the layers as they are, but for the repacking in eval mode on CPUs with AVX512-BF16.

    A repacked layer has no backward at all.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return 1


def packed_bytes_alive(rank: int, world_size: int, configs: dict[Any, Config]) -> dict[Any, dict]:
    """Bytes of gathered 4-bit weights that are alive after a forward, beside this rank's shards."""
    results = {}
    for case, config in configs.items():
        if case == "bitsandbytes' own layer":
            loading.make_zero_safe = leave_bitsandbytes_layers
        mesh, engine = build(config)
        assert engine.policy.partition is not None
        parts = [buffer.part for buffer in engine.policy.partition.buffers]
        shards = {part.untyped_storage().data_ptr() for part in parts}
        packed = [p for p in engine.policy.parameters() if type(p).__name__ == "Params4bit"]
        # Layers are gathered into one buffer; a view of one weight keeps all of it.
        sizes = {len(part) * world_size for part in parts}
        for step in range(2):  # a layer is fetched ahead only once a whole step has been seen
            step_once(engine, mesh, config, step)
        batch = local_batches(config, mesh, 2)[0]
        reference = engine.reference(batch)
        loss, _ = engine.forward(batch, reference, Objective(), Scales(1 / 10, 1 / 10))
        gc.collect()
        alive = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
            for t in gc.get_objects()
            if isinstance(t, torch.Tensor) and t.dtype == torch.uint8
        }
        # What a 4-bit node of the autograd graph keeps by itself is not among Python's objects.
        nodes, queue = set(), [loss.grad_fn]
        while queue:
            node = queue.pop()
            if node is None or node in nodes:
                continue
            nodes.add(node)
            queue += [following for following, _ in node.next_functions]
            if "4Bit" in type(node).__name__:
                kept = [*(node.saved_tensors or ()), *(getattr(node, "tensors", None) or ())]
                for tensor in kept:
                    if tensor is not None and tensor.dtype == torch.uint8:
                        storage = tensor.untyped_storage()
                        alive[storage.data_ptr()] = storage.nbytes()
        results[case] = {
            "alive": sum(n for place, n in alive.items() if place not in shards and n in sizes),
            "layer": sum(p.numel() for p in packed) // config_layers(engine),
            "whole": sum(p.numel() for p in packed),
            "head": engine.policy.head.weight.nbytes,
        }
        engine.backward(loss, last=True)
        engine.close()
    return results


def config_layers(engine: Engine) -> int:
    return engine.policy.causal_lm.get_base_model().config.num_hidden_layers


@pytest.mark.long
def test_packed_bytes_alive_under_zero_3_are_at_most_two_layers(tmp_path):
    """One at work, here the head, and one ahead."""
    wide = {"hidden_size": 512, "intermediate_size": 768, "num_hidden_layers": 4, "head_dim": 128}
    recipe = tiny_recipe(tmp_path, num_key_value_heads=4, **wide)
    configs: dict[Any, Config] = {
        kind: load_config(
            write_recipe(tmp_path, recipe),
            ["parallel.zero_stage=3", f"train.gradient_checkpointing={kind}"],
        )
        for kind in CHECKPOINTING
    }
    configs["bitsandbytes' own layer"] = configs["non_reentrant"]  # the measure must see its bytes
    results = by_case(run_distributed(packed_bytes_alive, 2, configs))
    for kind in CHECKPOINTING:
        for result in results[kind]:
            assert result["whole"] == 4 * result["layer"] > 0
            assert 0 < result["alive"] <= 2 * result["layer"], (kind, result)
            assert result["alive"] <= result["head"] + result["layer"], (kind, result)
    for result in results["bitsandbytes' own layer"]:
        assert result["alive"] > 3 * result["layer"], result


# ---------------------------------------------------------------- over a part of the ranks


def parts_of(rank: int, world_size: int, configs: dict[str, Config]) -> dict[str, dict]:
    found = {name: train(config) for name, config in configs.items()}
    mesh, engine = build(configs["hpz"])
    partition = engine.policy.partition
    assert partition is not None
    held = sum(buffer.part.nbytes for buffer in partition.buffers)
    whole = sum(buffer.nbytes for buffer in partition.buffers)
    ranks = torch.distributed.get_process_group_ranks(mesh.shards.group)
    engine.close()
    with pytest.raises(UserError, match="zero_hpz_partition_size=3 does not divide the 4"):
        start_mesh(1, zero_hpz_partition_size=3)
    return found | {"cut": {"held": held, "whole": whole, "ranks": ranks}}


def test_the_base_may_be_cut_over_the_ranks_of_a_machine_alone(tmp_path):
    """Four ranks as two machines of two: the numbers of ZeRO-2 over all four, bit for bit."""
    configs = {
        name: recipe_config(tmp_path, *options, "train.gradient_checkpointing=non_reentrant")
        for name, options in {
            "hpz": ("parallel.zero_stage=3", "parallel.zero_hpz_partition_size=2"),
            "all": ("parallel.zero_stage=3",),
            "zero-2": ("parallel.zero_stage=2",),
        }.items()
    }
    results = run_distributed(parts_of, 4, configs)
    for rank, found in enumerate(results):
        assert found["cut"]["ranks"] == [[0, 1], [2, 3]][rank // 2]
        assert found["cut"]["held"] * 2 == found["cut"]["whole"] > 0
        for name in ("hpz", "all"):
            assert found[name]["loss"] == found["zero-2"]["loss"]
            assert found[name]["grad_norm"] == found["zero-2"]["grad_norm"]
            for key, tensor in found["zero-2"]["adapter"].items():
                assert torch.equal(found[name]["adapter"][key], tensor), (name, key)
