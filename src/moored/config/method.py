"""The sections of a recipe that say how it is learned: adapter and optimizer.

Every key with its type, bounds, unit and default.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal, cast

from pydantic import BeforeValidator, Field, model_validator

from moored.config.section import (
    Ignored,
    Positive,
    Problem,
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


# Initial values that leave the base alone and add nothing to it, so that a run starts at the base
# and the reference is the base. A list of what is allowed: what PEFT adds is refused until then.
NEUTRAL_INITS = ("default", "gaussian")
_REWRITES = ("pissa", "olora", "corda", "lora_ga", "loftq")


class AdapterConfig(Section):
    """The trained part: one of the four adapters of the paper, see docs/adapters.md."""

    method: Annotated[Literal["lora", "dora", "randlora", "sinelora"], about("adapter family")] = (
        "lora"
    )
    r: Annotated[Positive, about("rank; of each random basis with randlora, whose size falls")] = 16
    alpha: Annotated[
        float, Field(gt=0, description="scale is alpha / r; left out with randlora: 20 r")
    ] = 32.0
    dropout: Annotated[float, Field(ge=0, lt=1, description="probability")] = 0.0
    target_modules: Annotated[
        list[str] | Literal["all-linear"],
        BeforeValidator(_target_modules),
        about("module names that get an adapter"),
    ] = "all-linear"
    use_rslora: Annotated[bool, about("scale by alpha / sqrt(r); not randlora")] = False
    init: Annotated[Text, about("of A, beside B = 0: default, gaussian; not randlora")] = "default"
    omega: Annotated[
        float, Field(gt=0, description="frequency of sinelora's sine, in radians per unit of B A")
    ] = 200.0

    @model_validator(mode="before")
    @classmethod
    def _fill_alpha(cls, values: Any) -> Any:
        """RandLoRA's own scale, as PEFT advises: its bases are small."""
        given = cast("dict[str, object]", values) if isinstance(values, dict) else {}
        r = given.get("r", cls.model_fields["r"].default)
        if given.get("method") == "randlora" and "alpha" not in given and isinstance(r, int):
            return given | {"alpha": 20.0 * min(max(r, 1), 2**31)}  # r is checked by itself
        return cast(object, values)

    def ignored(self) -> Iterator[Ignored]:
        """What another method knows."""
        others = {
            "lora": ("omega",),
            "dora": ("omega",),
            "randlora": ("use_rslora", "init", "omega"),
            "sinelora": (),
        }
        for name in others[self.method]:
            yield Ignored(name, ("method",), f"method is {self.method}")

    def problems(self) -> Iterator[Problem]:
        """The reference must be the base, and training must start there."""
        if self.init not in NEUTRAL_INITS:
            if self.init.startswith(_REWRITES):
                why = "rewrites the base's weights, so that the reference would be another model"
            elif self.init == "eva":
                why = "is computed from data beforehand, which is not done here"
            else:
                why = "is not one of those that start at the base and leave it alone"
            yield Problem("init", f"{self.init} {why}: use {' or '.join(NEUTRAL_INITS)}")

    def spread(
        self, *, nf4: bool, zero_stage: int, tensor_parallel_degree: int
    ) -> Iterator[Problem]:
        """Why it cannot be trained on such a mesh; `names` are the dotted keys of the others."""
        if self.method == "dora" and nf4 and zero_stage == 3:
            yield Problem(
                "method",
                "DoRA reads the 4-bit weights outside of their layers, where ZeRO-3 has them in "
                "parts: set parallel.zero_stage to 2",
                ("parallel.zero_stage", "model.quantization"),
            )
        if self.method == "randlora" and tensor_parallel_degree > 1:
            yield Problem(
                "method",
                "randlora's bases are shared by layers of all sizes and not spread over ranks: set "
                "parallel.tensor_parallel_degree to 1, or take lora, dora or sinelora",
                ("parallel.tensor_parallel_degree",),
            )


class OptimConfig(Section):
    """AdamW and its schedule."""

    learning_rate: Annotated[float, Field(gt=0, le=1, description="at the peak")] = 2e-4
    betas: Annotated[
        tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]],
        Field(strict=False, description="decay of the two moments per step"),
    ] = (0.9, 0.999)
    eps: Annotated[float, Field(gt=0, description="added to the denominator")] = 1e-8
    weight_decay: Annotated[float, Field(ge=0, description="per unit learning rate")] = 0.0
    schedule: Annotated[
        Literal["constant", "linear", "cosine"], about("after warm-up; the latter two end at 0")
    ] = "cosine"
    warmup_steps: Annotated[int, Field(ge=0, description="steps of linear rise")] = 0
    max_grad_norm: Annotated[
        Annotated[float, Field(gt=0)] | None, about("global L2 norm; null: no clipping")
    ] = 1.0
