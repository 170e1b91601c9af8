"""Where the secret of a start comes from, and what is not taken for one."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from moored.distributed import secret
from moored.distributed.secret import Key
from moored.utils import environment
from moored.utils.errors import UserError
from moored.utils.log import redact

LONG = "0123456789abcdef" * 4


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (environment.SECRET_VARIABLE, environment.SECRET_FILE_VARIABLE):
        monkeypatch.delenv(name, raising=False)


def test_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert not environment.has_secret()
    assert secret.given() is None
    monkeypatch.setenv("MOORED_MEETING_SECRET", LONG)
    assert secret.given() == LONG
    assert redact(f"it is {LONG}") == "it is ***"  # wherever it came from
    monkeypatch.setenv("MOORED_MEETING_SECRET", LONG[:31])
    with pytest.raises(UserError, match="MOORED_MEETING_SECRET holds 31 characters") as caught:
        secret.given()
    assert LONG[:31] not in str(caught.value)
    monkeypatch.delenv("MOORED_MEETING_SECRET")
    file = tmp_path / "secret"
    file.write_text(f"{LONG}\n")
    file.chmod(0o600)
    monkeypatch.setenv("MOORED_MEETING_SECRET_FILE", str(file))
    assert environment.has_secret()
    assert secret.given() == LONG
    file.chmod(0o640)
    with pytest.raises(UserError, match="mode 640: others can read it, set it to 600"):
        secret.given()
    file.unlink()
    with pytest.raises(UserError, match=r"MOORED_MEETING_SECRET_FILE=.*No such file"):
        secret.given()


def test_rank_0_leaves_one_and_takes_it_away(tmp_path: Path) -> None:
    path = secret.place_of("4711.0.0", tmp_path / "runs")
    assert path != secret.place_of("4711.1.0", tmp_path / "runs")
    assert secret.read(path)[0] is None
    with secret.made(path) as first:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert secret.read(path) == (first, "")
        assert len(first) >= secret.SHORTEST
        with secret.made(path) as second:  # an earlier start's is put aside
            assert secret.read(path)[0] == second != first
    assert not path.parent.exists()


def test_what_was_left_long_ago_is_forgotten(tmp_path: Path) -> None:
    old, young = tmp_path / ".meeting-old", tmp_path / ".meeting-young"
    old.touch()
    young.touch()
    os.utime(old, (0, time.time() - 2e6))
    with secret.made(tmp_path / ".meeting-now"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == [".meeting-young"]


def hidden(path: Path) -> None:
    path.write_text(LONG)
    path.chmod(0o600)


def shown(path: Path) -> None:
    path.write_text(LONG)
    path.chmod(0o604)


def elsewhere(path: Path) -> None:
    hidden(path.with_name("other"))
    path.symlink_to(path.with_name("other"))


def of_somebody(path: Path) -> None:
    hidden(path)
    os.chown(path, os.geteuid() + 1, -1)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (shown, "has mode 604"),
        (elsewhere, "symbolic link"),
        (os.mkfifo, "is no regular file"),
        (os.mkdir, "is no regular file"),
        pytest.param(
            of_somebody,
            "belongs to user",
            marks=pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away"),
        ),
    ],
)
def test_what_others_may_have_written_is_no_secret(
    make: Callable[[Path], object], why: str, tmp_path: Path
) -> None:
    path = tmp_path / "secret"
    make(path)
    found, said = secret.read(path)
    assert found is None
    assert why in said


def test_a_key_is_not_shown_and_proves_one_thing() -> None:
    key = Key(LONG, "4711.0.0")
    assert LONG not in f"{key} {key!r}"
    proof = key.proof("rank 0", 1, "a", "b")
    assert key.proves(proof, "rank 0", 1, "a", "b")
    assert not key.proves(proof, "another rank", 1, "a", "b")
    assert not key.proves(proof, "rank 0", 1, "ab", "")
    assert not key.proves(proof, "rank 0", 1, 'a", "b')
    assert not Key(LONG, "4711.1.0").proves(proof, "rank 0", 1, "a", "b")
    assert not Key(LONG[::-1], "4711.0.0").proves(proof, "rank 0", 1, "a", "b")
    assert not key.proves(None, "rank 0", 1, "a", "b")
