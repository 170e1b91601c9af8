"""Writes what `moored plan` foretells of each recipe and cluster into recipes/README.md.

    python benchmarks/plan_recipes.py

The rows between the marks `planned` name recipe, GPUs and overrides; the figures behind them are
made anew. A test holds that they are those of the plan.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "src"))

from moored.config import load_config  # noqa: E402
from moored.plan import cluster_of, make_plan  # noqa: E402
from moored.plan.memory_terms import GIB, total  # noqa: E402

PAGE = ROOT / "recipes" / "README.md"
MARKED = re.compile(r"(<!-- planned -->\n)(.*?)(<!-- /planned -->)", re.S)


def planned(row: str) -> str:
    """A row of the table with its figures made anew; others as they are."""
    cells = [cell.strip() for cell in row.strip().strip("|").split("|")]
    names = re.findall(r"`([^`]+)`", cells[0])
    if not names:
        return row
    nodes = re.match(r"(\d+) nodes", cells[1])
    (gpus,) = re.findall(r"`([^`]+)`", cells[1])
    overrides = re.findall(r"`([^`]+)`", cells[2])
    config = load_config(ROOT / "recipes" / names[0], overrides)
    plan = make_plan(config, cluster_of(gpus, int(nodes[1]) if nodes else 1))
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
    return f"| {' | '.join([*cells[:3], *figures])} |"


def written(page: str) -> str:
    """The page with all figures made anew."""

    def table(match: re.Match[str]) -> str:
        rows = "\n".join(planned(row) for row in match[2].splitlines())
        return f"{match[1]}{rows}\n{match[3]}"

    return MARKED.sub(table, page)


if __name__ == "__main__":
    # Not what this machine has in its cache, but the table of known models, as everywhere.
    os.environ["HF_HUB_CACHE"] = os.devnull
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
