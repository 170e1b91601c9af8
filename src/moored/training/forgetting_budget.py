"""A forgetting budget held by moving the regulariser's weight: the controller and its state.

It knows numbers only; the probe is measured by `train.py`. The weight is the multiplier of the
constrained problem "least cross-entropy with at most so much forgotten": dual ascent on its
logarithm, with the proportional part that damps it, of the PID Lagrangian methods of Stooke et al.
(arXiv 2007.03964). It is never lowered while the budget is exceeded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from moored.config import Budget
from moored.config.regularizer import LEAST_WEIGHT

# Change of the log weight per measurement: INTEGRAL times what is above the limit and PROPORTIONAL
# times what was added since the last measurement, both in limits, within these bounds. Slow and
# damped, downwards above all: what a weight that was too low for a while has let go comes back at
# the task's expense, and a weight that swings learns less than a steady one that forgets as little.
INTEGRAL, PROPORTIONAL, MOST_UP, MOST_DOWN = 0.5, 0.5, 0.7, 0.35
PATIENCE = 3  # measurements above the budget at the greatest weight until it is given up


class Controller:
    """Moves a weight so that what is measured on the probe ends at the budget.

    Args:
        budget: the recipe's.
        weight: at the start.

    Attributes:
        weight: from here on.
        acted: the weight under which the last measurement came about.
        measured: last, in the budget's unit.
    """

    def __init__(self, budget: Budget, weight: float):
        self.budget = budget
        self.weight = min(max(weight, LEAST_WEIGHT), budget.max_weight)
        self.acted = self.weight
        self.measured: float | None = None
        self._stuck = 0

    def update(self, measured: float) -> float:
        """Take a measurement, in the budget's unit, and return the weight from here on.

        Text that got better counts as nothing lost.
        """
        limit, before = self.budget.limit, self.measured
        step = MOST_UP  # a perplexity that is not finite is as bad as can be
        if math.isfinite(measured):
            step = INTEGRAL * (max(measured, 0.0) / limit - 1)
            if before is not None and math.isfinite(before):
                step += PROPORTIONAL * (max(measured, 0.0) - max(before, 0.0)) / limit
            if measured > limit:
                step = max(step, 0.0)
        self.acted = self.weight
        moved = self.weight * math.exp(min(max(step, -MOST_DOWN), MOST_UP))
        self.weight = min(max(moved, LEAST_WEIGHT), self.budget.max_weight)
        self.measured = measured
        # As good as the greatest: a step below it after the measurement before was a little better.
        at_most = self.acted >= self.budget.max_weight * math.exp(-MOST_DOWN)
        self._stuck = self._stuck + 1 if at_most and not self.is_held else 0
        return self.weight

    @property
    def is_held(self) -> bool:
        """Whether the last measurement is within the budget and its tolerance."""
        most = self.budget.limit * (1 + self.budget.tolerance)
        return self.measured is not None and self.measured <= most

    @property
    def is_lost(self) -> bool:
        """Whether the greatest weight has not been enough for some time."""
        return self._stuck >= PATIENCE

    def verdict(self, step: int) -> str:
        """What came of the budget, in one line that names a fix where it was broken."""
        budget = self.budget
        measured = math.nan if self.measured is None else self.measured
        says = (
            f"after step {step} the probe of regularizer.budget has lost {measured:.3g} "
            f"{budget.unit} of {budget.limit:g} that it may, at weight {self.acted:.3g}"
        )
        if self.is_held:
            return f"the budget was held: {says}"
        greatest = self.acted == budget.max_weight
        at_most = " (the greatest)" if greatest else ""
        start = "budget.max_weight" if greatest else "regularizer.weight, where it starts"
        return (
            f"the budget was broken: {says}{at_most}: lower optim.learning_rate, raise {start}, "
            "measure more often (budget.every), or allow more"
        )

    def outcome(self) -> dict[str, Any]:
        """What a report says of it: fields of `build_report.TrainedRun`."""
        return {
            "weight": self.acted,
            "budget_lost": self.measured,
            "budget_held": self.is_held,
        }

    def state_dict(self) -> dict[str, Any]:
        """The state as JSON values."""
        finite = self.measured is not None and math.isfinite(self.measured)
        measured = self.measured if finite else None
        return {
            "weight": self.weight,
            "acted": self.acted,
            "measured": measured,
            "stuck": self._stuck,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`."""
        self.weight, self.acted, self.measured = (
            state[name] for name in ("weight", "acted", "measured")
        )
        self._stuck = state["stuck"]
