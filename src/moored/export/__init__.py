"""`moored export`: a finished run's adapter, or a merged model, verified by stock PEFT.

`export_command.py` opens, publishes and tells, `merge.py` writes a merged model, `verification.py`
says what it must equal, `stock_peft.py` is what loads it, without Moored; `card/` is its forgetting
card. Nothing is trained or measured for a report here.
"""

from moored.export.export_command import run_command

__all__ = ["run_command"]
