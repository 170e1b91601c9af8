"""`moored preflight`: one process on every node of a job looks at it before the model loads.

Its verdict, a file per node, is read by the job's script, which leaves an unfit node out of the
next start. What a recipe would do on one machine, `doctor.py` says.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import statistics
import sys
import time
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from moored.config import load_config
from moored.distributed.mesh import Mesh, leave_mesh, start_mesh
from moored.models.hub import stage
from moored.slurm.snapshot import missing_and_changed
from moored.tracking.run_directory import RunDirectory
from moored.utils.environment import versions_of
from moored.utils.errors import MooredError

RENDEZVOUS_SECONDS = 120.0  # for the other nodes to come, and to answer
PROBE_BYTES = 16 << 20  # of the all-reduce whose bandwidth is measured
MAX_GPU_USED = 0.1  # share of a GPU's memory that somebody else may hold
GIB = 2**30
Verdict = Literal["ok", "bad", "waited", "job"]


class _Unfit(Exception):
    """What is wrong, and with what: this node, the job, or a node that did not come."""

    def __init__(self, verdict: Verdict, *reasons: str):
        super().__init__("; ".join(reasons))
        self.verdict, self.reasons = verdict, reasons


def check_node(run_dir: Path, out: Path, expected: Path) -> bool:
    """Check this node, with the others, and write `out/NODE`: a verdict, then a reason per line.

    `ok`; `bad`: this node; `waited`: another one did not come; `job`: what no other node mends.

    Args:
        run_dir: the run directory of the job.
        out: folder of the verdicts; shared by the nodes.
        expected: what was submitted (`snapshot.py`).

    Returns:
        Whether the verdict is `ok`.
    """
    node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    facts: list[str] = []
    verdict = "ok"
    try:
        _check(run_dir, json.loads(expected.read_text()), facts)
    except _Unfit as unfit:
        verdict, facts = unfit.verdict, list(unfit.reasons)
    except Exception as error:
        verdict, facts = "bad", [f"{type(error).__name__}: {error}"]
    out.mkdir(parents=True, exist_ok=True)
    text = "\n".join([verdict, *(" ".join(fact.split()) for fact in facts)]) + "\n"
    (out / f".{node}.tmp").write_text(text)
    os.replace(out / f".{node}.tmp", out / node)
    print(f"{node}: {text}", end="", flush=True)
    sys.stdout.flush()
    return verdict == "ok"


def _check(run_dir: Path, expected: dict[str, Any], facts: list[str]) -> None:
    """Everything about this node first; it meets the others all the same, so that none waits."""
    own: _Unfit | None = None
    try:
        _versions(expected["versions"])
        _files(expected["files"])
        facts += _disk(run_dir, expected["min_free_gib"])
        facts += _gpus(expected["gpus"])
    except _Unfit as unfit:
        own = unfit
    try:
        mesh = start_mesh(
            timeout_seconds=RENDEZVOUS_SECONDS, wait_seconds=RENDEZVOUS_SECONDS, folder=run_dir
        )
    except MooredError as error:
        raise own or _Unfit("waited", str(error)) from error
    try:
        facts += _together(mesh, expected, own)
    except RuntimeError as error:
        raise own or _Unfit("waited", f"a node was lost: {str(error).splitlines()[0]}") from error
    finally:
        leave_mesh()
    if own is not None:
        raise own
    facts += _staged(run_dir)


def _versions(expected: dict[str, str]) -> None:
    here = versions_of(expected)
    wrong = [
        f"{name} is {here[name]}, but {wanted} was submitted"
        for name, wanted in expected.items()
        if here[name] != wanted
    ]
    if wrong:
        raise _Unfit("bad", *wrong)


def _files(expected: dict[str, str]) -> None:
    missing, changed = missing_and_changed(expected)
    if changed:
        more = f" and {len(changed) - 1} more" if changed[1:] else ""
        raise _Unfit(
            "job", f"{changed[0]}{more} changed after the job was submitted: submit it again"
        )
    if missing:
        raise _Unfit("bad", *(f"{name} cannot be read here" for name in missing[:3]))


def _disk(run_dir: Path, min_free_gib: float) -> list[str]:
    free = shutil.disk_usage(run_dir).free / GIB
    if free < min_free_gib:
        raise _Unfit(
            "job",
            f"{run_dir} has {free:.2f} GiB free, but storage.min_free_gib is {min_free_gib:g}: "
            "make room, or lower it in the site profile",
        )
    return [f"{free:.0f} GiB free for the run"]


def _gpus(expected: int) -> list[str]:
    if not expected:
        return []
    count = torch.cuda.device_count()
    if count < expected:
        raise _Unfit("bad", f"{count} usable GPUs, but the job has {expected} per node")
    wrong = []
    for index in range(count):
        free, total = torch.cuda.mem_get_info(index)
        if free < (1 - MAX_GPU_USED) * total:
            wrong.append(f"GPU {index}: {(total - free) / GIB:.1f} GiB are held by somebody else")
        try:
            ones = torch.ones(1024, 1024, device=f"cuda:{index}")
            if not torch.equal(ones @ ones, 1024 * ones):
                wrong.append(f"GPU {index} computes wrongly")
        except RuntimeError as error:
            wrong.append(f"GPU {index}: {str(error).splitlines()[0]}")
    if wrong:
        raise _Unfit("bad", *wrong)
    return [f"{count} x {torch.cuda.get_device_name(0)}"]


def _together(mesh: Mesh, expected: dict[str, Any], own: _Unfit | None) -> list[str]:
    """What only shows between nodes: clocks and bandwidth."""
    mesh.world.barrier()
    clocks = mesh.world.gather(time.time())
    skew = clocks[mesh.world.rank] - statistics.median(clocks)
    facts = [f"clock {skew:+.1f} s"]
    if mesh.world.size > 1:
        gbit = _all_reduce_gbit(mesh)
        facts.append(f"all-reduce {gbit:.1f} Gbit/s over {mesh.world.size} nodes")
        minimum = expected["min_bandwidth_gbit"]
        if minimum:
            best = _link_gbit(mesh)
            facts.append(f"links {best:.1f} Gbit/s")
            if best < minimum and own is None:
                raise _Unfit("bad", f"{best:.1f} Gbit/s to its neighbours, under {minimum:g}")
    limit = expected["max_clock_skew_seconds"]
    if abs(skew) > limit and own is None:
        raise _Unfit("bad", f"its clock is {skew:+.1f} s from the others', over {limit:g}")
    return facts


def _all_reduce_gbit(mesh: Mesh) -> float:
    """Gbit/s of an all-reduce, as bytes of the tensor per second."""
    probe = torch.ones(PROBE_BYTES // 4, device=mesh.device)
    seconds = []
    for _ in range(3):
        mesh.world.barrier()
        started = time.perf_counter()
        total = mesh.world.sum(probe)
        if total[0].item() != mesh.world.size:
            raise _Unfit("bad", f"an all-reduce summed to {total[0].item()}")
        seconds.append(time.perf_counter() - started)
    return 8 * PROBE_BYTES / min(seconds) / 1e9


def _link_gbit(mesh: Mesh) -> float:
    """Gbit/s of the better of this node's two links to its neighbours, one pair at a time.

    Each is measured twice: the first time, NCCL makes the connection.
    """
    probe, size, rank = (
        torch.ones(PROBE_BYTES // 4, device=mesh.device),
        mesh.world.size,
        mesh.world.rank,
    )
    best = 0.0
    for first in range(size if size > 2 else 1):
        second = (first + 1) % size
        mesh.world.barrier()
        if rank not in (first, second):
            continue
        for _ in range(2):
            started = time.perf_counter()
            for source, target in ((first, second), (second, first)):
                if rank == source:
                    dist.send(probe, target)
                else:
                    dist.recv(probe, source)
            probe[0].item()
            best = max(best, 8 * 2 * PROBE_BYTES / (time.perf_counter() - started) / 1e9)
    return best


def _staged(run_dir: Path) -> list[str]:
    config = load_config(RunDirectory(run_dir).slurm / "recipe.yaml")
    try:
        staged = stage(config.model)
    except MooredError as error:
        raise _Unfit("bad", str(error)) from error
    return [] if staged is None else [f"the model is staged in {staged}"]
