"""What a process says while it waits for the others of its run, and for how long it does.

How they find each other is `rendezvous.py`'s and `joining.py`'s.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Collection

from moored.utils.environment import RENDEZVOUS_VARIABLE, RankInfo
from moored.utils.errors import UserError

log = logging.getLogger(__name__)

FIRST_SECONDS = 5.0  # of silence; each silence after it is twice as long
OPTION = "parallel.rendezvous_seconds"


class Waiting:
    """The patience of one process: all that it waits for together takes `seconds` at most."""

    def __init__(self, place: RankInfo, seconds: float):
        self._place, self._seconds = place, seconds
        self._began = time.monotonic()
        self._silence, self._next = FIRST_SECONDS, self._began + FIRST_SECONDS

    @property
    def left(self) -> float:
        """Seconds until it gives up; 0 from then on."""
        return max(0.0, self._began + self._seconds - time.monotonic())

    @property
    def is_due(self) -> bool:
        """Whether it has been silent for long enough."""
        return time.monotonic() >= self._next

    def say(self, whom: str) -> None:
        """For whom it waits, how much longer, and how it need not; if it is due."""
        if not self.is_due:
            return
        self._silence *= 2
        self._next = time.monotonic() + self._silence
        log.warning(
            "rank %d of %d waits for %s, for %.0f s more (%s, or %s); %s",
            self._place.rank,
            self._place.world_size,
            whom,
            self.left,
            OPTION,
            RENDEZVOUS_VARIABLE,
            self._hint(),
        )

    def over(self, whom: str) -> UserError:
        """What ends the process when its patience has."""
        return UserError(
            f"rank {self._place.rank} of {self._place.world_size} waited {self._seconds:g} s for "
            f"{whom} ({OPTION}, or {RENDEZVOUS_VARIABLE}, for more): see their own logs; "
            f"{self._hint()}"
        )

    def _hint(self) -> str:
        size = self._place.world_size
        if self._place.by_slurm:
            return (
                "to run one process alone: `env -u SLURM_STEP_ID moored ...`; all of them from the "
                f"shell of an interactive step: `srun --overlap --ntasks={size} moored ...`"
            )
        # Without RANK, a step of srun that the launcher runs in would count.
        step = " -u SLURM_STEP_ID" if "SLURM_STEP_ID" in os.environ else ""
        return f"to run one process alone: `env -u RANK -u WORLD_SIZE{step} moored ...`"


def ranks(missing: Collection[int]) -> str:
    """`rank 3`, `ranks 1, 4-7`: many of them in few words."""
    ranges: list[list[int]] = []
    for rank in sorted(missing):
        if ranges and rank == ranges[-1][1] + 1:
            ranges[-1][1] = rank
        else:
            ranges.append([rank, rank])
    parts = [str(a) if a == b else f"{a}-{b}" for a, b in ranges]
    shown = parts[:8] + ([f"and {len(parts) - 8} more groups"] if parts[8:] else [])
    return f"rank{'s' if len(missing) != 1 else ''} {', '.join(shown)}"
