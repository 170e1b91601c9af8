"""The progress bar of a run: loss, KL, tokens per second, time left.

Nothing is computed or logged here.
"""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from moored.step import StepStats


class Progress:
    """A live bar on a terminal; about twenty plain lines where there is none (SLURM logs)."""

    def __init__(self, num_steps: int, done: int, *, enabled: bool):
        self._num_steps, self._step, self._enabled = num_steps, done, enabled
        self._began, self._done = time.monotonic(), done
        self._console = Console(stderr=True, soft_wrap=not sys.stderr.isatty())
        self._live = enabled and self._console.is_terminal
        self._every = max(1, num_steps // 20)
        self._bar = RichProgress(
            TextColumn("[bold]step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._live,
        )
        self._task = self._bar.add_task("train", total=num_steps, completed=done, figures="")

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def update(self, stats: StepStats, tokens_per_second: float) -> None:
        """Show one more step."""
        self._step += 1
        if not self._enabled:
            return
        figures = f"loss {stats.loss:.4f}  ce {stats.ce:.4f}"
        if stats.kl is not None:
            figures += f"  kl {stats.kl:.4f}"
        figures += f"  {tokens_per_second:,.0f} tok/s"
        if self._live:
            self._bar.update(self._task, completed=self._step, figures=figures)
        elif self._step % self._every == 0 or self._step in (1, self._num_steps):
            seconds = (time.monotonic() - self._began) / (self._step - self._done)
            left = timedelta(seconds=round(seconds * (self._num_steps - self._step)))
            line = f"step {self._step}/{self._num_steps}  {figures}  {left} left"
            self._console.print(line, highlight=False)
