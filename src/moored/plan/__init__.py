"""What a recipe needs and how long it takes on GPUs, before anything is started; without torch."""

from __future__ import annotations

from moored.plan.gpus import cluster_of
from moored.plan.plan_text import as_json, as_text
from moored.plan.planning import (
    load_problem,
    machine_line,
    make_plan,
    site_cluster,
    site_warning,
)

__all__ = [
    "as_json",
    "as_text",
    "cluster_of",
    "load_problem",
    "machine_line",
    "make_plan",
    "site_cluster",
    "site_warning",
]
