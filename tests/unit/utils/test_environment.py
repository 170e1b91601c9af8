"""Which process this is: torchrun's and DeepSpeed's variables, srun's, and broken ones."""

from __future__ import annotations

import pytest

from moored.utils.environment import (
    FIRST_PORT,
    NUM_PORTS,
    RankInfo,
    SlurmJob,
    own_rank,
    rank_info,
    slurm_job,
)
from moored.utils.errors import UserError

SRUN = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "2",
    "SLURM_PROCID": "3",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "node[03-04]",
}
TORCHRUN = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "h",
    "MASTER_PORT": "29400",
}


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*SRUN, *TORCHRUN, "SLURM_RESTART_COUNT", "MOORED_RENDEZVOUS"):
        monkeypatch.delenv(name, raising=False)


def given(monkeypatch: pytest.MonkeyPatch, **variables: str) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def test_a_process_started_by_hand_is_alone() -> None:
    assert rank_info() == RankInfo(rank=0, world_size=1, local_rank=0, address=None)


def test_torchrun_and_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    given(monkeypatch, **TORCHRUN)
    assert rank_info() == RankInfo(rank=1, world_size=2, local_rank=1, address="h", ports=(29400,))
    assert own_rank() == 1


def test_a_rendezvous_with_a_name_has_several_ports(monkeypatch: pytest.MonkeyPatch) -> None:
    given(monkeypatch, **TORCHRUN | {"MASTER_PORT": str(FIRST_PORT + NUM_PORTS - 1)})
    given(monkeypatch, MOORED_RENDEZVOUS="box-1-2")
    place = rank_info()
    assert place.rendezvous == "box-1-2"
    assert place.ports[0] == FIRST_PORT + NUM_PORTS - 1
    assert len(set(place.ports)) > 1
    assert all(FIRST_PORT <= port < FIRST_PORT + NUM_PORTS for port in place.ports)


def test_torchrun_inside_an_srun_step_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    given(monkeypatch, **SRUN | TORCHRUN)
    assert rank_info().world_size == 2


def test_an_srun_step(monkeypatch: pytest.MonkeyPatch) -> None:
    given(monkeypatch, **SRUN)
    place = rank_info()
    assert (place.rank, place.world_size, place.local_rank) == (3, 4, 1)
    assert place.address == "node03"
    assert len(set(place.ports)) > 1
    assert all(FIRST_PORT <= port < FIRST_PORT + NUM_PORTS for port in place.ports)
    assert slurm_job() == SlurmJob(id="4711", restart=0)
    monkeypatch.setenv("SLURM_STEP_ID", "3")  # another step of the same job meets elsewhere
    assert not set(rank_info().ports) & set(place.ports)
    monkeypatch.setenv("SLURM_STEP_ID", "2")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")  # where nobody of the start before is let in
    assert rank_info().rendezvous != place.rendezvous
    given(monkeypatch, MASTER_ADDR="elsewhere", MASTER_PORT="1234")
    assert (rank_info().address, rank_info().ports) == ("elsewhere", (1234,))


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1", "node1"),
        ("a,b", "a"),
        ("node[03-05,9],x1", "node03"),
        ("n[7,9-12]", "n7"),
        ("r[1-2]n[04-08]-ib,z", "r1n04-ib"),
    ],
)
def test_the_first_host(monkeypatch: pytest.MonkeyPatch, nodes: str, first: str) -> None:
    given(monkeypatch, **SRUN | {"SLURM_STEP_NODELIST": nodes})
    assert rank_info().address == first


def test_a_batch_script_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has PROCID and NTASKS, but no step."""
    given(monkeypatch, SLURM_PROCID="0", SLURM_LOCALID="0", SLURM_NTASKS="8", SLURM_JOB_ID="1")
    assert rank_info().world_size == 1


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"RANK": "one"}, "RANK='one' is not a whole number"),
        ({"RANK": "2"}, "RANK=2 is not below WORLD_SIZE=2"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR is not set"),
    ],
)
def test_a_broken_environment(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, str], says: str
) -> None:
    given(monkeypatch, **TORCHRUN | changes)
    with pytest.raises(UserError, match=says):
        rank_info()
    assert own_rank() == 0
