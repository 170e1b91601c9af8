"""Tracking: an append-only journal first, MLflow behind it in a process of its own.

`tracker` is what a run calls, `journal` what it writes; `process` starts, and `sidecar` is, the
process that brings it to a store (`shipper`) and samples the machine; `sync` does so afterwards.
`mlflow_store` is the only importer of mlflow.
"""

from moored.tracking.sync import SyncSummary, sync_run
from moored.tracking.tracker import Tracker, ships_later

__all__ = ["SyncSummary", "Tracker", "ships_later", "sync_run"]
