"""Jobs for SLURM: a recipe and a site profile to scripts, and what became of them.

`site.py` is a cluster's profile, `script.py` renders (pure), `snapshot.py` keeps recipe and code
beside the run, `jobs.py` submits runs and chains, `sweep.py` grids, `status.py` says how they are.
What runs inside a job is `train.py` and its neighbours; SLURM's commands are `scheduler.py`'s.
"""
