"""Where Moored keeps what is its own beside the runs. Nothing is made or read here."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Where converted models are kept: MOORED_CACHE, else ~/.cache/moored."""
    given = os.environ.get("MOORED_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return (Path(given) if given else Path(base) / "moored").expanduser()
