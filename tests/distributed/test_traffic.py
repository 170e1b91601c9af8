"""What `traffic.py` says is sent over the tensor-parallel axis is what a training step sends."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from distributed.runner import mostly_long, run_distributed
from distributed.test_tensor_parallel import ARCHITECTURES, config_of
from distributed.test_zero import anchored_batches, local_batches, step_once
from moored.config import Config
from moored.data import BaseIdentity
from moored.data.heldout import anchor_samples
from moored.distributed.mesh import start_mesh
from moored.distributed.traffic import (
    ENTROPY_NUMBERS,
    MicroBatch,
    Spread,
    micro_batch_traffic,
    update_traffic,
)
from moored.loss.divergence import NUM_TOPS
from moored.models.base_files import resolve_base
from moored.models.engine import Engine
from moored.models.policy import load_policy
from moored.training.doctor import _sharded, spread_of

WATCHED = {
    "all_reduce": 0,
    "all_gather_into_tensor": 0,
    "reduce_scatter_tensor": 1,
    "broadcast": 0,
}
NAMES = {"all_gather_into_tensor": "all_gather", "reduce_scatter_tensor": "reduce_scatter"}
OTHERS = ("all_gather", "reduce", "all_to_all", "send", "gather", "scatter")
ANCHORS = "regularizer.anchors={path: FOLDER/anchors.txt, window_tokens: 12, max_tokens: 96}"
CASES = [
    ("llama", "nf4", "forward", 1, 2, 0, "none"),
    ("llama", "nf4", "forward", 1, 2, 0, "non_reentrant"),
    ("llama", "nf4", "forward", 1, 2, 0, "non_reentrant", "train.checkpointed_layers=0.5"),
    ("llama", "none", "reverse", 1, 2, 2, "reentrant"),
    ("qwen2", "nf4", "jsd", 1, 2, 1, "none", "regularizer.temperature=2.0"),
    ("llama", "nf4", "forward", 1, 2, 0, "none", "regularizer.every=3"),  # a step without a KL
    ("gemma2", "none", "forward", 1, 2, 0, "none", "parallel.sequence_parallel=true"),
    ("llama", "none", "forward", 1, 2, 0, "non_reentrant", "parallel.sequence_parallel=true"),
    ("llama", "none", "forward", 1, 2, 0, "reentrant", "parallel.sequence_parallel=true"),
    ("qwen3", "nf4", "forward", 1, 2, 2, "none", "adapter.target_modules=[q_proj,o_proj]"),
    ("llama", "nf4", "jsd", 1, 2, 0, "none", "regularizer.token_weighting=entropy"),
    ("llama", "nf4", "forward", 1, 2, 0, "none", "regularizer.positions=all"),
    (
        *("llama", "nf4", "reverse", 1, 2, 2, "none"),
        *("regularizer.positions=all", "regularizer.token_fraction=0.5"),
    ),
    ("llama", "nf4", "jsd", 1, 2, 0, "none", "regularizer.positions=all", "regularizer.every=3"),
    ("llama", "nf4", "forward", 1, 2, 0, "none", ANCHORS),
    (
        *("llama", "nf4", "forward", 1, 2, 0, "none"),
        *("regularizer.kind=stm", "regularizer.max_perplexity=1e9"),
    ),
]


def sent_each(rank: int, world_size: int, configs: dict[Any, Config]) -> dict[Any, Any]:
    return {case: sent(config) for case, config in configs.items()}


def sent(config: Config) -> tuple[Counter, Counter]:
    """(kind, bytes) -> count, as seen in torch.distributed and as foretold."""
    mesh = start_mesh(config.parallel.tensor_parallel_degree)
    policy = load_policy(Path(config.model.name_or_path), config, mesh)
    engine = Engine(policy, config, mesh)
    step_once(engine, mesh, config, 0)
    seen: Counter = Counter()
    originals = {name: getattr(dist, name) for name in (*WATCHED, *OTHERS)}

    def watch(name: str) -> None:
        def watching(*args: Any, **kwargs: Any) -> Any:
            if kwargs.get("group") is mesh.tp.group:
                assert name in WATCHED, f"{name} is not accounted for"
                tensor = kwargs["tensor"] if "tensor" in kwargs else args[WATCHED[name]]
                if tensor.numel() > 1:  # the norm of the gradient is one number a step
                    size = tensor.numel() * tensor.element_size()
                    seen[NAMES.get(name, name), size] += 1
            return originals[name](*args, **kwargs)

        setattr(dist, name, watching)

    for name in originals:
        watch(name)
    try:
        step_once(engine, mesh, config, 1)
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
    return seen, foretold(config, mesh, policy)


def sent_by_kernels(rank: int, world_size: int, configs: dict[Any, Config]) -> dict[Any, Any]:
    """As on a GPU, in Triton's interpreter."""
    import moored.loss.chunks
    import moored.loss.head

    def kernels_run(logits: Any, dtype: torch.dtype) -> bool:
        return dtype == torch.float32

    moored.loss.chunks.kernels_run = moored.loss.head.kernels_run = kernels_run
    return sent_each(rank, world_size, configs)


def foretold(config: Config, mesh: Any, policy: Any) -> Counter:
    spread = spread_of(policy, config, mesh)
    total: Counter = Counter()
    for what in update_traffic(spread):
        total[what.kind, what.bytes_each] += what.count
    for batch in [*local_batches(config, mesh, 1), *anchored_batches(config, mesh, 1)]:
        rows, length = batch.input_ids.shape
        has_kl = config.regularizer.is_divergent and config.regularizer.every == 1
        num_kl, num_prompt = (batch.num_kl, batch.num_prompt) if has_kl else (0, 0)
        one = MicroBatch(
            rows=rows,
            length=length,
            num_targets=batch.num_targets,
            num_kl=num_kl,
            num_prompt=num_prompt,
            num_idle=len(batch.targets) - batch.num_targets - num_prompt,
            num_selected_from=batch.num_targets if config.regularizer.selects_targets else 0,
        )
        for what in micro_batch_traffic(spread, one):
            if what.count:
                total[what.kind, what.bytes_each] += what.count
    return total


def write_anchors(folder: Path) -> None:
    (folder / "anchors.txt").write_text(" ".join(f"anchor {i} holds" for i in range(60)))


def with_folder(case: Any, folder: Path) -> Any:
    return tuple(p.replace("FOLDER", str(folder)) if isinstance(p, str) else p for p in case)


def told_by_doctor(rank: int, world_size: int, config: Config) -> tuple[str, list[Any]]:
    """Its line on sharding, and what each kind of micro-batch really has of rows and length."""
    mesh = start_mesh(2)
    policy = load_policy(Path(config.model.name_or_path), config, mesh)
    located = resolve_base(config.model, mesh)
    base = BaseIdentity(model=config.model, revision=located.source.revision)
    anchors = anchor_samples(config, located.tokenizer, base)
    batch = max(anchored_batches(config, mesh, 1), key=lambda batch: batch.input_ids.numel())
    rows, length = batch.input_ids.shape
    one = MicroBatch(rows=rows, length=length, num_targets=0, num_kl=0, num_prompt=batch.num_prompt)
    sent = micro_batch_traffic(spread_of(policy, config, mesh), one)
    size = sum(s.wire_bytes(2) for s in sent) / 1e6
    expected = [rows, length, f"{size:,.1f}", sum(s.count for s in sent)]
    return _sharded(policy, config, mesh, anchors), expected


def test_doctor_counts_the_rows_of_anchors(tmp_path):
    write_anchors(tmp_path)
    case = with_folder(next(case for case in CASES if ANCHORS in case), tmp_path)
    config = config_of(tmp_path, (*case, "train.micro_batch_size=1"))
    line, (rows, length, size, count) = run_distributed(told_by_doctor, 2, config)[0]
    assert "sends" in line
    says = f"one of anchors ({rows} x {length}, 0.5 beside each) {size} MB per rank in {count} "
    assert says in line, line


@pytest.fixture(scope="module")
def counted(tmp_path_factory, chosen) -> dict[Any, Any]:
    folder = tmp_path_factory.mktemp("traffic")
    write_anchors(folder)
    configs = {case: config_of(folder, with_folder(case, folder)) for case in chosen(CASES)}
    return run_distributed(sent_each, 2, configs)[0]


@pytest.mark.parametrize(
    "case",
    mostly_long(CASES, CASES[0], CASES[6], CASES[11], CASES[-1]),
    ids=lambda case: "-".join(map(str, case)),
)
def test_what_a_step_sends_is_what_was_foretold(counted, case):
    seen, expected = counted[case]
    assert seen == expected
    assert sum(seen.values()) > 10


@pytest.mark.long
def test_more_layers_send_more(tmp_path, monkeypatch):
    """The count per layer, which two layers alone would not pin."""
    deep = ARCHITECTURES["llama"] | {"num_hidden_layers": 4}
    monkeypatch.setitem(ARCHITECTURES, "llama", deep)
    cases = [case for case in CASES if case[0] == "llama" and len(case) in (7, 8)][:7]
    configs = {case: config_of(tmp_path, case) for case in cases}
    for seen, expected in run_distributed(sent_each, 2, configs)[0].values():
        assert seen == expected


def test_weights_by_entropy_send_what_the_loss_gathers():
    assert ENTROPY_NUMBERS == NUM_TOPS


def test_one_rank_sends_nothing():
    spread = Spread(
        degree=1, hidden_size=8, num_layers=2, activation_bytes=4, shared_adapter_sizes=[8]
    )
    batch = MicroBatch(rows=1, length=4, num_targets=3, num_kl=3)
    assert micro_batch_traffic(spread, batch) == []


def test_bytes_on_the_wire_are_those_of_a_ring():
    spread = Spread(
        degree=8, hidden_size=8192, num_layers=80, activation_bytes=2, shared_adapter_sizes=[]
    )
    batch = MicroBatch(rows=1, length=8192, num_targets=8192, num_kl=8192)
    layers = next(s for s in micro_batch_traffic(spread, batch) if s.where == "layers")
    assert layers.count == 2 * 160 + 159
    assert layers.wire_bytes(8) == 2 * 7 / 8 * layers.count * 8192 * 8192 * 2


BY_KERNELS = [
    ("llama", "none", "forward", 1, 2, 0, "none"),
    ("llama", "none", "jsd", 1, 2, 0, "none", "regularizer.temperature=2.0"),
    ("llama", "none", "forward", 1, 2, 0, "none", "regularizer.token_weighting=entropy"),
]


def test_the_kernels_send_fewer_bytes_and_as_many_as_foretold(tmp_path):
    configs = {case: config_of(tmp_path, case) for case in BY_KERNELS}
    in_fp64 = run_distributed(sent_each, 2, configs)[0]
    for case, (seen, expected) in run_distributed(sent_by_kernels, 2, configs)[0].items():
        assert seen == expected
        by_torch = in_fp64[case][0]
        assert (seen != by_torch) is (case != BY_KERNELS[2]), "what is weighted is torch's"
