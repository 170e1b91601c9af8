"""Time, memory and accuracy of cross-entropy + TMKL from hidden states on one GPU, against peers.

    python benchmarks/head_gpu.py                               # three shapes of 8B to 70B models
    python benchmarks/head_gpu.py --shape 8192,128256,4096 --out head_gpu

How it measures. bf16 hidden states and weight. Contestants take turns with the floor, timed by CUDA
events; the unit is the floor, three matrix products (h W^T, h0 W^T, G W) with bf16 operands and
results at the best of several chunk sizes, the least that a frozen head needs. Memory is what the
allocator held at most during a call above what it held before; the gradient that is handed out is
counted, inputs are not.

Two errors of the gradient, both relative over the first 64 rows against fp64: of cross-entropy +
TMKL, and of the TMKL alone at a KL of about 0.01 nats, where a regulariser works and bf16 logits
lose their digits. A contestant that cannot mask the target (liger) runs plain CE + JSD, and forms
dW, which a frozen head does not need.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from outcome import Bar, Panel, add_option, spread, write
from torch import Tensor
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))
import moored.loss.chunks
from moored.loss.divergence import Objective, Scales
from moored.loss.head import Head, attach_gradient, linear_tmkl_loss

SHAPES = ("8192,128256,4096", "8192,128256,8192", "8192,152064,3584")
CHUNKS = (1024, 2048, 4096)
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def main() -> None:
    """Measure every shape and print a table for each."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", nargs="*", default=SHAPES, help="T,V,D")
    parser.add_argument("--samples", type=int, default=15)
    parser.add_argument("--only", nargs="*", help="contestants by name")
    add_option(parser)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("a CUDA GPU is needed; on a CPU: benchmarks/head_cost.py")
    found: list[dict[str, Any]] = []
    for shape in args.shape:
        found.append(measure(*map(int, shape.split(",")), args.samples, args.only))
        print(table(found[-1]), end="\n\n", flush=True)
    title = f"The head on {found[0]['gpu']}: T = {found[0]['T']:,}, bf16"
    write(args.out, found, title, [panel(result) for result in found])


def table(result: dict[str, Any]) -> str:
    """Median with p20 and p80 of the ratio; milliseconds, memory and errors."""
    lines = [
        "T={T} V={V} D={D} bf16 on {gpu}, torch {torch}; floor {floor_ms:.1f} ms at chunks of "
        "{floor_chunk} ({tflops:.0f} TFLOP/s); KL {kl:.3f}".format(**result),
        "",
        "| contestant | ms | floor / time | time / floor (p20-p80) | extra GiB | error | of TMKL |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, run in result["runs"].items():
        if "failed" in run:
            lines.append(f"| {name} | {run['failed']} | | | | | |")
            continue
        low, middle, high = spread(run["ratios"])
        errors = [f"{e:.1e}" if e is not None else "-" for e in (run["error"], run["tmkl_error"])]
        lines.append(
            f"| {name} | {statistics.median(run['ms']):.1f} | {1 / middle:.0%} | {middle:.2f} "
            f"({low:.2f}-{high:.2f}) | {run['extra_gib']:.2f} | {' | '.join(errors)} |"
        )
    return "\n".join(lines)


def panel(result: dict[str, Any]) -> Panel:
    """Milliseconds of everybody at one shape."""
    bars = [
        Bar(
            name=name,
            value=None if "failed" in run else statistics.median(run["ms"]),
            is_ours=name.startswith("ours"),
        )
        for name, run in result["runs"].items()
    ]
    title = "V = {V:,}, D = {D:,}: ms (three products: the line)".format(**result)
    return Panel(title, bars, mark=result["floor_ms"], form=",.1f")


def measure(t: int, v: int, d: int, samples: int, only: list[str] | None) -> dict[str, Any]:
    """Every contestant at one shape."""
    torch.manual_seed(0)
    gpu = torch.device("cuda")
    hidden = torch.randn(t, d, device=gpu)
    reference = hidden + 0.034 * torch.randn(t, d, device=gpu)
    weight = (torch.randn(v, d, device=gpu) * (4 / d**0.5)).bfloat16()
    hidden, reference = hidden.bfloat16().requires_grad_(), reference.bfloat16()
    targets = torch.randint(0, v, (t,), device=gpu)
    floors = {chunk: Floor(hidden.detach(), reference, weight, chunk) for chunk in CHUNKS}
    for _ in range(2):  # the first time warms up
        times = {chunk: statistics.median(seconds(run, 5)) for chunk, run in floors.items()}
    quickest = min(times, key=lambda chunk: times[chunk])
    floor = floors[quickest]
    floors.clear()
    runs: dict[str, Any] = {}
    for name, loss_fn in contestants(weight).items():
        if only and name not in only:
            continue
        release()
        print(f"{name} ...", file=sys.stderr, flush=True)
        try:
            runs[name] = contest(name, loss_fn, hidden, reference, weight, targets, floor, samples)
        except torch.OutOfMemoryError:
            runs[name] = {"failed": "out of memory"}
        hidden.grad = None
    floor_ms = statistics.median(1e3 * x for x in seconds(floor, samples))
    _, _, kl = exact(hidden[:64].detach(), reference[:64], weight, targets[:64])
    return {
        "T": t, "V": v, "D": d, "gpu": torch.cuda.get_device_name(), "torch": torch.__version__,
        "floor_ms": floor_ms, "floor_chunk": quickest, "tflops": 6 * t * v * d / floor_ms / 1e9,
        "kl": kl, "runs": runs,
    }  # fmt: skip


def contest(
    name: str,
    loss_fn: Loss,
    hidden: Tensor,
    reference: Tensor,
    weight: Tensor,
    targets: Tensor,
    floor: Floor,
    samples: int,
) -> dict[str, Any]:
    """One contestant in turns with the floor."""

    def run() -> None:
        hidden.grad = None
        loss_fn(hidden, reference, targets).backward()

    run()
    hidden.grad = None
    release()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    extra = torch.cuda.max_memory_allocated() - before
    error = tmkl_error = None
    if not name.startswith("liger"):
        n = 64
        ce, tmkl, _ = exact(hidden[:n].detach(), reference[:n], weight, targets[:n])
        assert hidden.grad is not None
        both = ce if "CE" in name else ce + tmkl
        error = rel(hidden.grad[:n].double() * (len(targets) / n), both)
        if "CE" not in name:
            tmkl_error = rel(kl_gradient(name, hidden, reference, weight, targets, n), tmkl)
    ms, ratios = [], []
    for _ in range(samples):
        unit, took = seconds(floor, 1)[0], seconds(run, 1)[0]
        unit = (unit + seconds(floor, 1)[0]) / 2
        ms.append(1e3 * took)
        ratios.append(took / unit)
    return {
        "ms": ms, "ratios": ratios, "extra_gib": extra / 2**30,
        "error": error, "tmkl_error": tmkl_error,
    }  # fmt: skip


def contestants(weight: Tensor) -> dict[str, Loss]:
    """Name to loss."""

    def eager(h: Tensor, h0: Tensor, y: Tensor) -> Tensor:
        return functional.cross_entropy((h @ weight.T).float(), y) + kl_of(h, h0, y, weight)

    def ours(h: Tensor, h0: Tensor, y: Tensor) -> Tensor:
        return linear_tmkl_loss(h, h0, weight, y).loss

    head = Head(torch.nn.Parameter(weight, requires_grad=False))

    def in_step(h: Tensor, h0: Tensor, y: Tensor) -> Tensor:
        how = {"objective": Objective(), "scales": Scales(1 / len(y), 1 / len(y))}
        grad, sums = head(h, h0, y, use=Head.loss, **how)
        return attach_gradient(h, grad, sums)

    def plain(h: Tensor, h0: Tensor, y: Tensor) -> Tensor:
        found, moored.loss.chunks.kernels_run = moored.loss.chunks.kernels_run, lambda *_: False
        try:
            return ours(h, h0, y)
        finally:
            moored.loss.chunks.kernels_run = found

    def alone(h: Tensor, h0: Tensor, y: Tensor) -> Tensor:
        return linear_tmkl_loss(h, None, weight, y, kl_weight=0.0).loss

    every: dict[str, Loss] = {
        "ours": ours,
        "ours, as a training step calls it": in_step,
        "ours, torch only": plain,
        "ours, CE alone": alone,
        "eager": eager,
    }
    if importlib.util.find_spec("liger_kernel"):
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        student = weight.clone().requires_grad_()
        liger = LigerFusedLinearJSDLoss(compiled=True, chunk_size=1024)

        def run_liger(h: Tensor, h0: Tensor, y: Tensor) -> Tensor:
            student.grad = None
            out = liger(h, student, h0, weight, y)
            return out[0] if isinstance(out, tuple) else out

        every["liger chunked JSD"] = run_liger
    return every


def kl_of(h: Tensor, h0: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """The mean TMKL, written plainly: logits in h's dtype, softmax in fp32 (fp64 for fp64)."""
    wide = torch.promote_types(h.dtype, torch.float32)
    policy, base = (h @ weight.T).to(wide), (h0 @ weight.T).to(wide)
    log_p = policy.scatter(1, y[:, None], -1e30).log_softmax(-1)
    log_q = base.scatter(1, y[:, None], -1e30).log_softmax(-1)
    return functional.kl_div(log_p, log_q, log_target=True, reduction="batchmean")


def kl_gradient(
    name: str, hidden: Tensor, reference: Tensor, weight: Tensor, targets: Tensor, n: int
) -> Tensor:
    """The gradient of the mean TMKL of the first rows, as a contestant computes it."""
    h, h0, y = hidden[:n].detach().requires_grad_(), reference[:n], targets[:n]
    if name == "eager":
        return torch.autograd.grad(kl_of(h, h0, y, weight), h)[0]
    head = Head(torch.nn.Parameter(weight, requires_grad=False))
    found = moored.loss.chunks.kernels_run
    if "torch" in name:
        moored.loss.chunks.kernels_run = lambda *_: False
    how = {"objective": Objective(), "scales": Scales(0.0, 1 / n)}
    grad, _ = head(h, h0, y, use=Head.loss, **how)
    moored.loss.chunks.kernels_run = found
    return grad


def exact(h: Tensor, h0: Tensor, weight: Tensor, y: Tensor) -> tuple[Tensor, Tensor, float]:
    """fp64: the gradients of cross-entropy and of TMKL, and the KL."""
    h, h0, weight = h.double().requires_grad_(), h0.double(), weight.double()
    kl = kl_of(h, h0, y, weight)
    (tmkl,) = torch.autograd.grad(kl, h)
    (ce,) = torch.autograd.grad(functional.cross_entropy(h @ weight.T, y), h)
    return ce, tmkl, float(kl.detach())


class Floor:
    """The three products of every chunk, into buffers made beforehand."""

    def __init__(self, hidden: Tensor, reference: Tensor, weight: Tensor, chunk: int):
        self.stacks = [
            torch.cat(pair)
            for pair in zip(hidden.split(chunk), reference.split(chunk), strict=True)
        ]
        self.weight = weight
        self.logits = weight.new_empty((2 * chunk, len(weight)))
        self.grad = weight.new_empty((chunk, weight.shape[1]))

    def __call__(self) -> None:
        """Run them."""
        for stack in self.stacks:
            n = len(stack)
            torch.mm(stack, self.weight.T, out=self.logits[:n])
            torch.mm(self.logits[: n // 2], self.weight, out=self.grad[: n // 2])


def seconds(run: Callable[[], None], count: int) -> list[float]:
    """Seconds on the GPU, by events."""
    times = []
    for _ in range(count):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return times


def rel(a: Tensor, b: Tensor) -> float:
    """Relative distance."""
    return float((a.double() - b).norm() / b.norm())


def release() -> None:
    """Give freed memory back to the device."""
    gc.collect()
    torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
