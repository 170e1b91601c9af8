from __future__ import annotations

import contextlib
import json
import math
import multiprocessing
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import pytest

from moored.utils import atomic_dir
from moored.utils.atomic_dir import jsonable, make_once, read_manifest, seal, verify, write_json
from moored.utils.errors import UserError


def fill(folder: Path) -> dict[str, Any]:
    (folder / "sub").mkdir()
    (folder / "a.bin").write_bytes(bytes(range(256)) * 4)
    (folder / "sub" / "b.txt").write_text("hello")
    return {"source": "here"}


def forbidden(folder: Path) -> dict[str, Any]:
    raise AssertionError("made again")


def test_made_once_and_kept(tmp_path: Path) -> None:
    manifest = make_once(tmp_path / "cache" / "x", fill)
    assert manifest["source"] == "here"
    assert sorted(manifest["files"]) == ["a.bin", "sub/b.txt"]
    assert make_once(tmp_path / "cache" / "x", forbidden) == manifest
    assert sorted(p.name for p in (tmp_path / "cache").iterdir()) == [".x.lock", "x"]


def flip(folder: Path) -> None:
    data = bytearray((folder / "a.bin").read_bytes())
    data[500] ^= 1
    (folder / "a.bin").write_bytes(data)


def zero_tail(folder: Path) -> None:
    data = (folder / "a.bin").read_bytes()
    (folder / "a.bin").write_bytes(data[:512] + bytes(512))


def truncate(folder: Path) -> None:
    os.truncate(folder / "a.bin", 1023)


def remove(folder: Path) -> None:
    (folder / "sub" / "b.txt").unlink()


def lead_out(folder: Path) -> None:
    outside = folder.parent / "outside.txt"
    outside.write_text("hello")
    (folder / "sub" / "b.txt").unlink()
    (folder / "sub" / "b.txt").symlink_to(outside)


def no_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def torn_manifest(folder: Path) -> None:
    os.truncate(folder / "manifest.json", 30)


def empty_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text('{"files": {}}')


def other_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text("[]")


FAULTS = [
    flip,
    zero_tail,
    truncate,
    remove,
    lead_out,
    no_manifest,
    torn_manifest,
    empty_manifest,
    other_manifest,
]


@pytest.mark.parametrize("harm", FAULTS)
def test_every_fault_is_found_and_mended(tmp_path: Path, harm: Any) -> None:
    folder = tmp_path / "x"
    expected = make_once(folder, fill)
    assert verify(folder) is None
    harm(folder)
    assert verify(folder) is not None
    assert make_once(folder, fill) == expected
    assert verify(folder) is None


def test_a_maker_that_fails_leaves_nothing_and_keeps_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> dict[str, Any]:
        fill(folder)
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        make_once(tmp_path / "x", fail)
    assert [p.name for p in tmp_path.iterdir()] == [".x.lock"]
    make_once(tmp_path / "x", fill)


def make_slowly(folder: Path, log: Path) -> None:
    def make(new: Path) -> dict[str, Any]:
        with open(log, "a") as file:
            file.write(f"{os.getpid()}\n")
        fill(new)
        time.sleep(0.3)
        return {}

    assert verify(folder) is None or make_once(folder, make)
    assert verify(folder) is None


def test_processes_at_once_make_it_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    arguments = (tmp_path / "x", tmp_path / "log")
    processes = [context.Process(target=make_slowly, args=arguments) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(600)
    assert [process.exitcode for process in processes] == [0, 0, 0, 0]
    assert len((tmp_path / "log").read_text().splitlines()) == 1


def test_a_lock_that_is_never_released_ends_in_one_line(tmp_path: Path) -> None:
    lock = filelock.FileLock(tmp_path / ".x.lock")
    with lock, pytest.raises(UserError, match=r"has been held for 0 s: end the process"):
        make_once(tmp_path / "x", forbidden, timeout=0.2)


def test_without_locks_a_peer_that_was_first_serves_as_well(tmp_path: Path) -> None:
    folder = tmp_path / "x"

    def make(new: Path) -> dict[str, Any]:
        peer = threading.Thread(target=atomic_dir._make, args=(folder, fill))
        peer.start()
        peer.join()
        return fill(new)

    atomic_dir._make(folder, make)
    assert verify(folder) is None
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_no_place_to_write_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="MOORED_CACHE") as caught:
        make_once(tmp_path / "file" / "x", fill)
    assert "\n" not in str(caught.value)


def test_a_full_disk_is_one_line_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(folder: Path) -> dict[str, Any]:
        (folder / "a").write_text("part of it")
        with open("/dev/full", "w") as file:
            file.write("x" * 100_000)
        return {}

    with pytest.raises(UserError, match="No space left"):
        make_once(tmp_path / "x", full)
    assert [p.name for p in tmp_path.iterdir()] == [".x.lock"]


def test_the_manifest_is_json_with_sizes_and_sums(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    seal(tmp_path, {"k": 1})
    assert json.loads((tmp_path / "manifest.json").read_text()) == read_manifest(tmp_path)
    assert read_manifest(tmp_path) == {
        "k": 1,
        "files": {
            "a": {
                "bytes": 3,
                "sha256": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
            }
        },
    }


# ---------------------------------------------------------------- one writer


def replaced(folder: Path, text: str, fails: BaseException | None = None, **options: Any) -> None:
    with atomic_dir.replacing(folder, **options) as new:
        assert (new.stat().st_mode & 0o777, list(new.iterdir())) == (0o700, [])
        (new / "a.txt").write_text(text)
        if fails is not None:
            raise fails


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    folder = tmp_path / "sub" / "x"
    replaced(folder, "one")
    left = folder.with_name(".x.tmp")  # by a writer that was killed
    left.mkdir()
    (left / "half").write_text("")
    replaced(folder, "two")
    assert [p.name for p in folder.parent.iterdir()] == ["x"]
    assert [p.name for p in folder.iterdir()] == ["a.txt"]
    assert (folder / "a.txt").read_text() == "two"


def test_what_was_there_stays_where_the_new_folder_fails(tmp_path: Path) -> None:
    folder = tmp_path / "x"
    replaced(folder, "one")
    with pytest.raises(OSError, match="full"):
        replaced(folder, "two", OSError("full"))
    assert [p.name for p in tmp_path.iterdir()] == ["x"], "half a folder fills a full disk"
    with pytest.raises(RuntimeError):
        replaced(folder, "two", RuntimeError("read back otherwise"))
    assert (folder / "a.txt").read_text() == "one"

    def not_ours() -> None:
        assert (folder / "a.txt").read_text() == "one"
        raise UserError("of another process by now")

    with pytest.raises(UserError, match="of another"):
        replaced(folder, "two", before_rename=not_ours)
    assert (folder / "a.txt").read_text() == "one"


def test_files_are_private_within_and_as_before_after(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        with contextlib.suppress(KeyError), atomic_dir.private_files():
            (tmp_path / "a").write_text("")
            raise KeyError
        (tmp_path / "b").write_text("")
    finally:
        os.umask(before)
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in "ab"] == [0o600, 0o644]


def test_a_file_is_the_old_or_the_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "sub" / "a.json"
    write_json(path, {"step": 1})
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: forbidden(path))  # killed before the rename
        with pytest.raises(AssertionError):
            write_json(path, {"step": 2})
    assert json.loads(path.read_text()) == {"step": 1}
    write_json(path, {"step": 3})
    assert path.read_text() == '{\n "step": 3\n}\n'


def test_values_are_those_of_json() -> None:
    @dataclass
    class Part:
        share: float
        names: tuple[str, ...]

    value = {"a": Part(math.nan, ("x",)), 3: [math.inf, -math.inf, 0.5, None, True]}
    text = json.dumps(jsonable(value), allow_nan=False)
    plain = {
        "a": {"share": "NaN", "names": ["x"]},
        "3": ["Infinity", "-Infinity", 0.5, None, True],
    }
    assert json.loads(text) == plain
    assert [float(word) for word in plain["3"][:2]] == [math.inf, -math.inf]
