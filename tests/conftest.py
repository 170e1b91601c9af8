"""Set before torch is imported anywhere: one thread per process, and no network."""

from __future__ import annotations

import os

# Two threads per process on two cores, times several processes, is many times slower than one.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.pop("MLFLOW_TRACKING_URI", None)
