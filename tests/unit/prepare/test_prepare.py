"""`moored prepare`: kept tokens are exact, models are verified, and a job needs no network."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pytest
from safetensors.numpy import save_file

import chats
from datakit import CHAT, TOKENIZER, config, jsonl
from moored import data
from moored.cli import main
from moored.config import Config, Corpus, load_config
from moored.data import samples, token_cache
from moored.data.chat import ChatEncoder
from moored.data.samples import SampleSet, load_samples
from moored.data.stream import TrainStream
from moored.data.token_arrays import HeldSource
from moored.models.reference_cache import references_folder
from moored.prepare import prepare_command
from moored.utils import atomic_dir
from moored.utils.errors import UserError, UserErrors
from tiny import tiny_recipe, write_recipe

WORDS = ["the", "cat", "sat", "on", "the", "mat", "while", "a", "dog", "ran", "over", "it", "and"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MOORED_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokens"


def test_a_site_says_where_things_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    site, folder = tmp_path / "site.yaml", tmp_path / "shared"
    monkeypatch.setenv("HF_HOME", "elsewhere")  # to be put back
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "elsewhere")
    monkeypatch.setenv("SHARED", str(folder))
    site.write_text("storage: {cache: $SHARED/cache}\n")
    recipe = write_recipe(tmp_path, tiny_recipe(tmp_path))
    with pytest.raises(SystemExit, match="0"):
        main(["prepare", str(recipe), f"--site={site}"])
    assert list((folder / "cache/moored/tokens").glob("[!.]*"))
    assert os.environ["HF_HOME"] == str(folder / "cache/huggingface")
    monkeypatch.delenv("SHARED")
    with pytest.raises(SystemExit, match="2"):
        main(["prepare", str(recipe), f"--site={site}"])
    assert "export what it names" in capsys.readouterr().err


def chat_rows(count: int, start: int = 0) -> list[dict[str, Any]]:
    """Chats of very different lengths, some of two turns."""
    rows = []
    for i in range(start, start + count):
        words = [WORDS[(i * k) % len(WORDS)] for k in range(1, 3 + (i * 7) % 40)]
        turns = [
            {"role": "user", "content": f"question {i} é"},
            {"role": "assistant", "content": " ".join(words)},
        ]
        rows.append({"messages": turns * (1 + i % 2)})
    return rows


def tokenised(recipe: Config, *, keep: bool = False, tokenizer: Any = TOKENIZER) -> SampleSet:
    size = len(tokenizer)
    return load_samples(recipe.data.train, tokenizer, recipe.data, size, keep=keep)


def source_of(found: SampleSet, index: int = 0) -> HeldSource:
    source = found.sources[index]
    assert isinstance(source, HeldSource)
    return source


def require_equal(one: SampleSet, other: SampleSet) -> None:
    """In everything that anybody can ask of them."""
    assert one.fingerprint() == other.fingerprint()
    assert one.describe() == other.describe()
    for mine, theirs in zip(one.held, other.held, strict=True):
        assert list(mine.sample_ids) == list(theirs.sample_ids)
        assert mine.sample_ids[-1] == theirs.sample_ids[-1]
        assert mine.drops == theirs.drops
        assert mine.name == theirs.name
        for field in ("offsets", "input_ids", "label_mask"):
            left, right = getattr(mine.flat, field), getattr(theirs.flat, field)
            assert left.dtype == right.dtype
            np.testing.assert_array_equal(left, right)
        for a, b in zip(mine, theirs, strict=True):
            assert (a.sample_id, a.kl_mask) == (b.sample_id, b.kl_mask)
            np.testing.assert_array_equal(a.input_ids, b.input_ids)
            np.testing.assert_array_equal(a.label_mask, b.label_mask)


def require_equal_streams(recipe: Config, one: SampleSet, other: SampleSet) -> None:
    """Every step, also of a run that goes on from a cursor of the other."""
    first, second = (TrainStream(recipe, TOKENIZER, found) for found in (one, other))
    assert first.fingerprint() == second.fingerprint()
    assert first.total_steps() == second.total_steps()
    half = first.total_steps() // 2
    for step in range(first.total_steps()):
        if step == half:
            resumed = TrainStream(recipe, TOKENIZER, other)
            resumed.load_state_dict(first.state_dict())
            second = resumed
        for a, b in zip(
            first.next_step(dp_rank=0, dp_size=1),
            second.next_step(dp_rank=0, dp_size=1),
            strict=True,
        ):
            assert a.sample_ids == b.sample_ids
            assert (a.num_targets, a.num_kl, a.num_tokens) == (
                b.num_targets,
                b.num_kl,
                b.num_tokens,
            )
            for field in ("input_ids", "position_ids", "target_index", "targets", "kl_mask"):
                assert getattr(a, field).equal(getattr(b, field))
    assert first.state_dict() == second.state_dict()


def parquet(path: Path) -> str:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"q": f"ask {i}", "a": " ".join(WORDS[: 1 + i % 13])} for i in range(40)]
    pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


def saved_to_disk(path: Path) -> str:
    import datasets

    datasets.Dataset.from_list(chat_rows(30)).save_to_disk(path)
    return str(path)


def documents(folder: Path) -> str:
    folder.mkdir()
    for i in range(3):
        (folder / f"{i}.txt").write_text(" ".join(WORDS * (3 + i)))
    return str(folder)


def sources_of_all_kinds(folder: Path) -> list[dict[str, Any]]:
    (folder / "b").mkdir()
    return [
        {"path": jsonl(folder / "a.jsonl", chat_rows(60)), "weight": 0.7},
        {"path": jsonl(folder / "b" / "a.jsonl", chat_rows(20, 60)), "limit": 15},
        {"path": parquet(folder / "p.parquet"), "fields": {"prompt": "q", "completion": "a"}},
        {"path": documents(folder / "texts")},
        {"hub": saved_to_disk(folder / "saved")},
    ]


# ---------------------------------------------------------------- exactness


@pytest.mark.parametrize(
    ("options", "train"),
    [
        ({"max_length": 110, "too_long": "drop"}, {}),
        ({"max_length": 60, "too_long": "truncate", "packing": True}, {}),
        (
            {"max_length": 90, "packing": True},
            {"global_batch_sequences": None, "global_batch_tokens": 300},
        ),
    ],
)
def test_kept_tokens_are_exactly_those_that_were_made(tmp_path, cache, caplog, options, train):
    caplog.set_level(logging.INFO)
    options |= {"max_dropped_fraction": 0.9}
    recipe = config(
        sources_of_all_kinds(tmp_path), data=options, train={"steps": None, "epochs": 1.5} | train
    )

    def said() -> list[str]:
        lines = [r.getMessage() for r in caplog.records if r.name != "moored.data.token_cache"]
        caplog.clear()
        return lines

    plain = tokenised(recipe)
    expected = said()
    assert expected  # drops, or cuts
    assert not cache.exists()  # small data leave nothing behind
    made, made_said = tokenised(recipe, keep=True), said()
    read, read_said = tokenised(recipe), said()
    assert made_said == read_said == expected
    for found in (made, read):
        assert all(source.kept_in is not None for source in found.held)
        require_equal(plain, found)
    assert len(list(cache.glob("[!.]*"))) == 5
    require_equal_streams(recipe, plain, read)


def test_errors_are_the_same_with_kept_tokens(tmp_path, cache):
    path = jsonl(tmp_path / "a.jsonl", chat_rows(40))
    recipe = config([{"path": path}], data={"max_length": 60, "max_dropped_fraction": 0.01})
    messages = []
    for keep in (False, True, False):
        with pytest.raises(UserError) as caught:
            tokenised(recipe, keep=keep)
        messages.append(str(caught.value))
    assert "set data.max_length=" in messages[0]
    assert len(set(messages)) == 1


def test_data_with_problems_are_not_kept(tmp_path, cache):
    path = jsonl(tmp_path / "a.jsonl", [{"messages": CHAT}, *chat_rows(3)])
    recipe, strict = config([{"path": path}]), chats.tokenizer(None)
    messages = []
    for keep in (False, True):
        with pytest.raises(UserErrors) as caught:
            tokenised(recipe, keep=keep, tokenizer=strict)
        messages.append(caught.value.problems)
    assert messages[0] == messages[1]
    assert len(messages[0]) == 4
    assert not list(cache.glob("[!.]*"))


def test_data_that_change_meanwhile_are_not_kept(tmp_path, cache, monkeypatch):
    path = Path(jsonl(tmp_path / "a.jsonl", chat_rows(4)))
    build = samples.build

    def slow(*arguments: Any) -> HeldSource:
        made = build(*arguments)
        jsonl(path, chat_rows(5))
        return made

    monkeypatch.setattr(samples, "build", slow)
    assert len(tokenised(config([{"path": str(path)}]), keep=True)) == 4
    assert not list(cache.glob("[!.]*"))


@pytest.mark.parametrize("target", ["all", "last_word"])
@pytest.mark.parametrize("tokenizer", [TOKENIZER, chats.tokenizer(add_bos=True)])
def test_a_kept_corpus_is_exact(tmp_path, cache, target, tokenizer):
    texts = [{"text": " ".join(WORDS[: 3 + i % 12]) + f" {i}"} for i in range(30)]
    path = jsonl(tmp_path / "r.jsonl", texts)
    corpus = Corpus.model_validate(
        {"path": path, "target": target, "max_tokens": 500, "window_tokens": 20}
    )
    plain = data.retention_samples("r", corpus, tokenizer)
    assert not cache.exists()
    made = data.retention_samples("r", corpus, tokenizer, keep=True)
    (folder,) = cache.glob("retention.r-*")
    assert atomic_dir.verify(folder) is None
    read = data.retention_samples("r", corpus, tokenizer)
    for found in (made, read):
        assert [s.sample_id for s in found] == [s.sample_id for s in plain]
        for a, b in zip(found, plain, strict=True):
            np.testing.assert_array_equal(a.input_ids, b.input_ids)
            np.testing.assert_array_equal(a.label_mask, b.label_mask)
            assert a.kl_mask is None
    for change in ({"max_tokens": 400}, {"window_tokens": 21}):
        other = corpus.model_copy(update=change)
        data.retention_samples("r", other, tokenizer, keep=True)
    assert len(list(cache.glob("retention.r-*"))) == 3


def test_kept_tokens_are_mapped_and_cannot_be_written(tmp_path, cache):
    recipe = config([{"path": jsonl(tmp_path / "a.jsonl", chat_rows(9))}])
    flat = source_of(tokenised(recipe, keep=True)).flat
    mapped = Path("/proc/self/maps").read_text()
    for name in ("input_ids", "label_mask", "offsets"):
        assert f"{name}.npy" in mapped
        assert not getattr(flat, name).flags.writeable


# ---------------------------------------------------------------- what tokens depend on


def change_text(path: Path) -> None:
    path.write_text(path.read_text().replace("question 1 ", "question 9 "))


CHANGES: dict[str, dict[str, Any]] = {
    "max_length": {"data": {"max_length": 511}},
    "too_long": {"data": {"too_long": "truncate"}},
    "limit": {"source": {"limit": 5}},
    "format": {"source": {"format": "messages"}},
    "fields": {"source": {"fields": {"messages": "messages"}}},
    "content": {"file": change_text},
    "name of the file": {"rename": "other.jsonl"},
    "another tokenizer": {"tokenizer": lambda: chats.tokenizer(chats.CHATML, add_bos=True)},
    "an added token": {"tokenizer": lambda: with_token("wibble")},
    "the model's template": {"tokenizer": lambda: chats.tokenizer(chats.MARKED)},
    "the end of a sequence": {
        "tokenizer": lambda: chats.tokenizer(chats.CHATML, eos_token="<|im_end|>")
    },
    "vocabulary": {"vocab_size": 10_000},
    "template": {"template": chats.MARKED},
    "versions": {"patch": ("version_of", lambda name: "9.9")},
    "code": {"patch": ("_code", lambda: "other")},
}


def with_token(token: str) -> Any:
    tokenizer = chats.tokenizer(chats.CHATML)
    tokenizer.add_tokens([token])
    return tokenizer


def folder_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], name: str
) -> Path:
    folder = tmp_path / name
    folder.mkdir()
    path = Path(jsonl(folder / change.get("rename", "a.jsonl"), chat_rows(8)))
    if "file" in change:
        change["file"](path)
    options = {"max_length": 512} | change.get("data", {})
    if "template" in change:
        (folder / "t.jinja").write_text(change["template"])
        options["chat_template"] = str(folder / "t.jinja")
    recipe = config([{"path": str(path)} | change.get("source", {})], data=options)
    tokenizer = change.get("tokenizer", lambda: chats.tokenizer(chats.CHATML))()
    with monkeypatch.context() as patch:
        if "patch" in change:
            patch.setattr(token_cache, *change["patch"])
        found = load_samples(
            recipe.data.train, tokenizer, recipe.data, change.get("vocab_size", 5000), keep=True
        )
    kept_in = source_of(found).kept_in
    assert kept_in is not None
    return kept_in


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_what_changes_the_tokens_has_a_folder_of_its_own(tmp_path, monkeypatch, change):
    plain = folder_of(tmp_path, monkeypatch, {}, "one")
    assert folder_of(tmp_path, monkeypatch, change, "two") != plain


def test_what_does_not_change_them_has_the_same(tmp_path, monkeypatch):
    plain = folder_of(tmp_path, monkeypatch, {}, "one")
    same = {"data": {"packing": True, "max_dropped_fraction": 0.5}, "source": {"weight": 2.0}}
    assert folder_of(tmp_path, monkeypatch, same, "elsewhere") == plain
    padded = chats.tokenizer(chats.CHATML)
    padded(["a", "b c"], padding=True)  # leaves a trace in the tokenizer, not in its tokens
    assert folder_of(tmp_path, monkeypatch, {"tokenizer": lambda: padded}, "third") == plain


def test_a_hub_data_set_is_known_by_its_content(tmp_path, cache):
    import datasets

    folders = []
    for name, start in (("one", 0), ("two", 0), ("three", 1)):
        hub = tmp_path / name / "saved"
        datasets.Dataset.from_list(chat_rows(30, start)).save_to_disk(hub)
        folders.append(source_of(tokenised(config([{"hub": str(hub)}]), keep=True)).kept_in)
    assert folders[0] == folders[1] != folders[2]
    assert None not in folders


def test_a_data_set_out_of_the_cache_of_datasets_is_kept(tmp_path, cache):
    (tmp_path / "hub").mkdir()
    jsonl(tmp_path / "hub" / "train.jsonl", chat_rows(20))  # converted to Arrow files by datasets
    recipe = config([{"hub": str(tmp_path / "hub")}])
    plain, made, read = (tokenised(recipe, keep=keep) for keep in (False, True, False))
    assert source_of(made).kept_in == source_of(read).kept_in is not None
    require_equal(plain, read)
    cut = config([{"hub": str(tmp_path / "hub"), "split": "train[:5]"}])
    assert len(tokenised(cut, keep=True)) == 5


def test_a_tokenizer_with_code_of_its_own_is_not_trusted(tmp_path, cache):
    class Foreign(type(TOKENIZER)):
        pass

    foreign = chats.tokenizer(chats.CHATML)
    foreign.__class__ = Foreign
    recipe = config([{"path": jsonl(tmp_path / "a.jsonl", chat_rows(8))}])
    assert source_of(tokenised(recipe, keep=True, tokenizer=foreign)).kept_in is None
    assert token_cache._tokenizer(ChatEncoder(foreign)) is None


# ---------------------------------------------------------------- a cache that is not as it was


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "a flipped bit of tokens": lambda folder: flip(folder / "input_ids.npy"),
    "a flipped bit of masks": lambda folder: flip(folder / "label_mask.npy"),
    "other counts": lambda folder: flip(folder / "source.json"),
    "a cut file": lambda folder: os.truncate(folder / "names.npy", 100),
    "a missing file": lambda folder: (folder / "offsets.npy").unlink(),
    "a missing manifest": lambda folder: (folder / "manifest.json").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
@pytest.mark.parametrize("keep", [True, False], ids=["prepared", "in a run"])
def test_damage_is_found_and_mended(tmp_path, caplog, damage, keep):
    recipe = config([{"path": jsonl(tmp_path / "a.jsonl", chat_rows(20))}])
    plain = tokenised(recipe)
    folder = source_of(tokenised(recipe, keep=True)).kept_in
    assert folder is not None
    damage(folder)
    caplog.clear()
    found = tokenised(recipe, keep=keep)
    assert "making it again" in caplog.text
    require_equal(plain, found)
    assert source_of(found).kept_in == folder
    assert atomic_dir.verify(folder) is None


def test_nothing_pickled_is_read(tmp_path, caplog):
    recipe = config([{"path": jsonl(tmp_path / "a.jsonl", chat_rows(20))}])
    plain = tokenised(recipe)
    folder = source_of(tokenised(recipe, keep=True)).kept_in
    assert folder is not None

    class Canary:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "canary",))

    np.save(folder / "input_ids.npy", np.array([Canary()], dtype=object), allow_pickle=True)
    (folder / "manifest.json").unlink()
    atomic_dir.seal(folder)  # by somebody who knows how
    found = tokenised(recipe)
    assert not (tmp_path / "canary").exists()
    assert "are not kept" in caplog.text
    require_equal(plain, found)


def test_a_cache_that_cannot_be_written_costs_a_run_a_warning(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MOORED_CACHE", str(tmp_path / "file" / "below"))
    monkeypatch.setattr(token_cache, "KEEP_BYTES", 1)
    recipe = config([{"path": jsonl(tmp_path / "a.jsonl", chat_rows(20))}])
    found = tokenised(recipe)
    assert "the tokens of a.jsonl are not kept" in caplog.text
    assert len(found) == 20
    with pytest.raises(UserError, match="cannot be written"):
        tokenised(recipe, keep=True)


def test_a_run_keeps_the_tokens_of_large_data(tmp_path, monkeypatch, cache):
    path = Path(jsonl(tmp_path / "a.jsonl", chat_rows(20)))
    recipe = config([{"path": str(path)}])
    monkeypatch.setattr(token_cache, "KEEP_BYTES", path.stat().st_size + 1)
    assert source_of(tokenised(recipe)).kept_in is None
    monkeypatch.setattr(token_cache, "KEEP_BYTES", path.stat().st_size)
    assert source_of(tokenised(recipe)).kept_in is not None


LOAD = """
import logging, sys
sys.path.insert(0, sys.argv[2])
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
from datakit import TOKENIZER, config
from moored.data import load_samples
recipe = config([{"path": sys.argv[1]}])
print("ready", flush=True)
sys.stdin.readline()
found = load_samples(recipe.data.train, TOKENIZER, recipe.data, len(TOKENIZER), keep=True)
print("fingerprint", found.fingerprint(), found.sources[0].kept_in)
"""


def test_of_two_processes_one_makes_the_tokens(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", chat_rows(1500))
    arguments = [sys.executable, "-c", LOAD, path, str(Path(__file__).parents[2])]
    both = [
        subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for process in both:
        assert process.stdout is not None
        while process.stdout.readline() != "ready\n":
            assert process.poll() is None
    said = [process.communicate("\n", timeout=600)[0] for process in both]
    assert sorted(text.count("tokenising a.jsonl, once") for text in said) == [0, 1]
    last = {text.splitlines()[-1] for text in said}
    assert len(last) == 1
    plain = tokenised(config([{"path": path}]))
    assert plain.fingerprint() in last.pop()


# ---------------------------------------------------------------- pruning


def test_prune_removes_hidden_states_of_bases_that_nothing_opens(cache, capsys):
    for name, when in (("old", 0), ("new", time.time())):
        folder = references_folder() / name
        folder.mkdir(parents=True)
        (folder / "a.safetensors").write_bytes(bytes(2000))
        (folder / "facts.json").write_text("{}")
        os.utime(folder / "facts.json", (when, when))
    prepare_command.prune(7)
    assert f"removed {references_folder() / 'old'} (2.0 kB)" in capsys.readouterr().out
    assert [path.name for path in references_folder().iterdir()] == ["new"]


def test_prune_removes_what_is_old_and_not_in_the_making(tmp_path, cache, capsys):
    prepare_command.prune(0)
    assert "freed 0 bytes" in capsys.readouterr().out
    folders = []
    for name in ("old", "new", "busy"):
        path = jsonl(tmp_path / f"{name}.jsonl", chat_rows(3))
        folders.append(source_of(tokenised(config([{"path": path}]), keep=True)).kept_in)
    old, new, busy = folders
    for folder in (old, busy):
        os.utime(folder / "manifest.json", (0, 0))
    dead = cache / f".{old.name}.abcd1234.tmp"
    dead.mkdir()
    os.utime(dead, (0, 0))
    with filelock.FileLock(cache / f".{busy.name}.lock"):
        prepare_command.prune(7)
    assert f"removed {old} " in capsys.readouterr().out
    assert sorted(p.name for p in cache.glob("[!.]*")) == sorted([new.name, busy.name])
    assert not dead.exists()
    tokenised(config([{"path": str(tmp_path / "busy.jsonl")}]))  # reading is using
    prepare_command.prune(7)
    assert busy.exists()
    prepare_command.prune(0)
    assert list(cache.iterdir()) == []


# ---------------------------------------------------------------- a model's files


def shards(folder: Path) -> Path:
    folder.mkdir(parents=True)
    tensors = {f"w{i}": np.full(64, i, dtype=np.float32) for i in range(4)}
    files = {name: f"model-{i // 2}.safetensors" for i, name in enumerate(tensors)}
    for file in set(files.values()):
        save_file({n: tensors[n] for n in files if files[n] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return folder


def in_hub_cache(folder: Path) -> Path:
    """The same as the hub's client lays it out: links to blobs that are named by their hash."""
    snapshot = folder / "snapshots" / ("0" * 40)
    made = shards(folder / "made")
    snapshot.mkdir(parents=True)
    (folder / "blobs").mkdir()
    for path in made.iterdir():
        content = path.read_bytes()
        name = hashlib.sha256(content).hexdigest()
        if path.suffix == ".json":
            name = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
        path.rename(folder / "blobs" / name)
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", name))
    return snapshot


def test_a_whole_model_is_verified(tmp_path):
    found = prepare_command.verify_weights(shards(tmp_path / "plain"))
    assert found == prepare_command.Verified(num_files=2, num_hashed=0)
    found = prepare_command.verify_weights(in_hub_cache(tmp_path / "hub"))
    assert found == prepare_command.Verified(num_files=2, num_hashed=2)


def test_broken_weights_are_named(tmp_path):
    folder = shards(tmp_path / "plain")
    os.truncate(folder / "model-0.safetensors", 300)
    save_file({"w2": np.zeros(4, dtype=np.float32)}, folder / "model-1.safetensors")
    with pytest.raises(UserErrors) as caught:
        prepare_command.verify_weights(folder)
    first, second = caught.value.problems
    assert "model-0.safetensors: is broken" in first
    assert "model-1.safetensors: lacks 1 tensors" in second
    assert "(first: w3)" in second


@pytest.mark.parametrize("name", ["model-1.safetensors", "model.safetensors.index.json"])
def test_a_flipped_bit_in_the_hubs_cache_is_found(tmp_path, name):
    folder = in_hub_cache(tmp_path / "hub")
    content = (folder / name).read_bytes()
    (folder / name).resolve().write_bytes(
        content[:-3] + bytes([content[-3] ^ 1]) + content[-2:]
        if name.endswith("tensors")
        else content + b" "
    )
    with pytest.raises(
        UserError, match=f"{name}: has other content than the hub's: remove .*blobs"
    ):
        prepare_command.verify_weights(folder)


# ---------------------------------------------------------------- the command


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write_recipe(tmp_path, tiny_recipe(tmp_path / "made"))


def test_prepare_keeps_everything_and_proves_it(recipe, tmp_path, cache, capsys):
    one = load_config(recipe)
    prepare_command.run(one)
    out = capsys.readouterr().out
    train = tmp_path / "made" / "train.jsonl"
    digest = hashlib.sha256(train.read_bytes()).hexdigest()[:16]
    assert (
        f"{train}  {prepare_command.readable(train.stat().st_size)}  sha256:{digest}  24 samples"
        in out
    )
    for item in ("model  ", "data.train.0", "data.eval.0", "retention.fox"):
        assert f"\n{item}" in out
    assert out.count(", kept") == 2
    assert "1 weight files verified" in out
    assert "a process without a network found all of it" in out
    names = sorted(path.name.rsplit("-", 1)[0] for path in cache.glob("[!.]*"))
    assert names == ["eval.jsonl", "retention.fox", "train.jsonl"]

    # The data vanish: the check says so, and what was kept does not hide it.
    train.unlink()
    with pytest.raises(UserErrors, match=r"without a network: data\.train\.0\.path=.*no such file"):
        prepare_command.run(one, only_check=True)


def test_what_only_a_network_has_fails_the_check(recipe, tmp_path):
    one = load_config(recipe)
    absent = one.model.model_copy(update={"name_or_path": "nobody/no-such-model"})
    with pytest.raises(UserError, match=r"without a network: .*no-such-model: the hub cannot be"):
        prepare_command.run(one.model_copy(update={"model": absent}), only_check=True)


def test_the_check_refuses_every_connection():
    program = (
        "import socket, sys; from moored.prepare import offline; "
        "sys.addaudithook(offline._refuse_network)\n"
        "for ask in (lambda: socket.create_connection(('127.0.0.1', 9)),\n"
        "            lambda: socket.socket().connect(('127.0.0.1', 9)),\n"
        "            lambda: socket.gethostbyname('localhost')):\n"
        "    try: ask()\n"
        "    except OSError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=600
    )
    assert done.stdout.splitlines() == ["there is no network in this check"] * 3


def test_several_processes_are_refused(recipe, monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "x"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", "1")
    with pytest.raises(UserError, match="2 processes were started, but prepare works alone"):
        prepare_command.run(load_config(recipe))


def test_a_source_that_is_streamed_from_the_hub_is_refused(recipe):
    overrides = ["data.train.0.path=null", "data.train.0.hub=some/data"]
    one = load_config(recipe, [*overrides, "data.train.0.streaming=true"])
    with pytest.raises(
        UserErrors, match=r"data\.train\.0\.streaming: reads some/data from the hub"
    ):
        prepare_command.run(one)


def test_broken_weights_stop_it_before_anything_is_tokenised(recipe, tmp_path, cache):
    os.truncate(tmp_path / "made" / "model" / "model.safetensors", 5000)
    with pytest.raises(UserErrors, match=r"model\.safetensors: is broken"):
        prepare_command.run(load_config(recipe))
    assert not cache.exists()


def test_a_local_copy_of_streamed_data_passes(recipe, tmp_path, capsys):
    one = load_config(recipe, ["data.train.0.streaming=true"])
    prepare_command._require_local(one)
