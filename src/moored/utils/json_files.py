"""JSON as Moored writes it: values that any reader takes, and files that are whole or absent.

What stands in a file is its writer's matter; what ranks send each other is `plain.py`'s.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from moored.utils.atomic_dir import write_atomically


def jsonable(value: Any) -> Any:
    """A value of JSON's own kinds: a dataclass is its fields, a tuple is a list.

    NaN and infinities, which JSON has no numbers for, become the strings that `float` reads.
    """
    if is_dataclass(value):
        return {item.name: jsonable(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by a value as indented JSON, so that a reader sees the old or the new."""
    write_atomically(path, (json.dumps(value, indent=1) + "\n").encode())
