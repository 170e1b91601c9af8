"""Logging of a process: the console, its file in the run directory, and the removal of secrets.

Metrics and events are not logged here: they go to the journal (`tracking/`).
"""

from __future__ import annotations

import functools
import logging
import os
import re
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TextIO, cast
from urllib.parse import quote

if TYPE_CHECKING:
    from rich.console import Console

HIDDEN = "***"
# Their warnings go to the file; the console gets their errors only.
NOISY = (
    "DeepSpeed",
    "absl",
    "accelerate",
    "alembic",
    "asyncio",
    "bitsandbytes",
    "datasets",
    "deepspeed",
    "filelock",
    "fsspec",
    "httpcore",
    "httpx",
    "huggingface_hub",
    "matplotlib",
    "mlflow",
    "peft",
    "py.warnings",
    "torch",
    "transformers",
    "urllib3",
)

_SECRET_VARIABLE = re.compile(
    r"(?:^|_)(?:TOKEN|PASSWORD|PASSWD|SECRET|API_?KEY|ACCESS_KEY|SECRET_KEY|JWT)$", re.I
)
_KNOWN_VARIABLES = (
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
)
# A token is a secret only where its name says so: `eos_token`, `num_memory_tokens` and "nats per
# token: 1.2" are none.
_WORDS = (
    r"(?:password|passwd|secret|api[_-]?key|access[_-]?key|secret[_-]?key"
    r"|(?:hf|hub|auth|access|api|bearer|tracking|refresh|session|github|gitlab)[_-]?token)"
)
_VALUE = r"(?:\"[^\"]*\"|'[^']*'|[^\s,;&\"']+)"
_URI = r"(\b[a-z][a-z0-9+.-]{0,30}://)"
_PATTERNS: tuple[tuple[re.Pattern[str], str], ...] = (
    # user:password@ and token@ of any URI; a password may hold a bare '/', a port may not. The
    # lengths are bounded so that a long line without '@' is not searched again from every '://'.
    (
        re.compile(rf"{_URI}[^\s/@:'\"]{{1,256}}:(?!\d+(?:/|\s|$))[^\s@'\"]{{0,2048}}@", re.I),
        r"\1***@",
    ),
    (re.compile(rf"{_URI}[^\s/'\"]{{1,2048}}@", re.I), r"\1***@"),
    (re.compile(r"\b(Bearer|Basic)\s+[A-Za-z0-9._~+/=-]{8,}", re.I), r"\1 ***"),
    (re.compile(r"\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*"), HIDDEN),
    (re.compile(r"\bhf_[A-Za-z0-9]{16,}"), HIDDEN),
    (re.compile(r"\b(?:gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{16,})"), HIDDEN),
    (re.compile(r"\b(?:sk|rk)-[A-Za-z0-9_-]{20,}"), HIDDEN),
    (re.compile(r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"), HIDDEN),
    (re.compile(r"\bdapi[0-9a-f]{32}\b"), HIDDEN),
    (re.compile(r"\bxox[abprs]-[A-Za-z0-9-]{10,}"), HIDDEN),
    (re.compile(rf"({_WORDS}[\"']?\s*[=:]\s*){_VALUE}", re.I), r"\1***"),
    (re.compile(rf"(--{_WORDS}\s+)(?!-){_VALUE}", re.I), r"\1***"),
    (re.compile(r"((?<![\w-])token=)[^\s,;&\"']{8,}", re.I), r"\1***"),
    (re.compile(r"([\"']token[\"']\s*:\s*)(?:\"[^\"]+\"|'[^']+')", re.I), r"\1***"),
)


def _secret_values() -> Iterator[str]:
    for name, value in os.environ.items():
        # A short value is as likely a word of the text as a secret.
        shortest = 4 if name in _KNOWN_VARIABLES else 8
        if len(value) >= shortest and _SECRET_VARIABLE.search(name):
            yield value
            yield quote(value, safe="")


def redact(text: str) -> str:
    """Replaces secrets by `***`: values of secret environment variables, URI user-info, tokens."""
    for value in sorted(set(_secret_values()), key=len, reverse=True):
        text = text.replace(value, HIDDEN)
    for pattern, replacement in _PATTERNS:
        text = pattern.sub(replacement, text)
    return text


class _Formatter(logging.Formatter):
    """Redacts the finished text, so that arguments and tracebacks are covered too."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


class _ConsoleFilter(logging.Filter):
    def __init__(self, rank: int):
        super().__init__()
        self._ours = logging.INFO if rank == 0 else logging.WARNING

    def filter(self, record: logging.LogRecord) -> bool:
        if getattr(record, "printed", False):
            return False  # `cli/` prints it by itself: it is for the file
        room = record.name.partition(".")[0]
        if record.name in NOISY or room in NOISY:
            return record.levelno >= logging.ERROR
        return record.levelno >= (self._ours if room == "moored" else logging.WARNING)


class _StderrHandler(logging.StreamHandler[TextIO]):
    """Writes to what `sys.stderr` is at the time: a live progress bar puts itself in its place."""

    def __init__(self):
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # pyright: ignore[reportIncompatibleVariableOverride]
        return sys.stderr


class _FileHandler(logging.FileHandler):
    """A log file of mode 600 that never ends a run: a full disk is reported once, then ignored."""

    _reported = False

    def _open(self) -> TextIO:  # pyright: ignore[reportIncompatibleMethodOverride]
        def opener(path: str, flags: int) -> int:
            return os.open(path, flags | os.O_NOFOLLOW, 0o600)

        file = open(self.baseFilename, "a", encoding="utf-8", errors="replace", opener=opener)  # noqa: SIM115
        return cast("TextIO", file)

    def handleError(self, record: logging.LogRecord) -> None:
        if not self._reported:
            self._reported = True
            reason = sys.exc_info()[1]
            print(f"warning: {self.baseFilename} cannot be written: {reason}", file=sys.stderr)


class _LibraryLogger(logging.Logger):
    """A library's logger whose records reach our handlers, whatever it configures on import.

    DeepSpeed, transformers and MLflow add handlers of their own and stop the propagation: their
    lines would pass by the redaction and the file.
    """

    @property
    def propagate(self) -> bool:
        return True

    @propagate.setter
    def propagate(self, value: bool) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        pass

    def addHandler(self, hdlr: logging.Handler) -> None:
        pass


def setup(rank: int = 0, run_dir: Path | None = None) -> None:
    """Sends this process's log records to the console and to `run_dir/logs/rank-N.log`.

    The console (stderr) gets INFO of Moored on rank 0, and warnings of every rank with host and
    rank; the file gets INFO of everything and DEBUG of Moored. Called again, it starts anew: once
    before the run directory is known, once after.
    """
    # c10d's warnings are printed by C++ and would pass by the handlers; read when torch loads.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    root = logging.getLogger()
    for handler in list(root.handlers):
        if getattr(handler, "of_moored", False):
            root.removeHandler(handler)
            handler.close()
    _adopt_libraries()
    logging.captureWarnings(True)
    root.setLevel(logging.INFO)
    logging.getLogger("moored").setLevel(logging.DEBUG)
    handlers: list[logging.Handler] = [_console_handler(rank)]
    handlers[0].addFilter(_ConsoleFilter(rank))
    failure: OSError | None = None
    if run_dir is not None:
        try:
            handlers.append(_file_handler(rank, run_dir))
        except OSError as error:
            failure = error
    for handler in handlers:
        handler.of_moored = True  # type: ignore[attr-defined]
        root.addHandler(handler)
    if failure is not None:
        logging.getLogger(__name__).warning("no log file in %s: %s", run_dir, failure)


@functools.cache
def terminal() -> Console:
    """The console on stderr that log and progress bars share, so that lines stand above the bars.

    Imported here: the commands that say nothing on a terminal need not wait for it.
    """
    from rich.console import Console

    return Console(stderr=True)


def _console_handler(rank: int) -> logging.Handler:
    if rank == 0 and sys.stderr.isatty():
        from rich.highlighter import NullHighlighter
        from rich.logging import RichHandler

        handler: logging.Handler = RichHandler(
            console=terminal(),
            show_path=False,
            omit_repeated_times=False,
            highlighter=NullHighlighter(),
            log_time_format="%H:%M:%S",
        )
        handler.setFormatter(_Formatter("%(message)s"))
        return handler
    handler = _StderrHandler()
    handler.setFormatter(_PlainFormatter(rank))
    return handler


class _PlainFormatter(_Formatter):
    """Lines for a log of many processes: from warnings on with host and rank."""

    def __init__(self, rank: int):
        super().__init__("%(asctime)s %(levelname)s %(who)s%(message)s", datefmt="%H:%M:%S")
        self._who = f"[rank {rank} on {socket.gethostname()}] "

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.who = self._who if record.levelno >= logging.WARNING else ""
        return super().formatMessage(record)


def _file_handler(rank: int, run_dir: Path) -> logging.Handler:
    folder = run_dir / "logs"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    handler = _FileHandler(folder / f"rank-{rank}.log")
    handler.setFormatter(_Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    return handler


def _adopt_libraries() -> None:
    kept = {"torch"} if os.environ.get("TORCH_LOGS") else set[str]()  # asked for by name
    loaded = [name for name in logging.root.manager.loggerDict if name.partition(".")[0] in NOISY]
    for name in sorted({*NOISY, *loaded}):
        logger = logging.getLogger(name)
        # A library's own subclass keeps what it added.
        if type(logger) is logging.Logger and name.partition(".")[0] not in kept:
            logger.handlers.clear()
            logger.__dict__.pop("propagate", None)
            logger.__class__ = _LibraryLogger
