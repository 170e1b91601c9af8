"""Ranks meet whoever else listens at their ports or calls there, and nobody is taken for one."""

from __future__ import annotations

import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from distributed.runner import run_distributed
from forking import Forked, moored
from moored.distributed import rendezvous
from moored.distributed.joining import prove
from moored.distributed.mesh import Axis, leave_mesh, start_mesh
from moored.distributed.rendezvous import Waiting
from moored.distributed.secret import Key
from moored.utils.environment import FIRST_PORT, NUM_PORTS, RankInfo
from moored.utils.errors import UserError


def rank_main() -> None:
    """A rank that meets the others, and says how many they are."""
    mesh = start_mesh()
    assert mesh.world.gather(mesh.world.rank) == list(range(mesh.world.size))
    print(int(mesh.world.sum(torch.ones(1)).item()), flush=True)
    leave_mesh()


def impostor(asked_at: int, port: int, canary: Path) -> None:
    """Takes the first port before rank 0 does, and answers as rank 0 did when it proved nothing.

    It gathers a pickle that, when it is read, runs code.
    """

    class Canary:
        def __reduce__(self) -> Any:
            return Path.write_text, (canary, "ran")

    server = socket.create_server(("", asked_at))
    print("up", flush=True)
    connection, _ = server.accept()
    name = connection.recv(100).decode().split()[0]
    bound = timedelta(seconds=300)
    store = dist.TCPStore("127.0.0.1", port, None, True, bound, False)
    connection.sendall(f"{name} {port}\n".encode())
    connection.close()
    dist.init_process_group("gloo", store=store, rank=0, world_size=2, timeout=bound)
    dist.all_gather_object([None, None], Canary())


def other_job(port: int) -> None:
    """Has a store at a port."""
    store = dist.TCPStore("localhost", port, None, True, timedelta(seconds=9), False)
    print("up", flush=True)
    time.sleep(3600)
    del store


SECRET = "5ec7e7" * 8
KEY = Key(SECRET, "4711.0.0")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where ranks leave their secrets."""
    monkeypatch.setenv("MOORED_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def start(job: int, rank: int, size: int, *command: str, restart: int = 0, **given: str) -> Forked:
    """A rank as srun starts it: of a `moored` command, or one that only meets the others."""
    variables = {
        "SLURM_JOB_ID": str(job),
        "SLURM_STEP_ID": "0",
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
        "SLURM_STEP_NUM_TASKS": str(size),
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_RESTART_COUNT": str(restart),
    } | given
    if command:
        return moored(*command, **variables)
    return Forked(rank_main, environment=os.environ | variables)


def met(*ranks: Forked) -> list[str]:
    """What each printed; none is left."""
    try:
        found = [rank.communicate() for rank in ranks]
        codes = [rank.returncode for rank in ranks]
        return [out.strip() if code == 0 else err for (out, err), code in zip(found, codes)]  # noqa: B905
    finally:
        for rank in ranks:
            rank.kill()


@pytest.fixture
def job() -> int:
    """An id of which the first ports are free."""
    for number in range(1000 + os.getpid() % 500, 3000):
        try:
            for port in ports(number):
                socket.create_server(("", port)).close()
        except OSError:
            continue
        return number
    raise AssertionError("no free ports")


def ports(job: int) -> list[int]:
    return [FIRST_PORT + (job * 31 + 7919 * i) % NUM_PORTS for i in range(4)]


@pytest.fixture
def squatters(job: int) -> Iterator[None]:
    """Somebody who never answers at the first port, and a store of another job at the second."""
    silent = socket.create_server(("", ports(job)[0]))
    with Forked(other_job, ports(job)[1]) as other:
        other.says("up")
        yield
    silent.close()


@pytest.mark.usefixtures("squatters")
def test_taken_ports_are_passed_by(job: int) -> None:
    assert met(*[start(job, rank, 3) for rank in (2, 1, 0)]) == ["3"] * 3


def test_who_did_not_hear_the_answer_asks_again(job: int) -> None:
    """Rank 1 left before it was answered."""
    with start(job, 0, 2) as first:
        calling(ports(job)[0], lambda asking: asking.sendall(b"moored 1 abc\n"))
        assert met(start(job, 1, 2), first) == ["2"] * 2


def calling(port: int, call: Callable[[socket.socket], Any]) -> Any:
    """Call at a port as soon as somebody listens there."""
    while True:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=120) as asking:
                return call(asking)
        except ConnectionRefusedError:
            time.sleep(0.1)


def test_an_earlier_start_of_the_job_is_not_met(job: int) -> None:
    """Rank 0 of a start that is cut off still waits for its rank 1."""
    with start(job, 0, 2, restart=0):
        calling(ports(job)[0], lambda _: None)
        assert met(*[start(job, rank, 2, restart=1) for rank in (1, 0)]) == ["2"] * 2


@pytest.mark.parametrize("given", [True, False], ids=["secret from the launcher", "left in a file"])
def test_who_takes_the_port_first_runs_nothing(
    job: int, given: bool, tmp_path: Path, cache: Path
) -> None:
    """An impostor answers as rank 0, to gather a pickle: its code ran in rank 1 once."""
    canary = tmp_path / "canary"
    with Forked(impostor, ports(job)[0], ports(job)[3], canary) as stranger:
        stranger.says("up")
        variables = {"MOORED_MEETING_SECRET": SECRET} if given else {}
        second = start(job, 1, 2, **variables)
        time.sleep(1)
        assert met(second, start(job, 0, 2, **variables)) == ["2", "2"]
    assert not canary.exists()
    assert not list(cache.glob(".*")), "the secret is forgotten once all have met"


def test_who_calls_as_rank_1_is_not_let_in(job: int) -> None:
    """He is answered and cannot prove anything; the store's port is no secret, nor is it enough."""

    def call(asking: socket.socket) -> str:
        asking.sendall(f"moored 1 {'0' * 32}\n".encode())
        nonce, port, proof = asking.recv(400).decode().split()
        asking.sendall(f"{proof}\n".encode())  # what he was told is all that he knows
        assert (len(nonce), len(proof)) == (32, 64)
        return port

    with start(job, 0, 2, MOORED_MEETING_SECRET=SECRET) as first:
        port = calling(ports(job)[0], call)
        with pytest.raises(OSError, match="refused"):  # neither listens where it need not
            socket.create_connection((other_address(), int(port)), timeout=120)
        with pytest.raises(OSError, match="refused"):
            socket.create_connection((other_address(), ports(job)[0]), timeout=120)
        assert met(first, start(job, 1, 2, MOORED_MEETING_SECRET=SECRET)) == ["2"] * 2


def other_address() -> str:
    """This machine, but not where its ranks meet: all of 127.0.0.0/8 is."""
    return "127.0.0.9"


def test_ranks_with_different_secrets_end_with_a_line_each(job: int) -> None:
    bound = {"MOORED_RENDEZVOUS_SECONDS": "20"}
    ranks = [
        start(job, rank, 2, "doctor", MOORED_MEETING_SECRET=f"{rank}{SECRET}", **bound)
        for rank in (0, 1)
    ]
    said = [rank.communicate()[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2]
    first, second = ([line for line in text.splitlines() if "error: " in line] for text in said)
    assert len(first) == len(second) == 1, said
    assert "rank 0 of 2 waited 20 s for rank 1 " in first[0]
    at = ports(job)[0]
    assert f"waited 20 s for rank 0 at 127.0.0.1:{at}," in second[0]
    # Other programs may listen at other ports of the job: another run of these tests, say.
    assert re.search(rf"\(at [\d,]*\b{at}\b", second[0])
    assert "was something else, or a rank 0 with another secret)" in second[0]


# ---- the exchange itself, over real sockets


@pytest.fixture
def place(job: int) -> RankInfo:
    return RankInfo(
        rank=1,
        world_size=2,
        address="localhost",
        ports=tuple(ports(job)),
        rendezvous=KEY.rendezvous,
        one_machine=True,
    )


def ask(place: RankInfo, key: Key = KEY, seconds: float = 0.5) -> tuple[str, int]:
    return rendezvous.find(place, lambda: key, Waiting(place, seconds))


@pytest.fixture
def rank_0(place: RankInfo) -> Iterator[tuple[int, threading.Thread]]:
    """The port at which it is asked, and the thread that answers until rank 1 has come."""
    asked_at, store = rendezvous.host(place)
    port = asked_at.getsockname()[1]
    thread = rendezvous.answer(asked_at, place, 4242, KEY)
    store.close()
    yield port, thread
    if thread.is_alive():
        ask(replace(place, ports=(port,)), seconds=300)
    thread.join(300)
    assert not thread.is_alive()


def test_both_know_each_other(place: RankInfo, rank_0: Any) -> None:
    assert ask(place, seconds=300) == ("127.0.0.1", 4242)
    rank_0[1].join(300)
    assert not rank_0[1].is_alive()


@pytest.mark.parametrize(
    "key", [Key("x" * 32, KEY.rendezvous), Key(SECRET, "4711.1.0")], ids=["secret", "start"]
)
def test_nobody_else_knows_rank_0(key: Key, place: RankInfo, rank_0: Any) -> None:
    with pytest.raises(UserError, match="another secret"):
        ask(place, key)
    assert rank_0[1].is_alive()


def call(port: int, *lines: str) -> list[str]:
    """Say lines to rank 0, one for each that it says."""
    found: list[str] = []
    with socket.create_connection(("127.0.0.1", port), timeout=120) as connection:
        for line in lines:
            connection.sendall(line.encode())
            found.append(connection.recv(400).decode())
    return found


@pytest.mark.parametrize(
    "said",
    [
        ["moored 1 abc\n", "0" * 64 + "\n"],
        ["moored 1 abc\n", "\n"],
        ["moored 7 abc\n", "0\n"],
        ["moored one abc\n"],
        ["GET / HTTP/1.1\r\n\r\n"],
        ["x" * 5000 + "\n"],
        ["\xff\x00\n"],
        ["\n"],
    ],
    ids=lambda lines: lines[0][:12].strip() or "nothing",
)
def test_garbage_and_guesses_are_not_counted(said: list[str], rank_0: Any) -> None:
    port, thread = rank_0
    call(port, *said)
    time.sleep(0.2)
    assert thread.is_alive()


def test_who_says_nothing_holds_nobody_up(place: RankInfo, rank_0: Any) -> None:
    port, thread = rank_0
    silent = [socket.create_connection(("127.0.0.1", port), timeout=120) for _ in range(50)]
    assert ask(place, seconds=300) == ("127.0.0.1", 4242)
    thread.join(300)
    assert not thread.is_alive()
    for connection in silent:
        connection.close()


def test_reflected_and_replayed_proofs_are_none(place: RankInfo) -> None:
    """A man in the middle records a real exchange: none of it serves him a second time."""
    asked_at, store = rendezvous.host(replace(place, ports=place.ports[1:]))
    store.close()
    thread = rendezvous.answer(asked_at, place, 4242, KEY)
    middle = socket.create_server(("127.0.0.1", place.ports[0]))
    recorded: list[bytes] = []

    def relay() -> None:
        connection, _ = middle.accept()
        with connection, socket.create_connection(("127.0.0.1", place.ports[1])) as onward:
            for source, sink in ((connection, onward), (onward, connection), (connection, onward)):
                recorded.append(source.recv(400))
                sink.sendall(recorded[-1])

    relaying = threading.Thread(target=relay)
    relaying.start()
    assert ask(replace(place, ports=place.ports[:1]), seconds=300)[1] == 4242  # rank 0's own port
    relaying.join()
    thread.join(300)
    assert not thread.is_alive()
    hello, answer, proof = recorded

    # To a new rank 0: rank 1's words of then; and its own proof of now.
    asked_at, store = rendezvous.host(replace(place, ports=place.ports[2:]))
    store.close()
    port = asked_at.getsockname()[1]
    thread = rendezvous.answer(asked_at, place, 4242, KEY)
    call(port, hello.decode(), proof.decode())
    with socket.create_connection(("127.0.0.1", port), timeout=120) as connection:
        connection.sendall(hello)
        its_own = connection.recv(400).split()[2]
        connection.sendall(its_own + b"\n")
        connection.recv(400)
    assert thread.is_alive()
    assert ask(replace(place, ports=(port,)), seconds=300)[1] == 4242
    thread.join(300)

    # To a new rank 1: rank 0's words of then.
    def replay() -> None:
        while True:
            try:
                connection, _ = middle.accept()
            except OSError:
                return
            with connection:
                connection.recv(400)
                connection.sendall(answer)

    threading.Thread(target=replay, daemon=True).start()
    with pytest.raises(UserError, match="another secret"):
        ask(replace(place, ports=place.ports[:1]))
    middle.shutdown(socket.SHUT_RDWR)
    middle.close()


@pytest.mark.parametrize("says", [b"", b"\xff\xff\n", b"a b c\n", b"x" * 9999], ids=repr)
def test_a_listener_that_is_not_rank_0_is_left_in_time(says: bytes, place: RankInfo) -> None:
    """Silence too: the time that a rank waits is bounded by the option, not by him."""
    with socket.create_server(("127.0.0.1", place.ports[0])) as server:

        def talk() -> None:
            kept = []
            while True:
                try:
                    kept.append(server.accept()[0])
                    kept[-1].sendall(says)
                except OSError:
                    return

        threading.Thread(target=talk, daemon=True).start()
        with pytest.raises(UserError, match=r"waited 0\.5 s for rank 0 .*was something else"):
            ask(place)
        server.shutdown(socket.SHUT_RDWR)


def prove_to_each_other(rank: int, world_size: int, who_lies: int | None) -> str:
    axis = Axis(name="world", rank=rank, size=world_size)
    key = Key(secrets.token_hex(32) if rank == who_lies else SECRET, KEY.rendezvous)
    try:
        prove(axis, key)
    except UserError as error:
        return str(error)
    return "proved"


def test_a_member_of_the_group_that_proves_nothing_is_found() -> None:
    """Who got past the meeting, by the store that takes anybody's word, is no rank yet."""
    assert run_distributed(prove_to_each_other, 3, None) == ["proved"] * 3
    for rank, said in enumerate(run_distributed(prove_to_each_other, 3, 1)):
        named = "ranks 0, 2" if rank == 1 else "rank 1"
        assert said.startswith(f"{named} of the group world did not prove to be of this run")
