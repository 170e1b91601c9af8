"""Bootstrap intervals of reports against a plain implementation, and against the truth."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from moored.evaluation.report import ArmResult, Blocks, Report, Tally, bootstrap
from moored.evaluation.report.bootstrap import more_right, share_difference
from moored.evaluation.report.results import MOST_BLOCKS
from moored.utils.errors import UserErrors
from report_cases import measured, one, where


def text(rng: np.random.Generator, rise: float, num: int = 60, noise: float = 0.3) -> Blocks:
    """Blocks of uneven length whose policy is `rise` nats per token worse on average."""
    tokens = rng.integers(10, 40, num)
    base = tokens * rng.normal(3, 0.5, num)
    return Blocks(
        num_tokens=tokens.tolist(),
        ce=(base + tokens * rng.normal(rise, noise, num)).tolist(),
        ce_base=base.tolist(),
        kl=(tokens * 0.1).tolist(),
    )


def other(rng: np.random.Generator, like: Blocks, rise: float) -> Blocks:
    tokens = np.array(like.num_tokens)
    ce = np.array(like.ce_base) + tokens * rng.normal(rise, 0.3, len(tokens))
    return Blocks(num_tokens=like.num_tokens, ce=ce.tolist(), ce_base=like.ce_base, kl=like.kl)


def shifted(like: Blocks, nats: float) -> Blocks:
    """The same text, on which the policy is worse by `nats` per token."""
    ce = [ce + nats * n for ce, n in zip(like.ce, like.num_tokens, strict=True)]
    return Blocks(num_tokens=like.num_tokens, ce=ce, ce_base=like.ce_base, kl=like.kl)


def plain_rise(run: Blocks, drawn: list[int]) -> float:
    num_tokens = sum(run.num_tokens[i] for i in drawn)
    rise = sum(run.ce[i] - run.ce_base[i] for i in drawn) / num_tokens
    return 100 * (math.exp(rise) - 1)


def plain_interval(ours: list[Blocks], theirs: list[Blocks], seed: int) -> tuple[float, float]:
    """Difference of mean rises, resampled one draw after the other with another generator."""
    rng = np.random.RandomState(seed)
    num_blocks = len(ours[0].num_tokens)

    def mean(runs: list[Blocks], drawn: list[int]) -> float:
        return sum(plain_rise(run, drawn) for run in runs) / max(1, len(runs))

    everything = list(range(num_blocks))
    value = mean(ours, everything) - mean(theirs, everything)
    found = []
    for _ in range(2000):
        drawn = [int(i) for i in rng.randint(0, num_blocks, num_blocks)]
        found.append(mean(ours, drawn) - mean(theirs, drawn))
    found.sort()
    # Hesterberg's widening, then the seeds' own interval by scipy's tests, in quadrature.
    wider = stats.t.ppf(0.975, num_blocks - 1) / 1.959964 * math.sqrt(num_blocks / (num_blocks - 1))
    mine, yours = ([plain_rise(run, everything) for run in runs] for runs in (ours, theirs))
    seeds = 0.0
    if len(mine) > 2:
        if len(mine) == len(yours):
            test = stats.ttest_rel(mine, yours)
        elif len(yours) > 2:
            test = stats.ttest_ind(mine, yours, equal_var=False)
        else:
            test = stats.ttest_1samp(mine, 0.0)
        ends = test.confidence_interval(0.95)
        seeds = (ends.high - ends.low) / 2
    low = value - math.hypot(wider * (value - found[49]), seeds)
    return low, value + math.hypot(wider * (found[1949] - value), seeds)


@pytest.mark.parametrize(
    ("num_ours", "num_theirs", "num_blocks"),
    [(1, 0, 60), (1, 0, 8), (1, 1, 60), (3, 0, 60), (3, 3, 60), (2, 1, 60), (3, 2, 60), (4, 3, 60)],
)
def test_intervals_are_those_of_a_plain_loop(num_ours, num_theirs, num_blocks):
    rng = np.random.default_rng(num_ours + 10 * num_theirs)
    first = text(rng, 0.1, num=num_blocks)
    ours = [first, *(other(rng, first, 0.1) for _ in range(num_ours - 1))]
    theirs = [other(rng, first, 0.02) for _ in range(num_theirs)]
    found = bootstrap.difference(ours, theirs) if theirs else bootstrap.interval(ours)
    assert found is not None
    everything = list(range(num_blocks))
    mean = np.mean([plain_rise(run, everything) for run in ours])
    mean -= np.mean([plain_rise(run, everything) for run in theirs]) if theirs else 0.0
    assert found.value == pytest.approx(mean, rel=1e-9)
    low, high = plain_interval(ours, theirs, seed=5)
    # Two sets of 2000 draws: the standard error of a 2.5 % quantile of a normal distribution is
    # sqrt(0.025 * 0.975 / 2000) / 0.0584 = 0.06 standard deviations, so 0.085 of their difference,
    # and the interval is 3.92 wide: five times that is 0.11 of its width.
    assert found.low == pytest.approx(low, abs=0.11 * (high - low))
    assert found.high == pytest.approx(high, abs=0.11 * (high - low))


@pytest.mark.parametrize(
    ("num_blocks", "num_seeds", "noise", "seed_noise"),
    [
        (16, 1, 0.3, 0.0),
        (60, 2, 0.3, 0.0),
        (60, 3, 0.3, 0.05),  # seeds vary about as much as the text does
        (60, 3, 0.0, 0.1),  # nothing but the seeds varies
        (16, 5, 0.3, 0.1),
    ],
)
def test_intervals_hold_the_truth_with_few_blocks_and_few_seeds(
    num_blocks, num_seeds, noise, seed_noise
):
    rng = np.random.default_rng(7)
    held = 0
    for _ in range(300):
        first = text(rng, 0.0, num=num_blocks, noise=noise)
        runs = [shifted(first, rng.normal(0.1, seed_noise)) for _ in range(num_seeds)]
        found = bootstrap.interval(runs, bootstrap.gain)
        assert found is not None
        held += found.low <= -0.1 <= found.high
    # Binomial: 285 of 300 with a standard deviation of 3.8; four of them. They may hold it more
    # often where both vary, since half-widths with different tails are added in quadrature.
    assert held >= 285 - 15


def test_intervals_hold_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(0)
    truth, held, told = 100 * math.expm1(0.1), 0, 0
    for _ in range(300):
        run = text(rng, 0.1)
        found = bootstrap.interval([run])
        assert found is not None
        held += found.low <= truth <= found.high
        same = bootstrap.difference([run], [other(rng, run, 0.1)])
        assert same is not None
        told += same.is_clear
    # Binomial: 285 and 15 of 300 with a standard deviation of 3.8; percentile intervals of 60
    # blocks are about 1 % short. Four standard deviations and that.
    assert 285 - 15 - 3 <= held <= 285 + 15
    assert told <= 15 + 15 + 3


def test_pairing_cancels_what_both_have_in_common():
    rng = np.random.default_rng(1)
    run = text(rng, 0.1, noise=1.0)
    worse = shifted(run, 0.05)
    ratio, alone = bootstrap.ratio_pct([worse], [run]), bootstrap.interval([run])
    assert ratio is not None
    assert alone is not None
    exact = 100 * math.expm1(0.05)
    assert (ratio.low, ratio.value, ratio.high) == pytest.approx((exact, exact, exact), rel=1e-9)
    assert alone.high - alone.low > 10  # on its own the text leaves it wide open
    apart = bootstrap.difference([worse], [run], same_text=False)
    assert apart is not None
    assert not apart.is_clear  # drawn apart, nothing cancels


def test_seeds_are_pairs():
    rng = np.random.default_rng(2)
    first = text(rng, 0.0, noise=0.0)
    rises = (0.05, 0.30, 0.60)  # seeds differ a lot, each arm alike
    ours = [other_exact(first, rise) for rise in rises]
    theirs = [other_exact(first, rise - 0.02) for rise in rises]
    paired = bootstrap.difference(ours, theirs, bootstrap.log_perplexity)
    assert paired is not None
    assert (paired.low, paired.high) == pytest.approx((0.02, 0.02))
    apart = bootstrap.difference(ours, theirs, bootstrap.log_perplexity, same_seeds=False)
    assert apart is not None
    assert apart.value == pytest.approx(0.02)
    assert not apart.is_clear
    crossed = bootstrap.difference(ours, theirs[::-1], bootstrap.log_perplexity)
    assert crossed is not None
    assert crossed.value == pytest.approx(0.02)
    assert not crossed.is_clear


def other_exact(like: Blocks, rise: float) -> Blocks:
    ce = [base + rise * n for base, n in zip(like.ce_base, like.num_tokens, strict=True)]
    return Blocks(num_tokens=like.num_tokens, ce=ce, ce_base=like.ce_base, kl=like.kl)


nats = st.floats(-1e3, 1e3)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 2000), nats, nats, nats), min_size=5, max_size=12),
    st.sampled_from(
        [bootstrap.increase_pct, bootstrap.log_perplexity, bootstrap.gain, bootstrap.drift]
    ),
)
def test_every_interval_holds_its_figure(rows, statistic):
    columns = [list(column) for column in zip(*rows, strict=True)]
    run = Blocks(num_tokens=columns[0], ce=columns[1], ce_base=columns[2], kl=columns[3])
    again = Blocks(num_tokens=columns[0], ce=columns[3], ce_base=columns[2], kl=columns[1])
    for found in (
        bootstrap.interval([run], statistic),
        bootstrap.difference([run], [again], statistic),
    ):
        if found is not None:
            assert math.isfinite(found.value)
            assert found.low <= found.value <= found.high
    if statistic is not bootstrap.increase_pct:  # whose exponential may overflow
        assert bootstrap.interval([run], statistic) is not None


def test_there_is_no_interval_where_there_cannot_be_one():
    rng = np.random.default_rng(3)
    run = text(rng, 0.1, num=bootstrap.FEWEST_BLOCKS)
    assert bootstrap.interval([run]) is not None
    assert bootstrap.interval([text(rng, 0.1, num=bootstrap.FEWEST_BLOCKS - 1)]) is None
    assert bootstrap.interval([]) is None
    assert bootstrap.difference([run], []) is None
    assert (
        bootstrap.difference([run], [text(rng, 0.1, num=bootstrap.FEWEST_BLOCKS)]) is None
    )  # another text
    broken = Blocks(num_tokens=run.num_tokens, ce=[math.nan] * 5, ce_base=run.ce_base, kl=run.kl)
    assert bootstrap.interval([broken]) is None


def test_shares_of_few_prompts_are_told_apart_only_when_far_apart():
    # Agresti and Caffo by hand: (12 + 1) / 26 and (18 + 1) / 26.
    one, two = 13 / 26, 19 / 26
    reach = 1.96 * math.sqrt(one * (1 - one) / 26 + two * (1 - two) / 26)
    found = share_difference(0.5, 0.75, 24)
    assert (found.low, found.high) == pytest.approx(
        (100 * (two - one - reach), 100 * (two - one + reach)), abs=0.01
    )
    assert found.value == 25
    assert not found.is_clear
    assert share_difference(0.0, 1.0, 24).is_clear
    assert share_difference(1.0, 1.0, 24).high > 0


def test_shares_of_the_same_prompts_are_paired():
    rng = np.random.default_rng(4)
    before = [int(x) for x in rng.random(60) < 0.5]
    after = [1 if i < 12 else hit for i, hit in enumerate(before)]  # nothing that was right is lost
    one, two = (Tally.of([(1, hit) for hit in hits]) for hits in (before, after))
    found = bootstrap.points(one, two)
    assert found is not None
    assert found.value == pytest.approx(100 * (two.share - one.share))
    # By hand: resampled gains per prompt.
    gained = np.array(after) - np.array(before)
    draws = np.sort([100 * rng.choice(gained, 60).mean() for _ in range(4000)])
    wider = stats.t.ppf(0.975, 59) / 1.959964 * math.sqrt(60 / 59)
    for end, expected in ((found.low, draws[100]), (found.high, draws[3900])):
        assert end == pytest.approx(found.value + wider * (expected - found.value), abs=1.7)
    apart = share_difference(one.share, two.share, 60)
    assert found.is_clear
    assert not apart.is_clear
    assert more_right(one, two) == found
    # What cannot be paired, or differs nowhere, has the wider interval.
    assert bootstrap.points(one, one) is None
    assert more_right(one, one).high > 0 > more_right(one, one).low
    other = Tally(num=[30, 30], hits=[10, 20])
    assert more_right(one, other) == share_difference(one.share, other.share, 60)


def test_a_tally_keeps_every_prompt():
    tally = Tally.of([(3, i % 4) for i in range(501)])
    assert (len(tally.num), len(tally.hits), tally.total) == (MOST_BLOCKS, MOST_BLOCKS, 1503)
    assert sum(tally.hits) == sum(i % 4 for i in range(501))
    assert Tally.of([]).share == 0


def test_blocks_keep_every_sample():
    sums = {
        "num_tokens": [float(1 + i % 3) for i in range(501)],
        "ce": [0.1 * i for i in range(501)],
        "ce_base": [0.2 * i for i in range(501)],
        "kl": [0.01] * 501,
        "agree": [1.0] * 501,
    }
    blocks = Blocks.of(sums)
    columns = (blocks.num_tokens, blocks.ce, blocks.ce_base, blocks.kl)
    assert [len(column) for column in columns] == [MOST_BLOCKS] * 4
    assert sum(blocks.num_tokens) == sum(sums["num_tokens"])
    # Written with eight digits.
    assert sum(blocks.ce) == pytest.approx(sum(sums["ce"]), rel=1e-7)
    assert sum(blocks.kl) == pytest.approx(5.01, rel=1e-7)
    # Neighbours together, in their order: a fifth of the samples is a fifth of the blocks.
    assert sum(blocks.ce[: MOST_BLOCKS // 5]) == pytest.approx(sum(sums["ce"][:100]), rel=1e-7)
    few = Blocks.of({name: values[:3] for name, values in sums.items()})
    assert few.num_tokens == [1, 2, 3]
    assert Blocks.of({name: [] for name in sums}).num_tokens == []


ARM = ("arms", "tmkl")
SPOT = (*ARM, "where", "python-reference", "spots", 1)


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        ((*ARM, "adaptation_blocks", "ce"), 3, "tmkl.adaptation_blocks.ce: expected a list, got 3"),
        ((*ARM, "adaptation_blocks", "ce", 2), "x", "adaptation_blocks.ce[2]: expected a number"),
        ((*ARM, "adaptation_blocks", "ce"), [1.0], "adaptation_blocks: its lists differ in length"),
        (
            (*ARM, "retention_blocks", "base-samples", "num_tokens", 0),
            1.5,
            "tmkl.retention_blocks.'base-samples'.num_tokens[0]: expected an integer, got 1.5",
        ),
        ((*ARM, "retention_blocks"), [], "tmkl.retention_blocks: expected an object, got []"),
        (
            (*ARM, "retention_increase_interval_pct", "base-samples"),
            [1.0],
            "retention_increase_interval_pct.'base-samples': [1.0] is no interval",
        ),
        (
            (*ARM, "retention_increase_interval_pct", "base-samples"),
            [3.0, 1.0],
            "[3.0, 1.0] is no interval: expected [low, high] in percent",
        ),
        ((*ARM, "adaptation_blocks", "ce"), [2.0] * 40, "perplexity 1.018, but its blocks give"),
        (
            (*ARM, "retention_blocks", "base-samples", "ce"),
            [1.0] * 40,
            "tmkl.retention.'base-samples': perplexity 4.25, but its blocks give exp(0.04)",
        ),
        ((*SPOT, "target"), 5, "where.'python-reference'.spots[1].target: expected text, got 5"),
        ((*SPOT, "choices", 0, "base"), None, "spots[1].choices[0].base: expected a number"),
        ((*SPOT, "choices", 2, "tokn"), 1, "choices[2].tokn: unknown key; did you mean token?"),
        ((*SPOT,), "x", "spots[1]: expected an object, got x"),
    ],
)
def test_nested_data_is_checked_with_its_place(keys, value, message):
    report = one("tmkl")
    full = measured("tmkl", 1.018, 26.8, 4.25, where={"python-reference": where(" ")})
    data = Report(base=report.base, arms={"tmkl": full}).to_json()
    assert Report.from_json(data).arms["tmkl"] == full
    at = data
    for key in keys[:-1]:
        at = at[key]
    at[keys[-1]] = value
    with pytest.raises(UserErrors) as caught:
        Report.from_json(data)
    assert message in str(caught.value)


def test_reports_from_before_there_were_blocks_are_read():
    data = one("tmkl").to_json()
    for name in ("adaptation_blocks", "retention_blocks", "where"):
        del data["arms"]["tmkl"][name]
    arm = Report.from_json(data).arms["tmkl"]
    assert isinstance(arm, ArmResult)
    assert arm.adaptation_blocks is None
    assert arm.retention_blocks == arm.where == {}
