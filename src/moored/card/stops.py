"""The tokens at which an exported model is to stop, as a card has them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """A token at which a model stops.

    Attributes:
        id: of the token.
        token: its text.
        count: turns of the training data that it ends; None: not counted.
    """

    id: int
    token: str
    count: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Stops:
    """Where generation stops.

    Attributes:
        learned: tokens that end what was learned, the most frequent first.
        base: at which the base stops.
    """

    learned: tuple[End, ...] = ()
    base: tuple[End, ...] = ()

    @property
    def ids(self) -> list[int]:
        """Of all of them, the learned first."""
        return list(dict.fromkeys(end.id for end in (*self.learned, *self.base)))

    @property
    def are_the_base_s(self) -> bool:
        """Whether the base stops at all that was learned."""
        return {end.id for end in self.learned} <= {end.id for end in self.base}
