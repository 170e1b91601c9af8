"""The study's queue: every run that has no result yet, one after the other, for hours.

    python benchmarks/study/run.py --data DIR [--work DIR] [--only TEXT ...] [--list]

It may be stopped at any point and started again: a run goes on from its checkpoint, and its result,
one small JSON below benchmarks/study/results, is written whole or not at all. `tables.py` makes
docs/study.md's tables of them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import yaml
from common import RESULTS, Spec, prepare, recipe, specs


def main() -> None:
    """Work the queue off."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--data", type=Path, required=True, help="folder of the public texts")
    arguments.add_argument("--work", type=Path, default=Path("study-work"), help="run directories")
    arguments.add_argument("--only", nargs="*", help="runs whose name holds one of these texts")
    arguments.add_argument("--jobs", type=int, default=1, help="runs at a time, sharing the cores")
    arguments.add_argument("--list", action="store_true", help="say what is left, and stop")
    given = arguments.parse_args()
    RESULTS.mkdir(exist_ok=True)
    left = [spec for spec in specs() if not all(_result(name).exists() for name in spec.results)]
    if given.only:
        left = [spec for spec in left if any(text in spec.name for text in given.only)]
    print(f"{len(left)} runs left: {' '.join(spec.name for spec in left)}", flush=True)
    if given.list:
        return
    texts = prepare(given.data, given.work)
    # Two processes of one thread each do more than one of two.
    threads = max(1, (os.cpu_count() or 1) // given.jobs)
    with ThreadPoolExecutor(given.jobs) as pool:
        done = list(pool.map(lambda spec: _run(spec, given.work, texts, threads), left))
    failed = [spec.name for spec, is_done in zip(left, done, strict=True) if not is_done]
    if failed:
        raise SystemExit(f"{len(failed)} runs failed: {' '.join(failed)}: see their logs")


def _result(name: str) -> Path:
    return RESULTS / f"{name}.json"


def _run(spec: Spec, work: Path, texts: Path, threads: int) -> bool:
    print(f"{spec.name}\n", end="", flush=True)
    folder = work / "recipes"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{spec.name}.yaml"
    path.write_text(yaml.safe_dump(recipe(spec, texts.absolute()), sort_keys=False))
    started = time.time()
    log = work / f"{spec.name}.log"
    run = work / "runs" / spec.name
    report = run / "report" / "report.json"
    with log.open("a") as stream:

        def moored(*arguments: str | Path) -> int:
            return subprocess.run(
                [sys.executable, "-m", "moored", *map(str, arguments)],
                stdout=stream,
                stderr=stream,
                check=False,
                env=os.environ | {"OMP_NUM_THREADS": str(threads)},
            ).returncode

        if "regularizer.anchors" in spec.overrides:  # the base writes them once, for all runs
            moored("prepare", path)
        ended = moored("train", path, f"output.dir={work / 'runs'}")
        # A run that refused to go on with a broken budget (3) has an adapter and a report, too.
        if ended not in (0, 3) or not report.exists():
            print(f"{spec.name} ended with {ended}: {log}", flush=True)
            return False
        overrides = json.loads(json.dumps(spec.overrides).replace(f"{texts.absolute()}/", ""))
        common = {"overrides": overrides, "exit_code": ended, "machine": _machine()}
        trained, *parts = spec.results
        figures = json.loads(report.read_text())
        _write(trained, spec, spec.label, common, figures, started)
        if parts:
            scales = [word for scale in spec.scales for word in ("--scale", str(scale))]
            out = work / "scaled" / spec.name
            ended = moored("evaluate", run, *scales, "--out", out)
            if ended:
                print(f"{spec.name}, scaled, ended with {ended}: {log}", flush=True)
                return False
            measured = json.loads((out / "report.json").read_text())
            for scale, name in zip(spec.scales, parts, strict=True):
                arms = {k: arm for k, arm in measured["arms"].items() if arm["scale"] == scale}
                own = common | {"scale": scale}
                _write(
                    name, spec, f"{spec.label}-x{scale:g}", own, measured | {"arms": arms}, started
                )
    shutil.rmtree(run / "checkpoints", ignore_errors=True)
    return True


def _write(
    name: str,
    spec: Spec,
    label: str,
    common: dict[str, Any],
    figures: dict[str, Any],
    started: float,
) -> None:
    """One result's file, whole or not at all."""
    for arm in figures["arms"].values():
        arm.pop("where", None)  # what is not counted here would make the files large
    result = {
        "spec": {"data": spec.data, "label": label, "seed": spec.seed},
        "wall_seconds": round(time.time() - started, 1),
        **common,
        "report": figures,
    }
    draft = _result(name).with_suffix(".draft")
    draft.write_text(json.dumps(result, separators=(",", ":"), allow_nan=False) + "\n")
    draft.replace(_result(name))


def _machine() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{os.cpu_count()} x {platform.machine()} CPU"


if __name__ == "__main__":
    main()
