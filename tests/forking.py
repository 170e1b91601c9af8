"""Processes that are forked from one that has imported everything, since imports cost 6 s of CPU.

`moored(...)` is a command as people start it in all but that, `stock(...)` a process that knows
nothing of Moored. Where a test is about the start of Python or of a launcher, it starts those. The
ranks of `distributed.runner` are forked from here, too.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import multiprocessing as mp
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing import forkserver
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

import torch

# A module that cannot be imported is passed by. The last ones are imported late.
PRELOADED = [
    "pytest",
    "moored.cli",
    "moored.training.compare",
    "moored.training.doctor",
    "moored.evaluation.evaluate_command",
    "moored.evaluation.report.page",
    "moored.export",
    "transformers.models.llama.modeling_llama",
]
STOCK = ["bitsandbytes", "peft", "safetensors.torch", "transformers.models.llama.modeling_llama"]
SECONDS = 600.0  # after which a test gives up what has not ended


_OF_MOORED, _OF_STOCK = forkserver.ForkServer(), forkserver.ForkServer()
_OF_MOORED.set_forkserver_preload(PRELOADED)
_OF_STOCK.set_forkserver_preload(STOCK)


@contextlib.contextmanager
def forked_from(server: forkserver.ForkServer = _OF_MOORED) -> Iterator[Any]:
    """What makes processes, each as a child of one that has imported what they need."""
    given = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))  # it is told no other way
    try:
        server.ensure_running()
    finally:
        if given is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = given
    with mock.patch.object(forkserver, "connect_to_new_process", server.connect_to_new_process):
        yield mp.get_context("forkserver")


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


class Forked:
    """A process with an environment and streams of its own, as `subprocess.Popen`.

    Stdout and stderr are files, so that they may be read at any time.

    Attributes:
        pid: of the process.
    """

    def __init__(
        self,
        main: Callable[..., Any],
        *arguments: Any,
        cwd: Path | None = None,
        environment: Mapping[str, str] | None = None,
        server: forkserver.ForkServer = _OF_MOORED,
    ):
        """Calls main(*arguments), which is as good as a script: it may end by sys.exit.

        Args:
            cwd: where it runs; None: here.
            environment: all of it; None: this process's.
            server: the process that it is forked from.
        """
        self._folder = tempfile.TemporaryDirectory(prefix="forked-")
        self._out = Path(self._folder.name) / "out"
        self._err = Path(self._folder.name) / "err"
        self._out.touch()
        self._err.touch()
        given = dict(os.environ if environment is None else environment)
        place = (given, list(sys.path), str(cwd or Path.cwd()))
        with forked_from(server) as context:
            self._process = context.Process(
                target=_run,
                args=(main, arguments, place, str(self._out), str(self._err)),
                daemon=True,  # what a failing test leaves ends with pytest
            )
            self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    def __enter__(self) -> Forked:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def returncode(self) -> int | None:
        """As of Popen: negative of a signal's number; None while it runs."""
        return self._process.exitcode

    @property
    def stdout(self) -> str:
        """What it has said so far."""
        return self._out.read_text(errors="replace")

    @property
    def stderr(self) -> str:
        """What it has said so far."""
        return self._err.read_text(errors="replace")

    def says(self, word: str) -> str:
        """All that it has said once it has said a word."""
        while word not in (said := self.stdout + self.stderr):
            assert self.poll() is None, said
            time.sleep(0.005)
        return said

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, seconds: float = SECONDS) -> int:
        """Its code, once it has ended.

        Raises:
            TimeoutExpired: it did not in time; it is killed.
        """
        self._process.join(seconds)
        if (code := self.returncode) is None:
            said = self.stdout[-1500:] + self.stderr[-3000:]
            self.kill()
            raise subprocess.TimeoutExpired(said, seconds)
        return code

    def communicate(self, seconds: float = SECONDS) -> tuple[str, str]:
        """Stdout and stderr, once it has ended."""
        self.wait(seconds)
        return self.stdout, self.stderr

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        """End it, if it runs."""
        self._process.kill()
        self._process.join()


def moored(*arguments: str, cwd: Path | None = None, **variables: str) -> Forked:
    """`moored ARGUMENTS`, with some environment variables beside ours."""
    return Forked(_command, arguments, cwd=cwd, environment=os.environ | variables)


def moored_ranks(count: int, *arguments: str, **variables: str) -> list[Forked]:
    """`moored ARGUMENTS` as a launcher of several processes on this machine starts it."""
    variables |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [moored(*arguments, RANK=f"{i}", LOCAL_RANK=f"{i}", **variables) for i in range(count)]


def stock(
    command: Sequence[str], *_: str, given: str = "", env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """The script that ends a command, with a stdin; as `moored.utils.progress.watch` runs it."""
    script = Forked(_script, command[-1], given, environment=env, server=_OF_STOCK)
    out, err = script.communicate()
    return subprocess.CompletedProcess(command, script.wait(), out, err)


def finished(*processes: Forked) -> tuple[str, str]:
    """Stdout and stderr of all of them, which must end well; none is left."""
    try:
        said = [process.communicate() for process in processes]
        codes = [process.returncode for process in processes]
        assert not any(codes), f"{codes}: {[out[-1000:] + err[-3000:] for out, err in said]}"
        return "".join(out for out, _ in said), "".join(err for _, err in said)
    finally:
        for process in processes:
            process.kill()


def _command(arguments: tuple[str, ...]) -> NoReturn:
    from moored.cli import main

    sys.argv = ["moored", *arguments]
    main()


def _script(path: str, given: str) -> None:
    assert "moored" not in sys.modules
    sys.stdin = io.StringIO(given)
    runpy.run_path(path, run_name="__main__")


def _run(main: Callable[..., Any], arguments: Any, place: Any, out: str, err: str) -> NoReturn:
    """As the interpreter runs a script: streams first, then main, then what was registered."""
    environment, sys.path[:], cwd = place
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    for number, path, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, out, os.O_WRONLY | os.O_APPEND),
        (2, err, os.O_WRONLY | os.O_APPEND),
    ):
        opened = os.open(path, flags | os.O_NOCTTY)
        os.dup2(opened, number)
        os.close(opened)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # pytest may have been told to ignore it
    torch.set_num_threads(1)
    code: Any = 0
    try:
        main(*arguments)
    except SystemExit as exit:
        code = exit.code
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue]
    atexit._run_exitfuncs()
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))
