"""The section of a recipe that says what holds the policy near its base, and how much of it.

Every key with its type, bounds, unit and default. An option of the loss is here, as a key or as a
property that follows from keys, by its name in `Objective` of divergence.py, and nowhere else but
there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from moored.config.inputs import Corpus, Source, short_name
from moored.config.section import Ignored, Key, Positive, Problem, Section, about, one_of

DIVERGENT = ("kl", "tmkl", "asft")  # kinds with a divergence from the base where they learn
WEIGHTED = (*DIVERGENT, "mol", "l2", "replay")  # kinds whose weight means something
LEAST_WEIGHT = 1e-3  # to which a budget with room lets the weight fall


class Budget(Section):
    """How much may be forgotten of a probe text; a controller then moves the weight to hold it."""

    retention_increase_pct: Annotated[
        Annotated[float, Field(gt=0)] | None, about("rise of the probe's perplexity, percent")
    ] = None
    drift_nats_per_token: Annotated[
        Annotated[float, Field(gt=0)] | None, about("mean KL(base || policy) on the probe")
    ] = None
    probe: Corpus = Field(
        default_factory=lambda: Corpus(builtin="python-reference", max_tokens=2048),
        description="held-out text on which the budget is measured",
    )
    every: Annotated[Positive, about("steps between measurements")] = 10
    tolerance: Annotated[
        float, Field(gt=0, description="share of the budget by which its end may exceed it")
    ] = 0.25
    when_broken: Annotated[
        Literal["stop", "continue"], about("stop: the run ends with exit code 3; continue: warn")
    ] = "stop"
    max_weight: Annotated[
        float, Field(gt=LEAST_WEIGHT, description="greatest weight; the least is 0.001")
    ] = 30.0

    @property
    def limit(self) -> float:
        """The budget in its unit."""
        limit = self.retention_increase_pct or self.drift_nats_per_token
        assert limit is not None
        return limit

    def in_words(self) -> str:
        """What may be lost, of which text."""
        probe = self.probe
        text = Path(probe.path).name if probe.path else short_name(probe.hub or str(probe.builtin))
        return f"{self.limit:g} {self.unit} on {text}"

    @property
    def unit(self) -> str:
        """The budget's unit, in words."""
        return "nats per token" if self.by_drift else "% of perplexity"

    @property
    def by_drift(self) -> bool:
        """Whether the drift is limited, not the rise of the perplexity."""
        return self.drift_nats_per_token is not None

    def problems(self) -> Iterator[Problem]:
        """One budget."""
        kinds = ("retention_increase_pct", "drift_nats_per_token")
        yield from one_of(self, kinds, what="what is limited")


class Anchors(Corpus):
    """Text on which the policy is held near the base, and of which nothing is learned."""

    # Fewer than a corpus has; the section is frozen, so that none can be put in later.
    builtin: Annotated[  # pyright: ignore[reportIncompatibleVariableOverride]
        Literal["base-samples"] | None,
        about(
            "base-samples: texts of the base itself, drawn by `moored prepare` apart from those "
            "that are measured"
        ),
    ] = None
    fraction: Annotated[
        float, Field(gt=0, description="rows of it beside each row of data.train")
    ] = 0.5
    weight: Annotated[
        float,
        Field(
            gt=0,
            description="factor of the divergence's mean on it; moves with regularizer.weight, by "
            "schedule or budget, or alone with kind mol",
        ),
    ] = 1.0

    def ignored(self) -> Iterator[Ignored]:
        """Every token counts."""
        for ignored in super().ignored():
            if ignored.field != "target":
                yield ignored
        yield Ignored("target", (), "every token of an anchor counts")

    def problems(self) -> Iterator[Problem]:
        """Anchors are one text."""
        yield from super().problems()
        if self.domain_field is not None and self.domain is None:
            yield Problem(
                "domain_field",
                "anchors are one text: name one of its domains as domain, or leave domain_field "
                "out",
                ("domain",),
            )


class Regularizer(Section):
    """What holds the policy near its base: a divergence, or a baseline to compare it with."""

    kind: Annotated[
        Literal["none", "kl", "tmkl", "asft", "eaft", "stm", "mol", "l2", "replay"],
        about(
            "tmkl: KL to the base without the target; kl: with it; asft: that, and targets weighed "
            "by their probability; eaft: targets weighed by the policy's entropy; stm: no targets "
            "that surprise the base; mol: KL to the base on anchors alone; l2: squared norm of the "
            "adapter's product; replay: cross-entropy on given text"
        ),
    ] = "tmkl"
    weight: Annotated[
        float, Field(ge=0, description="factor of the divergence, penalty or replayed text")
    ] = 1.0
    positions: Annotated[
        Literal["targets", "all"],
        about(
            "where the divergence acts; all: also where nothing is learned (prompts, system "
            "messages, results of tools), there as a KL with nothing masked"
        ),
    ] = "targets"
    prompt_weight: Annotated[
        float,
        Field(
            gt=0,
            description="factor of the divergence's mean where nothing is learned; moves with "
            "weight, by schedule or budget",
        ),
    ] = 1.0
    target_weight: Annotated[
        float,
        Field(
            ge=0,
            description="between tmkl (0) and kl: factor of the KL between target and rest, which "
            "the mask leaves out",
        ),
    ] = 0.0
    rest_factor: Annotated[
        Literal["one", "base"],
        about(
            "of tmkl's own KL, within the rest; base: the base's probability of the rest, with "
            "which a target_weight of 1 is kl exactly"
        ),
    ] = "one"
    direction: Annotated[
        Literal["forward", "reverse", "jsd"], about("forward: KL(reference || policy)")
    ] = "forward"
    temperature: Annotated[
        float,
        Field(
            gt=0,
            description="divides the logits of the divergence, which is multiplied by its square",
        ),
    ] = 1.0
    every: Annotated[Positive, about("steps; the divergence acts on every k-th")] = 1
    schedule: Annotated[
        Literal["constant", "linear", "cosine"], about("of the weight, after its warm-up")
    ] = "constant"
    warmup_steps: Annotated[int, Field(ge=0, description="steps of linear rise from 0")] = 0
    end_ratio: Annotated[float, Field(ge=0, description="last weight / weight")] = 0.0
    token_weighting: Annotated[
        Literal["uniform", "entropy"],
        about("of the divergence; entropy: of the base's 20 first choices, 0 to 1"),
    ] = "uniform"
    token_fraction: Annotated[
        float,
        Field(gt=0, le=1, description="share of the positions, drawn anew each step, with a KL"),
    ] = 1.0
    first_tokens: Annotated[
        Positive | None, about("tokens at the start of each answer that weigh differently")
    ] = None
    first_tokens_factor: Annotated[
        float, Field(ge=0, description="factor of the divergence on these")
    ] = 5.0
    max_perplexity: Annotated[
        float,
        Field(gt=1, description="of a target under the base, up to which stm has it learned"),
    ] = 2.5
    replay: list[Source] = Field(
        default_factory=list[Source], description="text to replay, of kind replay"
    )
    replay_fraction: Annotated[
        float, Field(gt=0, description="replayed rows per row of data.train")
    ] = 0.25
    anchors: Annotated[
        Anchors | None,
        about("rows beside each batch on which the policy is held near the base, and no more"),
    ] = None
    budget: Annotated[
        Budget | None, about("what may be forgotten; the weight is then only where it starts")
    ] = None

    @property
    def is_divergent(self) -> bool:
        """Whether there is a divergence where the task is learned: asft of weight 0 has none."""
        return self.kind in DIVERGENT and self.weight > 0

    @property
    def has_divergence(self) -> bool:
        """Whether there is a divergence anywhere."""
        return self.is_divergent or self.kind == "mol"

    @property
    def selects_targets(self) -> bool:
        """Whether the base says beforehand which targets are learned."""
        return self.kind == "stm"

    @property
    def compares_task(self) -> bool:
        """Whether the training needs the base's hidden states of what is learned."""
        return self.is_divergent or self.selects_targets

    @property
    def runs_base(self) -> bool:
        """Whether the training needs the base's hidden states of anything."""
        return self.compares_task or self.has_divergence

    @property
    def holds_prompt(self) -> bool:
        """Whether positions that are not learned are held near the base, too."""
        return self.is_divergent and self.positions == "all"

    def prompt_weight_beside(self, kl_weight: float) -> float:
        """The weight of the divergence where nothing is learned, when at targets it is this."""
        return self.prompt_weight * kl_weight / self.weight if self.holds_prompt else 0.0

    @property
    def peak_weight(self) -> float:
        """What schedule and budget move: the weight, or where anchors alone are held, theirs."""
        alone = self.kind == "mol" and self.anchors is not None
        return self.anchors.weight if alone and self.anchors else self.weight

    def anchors_weight_beside(self, kl_weight: float) -> float:
        """The weight of the divergence on the anchors, when at targets it is this."""
        if self.anchors is None or not self.has_divergence:
            return 0.0
        return self.anchors.weight * kl_weight / self.peak_weight

    @property
    def mask_target(self) -> bool:
        """Whether the target is removed from both distributions of the divergence."""
        return self.kind == "tmkl"

    @property
    def ce_weighting(self) -> Literal["uniform", "probability", "entropy"]:
        """How targets weigh in the cross-entropy, by what the policy says of them."""
        if self.kind == "asft":
            return "probability"
        return "entropy" if self.kind == "eaft" else "uniform"

    @property
    def kl_weighting(self) -> Literal["uniform", "entropy"]:
        """How positions weigh in the divergence."""
        return self.token_weighting

    @property
    def has_schedule(self) -> bool:
        """Whether the recipe says how the weight moves: there is one, and no budget moves it."""
        return self.kind in WEIGHTED and self.budget is None

    @property
    def kl_weight(self) -> float:
        """The weight that acts, at the start; 0 where there is none."""
        return self.peak_weight if self.kind in WEIGHTED else 0.0

    def sections(self) -> Iterator[tuple[Key, Section]]:
        """This section and those inside it, by their keys below it."""
        yield (), self
        yield from ((("replay", index), source) for index, source in enumerate(self.replay))
        if self.budget is not None:
            yield ("budget",), self.budget
            yield ("budget", "probe"), self.budget.probe
        if self.anchors is not None:
            yield ("anchors",), self.anchors

    def ignored(self) -> Iterator[Ignored]:
        """Without a divergence there is nothing to weigh."""
        why = f"kind is {self.kind}"
        if self.kind not in DIVERGENT:
            of_any = ("direction", "temperature", "every", "token_weighting", "token_fraction")
            names = () if self.kind == "mol" else (*of_any, "anchors")
            for name in (*names, "first_tokens", "positions"):
                yield Ignored(name, ("kind",), why)
        elif self.kind == "asft" and self.weight == 0:
            for name in ("positions", "anchors"):
                yield Ignored(name, ("weight",), "weight is 0, so there is no divergence")
        if self.kind != "tmkl":
            for name in ("target_weight", "rest_factor"):
                yield Ignored(name, ("kind",), f"{why}, and these are parts of tmkl")
        if not self.holds_prompt:
            switches = ("positions", "kind", "weight")
            yield Ignored("prompt_weight", switches, "nothing but targets is held")
        if self.kind == "mol":
            yield Ignored("weight", ("kind",), f"{why}, whose weight is anchors.weight")
        if self.kind not in WEIGHTED:
            for name in ("weight", "schedule", "warmup_steps", "budget"):
                yield Ignored(name, ("kind",), why)
        if not self.selects_targets:
            yield Ignored("max_perplexity", ("kind",), why)
        if self.kind != "replay":
            for name in ("replay", "replay_fraction"):
                yield Ignored(name, ("kind",), why)
        if self.schedule == "constant" or not self.has_schedule:
            switches = ("schedule", "kind", "budget")
            yield Ignored("end_ratio", switches, "the weight has no schedule")
        if self.first_tokens is None or self.kind not in DIVERGENT:
            yield Ignored("first_tokens_factor", ("first_tokens", "kind"), "first_tokens is null")
        if self.budget is not None and self.kind in WEIGHTED:
            for name in ("schedule", "warmup_steps"):
                yield Ignored(name, ("budget",), "budget moves the weight")

    def problems(self) -> Iterator[Problem]:
        """Weight 0 is spelt kind none; parts are of the forward divergence; replay needs text."""
        has_zero = self.kind not in ("asft", "mol")  # the first is DFT then, the second has another
        if self.kind in WEIGHTED and self.weight == 0 and has_zero:
            yield Problem(
                "weight", f"0 switches {self.kind} off: set kind to none instead", ("kind",)
            )
        parts = {"target_weight": self.target_weight > 0, "rest_factor": self.rest_factor == "base"}
        for name, is_set in parts.items():
            if self.kind == "tmkl" and is_set and self.direction != "forward":
                yield Problem(
                    name,
                    f"only the forward divergence has such parts, not {self.direction}: set "
                    f"direction to forward, or remove {name}",
                    ("direction",),
                )
        if self.kind == "mol" and self.anchors is None:
            yield Problem(
                "anchors",
                "kind is mol, but there is no text on which the base is held: add a path, a hub "
                "data set or builtin base-samples under it",
                ("kind",),
            )
        if self.kind == "replay" and not self.replay:
            yield Problem(
                "replay", "kind is replay, but there is no text: add a source under it", ("kind",)
            )


# Options that stand in the names of all arms of a kind where they vary; the others only where they
# are not left at their default.
_ALWAYS_NAMED = ("weight", "direction", "temperature", "every")


def arm_names(arms: Sequence[Regularizer]) -> list[str]:
    """Folder-safe names: the kind, and what differs among arms of that kind."""
    names: list[str] = []
    for arm in arms:
        same = [other for other in arms if other.kind == arm.kind]
        idle = {ignored.field for ignored in arm.ignored()}
        name: str = arm.kind
        for field, info in Regularizer.model_fields.items():
            value: Any = getattr(arm, field)
            if field in idle or all(getattr(other, field) == value for other in same):
                continue
            if field not in _ALWAYS_NAMED and value == info.get_default(call_default_factory=True):
                continue
            label = "" if field == "direction" else field.replace("_", "")
            if isinstance(value, Budget):
                value = value.limit
            elif isinstance(value, Anchors):
                value = value.weight
            elif isinstance(value, list):
                value = [getattr(other, field) for other in same].index(value)
            name += f"-{label}{value:g}" if isinstance(value, float) else f"-{label}{value}"
        names.append(name)
    # Budgets of one limit differ in their probes, say; weights in more digits than a name has.
    return [
        f"{name}-{1 + names[:i].count(name)}" if names.count(name) > 1 else name
        for i, name in enumerate(names)
    ]
