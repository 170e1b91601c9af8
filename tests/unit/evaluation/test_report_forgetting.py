"""The section "What did it forget?": what it says, what it shows, what it leaves out."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from moored.evaluation.report import Report, Tally, TokenChoice, TokenExample, words
from moored.evaluation.report.forgetting import (
    MOST_ARMS,
    MOST_CHOICES,
    MOST_SPOTS,
    MOST_SPOTS_WORST,
    MOST_TEXTS_OPEN,
    choices,
    forgetting,
)
from moored.evaluation.report.page import html
from pagekit import check
from report_cases import CORPORA, arm, base, measured, report_of, where

PLACES = {CORPORA[0]: where(), CORPORA[1]: where(" of")}


def said(report: Report) -> str:
    """The words of the section, from its heading on."""
    words = check(html(report)).words.replace("\u00a0", " ")
    return words[words.index("What did it forget?") :]


def test_sentences_say_what_where_and_how():
    tmkl = measured("tmkl", 1.05, 30.0, 4.25, where=PLACES)
    assert said(report_of(tmkl)).startswith(
        "What did it forget? tmkl0 forgot most on python-reference: perplexity +14.9 % "
        "[14.3, 15.6]. Of the drift there (0.0400 nats per token), 75% is a change among the "
        "alternatives to the true token, 25% a shift of the true token’s own probability. It is "
        "greatest after 0 to 15 tokens of context (0.0900 nats per token). 52.0 % of the drift "
        "falls on ␣the and ↵ ."
    )


@pytest.mark.parametrize(
    ("forgot", "says"),
    [
        (measured("tmkl", 1.05, 26.0, 4.1), "forgot nothing: perplexity −0.38 % [−0.94, "),
        (
            measured("tmkl", 1.05, 26.5, 4.1, noise=0.5),
            "forgot nothing that can be told from chance: perplexity +1.5 % [−",
        ),
        (arm("tmkl", 1.05, 30.0, 4.25), "forgot most on python-reference: perplexity +14.9 %. The"),
        (arm("tmkl", 1.05, float("inf"), 4.25), "broke down on python-reference: its perplexity"),
        (arm("tmkl", 1.05), "was not measured on what it might have forgotten."),
    ],
)
def test_sentences_claim_no_more_than_is_known(forgot, says):
    assert said(report_of(forgot)).startswith(f"What did it forget? tmkl0 {says}")


def test_stretches_that_hardly_differ_are_not_ranked():
    flat = replace(where(), stretches=[replace(s, drift=0.05) for s in where().stretches])
    tmkl = measured("tmkl", 1.05, 30.0, 4.25, where={CORPORA[0]: flat})
    assert "It is much the same wherever in a sample. 52.0 % of" in said(report_of(tmkl))
    assert "It is greatest" not in said(report_of(tmkl))


def test_drift_is_split_into_parts_that_add_up():
    tmkl = measured("tmkl", 1.05, 30.0, 4.25, where=PLACES)
    split = {"python-reference": 0.1, "base-samples": 0.05}
    plain = replace(
        measured("none", 1.05, 60.0, 4.3),
        drift_nats_per_token={"python-reference": 0.4, "base-samples": 0.1},
        drift_alternatives_nats_per_token=split,
    )
    found, left = forgetting(report_of(plain, tmkl))
    assert left == 0
    assert [f.name for f in found] == ["tmkl1", "none0"]  # in focus first
    assert "= 0.1000 + 0.3000" in said(report_of(plain, tmkl))
    # All arms share one scale: the greatest drift of any.
    assert bars(report_of(plain, tmkl))[:2] == ["7.5", "2.5"]
    assert bars(report_of(plain, tmkl))[4:6] == ["25.0", "75.0"]
    # A report from before the split has one bar of the whole.
    assert bars(report_of(arm("tmkl", 1.05, 30.0, 4.25)))[:2] == ["100.0", "0.0"]


def bars(report: Report) -> list[str]:
    """The widths of the parts of the drift, corpus by corpus, in percent."""
    parts = [a for tag, a in check(html(report)).tags if tag == "i" and "style" in a]
    return [
        a["style"].removeprefix("width:").removesuffix("%")
        for a in parts
        if a.get("class") in ("alt", "shift")
    ]


def test_choices_stand_side_by_side_with_the_true_token():
    many = [TokenChoice(token=f"t{i}", base=0.2 - i / 50, adapted=i / 50) for i in range(10)]
    spot = TokenExample(
        sample="window-1",
        context="a",
        target="rare",
        drift=3.0,
        base=1e-5,
        adapted=0.2,
        choices=[*many, many[0]],  # both models' first choices may repeat
    )
    places = {CORPORA[0]: replace(where(), spots=[spot])}
    rows = choices(spot)
    assert [row["choice"].token for row in rows] == ["t0", "t1", "t2", "t7", "t8", "t9", "rare"]
    assert len(rows) == 2 * MOST_CHOICES + 1
    assert [row["choice"].token for row in rows if row["is_true"]] == ["rare"]
    assert [row["choice"].token for row in rows if row["base_first"]] == ["t0"]
    assert [row["choice"].token for row in rows if row["adapted_first"]] == ["t9"]
    page = check(html(report_of(measured("tmkl", 1.05, 30.0, 4.25, where=places)))).words
    assert "rare true <0.1 % 20.0 %" in page.replace("\u00a0", " ")


def test_true_token_is_marked_once_though_others_look_like_it():
    broken = [
        TokenChoice(token="�", base=0.5, adapted=0.1),
        TokenChoice(token="�", base=0.1, adapted=0.6),
    ]
    spot = replace(where().spots[0], target="�", base=0.1, adapted=0.6, choices=broken)
    assert [row["is_true"] for row in choices(spot)] == [False, True]


def test_many_arms_and_corpora_are_capped_and_counted():
    names = [f"corpus{i}" for i in range(12)]
    full = where(num_spots=12)
    crowd = {}
    for i in range(20):
        kind = "none" if i == 19 else "tmkl"
        crowd[f"{kind}-weight{i}"] = replace(
            measured(kind, 1.05, 30.0, 4.25, weight=float(i)),
            retention_ppl=dict.fromkeys(names, 11.0),
            retention_increase_pct=dict.fromkeys(names, 10.0),
            drift_nats_per_token={name: j / 100 for j, name in enumerate(names)},
            retention_blocks={},
            retention_increase_interval_pct={},
            where=dict.fromkeys(names, full),
        )
    report = Report(base=base(retention_ppl=dict.fromkeys(names, 10.0), num_tokens={}), arms=crowd)
    found, left = forgetting(report)
    assert (len(found), left) == (MOST_ARMS, 20 - MOST_ARMS)
    assert found[1].name == "none-weight19"  # plain fine-tuning is never the one left out
    assert [f.open for f in found] == [True, True] + [False] * (MOST_ARMS - 2)
    assert len(found[0].corpora) == 12
    assert len(found[0].apart) == MOST_TEXTS_OPEN
    assert found[0].num_texts_left == 12 - MOST_TEXTS_OPEN
    assert [len(where.spots) for _, where, _ in found[0].apart[:2]] == [
        MOST_SPOTS_WORST,
        MOST_SPOTS,
    ]
    assert [num_left for _, _, num_left in found[0].apart[:2]] == [4, 9]
    assert len(found[2].apart) == 1
    text = html(report)
    page = check(text).words
    assert f"{20 - MOST_ARMS} more arms are left out here" in page
    assert "8 more corpora are taken apart in report.json" in page
    assert "4 more examples are in report.json" in page
    # Beside the data that it carries, in bytes.
    assert text.index("data:application/json") < 800_000
    assert text.count('<details class="card forgot" open>') == 2
    # The worst corpus of each of them.
    assert text.count('<details class="apart" open>') == 2


EVIL = "</script><img src=x onerror=alert(1)>{{7*7}}{% raw %}"


@pytest.mark.parametrize(
    ("token", "shown"),
    [
        (" the", "␣the"),
        ("\n\n", "↵↵"),
        ("\t\r", "⇥␍"),
        ("\u00a0\u3000", "⍽⍽"),
        ("", "(empty)"),
        ("\u202eabc\u2066\u200b\x1b\ud800", "�abc����"),
        ("\u0301e", "◌\u0301e"),
        ("語" * 60, "語" * 23 + "…"),
        ("مرحبا", "مرحبا"),
    ],
)
def test_tokens_are_visible_and_tame(token, shown):
    assert words.token(token) == shown


def test_passages_keep_their_end():
    assert words.passage("a\nb  c\td\u2028") == "a↵ b  c⇥d↵ "
    assert words.passage("x" * 300, 10) == "…" + "x" * 9
    assert not set("\u202e\u2066\x00") & set(words.passage("\u202e\u2066\x00a"))


def test_hostile_examples_are_shown_and_do_nothing():
    bad = EVIL + "\u202e\x00\ud800"
    spot = replace(
        where().spots[0],
        sample=bad,
        context=bad * 3,
        target=bad,
        choices=[TokenChoice(token=bad, base=0.7, adapted=0.1)],
    )
    places = {CORPORA[0]: replace(where(bad), spots=[spot])}
    text = html(report_of(measured("tmkl", 1.05, 30.0, 4.25, where=places)))
    page = check(text)
    assert "{{7*7}}" in page.words
    assert not any(c in text for c in "\u202e\x00\ud800")


def test_figures_that_are_not_finite_make_a_page():
    nan = float("nan")
    spot = replace(
        where().spots[0],
        drift=nan,
        base=nan,
        adapted=nan,
        choices=[TokenChoice(token="a", base=nan, adapted=nan)],
    )
    stretches = [replace(s, drift=nan) for s in where().stretches]
    tokens = [replace(t, share=nan, drift=nan) for t in where().tokens]
    places = {CORPORA[0]: replace(where(), stretches=stretches, tokens=tokens, spots=[spot])}
    odd = measured("tmkl", 1.05, 30.0, 4.25, where=places)
    drift = {CORPORA[0]: nan, CORPORA[1]: None}
    odd = replace(odd, drift_nats_per_token=drift, drift_alternatives_nats_per_token=drift)
    check(html(report_of(odd)))


def test_last_words_stand_before_and_after():
    report = report_of(
        measured("tmkl", 1.05, 30.0, 4.25, last_word_accuracy={CORPORA[0]: 0.25}),
        last_word_accuracy={CORPORA[0]: 0.5},
    )
    assert "50.0 % → 25.0 % ▼ −25.0 points no interval" in said(report)
    right, fewer = [1] * 20 + [0] * 20, [0, 0, 1, 1] * 5 + [0] * 20
    tallies = [{CORPORA[0]: Tally(num=[1] * 40, hits=hits)} for hits in (right, fewer)]
    counted = replace(
        report,
        base=replace(report.base, last_word_tallies=tallies[0]),
        arms={n: replace(a, last_word_tallies=tallies[1]) for n, a in report.arms.items()},
    )
    assert "▼ −25.0 points worse [−" in said(counted)


def test_the_drift_of_a_text_has_an_interval():
    ends = r"0\.0400 \[0\.\d{4}, 0\.\d{4}\]"
    assert re.search(ends, said(report_of(measured("tmkl", 1.05, 30.0, 4.25))))
    assert not re.search(ends, said(report_of(arm("tmkl", 1.05, 30.0, 4.25))))
