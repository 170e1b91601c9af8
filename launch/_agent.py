"""What runs on every machine of a run: it checks the machine, starts the ranks and watches them.

It is told what to do by JSON lines on its standard input, so that no value of the environment ever
stands in a command line, and answers on its standard output. It decides nothing: when to start,
stop or end is `_launch.py`'s. It leaves no rank behind: when its input ends, or stays silent where
the connection may be cut, the ranks are asked to save and are killed ten seconds later; when it is
killed itself, the kernel kills them.

Standard library only. The ranks are plain processes rather than torchrun's workers, because no
agent of torchrun's passes a signal on as it should: SIGUSR1 kills it and its workers at once, and
after SIGTERM it kills them thirty seconds later, saved or not.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import glob
import hashlib
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

TICK_SECONDS = 0.1
BEAT_SECONDS = 5.0  # between signs of life, both ways
RESEND_SECONDS = 3.0  # of a signal, until the rank has ended
SAVE_SECONDS = 10.0  # from the end of the connection to the end of the ranks
SHARED_SECONDS = 30.0  # for a file of the first host to be seen on the others
BUSY_SECONDS = 60.0  # for the ranks of an earlier start to be gone
LAST_BYTES = 2000  # of a failed rank's output, for the launcher
PR_SET_PDEATHSIG = 1


class Rank:
    """One trainer: its process, and its output in a file."""

    def __init__(self, rank: int, command: list[str], env: dict[str, str], output: Path):
        self.rank, self.signalled, self.kill_at = rank, 0.0, float("inf")
        agent = os.getpid()
        with open(output, "ab") as file:
            self.told = self.began = file.tell()
            self.process = subprocess.Popen(
                command,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a Ctrl-C is the launcher's to pass on
                preexec_fn=lambda: _die_with(agent),
            )
        self.output = open(output, "rb")  # noqa: SIM115
        self.output.seek(self.told)

    def stop(self) -> None:
        """Ask it to save and leave, if it listens.

        While it still imports its modules, and when it has written down how it ended, the signal
        would only kill it: it is sent as soon as there is a handler, and again, in case that one
        was somebody else's.
        """
        if time.monotonic() - self.signalled > RESEND_SECONDS and self.listens():
            self.signalled = time.monotonic()
            self.process.send_signal(signal.SIGTERM)

    def listens(self) -> bool:
        """Whether it has a handler for SIGTERM."""
        try:
            status = Path(f"/proc/{self.process.pid}/status").read_text()
        except OSError:
            return True
        caught = re.search(r"^SigCgt:\s*([0-9a-f]+)$", status, re.MULTILINE)
        return caught is None or bool(int(caught[1], 16) >> (signal.SIGTERM - 1) & 1)

    def kill(self) -> None:
        """End it, and what it started in its process group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def last(self) -> str:
        """The end of what it has said in this start."""
        size = self.output.seek(0, os.SEEK_END)
        self.output.seek(max(self.began, size - LAST_BYTES))
        return self.output.read().decode(errors="replace")


def _die_with(agent: int) -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != agent:
        os._exit(1)


class Agent:
    """The loop: what the launcher says, how the ranks are."""

    def __init__(self) -> None:
        self.ranks: list[Rank] = []
        self.env: dict[str, str] = {}
        self.recipe: list[str] = []
        self.run_dir = self.token = Path()
        self.silence = self.stopping = self.ending = False
        self.lock = -1
        self.unread = b""
        self.heard = self.said = time.monotonic()

    def say(self, kind: str, **fields: Any) -> None:
        """One line to the launcher, which may be gone."""
        self.said = time.monotonic()
        with contextlib.suppress(OSError):
            os.write(1, (json.dumps({"is": kind} | fields) + "\n").encode())

    def run(self) -> None:
        """Until the input has ended and no rank is left."""
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            signal.signal(number, lambda *_: self.leave())
        while not self.ending or self.ranks:
            self._listen()
            for rank in list(self.ranks):
                self._watch(rank)
            if time.monotonic() - self.said > BEAT_SECONDS:
                self.say("alive")
            if self.silence and time.monotonic() - self.heard > 6 * BEAT_SECONDS:
                self.leave()

    def leave(self) -> None:
        """Save what can be saved in a few seconds, then end everything."""
        if not self.ending:
            self.ending = self.stopping = True
            self.end(SAVE_SECONDS)
            for rank in self.ranks:
                if not rank.listens():
                    rank.kill()  # it has nothing to save

    def end(self, seconds: float) -> None:
        """Kill in `seconds` what has not left by itself."""
        for rank in self.ranks:
            rank.kill_at = min(rank.kill_at, time.monotonic() + seconds)

    def _listen(self) -> None:
        if self.ending:
            time.sleep(TICK_SECONDS)
            return
        if not select.select([0], [], [], TICK_SECONDS)[0]:
            return
        data = os.read(0, 1 << 16)
        self.heard = time.monotonic()
        *lines, self.unread = (self.unread + data).split(b"\n")
        for line in lines:
            self._do(**json.loads(line))
        if not data:
            self.leave()

    def _watch(self, rank: Rank) -> None:
        code = rank.process.poll()
        if rank.rank == 0:
            rank.output.seek(rank.told)
            text = rank.output.read()
            rank.told += len(text)
            if text:
                self.say("output", text=text.decode(errors="replace"))
        if code is not None:
            rank.kill()  # what it started and left behind
            self.ranks.remove(rank)
            last = rank.last() if code and rank.rank else ""
            rank.output.close()
            self.say("exit", rank=rank.rank, code=code, last=last)
            if rank.rank == 0:
                self.token.unlink(missing_ok=True)
        elif time.monotonic() > rank.kill_at:
            rank.kill()
        elif self.stopping:
            rank.stop()

    def _do(self, do: str, **fields: Any) -> None:
        if do == "check":
            self._check(**fields)
        elif do == "start":
            self._start(**fields)
        elif do == "state":
            self.say("state", state=self._state())
        elif do == "stop":
            self.stopping = True
        elif do == "end":
            self.end(fields["seconds"])

    def _check(self, cwd: str, recipe: list[str], env: dict[str, str], remote: bool) -> None:
        """What the launcher compares between machines; or what is wrong with this one."""
        self.silence, self.recipe = remote, recipe
        self.env = dict(os.environ) | env
        try:
            os.chdir(cwd)
            command = [sys.executable, str(Path(__file__).with_name("_facts.py")), *recipe]
            done = subprocess.run(
                command, env=self.env, stdin=subprocess.DEVNULL, capture_output=True, text=True
            )
            if done.returncode:
                lines = done.stderr.strip().splitlines() or [f"_facts.py: {done.returncode}"]
                ours = [line.removeprefix("error: ") for line in lines if line[:7] == "error: "]
                self.say("unfit", why="\n".join(ours or lines[-1:]))
                return
            facts = json.loads(done.stdout)
            self.run_dir = Path(facts["run_dir"])
            self._lock()
        except OSError as error:
            self.say("unfit", why=str(error))
            return
        # Containers see all cards in /proc, but only their own in /dev.
        cards = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = len(glob.glob("/dev/nvidia[0-9]*"))
        if cards is not None:
            gpus = len([card for card in cards.split(",") if card.strip() not in ("", "-1")])
        self.say("facts", **facts, gpus=gpus, state=self._state())

    def _lock(self) -> None:
        """One agent per run and machine: the ranks of a connection that broke are gone first."""
        name = f"{self.run_dir} {socket.gethostname()} {os.getuid()}"
        name = f"moored-{hashlib.sha256(name.encode()).hexdigest()[:20]}.lock"
        path = os.path.join(tempfile.gettempdir(), name)
        self.lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        deadline = time.monotonic() + BUSY_SECONDS
        while True:
            try:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise OSError(f"{self.run_dir} is run by another launcher here") from None
                self.say("busy")
                time.sleep(1.0)

    def _state(self) -> dict[str, Any]:
        try:
            return dict(json.loads((self.run_dir / "state.json").read_text()))
        except (OSError, ValueError, TypeError):
            return {}

    def _start(self, ranks: list[int], env: dict[str, str]) -> None:
        logs = self.run_dir / "logs"
        self.token = logs / f".start-{env['MOORED_LAUNCH']}"
        try:
            logs.mkdir(parents=True, exist_ok=True)
            if 0 in ranks:
                self.token.touch()
            deadline = time.monotonic() + SHARED_SECONDS
            while not self.token.exists():
                if time.monotonic() > deadline:
                    self.say(
                        "unfit",
                        why=f"{self.run_dir} is another folder than on the first host: put "
                        "output.dir on a file system that all hosts share",
                    )
                    return
                os.listdir(logs)  # a network file system looks again
                time.sleep(0.2)
            command = [sys.executable, "-m", "moored", "train", *self.recipe]
            cores = str(max(1, len(os.sched_getaffinity(0)) // len(ranks)))
            for local, rank in enumerate(ranks):
                place = {"RANK": str(rank), "LOCAL_RANK": str(local)}
                place["LOCAL_WORLD_SIZE"] = str(len(ranks))
                own = {"OMP_NUM_THREADS": cores} | self.env | env | place
                self.ranks.append(Rank(rank, command, own, logs / f"rank-{rank}.out"))
        except OSError as error:
            self.say("unfit", why=str(error))


if __name__ == "__main__":
    os.umask(0o077)
    Agent().run()
