"""Where the processes of a start meet: rank 0 finds a free port, and each proves that it belongs.

A port that is derived from the job's id may be taken: by another job on the node, by an earlier
start of this one that is cut off but still runs, or by somebody who wants to be taken for rank 0.
So a thread of rank 0 answers at the first of the job's ports that is free, and the others ask at
each in turn:

    other to rank 0    moored RANK NONCE
    rank 0 to other    NONCE PORT PROOF      of both nonces, the rank and the store's port
    other to rank 0    PROOF                 of the same, in the name of the other side

A proof is an HMAC under the secret of the start (`secret.py`). Both nonces are new for each
connection, so that nothing recorded proves anything, and both sides' proofs differ, so that nobody
is answered with what he said himself. The store and the group are `joining.py`'s.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import itertools
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterator

from moored.distributed.secret import Key
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
        """Say for whom it waits, how much longer, and how it need not; if it is due."""
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


ASK_SECONDS = 3.0  # for an answer: something else may listen there, and say nothing for ever
PAUSE_SECONDS = 0.2
LONGEST = 400  # characters of a line; ours have 150
FIRST, OTHER = "rank 0", "another rank"


def host(place: RankInfo) -> tuple[socket.socket, socket.socket]:
    """Rank 0: a listening socket to be asked at, and one for the store.

    They listen where the others look for them, and nowhere else.

    Raises:
        OSError: none of the job's ports is free.
    """
    for where in _addresses(place):
        free: list[socket.socket] = []
        for port in place.ports:
            with contextlib.suppress(OSError):
                free.append(_listen(where, port))
            if len(free) == 2:
                return free[0], free[1]
        if free:  # whoever asks is told the other port: it may be any
            return free[0], _listen(where, 0)
    raise OSError("none of these ports is free on this node")


def address_of(place: RankInfo) -> str:
    """Where the others look for rank 0."""
    assert place.address is not None
    return "127.0.0.1" if place.one_machine else place.address


def _addresses(place: RankInfo) -> Iterator[str]:
    """Where rank 0 may listen, the narrowest first that the others can reach."""
    name = address_of(place)
    with contextlib.suppress(ValueError):
        yield str(ipaddress.ip_address(name))
        return
    known: list[str] = []
    with contextlib.suppress(OSError):
        for *_, where in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM):
            known.append(str(where[0]))
    # Many a machine calls itself 127.0.1.1, which the others do not; and a name may be another's
    # address, which hands on what comes to it. Then everywhere, as there is no saying where.
    known.sort(key=lambda address: ":" in address)  # IPv6 does not lead everywhere
    yield from dict.fromkeys(a for a in known if not ipaddress.ip_address(a).is_loopback)
    yield ""


def _listen(where: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in where else socket.AF_INET
    return socket.create_server((where, port), family=family, backlog=1024)


def answer(server: socket.socket, place: RankInfo, port: int, key: Key) -> threading.Thread:
    """Rank 0: say in a thread where the store is, until every other rank has proved itself."""
    serving = _serve(server, place, port, key)
    thread = threading.Thread(target=asyncio.run, args=(serving,), name="rendezvous", daemon=True)
    thread.start()
    return thread


async def _serve(server: socket.socket, place: RankInfo, port: int, key: Key) -> None:
    """All who ask are heard at once, so that nobody who says nothing holds up the others."""
    missing = set(range(1, place.world_size))
    complete = asyncio.Event()

    async def hear(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, ValueError, TimeoutError), contextlib.closing(writer):
            async with asyncio.timeout(ASK_SECONDS):
                _, text, theirs = (await reader.readline()).decode().split()
                rank, mine = int(text), secrets.token_hex(16)
                facts = (rank, place.world_size, theirs, mine, port)
                writer.write(f"{mine} {port} {key.proof(FIRST, *facts)}\n".encode())
                proof = (await reader.readline()).decode().strip()
            if key.proves(proof, OTHER, *facts):  # else it has left and asks again, or is nobody
                missing.discard(rank)
        if not missing:
            complete.set()

    async with await asyncio.start_server(hear, sock=server, limit=LONGEST):
        await complete.wait()


def find(place: RankInfo, key: Callable[[], Key | None], waiting: Waiting) -> tuple[str, int]:
    """Every other rank: host and port of rank 0's store.

    Args:
        place: of this process.
        key: of the start; None as long as rank 0 has not left it. Asked for anew in each round,
            since it may be that of an earlier start at first.
        waiting: how long, and who is told.

    Raises:
        UserError: rank 0 did not answer in time.
    """
    strangers: set[int] = set()
    now = None
    for port in itertools.cycle(place.ports):
        if now is None or port == place.ports[0]:
            now = key()
        if now is not None:
            with contextlib.suppress(OSError):
                answered = _ask(place, port, now)
                if answered is not None:
                    return answered
                strangers.add(port)
        whom = _first_at(place, strangers, is_known=now is not None)
        if not waiting.left:
            raise waiting.over(whom)
        waiting.say(whom)
        if now is None or port == place.ports[-1]:
            time.sleep(PAUSE_SECONDS)
    raise AssertionError("there is no port")


def _first_at(place: RankInfo, strangers: set[int], *, is_known: bool) -> str:
    whom = f"rank 0 at {address_of(place)}:{','.join(map(str, place.ports))}"
    if not is_known:
        return f"{whom}, which has not left the secret by which they know each other"
    if strangers:
        ports = ",".join(map(str, sorted(strangers)))
        whom += f" (at {ports} was something else, or a rank 0 with another secret)"
    return whom


def _ask(place: RankInfo, port: int, key: Key) -> tuple[str, int] | None:
    """Where the store is, from who listens at a port; None: he is not rank 0."""
    deadline, mine = time.monotonic() + ASK_SECONDS, secrets.token_hex(16)
    with socket.create_connection((address_of(place), port), timeout=ASK_SECONDS) as connection:
        connection.sendall(f"moored {place.rank} {mine}\n".encode())
        try:
            theirs, text, proof = _line(connection, deadline).split()
            facts = (place.rank, place.world_size, mine, theirs, int(text))
        except (ValueError, OSError):
            return None
        if not key.proves(proof, FIRST, *facts):
            return None
        connection.sendall(f"{key.proof(OTHER, *facts)}\n".encode())
        return str(connection.getpeername()[0]), int(text)


def _line(connection: socket.socket, deadline: float) -> str:
    """One line, in time: who trickles is no better than who is silent."""
    data = b""
    while not data.endswith(b"\n") and len(data) < LONGEST:
        connection.settimeout(max(0.01, deadline - time.monotonic()))
        part = connection.recv(LONGEST)
        if not part:
            break
        data += part
    return data.decode()
