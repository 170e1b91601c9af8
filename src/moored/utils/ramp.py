"""A weight or a learning rate over the steps of a run."""

from __future__ import annotations

import math


def scheduled(
    step: int, num_steps: int, peak: float, schedule: str, warmup_steps: int, end_ratio: float
) -> float:
    """A linear rise to `peak`, then its schedule towards `end_ratio` times that; a pure function.

    Args:
        step: the update, from 0.
        num_steps: of the run.
        peak: the value after the rise.
        schedule: "constant", "linear" or "cosine".
        warmup_steps: updates of the rise.
        end_ratio: the last value over `peak`.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    if schedule == "constant":
        factor = 1.0
    elif schedule == "linear":
        factor = 1.0 - progress
    else:
        factor = 0.5 * (1.0 + math.cos(math.pi * progress))
    return peak * (end_ratio + (1.0 - end_ratio) * factor)
