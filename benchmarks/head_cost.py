"""Time, memory and accuracy of cross-entropy + TMKL from hidden states, against its peers.

    python benchmarks/head_cost.py                       # T = 2048, V = 32768, D = 512, fp32, CPU
    python benchmarks/head_cost.py --rounds 10 --samples 3 --out head

How it measures. Every sample is a fresh process, the contestants take turns round by round, and
each process times its contestant and the floor alternately: the unit is the floor, three matrix
products (h W^T, h0 W^T, G W) in chunks of 256 tokens, the least that a frozen head needs. A ratio
is of neighbouring runs, so that a busy machine slows both. Forward and backward are timed together.

Memory is the high-water mark of resident memory during the first call, less what was resident
before it (inputs made, the thread pool and the library's buffers warmed up by the floor): Linux
lets a process reset the mark through /proc/self/clear_refs. The gradient that is handed out is
counted; inputs are not.

The gradient's error is relative, over the first 64 rows, against fp64 autograd written plainly, of
what a contestant computes: no peer masks the target, so they run cross-entropy + the plain KL, or
JSD (compared with nothing), or cross-entropy alone, which is a bound, not a rival. What is compiled
is called once before it is measured.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import sys
import time
from pathlib import Path

import torch
from fresh import output_of
from head_peers import CHUNK, CONTESTANTS
from outcome import Bar, Panel, add_option, spread, write
from torch.nn import functional

FLOOR = "three GEMMs"


def main() -> None:
    """Run the contestants in turns and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5, help="processes per contestant")
    parser.add_argument("--samples", type=int, default=2, help="timed pairs per process")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--only", nargs="*", choices=list(CONTESTANTS))
    add_option(parser)
    parser.add_argument("--contestant", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.contestant:
        print(json.dumps(measure(args)))
        return
    names = [name for name in args.only or CONTESTANTS if CONTESTANTS[name].is_installed]
    for name in sorted(set(args.only or CONTESTANTS) - set(names)):
        print(f"{name}: {CONTESTANTS[name].package} is not installed, left out")
    runs: dict[str, list[dict]] = {name: [] for name in names}
    for i in range(args.rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            runs[name].append(in_fresh_process(name, args))
            print(f"round {i + 1}/{args.rounds} {name}: {runs[name][-1]}", file=sys.stderr)
    print(table(runs, args))
    write(args.out, {"arguments": vars(args), "runs": runs}, *picture(runs, args))


def in_fresh_process(name: str, args: argparse.Namespace) -> dict:
    """One sample of one contestant."""
    command = [sys.executable, __file__, "--contestant", name]
    for option in ("tokens", "vocab", "hidden", "samples", "threads"):
        command += [f"--{option}", str(getattr(args, option))]
    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
    return json.loads(output_of(name, command, env=environment).splitlines()[-1])


def table(runs: dict[str, list[dict]], args: argparse.Namespace) -> str:
    """Median with p20 and p80 of the ratio; the largest memory and error."""
    lines = [
        f"T={args.tokens} V={args.vocab} D={args.hidden} fp32, {args.threads} threads, forward + "
        f"backward; unit: {FLOOR} in chunks of {CHUNK}; {args.rounds} processes x {args.samples}",
        "",
        "| contestant | computes | time / floor (p20-p80) | extra memory MiB | gradient error | |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in runs.items():
        low, middle, high = spread(all_ratios(found))
        memory = max(run["extra_mib"] for run in found)
        errors = [run["error"] for run in found if run["error"] is not None]
        error = f"{max(errors):.1e}" if errors else "-"
        contestant = CONTESTANTS[name]
        lines.append(
            f"| {name} | {contestant.computes} | {middle:.2f} ({low:.2f}-{high:.2f}) "
            f"| {memory:.0f} | {error} | {contestant.note} |"
        )
    return "\n".join(lines)


def all_ratios(found: list[dict]) -> list[float]:
    """To the floor, of all processes."""
    return [ratio for run in found for ratio in run["ratios"]]


def picture(runs: dict[str, list[dict]], args: argparse.Namespace) -> tuple[str, list[Panel]]:
    """A title, and time and memory as bars."""
    time_bars, memory_bars = [], []
    for name, found in runs.items():
        low, middle, high = spread(all_ratios(found))
        ours = CONTESTANTS[name].is_ours
        time_bars.append(Bar(name=name, value=middle, low=low, high=high, is_ours=ours))
        memory = max(run["extra_mib"] for run in found)
        memory_bars.append(Bar(name=name, value=memory, is_ours=ours))
    title = f"The head: T = {args.tokens:,}, V = {args.vocab:,}, D = {args.hidden:,}, fp32, CPU"
    return title, [
        Panel(f"time / {FLOOR}, forward and backward", time_bars, mark=1.0),
        Panel("extra memory, MiB", memory_bars, form=",.0f"),
    ]


# ---------------------------------------------------------------- inside one process


def measure(args: argparse.Namespace) -> dict:
    """Ratios to the floor, memory above the inputs, and the gradient's error."""
    torch.set_num_threads(args.threads)
    generator = torch.Generator().manual_seed(0)
    t, d, v = args.tokens, args.hidden, args.vocab
    hidden = torch.empty(t, d).normal_(generator=generator)
    reference = torch.empty(t, d).normal_(0, 0.1, generator=generator).add_(hidden)
    weight = torch.empty(v, d).normal_(0, 4 / d**0.5, generator=generator)
    targets = torch.randint(0, v, (t,), generator=generator)
    hidden.requires_grad_()
    contestant = CONTESTANTS[args.contestant]
    loss_fn = contestant.make(weight)

    def run() -> float:
        hidden.grad = None
        start = time.perf_counter()
        loss_fn(hidden, reference, targets).backward()
        return time.perf_counter() - start

    floor(hidden.detach(), reference, weight, rows=CHUNK)
    if contestant.is_compiled:
        run()
        hidden.grad = None
    release_free_memory()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    run()
    extra = resident("VmHWM") - before
    assert hidden.grad is not None
    error = None
    if contestant.computes != "jsd":
        rows = min(64, t)
        exact = exact_gradient(
            hidden[:rows], reference[:rows], weight, targets[:rows], contestant.computes
        )
        found = hidden.grad[:rows].double() * (t / rows)
        error = float((found - exact).norm() / exact.norm())
    ratios = []
    for _ in range(args.samples):
        unit = floor(hidden.detach(), reference, weight, rows=t)
        seconds = run()
        unit = (unit + floor(hidden.detach(), reference, weight, rows=t)) / 2
        ratios.append(seconds / unit)
    return {"ratios": ratios, "extra_mib": extra, "error": error}


def floor(hidden, reference, weight, rows: int) -> float:
    """Seconds of the three products over `rows` tokens, into buffers made beforehand."""
    logits, grad = torch.empty(CHUNK, len(weight)), torch.empty(CHUNK, weight.shape[1])
    logits.zero_()
    start = time.perf_counter()
    for i in range(0, rows, CHUNK):
        n = min(CHUNK, rows - i)
        torch.mm(hidden[i : i + n], weight.T, out=logits[:n])
        torch.mm(reference[i : i + n], weight.T, out=logits[:n])
        torch.mm(logits[:n], weight, out=grad[:n])
    return time.perf_counter() - start


def exact_gradient(hidden, reference, weight, targets, computes: str):
    """fp64 autograd of the mean loss over these rows."""
    exact = hidden.detach().double().requires_grad_()
    weight = weight.double()
    policy, base = exact @ weight.T, reference.double() @ weight.T
    loss = functional.cross_entropy(policy, targets)
    if computes != "ce":
        keep = torch.ones_like(policy, dtype=torch.bool)
        if computes == "tmkl":
            keep.scatter_(1, targets[:, None], False)
        shape = len(targets), -1
        log_p = policy[keep].view(shape).log_softmax(-1)
        log_q = base[keep].view(shape).log_softmax(-1)
        loss = loss + (log_q.exp() * (log_q - log_p)).sum() / len(targets)
    loss.backward()
    return exact.grad


def resident(field: str) -> float:
    """MiB of resident memory, now (VmRSS) or at most (VmHWM)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"no {field} in /proc/self/status: Linux is needed")


def release_free_memory() -> None:
    """Give freed pages back, so that reusing them counts as extra."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except OSError:
        print("no glibc: freed pages may hide some memory", file=sys.stderr)


if __name__ == "__main__":
    main()
