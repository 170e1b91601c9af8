"""`python -m moored.track ROLE RUN_DIR`: a process beside the trainer."""

import sys

from moored.track.beside import main

sys.exit(main())
