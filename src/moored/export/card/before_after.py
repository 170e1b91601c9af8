"""The part of a forgetting card that says what was learned and forgotten: tables and caveats.

The figures are `facts.py`'s; the rest of the page is `markdown.py`'s.
"""

from __future__ import annotations

from collections.abc import Iterator

from moored.evaluation.report import rise_pct
from moored.evaluation.report.words import count, fraction, nats, percent, ppl
from moored.export.card.facts import Card, Figures, TextFacts
from moored.export.card.markdown_escape import NOT_KNOWN, code, commands, known, table, text


def figures(card: Card) -> Iterator[str]:
    """The section, paragraph by paragraph."""
    figures = card.figures
    yield "## What it learned, what it forgot"
    if figures.missing is not None:
        yield commands(figures.missing)
        return
    rows = [("**the new task**, held-out answers", *_pair(figures))]
    rows += [(_corpus(one), *_change(one)) for one in figures.retention]
    yield table(("perplexity (lower is better)", "base", "with the adapter", "change"), rows)
    yield _exact(figures)
    yield from _last_words(figures)
    if figures.budget is not None:
        held = "held" if figures.budget_held else "**not held**"
        lost = NOT_KNOWN if figures.budget_lost is None else f"{figures.budget_lost:.3g}"
        yield f"A forgetting budget of {text(figures.budget, 80)} was {held}: {lost} were lost."
    if not figures.retention:
        yield (
            "**Forgetting was not measured**: the recipe names no `retention` text, so nothing is "
            "known of what this model lost elsewhere."
        )
    else:
        yield table(
            ("drift from the base, per token", "KL(base ‖ adapted), nats", "target left out, nats",
             "same first choice", "tokens scored"),
            [
                (
                    code(one.name, 40),
                    known(nats(one.kl_nats_per_token)),
                    known(nats(one.masked_kl_nats_per_token)),
                    known(fraction(one.top1_agreement)),
                    known(count(one.num_tokens)),
                )
                for one in figures.retention
            ],
        )  # fmt: skip
    yield " ".join(_caveats(card))


def _corpus(one: TextFacts) -> str:
    source = f" ({text(one.source, 60)})" if one.source and one.source != one.name else ""
    return f"{code(one.name, 40)}{source}"


def _pair(figures: Figures) -> tuple[str, str, str]:
    before, after = figures.adaptation_ppl_before, figures.adaptation_ppl_after
    return known(ppl(before)), known(ppl(after)), known(percent(rise_pct(before, after)))


def _change(one: TextFacts) -> tuple[str, str, str]:
    pct = f"**{known(percent(one.increase_pct))}**"
    if one.increase_interval_pct is not None:
        low, high = one.increase_interval_pct
        pct += f" ({percent(low)} to {percent(high)})"
    return known(ppl(one.ppl_before)), known(ppl(one.ppl_after)), pct


def _last_words(figures: Figures) -> Iterator[str]:
    for one in figures.retention:
        if one.last_word_after is not None:
            shares = known(fraction(one.last_word_before)), known(fraction(one.last_word_after))
            yield (
                f"Of the passages of {code(one.name, 40)}, the last word was predicted in "
                f"{shares[0]} before and {shares[1]} after."
            )


def _exact(figures: Figures) -> str:
    before, after = figures.exact_match_before, figures.exact_match_after
    if before is None and after is None:
        return ""
    asked = figures.num_adaptation_prompts
    of = f"Of {count(asked)} held-out prompts" if asked else "Of the held-out prompts"
    shares = known(fraction(before)), known(fraction(after))
    return f"{of}, {shares[0]} were answered exactly before and {shares[1]} after."


def _caveats(card: Card) -> Iterator[str]:
    figures, merged = card.figures, card.merged
    if merged is not None:
        yield (
            "All of this was measured with the adapter beside its base, before it was merged; from "
            f"that the merged model is {nats(merged.kl_trained_merged_nats_per_token)} nats per "
            f"token away (the base: {nats(merged.kl_trained_base_nats_per_token)})."
        )
    if (tokens := figures.num_adaptation_tokens) is not None:
        yield f"The new task was scored on {count(tokens)} tokens."
    if any(one.increase_interval_pct for one in figures.retention):
        yield "In brackets: 95 % bootstrap intervals over the text; seeds may differ by more."
    else:
        yield "These are figures of one run: small differences may be chance."
    if figures.retention:
        yield "Text that the base was trained on understates forgetting elsewhere."
    if figures.measured_on is not None and figures.measured_on != card.base.revision:
        yield (
            f"They were measured on revision {code(figures.measured_on)} of the base, which is "
            "another than the one below."
        )
