"""The kept hidden states of a base: what serves what, and what breaks."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from moored.config import load_config
from moored.data.batch import Batch, Sample, collate
from moored.models import reference_cache
from moored.models.reference_cache import ReferenceCache, facts_of
from tiny import tiny_recipe, write_recipe

D = 8


def sample(name: str, length: int, *, first_target: int = 1) -> Sample:
    ids = np.random.default_rng(sum(name.encode())).integers(0, 1000, length).astype(np.int32)
    labels = np.arange(length) >= first_target
    return Sample(sample_id=name, input_ids=ids, label_mask=labels)


A, B, C = sample("a", 9), sample("b", 7, first_target=3), sample("c", 5)


def base(batch: Batch, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """As a causal model would: of a sample's tokens up to the target, and of nothing else."""
    ids, positions = batch.input_ids.reshape(-1), batch.position_ids.reshape(-1)
    rows = []
    for at in batch.target_index.tolist():
        start = at - int(positions[at])
        seed = hash(tuple(ids[start : at + 1].tolist())) % 2**31
        rows.append(torch.randn(D, generator=torch.Generator().manual_seed(seed)))
    return torch.stack(rows).to(dtype) if rows else torch.empty((0, D), dtype=dtype)


class Cached:
    """A cache in `folder`, with the base beside it."""

    def __init__(self, folder: Path, **options: object):
        dtype = options.pop("dtype", torch.float32)
        given = {"facts": {}, "by_batch": False, "max_bytes": 2**30} | options
        like = torch.empty((1, D), dtype=dtype)
        self.cache, self.dtype = ReferenceCache(folder, like=like, **given), dtype

    def __call__(self, *rows: list[Sample]) -> bool:
        """Whether the batch came out of the cache; it is right in any case."""
        batch = collate(rows, 0)
        expected = base(batch, self.dtype)
        found = self.cache.find(batch)
        if found is None:
            self.cache.keep(batch, expected)
            return False
        assert torch.equal(found, expected)
        return True


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "reference" / "base"


def test_a_sample_serves_wherever_it_is_laid(folder: Path) -> None:
    cache = Cached(folder)
    assert not cache([A, B], [C])
    for rows in ([[A, B], [C]], [[C, B, A]], [[A], [B]], [[B]], []):
        assert cache(*rows), rows
    longer, other = sample("a", 10), sample("b", 7, first_target=2)
    assert not cache([longer])
    assert not cache([other]), "the same tokens, but other targets"
    assert not cache([A], [sample("d", 4)]), "one of its samples is new"


def test_all_positions_are_records_of_their_own_whatever_is_drawn(folder: Path) -> None:
    """With `token_fraction` another part is drawn each step: the sample's record has them all."""
    cache = ReferenceCache(
        folder, facts={}, like=torch.empty((1, D)), by_batch=False, max_bytes=2**30
    )
    few, every = collate([[A, B]], 0), collate([[A, B]], 0, all_positions=True)
    cache.keep(few, base(few))
    assert cache.find(every) is None, "B has positions without a target"
    cache.keep(every, base(every))
    draws = [np.random.default_rng(i).random(7) < 0.5 for i in range(3)]
    for kl_mask in draws:
        thinned = collate([[replace(B, kl_mask=kl_mask), A]], 0, all_positions=True)
        assert torch.equal(cache.find(thinned), base(thinned))
    assert torch.equal(cache.find(few), base(few))


def test_a_batch_serves_itself_alone(folder: Path) -> None:
    cache = Cached(folder, by_batch=True)
    assert not cache([A, B], [C])
    assert cache([A, B], [C])
    for rows in ([[A, B]], [[B, A], [C]], [[C], [A, B]], [[A, B], [sample("c", 6)]]):
        assert not cache(*rows), rows


def test_a_sample_that_lies_in_a_batch_twice_has_two_records(folder: Path) -> None:
    cache = ReferenceCache(
        folder, facts={}, like=torch.empty((1, D)), by_batch=True, max_bytes=2**30
    )
    batch = collate([[A, B], [A]], 0)
    hidden = torch.randn(batch.num_targets, D)  # A's differ by where it lies
    assert cache.find(batch) is None
    cache.keep(batch, hidden)
    assert torch.equal(cache.find(batch), hidden)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_flushed_is_there_for_others(folder: Path, dtype: torch.dtype) -> None:
    first, second = (Cached(folder, dtype=dtype) for _ in range(2))
    assert not first([A, B])
    assert not second([A]), "not written yet"
    first.cache.flush()
    assert second([B]), "a file that came while it ran"
    third = Cached(folder, dtype=dtype)
    assert third([A, B])
    assert (third.cache.num_read, third.cache.num_computed) == (1, 0)
    assert not Cached(folder, dtype=torch.float64)([A, B]), "of another dtype"


def test_large_amounts_are_written_on_the_way(folder: Path, monkeypatch) -> None:
    monkeypatch.setattr(reference_cache, "FILE_BYTES", 20 * D * 4)
    killed = Cached(folder)  # that is, never flushed
    for length in range(5, 25):
        killed([sample(f"s{length}", length)])
    again = Cached(folder)
    found = [again([sample(f"s{length}", length)]) for length in range(5, 25)]
    assert sum(found) >= 17, found
    assert not list(folder.glob("*.draft"))


@pytest.mark.parametrize("where", ["record", "header", "cut", "empty", "text"])
def test_broken_files_are_computed_again(folder: Path, where: str, caplog) -> None:
    first = Cached(folder)
    first([A, B], [C])
    first.cache.flush()
    (path,) = folder.glob("*.safetensors")
    data = bytearray(path.read_bytes())
    if where == "record":
        data[-5] ^= 1
    elif where == "header":
        data[20] ^= 255
    elif where == "cut":
        del data[-40:]
    else:
        data = bytearray(b"" if where == "empty" else b"not a tensor" * 10)
    path.write_bytes(data)
    caplog.set_level(logging.WARNING)
    found = [Cached(folder)(row) for row in ([A], [B], [C])]
    assert not all(found)
    assert f"{path.name} is broken" in caplog.text
    assert not path.exists(), "it would be found again and again"
    assert path.with_suffix(".broken").exists()
    mended = Cached(folder)
    mended([A, B], [C])
    mended.cache.flush()
    caplog.clear()
    assert Cached(folder)([A, B], [C])
    assert not caplog.text


def test_what_is_read_ahead_is_used_once_and_let_go_of(folder: Path, monkeypatch) -> None:
    first = Cached(folder)
    for rows in ([A], [B], [C]):
        first(rows)
    first.cache.flush()
    cache = Cached(folder)
    cache.cache.read_ahead([collate([[A]], 0), collate([[B]], 0), collate([[sample("d", 4)]], 0)])
    reads: list[str] = []
    read_one = cache.cache._read_one
    monkeypatch.setattr(
        cache.cache, "_read_one", lambda name, n: (reads.append(name), read_one(name, n))[1]
    )
    assert cache([A])
    assert reads == [], "it was in memory"
    assert cache([A])
    assert len(reads) == 1
    cache.cache.read_ahead([])
    assert cache([B]), "of the step before"
    assert len(reads) == 1
    cache.cache.read_ahead([collate([[C]], 0)])
    cache.cache.read_ahead([])
    cache.cache.read_ahead([])
    assert not any(cache.cache._ahead), "a step that needs no reference does not ask"


def test_the_disk_is_bounded(folder: Path, caplog) -> None:
    beside = folder.parent / "another"
    full = Cached(beside)
    full([A])
    full.cache.flush()
    used = sum(path.stat().st_size for path in folder.parent.glob("*/*.safetensors"))
    cache = Cached(folder, max_bytes=used + 100)
    assert not cache([A])
    cache.cache.flush()
    assert not list(folder.glob("*.safetensors"))
    assert caplog.text.count("raise reference.max_gib") == 1
    assert not cache([B])
    assert not cache([B]), "nothing is kept any more"
    assert caplog.text.count("raise reference.max_gib") == 1


def test_a_file_that_others_take_away_costs_nothing(folder: Path, monkeypatch) -> None:
    """As `moored prepare --prune` does, between the listing and the look at its size."""
    cache = Cached(folder)
    cache([A])
    gone = folder.parent / "another/gone.safetensors"
    monkeypatch.setattr(Path, "glob", lambda self, pattern: iter([gone]))
    cache.cache.flush()
    monkeypatch.undo()
    assert Cached(folder)([A])


def test_a_folder_that_cannot_be_written_costs_a_warning(tmp_path: Path, caplog) -> None:
    (tmp_path / "reference").write_text("a file")
    cache = Cached(tmp_path / "reference" / "base")
    assert not cache([A])
    assert not cache([A])
    assert "nothing more is added to the reference cache" in caplog.text


def test_a_rank_that_does_not_write_reads(folder: Path) -> None:
    reader = Cached(folder, writes=False)
    assert not reader([A])
    reader.cache.flush()
    assert not list(folder.glob("*.safetensors"))
    writer = Cached(folder)
    writer([A])
    writer.cache.flush()
    assert reader([A])


def test_where_others_lack_something_all_compute(folder: Path) -> None:
    seen: list[bool] = []

    def agree(hits: list[bool]) -> list[bool]:
        seen.extend(hits)
        return [False] * len(hits)

    writer = Cached(folder)
    writer([A])
    writer.cache.flush()
    cache = Cached(folder, agree=agree)
    assert not cache([A])
    assert seen == [True]
    assert not cache.cache._pending, "it is kept already"


def test_other_bases_have_other_folders(tmp_path: Path) -> None:
    config = load_config(write_recipe(tmp_path, tiny_recipe(tmp_path)))
    probe = torch.arange(6.0).reshape(2, 3)

    def facts(
        *changes: str, revision: str = "r", hidden: torch.Tensor = probe, by_tokens: bool = False
    ) -> dict:
        changed = load_config(tmp_path / "tiny.yaml", list(changes))
        return facts_of(changed, revision, torch.device("cpu"), hidden, by_tokens=by_tokens)

    same = facts_of(config, "r", torch.device("cpu"), probe, by_tokens=False)
    assert same["parallel"]["sequence_parallel"] is False, "as older caches say"
    assert facts() == same
    assert facts("optim.learning_rate=0.5", "train.seed=3", "adapter.r=2") == same
    assert facts(revision="other") != same
    assert facts(by_tokens=True) != same
    assert facts(hidden=probe + 1e-7) != same
    assert facts(hidden=probe.bfloat16()) != same
    for change in (
        "model.quantization=none",
        "model.double_quantization=false",
        "model.dtype=bfloat16",
        "model.attention=eager",
        "parallel.tensor_parallel_degree=2",
    ):
        assert facts(change) != same, change
