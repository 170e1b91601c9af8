"""Paired intervals: how far a figure, or a difference of two runs, may be chance.

Blocks of a text are drawn with replacement, the same ones for base and policy and for all runs that
are compared, so that what is hard about a text cancels (Koehn 2004, "Statistical significance tests
for machine translation evaluation"; percentile intervals of Efron and Tibshirani 1993, chapter 13,
widened for few blocks as in Hesterberg 2015, "What teachers should know about the bootstrap",
section 4.3). A few seeds cannot be resampled: where three or more stand for a setting, Student's
interval of their mean (Welch's where the seeds are no pairs) is added in quadrature. Two seeds do
not say how much seeds vary: their mean has the interval of its texts, as a single run has.

Legend: R resamples, N blocks of a text, S runs of one setting.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.special import ndtri, stdtrit

from moored.evaluation.report.results import Blocks, Tally

LEVEL = 0.95
NUM_RESAMPLES = 2000
FEWEST_BLOCKS = 5  # of fewer, resampling says little
FEWEST_SEEDS = 3  # of fewer, nothing is said of other seeds

# Streams of random numbers.
_BLOCKS, _RUNS = 0, 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A figure with bounds that hold the truth in 95 of 100 cases."""

    value: float
    low: float
    high: float

    @property
    def is_clear(self) -> bool:
        """Whether 0 lies outside: the sign is known."""
        return self.low > 0 or self.high < 0

    def map(self, change: Callable[[float], float]) -> Interval:
        """The interval of a growing function of the figure."""
        return Interval(value=change(self.value), low=change(self.low), high=change(self.high))


class Sums(NamedTuple):
    """A text's sums under each resample, [1 + R] each: tokens, and nats as in `Blocks`."""

    num_tokens: np.ndarray
    ce: np.ndarray
    ce_base: np.ndarray
    kl: np.ndarray


Statistic = Callable[[Sums], np.ndarray]


def increase_pct(text: Sums) -> np.ndarray:
    """100 * (policy's perplexity / base's - 1)."""
    return 100.0 * np.expm1((text.ce - text.ce_base) / text.num_tokens)


def log_perplexity(text: Sums) -> np.ndarray:
    """The policy's mean cross-entropy, nats per token."""
    return text.ce / text.num_tokens


def gain(text: Sums) -> np.ndarray:
    """What the policy gained on the base, nats per token."""
    return (text.ce_base - text.ce) / text.num_tokens


def drift(text: Sums) -> np.ndarray:
    """Mean KL(base || policy), nats per token."""
    return text.kl / text.num_tokens


def interval(
    runs: Sequence[Blocks], statistic: Statistic = increase_pct, seed: int = 0
) -> Interval | None:
    """The mean over runs of a statistic of one text, with its interval.

    Args:
        runs: the same text, measured for each run (seed) of one setting.
        statistic: of the sums over the text.
        seed: of the resampling.

    Returns:
        None where the runs were not measured on the same blocks, or on too few.
    """
    values_SR = _resampled_runs(runs, statistic, seed)
    return None if values_SR is None else _interval(len(runs[0].num_tokens), values_SR)


def difference(
    ours: Sequence[Blocks],
    theirs: Sequence[Blocks],
    statistic: Statistic = increase_pct,
    seed: int = 0,
    *,
    same_text: bool = True,
    same_seeds: bool = True,
) -> Interval | None:
    """Mean of `ours` minus mean of `theirs` on one text, paired by block; see `interval`.

    Args:
        ours: one text, measured for each run of a setting.
        theirs: the same of another setting.
        statistic: of the sums over the text.
        seed: of the resampling.
        same_text: else `theirs` are of another text, whose blocks are drawn on their own.
        same_seeds: as many runs in both are pairs, in their order; else they vary on their own.
    """
    if same_text and not _same_blocks([*ours, *theirs]):
        return None
    mine = _resampled_runs(ours, statistic, seed)
    other = _resampled_runs(theirs, statistic, seed if same_text else seed + 1)
    if mine is None or other is None:
        return None
    fewest = min(len(ours[0].num_tokens), len(theirs[0].num_tokens))
    if same_seeds and len(ours) == len(theirs):
        return _interval(fewest, mine - other)
    return _interval(fewest, mine, -other)


def increase_intervals(blocks: Mapping[str, Blocks]) -> dict[str, list[float]]:
    """[low, high] of the rise in percent of each text's perplexity, where there is an interval."""
    known = {name: interval([text]) for name, text in blocks.items()}
    return {name: [rise.low, rise.high] for name, rise in known.items() if rise is not None}


def ratio_pct(
    ours: Sequence[Blocks], theirs: Sequence[Blocks], seed: int = 0, *, same_seeds: bool = True
) -> Interval | None:
    """100 * (perplexity of `ours` / of `theirs` - 1), means over runs being geometric."""
    nats = difference(ours, theirs, log_perplexity, seed, same_seeds=same_seeds)
    return nats and nats.map(lambda value: 100.0 * float(np.expm1(value)))


def resampled(
    runs: Sequence[Blocks], statistic: Statistic = increase_pct, seed: int = 0
) -> np.ndarray | None:
    """The mean over runs of a statistic, [1 + R]: of the text as it is, then of R resamples.

    Runs are drawn with replacement as well. The same seed draws the same blocks of texts of as many
    blocks; of as many runs the same ones are drawn.
    None where `interval` has none.
    """
    values_SR = _resampled_runs(runs, statistic, seed)
    if values_SR is None:
        return None
    weights_RS = _drawn(len(runs), 0, _RUNS) / len(runs)
    return (values_SR * weights_RS.T).sum(0)


def points(before: Tally, after: Tally, seed: int = 0) -> Interval | None:
    """Points between two shares of the same things asked, paired by block; see `interval`.

    None too where no block differs: a resample cannot tell how sure that is.
    """
    if before.num != after.num or len(before.num) < FEWEST_BLOCKS or before.hits == after.hits:
        return None
    num_N = np.asarray(before.num, dtype=float)
    gained_N = np.asarray(after.hits, dtype=float) - np.asarray(before.hits, dtype=float)
    counts_RN = _drawn(len(num_N), seed, _BLOCKS)
    values_R = 100.0 * (counts_RN @ gained_N) / np.maximum(counts_RN @ num_N, 1.0)
    return _interval(len(num_N), values_R[None])


def more_right(before: Tally, after: Tally) -> Interval:
    """Points between two shares of what was right: paired by prompt or passage, where they differ.

    Where none differs, or they were not asked the same, it is `share_difference`'s.
    """
    paired = points(before, after)
    return paired or share_difference(before.share, after.share, min(before.total, after.total))


def share_difference(before: float, after: float, num: int) -> Interval:
    """Points between two shares of `num` things each, with Agresti and Caffo's interval.

    It takes the two for independent samples, so it is wider than a paired one would be (Agresti and
    Caffo 2000, "Simple and effective confidence intervals for proportions": one success and one
    failure are added to each).
    """
    shares = [(share * num + 1) / (num + 2) for share in (before, after)]
    centre = shares[1] - shares[0]
    reach = 1.959964 * math.sqrt(sum(share * (1 - share) / (num + 2) for share in shares))
    value = 100 * (after - before)
    ends = 100 * (centre - reach), 100 * (centre + reach)
    return Interval(value=value, low=min(ends[0], value), high=max(ends[1], value))


def _resampled_runs(runs: Sequence[Blocks], statistic: Statistic, seed: int) -> np.ndarray | None:
    """A statistic of every run, [S, 1 + R]: all of the same blocks."""
    if not runs or not _same_blocks(runs) or len(runs[0].num_tokens) < FEWEST_BLOCKS:
        return None
    counts_RN = _drawn(len(runs[0].num_tokens), seed, _BLOCKS)
    with np.errstate(all="ignore"):  # of figures that are not finite, or texts without a token
        values_SR = np.stack([statistic(_sums(run, counts_RN)) for run in runs])
    return values_SR if np.isfinite(values_SR).all() else None


def _same_blocks(runs: Sequence[Blocks]) -> bool:
    return all(run.num_tokens == runs[0].num_tokens for run in runs)


def _interval(num_blocks: int, *groups_SR: np.ndarray) -> Interval:
    """The sum of the means of groups of runs that vary on their own."""
    values_R = np.sum([values_SR.mean(0) for values_SR in groups_SR], axis=0)
    tail = (1 - LEVEL) / 2
    value = float(values_R[0])
    ends = np.percentile(values_R[1:], [100 * tail, 100 * (1 - tail)])
    few = float(stdtrit(num_blocks - 1, 1 - tail) / ndtri(1 - tail))
    few *= math.sqrt(num_blocks / (num_blocks - 1))
    seeds = _reach_of_seeds([values_SR[:, 0] for values_SR in groups_SR], tail)
    # A skewed text's figure may lie outside by chance: an interval always holds its figure.
    low, high = (
        math.hypot(few * max(0.0, reach), seeds) for reach in (value - ends[0], ends[1] - value)
    )
    return Interval(value=value, low=value - low, high=value + high)


def _reach_of_seeds(groups_S: Sequence[np.ndarray], tail: float) -> float:
    """Half of Student's (Welch's) interval of the sum of means; 0 where few runs tell nothing."""
    terms = [(v.var(ddof=1) / len(v), len(v) - 1) for v in groups_S if len(v) >= FEWEST_SEEDS]
    variance = float(sum(term for term, _ in terms))
    if variance == 0:
        return 0.0
    freedom = variance**2 / sum(term**2 / free for term, free in terms)
    return float(stdtrit(freedom, 1 - tail)) * math.sqrt(variance)


@functools.lru_cache(maxsize=16)
def _drawn(number: int, seed: int, stream: int) -> np.ndarray:
    """How often each of `number` things is drawn, [1 + R, number]; once each at first."""
    rng = np.random.default_rng([seed, number, stream])
    drawn = rng.multinomial(number, np.full(number, 1.0 / number), size=NUM_RESAMPLES)
    return np.concatenate([np.ones((1, number)), drawn])


def _sums(run: Blocks, counts_RN: np.ndarray) -> Sums:
    columns = (run.num_tokens, run.ce, run.ce_base, run.kl)
    return Sums(*(counts_RN @ np.asarray(column, dtype=float) for column in columns))
