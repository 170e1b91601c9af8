"""Instructions whose fulfilment a few lines of code can decide, without a judge.

In the manner of IFEval (arXiv 2311.07911), whose idea this is; prompts and checks are our own,
fewer and shorter. `checks` decides, `tasks` asks. No model is known here.
"""

from moored.evaluation.instructions.checks import Check
from moored.evaluation.instructions.tasks import TASKS, Task

__all__ = ["TASKS", "Check", "Task"]
