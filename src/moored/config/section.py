"""What a section of a recipe is: strict, frozen, and able to say what in it makes no sense.

Which sections there are is in `schema.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, TypeAlias

from pydantic import BaseModel, ConfigDict

Key: TypeAlias = "tuple[str | int, ...]"


class Ignored(NamedTuple):
    """An option without effect: which field, because of which fields, and why, in words."""

    field: str
    switches: tuple[str, ...]
    why: str


class Problem(NamedTuple):
    """A broken relation, reported at `field` of the section that found it.

    `names` are the other fields it is about: when one of them is wrong by itself, that is what
    is reported.
    """

    field: str
    message: str
    names: tuple[str, ...] = ()


class Relation(NamedTuple):
    """One broken relation of a whole recipe: where it is reported, why, which keys it is about.

    `switches` is given for an option without effect: the keys that took its effect away.
    """

    key: Key
    message: str
    involves: tuple[Key, ...] = ()
    switches: tuple[Key, ...] = ()


class Section(BaseModel):
    """A strict, frozen group of options.

    `ignored` names the options that have no effect given the others (an error when somebody set
    them, and left out of the resolved copy); `problems` yields the relations that are broken.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )

    def ignored(self) -> Iterator[Ignored]:
        """Yields the options that have no effect."""
        yield from ()

    def problems(self) -> Iterator[Problem]:
        """Yields the broken relations between options of this section."""
        yield from ()
