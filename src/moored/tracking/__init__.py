"""Tracking: an append-only journal first, MLflow behind it in a process of its own.

`tracker.py` is what a run calls, `journal.py` what it writes; `start_sidecar.py` starts, and
`sidecar.py` is, the process that brings it to a store (`shipper.py`) and samples the machine;
`sync.py` does so afterwards. `mlflow_store.py` is the only importer of mlflow.
"""

from moored.tracking.sync import SyncSummary, sync_run
from moored.tracking.tracker import Tracker, ships_later

__all__ = ["SyncSummary", "Tracker", "ships_later", "sync_run"]
