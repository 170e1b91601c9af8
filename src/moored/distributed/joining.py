"""How the processes of a run become one group: rank 0's store, who has come, and who belongs.

The only caller of `init_process_group`. Where the ranks meet is `rendezvous.py`'s, how they are
arranged `mesh.py`'s. torch's store takes anybody's word, and gloo anybody's connection: what guards
a run is that rank 0 is found by a proof, that the group's members prove themselves once it is made,
and that nothing they send is ever run. SECURITY.md says what remains.
"""

# torch.distributed is typed in part only.
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import socket
import time
from collections.abc import Generator
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist

from moored.distributed import rendezvous, secret
from moored.distributed.rendezvous import Waiting, ranks
from moored.distributed.secret import Key
from moored.utils.environment import RankInfo
from moored.utils.errors import UserError

log = logging.getLogger(__name__)

LONGEST_PAUSE_SECONDS = 0.5  # between two looks whether all ranks are there
STORE_SECONDS = 60.0  # for one answer of the store, once it is known to be there
LAST_SECONDS = 1.0  # in which the others read why rank 0 leaves


class ProcessGroup(Protocol):
    """An axis of the mesh, as far as its members prove themselves over it."""

    @property
    def name(self) -> str:
        """The axis's name."""
        ...

    @property
    def rank(self) -> int:
        """This process's place in it."""
        ...

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order."""
        ...


@contextlib.contextmanager
def joined(
    place: RankInfo,
    backend: str,
    *,
    timeout_seconds: float,
    rendezvous_seconds: float,
    folder: Path | None,
) -> Generator[Key | None]:
    """Make the group of all processes; in the body they prove themselves, still within the bound.

    Args:
        place: of this process.
        backend: `gloo` or `nccl`.
        timeout_seconds: how long a collective may wait after the body.
        rendezvous_seconds: how long to wait for the other processes.
        folder: where rank 0 may leave a secret for the others; None: in Moored's cache.

    Yields:
        By what the ranks know each other; None where they cannot.

    Raises:
        UserError: they did not all come in time, or the group could not be made.
    """
    # DeepSpeed reads these again; srun, and one process started by hand, set none of them.
    os.environ.update(
        RANK=str(place.rank),
        WORLD_SIZE=str(place.world_size),
        LOCAL_RANK=str(place.local_rank),
        MASTER_ADDR=place.address or "127.0.0.1",
        MASTER_PORT=str(place.ports[0] if place.ports else 29500),
    )
    if place.address is None:
        # An in-memory store: a single process needs no port, so none can be taken.
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group(
            backend, store=store, rank=0, world_size=1, timeout=_seconds(timeout_seconds)
        )
        yield None
        return
    if place.one_machine:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # nobody else need reach its sockets
    waiting = Waiting(place, rendezvous_seconds)
    try:
        with contextlib.ExitStack() as stack:
            store, key = _store(place, waiting, stack, folder)
            _gather_all(store, place, waiting)
            store.set_timeout(_seconds(rendezvous_seconds))
            dist.init_process_group(
                backend,
                store=store,
                rank=place.rank,
                world_size=place.world_size,
                timeout=_seconds(rendezvous_seconds),
            )
            yield key
        store.set_timeout(_seconds(timeout_seconds))
        dist.distributed_c10d._set_pg_timeout(_seconds(timeout_seconds))  # pyright: ignore
    except (RuntimeError, ValueError, OSError, dist.DistError) as error:
        raise UserError(
            f"rank {place.rank} of {place.world_size} could not meet the others at "
            f"{place.address}:{','.join(map(str, place.ports))}: {str(error).splitlines()[0]}"
        ) from error


def prove(group: ProcessGroup, key: Key) -> None:
    """Every member of a group shows that it has the secret, in answer to what all others drew.

    Raises:
        UserError: one has not: another program has got into its place.
    """
    mine = secrets.token_hex(16)
    drawn = group.gather(mine)
    proofs = group.gather(key.proof(f"{group.name} {group.rank}", *drawn))
    strangers = [
        rank
        for rank, proof in enumerate(proofs)
        if not key.proves(proof, f"{group.name} {rank}", *drawn)
    ]
    if strangers or drawn[group.rank] != mine:
        raise UserError(
            f"{ranks(strangers)} of the group {group.name} did not prove to be of this run: "
            "another program took that place: start again, and see who else uses the machine "
            "(SECURITY.md)"
        )


def _seconds(seconds: float) -> timedelta:
    return timedelta(seconds=seconds)


def _store(
    place: RankInfo, waiting: Waiting, stack: contextlib.ExitStack, folder: Path | None
) -> tuple[Any, Key | None]:
    """The store of this start's ranks, and the key by which they know each other."""
    if not place.rendezvous:
        if place.rank == 0:
            log.info(
                "the launcher gave the processes no secret by which to know each other: whoever "
                "reaches their ports can take part in the run (SECURITY.md)"
            )
        return _store_of_launcher(place, waiting), None
    given, file = secret.given(), secret.place_of(place.rendezvous, folder)
    if place.rank:
        newest: list[Key] = []

        def key() -> Key | None:
            value = given or secret.read(file)[0]
            newest[:] = [Key(value, place.rendezvous)] if value else []
            return newest[0] if newest else None

        host, port = rendezvous.find(place, key, waiting)
        os.environ["MASTER_PORT"] = str(port)
        return _tcp_store(host, port), newest[0]
    mine = Key(given or stack.enter_context(secret.made(file)), place.rendezvous)
    asked_at, listening = rendezvous.host(place)
    host, port = _where(listening)
    os.environ["MASTER_PORT"] = str(port)
    store = _tcp_store(host, port, listening)
    rendezvous.answer(asked_at, place, port, mine)
    return store, mine


def _where(listening: socket.socket) -> tuple[str, int]:
    host, port = listening.getsockname()[:2]
    return ("127.0.0.1" if host == "0.0.0.0" else host), port


def _store_of_launcher(place: RankInfo, waiting: Waiting) -> Any:
    """The store at the launcher's own port: torchrun's, or one of rank 0."""
    assert place.address is not None
    (port,) = place.ports
    by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if place.rank == 0 and not by_agent:
        asked_at, _ = rendezvous.host(place)
        return _tcp_store(_where(asked_at)[0], port, asked_at)
    whom = f"{'the agent of torchrun' if by_agent else 'rank 0'} at {place.address}:{port}"
    while True:
        with contextlib.suppress(OSError):
            socket.create_connection((place.address, port), rendezvous.ASK_SECONDS).close()
            return _tcp_store(place.address, port)
        if not waiting.left:
            raise waiting.over(whom)
        waiting.say(whom)
        time.sleep(rendezvous.PAUSE_SECONDS)


def _tcp_store(host: str, port: int, listening: socket.socket | None = None) -> Any:
    return dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
        host,
        port,
        is_master=listening is not None,
        timeout=_seconds(STORE_SECONDS),
        wait_for_workers=False,
        master_listen_fd=None if listening is None else listening.detach(),
    )


def _gather_all(store: Any, place: RankInfo, waiting: Waiting) -> None:
    """Until every rank has reached the store; each says for whom it waits.

    Raises:
        UserError: some did not come in time.
    """
    here = [f"moored/here/{rank}" for rank in range(place.world_size)]
    verdict = "moored/all"
    store.set(here[place.rank], "1")
    if store.add("moored/count", 1) >= place.world_size:
        store.set(verdict, "here")
    missing: set[int] = set()
    pause = 0.01
    while not store.check([verdict]):
        time.sleep(pause)
        pause = min(1.5 * pause, LONGEST_PAUSE_SECONDS)
        if waiting.is_due or not waiting.left:
            missing = {rank for rank, name in enumerate(here) if not store.check([name])}
            waiting.say(ranks(missing))
        if not waiting.left:
            if place.rank == 0:
                store.set(verdict, ranks(missing))  # with rank 0 the store ends
                time.sleep(LAST_SECONDS)
            raise waiting.over(ranks(missing))
    said = store.get(verdict).decode(errors="replace")
    if said != "here":
        raise UserError(
            f"rank 0 has given up waiting for {said[:200]}: see their own logs, and start all "
            "ranks at once"
        )
