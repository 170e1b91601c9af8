"""Logging: who says what to whom, and that no secret passes any handler."""

from __future__ import annotations

import logging
import os
import socket
import stat
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moored.utils.log import redact, setup

CANARY = "C4NARYc4nary0123456789abcdefghij"


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    ours = logging.getLogger("moored").level
    yield
    logging.captureWarnings(False)
    for handler in set(root.handlers) - set(handlers):
        root.removeHandler(handler)
        handler.close()
    root.setLevel(level)
    logging.getLogger("moored").setLevel(ours)


@pytest.mark.parametrize(
    "text",
    [
        f"https://me:{CANARY}@host/path",
        f"https://{CANARY}@host",
        f"postgresql://me:pa/{CANARY}@db:5432/mlflow",
        f"postgresql://me:p@{CANARY}@db/mlflow",
        f"mysql+pymysql://u:{CANARY}@db",
        f"hf_{CANARY}",
        f"ghp_{CANARY}",
        f"github_pat_{CANARY}",
        f"sk-{CANARY}",
        f"Authorization: Bearer {CANARY}",
        f"authorization: basic {CANARY}==",
        f"MLFLOW_TRACKING_PASSWORD={CANARY}",
        f"MLFLOW_TRACKING_TOKEN={CANARY}",
        f"export HF_TOKEN='{CANARY}'",
        f'{{"password": "{CANARY} with spaces"}}',
        f'{{"token": "{CANARY}"}}',
        f"{{'hf_token': '{CANARY}'}}",
        f"--api-key {CANARY}",
        f"https://host/x?token={CANARY}&y=1",
        f"aws_secret_access_key = {CANARY}",
    ],
)
def test_secrets_are_removed(text):
    assert CANARY not in redact(text)
    assert "***" in redact(text)
    # Inside of other text too, more than once, and without taking the rest away.
    found = redact(f"before {text} after\n{text}")
    assert CANARY not in found
    assert found.startswith("before ")


@pytest.mark.parametrize(
    "name",
    ["HF_TOKEN", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "MY_API_KEY", "SLURM_JWT"],
)
def test_values_of_secret_variables_are_removed_wherever_they_stand(monkeypatch, name):
    monkeypatch.setenv(name, "pa ss/Wörd-1")
    text = redact("x pa ss/Wörd-1 y pa%20ss%2FW%C3%B6rd-1 z")
    assert text == "x *** y *** z"


def test_a_secret_that_holds_another_leaves_nothing(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "abcdefgh")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "abcdefghijkl")
    assert redact("<abcdefghijkl> <abcdefgh>") == "<***> <***>"


@pytest.mark.parametrize(
    "text",
    [
        "num_memory_tokens=32",
        "global_batch_tokens: 4096, max_new_tokens: 128",
        "eos_token=<|im_end|> pad_token: <pad> bos_token='<s>'",
        "train/ce_nats_per_token 1.23, nats per token: 1.23, tokens: 77",
        "token 17 of 20; last token: 9",
        "https://localhost:5000/#/experiments/1 and http://127.0.0.1:5000",
        "sqlite:////home/me/runs/mlflow.db",
        "git+https://github.com/a/b@v1.2",
        "write to someone@example.org",
        "data.train.0.path: /home/me@host/a.jsonl:12: the field 'text' is missing",
        "the password is wrong; set a secret",
        "sketch-of-a-long-name-with-many-dashes",
        "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD are not set",
    ],
)
def test_what_is_no_secret_survives(text, monkeypatch):
    for name in list(os.environ):
        if "TOKEN" in name or "KEY" in name:
            monkeypatch.delenv(name)
    assert redact(text) == text


@given(st.text())
@settings(deadline=None)
def test_redaction_is_stable(text):
    once = redact(text)
    assert redact(once) == once


def test_redaction_of_long_text_is_not_quadratic():
    """Each of these made a careless pattern backtrack for minutes; the limit is pytest's."""
    for text in ("a-" * 50_000, "a" * 200_000, "password " * 20_000, "://a" * 30_000):
        redact(text)


def test_rank_0_informs_and_other_ranks_warn(capsys, tmp_path):
    log = logging.getLogger("moored.training.train")
    setup(0, tmp_path)
    log.debug("detail")
    log.info("step")
    log.warning("careful")
    err = capsys.readouterr().err
    assert "INFO step" in err
    assert f"WARNING [rank 0 on {socket.gethostname()}] careful" in err
    assert "detail" not in err
    setup(3, tmp_path)
    log.info("step")
    log.warning("careful")
    err = capsys.readouterr().err
    assert "step" not in err
    assert f"WARNING [rank 3 on {socket.gethostname()}] careful" in err
    assert err.count("\n") == 1


def test_the_file_of_a_rank_gets_everything(capsys, tmp_path):
    setup(2, tmp_path)
    logging.getLogger("moored.training.train").debug("detail")
    logging.getLogger("httpx").info("a request")
    logging.getLogger("torch.distributed.c10d").warning("a socket")
    warnings.warn("a python warning", stacklevel=1)
    assert capsys.readouterr().err == ""
    text = (tmp_path / "logs" / "rank-2.log").read_text()
    for words in (
        "DEBUG moored.training.train: detail",
        "a request",
        "a socket",
        "a python warning",
    ):
        assert words in text


def test_errors_of_noisy_libraries_reach_the_console(capsys, tmp_path):
    setup(0, tmp_path)
    logging.getLogger("transformers.modeling").error("cannot load")
    assert "cannot load" in capsys.readouterr().err


def test_files_are_private(tmp_path):
    setup(0, tmp_path)
    folder = tmp_path / "logs"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "rank-0.log").stat().st_mode) == 0o600


def test_a_link_out_of_the_run_directory_is_not_written_through(tmp_path, capsys):
    (tmp_path / "logs").mkdir()
    outside = tmp_path / "outside"
    (tmp_path / "logs" / "rank-0.log").symlink_to(outside)
    setup(0, tmp_path)
    logging.getLogger("moored").warning("hello")
    assert not outside.exists()
    assert "no log file in" in capsys.readouterr().err


def test_setting_up_again_does_not_double_the_lines(capsys, tmp_path):
    for _ in range(3):
        setup(0, tmp_path)
    logging.getLogger("moored").info("once")
    assert capsys.readouterr().err.count("once") == 1
    assert (tmp_path / "logs" / "rank-0.log").read_text().count("once") == 1


def test_no_handler_lets_a_secret_pass(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", CANARY)
    setup(0, tmp_path)
    log = logging.getLogger("moored.training.train")
    log.info("token %s", CANARY)
    log.info({"HF_TOKEN": CANARY})
    try:
        raise RuntimeError(f"401 for https://me:{CANARY}@host")
    except RuntimeError:
        log.exception("failed")
    log.warning("stack %s", CANARY, stack_info=True)
    logging.getLogger("mlflow").error("password=%s", CANARY)
    err = capsys.readouterr().err
    text = (tmp_path / "logs" / "rank-0.log").read_text()
    for output in (err, text):
        assert "RuntimeError: 401 for https://***@host" in output
        assert CANARY not in output


def test_a_terminal_gets_the_same_redaction(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(type(sys.stderr), "isatty", lambda _self: True, raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", CANARY)
    setup(0, tmp_path)
    assert any("Rich" in type(handler).__name__ for handler in logging.getLogger().handlers)
    logging.getLogger("moored").info("with [brackets] and %s", CANARY)
    err = capsys.readouterr().err
    assert "with [brackets] and ***" in err
    assert CANARY not in err


def test_a_library_cannot_go_past_the_handlers(capsys, tmp_path, monkeypatch):
    """What DeepSpeed does when it is imported: a handler to stdout, and no propagation."""
    monkeypatch.setenv("HF_TOKEN", CANARY)
    setup(0, tmp_path)
    library = logging.getLogger("DeepSpeed")
    library.setLevel(logging.WARNING)
    library.propagate = False
    library.addHandler(logging.StreamHandler(sys.stdout))
    library.warning("loading with %s", CANARY)
    out, err = capsys.readouterr()
    assert (out, err) == ("", "")
    assert "WARNING DeepSpeed: loading with ***" in (tmp_path / "logs" / "rank-0.log").read_text()


def test_a_full_disk_is_said_once_and_stops_nothing(capsys, tmp_path):
    if not Path("/dev/full").exists():
        pytest.fail("this test needs /dev/full (Linux)")
    setup(0, tmp_path)
    (handler,) = [
        handler
        for handler in logging.getLogger().handlers
        if isinstance(handler, logging.FileHandler) and str(tmp_path) in handler.baseFilename
    ]
    handler.close()
    handler.stream = open("/dev/full", "w")  # noqa: SIM115
    for _ in range(3):
        logging.getLogger("moored").debug("x")
    err = capsys.readouterr().err
    assert err.count("cannot be written") == 1
    assert "No space left" in err
    # The text that could not be written stays in the buffer and would fail again at the end.
    handler.stream = open(os.devnull, "w")  # noqa: SIM115
