"""One figure for a suite of tasks, before, after and between, each with its interval.

A task's score s is the mean over its n questions; with c, what a guess would score, it counts as
(s - c) / (1 - c): 0 is guessing and 1 is all right, whatever the number of choices (so the Open LLM
Leaderboard's second edition, where what is below a guess is not cut off here). Tasks count alike.

Standard errors are those of independent questions, and of tasks that are independent of each other:

    se(s) = sd(scores) / sqrt(n),   se(mean) = sqrt(sum over tasks of (se(s) / (1 - c))^2) / K

with K tasks. Base and adapted model are asked the same questions, so their difference is that of
each question's scores d, paired: what is hard about a question cancels. Its variance has two
questions more, one gained and one lost by half (Agresti and Min 2005, "Simple improved confidence
intervals for comparing matched proportions"), so that it is not 0 where no answer differs:

    se(d)^2 = (sum d^2 + 1) / (n + 2)^2 - (sum d)^2 / (n + 2)^3
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from moored.evaluation.report.bootstrap import Interval
from moored.evaluation.report.results import TaskScore

REACH = 1.959964  # standard errors, to either side, of 95 %

Scores = Mapping[str, TaskScore]


def suite_mean(tasks: Scores) -> Interval | None:
    """The mean over tasks of what is above a guess, with its interval; None without a task."""
    return _mean([task_interval(task) for task in tasks.values()])


def task_interval(task: TaskScore) -> Interval:
    """What is above a guess in one task."""
    count = len(task.scores)
    error = statistics.stdev(task.scores) / math.sqrt(count) if count > 1 else 0.0
    return _around(task.share - task.chance, error, task)


def suite_change(before: Scores, after: Scores) -> Interval | None:
    """The change of the mean over the tasks that both were asked alike; None without one."""
    common = [
        name for name, task in after.items() if name in before and asked_alike(before[name], task)
    ]
    return _mean([task_change(before[name], after[name]) for name in common])


def task_change(before: TaskScore, after: TaskScore) -> Interval:
    """The change of what is above a guess in one task, of which both were asked the same."""
    gained = [b - a for a, b in zip(before.scores, after.scores, strict=True)]
    more = len(gained) + 2
    total, squares = math.fsum(gained), math.fsum(d * d for d in gained)
    error = math.sqrt((squares + 1) / more**2 - total**2 / more**3)
    return _around(total / len(gained), error, after)


def asked_alike(one: TaskScore, other: TaskScore) -> bool:
    """Whether two scores are of the same questions, as far as can be seen."""
    same = one.metric == other.metric and math.isclose(one.chance, other.chance)
    return same and len(one.scores) == len(other.scores)


def _around(value: float, error: float, task: TaskScore) -> Interval:
    value, reach = value / (1 - task.chance), REACH * error / (1 - task.chance)
    return Interval(value=value, low=value - reach, high=value + reach)


def _mean(parts: Sequence[Interval]) -> Interval | None:
    if not parts:
        return None
    value = statistics.fmean(part.value for part in parts)
    reach = math.hypot(*(part.high - part.value for part in parts)) / len(parts)
    return Interval(value=value, low=value - reach, high=value + reach)
