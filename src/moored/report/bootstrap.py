"""Paired bootstrap intervals: how far a figure, or a difference of two runs, may be chance.

Blocks of a text are drawn with replacement, the same ones for base and policy and for all runs that
are compared, so that what is hard about a text cancels (Koehn 2004, "Statistical significance tests
for machine translation evaluation"; percentile intervals of Efron and Tibshirani 1993, chapter 13).
Where several seeds stand for a setting, the seeds are drawn as well.

Legend: R resamples, N blocks of a text, S runs of one setting.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moored.report.blocks import Blocks

LEVEL = 0.95
NUM_RESAMPLES = 2000
FEWEST_BLOCKS = 5  # of fewer, resampling says little


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A figure with the bounds within which resampling puts it in 95 of 100 cases."""

    value: float
    low: float
    high: float

    @property
    def is_clear(self) -> bool:
        """Whether 0 lies outside: the sign is known."""
        return self.low > 0 or self.high < 0


Statistic = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], np.ndarray]


def increase_pct(
    tokens: np.ndarray, ce: np.ndarray, ce_base: np.ndarray, kl: np.ndarray
) -> np.ndarray:
    """100 * (policy's perplexity / base's - 1)."""
    del kl
    return 100.0 * np.expm1((ce - ce_base) / tokens)


def log_perplexity(
    tokens: np.ndarray, ce: np.ndarray, ce_base: np.ndarray, kl: np.ndarray
) -> np.ndarray:
    """The policy's mean cross-entropy, nats per token."""
    del ce_base, kl
    return ce / tokens


def drift(tokens: np.ndarray, ce: np.ndarray, ce_base: np.ndarray, kl: np.ndarray) -> np.ndarray:
    """Mean KL(base || policy), nats per token."""
    del ce, ce_base
    return kl / tokens


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
    return _resampled([runs], lambda means: means[0], statistic, seed)


def difference(
    ours: Sequence[Blocks],
    theirs: Sequence[Blocks],
    statistic: Statistic = increase_pct,
    seed: int = 0,
) -> Interval | None:
    """Mean of `ours` minus mean of `theirs` on one text, paired by block; see `interval`.

    As many runs in both are taken for pairs, in their order: give them in the order of the seeds.
    """
    return _resampled([ours, theirs], lambda means: means[0] - means[1], statistic, seed)


def increase_intervals(blocks: Mapping[str, Blocks]) -> dict[str, list[float]]:
    """[low, high] of the rise in percent of each text's perplexity, where there is an interval."""
    found = {name: interval([text]) for name, text in blocks.items()}
    return {name: [i.low, i.high] for name, i in found.items() if i is not None}


def ratio_pct(ours: Sequence[Blocks], theirs: Sequence[Blocks], seed: int = 0) -> Interval | None:
    """100 * (perplexity of `ours` / of `theirs` - 1), means over runs being geometric."""
    found = difference(ours, theirs, log_perplexity, seed)
    if found is None:
        return None
    low, value, high = (100.0 * float(np.expm1(x)) for x in (found.low, found.value, found.high))
    return Interval(value=value, low=low, high=high)


def _resampled(
    settings: Sequence[Sequence[Blocks]],
    combine: Callable[[list[np.ndarray]], np.ndarray],
    statistic: Statistic,
    seed: int,
) -> Interval | None:
    every = [run for runs in settings for run in runs]
    if not all(settings) or any(run.num_tokens != every[0].num_tokens for run in every):
        return None
    num_blocks = len(every[0].num_tokens)
    if num_blocks < FEWEST_BLOCKS:
        return None
    rng = np.random.default_rng(seed)
    even = np.full(num_blocks, 1.0 / num_blocks)
    counts_RN = rng.multinomial(num_blocks, even, size=NUM_RESAMPLES).astype(float)
    counts_RN = np.concatenate([np.ones((1, num_blocks)), counts_RN])  # first the text as it is
    # As many runs here as there: they are pairs (one seed each), and drawn as such.
    drawn = {num: _seeds_drawn(rng, num, len(counts_RN)) for num in sorted(set(map(len, settings)))}
    means: list[np.ndarray] = []
    for runs in settings:
        values_SR = np.stack([statistic(*_sums(run, counts_RN)) for run in runs])
        means.append((values_SR * drawn[len(runs)]).sum(0))
    values_R = combine(means)
    if not np.isfinite(values_R).all():
        return None
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(values_R[1:], [tail, 100 - tail])
    return Interval(value=float(values_R[0]), low=float(low), high=float(high))


def _sums(run: Blocks, counts_RN: np.ndarray) -> list[np.ndarray]:
    columns = (run.num_tokens, run.ce, run.ce_base, run.kl)
    return [counts_RN @ np.asarray(column, dtype=float) for column in columns]


def _seeds_drawn(rng: np.random.Generator, num_runs: int, num_resamples: int) -> np.ndarray:
    """Weights [S, R] of the runs in each resample; all alike in the first."""
    drawn = rng.multinomial(num_runs, np.full(num_runs, 1 / num_runs), size=num_resamples)
    drawn = drawn.astype(float) / num_runs
    drawn[0] = 1 / num_runs
    return drawn.T
