"""What a section of a recipe is: strict, frozen, and able to say what in it makes no sense.

Also holds types that many keys share. Sections are `inputs.py`, `running.py` and `regularizer.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

Key: TypeAlias = "tuple[str | int, ...]"


def dotted_key(key: Key) -> str:
    """`("data", "train", 0)` -> `data.train.0`."""
    return ".".join(str(part) for part in key)


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


def one_of(section: Section, names: tuple[str, ...], *, what: str) -> Iterator[Problem]:
    """Yields a problem unless exactly one of the options is set; `what` it says, in words."""
    given = [name for name in names if getattr(section, name) is not None]
    if not given:
        choice = ", ".join(names[:-1]) + f" or {names[-1]}"
        yield Problem("", f"{choice} is missing: set one of them ({what})", names)
    elif len(given) > 1:
        rest = " and ".join(given[1:])
        yield Problem(
            given[1], f"{given[0]} and {rest} exclude each other: keep one ({what})", names
        )


def invalid(message: str) -> PydanticCustomError:
    """What a validator raises, with this message."""
    # As a value, not as the template: braces in it must not be taken for placeholders.
    return PydanticCustomError("recipe", "{message}", {"message": message})


def _path(value: object) -> object:
    if isinstance(value, Path):
        return value
    if isinstance(value, str) and value:
        return Path(value)
    raise invalid(f"expected a path, got {value!r}")


def about(description: str) -> Any:
    """What an option is and its unit, as said in messages about it."""
    return Field(description=description)


Text = Annotated[str, Field(min_length=1)]
RecipePath = Annotated[Path, BeforeValidator(_path)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(ge=1)]
