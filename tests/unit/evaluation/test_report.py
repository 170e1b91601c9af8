"""Reports as data: report.json, merging, the headline."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from moored.evaluation.report import Report, Tally, headline, merge
from moored.utils.errors import UserError, UserErrors
from report_cases import CORPORA, arm, base, one, report_of, strict_json, three

NAN, INF = math.nan, math.inf


def test_contract_of_report_json():
    data = three().to_json()
    assert set(data) == {"base", "arms"}
    assert set(data["arms"]) == {"none", "kl", "tmkl"}
    tmkl = data["arms"]["tmkl"]
    fixed = ("kind", "weight", "seed", "adaptation_ppl", "num_steps", "tokens_per_second")
    assert [tmkl[key] for key in fixed] == ["tmkl", 1.0, 0, 1.018, 80, 212.4]
    assert tmkl["retention_ppl"] == {"python-reference": 26.8, "base-samples": 4.25}
    assert tmkl["retention_increase_pct"]["python-reference"] == pytest.approx(2.681992, abs=1e-6)
    assert tmkl["drift_nats_per_token"] == {"python-reference": 0.04, "base-samples": 0.04}


def test_round_trip_also_of_what_is_no_number():
    odd = arm("none", NAN, INF, None, final_loss=-INF, seed=None, weight=None, status="refused")
    report = Report(base=base(adaptation_ppl=None), arms={"a": odd}, settings={"recipe": "x"})
    text = json.dumps(report.to_json(), allow_nan=False)
    assert repr(Report.from_json(strict_json(text))) == repr(report)  # repr, because nan != nan
    assert float(json.loads(text)["arms"]["a"]["final_loss"]) == -INF
    # The bare NaN of other writers is read as well.
    bare = Report.from_json(json.loads(text.replace('"NaN"', "NaN")))
    assert repr(bare) == repr(report)


MISSING = object()
TMKL = ("arms", "tmkl")


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (("base",), MISSING, "base: missing"),
        (("arms",), MISSING, "arms: missing"),
        (("arms",), {}, "arms: empty"),
        (("arms",), [], "arms: expected an object, got []"),
        ((*TMKL, "num_steps"), MISSING, "arms.tmkl.num_steps: missing"),
        ((*TMKL, "adaption_ppl"), 1, "unknown key; did you mean adaptation_ppl?"),
        (("extra",), 1, "extra: unknown key; known are base, arms, settings"),
        ((*TMKL, "adaptation_ppl"), "low", "adaptation_ppl: expected a number, got low"),
        ((*TMKL, "adaptation_ppl"), True, "adaptation_ppl: expected a number, got True"),
        ((*TMKL, "num_steps"), 80.5, "num_steps: expected an integer, got 80.5"),
        ((*TMKL, "num_steps"), -1, "num_steps: must not be negative, got -1"),
        ((*TMKL, "kind"), None, "kind: expected text, got None"),
        ((*TMKL, "kind"), " ", "kind: must not be empty"),
        ((*TMKL, "retention_ppl"), None, "retention_ppl: expected an object, got None"),
        ((*TMKL, "adaptation_ppl"), 0.018, "0.018 is no perplexity"),
        (("base", "retention_ppl", "base-samples"), 0.2, "0.2 is no perplexity"),
        ((*TMKL, "adaptation_ppl"), "-Infinity", "-inf is no perplexity"),
        ((*TMKL, "adaptation_exact_match"), 92.5, "92.5 is no fraction"),
        ((*TMKL, "top1_agreement"), {"base-samples": 98.0}, "98 is no fraction"),
        ((*TMKL, "drift_nats_per_token"), {"base-samples": -0.2}, "a divergence is never negative"),
        # An increase given as a fraction instead of in percent.
        (
            ("arms", "none", "retention_increase_pct", "python-reference"),
            1.36,
            "1.36 percent, but the perplexities give 136.015: evaluate the run again",
        ),
        ((*TMKL, "retention_ppl", "lambada"), 5.0, "corpus lambada is not in base.retention_ppl"),
        (("base", "num_tokens"), {"a": None}, "num_tokens.a: expected an integer, got None"),
        (("settings",), 3, "settings: expected an object, got 3"),
    ],
)
def test_strict(keys, value, message):
    data = json.loads(json.dumps(three().to_json()))
    Report.from_json(data)
    at = data
    for key in keys[:-1]:
        at = at[key]
    if value is MISSING:
        del at[keys[-1]]
    else:
        at[keys[-1]] = value
    with pytest.raises(UserErrors) as caught:
        Report.from_json(data, source="runs/a/report.json")
    assert message in str(caught.value)
    assert all(line.startswith("runs/a/report.json: ") for line in str(caught.value).splitlines())


def test_every_problem_is_reported_at_once():
    data = three().to_json()
    for name in ("none", "kl", "tmkl"):
        data["arms"][name] |= {"seed": "0", "num_steps": None}
    with pytest.raises(UserErrors) as caught:
        Report.from_json(data)
    assert len(caught.value.problems) == 6


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"{", "not valid JSON"), (b"\xff\xfe", "not valid JSON"), (b"[]", "expected an object")],
)
def test_unreadable_file_is_one_line(tmp_path, content, message):
    (tmp_path / "report.json").write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        Report.read(tmp_path / "report.json")
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    with pytest.raises(UserError, match="finish the run"):
        Report.read(tmp_path / "no.json")


def test_merge_keeps_names_that_are_unique():
    merged = merge([one("none"), one("kl"), one("tmkl")])
    assert list(merged.arms) == ["none", "kl", "tmkl"]
    assert merged.base == base()
    assert merge([three()]) == three()


@pytest.mark.parametrize(
    ("first", "second", "names"),
    [
        ({"seed": 0}, {"seed": 1}, ["tmkl-seed0", "tmkl-seed1"]),
        ({"weight": 0.5}, {"weight": 1.0}, ["tmkl-weight0.5", "tmkl-weight1"]),
        ({"direction": "forward"}, {"direction": "jsd"}, ["tmkl-forward", "tmkl-jsd"]),
        ({"adapter": "lora"}, {"adapter": "dora"}, ["tmkl-lora", "tmkl-dora"]),
        ({"seed": 0, "weight": 2.0}, {"seed": 1}, ["tmkl-weight2-seed0", "tmkl-weight1-seed1"]),
        ({}, {"adaptation": 1.2}, ["tmkl-runs/a", "tmkl-runs/b"]),
    ],
)
def test_merge_names_arms_by_what_varies(first, second, names):
    reports = [one("tmkl", **first), one("tmkl", **second)]
    merged = merge(reports, labels=["runs/a", "runs/b"])
    assert list(merged.arms) == names
    assert [a.adaptation_ppl for a in merged.arms.values()] == [
        report.arms["tmkl"].adaptation_ppl for report in reports
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "other"}, "model (HuggingFaceTB/SmolLM2-135M-Instruct and other)"),
        ({"revision": "main"}, "revision (0.1.2 and main)"),
        ({"quantization": "none"}, "quantization (nf4 and none)"),
        ({"adaptation_ppl": 13.9}, "adaptation_ppl (13.5 and 13.9)"),
        ({"retention_ppl": {CORPORA[0]: 24.0}}, "retention_ppl.python-reference (26.1 and 24)"),
        ({"retention_ppl": {CORPORA[0]: NAN}}, "retention_ppl.python-reference (26.1 and nan)"),
        ({"num_tokens": {CORPORA[1]: 100}}, "num_tokens.base-samples (4998 and 100)"),
    ],
)
def test_merge_refuses_another_base(changes, message):
    other = replace(one("none"), base=base(**changes))
    with pytest.raises(UserError) as caught:
        merge([one("tmkl"), other], labels=["a", "b"])
    assert message in str(caught.value)
    assert str(caught.value).startswith("a and b do not share a base")
    assert "\n" not in str(caught.value)


def test_merge_takes_the_first_answers_of_a_base_that_answers_otherwise():
    """Rounding may flip a greedy choice: that is no other base."""
    tally = Tally(num=[1, 1, 1], hits=[1, 1, 0])
    other = Tally(num=[1, 1, 1], hits=[1, 0, 0])
    first = replace(one("tmkl"), base=base(exact_match_tally=tally, adaptation_exact_match=2 / 3))
    second = replace(one("none"), base=base(exact_match_tally=other, adaptation_exact_match=1 / 3))
    merged = merge([first, second])
    assert merged.base.exact_match_tally == tally
    assert merged.base.adaptation_exact_match == 2 / 3
    with pytest.raises(UserError, match="num_adaptation_prompts"):
        merge([replace(x, base=replace(x.base, num_adaptation_prompts=n))
               for n, x in enumerate((first, second), 3)])  # fmt: skip


def test_merge_joins_last_words():
    tally = Tally(num=[1, 1], hits=[1, 0])
    words = {"last_word_accuracy": {"lambada": 0.5}, "last_word_tallies": {"lambada": tally}}
    merged = merge([one("tmkl"), replace(one("none"), base=base(**words))])
    assert merged.base.last_word_accuracy == {"lambada": 0.5}
    assert merged.base.last_word_tallies == {"lambada": tally}


def test_merge_joins_what_only_one_measured():
    first = replace(one("tmkl"), settings={"recipe": "a", "torch": "2.13"})
    second = Report(
        base=base(adaptation_ppl=13.5004, retention_ppl={"lambada": 74.1}, num_tokens={}),
        arms={"none": replace(arm("none", 1.0), retention_ppl={"lambada": 79.0})},
        settings={"recipe": "b", "torch": "2.13"},
    )
    merged = merge([first, second])
    assert merged.corpora == [*CORPORA, "lambada"]
    assert merged.base.retention_ppl["lambada"] == 74.1
    assert merged.settings == {"recipe": "a; b", "torch": "2.13"}
    with pytest.raises(UserError, match="no report"):
        merge([])


UNSURE = "; no interval says how sure that is"
PLAIN = arm("none", 1.0, 61.6, 9.8)


@pytest.mark.parametrize(
    ("arms", "title"),
    [
        (
            [PLAIN, arm("kl", 1.541, 26.5, 4.3), arm("tmkl", 1.018, 26.8, 4.25)],
            "TMKL learned about as much as plain fine-tuning and forgot less: retention perplexity "
            f"+2.7 % against +136 % at worst{UNSURE}.",
        ),
        (
            [PLAIN, arm("kl", 1.541, 26.5, 4.3)],
            "Unmasked KL learned less than plain fine-tuning but forgot less: retention perplexity "
            f"+2.4 % against +136 % at worst{UNSURE}.",
        ),
        (
            [arm("none", 1.5, 27.0, 4.2), arm("tmkl", 1.5, 30.0, 4.2)],
            "TMKL learned about as much as plain fine-tuning but forgot more: retention perplexity "
            f"+14.9 % against +3.4 % at worst{UNSURE}.",
        ),
        (
            [arm("none", 1.2, 27.0, 4.2), arm("tmkl", 1.5, 30.0, 4.2)],
            "TMKL learned less than plain fine-tuning and forgot more: retention perplexity "
            f"+14.9 % against +3.4 % at worst{UNSURE}.",
        ),
        (
            [arm("none", 1.5, 27.0, 4.2), arm("tmkl", 1.2, 26.9, 4.2)],
            "TMKL learned more than plain fine-tuning and forgot about as much: retention "
            f"perplexity +3.1 % against +3.4 % at worst{UNSURE}.",
        ),
        (
            [arm("none", 1.2, 26.2, 4.2), arm("tmkl", 1.2, 26.0, 4.1)],
            "TMKL learned about as much as plain fine-tuning and forgot about as much: retention "
            "perplexity −0.38 % against +0.38 % at worst; there was next to nothing to protect.",
        ),
        (
            [arm("none", 13.6, 30.0, 4.2), arm("tmkl", 13.4, 26.0, 4.1)],
            "Neither TMKL nor plain fine-tuning learned: adaptation perplexity 13.50 → 13.40 and "
            "13.60.",
        ),
        (
            [PLAIN, arm("tmkl", 20.0, 26.1, 4.2)],
            "TMKL learned nothing and got worse at the task where plain fine-tuning learned but "
            f"forgot less: retention perplexity 0 % against +136 % at worst{UNSURE}.",
        ),
        ([PLAIN, arm("tmkl", NAN, 26.1, 4.2)], "TMKL broke down: a perplexity is not finite."),
        (
            [arm("none", 1.0, INF, 9.8), arm("tmkl", 1.0, 26.1, 4.2)],
            "Plain fine-tuning broke down: a perplexity is not finite.",
        ),
        (
            [arm("tmkl", 1.018, 26.8, 4.25)],
            "TMKL learned (adaptation perplexity 13.50 → 1.018) but forgot (retention perplexity "
            "+2.7 % at worst).",
        ),
        (
            [arm("tmkl", 13.5, 26.0, 4.1)],
            "TMKL learned next to nothing (adaptation perplexity 13.50 → 13.50) but forgot nothing "
            "(retention perplexity −0.38 % at worst).",
        ),
        (
            [arm("none", 1.0), arm("tmkl", 1.0)],
            "TMKL learned about as much as plain fine-tuning; what was forgotten was not measured.",
        ),
        (
            [arm("none", None, 61.6, 9.8), arm("tmkl", None, 26.8, 4.2)],
            "TMKL forgot less than plain fine-tuning: retention perplexity +2.7 % against +136 % "
            f"at worst{UNSURE}; what was learned was not measured.",
        ),
        # Ranges, not the luckiest of several runs.
        (
            [PLAIN, arm("tmkl", 1.01, 26.8, 4.2), arm("tmkl", 1.02, 63.0, 4.2)],
            "TMKL (2 arms) learned about as much as plain fine-tuning and forgot in the same "
            "range: retention perplexity +2.7 % to +141 % against +136 % at worst.",
        ),
    ],
)
def test_headline_says_what_the_figures_say(arms, title):
    assert headline(report_of(*arms)).title.replace("\u00a0", " ") == title


def test_headline_details_name_the_corpus_and_every_kind():
    details = [line.replace("\u00a0", " ") for line in headline(three()).details]
    assert details == [
        "TMKL: adaptation perplexity 13.50 → 1.018; retention perplexity +2.7 % at worst "
        "(python-reference).",
        "Plain fine-tuning: adaptation perplexity 13.50 → 1.000; retention perplexity +136 % at "
        "worst (python-reference).",
        "Unmasked KL: adaptation perplexity 13.50 → 1.541; retention perplexity +2.4 % at worst "
        "(base-samples).",
        "Of 3 settings, tmkl is the knee: 99% of what was learned at most, with +2.7 % of "
        "retention perplexity at worst, against +136 % at most.",
    ]


@pytest.mark.parametrize(
    ("figures", "says"),
    [
        # scale, adaptation, worst retention; the base has 13.5 and 26.1
        (
            [(0.25, 6.0, 26.2), (0.5, 1.6, 27.0), (None, 1.0, 61.6)],
            "Of 3 scales of the adapter (plain fine-tuning), 0.5 is the knee: 82% of what was "
            "learned at most, with +3.4 % of retention perplexity at worst, against +136 % at "
            "most.",
        ),
        (
            [(0.5, 5.0, 26.1), (None, 1.2, 26.2)],
            "Of 2 scales of the adapter (plain fine-tuning), 1 learned most; none forgot more "
            "than +0.38 %.",
        ),
        ([(0.5, 14.0, 30.0), (None, 15.0, 61.6)], None),  # nothing was learned
        ([(0.5, None, 30.0), (None, 15.0, 61.6)], None),
    ],
)
def test_headline_recommends_a_scale(figures, says):
    arms = [arm("none", learned, kept, 4.2, scale=scale) for scale, learned, kept in figures]
    report = merge([replace(three(), arms={f"a{i}": one}) for i, one in enumerate(arms)])
    found = headline(report)
    details = [line.replace("\u00a0", " ") for line in found.details]
    assert [line for line in details if "scales" in line] == ([says] if says else [])
    # What the run itself did is what was measured as trained.
    assert found.title == headline(replace(report, arms={"none": arms[-1]})).title
