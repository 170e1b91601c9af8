"""Prints what must be equal on every machine of a run, and how much room there is; no torch.

Run by `_agent.py` with the environment of the ranks; what differs is named by `_launch.py`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path

PACKAGES = ("python", "moored", "torch", "transformers", "peft", "bitsandbytes", "deepspeed")


def main(recipe: str, *overrides: str) -> int:
    """Print the facts as JSON, or an error as one line."""
    try:
        import moored
        from moored.cli.options import load
        from moored.tracking.run_directory import path_of
        from moored.utils.environment import versions_of
        from moored.utils.errors import MooredError
    except ImportError as error:
        print(f"error: {sys.executable} cannot import moored: {error}", file=sys.stderr)
        return 2
    try:
        config = load(Path(recipe), overrides)
    except MooredError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        return error.exit_code
    run_dir = path_of(config)
    above = next(folder for folder in (run_dir, *run_dir.parents) if folder.exists())
    equal = versions_of(PACKAGES)
    code = hashlib.sha256()
    for file in sorted(Path(moored.__file__).parent.rglob("*.py")):
        code.update(file.read_bytes())
    equal |= {"code of moored": code.hexdigest(), "recipe": config.fingerprint()}
    free = shutil.disk_usage(above).free
    print(json.dumps({"run_dir": str(run_dir), "free_bytes": free, "equal": equal}))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
