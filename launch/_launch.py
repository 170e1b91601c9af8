"""Starts the ranks of a run on one machine or several, and starts them again until it has ended.

How the run ended is read from `state.json`, as the SLURM job script reads it, and from exit codes
only where no process got as far as that. What happens on a machine is `_agent.py`'s.
"""

from __future__ import annotations

import contextlib
import os
import queue
import secrets
import shlex
import signal
import socket
import sys
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from _agent import BEAT_SECONDS
from _link import Link

ROOT = Path(__file__).resolve().parent.parent
USER_ERROR, PREEMPTED = 2, 75
FIRST_PORT, NUM_PORTS = 10000, 20000  # below what kernels give out; ranks try the next if taken
CHECK_SECONDS = 120.0  # for a machine to answer
SILENT_SECONDS = 12 * BEAT_SECONDS  # after which a connection counts as lost
PAUSE_SECONDS = 2.0  # before another start
UNFIT_PAUSE_SECONDS = 30.0  # where a machine is missing: it may come back
GIB = 2**30
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)


@dataclass(frozen=True, kw_only=True)
class Host:
    """One machine: its name (None: this one), and its ranks (None: one per GPU)."""

    name: str | None = None
    slots: int | None = None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a command line asks for.

    Attributes:
        hosts: the machines, in the order of their ranks.
        recipe: the recipe and its overrides, as `moored train` takes them.
        attempts: starts in a row that may save no new step.
        rsh: the command that runs a command on another machine.
        python: the interpreter there and here.
        root: the checkout there.
        cwd: the folder to work in, there.
        env: variables to send, with their values.
        min_free_gib: room that every machine must have for the run.
    """

    hosts: tuple[Host, ...]
    recipe: tuple[str, ...]
    attempts: int = 3
    rsh: tuple[str, ...] = ()
    python: str
    root: Path = ROOT
    cwd: Path
    env: dict[str, str] = field(default_factory=dict)
    min_free_gib: float = 1.0


class UnfitError(Exception):
    """A machine, or the recipe, is not as it must be; one line names which, and why."""


class Stopped(Exception):
    """A signal came before the ranks were started."""


def say(text: str) -> None:
    """One line of the launcher's own."""
    with contextlib.suppress(OSError):
        print(f"launch: {text}", file=sys.stderr, flush=True)


def find_python() -> str:
    """The interpreter that has Moored: of the active environment, else of the checkout's."""
    own = ROOT / ".venv/bin/python"
    return str(own) if sys.prefix == sys.base_prefix and own.exists() else sys.executable


def supervise(plan: Plan) -> int:
    """Start, and start again, until the run has ended; its exit code.

    Signals ask the ranks to save and leave; a second Ctrl-C ends them at once.
    """
    os.umask(0o077)
    events: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()
    signals: list[int] = []

    def caught(number: int, _frame: object) -> None:
        signals.append(number)
        events.put(("signal", number))

    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup and `&` leave it
            signal.signal(number, caught)
    idle, last, run_dir = 0, None, None
    while True:
        start = Start(plan, events, signals)
        try:
            code, why = start.run()
            run_dir = start.run_dir
        except Stopped:
            say("stopped by a signal before the ranks were started")
            return PREEMPTED
        except UnfitError as error:
            if run_dir is None:  # in the first start: for a person to mend
                for line in str(error).splitlines():
                    print(f"error: {line}", file=sys.stderr)
                return USER_ERROR
            code, why = None, str(error)
        finally:
            start.close()
        if code is not None:
            if code:
                say(f"{why} (exit code {code}); {run_dir}/state.json and {run_dir}/logs say more")
            else:
                print(run_dir)
            return code
        last = start.first_step if last is None else last
        step = max(last, start.first_step, start.step)
        idle = 0 if step > last else idle + 1
        last = step
        if idle >= plan.attempts:
            say(
                f"{why}; {idle} starts in a row saved no new step: giving up. {run_dir}/logs says "
                "why; after mending it start the same command again"
            )
            return 1
        say(f"{why}; step {step} is saved: starting again")
        pause = PAUSE_SECONDS if start.launched else UNFIT_PAUSE_SECONDS
        if _wait(pause, signals):
            return PREEMPTED


def _wait(seconds: float, signals: list[int]) -> bool:
    deadline = time.monotonic() + seconds
    while not signals and time.monotonic() < deadline:
        time.sleep(0.1)
    return bool(signals)


class Start:
    """One start of all ranks: check the machines, start, watch, and say how it ended."""

    def __init__(self, plan: Plan, events: queue.SimpleQueue[tuple[Any, ...]], signals: list[int]):
        self.plan, self.events, self.signals = plan, events, signals
        self.id = f"{socket.gethostname()}-{os.getpid()}-{time.time_ns() // 10**6}"
        self.links: list[Link] = []
        self.run_dir: str | None = None
        self.first_step = self.step = 0  # of the newest checkpoint, before and after
        self.codes: dict[int, int | None] = {}  # of the ranks that have ended; None: lost
        self.launched = self.interrupted = False

    def run(self) -> tuple[int | None, str]:
        """The run's exit code, None if it is to be started again, and why.

        Raises:
            UnfitError: a machine or the recipe is not as it must be.
            Stopped: a signal came before.
        """
        facts = self._check()
        self._launch(facts)
        try:
            self._watch()
        except UnfitError:
            self._all("end", seconds=0)
            raise
        state = self._state()
        self.step = state.get("step", 0)
        return self._verdict(state)

    def close(self) -> None:
        """Let go of the machines."""
        for link in self.links:
            link.close()
        for link in self.links:
            link.wait()

    # ---- before

    def _check(self) -> list[dict[str, Any]]:
        """The facts of every machine."""
        plan = self.plan
        for host in plan.hosts:
            agent = [plan.python, str(plan.root / "launch/_agent.py")]
            if host.name is not None:
                remote = f"cd {shlex.quote(str(plan.cwd))} && exec {shlex.join(agent)}"
                agent = [*plan.rsh, host.name, remote]
            try:
                link = Link(host.name, agent, self.events)
            except OSError as error:
                raise UnfitError(f"{agent[0]}: {error.strerror}") from error
            self.links.append(link)
            link.tell(
                "check",
                cwd=str(plan.cwd),
                recipe=list(plan.recipe),
                env=plan.env,
                remote=host.name is not None,
            )
        facts: dict[Link, dict[str, Any]] = {}
        unfit: dict[Link, str] = {}
        busy: set[Link] = set()

        def hear(link: Link, message: dict[str, Any]) -> None:
            if message["is"] == "facts":
                facts[link] = message
            elif message["is"] == "unfit":
                unfit[link] = message["why"]
            elif message["is"] == "lost":
                unfit[link] = f"no connection: {link.complaint()}"
            elif message["is"] == "busy" and link not in busy:
                busy.add(link)
                say(f"{link}: waiting for the processes of another start of this run to end")

        self._hear(hear, CHECK_SECONDS, lambda: len(facts | unfit) == len(self.links))
        for link in self.links:
            if link not in facts:
                unfit.setdefault(link, f"did not answer within {CHECK_SECONDS:.0f} s")
        self._compare(facts, unfit)
        ordered = [facts[link] for link in self.links]
        self.run_dir = ordered[0]["run_dir"]
        self.first_step = ordered[0]["state"].get("step", 0)
        return ordered

    def _compare(self, facts: dict[Link, dict[str, Any]], unfit: dict[Link, str]) -> None:
        reference = next(iter(link for link in self.links if link in facts), None)
        for link, mine in facts.items():
            theirs = facts[reference]["equal"] if reference else {}
            different = [
                f"{name} is {value[:16]}, but {theirs[name][:16]} on {reference}"
                for name, value in mine["equal"].items()
                if value != theirs[name]
            ]
            free = mine["free_bytes"] / GIB
            if free < self.plan.min_free_gib:
                different.append(
                    f"{free:.2f} GiB free for {mine['run_dir']}, under {self.plan.min_free_gib:g}"
                )
            if different:
                unfit[link] = "; ".join(different)
        lines = dict.fromkeys(
            f"{link}: {line}" if link.host else line
            for link in self.links
            if link in unfit
            for line in unfit[link].splitlines()
        )
        if lines:
            raise UnfitError("\n".join(lines))

    def _launch(self, facts: list[dict[str, Any]]) -> None:
        slots = [
            host.slots or max(1, fact["gpus"])
            for host, fact in zip(self.plan.hosts, facts, strict=True)
        ]
        first = self.plan.hosts[0].name
        env = {
            "WORLD_SIZE": str(sum(slots)),
            "MASTER_ADDR": first.rpartition("@")[2] if first else "127.0.0.1",
            "MASTER_PORT": str(FIRST_PORT + zlib.crc32(self.id.encode()) % NUM_PORTS),
            "MOORED_RENDEZVOUS": self.id,
            "MOORED_MEETING_SECRET": secrets.token_hex(32),  # sent on stdin, never in a command
            "MOORED_LAUNCH": self.id,
        }
        where = ", ".join(f"{n} on {link}" for n, link in zip(slots, self.links, strict=True))
        say(f"{self.run_dir}: ranks: {where}")
        begin = 0
        for link, n in zip(self.links, slots, strict=True):
            link.ranks = list(range(begin, begin + n))
            begin += n
            link.tell("start", ranks=link.ranks, env=env)
        self.launched = True

    # ---- meanwhile

    def _all(self, do: str, **fields: Any) -> None:
        for link in self.links:
            link.tell(do, **fields)

    def _hear(
        self,
        hear: Callable[[Link, dict[str, Any]], None],
        seconds: float,
        enough: Callable[[], bool],
    ) -> None:
        """Hand on what the agents say, until it is enough; keep the connections alive."""
        deadline = time.monotonic() + seconds
        while not enough() and time.monotonic() < deadline:
            with contextlib.suppress(queue.Empty):
                event = self.events.get(timeout=0.5)
                if event[0] == "message" and event[1] in self.links:
                    hear(event[1], event[2])
            if self.signals and not self.launched:
                raise Stopped
            for link in self.links:
                link.beat()
                if self.launched and link.host and link.silent_for() > SILENT_SECONDS:
                    link.lose()
            if self.signals and not self.interrupted:
                self.interrupted = True
                say("asked to stop: waiting for the ranks to save")
                self._all("stop")
            if self.signals.count(signal.SIGINT) > 1:
                self._all("end", seconds=0)

    def _watch(self) -> None:
        """Until every rank has ended.

        Rank 0 writes down how the run ended, so it is given time to; the others go after it.
        """
        expected = sum(len(link.ranks) for link in self.links)
        said: set[int] = set()

        def ended(ranks: Iterable[int], code: int | None, link: Link, last: str) -> None:
            new = [rank for rank in ranks if rank not in self.codes]
            self.codes |= dict.fromkeys(new, code)
            for rank in new:
                saved = code in (0, PREEMPTED)
                if not saved and not said:
                    said.add(rank)
                    how = "was lost" if code is None else f"ended with {_words(code)}"
                    say(f"rank {rank} on {link} {how}")
                    lines = deque(last.splitlines(), maxlen=8)
                    print(*(f"[rank {rank}] {line}" for line in lines), sep="\n", file=sys.stderr)
                if rank == 0:
                    self._all("end", seconds=60 if saved else 1)
                elif not saved:
                    self._all("end", seconds=10)

        def hear(link: Link, message: dict[str, Any]) -> None:
            if message["is"] == "output":
                with contextlib.suppress(OSError):
                    sys.stderr.write(message["text"])
                    sys.stderr.flush()
            elif message["is"] == "exit":
                ended([message["rank"]], message["code"], link, message["last"])
            elif message["is"] == "lost":
                ended(link.ranks, None, link, link.complaint())
            elif message["is"] == "unfit":
                raise UnfitError(f"{link}: {message['why']}" if link.host else message["why"])

        self._hear(hear, float("inf"), lambda: len(self.codes) == expected)

    # ---- afterwards

    def _state(self) -> dict[str, Any]:
        """`state.json`, as rank 0's machine sees it; empty if that is lost."""
        states: list[dict[str, Any]] = []
        first = self.links[0]

        def hear(link: Link, message: dict[str, Any]) -> None:
            if link is first and message["is"] == "state":
                states.append(message["state"])

        first.tell("state")
        self._hear(hear, 30.0, lambda: bool(states) or first.lost)
        return states[0] if states else {}

    def _verdict(self, state: dict[str, Any]) -> tuple[int | None, str]:
        status = state.get("status", "not begun")
        ours = state.get("launch") == self.id
        if status == "done":
            return 0, "done"
        if ours and status == "preempted":
            return PREEMPTED, "stopped by a signal"
        if ours and status in ("refused", "evaluation_failed", "interrupted"):
            return int(state.get("exit_code") or 1), f"the run is {status}"
        if ours and status == "failed" and state.get("exit_code") == USER_ERROR:
            return USER_ERROR, str(state.get("reason"))
        if not ours and USER_ERROR in self.codes.values():
            return USER_ERROR, "the run could not begin"
        if self.signals:
            return PREEMPTED, "ended by a signal before the ranks could save"
        return None, "the run failed" if ours and status == "failed" else "a process was lost"


def _words(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"
