"""What reports claim of differences: told apart, not told apart, about the same, or not known."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from moored.evaluation.report import Report, headline, table
from moored.evaluation.report.comparing import (
    choose,
    increase_interval,
    recommendations,
    settings,
    yardstick,
)
from moored.evaluation.report.page import caveats
from moored.evaluation.report.tables import change, row, versus
from moored.evaluation.report.terminal import plain
from report_cases import CORPORA, arm, base, measured, report_of


def title(*arms) -> str:
    return headline(report_of(*arms)).title.replace("\u00a0", " ")


def details(*arms) -> list[str]:
    return [line.replace("\u00a0", " ") for line in headline(report_of(*arms)).details]


PLAIN = measured("none", 1.05, 30.0, 4.6)


@pytest.mark.parametrize(
    ("tmkl", "says"),
    [
        # Clear in both, within 3 % in one.
        (
            measured("tmkl", 1.06, 27.0, 4.25, seed=1),
            "TMKL learned about as much as plain fine-tuning and forgot less: retention "
            "perplexity +3.4 % against +14.9 % at worst.",
        ),
        (
            measured("tmkl", 1.2, 27.0, 4.25, seed=1),
            "TMKL learned less than plain fine-tuning but forgot less: retention perplexity "
            "+3.4 % against +14.9 % at worst.",
        ),
        (
            measured("tmkl", 0.97 * 1.03, 33.0, 4.25, seed=1),
            "TMKL learned more than plain fine-tuning but forgot more: retention perplexity "
            "+26.4 % against +14.9 % at worst.",
        ),
        # A wide interval of a difference beyond the thresholds.
        (
            measured("tmkl", 1.11, 26.8, 4.3, seed=1, noise=0.5),
            "TMKL cannot be told apart from plain fine-tuning, neither in what it learned nor in "
            "what it forgot: retention perplexity +2.7 % against +14.9 % at worst.",
        ),
    ],
)
def test_title_goes_by_the_interval_of_the_difference(tmkl, says):
    assert title(PLAIN, tmkl) == says


def test_title_tells_one_side_apart_and_not_the_other():
    noisy = measured("tmkl", 1.11, 27.0, 4.25, seed=1, noise=0.5)
    exact = measured("tmkl", 1.2, 27.0, 4.25, seed=1)
    learned = replace(exact, adaptation_ppl=1.11, adaptation_blocks=noisy.adaptation_blocks)
    assert title(PLAIN, learned) == (
        "TMKL cannot be told apart from plain fine-tuning in what it learned but forgot less: "
        "retention perplexity +3.4 % against +14.9 % at worst."
    )
    forgot = replace(exact, retention_blocks=noisy.retention_blocks)
    assert title(PLAIN, forgot) == (
        "TMKL learned less than plain fine-tuning but cannot be told apart from it in what it "
        "forgot: retention perplexity +3.4 % against +14.9 % at worst."
    )
    only = replace(forgot, adaptation_ppl=None, adaptation_blocks=None)
    assert title(replace(PLAIN, adaptation_ppl=None, adaptation_blocks=None), only) == (
        "TMKL cannot be told apart from plain fine-tuning in what it forgot: retention perplexity "
        "+3.4 % against +14.9 % at worst; what was learned was not measured."
    )


def test_about_as_much_needs_the_whole_interval_within_the_threshold():
    near = measured("tmkl", 1.06, 30.1, 4.6, noise=0.002)
    assert "forgot about as much" in title(measured("none", 1.05, 30.0, 4.6, noise=0.002), near)
    # The same figures, less surely: neither the same nor different.
    wide = measured("tmkl", 1.06, 30.1, 4.6, seed=1, noise=0.1)
    assert "neither in what it learned nor in what it forgot" in title(PLAIN, wide)


def test_details_carry_the_intervals():
    found = details(PLAIN, measured("tmkl", 1.2, 27.0, 4.25, seed=1))
    assert found[0].startswith("TMKL: adaptation perplexity 13.50 → 1.200; retention perplexity ")
    assert found[0].endswith("] at worst (python-reference).")
    assert "+3.4 % [2.8, 4.1]" in found[0]
    assert found[2].startswith(
        "TMKL against plain fine-tuning: adaptation perplexity +14.3 % [13.2, 15.4]; retention "
        "perplexity at worst −11.5 points [−12.5, −10.4] (python-reference). Paired 95 %"
    )


def test_worst_corpora_that_differ_are_drawn_apart():
    other = measured("tmkl", 1.05, 26.2, 4.5, seed=1)
    assert other.worst() == ("base-samples", pytest.approx(100 * (4.5 / 4.2 - 1)))
    found = details(PLAIN, other)[2]
    assert "(base-samples against python-reference, not paired)" in found
    assert "and forgot less" in title(PLAIN, other)


def test_arms_are_compared_on_the_texts_that_all_of_them_have():
    # Plain fine-tuning lost most on a text that the other arm was never measured on.
    plain, ours = measured("none", 1.05, 45.0, 4.3), measured("tmkl", 1.05, 27.0, 4.4)
    first, second = CORPORA
    lacks = replace(
        ours,
        **{
            name: {second: getattr(ours, name)[second]}
            for name in ("retention_ppl", "retention_increase_pct", "retention_blocks")
        },
    )
    report = report_of(plain, lacks)
    said = headline(report)
    assert "forgot more" in said.title
    assert "+4.8\u00a0% against +2.4\u00a0% at worst" in said.title
    assert first not in " ".join(said.details)
    assert any(f"Not every arm was measured on {first}" in line for line in caveats(report))
    choice, _ = recommendations(report)
    assert choice is not None
    assert choice.most_forgot == pytest.approx(100 * (4.4 / 4.2 - 1))
    nowhere = replace(
        lacks, retention_ppl={"x": 2.0}, retention_increase_pct={"x": 1.0}, retention_blocks={}
    )
    report = report_of(plain, nowhere)
    assert "what was forgotten was not measured" in headline(report).title
    assert any("No retention corpus was measured for every arm" in x for x in caveats(report))


def test_a_sweep_over_anything_has_a_recommendation_in_words():
    arms = [measured("tmkl", 1.05 + i / 10, 30.0 - i, 4.3, setting=f"digest-{i}") for i in range(3)]
    choice, said = recommendations(report_of(*arms))
    assert said == [choice]
    assert details(*arms)[-1].startswith("Of 3 settings, tmkl")


def test_learning_nothing_is_no_verdict_where_the_difference_is_unclear():
    noisy = {"noise": 1.2}
    report = report_of(
        measured("none", 11.0, 27.0, 4.3), measured("tmkl", 12.0, 26.5, 4.25, seed=3, **noisy)
    )
    assert "learned nothing that can be told from chance where" not in headline(report).title


def test_without_blocks_figures_decide_and_a_caveat_says_so():
    old = report_of(arm("none", 1.05, 30.0, 4.6), arm("tmkl", 1.2, 27.0, 4.25))
    assert "learned less than plain fine-tuning but forgot less" in headline(old).title
    assert headline(old).title.endswith("; no interval says how sure that is.")
    said = caveats(old)
    assert "no interval can be given" in said[0]
    assert "nothing here is a claim of significance" in said[0]
    half = report_of(PLAIN, arm("tmkl", 1.2, 27.0, 4.25))
    assert "not what another seed would" in caveats(half)[0]
    assert any("No interval can be given for all of tmkl1" in line for line in caveats(half))
    assert not any("No interval" in line for line in caveats(report_of(PLAIN)))


def seeds(kind: str, learned: float, python: float, num: int = 3, **changes):
    return [
        measured(kind, learned + 0.01 * s, python + 0.3 * s, 4.3, seed=s, **changes)
        for s in range(num)
    ]


def test_seeds_of_one_setting_are_taken_together():
    report = report_of(*seeds("none", 1.05, 30.0), *seeds("tmkl", 1.06, 27.0))
    found = settings(report)
    assert [len(setting.arms) for setting in found] == [3, 3]
    assert [setting.name for setting in found] == ["none0", "tmkl3"]
    mean = sum(100 * (ppl / 26.1 - 1) for ppl in (27.0, 27.3, 27.6)) / 3
    assert found[1].worst == ("python-reference", pytest.approx(mean))
    assert found[1].learned == pytest.approx((1.06 * 1.07 * 1.08) ** (1 / 3))
    text = headline(report)
    assert text.title.startswith("TMKL (3 seeds) learned about as much as plain fine-tuning and")
    assert "Paired 95 % intervals over texts and seeds." in text.details[2]
    assert "3 seeds per setting" in caveats(report)[0]
    # Seeds are pairs: both arms rise alike from seed to seed, which cancels.
    shown = versus(report)
    assert shown is not None
    assert shown["rows"][0]["forgot"][0].word == "better"


def test_runs_are_pairs_only_where_their_seeds_are_the_same():
    def rise(first: int) -> str:
        """The rise of a text that depends on the seed alone, but for half a point."""
        arms = [
            *(measured("none", 1.05, 30.5 + 4 * s, 4.3, seed=s, noise=0.001) for s in range(3)),
            *(
                measured("tmkl", 1.05, 30.3 + 4 * s, 4.3, seed=first + s, noise=0.001)
                for s in range(3)
            ),
        ]
        return title(*arms)

    assert "forgot about as much" in rise(0)
    assert "cannot be told apart from it in what it forgot" in rise(10)


def test_runs_are_seeds_of_one_setting_only_if_nothing_else_can_differ():
    twice = report_of(measured("tmkl", 1.05, 27.0, 4.3), measured("tmkl", 1.2, 26.5, 4.3))
    assert len(settings(twice)) == 2  # one seed twice: something else was changed
    foreign = [replace(arm("adapter", 1.05, 27.0, 4.3), seed=None) for _ in range(2)]
    assert len(settings(report_of(*foreign))) == 2
    longer = report_of(measured("tmkl", 1.05, 27.0, 4.3), measured("tmkl", 1.05, 27.0, 4.3, seed=1))
    assert len(settings(longer)) == 1
    arms = dict(longer.arms)
    arms["tmkl1"] = replace(arms["tmkl1"], num_steps=160)
    assert len(settings(replace(longer, arms=arms))) == 2


def test_runs_that_know_their_recipes_are_grouped_by_them():
    every = [
        measured("tmkl", 1.05, 27.0, 4.3, seed=s, setting=f"{i}") for i in (1, 2) for s in (0, 1)
    ]
    assert [len(group.arms) for group in settings(report_of(*every))] == [2, 2]
    budget = [
        measured("tmkl", 1.05, 27.0, 4.3, seed=s, weight=w, setting="b")
        for s, w in ((0, 0.31), (1, 0.27))  # where a budget left them
    ]
    assert [len(group.arms) for group in settings(report_of(*budget))] == [2]
    scaled = [measured("tmkl", 1.05, 27.0, 4.3, setting="b", scale=scale) for scale in (None, 0.5)]
    assert [len(group.arms) for group in settings(report_of(*scaled))] == [1, 1]


def test_nothing_is_forgotten_only_where_the_interval_says_so():
    for pct, noise, says in (
        (-0.4, 0.02, "forgot nothing ("),
        (0.4, 0.02, "forgot next to nothing ("),
        (-1.2, 0.3, "forgot nothing that can be told from chance ("),
        (0.1, 0.3, "forgot nothing that can be told from chance ("),
    ):
        rises = [ppl * (1 + pct / 100) for ppl in (26.1, 4.2)]
        assert says in title(measured("tmkl", 1.05, *rises, noise=noise)), pct
    near = title(measured("tmkl", 13.4, 26.1, 4.2, noise=0.3))
    assert "learned nothing that can be told from chance" in near
    assert "learned next to nothing" in title(measured("tmkl", 13.4, 26.1, 4.2, noise=0.01))


BROKEN = {"budget": "1 % of perplexity on x.txt", "budget_lost": 4.2, "budget_held": False}


def test_a_budget_is_said_to_be_held_or_broken():
    held = BROKEN | {"budget_lost": 0.93, "budget_held": True, "budget_watched": ["base-samples"]}
    arms = [measured("tmkl", 1.05, 27.0, 4.3, **held), measured("kl", 1.05, 27.0, 4.3, **BROKEN)]
    report = report_of(PLAIN, *arms)
    says = [line for line in headline(report).details if "budget" in line]
    assert says == [
        "The budget of tmkl1 (1 % of perplexity on x.txt) was held: the probe lost 0.93.",
        "The budget of kl2 (1 % of perplexity on x.txt) was BROKEN: the probe lost 4.2.",
    ]
    assert all(line in " ".join(plain(report).split()) for line in says)
    assert any("measured on the text of base-samples" in line for line in caveats(report))
    many = report_of(*(measured("kl", 1.05, 27.0, 4.3, seed=s, **held) for s in range(5)), arms[1])
    says = [line for line in headline(many).details if "budget" in line]
    assert says[0] == "5 of 6 forgetting budgets were held."
    assert len(says) == 2


def test_a_run_that_did_not_end_well_is_said_so():
    report = report_of(PLAIN, measured("tmkl", 1.05, 27.0, 4.3, status="refused"))
    assert "tmkl1 ended as “refused”." in caveats(report)
    assert not any("ended as" in line for line in caveats(report_of(PLAIN)))


def test_who_broke_its_budget_is_not_recommended():
    better = measured("tmkl", 1.01, 26.2, 4.2, **BROKEN)
    worse = measured("kl", 1.2, 30.0, 4.4)
    worst = measured("none", 1.15, 40.0, 4.6)
    choice, _ = recommendations(report_of(better, worse, worst))
    assert choice is not None
    assert choice.adapter == "kl1"
    choice, _ = recommendations(report_of(replace(better, budget_held=True), worse, worst))
    assert choice is not None
    assert choice.adapter == "tmkl0"


def test_several_settings_keep_their_ranges_and_say_so():
    weights = [measured("tmkl", 1.05 + w, 27.0 - w, 4.25, weight=w) for w in (0.1, 0.3)]
    found = details(PLAIN, *weights)
    assert found[0].endswith("(ranges over 2 arms that differ in more than the seed).")
    assert "+2.3 % to +3.1 % at worst" in found[0]
    assert "Several settings of a kind are compared by their ranges" in found[2]


def test_one_arm_alone_is_held_to_its_interval():
    clear = measured("tmkl", 1.05, 27.0, 4.25)
    assert title(clear) == (
        "TMKL learned (adaptation perplexity 13.50 → 1.050) but forgot (retention perplexity "
        "+3.4 % [2.9, 4.1] at worst)."
    )
    noisy = measured("tmkl", 12.0, 27.0, 4.25, noise=1.0)
    said = title(noisy)
    assert "learned nothing that can be told from chance" in said
    assert "but forgot nothing that can be told from chance" in said


def test_change_is_neither_better_nor_worse_where_its_interval_holds_0():
    wide = measured("tmkl", 1.05, 27.0, 4.25, noise=0.5)
    shown = row(report_of(wide), "tmkl0", wide)
    assert shown["learned"].word == "better"
    assert shown["forgot"].word == "unclear"
    low, high = wide.retention_increase_interval_pct["python-reference"]
    assert low < 0 < high
    assert shown["forgot"].interval.startswith(f"[−{-low:.1f},")
    assert change(3.0).word == "no interval"
    assert change(3.0).interval == ""
    asked = {"adaptation_exact_match": 0.5}
    better = replace(wide, adaptation_exact_match=0.6)
    few = replace(report_of(wide), base=base(**asked, num_adaptation_prompts=24))
    many = replace(report_of(wide), base=base(**asked, num_adaptation_prompts=2400))
    assert row(few, "a", better)["match"].word == "unclear"
    assert row(many, "a", better)["match"].word == "better"


def test_intervals_of_arms_are_those_of_its_blocks_or_of_the_report():
    one = measured("tmkl", 1.05, 27.0, 4.25)
    found = increase_interval(one, "python-reference")
    assert found is not None
    assert [found.low, found.high] == one.retention_increase_interval_pct["python-reference"]
    assert found.value == pytest.approx(100 * (27.0 / 26.1 - 1))
    given = replace(
        one, retention_blocks={}, retention_increase_interval_pct={"python-reference": [1.0, 5.0]}
    )
    reported = increase_interval(given, "python-reference")
    assert reported is not None
    assert (reported.low, reported.high) == (1.0, 5.0)
    assert increase_interval(arm("tmkl", 1.05, 27.0, 4.25), "python-reference") is None


def test_versus_compares_every_setting_with_plain_fine_tuning():
    report = report_of(
        measured("tmkl", 1.2, 27.0, 4.25, seed=1),
        PLAIN,
        measured("kl", 1.11, 30.05, 4.3, seed=1, noise=0.5),
        arm("replay", 1.2, 27.0, 4.25),
    )
    assert yardstick(settings(report)).name == "none1"
    shown = versus(report)
    assert shown is not None
    assert shown["against"] == "none1"
    assert [r["name"] for r in shown["rows"]] == ["tmkl0", "kl2", "replay3"]
    tmkl, kl, replay = shown["rows"]
    assert tmkl["learned"].text.replace("\u00a0", " ") == "+14.3 %"
    assert tmkl["forgot"][0].text.replace("\u00a0", " ") == "−11.5 points"
    assert (tmkl["learned"].word, tmkl["forgot"][0].word) == ("worse", "better")
    assert kl["forgot"][0].word == "unclear"
    assert replay["learned"].interval == ""
    assert versus(report_of(PLAIN)) is None
    without = report_of(measured("kl", 1.2, 27.0, 4.25), measured("tmkl", 1.2, 27.0, 4.25, seed=1))
    first = versus(without)
    assert first is not None
    assert first["against"] == "kl0"


def test_recommended_is_the_knee_and_of_seeds_the_median():
    report = report_of(*seeds("none", 1.05, 60.0), *seeds("tmkl", 1.06, 27.0))
    choice, said = recommendations(report)
    assert choice is not None
    assert choice.setting.first.kind == "tmkl"
    assert choice.adapter == "tmkl4"  # its three seeds are tmkl3, tmkl4 and tmkl5
    assert choice.agreement == 1.0
    assert said == [choice]
    line = headline(report).details[-1]
    assert line.startswith("Of 2 settings, tmkl3 is the knee: 100% of what was learned")
    assert "so in 100 of 100 resamples" in line
    assert line.endswith("Take tmkl4, the median of 3 seeds.")


def test_recommended_says_how_often_chance_would_choose_otherwise():
    close = [measured("tmkl", 1.06, 27.0 + 0.05 * i, 4.25, seed=i, weight=i + 1.0) for i in (0, 1)]
    unsure = choose(settings(report_of(PLAIN, *close)), 13.5)
    assert unsure is not None
    assert unsure.agreement is not None
    assert 0.5 < unsure.agreement < 0.95
    nothing = choose(settings(report_of(measured("none", 14.0, 27.0, 4.25), PLAIN)), None)
    assert nothing is None
    assert choose(settings(report_of(PLAIN)), 13.5) is None


def test_terminal_shows_intervals_within_80_columns():
    report = Report(
        base=base(), arms={"none": PLAIN, "tmkl": measured("tmkl", 1.2, 27.0, 4.25, seed=1)}
    )
    stream = io.StringIO()
    Console(file=stream, width=80).print(table(report))
    lines = stream.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    low, high = PLAIN.retention_increase_interval_pct["python-reference"]
    assert f"[{low:.1f},{high:.1f}]" in stream.getvalue()
    assert "with its 95 % interval" in " ".join(stream.getvalue().split())
