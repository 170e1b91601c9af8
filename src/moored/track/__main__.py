"""`python -m moored.track RUN_DIR`: the shipper as a process beside the trainer."""

import sys

from moored.track.process import main

sys.exit(main())
