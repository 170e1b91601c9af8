"""The launcher's end of one agent: a process, here or through ssh, that takes and gives JSON lines.

Threads read, so that a machine that says nothing holds up no other. What the lines mean is
`_launch.py`'s and `_agent.py`'s.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import threading
import time
from collections import deque
from typing import Any

from _agent import BEAT_SECONDS

CLOSE_SECONDS = 15.0  # for an agent to end its ranks; after that ssh is cut


class Link:
    """A connection to the agent of one machine."""

    def __init__(
        self, host: str | None, command: list[str], events: queue.SimpleQueue[tuple[Any, ...]]
    ):
        self.host, self.ranks, self.lost = host, list[int](), False
        self._events, self._complaints = events, deque[str](maxlen=20)
        self._heard = self._told = time.monotonic()
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # a Ctrl-C must not cut the connection
        )
        self._complaining = threading.Thread(target=self._read_errors, daemon=True)
        self._complaining.start()
        threading.Thread(target=self._read, daemon=True).start()

    def __str__(self) -> str:
        return self.host or "this machine"

    def tell(self, do: str, **fields: Any) -> None:
        """One line to the agent; if it is gone, its end is an event of its own."""
        self._told = time.monotonic()
        assert self._process.stdin is not None
        line = json.dumps({"do": do} | fields) + "\n"
        with contextlib.suppress(OSError, ValueError):
            self._process.stdin.write(line.encode())
            self._process.stdin.flush()

    def beat(self) -> None:
        """A sign of life, if it is time for one."""
        if time.monotonic() - self._told > BEAT_SECONDS:
            self.tell("alive")

    def silent_for(self) -> float:
        """Seconds since the agent said anything."""
        return time.monotonic() - self._heard

    def complaint(self) -> str:
        """The last that ssh or the agent had to complain about."""
        self._complaining.join(2.0)
        lines = [line for line in self._complaints if line.strip()]
        return lines[-1].strip() if lines else f"exit code {self._process.poll()}"

    def lose(self) -> None:
        """Cut it; the agent ends its ranks when it notices."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def close(self) -> None:
        """Let go of the agent: it ends its ranks, and then itself."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()

    def wait(self) -> None:
        """Until a closed link's agent has ended."""
        try:
            self._process.wait(CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            self.lose()
            self._process.wait()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._heard = time.monotonic()
            try:
                message = dict(json.loads(line))
                kind = message["is"]
            except (ValueError, TypeError, KeyError):
                self._complaints.append(line.decode(errors="replace"))  # a shell's greeting
                continue
            if kind != "alive":
                self._events.put(("message", self, message))
        self.lost = True
        self._events.put(("message", self, {"is": "lost"}))

    def _read_errors(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._complaints.append(line.decode(errors="replace"))
