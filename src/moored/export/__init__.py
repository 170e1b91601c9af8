"""`moored export`: a finished run's adapter, or a merged model, verified by stock PEFT.

`command` opens, publishes and tells, `merge` writes a merged model, `fresh` says what it must
equal, `stock` is what loads it, without Moored. Nothing is trained or measured for a report here.
"""

from moored.export.export_command import run_command

__all__ = ["run_command"]
