"""A process on a terminal of its own, and what it left on the screen."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios


def on_a_terminal(*command: str, term: str = "xterm", **more: str) -> tuple[bytes, str]:
    """Stdout, which is a pipe, and all that went to the terminal on stderr."""
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    environment = {**os.environ, "TERM": term, **more}
    for name in ("COLUMNS", "LINES"):  # of the terminal that the tests run in
        environment.pop(name, None)
    with subprocess.Popen(
        [sys.executable, *command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=child,
        env=environment,
    ) as process:
        os.close(child)
        seen = b""
        with contextlib.suppress(OSError):  # Linux says so at the end
            while part := os.read(parent, 65536):
                seen += part
        os.close(parent)
        assert process.stdout is not None
        out = process.stdout.read()
    assert process.returncode == 0, seen.decode()
    return out, seen.decode()


def left_on(seen: str) -> list[str]:
    """The lines of a screen after all that was written to it."""
    screen: list[list[str]] = [[]]
    row = column = 0
    for match in re.finditer(r"\x1b\[([?0-9;]*)([A-Za-z])|(.)", seen, re.S):
        number, kind, letter = match.groups()
        if kind == "A":
            row = max(0, row - int(number or 1))
        elif kind == "K":
            screen[row] = [] if number == "2" else screen[row][:column]
        elif letter == "\r":
            column = 0
        elif letter == "\n":
            row += 1
        elif letter:
            line = screen[row]
            line.extend(" " * (column + 1 - len(line)))
            line[column] = letter
            column += 1
        screen.extend([] for _ in range(row + 1 - len(screen)))
    return [text for text in ("".join(line).rstrip() for line in screen) if text]
