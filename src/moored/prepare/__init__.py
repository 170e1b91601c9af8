"""`moored prepare`: everything that a recipe needs, here before a job starts, and proof of it.

`prepare_command.py` fetches and keeps, `fetch_weights.py` verifies a model's files, `offline.py` is
the proof: a fresh process without a network. Nothing is trained and no weights are loaded.
"""

from moored.prepare.prepare_command import prune, run

__all__ = ["prune", "run"]
