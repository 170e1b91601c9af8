"""What did it forget? That section of the page, arm by arm: a sentence, then the details.

The data are `where.py`'s and `results.py`'s; how they look is the template's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from moored.evaluation.report import bootstrap, words
from moored.evaluation.report.choosing import Recommendation
from moored.evaluation.report.comparing import increase_interval, settings
from moored.evaluation.report.headline import SAME_INCREASE_POINTS, compared
from moored.evaluation.report.results import ArmResult, Report
from moored.evaluation.report.tables import Change, change, share_change
from moored.evaluation.report.where import Stretch, TokenDrift, TokenExample, Where

# A page must stay one that a person reads: what is beyond is counted, and is in report.json.
MOST_ARMS = 8
MOST_TEXTS_OPEN, MOST_TEXTS = 4, 1  # corpora taken apart: of arms that stand open, of others
MOST_SPOTS_WORST, MOST_SPOTS = 8, 3  # examples: of an arm's worst corpus, of others
MOST_TOKENS = 10
MOST_CHOICES = 3  # of each model

# Stretches whose drifts differ by less than this factor are not told apart: they have no intervals.
MUCH_THE_SAME = 1.25


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRow:
    """One corpus of an arm; widths are in percent of the greatest drift on the page.

    `drift_ends` is the drift's interval, empty without one; `last_words` are before and after.
    """

    name: str
    rise: Change | None
    drift: float | None
    alternatives: float | None
    shift: float | None
    alternatives_width: str
    shift_width: str
    agreement: float | None
    drift_ends: str
    last_words: tuple[float | None, float | None] | None
    last_words_change: Change | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """A labelled figure and its share of the greatest beside it, in percent."""

    label: str
    num_tokens: int
    drift: float
    share: float | None
    width: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ChoiceRow:
    """A token that either model prefers at a spot."""

    token: str
    is_true: bool
    base: float
    adapted: float
    base_width: str
    adapted_width: str
    base_first: bool
    adapted_first: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class SpotCard:
    """One of the worst examples."""

    sample: str
    context: str
    target: str
    drift: float
    base: float
    adapted: float
    choices: list[ChoiceRow]


@dataclass(frozen=True, slots=True, kw_only=True)
class Apart:
    """One corpus of an arm taken apart."""

    name: str
    open: bool
    stretches: list[Bar]
    tokens: list[Bar]
    spots: list[SpotCard]
    num_spots_left: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Forgotten:
    """What one arm forgot.

    Attributes:
        name: the arm's.
        arm: its figures.
        open: whether its details stand open.
        says: the sentences, after its name.
        tokens: that carry most of the drift on the worst corpus.
        tokens_share: of that drift, 0 to 1.
        texts: a row per corpus.
        apart: corpora taken apart, the worst first.
        num_texts_left: corpora that could be taken apart and are not.
    """

    name: str
    arm: ArmResult
    open: bool
    says: str
    tokens: list[str]
    tokens_share: float
    texts: list[TextRow]
    apart: list[Apart]
    num_texts_left: int


def forgetting(report: Report, choice: Recommendation | None = None) -> tuple[list[Forgotten], int]:
    """What the arms forgot, those of the headline first, and how many arms are left out.

    Args:
        report: the figures.
        choice: the recommended setting, which stands for its kind.
    """
    focus, plain, _ = compared(report)
    wanted = [group.settings[0].median() for group in (focus, plain) if group]
    if choice and choice.setting in focus.settings:
        wanted[0] = choice.adapter
    # Of several seeds first the median of each setting.
    medians = [group.median() for group in settings(report)]
    order = list(dict.fromkeys([*wanted, *medians, *report.arms]))
    shown = order[:MOST_ARMS]
    drifts = [
        drift
        for name in shown
        for drift in report.arms[name].drift_nats_per_token.values()
        if drift is not None and math.isfinite(drift)
    ]
    most = max(drifts, default=0.0)
    found = [_forgotten(report, name, most, is_open=name in wanted) for name in shown]
    return found, len(order) - len(shown)


def _forgotten(report: Report, name: str, most: float, *, is_open: bool) -> Forgotten:
    arm = report.arms[name]
    drift = arm.drift_nats_per_token
    worst = arm.worst()
    first = worst[0] if worst else None
    # Then by how far they drifted; what was not measured last.
    texts = sorted(
        report.corpora,
        key=lambda corpus: (corpus != first, -_finite(drift.get(corpus))),
    )
    taken = [corpus for corpus in texts if corpus in arm.where]
    kept = taken[: MOST_TEXTS_OPEN if is_open else MOST_TEXTS]
    top = _finite_first(arm.where[first].tokens, 3) if first in arm.where and is_open else []
    return Forgotten(
        name=name,
        arm=arm,
        open=is_open,
        says=_says(arm, in_full=is_open),
        tokens=[words.token(item.token, 16) for item in top],
        tokens_share=sum(item.share for item in top),
        texts=[_text(report, arm, corpus, most) for corpus in texts],
        apart=[_apart(corpus, arm.where[corpus], is_worst=i == 0) for i, corpus in enumerate(kept)],
        num_texts_left=len(taken) - len(kept),
    )


def _says(arm: ArmResult, *, in_full: bool) -> str:
    """The arm's sentences, after its name and but for its tokens; in full for those in focus."""
    worst = arm.worst()
    if worst is None:
        return "was not measured on what it might have forgotten."
    corpus, pct = worst
    text = words.clean(corpus, 40)
    if not math.isfinite(pct):
        return f"broke down on {text}: its perplexity there is not finite."
    found = increase_interval(arm, corpus)
    ends = f" {words.bounds(found.low, found.high)}" if found else ""
    rise = f"perplexity {words.percent(pct)}{ends}"
    if pct <= 0 and not (found and found.high > SAME_INCREASE_POINTS):
        lost = f"forgot nothing: {rise} at worst, on {text}"
    elif found and not found.is_clear:
        lost = f"forgot nothing that can be told from chance: {rise} at worst, on {text}"
    else:
        lost = f"forgot most on {text}: {rise}"
    return " ".join([f"{lost}.", *(_drifted(arm, corpus) if in_full else [])])


def _drifted(arm: ArmResult, corpus: str) -> list[str]:
    """How much of the drift is what, and where in a sample it is greatest."""
    drift = arm.drift_nats_per_token.get(corpus)
    if drift is None or not math.isfinite(drift):
        return []
    of = f"{words.nats(drift)} nats per token"
    alternatives = arm.drift_alternatives_nats_per_token.get(corpus)
    said: list[str] = []
    if alternatives is None or not math.isfinite(alternatives) or drift <= 0:
        said.append(f"The drift there is {of}.")
    else:
        share = min(1.0, max(0.0, alternatives / drift))
        said.append(
            f"Of the drift there ({of}), {share:.0%} is a change among the alternatives to the "
            f"true token, {1 - share:.0%} a shift of the true token’s own probability."
        )
    where = arm.where.get(corpus)
    stretches = [s for s in where.stretches if math.isfinite(s.drift)] if where else []
    if len(stretches) > 1:
        least, most = (pick(stretches, key=lambda item: item.drift) for pick in (min, max))
        if most.drift < MUCH_THE_SAME * least.drift:
            said.append("It is much the same wherever in a sample.")
        else:
            mean = f"{words.nats(most.drift)} nats per token"
            said.append(f"It is greatest {_after(most)} of context ({mean}).")
    return said


def _after(stretch: Stretch) -> str:
    if stretch.last is None:
        return f"after {stretch.first:,} tokens or more"
    return f"after {stretch.first:,} to {stretch.last:,} tokens"


def _text(report: Report, arm: ArmResult, corpus: str, most: float) -> TextRow:
    drift = arm.drift_nats_per_token.get(corpus)
    alternatives = arm.drift_alternatives_nats_per_token.get(corpus)
    shift = None
    if drift is not None and alternatives is not None:
        shift = max(0.0, drift - alternatives) if math.isfinite(drift - alternatives) else math.nan
    pct = arm.retention_increase_pct.get(corpus)
    before = report.base.last_word_accuracy.get(corpus)
    after = arm.last_word_accuracy.get(corpus)
    blocks = arm.retention_blocks.get(corpus)
    ends = bootstrap.interval([blocks], bootstrap.drift) if blocks else None
    # Without the split the whole bar is of one kind.
    return TextRow(
        name=corpus,
        rise=None if pct is None else change(pct, increase_interval(arm, corpus)),
        drift=drift,
        alternatives=alternatives,
        shift=shift,
        alternatives_width=_width(drift if alternatives is None else alternatives, most),
        shift_width=_width(shift, most),
        agreement=arm.top1_agreement.get(corpus),
        drift_ends=f"[{words.nats(ends.low)}, {words.nats(ends.high)}]" if ends else "",
        last_words=None if before is None and after is None else (before, after),
        last_words_change=share_change(
            (before, after),
            (report.base.last_word_tallies.get(corpus), arm.last_word_tallies.get(corpus)),
        ),
    )


def _apart(corpus: str, where: Where, *, is_worst: bool) -> Apart:
    tokens = _finite_first(where.tokens, MOST_TOKENS)
    spots = sorted(where.spots, key=lambda spot: -_finite(spot.drift))
    kept = spots[: MOST_SPOTS_WORST if is_worst else MOST_SPOTS]
    most_share = max((_finite(item.share) for item in tokens), default=0.0)
    most_drift = max((_finite(item.drift) for item in where.stretches), default=0.0)
    return Apart(
        name=corpus,
        open=is_worst,
        stretches=[
            Bar(
                label=_after(item),
                num_tokens=item.num_tokens,
                drift=item.drift,
                share=None,
                width=_width(item.drift, most_drift),
            )
            for item in where.stretches
        ],
        tokens=[
            Bar(
                label=words.token(item.token),
                num_tokens=item.num_tokens,
                drift=item.drift,
                share=item.share,
                width=_width(item.share, most_share),
            )
            for item in tokens
        ],
        spots=[_spot(spot) for spot in kept],
        num_spots_left=len(spots) - len(kept),
    )


def _finite_first(tokens: Sequence[TokenDrift], most: int) -> list[TokenDrift]:
    known = [item for item in tokens if math.isfinite(item.share)]
    return sorted(known, key=lambda item: -item.share)[:most]


def _spot(spot: TokenExample) -> SpotCard:
    """An example; the choices are either model's first ones, and the true token in any case."""
    # A token that both prefer may stand there twice.
    pairs = dict.fromkeys((c.token, c.base, c.adapted) for c in spot.choices)
    by_base = sorted(pairs, key=lambda pair: -_finite(pair[1]))
    by_adapted = sorted(pairs, key=lambda pair: -_finite(pair[2]))
    true = next((pair for pair in by_base if _is_true(pair, spot)), None)
    if true is None:
        true = (spot.target, spot.base, spot.adapted)
    wanted = {*by_base[:MOST_CHOICES], *by_adapted[:MOST_CHOICES]}
    rows = [pair for pair in by_base if pair in wanted]
    rows += [] if true in rows else [true]
    return SpotCard(
        sample=words.clean(spot.sample, 60),
        context=words.passage(spot.context),
        target=words.token(spot.target),
        drift=spot.drift,
        base=spot.base,
        adapted=spot.adapted,
        choices=[
            ChoiceRow(
                token=words.token(pair[0]),
                is_true=pair is true,
                base=pair[1],
                adapted=pair[2],
                base_width=_width(pair[1], 1.0),
                adapted_width=_width(pair[2], 1.0),
                base_first=bool(by_base) and pair is by_base[0],
                adapted_first=bool(by_adapted) and pair is by_adapted[0],
            )
            for pair in rows
        ],
    )


def _is_true(pair: tuple[str, float, float], spot: TokenExample) -> bool:
    # Several tokens may be one text; probabilities come by two ways, so they are equal but for
    # rounding.
    return pair[0] == spot.target and math.isclose(pair[1], spot.base, rel_tol=0.01, abs_tol=1e-6)


def _finite(value: float | None) -> float:
    return value if value is not None and math.isfinite(value) else 0.0


def _width(value: float | None, most: float) -> str:
    """In percent of the track."""
    share = _finite(value) / most if most > 0 else 0.0
    return f"{100 * min(1.0, max(0.0, share)):.1f}"
