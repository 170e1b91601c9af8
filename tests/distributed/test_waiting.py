"""A process that waits for others says for whom, for how long, and ends in time, in one line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from forking import Forked, free_port, moored
from moored.distributed.rendezvous import ranks
from moored.utils.environment import rendezvous_seconds
from tiny import tiny_recipe, write_recipe

SLURM = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID")
BOUND = 20


def by_srun(rank: int, size: int) -> dict[str, str]:
    given = dict(zip(SLURM, ("77", "0", str(size), str(rank)), strict=True))
    return given | {"SLURM_LOCALID": str(rank), "SLURM_STEP_NODELIST": "localhost"}


def by_launcher(rank: int, size: int, **more: str) -> dict[str, str]:
    place = {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    return place | {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())} | more


@pytest.fixture(scope="module")
def started() -> Iterator[list[Forked]]:
    processes: list[Forked] = []
    yield processes
    for process in processes:
        process.kill()


def doctor(started: list[Forked], place: dict[str, str], folder: Path, *arguments: str) -> Forked:
    bound = {} if arguments else {"MOORED_RENDEZVOUS_SECONDS": str(BOUND)}
    variables = {"MOORED_CACHE": str(folder / "cache")} | bound | place
    started.append(moored("doctor", *arguments, **variables))
    return started[-1]


CASES = {
    "srun 0": (by_srun(0, 4), r"ranks 1-3", "env -u SLURM_STEP_ID moored"),
    "srun 2": (by_srun(2, 4), r"rank 0 at 127\.0\.0\.1:\d+", "env -u SLURM_STEP_ID moored"),
    "env 0": (by_launcher(0, 2), "rank 1", "env -u RANK -u WORLD_SIZE moored"),
    "env 1": (by_launcher(1, 2), r"rank 0 at localhost:\d+", "env -u RANK -u WORLD_SIZE moored"),
    "one machine 0": (
        by_launcher(0, 2, LOCAL_WORLD_SIZE="2"),
        "rank 1",
        "env -u RANK -u WORLD_SIZE moored",
    ),
    "torchrun 1": (
        by_launcher(1, 2, TORCHELASTIC_USE_AGENT_STORE="True"),
        r"the agent of torchrun at localhost:\d+",
        "env -u RANK -u WORLD_SIZE moored",
    ),
}


@pytest.fixture(scope="module")
def waiters(started: list[Forked], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Forked]:
    """One process of each of several starts, which wait at the same time."""
    folder = tmp_path_factory.mktemp("waiters")
    return {
        case: doctor(started, place, folder / case.replace(" ", "-"))
        for case, (place, _, _) in CASES.items()
    }


@pytest.mark.parametrize("case", CASES)
def test_one_of_several_says_for_whom_it_waits(case: str, waiters: dict[str, Forked]) -> None:
    (place, whom, hint), process = CASES[case], waiters[case]
    rank, size = place.get("RANK") or place[SLURM[3]], place.get("WORLD_SIZE") or place[SLURM[2]]
    err = process.communicate()[1]
    assert process.returncode == 2, err
    lines = err.splitlines()
    said = next(line for line in lines if "waits for" in line)
    left = re.search(rf"rank {rank} of {size} waits for {whom}.*, for (\d+) s more \(", said)
    assert left, said
    assert int(left[1]) >= BOUND - 15  # it has been silent for five seconds, and not for long
    assert hint in said
    assert "parallel.rendezvous_seconds, or MOORED_RENDEZVOUS_SECONDS" in said
    (error,) = [line for line in lines if "error: " in line]
    assert re.search(rf"rank {rank} of {size} waited {BOUND} s for {whom}", error)
    assert lines.index(said) < lines.index(error)
    assert "Traceback" not in err


def test_the_recipe_says_how_long(started: list[Forked], tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)
    recipe["parallel"]["rendezvous_seconds"] = 7
    path = write_recipe(tmp_path, recipe)
    process = doctor(started, by_srun(0, 3), tmp_path, str(path))
    err = process.communicate()[1]
    assert process.returncode == 2
    assert "waited 7 s for ranks 1-2 (parallel.rendezvous_seconds" in err
    assert not (tmp_path / "runs").exists()  # where the secret was


def test_those_who_came_learn_who_did_not(started: list[Forked], tmp_path: Path) -> None:
    """Two of three: each names the third, and rank 0 tells the other when it gives up."""
    first = doctor(started, by_srun(0, 3), tmp_path)
    line = first.says("waits for")
    second = doctor(started, by_srun(1, 3), tmp_path)
    said = [process.communicate()[1] for process in (first, second)]
    assert [process.returncode for process in (first, second)] == [2, 2], [line, *said]
    assert f"waited {BOUND} s for rank" in said[0]
    assert "error: " in said[1]


@pytest.mark.parametrize("value", ["soon", "0", "-1", "nan", "inf"])
def test_a_bound_that_is_none_is_named(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOORED_RENDEZVOUS_SECONDS", value)
    with pytest.raises(Exception, match=f"MOORED_RENDEZVOUS_SECONDS='{value}' is no number of"):
        rendezvous_seconds(600.0)


def test_many_ranks_in_few_words() -> None:
    assert ranks({3}) == "rank 3"
    assert ranks({1, 4, 5, 6, 9}) == "ranks 1, 4-6, 9"
    assert ranks(range(1, 1000)) == "ranks 1-999"
    assert ranks(range(1, 1000, 2)).endswith("15, and 492 more groups")
