"""A recipe on a cluster: whether it fits, how long it takes, and which layout is the best there.

Puts `memory_terms.py` and `step_time.py` together; what is printed of a plan is `plan_text.py`'s.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from moored.config import Config
from moored.plan.architecture import Architecture, find_architecture
from moored.plan.calibration import kept
from moored.plan.gpus import GPUS, Cluster, cluster_of, gpu_named, gpu_of_device
from moored.plan.memory_terms import (
    GIB,
    Term,
    adapted,
    adapted_experts,
    adapter_size,
    doubt,
    gpu_memory,
    held,
    host_memory,
    on_disk,
    total,
)
from moored.plan.step_time import (
    StepTime,
    exchanged_bytes,
    gathered_bytes,
    reduced_bytes,
    step_time,
    tensor_parallel_traffic,
)
from moored.plan.workload import Workload
from moored.utils.errors import UserError

SAME = 1.05  # times of layouts that a plan cannot tell apart
SHORT = 0.5  # of max_length: below it, rows that are not packed are mostly padding or small


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPlan:
    """What a recipe is foretold to take on a cluster.

    Attributes:
        name: of the recipe.
        architecture: the model.
        work: the recipe.
        cluster: the GPUs.
        memory: of one GPU.
        host: of a node's memory while the base is loaded.
        disk: files.
        time: of a step.
        sent: what one rank sends: by what, bytes, of a micro-batch or of a step.
        best: the fastest layout that was found to fit; the recipe's own, if it is about as fast.
        best_time: of it.
        reasons: why that one.
        warnings: what fits, but should be looked at.
    """

    name: str
    architecture: Architecture
    work: Workload
    cluster: Cluster
    memory: Sequence[Term]
    host: Sequence[Term]
    disk: Sequence[Term]
    time: StepTime
    sent: Sequence[tuple[str, float, str]]
    best: Workload
    best_time: StepTime
    reasons: Sequence[str]
    warnings: Sequence[str]

    @property
    def hours(self) -> float | None:
        """The whole run's, of training alone; None where the number of steps is not known."""
        return None if self.work.steps is None else self.time.seconds() * self.work.steps / 3600

    @property
    def is_best(self) -> bool:
        """Whether the recipe's own layout is as good as any."""
        return self.best is self.work


def make_plan(config: Config, cluster: Cluster, host_factor: float | None = None) -> RunPlan:
    """Foretell a recipe on a cluster, from its config.json alone.

    Args:
        config: the recipe.
        cluster: the GPUs.
        host_factor: see `step_time`.

    Raises:
        UserError: the model's sizes are not known; the mesh is impossible; or it does not fit. The
            line names what does.
    """
    architecture = find_architecture(config.model)
    work = Workload.of(config, by_tokens=architecture.by_tokens)
    _require_targets(architecture, work)
    _require_blocks(architecture, work)
    _require_mesh(architecture, work, cluster)
    _require_fit(config.name, architecture, work, cluster)
    best = best_layout(architecture, work, cluster, host_factor)
    time = step_time(architecture, work, cluster, host_factor)
    best_time = step_time(architecture, best, cluster, host_factor)
    if time.seconds() <= SAME * best_time.seconds():
        best, best_time = work, time
    targets = time.tokens * work.head_share
    return RunPlan(
        name=config.name,
        architecture=architecture,
        work=work,
        cluster=cluster,
        memory=gpu_terms(architecture, work, cluster),
        host=host_memory(architecture, work, cluster.gpus_per_node),
        disk=on_disk(architecture, work, targets),
        time=time,
        sent=_sent(architecture, work, cluster),
        best=best,
        best_time=best_time,
        reasons=_reasons(architecture, best, cluster),
        warnings=list(_warnings(architecture, work, cluster, time)),
    )


def gpu_terms(architecture: Architecture, work: Workload, cluster: Cluster) -> list[Term]:
    """All that one GPU must have, by the formulas; as a probe corrects them, if there is one."""
    terms = gpu_memory(architecture, work, cluster.world)
    if cluster.calibration is None:
        return terms
    factor = cluster.calibration.memory_factor
    return [replace(term, bytes=term.bytes * factor) for term in terms]


def needs(architecture: Architecture, work: Workload, cluster: Cluster) -> float:
    """Bytes of one GPU."""
    return total(gpu_terms(architecture, work, cluster))


def fits(architecture: Architecture, work: Workload, cluster: Cluster) -> bool:
    """Whether the sum of all terms is in the GPU."""
    return needs(architecture, work, cluster) <= cluster.gpu.memory_bytes


# ---------------------------------------------------------------- layouts


def layouts(architecture: Architecture, work: Workload, cluster: Cluster) -> Iterator[Workload]:
    """Every layout of a recipe that the mesh allows: degree, ZeRO stage, rows of a micro-batch."""
    degrees = [
        t
        for t in range(1, cluster.gpus_per_node + 1)
        if cluster.gpus_per_node % t == 0 and t & (t - 1) == 0
    ]
    for degree in sorted({*degrees, work.tensor_parallel_degree}):
        if cluster.world % degree:
            continue
        for sharers in _sharers(architecture, work, cluster.world // degree):
            shared = replace(work, context_parallel_degree=sharers)
            if not why_not_degree(architecture, shared, degree):
                yield from _of_degree(architecture, shared, cluster, degree)


def _sharers(architecture: Architecture, work: Workload, d: int) -> list[int]:
    """How many data-parallel ranks may share a row: several where a step has too few rows."""
    found = {work.context_parallel_degree}
    if work.may_share_rows and not architecture.eager and work.rows_per_step < d:
        found |= {2**k for k in range(d.bit_length())}
    return sorted(number for number in found if d % number == 0)


def _of_degree(
    architecture: Architecture, work: Workload, cluster: Cluster, degree: int
) -> Iterator[Workload]:
    """Those of one tensor-parallel degree: ZeRO stage, rows of a micro-batch."""
    d = cluster.world // degree
    stages = (0, 1, 2, 3) if d > 1 else (0, work.zero_stage)
    most = max(1, -(-work.rows_per_step // (d // work.context_parallel_degree)))
    rows = {2**k for k in range(most.bit_length())} | {work.micro_batch_size}
    for stage in sorted(set(stages)):
        if stage == 3 and work.family == "dora" and work.nf4:
            continue
        for num in sorted(rows):
            if num > most and num != work.micro_batch_size:
                continue
            yield replace(
                work,
                tensor_parallel_degree=degree,
                sequence_parallel=degree > 1 and architecture.by_tokens,
                zero_stage=stage,
                offload=work.offload and stage > 0,
                micro_batch_size=num,
            )


def best_layout(
    architecture: Architecture,
    work: Workload,
    cluster: Cluster,
    host_factor: float | None = None,
) -> Workload:
    """The fastest layout that fits; of those that are as fast within 3 %, the least memory."""
    fitting = [work, *(w for w in layouts(architecture, work, cluster))]
    fitting = [w for w in fitting if fits(architecture, w, cluster)]
    seconds = [step_time(architecture, w, cluster, host_factor).seconds() for w in fitting]
    least = min(seconds)
    quick = [w for w, s in zip(fitting, seconds, strict=True) if s <= 1.03 * least]
    return min(
        quick,
        key=lambda w: (
            w.zero_stage == 3,
            w.tensor_parallel_degree,
            w.context_parallel_degree,
            needs(architecture, w, cluster),
            w.micro_batch_size,
        ),
    )


def why_not_degree(architecture: Architecture, work: Workload, degree: int) -> str | None:
    """Why a model cannot be spread over so many ranks; None: it can."""
    shared = degree * work.context_parallel_degree
    if work.context_parallel_degree > 1 and architecture.num_kv_heads % shared:
        return (
            f"with parallel.context_parallel_degree={work.context_parallel_degree} {shared} ranks "
            f"would share {architecture.num_kv_heads} key/value heads evenly, which they cannot"
        )
    if degree == 1:
        return None
    if degree > architecture.num_kv_heads:
        return (
            f"the model has {architecture.num_kv_heads} key/value heads, and {degree} ranks would "
            f"share them: at most {architecture.num_kv_heads}"
        )
    if architecture.num_experts and degree > architecture.num_experts:
        few = architecture.num_experts
        return f"layers have {few} experts, which are dealt out whole: at most {few}"
    if work.family in ("randlora", "oft"):
        return f"{work.family} is not spread over ranks: 1"
    return None


def changes(work: Workload, other: Workload) -> list[str]:
    """The overrides that make the one recipe the other."""
    keys = {
        "tensor_parallel_degree": "parallel.tensor_parallel_degree",
        "sequence_parallel": "parallel.sequence_parallel",
        "context_parallel_degree": "parallel.context_parallel_degree",
        "zero_stage": "parallel.zero_stage",
        "micro_batch_size": "train.micro_batch_size",
        "checkpointing": "train.gradient_checkpointing",
        "checkpointed_layers": "train.checkpointed_layers",
        "max_length": "data.max_length",
    }
    found: list[str] = []
    for name, key in keys.items():
        value = getattr(other, name)
        if value == getattr(work, name):
            continue
        # Without ranks that share a layer the option has no effect, and the recipe refuses it; with
        # such, where the recipe had none, it is what `auto` comes to.
        degrees = (work.tensor_parallel_degree, other.tensor_parallel_degree)
        if name == "sequence_parallel" and 1 in degrees:
            continue
        text = str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(
            value, float) else str(value)  # fmt: skip
        found.append(f"{key}={text}")
    return found


# ---------------------------------------------------------------- refusals


def _require_targets(architecture: Architecture, work: Workload) -> None:
    found = [*adapted(architecture, work), *adapted_experts(architecture, work)]
    if work.targets is not None and not found:
        names = ", ".join(linear.name for linear in architecture.linears)
        raise UserError(
            f"adapter.target_modules: none of {', '.join(work.targets)} is a linear layer of a "
            f"{architecture.model_type}: there are {names}"
        )


def _require_blocks(architecture: Architecture, work: Workload) -> None:
    """OFT's blocks fill the inputs of every adapted layer."""
    if work.family != "oft":
        return
    for linear in adapted(architecture, work):
        if linear.inputs % work.oft_block_size:
            raise UserError(
                f"adapter.oft_block_size: {work.oft_block_size} does not divide the "
                f"{linear.inputs} inputs of {linear.name}: take a number that divides those of all "
                "adapted layers"
            )


def _require_mesh(architecture: Architecture, work: Workload, cluster: Cluster) -> None:
    degree = work.tensor_parallel_degree
    why = why_not_degree(architecture, work, degree)
    if why is not None:
        raise UserError(f"parallel.tensor_parallel_degree={degree}: {why}")
    shared = degree * work.context_parallel_degree
    if cluster.world % shared:
        raise UserError(
            f"parallel.context_parallel_degree={work.context_parallel_degree} x "
            f"tensor_parallel_degree={degree} = {shared} does not divide the {cluster.world} GPUs "
            f"of {cluster}: take {math.gcd(shared, cluster.world)} in all, or other GPUs"
        )
    if work.sequence_parallel and not architecture.by_tokens:
        raise UserError(
            f"parallel.sequence_parallel: layers of a {architecture.model_type} have parts that "
            "may look at more than one token: set it to false, or leave it out"
        )
    if cluster.world % degree:
        raise UserError(
            f"parallel.tensor_parallel_degree={degree} does not divide the {cluster.world} GPUs of "
            f"{cluster}: take {math.gcd(degree, cluster.world)}, or other GPUs"
        )
    if work.family == "dora" and work.nf4 and work.zero_stage == 3:
        raise UserError("parallel.zero_stage=3: DoRA over NF4 reads whole weights: set it to 2")


def _require_fit(name: str, architecture: Architecture, work: Workload, cluster: Cluster) -> None:
    """Raise UserError with the nearest that fits."""
    terms = gpu_terms(architecture, work, cluster)
    there = cluster.gpu.memory_bytes
    if total(terms) <= there:
        return
    largest = sorted(terms, key=lambda term: -term.bytes)[:3]
    parts = ", ".join(f"{term.name} {term.bytes / GIB:.1f}" for term in largest)
    raise UserError(
        f"{name} does not fit on {cluster}: a GPU needs {total(terms) / GIB:.1f} GiB ({parts}) and "
        f"has {there / GIB:.1f}: {nearest(architecture, work, cluster)}"
    )


def nearest(architecture: Architecture, work: Workload, cluster: Cluster) -> str:
    """What fits with the fewest changes: of the layout, else of the length, else of the GPUs."""
    eased = [work]
    if work.recomputed(architecture.num_layers) < architecture.num_layers:
        kind = "non_reentrant" if work.checkpointing == "none" else work.checkpointing
        eased.append(replace(work, checkpointing=kind, checkpointed_layers=1.0))
    for base in eased:
        found = _least_changed(architecture, base, work, cluster)
        if found is not None:
            return _said("the nearest that fits is", architecture, work, found, cluster)
    bigger = _other_gpus(architecture, eased[-1], cluster)
    length = eased[-1].max_length // 2
    while length >= 256:
        short = replace(eased[-1], max_length=length)
        found = _least_changed(architecture, short, work, cluster)
        if found is not None:
            said = _said("no layout does; shorter rows would:", architecture, work, found, cluster)
            return f"{said}, or {bigger}" if bigger else said
        length //= 2
    return f"no layout does; {bigger or 'no GPUs that are known hold it: take a smaller model'}"


def _said(
    words: str, architecture: Architecture, work: Workload, found: Workload, cluster: Cluster
) -> str:
    size = needs(architecture, found, cluster) / GIB
    return f"{words} {' '.join(changes(work, found))} ({size:.1f} GiB)"


def _least_changed(
    architecture: Architecture, base: Workload, work: Workload, cluster: Cluster
) -> Workload | None:
    candidates = [w for w in layouts(architecture, base, cluster) if fits(architecture, w, cluster)]
    if fits(architecture, base, cluster):
        candidates.append(base)

    def cost(other: Workload) -> tuple[float, float]:
        rows = abs(math.log2(other.micro_batch_size / work.micro_batch_size))
        degree = abs(math.log2(other.tensor_parallel_degree / work.tensor_parallel_degree))
        stage = (
            0.0 if other.zero_stage == work.zero_stage else 4.0 if other.zero_stage == 3 else 1.5
        )
        sharers = abs(math.log2(other.context_parallel_degree / work.context_parallel_degree))
        return rows + 3 * degree + 2 * sharers + stage, needs(architecture, other, cluster)

    return min(candidates, key=cost, default=None)


def _other_gpus(architecture: Architecture, work: Workload, cluster: Cluster) -> str | None:
    """The least GPUs that hold the recipe: more of the same kind, or as many of a larger one."""
    found: list[str] = []
    for num in (2, 4, 8, 16):
        if num <= cluster.gpus_per_node:
            continue
        more = replace(cluster, gpus_per_node=num)
        if _least_changed(architecture, work, work, more) is not None:
            found.append(str(more))
            break
    larger = sorted(GPUS.values(), key=lambda facts: (facts.memory_gb, facts.bf16_tflops))
    for facts in larger:
        if facts.memory_gb <= cluster.gpu.memory_gb:
            continue
        other = replace(cluster, gpu=facts)
        if _least_changed(architecture, work, work, other) is not None:
            found.append(str(other))
            break
    return f"take {' or '.join(found)}" if found else None


# ---------------------------------------------------------------- words


def _sent(
    architecture: Architecture, work: Workload, cluster: Cluster
) -> list[tuple[str, float, str]]:
    degree = work.tensor_parallel_degree
    d = cluster.world // degree
    found: list[tuple[str, float, str]] = []
    if degree > 1:
        sent = tensor_parallel_traffic(architecture, work)
        size = sum(each.wire_bytes(degree) for each in sent)
        found.append(("tensor parallelism", size, "per micro-batch"))
    if work.context_parallel_degree > 1:
        size = exchanged_bytes(architecture, work)
        found.append(("context parallelism", size, "per micro-batch"))
    if work.zero_stage == 3 and d > 1:
        size = gathered_bytes(architecture, work, d)
        found.append(("ZeRO-3's gathered layers", size, "per micro-batch"))
    if d > 1:
        size = reduced_bytes(architecture, work, d)
        found.append(("the adapter's gradients", size, "per step"))
    return found


def _reasons(architecture: Architecture, best: Workload, cluster: Cluster) -> list[str]:
    """Why this layout."""
    t = best.tensor_parallel_degree
    d = cluster.world // t
    whole = replace(
        best, tensor_parallel_degree=1, sequence_parallel=False, micro_batch_size=1, zero_stage=2,
        context_parallel_degree=1,
    )  # fmt: skip
    size = needs(architecture, whole, cluster) / GIB
    there = cluster.gpu.memory_bytes / GIB
    found: list[str] = []
    if t > 1 and size > there:
        found.append(
            f"tensor_parallel_degree {t}: one row on a whole copy takes {size:.1f} of {there:.1f} "
            f"GiB; {t} GPUs of a node share it"
        )
    elif t > 1:
        found.append(
            f"tensor_parallel_degree {t}: a whole copy would fit ({size:.1f} GiB), but there are "
            f"{best.rows_per_step} rows a step for {cluster.world} GPUs, or rows too long for more"
        )
    elif cluster.world > 1 and best.zero_stage < 3:
        found.append(
            "tensor_parallel_degree 1: a whole copy fits, and copies send each other the adapter's "
            "gradients alone"
        )
    if best.context_parallel_degree > 1:
        found.append(
            f"context_parallel_degree {best.context_parallel_degree}: a step has "
            f"{best.rows_per_step} rows for {d} data-parallel ranks, which share each"
        )
    if d == 1:
        found.append("zero_stage 0: no other rank has the same weights, so there is none to share")
    elif best.zero_stage == 3:
        found.append("zero_stage 3: the base itself must be spread over the data-parallel ranks")
    elif best.zero_stage:
        saved = needs(architecture, replace(best, zero_stage=0), cluster) - needs(
            architecture, best, cluster
        )
        found.append(
            f"zero_stage {best.zero_stage}: {saved / GIB:.1f} GiB less of the adapter's state per "
            "GPU than with 0, for the same bytes sent"
        )
    rows = best.micro_batch_size
    more = replace(best, micro_batch_size=2 * rows)
    if 2 * rows * d > best.rows_per_step * best.context_parallel_degree:
        why = f"a step has {best.rows_per_step} rows for {d} ranks"
    elif not fits(architecture, more, cluster):
        why = f"{2 * rows} would take {needs(architecture, more, cluster) / GIB:.1f} GiB"
    else:
        why = "more rows would not be faster"
    found.append(f"micro_batch_size {rows}: {why}")
    return found


def _warnings(
    architecture: Architecture, work: Workload, cluster: Cluster, time: StepTime
) -> Iterator[str]:
    yield from architecture.notes
    terms = gpu_terms(architecture, work, cluster)
    d = cluster.world // work.tensor_parallel_degree
    most = total(terms) * (1 + doubt(terms))
    if most > cluster.gpu.memory_bytes:
        yield (
            f"it fits, but only just: with all doubts to one side {most / GIB:.1f} of "
            f"{cluster.gpu.memory_bytes / GIB:.1f} GiB: `moored doctor` on the machine knows more"
        )
    data = work.data
    if data is not None and not work.packing and data.mean_tokens < SHORT * work.max_length:
        times = work.max_length / max(data.mean_tokens, 1.0)
        yield (
            f"data.packing is off and samples have some {data.mean_tokens:,.0f} tokens, where "
            f"{work.max_length:,} would fit: with data.packing=true a row holds {times:.0f} of "
            "them (divide train.global_batch_sequences by as much)"
        )
    if data is None and not work.packing:
        yield (
            "data.packing is off, and the data are not here to look at: memory and time are those "
            "of full rows; if samples are much shorter, data.packing=true makes full ones"
        )
    if d > work.rows_per_step * work.context_parallel_degree:
        idle = d - work.rows_per_step * work.context_parallel_degree
        yield (
            f"{d} data-parallel ranks share {work.rows_per_step} rows a step, so {idle} of them "
            "have nothing to do: raise train.global_batch_sequences, or "
            "parallel.tensor_parallel_degree"
        )
    if work.tensor_parallel_degree > cluster.gpus_per_node:
        yield (
            "a tensor-parallel group spans nodes and sends its activations over the network: keep "
            f"parallel.tensor_parallel_degree at {cluster.gpus_per_node} or less"
        )
    if work.tensor_parallel_degree > 1 and architecture.by_tokens and not work.sequence_parallel:
        yield "parallel.sequence_parallel=true would spread the checkpoints, too, for equal traffic"
    if work.zero_stage == 3 and d > 1:
        plain = replace(work, zero_stage=2)
        if fits(architecture, plain, cluster):
            yield "ZeRO-3 gathers every layer in every pass, and ZeRO-2 fits: parallel.zero_stage=2"
    if time.is_host_bound:
        yield (
            f"the GPU waits for the processor: {time.host:.1f} s a micro-batch to start its "
            f"kernels, {time.gpu + time.sent:.1f} s to run them: more tokens in a micro-batch are "
            "nearly free"
        )
    longest = architecture.max_positions
    if longest is not None and work.max_length > longest:
        yield f"rows of {work.max_length:,} tokens exceed the model's {longest:,} positions"
    if work.family != "lora":
        yield f"time and working memory of {work.family} are supposed, and not fitted to runs"


# ---------------------------------------------------------------- of a site, of a machine


def site_cluster(
    gpu_type: str | None, gpus_per_node: int, nodes: int, where: str, profile: Path | None = None
) -> Cluster:
    """The GPUs that a site's profile names, and what was probed there.

    Args:
        gpu_type: `slurm.gpu_type`.
        gpus_per_node: `slurm.gpus_per_node`.
        nodes: of a job.
        where: the profile, in words.
        profile: its file, beside which probes are kept.

    Raises:
        UserError: it does not say, or not clearly.
    """
    if gpus_per_node == 0:
        raise UserError(f"--site {where}: its nodes have no GPUs: name some by --gpus 8xh100-80gb")
    if gpu_type is None:
        raise UserError(
            f"--site {where}: slurm.gpu_type is not set, so that nobody knows how much memory its "
            f"GPUs have: set it, or say --gpus {gpus_per_node}xNAME ({', '.join(GPUS)})"
        )
    try:
        gpu = gpu_named(gpu_type)
    except UserError as error:
        raise UserError(
            f"--site {where}: slurm.gpu_type={gpu_type}: {error}: say it by --gpus "
            f"{gpus_per_node}xNAME"
        ) from error
    probed = None if profile is None else kept(profile, gpu.name)
    return Cluster(gpu=gpu, gpus_per_node=gpus_per_node, nodes=nodes, calibration=probed)


def site_warning(
    config: Config, gpu_type: str | None, gpus_per_node: int, nodes: int
) -> str | None:
    """One line where a recipe will not fit the GPUs of a site; None where it does, or who knows."""
    if gpu_type is None or gpus_per_node == 0:
        return None
    try:
        cluster = cluster_of(f"{gpus_per_node}x{gpu_type}", nodes)
        architecture = find_architecture(config.model)
    except UserError:
        return None  # nothing to plan with is no fault of the recipe
    try:
        work = Workload.of(config, by_tokens=architecture.by_tokens)
        _require_fit(config.name, architecture, work, cluster)
    except UserError as error:
        return f"by `moored plan`, {error}"
    return None


def _of_folder(config: Config, folder: Path) -> Architecture:
    return find_architecture(config.model.model_copy(update={"name_or_path": str(folder)}))


def machine_line(
    config: Config, folder: Path, device: str, memory_bytes: int, num_gpus: int
) -> tuple[str, bool]:
    """One line of a recipe on the GPUs of this machine, and whether it fits there.

    Args:
        config: the recipe.
        folder: of the model, on this machine.
        device: the name of one of them, all being alike.
        memory_bytes: what it has.
        num_gpus: how many there are.
    """
    facts = gpu_of_device(device, memory_bytes)
    if facts is None:
        return f"{device} is not known to `moored plan`", True
    # What the device says it has, since that is at hand.
    facts = replace(facts, memory_gb=memory_bytes / 1e9)
    cluster = Cluster(gpu=facts, gpus_per_node=num_gpus)
    try:
        local = config.model.model_copy(update={"name_or_path": str(folder)})
        plan = make_plan(config.model_copy(update={"model": local}), cluster)
    except UserError as error:
        return str(error), False
    low, high = plan.time.range
    return (
        f"on {cluster}: {total(plan.memory) / GIB:.1f} of {memory_bytes / GIB:.1f} GiB a GPU "
        f"(±{doubt(plan.memory):.0%}), {low:.1f} to {high:.1f} s a step (`moored plan` says more)",
        True,
    )


def load_problem(
    config: Config,
    folder: Path,
    *,
    degree: int,
    world: int,
    on_gpu: bool,
    memory_bytes: int,
) -> str | None:
    """Why the base should not be loaded here, in one line; None: it fits, or nobody knows.

    Args:
        config: the recipe.
        folder: of the model, on this machine.
        degree: tensor-parallel ranks of the processes that are here.
        world: all of them.
        on_gpu: else in the host's memory, in the recipe's precision for a CPU.
        memory_bytes: what one process may take.
    """
    try:
        architecture = _of_folder(config, folder)
    except UserError:
        return None
    work = Workload.of(config, on_gpu=on_gpu, by_tokens=architecture.by_tokens)
    work = replace(work, tensor_parallel_degree=degree)
    # Loading makes the adapter's parameters, and neither gradients nor moments.
    parts = [t.bytes for t in held(architecture, work, world) if t.name != "adapter"]
    size = sum(parts) + 4 * adapter_size(architecture, work, degree)
    if size <= memory_bytes:
        return None
    where = "a GPU has" if on_gpu else "are free"
    return (
        f"the base takes {size / GIB:.1f} GiB in each process, and {memory_bytes / GIB:.1f} "
        f"{where}: its weights were not loaded, and what they would show was not looked at"
    )
