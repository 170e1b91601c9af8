"""`moored` and `python -m moored`: the command line.

The commands themselves are in `cli/`; what they need is the extra `train`, without which one line
says so.
"""

from __future__ import annotations

import sys
from typing import NoReturn


def main() -> NoReturn:
    """Run the command line of this process."""
    try:
        from moored.cli import main as run
    except ModuleNotFoundError as error:
        from moored.utils.errors import missing_package

        print(f"error: {missing_package(error)}", file=sys.stderr)
        sys.exit(2)
    run()


if __name__ == "__main__":
    main()
