"""A plan as people read it, and as machines do. Nothing is computed here but sums."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from moored.plan.memory_terms import GIB, Term, doubt, total
from moored.plan.planning import RunPlan, changes
from moored.plan.step_time import HOST_FACTORS
from moored.plan.workload import Workload


def as_text(plan: RunPlan) -> str:
    """Lines for a terminal, without colours."""
    return "\n".join(_lines(plan))


def _lines(plan: RunPlan) -> Iterator[str]:
    work, cluster, architecture = plan.work, plan.cluster, plan.architecture
    gpu, time = cluster.gpu, plan.time
    billions = architecture.num_parameters / 1e9
    yield f"{plan.name} on {cluster}"
    yield (
        f"model       {architecture.model_type}, {billions:.2f} billion parameters, by "
        f"{architecture.origin}"
    )
    yield (
        f"gpu         {gpu.title}: {gpu.memory_gb:g} GB, {gpu.bf16_tflops:g} TFLOP/s in bf16, "
        f"{gpu.bandwidth_gbs:,.0f} GB/s ({gpu.source})"
    )
    if cluster.calibration is not None:
        yield f"calibrated  {cluster.calibration}"
    yield f"layout      {_layout(work, cluster.world)}"
    yield ""
    yield from _table("memory of a GPU, GiB", plan.memory, GIB, gpu.memory_bytes)
    yield ""
    yield from _table("host memory of a node while loading, GiB", plan.host, GIB)
    yield ""
    yield from _table("disk, GB", plan.disk, 1e9)
    if plan.sent:
        yield ""
        yield "sent by each GPU, GB"
        for name, size, per in plan.sent:
            yield f"  {name:<24}{size / 1e9:>9.2f}        {per}"
    yield ""
    yield from _time(plan)
    yield ""
    if plan.is_best:
        yield "best        the recipe's own layout; of those that fit none is 5 % faster"
    else:
        gain = time.seconds() / plan.best_time.seconds()
        yield f"best        {' '.join(changes(work, plan.best))}: {gain:.2f} times as fast"
    yield f"            parallel: {_parallel(plan.best)}, train: {_rows(plan.best)}"
    for reason in plan.reasons:
        yield f"            {reason}"
    for warning in plan.warnings:
        yield f"warning     {warning}"


def _layout(work: Workload, world: int) -> str:
    t = work.tensor_parallel_degree
    spread = f"{world // t} data-parallel x {t} tensor-parallel" if world > 1 else "one process"
    by_token = ", sequence parallel" if work.sequence_parallel else ""
    if work.context_parallel_degree > 1:
        by_token += f", {work.context_parallel_degree} ranks share a row"
    return (
        f"{spread}{by_token}, ZeRO {work.zero_stage}; a micro-batch is {work.micro_batch_size} x "
        f"{work.max_length:,} tokens; a step {work.rows_per_step} rows"
    )


def _table(
    title: str, terms: Sequence[Term], unit: float, there: float | None = None
) -> Iterator[str]:
    yield title
    for term in terms:
        yield f"  {term.name:<24}{term.bytes / unit:>9.2f} ±{term.within:>4.0%}  {term.why}"
    said = f" of {there / unit:.2f}" if there is not None else ""
    yield f"  {'sum':<24}{total(terms) / unit:>9.2f} ±{doubt(terms):>4.0%} {said}"


def _time(plan: RunPlan) -> Iterator[str]:
    time, work = plan.time, plan.work
    low, high = time.range
    seconds = time.seconds()
    yield "time"
    yield (
        f"  {'of a micro-batch, s':<24}{max(time.gpu + time.sent, time.host):>9.2f}        "
        f"GPU {time.gpu:.2f}, sending {time.sent:.2f}, host {time.host:.2f} "
        f"({time.host_range[0]:.2f} to {time.host_range[1]:.2f} on hosts that were measured)"
    )
    yield (
        f"  {'of a step, s':<24}{seconds:>9.2f}        {low:.2f} to {high:.2f}: "
        f"{time.micro_batches} micro-batches, and the update {time.update:.3f}"
    )
    rate = time.tokens / seconds
    yield (
        f"  {'tokens/s, all GPUs':<24}{rate:>9,.0f}        {time.tokens / high:,.0f} to "
        f"{time.tokens / low:,.0f}"
    )
    hours = plan.hours
    if hours is None:
        million = 1e6 / rate / 3600
        yield (
            f"  {'hours a million tokens':<24}{million:>9.3f}        "
            f"{million * plan.cluster.world:.3f} GPU hours; how many tokens there are is not known "
            "without the data"
        )
        return
    least, most = (x * (work.steps or 0) / 3600 for x in (low, high))
    epochs = f", {work.epochs:.2g} epochs" if work.epochs is not None else ""
    yield (
        f"  {'hours':<24}{hours:>9.2f}        {least:.2f} to {most:.2f}: {work.steps:,} steps"
        f"{epochs}; evaluation not counted"
    )
    yield f"  {'GPU hours':<24}{hours * plan.cluster.world:>9.1f}"


def _parallel(work: Workload) -> str:
    parts = [f"zero_stage: {work.zero_stage}"]
    if work.tensor_parallel_degree > 1:
        parts.append(f"tensor_parallel_degree: {work.tensor_parallel_degree}")
        parts.append(f"sequence_parallel: {str(work.sequence_parallel).lower()}")
    if work.context_parallel_degree > 1:
        parts.append(f"context_parallel_degree: {work.context_parallel_degree}")
    return f"{{{', '.join(parts)}}}"


def _rows(work: Workload) -> str:
    return f"{{micro_batch_size: {work.micro_batch_size}}}"


def as_json(plan: RunPlan) -> dict[str, Any]:
    """Plain values: bytes and seconds."""
    time, work, cluster = plan.time, plan.work, plan.cluster
    least, most = time.range
    hours = plan.hours

    def terms(of: Sequence[Term]) -> dict[str, Any]:
        each = [
            {"name": t.name, "bytes": round(t.bytes), "within": t.within, "why": t.why} for t in of
        ]
        return {"terms": each, "bytes": round(total(of)), "within": round(doubt(of), 3)}

    return {
        "name": plan.name,
        "model": {
            "type": plan.architecture.model_type,
            "parameters": plan.architecture.num_parameters,
            "origin": plan.architecture.origin,
        },
        "cluster": {
            "gpu": cluster.gpu.name,
            "gpus_per_node": cluster.gpus_per_node,
            "nodes": cluster.nodes,
            "memory_bytes": round(cluster.gpu.memory_bytes),
            "calibration": None if cluster.calibration is None else asdict(cluster.calibration),
        },
        "memory": terms(plan.memory),
        "host_memory": terms(plan.host),
        "disk": terms(plan.disk),
        "sent": [{"what": what, "bytes": round(n), "per": per} for what, n, per in plan.sent],
        "time": {
            "micro_batch_gpu_seconds": time.gpu,
            "micro_batch_sending_seconds": time.sent,
            "micro_batch_host_seconds": time.host,
            "host_factors": list(HOST_FACTORS),
            "micro_batches": time.micro_batches,
            "step_seconds": time.seconds(),
            "step_seconds_range": [least, most],
            "tokens_per_second": time.tokens / time.seconds(),
            "steps": work.steps,
            "hours": hours,
            "gpu_hours": None if hours is None else hours * cluster.world,
        },
        "best": {
            "overrides": changes(work, plan.best),
            "step_seconds": plan.best_time.seconds(),
            "why": list(plan.reasons),
        },
        "warnings": list(plan.warnings),
    }
