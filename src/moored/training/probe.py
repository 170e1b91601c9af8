"""`moored probe`: a few steps of a recipe at its true size with random weights, beside its plan.

Nothing is downloaded and no data are read: sizes come from config.json, rows are random tokens of
full length. What was measured can be kept with the site's profile, where `moored plan` finds it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from moored.config import Config, Regularizer
from moored.data.batch import Batch, collate
from moored.data.token_arrays import Sample
from moored.distributed.mesh import Mesh, peak_memory_bytes
from moored.models.engine import Engine, leave
from moored.models.hub import resolve_model
from moored.models.policy import load_policy
from moored.plan.architecture import Architecture, find_architecture
from moored.plan.calibration import Calibration, keep
from moored.plan.gpus import Cluster, gpu_of_device
from moored.plan.memory_terms import GIB, torch_peak
from moored.plan.step_time import StepTime, step_time
from moored.plan.workload import Workload
from moored.training.lifecycle import join_mesh
from moored.training.step import train_step
from moored.utils.atomic_dir import write_json
from moored.utils.errors import UserError

HOST_TOKENS = 16  # of a row that a GPU is done with at once, so that the processor is what is timed
WARMUP = 2  # steps before the first that is timed
MOST_MICRO_BATCHES = 4  # of a probed step; each more costs as much as these
GPU_BOUND = 1.15  # a micro-batch takes so many times what the processor needs for it


@dataclass(frozen=True, slots=True, kw_only=True)
class Probed:
    """What was measured; seconds are medians of the steps, of the slowest rank.

    Attributes:
        device: the GPU by its driver's name, or `cpu`.
        world: processes.
        tokens: of a micro-batch, all of them targets.
        micro_batches: of a rank in a step of the recipe.
        load_seconds: from config.json to the quantised base with its adapters.
        loaded_bytes: that torch holds after it; of a CPU process, what is resident.
        peak_bytes: most that torch held; of a CPU process, that was resident.
        reserved_bytes: most that torch's allocator took from the GPU; 0 on a CPU.
        micro_batch_seconds: forward of both models, loss and backward.
        forward_seconds: of that, everything before the backward.
        reference_seconds: of that, what cross-entropy alone does not take.
        host_seconds: of a micro-batch of 16 tokens, i.e. the processor's part of any.
        update_seconds: the optimizer, and the sum of the adapter's gradients.
        loss: of the last step, to see that it is a number.
    """

    device: str
    world: int
    tokens: int
    micro_batches: int
    load_seconds: float
    loaded_bytes: int
    peak_bytes: int
    reserved_bytes: int
    micro_batch_seconds: float
    forward_seconds: float
    reference_seconds: float
    host_seconds: float
    update_seconds: float
    loss: float

    @property
    def step_seconds(self) -> float:
        """Seconds of a whole step of the recipe."""
        return self.micro_batches * self.micro_batch_seconds + self.update_seconds

    @property
    def is_gpu_bound(self) -> bool:
        """Whether the processor keeps the GPU busy."""
        return self.micro_batch_seconds > GPU_BOUND * self.host_seconds


def run(
    config: Config, *, steps: int = 10, out: Path | None = None, profile: Path | None = None
) -> Probed:
    """Probe a recipe on the processes of this launch.

    Args:
        config: the recipe; its weights are random, whatever it says.
        steps: that are timed, after two that are not.
        out: the file of what was measured; None: `NAME-probe.json` in `output.dir`.
        profile: of the site; what a plan is to learn is kept beside it.

    Raises:
        UserError: the model's sizes are not known, it does not fit, or a file cannot be written.
    """
    without_files = {"weights": "random", "mirror": None, "gguf_file": None}
    model = config.model.model_copy(update=without_files | {"cache_quantized": False})
    config = config.model_copy(update={"model": model})
    mesh = join_mesh(config)
    with ExitStack() as stack:
        stack.callback(leave)
        with mesh.main_first():
            source = resolve_model(config.model)
        probed = _measure(config, mesh, source.path, steps)
        if mesh.is_main:
            path = out or config.output.dir / f"{config.name}-probe.json"
            _tell(config, probed, mesh, path, profile)
        mesh.world.barrier()
    return probed


# ---------------------------------------------------------------- measuring


def _measure(config: Config, mesh: Mesh, folder: Path, steps: int) -> Probed:
    started = _now(mesh)
    policy = load_policy(folder, config, mesh)
    engine = Engine(policy, config, mesh)
    load_seconds = _now(mesh) - started
    loaded = _held(mesh)
    work = Workload.of(config, by_tokens=policy.sequence_parallel)
    rank, ranks = mesh.share.values()
    micro_batches = math.ceil(math.ceil(work.rows_per_step / ranks) / work.micro_batch_size)
    vocab_size: int = policy.causal_lm.config.get_text_config().vocab_size
    num = min(micro_batches, MOST_MICRO_BATCHES)
    rows = (work.micro_batch_size, config.data.max_length)
    batches = [_batch(rows, vocab_size, rank + ranks * i) for i in range(num)]
    timed = _Timed(engine, mesh)
    regularizer = _every_step(config.regularizer)
    step = 0

    def median(
        batches: Sequence[Batch], regularizer: Regularizer, times: int
    ) -> tuple[float, float, float, float]:
        """Seconds of a micro-batch, of its part before the backward, of the update; the loss."""
        nonlocal step
        found: list[tuple[float, float, float]] = []
        loss = 0.0
        for index in range(WARMUP + times):
            timed.seconds.clear()
            begun = _now(mesh)
            stats = train_step(
                timed,  # pyright: ignore[reportArgumentType]
                batches,
                mesh,
                step=step,
                regularizer=regularizer,
                learning_rate=config.optim.learning_rate,
                seed=config.train.seed,
            )
            whole = _now(mesh) - begun
            step, loss = step + 1, stats.loss
            update = timed.seconds.get("step", 0.0)
            micro = (whole - update) / len(batches)
            backward = timed.seconds.get("backward", 0.0) / len(batches)
            if index >= WARMUP:
                found.append((micro, micro - backward, update))
        medians = np.median(np.array(found), axis=0).tolist()
        slowest = [mesh.world.max(value, mesh.device) for value in medians]
        return slowest[0], slowest[1], slowest[2], loss

    micro, forward, update, loss = median(batches, regularizer, steps)
    peak, reserved = _peak(mesh)
    alone = Regularizer.model_validate({"kind": "none"})
    few = max(2, steps // 3)
    without = median(batches, alone, few)[0] if regularizer.compares_task else micro
    short = _batch((1, min(HOST_TOKENS, rows[1])), vocab_size, rank)
    host = median([short], regularizer, few)[0]
    return Probed(
        device=torch.cuda.get_device_name(mesh.device) if mesh.device.type == "cuda" else "cpu",
        world=mesh.world.size,
        tokens=rows[0] * rows[1],
        micro_batches=micro_batches,
        load_seconds=load_seconds,
        loaded_bytes=loaded,
        peak_bytes=peak,
        reserved_bytes=reserved,
        micro_batch_seconds=micro,
        forward_seconds=forward,
        reference_seconds=max(0.0, micro - without),
        host_seconds=host,
        update_seconds=update,
        loss=loss,
    )


def _every_step(regularizer: Regularizer) -> Regularizer:
    """The same with its divergence in each step, so that each is alike.

    All targets are learned, though a base of random weights is sure of none.
    """
    if regularizer.selects_targets:
        return regularizer.model_copy(update={"max_perplexity": math.inf})
    if not regularizer.has_divergence:
        return regularizer
    return regularizer.model_copy(update={"every": 1})


def _batch(rows: tuple[int, int], vocab_size: int, seed: int) -> Batch:
    """Rows of random tokens, [B, L]: all but the first of each are targets."""
    draw = np.random.default_rng(seed)
    length = rows[1]
    samples = [
        Sample(
            sample_id=f"probe:{seed}:{index}",
            input_ids=draw.integers(0, vocab_size, length, dtype=np.int32),
            label_mask=np.ones(length, dtype=bool),
        )
        for index in range(rows[0])
    ]
    return collate([[sample] for sample in samples], 0)


class _Timed:
    """An engine whose calls are timed, each to its end on the device."""

    def __init__(self, engine: Engine, mesh: Mesh):
        self._engine, self._mesh = engine, mesh
        self.seconds: dict[str, float] = {}

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._engine, name)
        return self._clocked(name, found) if name in ("backward", "step") else found

    def _clocked(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **named: Any) -> Any:
            begun = _now(self._mesh)
            try:
                return call(*arguments, **named)
            finally:
                self.seconds[name] = self.seconds.get(name, 0.0) + _now(self._mesh) - begun

        return timed


def _now(mesh: Mesh) -> float:
    """A clock that waits for the device."""
    if mesh.device.type == "cuda":
        torch.cuda.synchronize(mesh.device)
    return time.perf_counter()


def _held(mesh: Mesh) -> int:
    if mesh.device.type != "cuda":
        return peak_memory_bytes(mesh.device)
    held = torch.cuda.memory_allocated(mesh.device)
    torch.cuda.reset_peak_memory_stats(mesh.device)
    return held


def _peak(mesh: Mesh) -> tuple[int, int]:
    """Most that was allocated and reserved, of the rank that had most."""
    reserved = torch.cuda.max_memory_reserved(mesh.device) if mesh.device.type == "cuda" else 0
    sizes = (peak_memory_bytes(mesh.device), reserved)
    most = [int(mesh.world.max(float(size), mesh.device)) for size in sizes]
    return most[0], most[1]


# ---------------------------------------------------------------- beside the plan


def calibration_of(
    probed: Probed, architecture: Architecture, work: Workload, cluster: Cluster, recipe: str
) -> Calibration:
    """What a plan of this cluster learns of a probe.

    Where the processor was the limit, nothing is known of the GPU's own time, and its factor is 1.

    Args:
        probed: what was measured there.
        architecture: the model.
        work: the recipe.
        cluster: the GPUs, without an earlier probe.
        recipe: its name.
    """
    planned = step_time(architecture, _whole_rows(work), cluster, host_factor=1.0)
    on_gpu = (
        probed.micro_batch_seconds / (planned.gpu + planned.sent) if probed.is_gpu_bound else 1.0
    )
    return Calibration(
        gpu=cluster.gpu.name,
        gpu_factor=round(on_gpu, 4),
        host_factor=round(probed.host_seconds / planned.host, 4),
        memory_factor=round(probed.peak_bytes / torch_peak(architecture, work, cluster.world), 4),
        recipe=recipe,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _whole_rows(work: Workload) -> Workload:
    """The recipe as it is probed: rows of one sample, the base in each micro-batch."""
    return replace(work, packing=False, data=None, kl_every=1, cached_reference=False)


def _tell(config: Config, probed: Probed, mesh: Mesh, path: Path, profile: Path | None) -> None:
    """The table, the file, and what is kept with the site."""
    cluster = _cluster(mesh)
    architecture = find_architecture(config.model)
    work = _whole_rows(Workload.of(config, by_tokens=architecture.by_tokens))
    planned = None if cluster is None else step_time(architecture, work, cluster)
    memory = None if cluster is None else torch_peak(architecture, work, cluster.world)
    console = Console(markup=False, highlight=False, soft_wrap=True)
    what = f"{probed.world} x {probed.device}, micro-batches of {probed.tokens:,} tokens"
    console.print(f"{config.name} with random weights on {what}")
    for line in _table(probed, planned, memory):
        console.print(line)
    facts: dict[str, Any] = {"recipe": config.name, "measured": asdict(probed)}
    facts["measured"]["step_seconds"] = probed.step_seconds
    if cluster is not None and planned is not None:
        calibration = calibration_of(probed, architecture, work, cluster, config.name)
        facts["planned"] = asdict(planned) | {"peak_bytes": memory}
        facts["calibration"] = asdict(calibration)
        console.print(f"plan        {calibration}")
        if profile is not None:
            console.print(f"kept        {keep(calibration, profile)}: `moored plan --site` uses it")
    elif profile is not None:
        console.print("plan        no GPU that a plan knows: nothing is kept with the site")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        write_json(path, facts)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}: --out") from error
    console.print(f"written     {path}")


def _cluster(mesh: Mesh) -> Cluster | None:
    if mesh.device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(mesh.device)
    gpu = gpu_of_device(properties.name, properties.total_memory)
    if gpu is None:
        return None
    here = min(torch.cuda.device_count(), mesh.world.size)
    return Cluster(gpu=gpu, gpus_per_node=here, nodes=max(1, mesh.world.size // here))


def _table(probed: Probed, planned: StepTime | None, memory: float | None) -> list[str]:
    """Measured beside planned, in the order of a step."""
    micro = None if planned is None else max(planned.gpu + planned.sent, planned.host)
    rows: list[tuple[str, float, float | None]] = [
        ("loading, s", probed.load_seconds, None),
        ("after loading, GiB", probed.loaded_bytes / GIB, None),
        ("peak of a step, GiB", probed.peak_bytes / GIB, memory and memory / GIB),
        ("a micro-batch, s", probed.micro_batch_seconds, micro),
        ("  before the backward, s", probed.forward_seconds, None),
        ("  backward, s", probed.micro_batch_seconds - probed.forward_seconds, None),
        ("  of it for the base and the KL, s", probed.reference_seconds, None),
        ("  the processor's part, s", probed.host_seconds, planned and planned.host),
        ("the update, s", probed.update_seconds, planned and planned.update),
        ("a step of the recipe, s", probed.step_seconds, planned and planned.seconds()),
    ]
    if probed.reserved_bytes:
        rows.insert(3, ("reserved by torch, GiB", probed.reserved_bytes / GIB, None))
    lines = [f"{'':<36}{'measured':>10}{'planned':>10}"]
    for name, measured, plan in rows:
        beside = "" if plan is None else f"{plan:>10.3f}"
        lines.append(f"{name:<36}{measured:>10.3f}{beside}")
    rate = probed.tokens / probed.micro_batch_seconds
    lines.append(f"{'tokens/s of a process':<36}{rate:>10,.0f}" + (
        f"{probed.tokens / micro:>10,.0f}" if micro else ""))  # fmt: skip
    if planned is not None and not probed.is_gpu_bound:
        lines.append(
            "the GPU waited for the processor: more tokens in a micro-batch are nearly free"
        )
    return lines
