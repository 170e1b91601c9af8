"""What the figures of a report do not show, a line each.

How numbers are shown is `words.py`'s.
"""

from __future__ import annotations

from moored.evaluation.report.bootstrap import FEWEST_BLOCKS, FEWEST_SEEDS, NUM_RESAMPLES
from moored.evaluation.report.budgets import watched
from moored.evaluation.report.comparing import Setting, settings, shared_corpora
from moored.evaluation.report.results import Report
from moored.evaluation.report.words import clean, count

# Of more comparisons than this some are clear by chance alone.
MANY_COMPARISONS = 10


def caveats(report: Report) -> list[str]:
    """What the figures do not show."""
    groups = settings(report)
    most = max((len(group.arms) for group in groups), default=0)
    measured = _measured(groups)
    few = any(len(group.arms) < FEWEST_SEEDS for group in groups)
    result = [_of_chance(most, measured, few)]
    if measured:
        num_intervals = (len(groups) - 1) * (1 + len(report.corpora))
        many = (
            f" Of {num_intervals} comparisons, about one in twenty looks clear by chance alone."
            if num_intervals > MANY_COMPARISONS
            else ""
        )
        result.append(
            f"Intervals are 95 % percentile bootstrap ({count(NUM_RESAMPLES)} resamples of blocks "
            f"of each text, paired between runs), each by itself.{many}"
        )
        result.append(
            "Shares of the drift, its places, tokens and examples describe the measured texts: "
            "they have no intervals."
        )
    lacking = [name for group in groups if not _measured([group]) for name in group.arms]
    if measured and lacking:
        names = ", ".join(clean(name, 40) for name in lacking[:5])
        more = f" and {len(lacking) - 5} more" if len(lacking) > 5 else ""
        result.append(f"No interval can be given for all of {names}{more}: {_WHY_NOT}.")
    tokens = report.base.num_tokens
    known = {name: tokens[name] for name in report.corpora if name in tokens}
    if known:
        sizes = ", ".join(f"{clean(name, 32)} {count(number)}" for name, number in known.items())
        result.append(f"Retention was measured on samples (scored tokens): {sizes}.")
    if len(known) < len(report.corpora):
        result.append("For some corpora the number of scored tokens was not recorded.")
    if report.base.num_adaptation_tokens is not None:
        held = f"Adaptation: {count(report.base.num_adaptation_tokens)} held-out target tokens"
        asked = report.base.num_adaptation_prompts
        result.append(held + (f", {count(asked)} prompts for the exact match." if asked else "."))
    if report.base.num_instructions is not None:
        prompts, full = report.base.num_instruction_prompts, report.base.num_instructions
        result.append(
            f"Instructions followed: {count(full)} constraints in {count(prompts)} prompts, so one "
            f"constraint is {100 / max(1, full):.1f} points; form only, not whether answers are "
            "right."
        )
    shared = shared_corpora(report)
    if apart := [corpus for corpus in report.corpora if corpus not in shared]:
        names = ", ".join(clean(corpus, 40) for corpus in apart)
        result.append(
            f"Not every arm was measured on {names}: what they forgot is compared on the others."
            if shared
            else "No retention corpus was measured for every arm: what they forgot is not "
            "compared, and the plot shows each at its own worst."
        )
    if len({arm.num_steps for arm in report.arms.values()}) > 1:
        result.append("The arms did not train for the same number of steps.")
    for name, arm in report.arms.items():
        if arm.status != "done":
            result.append(f"{clean(name, 40)} ended as “{clean(arm.status, 40)}”.")
    if seen := watched(report):
        texts = ", ".join(clean(corpus, 40) for corpus in seen)
        result.append(
            f"A forgetting budget was measured on the text of {texts}: what other texts lost says "
            "more."
        )
    result.append(
        "Perplexities compare only under the same tokenizer, texts and window length; text that "
        "the base was trained on understates forgetting elsewhere."
    )
    return result


_WHY_NOT = (
    f"their reports lack sums over blocks of text, or have fewer than {FEWEST_BLOCKS} of them; "
    "measure them again with `moored evaluate`"
)


def _measured(groups: list[Setting]) -> bool:
    """Whether any of their texts has an interval."""
    return any(
        len(blocks[0].num_tokens) >= FEWEST_BLOCKS
        for group in groups
        for corpus in (None, *group.increases)
        if (blocks := group.blocks(corpus))
    )


def _of_chance(most_seeds: int, measured: bool, some_few: bool) -> str:
    """What the differences may owe to chance."""
    if not measured:
        seeds = "One run per setting, and no" if most_seeds <= 1 else "No"
        return (
            f"{seeds} interval can be given: {_WHY_NOT}. Differences may be chance, and nothing "
            "here is a claim of significance."
        )
    if most_seeds <= 1:
        return (
            "One run per setting: intervals say what another sample of the texts would give, not "
            "what another seed would. Repeat with other seeds before relying on small differences."
        )
    if most_seeds < FEWEST_SEEDS:
        return (
            "Two seeds at most per setting: intervals are of their mean over other texts, and say "
            "nothing of other seeds. From three seeds on they do."
        )
    alone = " Settings with fewer have intervals over texts alone." if some_few else ""
    return (
        f"Up to {most_seeds} seeds per setting: intervals of {FEWEST_SEEDS} or more are over texts "
        f"and seeds.{alone}"
    )
