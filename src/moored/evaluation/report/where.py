"""Where a policy drifts from its base on one text: by place, by token, and the worst examples.

Strict data of report.json; it is gathered in `drift_examples.py` and drawn in `page.py`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretch:
    """The drift at some distance from the start of a sample.

    Attributes:
        first: tokens of context before the first target of the stretch.
        last: and before its last; None: to the end.
        num_tokens: scored tokens.
        drift: mean KL(base || policy), nats per token.
    """

    first: int
    last: int | None
    num_tokens: int
    drift: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenDrift:
    """What one true token contributes.

    Attributes:
        token: as text.
        num_tokens: how often it was to be predicted.
        drift: mean KL(base || policy) there, nats.
        share: of the whole text's drift, 0 to 1.
    """

    token: str
    num_tokens: int
    drift: float
    share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenChoice:
    """A token that one of the models prefers, with both models' probabilities, 0 to 1."""

    token: str
    base: float
    adapted: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenExample:
    """A place where the drift is among the greatest.

    Attributes:
        sample: whose.
        context: the text just before it.
        target: the true token.
        drift: KL(base || policy), nats.
        base: the base's probability of the true token.
        adapted: the policy's.
        choices: what either model prefers, the base's first choice first.
    """

    sample: str
    context: str
    target: str
    drift: float
    base: float
    adapted: float
    choices: list[TokenChoice]


@dataclass(frozen=True, slots=True, kw_only=True)
class Where:
    """One text's drift, taken apart."""

    stretches: list[Stretch]
    tokens: list[TokenDrift]
    spots: list[TokenExample]
