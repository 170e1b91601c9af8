"""What the processes of one start of a run know and nobody else does: the key by which they meet.

`launch/` and the scripts of jobs make it anew for every start and hand it on in the environment,
which other users cannot read; where nobody did, rank 0 makes it, and leaves it to the others in a
file of mode 600. It stands in no command line, log, journal or script. What is proved with it is
`rendezvous.py`'s.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import os
import secrets
import stat
import time
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

from moored.utils.environment import SECRET_FILE_VARIABLE, SECRET_VARIABLE, cache_folder
from moored.utils.errors import UserError

SHORTEST = 32  # characters: it could be guessed from what a rank proves with it
MOST_BYTES = 4096
FORGOTTEN_SECONDS = 1e6  # no start waits longer (`parallel.rendezvous_seconds`)
_ADVICE = f"export {SECRET_VARIABLE}=$(openssl rand -hex 32) before the processes start"


@dataclass(frozen=True, slots=True)
class Key:
    """The secret of a start, and the start's name."""

    secret: str
    rendezvous: str

    def __repr__(self) -> str:
        return f"Key(of {self.rendezvous!r})"  # whatever prints it

    def proof(self, who: str, *facts: object) -> str:
        """What only a holder of the secret can say of these facts in the name of `who`."""
        text = json.dumps([self.rendezvous, who, *map(str, facts)])  # no two lists are one text
        return hmac.new(self.secret.encode(), text.encode(), hashlib.sha256).hexdigest()

    def proves(self, proof: object, who: str, *facts: object) -> bool:
        """Whether `proof` is that of `who`."""
        mine = self.proof(who, *facts)
        return isinstance(proof, str) and hmac.compare_digest(mine.encode(), proof.encode())


def given() -> str | None:
    """The secret that the environment names; None if it names none.

    Raises:
        UserError: it can be guessed, or its file can be read or written by others.
    """
    name, value = SECRET_VARIABLE, os.environ.get(SECRET_VARIABLE)
    if not value and (path := os.environ.get(SECRET_FILE_VARIABLE)):
        name = SECRET_FILE_VARIABLE
        value, why = read(Path(path))
        if value is None:
            raise UserError(f"{SECRET_FILE_VARIABLE}={path}: {why}")
    if value and len(value) < SHORTEST:
        raise UserError(
            f"{name} holds {len(value)} characters, of which {SHORTEST} are the fewest that cannot "
            f"be guessed: {_ADVICE}"
        )
    return value or None


def place_of(rendezvous: str, folder: Path | None) -> Path:
    """Where rank 0 leaves the secret: in `folder`, by default in Moored's cache."""
    digest = hashlib.sha256(rendezvous.encode()).hexdigest()[:20]
    return (folder or cache_folder()).absolute() / f".meeting-{digest}"


@contextlib.contextmanager
def made(path: Path) -> Generator[str]:
    """Rank 0: a new secret, in a file for the others as long as the body runs.

    Raises:
        UserError: it cannot be written there, or the file system lets others read it.
    """
    secret = secrets.token_hex(32)
    fresh = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    _forget_old(path.parent)
    is_new = not path.parent.exists()
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(secret)
        fault = _fault(fresh.lstat())
        if fault is None:
            os.replace(fresh, path)  # one of an earlier start, maybe: it is seen whole or not
        else:
            fresh.unlink()
    except OSError as error:
        raise UserError(
            f"{path.parent}: the secret by which the processes meet cannot be kept there: "
            f"{error.strerror}: {_ADVICE}"
        ) from error
    if fault is not None:
        raise UserError(f"{path.parent} keeps no secret, since a file there {fault}: {_ADVICE}")
    try:
        yield secret
    finally:
        with contextlib.suppress(OSError):
            if read(path)[0] == secret:  # not that of a start which began meanwhile
                path.unlink()
            if is_new:
                path.parent.rmdir()  # unless something else is in it now


def _forget_old(folder: Path) -> None:
    """Remove what starts left that were killed while they waited."""
    with contextlib.suppress(OSError):
        for old in folder.glob(".meeting-*"):
            if time.time() - old.lstat().st_mtime > FORGOTTEN_SECONDS:
                old.unlink()


def read(path: Path) -> tuple[str | None, str]:
    """The secret that rank 0 has left, or None and why."""
    try:
        os.listdir(path.parent)  # a network file system looks again
        # Nobody else's link is followed, and nobody's pipe is waited for.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        return None, f"{path}: {error.strerror}"
    try:
        fault = _fault(os.fstat(descriptor))
        if fault is not None:
            return None, f"{path} {fault}"
        return os.read(descriptor, MOST_BYTES).decode("ascii", "replace").strip(), ""
    finally:
        os.close(descriptor)


def _fault(of: os.stat_result) -> str | None:
    if not stat.S_ISREG(of.st_mode):
        return "is no regular file"
    if of.st_uid != os.geteuid():
        return f"belongs to user {of.st_uid}, not to {os.geteuid()}"
    if of.st_mode & 0o077:
        return f"has mode {stat.S_IMODE(of.st_mode):o}: others can read it, set it to 600"
    return None
