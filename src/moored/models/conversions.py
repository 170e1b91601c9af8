"""How tensors in a checkpoint's files make up those of a model, and back.

A tensor has a name in the files and one in the model: mostly the same, and where they are not
(experts one by one in the files and in one tensor in the model), transformers' own conversions lead
there and back. Nothing is read or written here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    apply_renamings,
    dot_natural_key,
    rename_source_key,
)


class OtherNamesError(Exception):
    """The files of a base name its tensors otherwise than the model does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Tensors of the files that stand for tensors of the model.

    Attributes:
        stored: their names in the files, in the order in which they are converted.
        names: their names in the model.
        there: from the files to the model; None where a tensor is the same in both.
        back: from the model to the files.
    """

    stored: tuple[str, ...]
    names: tuple[str, ...]
    there: Step | None = None
    back: Step | None = None

    def to_model(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The model's tensors of the files'."""
        if self.there is None:
            return {self.names[0]: tensors[self.stored[0]]}
        return self.there.run(tensors)

    def to_files(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The files' tensors of the model's."""
        if self.back is None:
            return {self.stored[0]: tensors[self.names[0]]}
        return self.back.run(tensors)

    def of_expert(self, expert: int) -> Part:
        """What stands for one expert alone, where the files have experts one by one."""
        own = tuple(name for name in self.stored if index_of(name) == expert)
        return replace(self, stored=own, back=None)

    @property
    def one_by_one(self) -> bool:
        """Whether every tensor of the files is of one expert."""
        return self.there is not None and all(index_of(name) is not None for name in self.stored)


def index_of(stored: str) -> int | None:
    """Which expert a tensor of the files is of, by its name; None where it is not of one."""
    match = re.search(r"\bexperts\.(\d+)\.", stored)
    return int(match[1]) if match else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One conversion of transformers, in one direction.

    Attributes:
        converter: its own, unused; each run takes a copy, since it collects what it converts.
        key: the name that the converter goes by.
        patterns: by the names of what goes in, in this order: which of its patterns each fits.
        renamed: names of what comes out, by the converter's names for them.
        model: without weights, for conversions that ask for its sizes.
    """

    converter: WeightConverter
    key: str
    patterns: Mapping[str, str]
    renamed: Mapping[str, str]
    model: Any

    def run(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What comes out, by name, of what is given."""
        converter = deepcopy(self.converter)
        for name, pattern in self.patterns.items():
            if name in tensors:
                converter.add_tensor(self.key, name, pattern, tensors[name])  # pyright: ignore
        out = converter.convert(self.key, model=self.model, config=self.model.config)
        whole = {name: t[0] if isinstance(t, list) else t for name, t in out.items()}
        return {self.renamed.get(name, name): tensor for name, tensor in whole.items()}


def parts_of(model: Any, shapes: Mapping[str, list[int]]) -> list[Part]:
    """How a base's files make up its model, as transformers would load them.

    Tensors that the model has no place for are left out.

    Args:
        model: without weights.
        shapes: of the tensors in the files, by name.

    Raises:
        OtherNamesError: transformers' conversions do not lead back to the files' names and shapes.
    """
    conversions = get_model_conversion_mapping(model)
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    of_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    prefix, known = model.base_model_prefix, model.state_dict()
    parts: list[Part] = []
    converted: dict[str, dict[str, str]] = {}  # the model's name: files' names and patterns
    for name in sorted(shapes, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, known)
        if target not in known and name in known:  # as transformers has it
            target, pattern = rename_source_key(name, [], [], prefix, known)
        if target not in known:
            continue
        if pattern is None:
            parts.append(Part(stored=(name,), names=(target,)))
        else:
            converted.setdefault(target, {})[name] = pattern
    for target, patterns in converted.items():
        converter = of_pattern[next(iter(patterns.values()))]
        try:
            parts.append(_converted(model, target, converter, patterns, renamings, shapes))
        except (ValueError, KeyError, RuntimeError, TypeError, NotImplementedError) as error:
            raise OtherNamesError(target) from error
    return parts


def _converted(
    model: Any,
    target: str,
    converter: WeightConverter,
    patterns: Mapping[str, str],
    renamings: list[WeightRenaming],
    shapes: Mapping[str, list[int]],
) -> Part:
    """A part whose tensors are converted, tried on tensors without values."""
    there = Step(converter=converter, key=target, patterns=patterns, renamed={}, model=model)
    known = model.state_dict()
    whole = there.run({name: torch.empty(shapes[name], device="meta") for name in patterns})
    for name, tensor in whole.items():
        if tensor.shape != known[name].shape:
            raise ValueError(f"{name} has shape {list(tensor.shape)} once it is converted")
    reverse: Any = converter.reverse_transform()
    keys = {name: reverse.rename_source_key(name) for name in sorted(whole, key=dot_natural_key)}
    back = Step(
        converter=reverse,
        key=next(iter(keys.values()))[0],
        patterns={name: pattern for name, (_, pattern) in keys.items()},
        renamed=_renamed(patterns, renamings, model.base_model_prefix),
        model=model,
    )
    again = back.run(whole)
    if {name: list(t.shape) for name, t in again.items()} != {n: shapes[n] for n in patterns}:
        raise ValueError(f"{target} does not lead back to its files")
    return Part(stored=tuple(patterns), names=tuple(whole), there=there, back=back)


def _renamed(stored: Iterable[str], renamings: list[WeightRenaming], prefix: str) -> dict[str, str]:
    """The files' names by those that a conversion has for them, with the model's prefix or not."""
    names = {apply_renamings(name, renamings): name for name in stored}
    for key, name in list(names.items()):
        names.setdefault(f"{prefix}.{key}", name)
        names.setdefault(key.removeprefix(f"{prefix}."), name)
    return names
