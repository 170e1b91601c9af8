"""`python -m moored.tracking ROLE RUN_DIR`: a process beside the trainer."""

import sys

from moored.tracking.sidecar import main

sys.exit(main())
