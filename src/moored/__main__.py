"""`python -m moored`: the command line, also where the script is not on the PATH.

The commands themselves are in `cli/`.
"""

from __future__ import annotations

from moored.cli import main

if __name__ == "__main__":
    main()
