"""Where the processes of a SLURM step meet: rank 0 finds a free port and tells the others.

A port that is derived from the job's id may be taken, by another job on the node or by an earlier
start of this one that is cut off but still runs. So a thread of rank 0 answers at the first of the
job's ports that is free, to those that know the meeting's name, with the port of the store; the
others ask at each port in turn. The store and the group are `mesh.py`'s.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time

from moored.launched import Launched

ASK_SECONDS = 3.0  # for an answer: something else may listen there, and say nothing for ever
PAUSE_SECONDS = 0.2
HEARD = "heard"


def host(place: Launched) -> tuple[socket.socket, socket.socket]:
    """Rank 0: a listening socket to be asked at, and one for the store.

    Raises:
        OSError: fewer than two of the job's ports are free.
    """
    free: list[socket.socket] = []
    for port in place.ports:
        with contextlib.suppress(OSError):
            free.append(socket.create_server(("", port), backlog=1024))
        if len(free) == 2:
            return free[0], free[1]
    raise OSError("none of these ports is free on this node")


def answer(server: socket.socket, place: Launched, port: int) -> None:
    """Rank 0: say in a thread where the store is, until every other rank has asked."""
    arguments = (server, f"{place.meeting} {port}\n".encode(), place)
    threading.Thread(target=_answer, args=arguments, name="meeting", daemon=True).start()


def _answer(server: socket.socket, line: bytes, place: Launched) -> None:
    missing = set(range(1, place.world_size))
    with server:
        while missing:
            with contextlib.suppress(OSError, ValueError):
                connection, _ = server.accept()
                with connection:
                    connection.settimeout(ASK_SECONDS)
                    name, _, rank = _line(connection).partition(" ")
                    if name == place.meeting:
                        connection.sendall(line)
                        if _line(connection) == HEARD:  # else it has left, and asks again
                            missing.discard(int(rank))


def find(place: Launched, seconds: float) -> int:
    """Every other rank: the port of rank 0's store.

    Raises:
        OSError: rank 0 did not answer in `seconds`.
    """
    assert place.address is not None
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        for port in place.ports:
            with contextlib.suppress(OSError, ValueError):
                address = (place.address, port)
                with socket.create_connection(address, timeout=ASK_SECONDS) as connection:
                    connection.sendall(f"{place.meeting} {place.rank}\n".encode())
                    name, _, answer = _line(connection).partition(" ")
                    if name == place.meeting:
                        connection.sendall(f"{HEARD}\n".encode())
                        return int(answer)
        time.sleep(PAUSE_SECONDS)
    raise OSError(f"rank 0 is at none of these ports after {seconds:.0f} s: its own log says why")


def _line(connection: socket.socket) -> str:
    data = b""
    while not data.endswith(b"\n") and len(data) < 100:
        part = connection.recv(100)
        if not part:
            break
        data += part
    return data.decode(errors="replace").strip()
