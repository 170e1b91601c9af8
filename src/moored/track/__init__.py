"""Tracking: an append-only journal first, MLflow behind it in a process of its own.

`tracker` is what a run calls, `journal` what it writes, `process` and `shipper` bring it to a
store, `mlflow_store` is the only importer of mlflow.
"""

from moored.track.tracker import SyncSummary, Tracker, sync

__all__ = ["SyncSummary", "Tracker", "sync"]
