"""Values between ranks as JSON: what may be sent, to bytes and back.

Never a pickle, which would run what it is told to in every rank that reads it. The collectives that
carry the bytes are `mesh.py`'s.
"""

from __future__ import annotations

import json
from typing import Any

from moored.utils.errors import UserError


def encoded(value: Any) -> bytes:
    """JSON of a value, in the one way that all ranks write it; floats come back bit for bit.

    NaN and the infinities are written as Python's JSON does, since figures may be any of them.

    Args:
        value: None, booleans, numbers, strings, and lists and dicts (with string keys) of them.

    Raises:
        TypeError: it is something else, or contains it: tuples would come back as lists, and keys
            as strings, so who sends them says so.
    """
    require_plain(value)
    return json.dumps(value, separators=(",", ":"), ensure_ascii=True).encode("ascii")


def decoded(data: bytes, sender: str) -> Any:
    """The value again.

    Raises:
        UserError: it is no JSON, so that no rank of ours has sent it.
    """
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        raise UserError(
            f"what {sender} sent is no JSON: another program takes part in this run: start it "
            "again, where nobody else can connect to its processes (SECURITY.md)"
        ) from None


def require_plain(value: Any, place: str = "") -> None:
    """Refuse what JSON would not bring back as it is.

    Raises:
        TypeError: the first such part, with its place in the value.
    """
    if value is None or isinstance(value, str | int | float):
        return
    if isinstance(value, list):
        for index, each in enumerate(value):
            require_plain(each, f"{place}[{index}]")
    elif isinstance(value, dict):
        for key, each in value.items():
            if not isinstance(key, str):
                raise TypeError(
                    f"the key {key!r} of value{place} is a {type(key).__name__}: ranks send each "
                    "other JSON, whose keys are strings"
                )
            require_plain(each, f"{place}[{key!r}]")
    else:
        raise TypeError(
            f"value{place} is a {type(value).__name__}: ranks send each other JSON: None, "
            "booleans, numbers, strings, lists, and dicts with string keys"
        )
