"""What finished runs learned and forgot: report.json, table, page, frontier plot.

Nothing is measured or trained here; figures come in as BaseResult and ArmResult.
"""

from moored.report.blocks import Blocks, Tally
from moored.report.bootstrap import increase_intervals
from moored.report.files import labels_of, run_command, write
from moored.report.headline import Headline, headline
from moored.report.merging import merge
from moored.report.results import ArmResult, BaseResult, Figures, Report, increase_pct, rise_pct
from moored.report.settings import settings_of
from moored.report.terminal import show, table
from moored.report.where import Choice, Spot, Stretch, TokenDrift, Where

__all__ = [
    "ArmResult",
    "BaseResult",
    "Blocks",
    "Choice",
    "Figures",
    "Headline",
    "Report",
    "Spot",
    "Stretch",
    "Tally",
    "TokenDrift",
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
