"""Paired bootstrap intervals: how far a figure, or a difference of two runs, may be chance.

Blocks of a text are drawn with replacement, the same ones for base and policy and for all runs that
are compared, so that what is hard about a text cancels (Koehn 2004, "Statistical significance tests
for machine translation evaluation"; percentile intervals of Efron and Tibshirani 1993, chapter 13).
Where several seeds stand for a setting, the seeds are drawn as well.

Legend: R resamples, N blocks of a text, S runs of one setting.
"""

from __future__ import annotations

import functools
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


def gain(tokens: np.ndarray, ce: np.ndarray, ce_base: np.ndarray, kl: np.ndarray) -> np.ndarray:
    """What the policy gained on the base, nats per token."""
    del kl
    return (ce_base - ce) / tokens


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
    values_R = resampled(runs, statistic, seed)
    return None if values_R is None else _interval(values_R)


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
        same_seeds: as many runs in both are pairs, in their order; else drawn on their own.
    """
    if same_text and not _same_blocks([*ours, *theirs]):
        return None
    mine = resampled(ours, statistic, seed)
    other = resampled(
        theirs,
        statistic,
        seed if same_text else seed + 1,
        runs_stream=_RUNS if same_seeds else _OTHER_RUNS,
    )
    return None if mine is None or other is None else _interval(mine - other)


def increase_intervals(blocks: Mapping[str, Blocks]) -> dict[str, list[float]]:
    """[low, high] of the rise in percent of each text's perplexity, where there is an interval."""
    found = {name: interval([text]) for name, text in blocks.items()}
    return {name: [i.low, i.high] for name, i in found.items() if i is not None}


def ratio_pct(
    ours: Sequence[Blocks],
    theirs: Sequence[Blocks],
    seed: int = 0,
    *,
    same_seeds: bool = True,
) -> Interval | None:
    """100 * (perplexity of `ours` / of `theirs` - 1), means over runs being geometric."""
    found = difference(ours, theirs, log_perplexity, seed, same_seeds=same_seeds)
    if found is None:
        return None
    low, value, high = (100.0 * float(np.expm1(x)) for x in (found.low, found.value, found.high))
    return Interval(value=value, low=low, high=high)


# Streams of random numbers: blocks, runs, and runs that are no pairs of those.
_BLOCKS, _RUNS, _OTHER_RUNS = 0, 1, 2


def resampled(
    runs: Sequence[Blocks],
    statistic: Statistic = increase_pct,
    seed: int = 0,
    *,
    runs_stream: int = _RUNS,
) -> np.ndarray | None:
    """The mean over runs of a statistic, [1 + R]: of the text as it is, then of R resamples.

    The same seed draws the same blocks of texts of as many blocks; of as many runs the same ones
    are drawn, unless they come from another stream.
    None where `interval` has none.
    """
    if not runs or not _same_blocks(runs) or len(runs[0].num_tokens) < FEWEST_BLOCKS:
        return None
    counts_RN = _drawn(len(runs[0].num_tokens), seed, _BLOCKS)
    weights_RS = _drawn(len(runs), 0, runs_stream) / len(runs)
    with np.errstate(all="ignore"):  # of figures that are not finite, or texts without a token
        values_SR = np.stack([statistic(*_sums(run, counts_RN)) for run in runs])
        values_R = (values_SR * weights_RS.T).sum(0)
    return values_R if np.isfinite(values_R).all() else None


def _same_blocks(runs: Sequence[Blocks]) -> bool:
    return all(run.num_tokens == runs[0].num_tokens for run in runs)


def _interval(values_R: np.ndarray) -> Interval:
    tail = 100 * (1 - LEVEL) / 2
    value = float(values_R[0])
    low, high = (float(bound) for bound in np.percentile(values_R[1:], [tail, 100 - tail]))
    # A skewed text's figure may lie outside by chance: an interval always holds its figure.
    return Interval(value=value, low=min(low, value), high=max(high, value))


@functools.lru_cache(maxsize=16)
def _drawn(number: int, seed: int, stream: int) -> np.ndarray:
    """How often each of `number` things is drawn, [1 + R, number]; once each at first."""
    rng = np.random.default_rng([seed, number, stream])
    drawn = rng.multinomial(number, np.full(number, 1.0 / number), size=NUM_RESAMPLES)
    return np.concatenate([np.ones((1, number)), drawn])


def _sums(run: Blocks, counts_RN: np.ndarray) -> list[np.ndarray]:
    columns = (run.num_tokens, run.ce, run.ce_base, run.kl)
    return [counts_RN @ np.asarray(column, dtype=float) for column in columns]
