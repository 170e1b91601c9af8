"""What takes long says how far it is: a bar on a terminal, a line now and then in a log.

Nothing is computed here. No thread is started, and neither a device nor another rank is waited for:
who works says so as it goes, and whatever is done within the interval leaves no line. Only the
first rank speaks, and never on stdout.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from types import TracebackType
from typing import Any, Self, TypeVar

from moored.utils.environment import own_rank
from moored.utils.errors import UserError
from moored.utils.log import terminal

log = logging.getLogger(__name__)
_T = TypeVar("_T")

VARIABLE = "MOORED_PROGRESS_SECONDS"
INTERVAL_SECONDS = 30.0  # between two lines of a log; the variable says otherwise
BAR_AFTER_SECONDS = 1.0  # what is over before that has no bar
REFRESH_SECONDS = 0.1  # of a bar
WATCH_SECONDS = 0.5  # how often another process is looked at


def interval_seconds() -> float:
    """Seconds between two lines of a log.

    Raises:
        UserError: the variable holds no such number.
    """
    given = os.environ.get(VARIABLE)
    if not given:
        return INTERVAL_SECONDS
    try:
        seconds = float(given)
    except ValueError:
        seconds = math.nan
    if not seconds >= 0:
        raise UserError(
            f"{VARIABLE}={given} is not a number of seconds from 0: set it to 30, say, or to inf "
            "for no lines at all"
        )
    return seconds


class Phase:
    """Something long, of which it is known how much is done.

    Use it in a `with`, and call `advance` after each part, or loop over `over`.

    Args:
        what: is done, in words that a line can begin with.
        total: how much it is, in `unit`; None where that is not known. What has to be counted for
            it is called for the first line or bar. Whole numbers are written out, others with one
            decimal.
        unit: in which it is counted, in the plural.
    """

    def __init__(
        self, what: str, total: float | Callable[[], float | None] | None = None, unit: str = ""
    ):
        self.what, self.unit = what, unit
        self._whole = total
        self._interval = interval_seconds()
        self._done: float = 0
        self._began = self._next_line = self._next_bar = self._due = math.inf
        self._bar: _Row | None = None

    def __enter__(self) -> Self:
        if own_rank() == 0:
            self._began = time.monotonic()
            self._next_line = self._began + self._interval
            if _has_terminal():
                self._next_bar = self._began + min(BAR_AFTER_SECONDS, self._interval)
            self._due = min(self._next_line, self._next_bar)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._due = math.inf
        if self._bar is not None:
            self._bar.remove()

    def advance(self, count: float = 1) -> None:
        """So much more is done."""
        self._done += count
        self.tick()

    def over(self, items: Iterable[_T], each: float = 1) -> Iterator[_T]:
        """The items, each of which counts `each` once it was worked on."""
        for item in items:
            yield item
            self.advance(each)

    def tick(self) -> None:
        """Nothing more is done, but it goes on."""
        now = time.monotonic()
        if now < self._due:
            return
        if callable(self._whole):
            self._whole = self._whole()
        if now >= self._next_bar:
            self._next_bar = now + REFRESH_SECONDS
            self._bar = self._bar or _Row(self.what, self._total)
            self._bar.show(self._done, self._amount(), f"{self._elapsed(now)}{self._left(now)}")
        if now >= self._next_line:
            self._next_line = now + self._interval
            amount = f"{self._amount()}, " if self.unit else ""
            said = f"{self.what}: {amount}{self._elapsed(now)} so far{self._left(now, ', about ')}"
            # The terminal has the bar: there the line is for the file.
            log.info("%s", said, extra={"printed": self._bar is not None})
        self._due = min(self._next_line, self._next_bar)

    @property
    def _total(self) -> float | None:
        return None if callable(self._whole) else self._whole

    def _amount(self) -> str:
        if self._total is None:
            return f"{_number(self._done)} {self.unit}" if self.unit else ""
        done = min(self._done, self._total)
        return f"{_number(done)} of {_number(self._total)} {self.unit}"

    def _elapsed(self, now: float) -> str:
        return _duration(now - self._began)

    def _left(self, now: float, before: str = ", ") -> str:
        if not self._total or not self._done:
            return ""
        seconds = (now - self._began) * max(0.0, self._total / self._done - 1)
        return f"{before}{_duration(seconds)} left"


def _number(value: float) -> str:
    return f"{value:,.1f}" if isinstance(value, float) else f"{value:,}"


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def watch(
    command: Sequence[str],
    what: str,
    *,
    env: Mapping[str, str] | None = None,
    given: str | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a process to its end and say meanwhile that it goes on.

    Args:
        command: as of `subprocess.run`.
        what: it does, in words.
        env: its environment; None: this process's own.
        given: to its stdin; None: it has this process's own.

    Returns:
        Its exit status, and what it said, as text.
    """
    pipe = subprocess.PIPE
    with contextlib.ExitStack() as stack:
        phase, stdin = stack.enter_context(Phase(what)), None
        if given is not None:
            # A file: `communicate` forgets, after a timeout, what a pipe had no place for yet.
            stdin = stack.enter_context(tempfile.TemporaryFile("w+"))
            stdin.write(given)
            stdin.seek(0)
        process = stack.enter_context(
            subprocess.Popen(command, stdin=stdin, stdout=pipe, stderr=pipe, text=True, env=env)
        )
        try:
            while True:
                try:
                    out, err = process.communicate(timeout=WATCH_SECONDS)
                    break
                except subprocess.TimeoutExpired:  # nothing of what it said is lost
                    phase.tick()
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


class Progress:
    """How far a run's steps are: loss, KL, tokens per second, time left.

    A bar on a terminal; about twenty plain lines where there is none (SLURM logs).
    """

    def __init__(self, num_steps: int, done: int, *, enabled: bool):
        self._num_steps, self._step, self._enabled = num_steps, done, enabled
        self._began, self._done = time.monotonic(), done
        self._every = max(1, num_steps // 20)
        self._bar: _Row | None = None

    def __enter__(self) -> Progress:
        if self._enabled and _has_terminal():
            self._bar = _Row("step", self._num_steps)
            self._bar.show(self._step, f"{self._step}/{self._num_steps}", "")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.keep()

    def update(self, *, loss: float, ce: float, kl: float | None, tokens_per_second: float) -> None:
        """Show one more step: its losses in nats per token; None: not computed in it."""
        self._step += 1
        if not self._enabled:
            return
        figures = f"loss {loss:.4f}  ce {ce:.4f}"
        if kl is not None:
            figures += f"  kl {kl:.4f}"
        figures += f"  {tokens_per_second:,.0f} tok/s"
        at = f"{self._step}/{self._num_steps}"
        seconds = (time.monotonic() - self._began) / (self._step - self._done)
        left = f"{_duration(seconds * (self._num_steps - self._step))} left"
        if self._bar is not None:
            self._bar.show(self._step, at, f"{figures}  {left}")
        elif self._step % self._every == 0 or self._step in (1, self._num_steps):
            print(f"step {at}  {figures}  {left}", file=sys.stderr, flush=True)


# ---------------------------------------------------------------- the terminal


def _has_terminal() -> bool:
    return sys.stderr.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown")


class _Row:
    """One bar of the terminal, below those that were there before it."""

    # A process has one terminal, whose rows are drawn together: what is measured amid a training
    # stands below its steps.
    _display: Any = None
    _rows = 0

    def __init__(self, what: str, total: float | None):
        if _Row._display is None:
            _Row._display = _new_display()
        _Row._rows += 1
        self._task = _Row._display.add_task(what, total=total, amount="", figures="")

    def show(self, done: float, amount: str, figures: str) -> None:
        _Row._display.update(self._task, completed=done, amount=amount, figures=figures)
        _Row._display.start()  # once is enough
        _Row._display.refresh()

    def remove(self) -> None:
        """Take the row away."""
        _Row._display.remove_task(self._task)
        self.keep()

    def keep(self) -> None:
        """Leave the row as it is, if no other one goes on."""
        _Row._rows -= 1
        _Row._display.refresh()
        if not _Row._rows:
            _Row._display.stop()
            _Row._display = None


def _new_display() -> Any:
    # Imported here: what is over soon, or has no terminal, need not wait for it.
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as RichProgress
    from rich.table import Column

    words = Column(no_wrap=True, overflow="ellipsis")
    return RichProgress(
        TextColumn("{task.description}", style="bold", markup=False, table_column=words),
        TextColumn("{task.fields[amount]}", markup=False, table_column=words.copy()),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[figures]}", markup=False, table_column=words.copy()),
        console=terminal(),
        auto_refresh=False,  # which would be a thread
        redirect_stdout=False,  # it may be a file, which this must not keep anything from
    )
