"""The sections of a recipe that say how it is learned: adapter and optimizer.

Every key with its type, bounds, unit and default.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal, cast

from pydantic import BeforeValidator, Field

from moored.config.section import (
    Fraction,
    Ignored,
    Positive,
    Section,
    Text,
    about,
    invalid,
)


def _target_modules(value: object) -> object:
    names = cast("list[object]", value) if isinstance(value, list) else []
    if value == "all-linear" or (names and all(isinstance(n, str) and n for n in names)):
        return cast(object, value)
    if isinstance(value, str) and value:
        raise invalid(f"{value!r} is not a list: write [{value}]")
    raise invalid('expected "all-linear" or a list of module names such as [q_proj, v_proj]')


class AdapterConfig(Section):
    """The trained part. What would change the reference is refused by `model.py`."""

    method: Annotated[Literal["lora"], about("adapter family")] = "lora"
    r: Annotated[Positive, about("rank")] = 16
    alpha: Annotated[float, Field(gt=0, description="scale is alpha / r")] = 32.0
    dropout: Annotated[float, Field(ge=0, lt=1, description="probability")] = 0.0
    target_modules: Annotated[
        list[str] | Literal["all-linear"],
        BeforeValidator(_target_modules),
        about("module names that get an adapter"),
    ] = "all-linear"
    use_rslora: Annotated[bool, about("scale by alpha / sqrt(r)")] = False
    use_dora: Annotated[bool, about("learn the magnitude of each output apart")] = False
    init: Annotated[Text, about("default, gaussian, ... (peft init_lora_weights)")] = "default"


class OptimConfig(Section):
    """AdamW and its schedule."""

    learning_rate: Annotated[float, Field(gt=0, le=1, description="at the peak")] = 2e-4
    betas: Annotated[
        tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]],
        Field(strict=False, description="decay of the two moments per step"),
    ] = (0.9, 0.999)
    eps: Annotated[float, Field(gt=0, description="added to the denominator")] = 1e-8
    weight_decay: Annotated[float, Field(ge=0, description="per unit learning rate")] = 0.0
    schedule: Annotated[Literal["constant", "linear", "cosine"], about("after warm-up")] = "cosine"
    warmup_steps: Annotated[int, Field(ge=0, description="steps of linear rise")] = 0
    min_lr_ratio: Annotated[Fraction, about("last learning rate / peak")] = 0.0
    max_grad_norm: Annotated[
        Annotated[float, Field(gt=0)] | None, about("global L2 norm; null: no clipping")
    ] = 1.0

    def ignored(self) -> Iterator[Ignored]:
        """A constant schedule never falls."""
        if self.schedule == "constant":
            yield Ignored("min_lr_ratio", ("schedule",), "schedule is constant")
