"""What is added to a trainer's loss: the options of a recipe's `regularizer`, by the same names.

Knows the loss and nothing else; a test holds names and defaults to the recipe's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moored.loss.divergence import Direction, Objective, RestFactor
from moored.utils.ramp import scheduled

KINDS = ("tmkl", "kl")
POSITIONS = ("targets", "all")
SCHEDULES = ("constant", "linear", "cosine")


@dataclass(frozen=True)
class Options:
    """The divergence from the base, as in a recipe.

    Attributes:
        weight: factor of the divergence's mean, per target token.
        kind: "tmkl", the target masked, or "kl", the plain one.
        direction: "forward" KL(base || model), "reverse" or "jsd".
        temperature: divides the logits in the divergence, which is multiplied by its square.
        positions: "targets", or "all": prompts, too, by a plain KL.
        prompt_weight: factor of that one's mean; moves with `weight` by the schedule.
        target_weight: factor of the KL between the target and the rest.
        rest_factor: of the KL within the rest: "one" or "base".
        every: the divergence acts on every k-th update, with k times the weight.
        schedule: of the weight: "constant", "linear" or "cosine".
        warmup_steps: updates in which it rises from 0.
        end_ratio: the last weight / `weight`.

    Raises:
        ValueError: an option is out of its range.
    """

    weight: float = 1.0
    kind: Literal["tmkl", "kl"] = "tmkl"
    direction: Direction = "forward"
    temperature: float = 1.0
    positions: Literal["targets", "all"] = "targets"
    prompt_weight: float = 1.0
    target_weight: float = 0.0
    rest_factor: RestFactor = "one"
    every: int = 1
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = 0
    end_ratio: float = 0.0

    def __post_init__(self) -> None:
        for name in ("weight", "prompt_weight"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name}={getattr(self, name)!r}: a finite number > 0 is needed")
        for name in ("warmup_steps", "end_ratio"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)!r}: a number >= 0 is needed")
        if not (isinstance(self.every, int) and self.every >= 1):
            raise ValueError(f"every={self.every!r}: a whole number of updates >= 1 is needed")
        known = {"kind": KINDS, "positions": POSITIONS, "schedule": SCHEDULES}
        for name, values in known.items():
            if getattr(self, name) not in values:
                expected = " or ".join(values)
                raise ValueError(f"{name}={getattr(self, name)!r}: expected {expected}")
        _ = self.objective  # checks the others

    @property
    def objective(self) -> Objective:
        """What the loss is told."""
        return Objective(
            self.direction,
            self.kind == "tmkl",
            self.temperature,
            target_weight=self.target_weight,
            rest_factor=self.rest_factor,
        )

    @property
    def needs_step(self) -> bool:
        """Whether it matters which update it is."""
        return self.every > 1 or self.schedule != "constant" or self.warmup_steps > 0

    def weights_at(self, step: int, num_steps: int) -> tuple[float, float]:
        """Factors of the divergence at targets and elsewhere in update `step` (from 0).

        Both 0 where it does not act.
        """
        if (step + 1) % self.every:
            return 0.0, 0.0
        peak, rise = self.weight * self.every, self.warmup_steps
        weight = scheduled(step, num_steps, peak, self.schedule, rise, self.end_ratio)
        beside = self.prompt_weight * weight / self.weight if self.positions == "all" else 0.0
        return weight, beside
