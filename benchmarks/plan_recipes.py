"""Writes what `moored plan` foretells into recipes/README.md and docs/plan.md.

    python benchmarks/plan_recipes.py

The rows between the marks `planned` and `long` name recipe, GPUs and overrides, and `refused` has
commands; the figures and lines behind them are made anew. A test holds that they are the plan's.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "src"))

from moored.config import load_config  # noqa: E402
from moored.plan import cluster_of, make_plan  # noqa: E402
from moored.plan.architecture import find_architecture  # noqa: E402
from moored.plan.memory_terms import GIB, gpu_memory, total  # noqa: E402
from moored.plan.workload import Workload  # noqa: E402
from moored.utils.errors import UserError  # noqa: E402

PAGES = (ROOT / "recipes" / "README.md", ROOT / "docs" / "plan.md")


def written(page: str) -> str:
    """A page with all figures made anew."""
    for name, made in (("planned", planned), ("long", long_rows), ("refused", refused)):
        page = _between(name, made, page)
    return page


def _between(name: str, made: Callable[[str], str], page: str) -> str:
    marked = re.compile(rf"(<!-- {name} -->\n)(.*?)(<!-- /{name} -->)", re.S)
    return marked.sub(lambda match: f"{match[1]}{made(match[2])}\n{match[3]}", page)


def planned(table: str) -> str:
    """A table of GiB, tokens per second, hours and GPU hours."""
    return "\n".join(_planned(row) for row in table.splitlines())


def _planned(row: str) -> str:
    found = _named(row)
    if found is None:
        return row
    cells, recipe, gpus, nodes, overrides = found
    plan = make_plan(load_config(ROOT / "recipes" / recipe, overrides), cluster_of(gpus, nodes))
    low, high = plan.time.range
    assert plan.work.steps is not None
    least, most = (x * plan.work.steps / 3600 for x in (low, high))
    hours = plan.time.seconds() * plan.work.steps / 3600
    figures = [
        f"{total(plan.memory) / GIB:.1f} of {plan.cluster.gpu.memory_bytes / GIB:.1f}",
        f"{plan.time.tokens / plan.time.seconds():,.0f}",
        f"{hours:.1f} ({least:.1f} to {most:.1f})",
        f"{hours * plan.cluster.world:.0f}",
    ]
    return f"| {' | '.join([*cells, *figures])} |"


def long_rows(table: str) -> str:
    """A table of memory by term, and tokens per second where it fits."""
    return "\n".join(_long_row(row) for row in table.splitlines())


def _long_row(row: str) -> str:
    found = _named(row)
    if found is None:
        return row
    cells, recipe, gpus, nodes, overrides = found
    config, cluster = load_config(ROOT / "recipes" / recipe, overrides), cluster_of(gpus, nodes)
    architecture = find_architecture(config.model)
    work = Workload.of(config, by_tokens=architecture.by_tokens)
    terms = {t.name: t.bytes / GIB for t in gpu_memory(architecture, work, cluster.world)}
    there = cluster.gpu.memory_bytes / GIB
    rate = "does not fit"
    if sum(terms.values()) <= there:
        plan = make_plan(config, cluster)
        rate = f"{plan.time.tokens / plan.time.seconds():,.0f}"
    held = terms["base"] + terms["embedding, head, norms"]
    shown = [held, *(terms[name] for name in ("adapter", "checkpoints", "at work"))]
    rest = sum(terms.values()) - sum(shown)
    figures = [*(f"{x:.1f}" for x in (*shown, rest)), f"{sum(terms.values()):.1f} of {there:.1f}"]
    return f"| {' | '.join([*cells, *figures, rate])} |"


def _named(row: str) -> tuple[list[str], str, str, int, list[str]] | None:
    """The first three cells of a row, and its recipe, GPUs, nodes and overrides; None: no such."""
    cells = [cell.strip() for cell in row.strip().strip("|").split("|")]
    names = re.findall(r"`([^`]+)`", cells[0])
    if not names:
        return None
    nodes = re.match(r"(\d+) nodes", cells[1])
    (gpus,) = re.findall(r"`([^`]+)`", cells[1])
    overrides = re.findall(r"`([^`]+)`", cells[2])
    return cells[:3], names[0], gpus, int(nodes[1]) if nodes else 1, overrides


def refused(block: str) -> str:
    """Commands, each with the line by which it is refused."""
    lines = [""]
    for command in re.findall(r"\$ moored plan (.*)", block):
        recipe, _, gpus, *overrides = shlex.split(command)
        try:
            make_plan(load_config(ROOT / recipe, overrides), cluster_of(gpus))
        except UserError as error:
            said = textwrap.wrap(f"error: {error}", 104, break_on_hyphens=False)
            lines += [f"    $ moored plan {command}", *(f"    {line}" for line in said), ""]
        else:
            raise SystemExit(f"not refused: moored plan {command}")
    return "\n".join(lines)


if __name__ == "__main__":
    # Not what this machine has in its cache, but the table of known models, as everywhere.
    os.environ["HF_HUB_CACHE"] = os.devnull
    for path in PAGES:
        path.write_text(written(path.read_text(encoding="utf-8")), encoding="utf-8")
