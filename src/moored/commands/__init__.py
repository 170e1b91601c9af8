"""The commands: what is given is checked and handed to the room that does it.

`runs.py` has those on recipes and run directories, `cluster.py` those on jobs. No logic lives here,
and nothing slow is imported before a command needs it; errors and exit codes are `cli.py`'s.
"""
