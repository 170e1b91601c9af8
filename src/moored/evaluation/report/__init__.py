"""What finished runs learned and forgot: report.json, table, page, frontier plot.

Nothing is measured or trained here; figures come in as BaseResult and ArmResult.
"""

from moored.evaluation.report.bootstrap import increase_intervals
from moored.evaluation.report.headline import Headline, headline
from moored.evaluation.report.report_files import labels_of, run_command, settings_of, write
from moored.evaluation.report.results import (
    ArmResult,
    BaseResult,
    Blocks,
    Figures,
    Report,
    Stretch,
    Tally,
    TaskScore,
    TokenChoice,
    TokenDrift,
    TokenExample,
    Where,
    increase_pct,
    merge,
    rise_pct,
)
from moored.evaluation.report.terminal import show, table

__all__ = [
    "ArmResult",
    "BaseResult",
    "Blocks",
    "Figures",
    "Headline",
    "Report",
    "Stretch",
    "Tally",
    "TaskScore",
    "TokenChoice",
    "TokenDrift",
    "TokenExample",
    "Where",
    "headline",
    "increase_intervals",
    "increase_pct",
    "labels_of",
    "merge",
    "rise_pct",
    "run_command",
    "settings_of",
    "show",
    "table",
    "write",
]
