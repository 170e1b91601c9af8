"""`moored prepare`: everything that a recipe needs, here before a job starts, and proof of it.

`prepare_command.py` fetches, verifies and keeps, `items.py` finds all of it as a run does,
`offline.py` has a process without a network do so. What the base
makes beforehand is in `base_generation.py` (texts) and `references.py` (hidden states).
Nothing is trained.
"""

from moored.prepare.prepare_command import prune, run

__all__ = ["prune", "run"]
