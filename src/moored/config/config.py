"""`load_config`: recipe file and overrides -> one frozen, checked `Config`.

The keys themselves are in `inputs.py`, `running.py` and `regularizer.py`, the YAML reading in
`recipe.py`; nothing here loads torch or opens the data and the model of a recipe.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from pydantic import Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from moored.config.document import dump
from moored.config.inputs import Corpus, DataConfig, ModelConfig, Source
from moored.config.recipe import read_recipe, resolve_paths
from moored.config.regularizer import Regularizer, arm_names
from moored.config.running import (
    AdapterConfig,
    EvaluationConfig,
    OptimConfig,
    OutputConfig,
    ParallelConfig,
    ReferenceConfig,
    TrackConfig,
    TrainConfig,
)
from moored.config.section import Key, Relation, Section, dotted_key
from moored.config.validation import drop_removed, remove, validate

__all__ = [
    "AdapterConfig",
    "Config",
    "Corpus",
    "DataConfig",
    "EvaluationConfig",
    "ModelConfig",
    "OptimConfig",
    "OutputConfig",
    "ParallelConfig",
    "ReferenceConfig",
    "Regularizer",
    "Source",
    "TrackConfig",
    "TrainConfig",
    "arm_names",
    "load_config",
]

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
CORPUS_NAME = r"^[A-Za-z0-9][A-Za-z0-9_-]*$"  # no dot: overrides address corpora by dotted keys
PROBE = "regularizer.budget.probe"

# What changes no number of a run: its name, where it writes, and how often.
_COSMETIC: tuple[Key, ...] = (
    ("name",),
    ("track",),
    ("output",),
    ("compare",),
    ("compare_seeds",),
    ("train", "save_every"),
    ("train", "keep_checkpoints"),
    ("train", "log_every"),
    ("train", "rehearse"),
)
# What changes them by the order of sums at most, so that a run may go on on another mesh.
_MESH: tuple[Key, ...] = (("parallel",), ("model", "cache_quantized"), ("reference",))
# What is measured of an adapter, which does not depend on it.
_MEASURED: tuple[Key, ...] = (("retention",), ("evaluation",), ("data", "eval"))


class Config(Section):
    """A whole recipe, resolved: what every room of the package is given."""

    name: Annotated[str, Field(pattern=NAME, max_length=120)] = Field(
        description="of the run and its folder: letters, digits, '.', '_' and '-', first a letter "
        "or digit, 120 characters at most; left out: the recipe file's name without its ending, "
        "other characters replaced by '-'"
    )
    model: ModelConfig = Field(description="the base: name_or_path at least")
    adapter: AdapterConfig = AdapterConfig()
    data: DataConfig = Field(description="what is learned: a list of sources under train")
    regularizer: Regularizer = Regularizer()
    reference: ReferenceConfig = ReferenceConfig()
    retention: dict[Annotated[str, Field(pattern=CORPUS_NAME, max_length=60)], Corpus] = Field(
        default_factory=dict, description="name -> text that must not be forgotten"
    )
    optim: OptimConfig = OptimConfig()
    parallel: ParallelConfig = ParallelConfig()
    train: TrainConfig = Field(
        description="steps or epochs, and global_batch_sequences or global_batch_tokens"
    )
    evaluation: EvaluationConfig = EvaluationConfig()
    track: TrackConfig = TrackConfig()
    output: OutputConfig = OutputConfig()
    compare: Annotated[list[Regularizer], Field(min_length=1)] = Field(
        default_factory=lambda: [Regularizer(kind=k) for k in ("none", "kl", "tmkl")],
        validate_default=True,
        description="arms of `moored compare`; what one leaves out is taken from regularizer",
    )
    compare_seeds: list[Annotated[int, Field(ge=0, lt=2**63)]] = Field(
        default_factory=list[int],
        description="seeds of `moored compare`, each arm with each; empty: train.seed",
    )

    @field_validator("compare", mode="after")
    @classmethod
    def _inherit(cls, arms: list[Regularizer], info: ValidationInfo) -> list[Regularizer]:
        base = info.data.get("regularizer")
        if not isinstance(base, Regularizer):
            return arms
        inherited = {name: getattr(base, name) for name in base.model_fields_set}
        full: list[Regularizer] = []
        for arm in arms:
            own: dict[str, Any] = {name: getattr(arm, name) for name in arm.model_fields_set}
            own["kind"] = own.get("kind", base.kind)
            idle = {i.field for i in Regularizer.model_validate(inherited | own).ignored()}
            if base.weight == 0 and own["kind"] != base.kind:
                idle.add("weight")  # of asft, which alone can do without
            kept = {name: value for name, value in inherited.items() if name not in idle}
            full.append(Regularizer.model_validate(kept | own))
        return full

    @model_validator(mode="after")
    def _check_relations(self) -> Config:
        broken = list(self._relations())
        if broken:
            text = "\n".join(f"{dotted_key(r.key)}: {r.message}" for r in broken)
            # As text, not as template: a brace in it must not be taken for a placeholder.
            raise PydanticCustomError("relations", "{text}", {"text": text, "broken": broken})
        return self

    def _sections(self) -> Iterator[tuple[Key, Section]]:
        for name in type(self).model_fields:
            value: Any = getattr(self, name)
            if isinstance(value, DataConfig):
                for part in ("train", "eval"):
                    for index, source in enumerate(getattr(value, part)):
                        yield (name, part, index), source
            if isinstance(value, Regularizer):
                yield from (((name, *inner), part) for inner, part in value.sections())
            elif isinstance(value, Section):
                yield (name,), value
            elif isinstance(value, dict):
                for label, corpus in cast("dict[str, Corpus]", value).items():
                    yield (name, label), corpus
            elif name == "compare":
                for index, arm in enumerate(self.compare):
                    yield from (((name, index, *inner), part) for inner, part in arm.sections())

    def _without_effect(self) -> Iterator[Relation]:
        """Options that do nothing, whether somebody set them or not."""
        for key, section in self._sections():
            for field, switches, why in section.ignored():
                asked = self.evaluation.instructions or self.evaluation.suite is not None
                if field == "chat_template" and asked:
                    continue  # by which questions are put, whatever was learned
                message = f"would be ignored, since {why}: remove it"
                yield Relation((*key, field), message, switches=tuple((*key, s) for s in switches))
        for index in range(len(self.data.eval)):
            yield Relation(
                ("data", "eval", index, "weight"),
                "would be ignored, since evaluation reads every source once: remove it",
            )

    def _relations(self) -> Iterator[Relation]:
        for relation in self._without_effect():
            section: Any = self
            for part in relation.key[:-1]:
                is_item = isinstance(section, (list, dict))
                section = section[part] if is_item else getattr(section, str(part))
            if relation.key[-1] in section.model_fields_set:
                yield relation
        for key, section in self._sections():
            for field, message, names in section.problems():
                where = (*key, *field.split(".")) if field else key
                involves = (where, *((*key, name) for name in names)) if field else ()
                # An arm's inherited option is reported where it was given.
                inherited = key[0] == "compare" and any(
                    (key[2:], field) == (inner, name)
                    for inner, part in self.regularizer.sections()
                    for name, *_ in part.problems()
                )
                if not inherited:
                    yield Relation(where, message, involves or tuple((*key, n) for n in names))
        yield from _across_sections(self)

    def regularizers(self) -> Iterator[tuple[Key, Regularizer]]:
        """All of them, by their places: the recipe's, and those of a comparison's arms."""
        yield ("regularizer",), self.regularizer
        yield from ((("compare", index), arm) for index, arm in enumerate(self.compare))

    def arms(self) -> dict[str, Config]:
        """The runs of a comparison by their names, seed by seed within each arm."""
        arms: dict[str, Config] = {}
        for name, regularizer in zip(arm_names(self.compare), self.compare, strict=True):
            for seed in self.compare_seeds or [self.train.seed]:
                train = self.train.model_copy(update={"seed": seed})
                full = f"{name}-seed{seed}" if self.compare_seeds else name
                arms[full] = self.model_copy(update={"regularizer": regularizer, "train": train})
        return arms

    def sources(self) -> dict[str, list[Source]]:
        """Every list of data sources that is not empty, by its place in the recipe."""
        lists = {"data.train": self.data.train, "data.eval": self.data.eval}
        for place, regularizer in self.regularizers():
            if regularizer.replay not in lists.values():
                lists[dotted_key((*place, "replay"))] = regularizer.replay
        return {place: sources for place, sources in lists.items() if sources}

    def corpora(self) -> dict[str, Corpus]:
        """Every text that is measured, and anchors, by its place in the recipe."""
        corpora = {f"retention.{name}": corpus for name, corpus in self.retention.items()}
        probes: list[Corpus] = []
        for place, regularizer in self.regularizers():
            if regularizer.budget is not None and regularizer.budget.probe not in probes:
                probes.append(regularizer.budget.probe)
                corpora[dotted_key((*place, "budget", "probe"))] = probes[-1]
            anchors = regularizer.anchors
            if anchors is not None and anchors not in corpora.values():
                corpora[dotted_key((*place, "anchors"))] = anchors
        return corpora

    def budget_watched(self) -> list[str]:
        """Retention corpora that come from the text that the budget's probe is the start of."""
        budget = self.regularizer.budget
        if budget is None:
            return []
        return [name for name, c in self.retention.items() if c.shares_text(budget.probe)]

    def resolved(self) -> dict[str, Any]:
        """Everything that has an effect, defaults included, as plain JSON values."""
        values = self.model_dump(mode="json")
        for relation in self._without_effect():
            remove(values, relation.key)
        resolved = _without_null(values)
        # Where an arm has none of what it would inherit, its null says something.
        for arm, whole in zip(resolved["compare"], values["compare"], strict=True):
            arm |= {
                name: None
                for name, value in whole.items()
                if value is None and getattr(self.regularizer, name) is not None
            }
        return resolved

    def dump_yaml(self) -> str:
        """The resolved recipe as YAML; loading it gives an equal `Config`."""
        return dump(self.resolved())

    def flat(self) -> dict[str, str | int | float | bool | None]:
        """The resolved recipe with dotted keys: `{"optim.learning_rate": 2e-4, ...}`.

        A list of plain values is its JSON; what is empty has no key.
        """
        out: dict[str, str | int | float | bool | None] = {}

        def visit(key: Key, value: Any) -> None:
            if isinstance(value, dict):
                for name, inner in cast("dict[str, Any]", value).items():
                    visit((*key, name), inner)
            elif isinstance(value, list):
                items = cast("list[Any]", value)
                if any(isinstance(item, dict) for item in items):
                    for index, inner in enumerate(items):
                        visit((*key, index), inner)
                elif items:
                    out[dotted_key(key)] = json.dumps(items)
            else:
                out[dotted_key(key)] = value

        visit((), self.resolved())
        return out

    def fingerprint(self) -> str:
        """SHA-256 of what determines the numbers of a run; names and places are left out."""
        return self._digest(_COSMETIC)

    def setting(self) -> str:
        """A digest that runs share whose adapters differ by their seed at most."""
        return self._digest((*_COSMETIC, *_MESH, *_MEASURED, ("train", "seed")))[:16]

    def _digest(self, without: Sequence[Key]) -> str:
        values = self.resolved()
        for key in without:
            remove(values, key)
        text = json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def going_on(self, begun: Config) -> Config:
        """This recipe as a run goes on with it: what it leaves open is as it was in the beginning.

        Args:
            begun: the copy in the run's directory.
        """
        mine, theirs = self.parallel, begun.parallel
        is_open = mine.sequence_parallel == "auto"
        if not is_open or mine.tensor_parallel_degree != theirs.tensor_parallel_degree:
            return self
        return self.spread_by_tokens(theirs.sequence_parallel)

    def spread_by_tokens(self, value: bool | Literal["auto"]) -> Config:
        """This recipe with `parallel.sequence_parallel` said."""
        if value == self.parallel.sequence_parallel:
            return self
        parallel = self.parallel.model_copy(update={"sequence_parallel": value})
        return self.model_copy(update={"parallel": parallel})

    def changed_keys(self, other: Config) -> list[str]:
        """The dotted keys that a run may not go on with, for a message to the user."""
        mine, theirs = self.flat(), other.flat()
        cosmetic = tuple(dotted_key(key) for key in (*_COSMETIC, *_MESH))
        return sorted(
            key
            for key in mine.keys() | theirs.keys()
            if mine.get(key) != theirs.get(key)
            and not any(key == c or key.startswith(f"{c}.") for c in cosmetic)
        )


# ---------------------------------------------------------------- between sections


def _across_sections(config: Config) -> Iterator[Relation]:
    """What is wrong between options of different sections, each with its fix."""
    data, train, evaluation = config.data, config.train, config.evaluation
    if train.steps is not None and config.optim.warmup_steps >= train.steps:
        yield Relation(
            ("optim", "warmup_steps"),
            f"{config.optim.warmup_steps} is not less than train.steps {train.steps}, so the "
            "learning rate would never reach its peak: lower warmup_steps or raise steps",
            (("train", "steps"),),
        )
    if train.global_batch_tokens is not None and train.global_batch_tokens < data.max_length:
        yield Relation(
            ("train", "global_batch_tokens"),
            f"{train.global_batch_tokens} is less than data.max_length {data.max_length}, so "
            "one sample may not fit in an update: raise it, or lower data.max_length",
            (("data", "max_length"),),
        )
    if train.epochs is not None and any(source.streaming for source in data.train):
        yield Relation(
            ("train", "epochs"),
            "the length of a streaming source is not known: set train.steps instead",
            (("data", "train"),),
        )
    if evaluation.exact_match and all(source.format == "text" for source in data.eval):
        reason = "every source of data.eval has format text" if data.eval else "it is empty"
        yield Relation(
            ("evaluation", "exact_match"),
            f"needs prompts and answers in data.eval, but {reason}: add a source with messages "
            "or prompt_completion, or set exact_match to false",
            (("data", "eval"),),
        )
    if evaluation.every is not None and not data.eval and not config.retention:
        yield Relation(
            ("evaluation", "every"),
            "there is nothing to evaluate: add data.eval or retention, or remove it",
            (("data", "eval"), ("retention",)),
        )
    if evaluation.max_examples is not None and not data.eval:
        yield Relation(
            ("evaluation", "max_examples"),
            "data.eval, of which it takes the first, is empty: add data.eval, or remove it",
            (("data", "eval"),),
        )
    for place, regularizer in config.regularizers():
        yield from _of_regularizer(config, place, regularizer)
    parallel, nf4 = config.parallel, config.model.quantization == "nf4"
    for field, message, names in config.adapter.spread(
        nf4=nf4,
        zero_stage=parallel.zero_stage,
        tensor_parallel_degree=parallel.tensor_parallel_degree,
    ):
        involves = ((section, name) for section, _, name in (n.partition(".") for n in names))
        yield Relation(("adapter", field), message, tuple(involves))
    if parallel.context_parallel_degree > 1:
        yield from _of_shared_rows(config)
    if len(set(config.compare_seeds)) < len(config.compare_seeds):
        yield Relation(("compare_seeds",), "holds a seed twice: remove one", (("compare_seeds",),))
    for index, arm in enumerate(config.compare):
        first = config.compare.index(arm)
        if first < index:
            yield Relation(
                ("compare", index),
                f"is the same regularizer as compare.{first}: change or remove one",
                (("compare",), ("regularizer",)),
            )


def _of_shared_rows(config: Config) -> Iterator[Relation]:
    """What looks at more of a row than a rank of several that share it has."""
    degree = ("parallel", "context_parallel_degree")
    if config.model.attention not in ("auto", "sdpa"):
        yield Relation(
            ("model", "attention"),
            f"{config.model.attention} is not spread over ranks that share a row: leave it out, or "
            "set parallel.context_parallel_degree to 1",
            (degree,),
        )
    if config.adapter.dropout:
        yield Relation(
            ("adapter", "dropout"),
            "is drawn for a whole row, which no rank has: set it to 0, or "
            "parallel.context_parallel_degree to 1",
            (degree,),
        )
    if config.reference.cache:
        yield Relation(
            ("reference", "cache"),
            "keeps hidden states of whole rows: set it to false, or "
            "parallel.context_parallel_degree to 1",
            (degree,),
        )
    for place, regularizer in config.regularizers():
        if regularizer.first_tokens is not None:
            yield Relation(
                (*place, "first_tokens"),
                "counts an answer's tokens from its first, which another rank may have: set "
                "parallel.context_parallel_degree to 1",
                (degree,),
            )


def _of_regularizer(config: Config, place: Key, regularizer: Regularizer) -> Iterator[Relation]:
    """What is wrong with the recipe's, or with an arm's where that has its own in this."""
    own, steps = config.regularizer, config.train.steps

    def is_news(*names: str) -> bool:
        differs = any(getattr(regularizer, name) != getattr(own, name) for name in names)
        return regularizer is own or differs

    if regularizer.kind == "l2" and is_news("kind"):
        yield from _of_l2(config, (*place, "kind"))
    if is_news("budget", "replay"):
        yield from _of_probe(config, place, regularizer)
    if regularizer.anchors is not None and is_news("anchors"):
        yield from _of_anchors(config, (*place, "anchors"), regularizer)
    text_only = all(source.format == "text" for source in config.data.train)
    if regularizer.holds_prompt and text_only and is_news("positions", "kind"):
        yield Relation(
            (*place, "positions"),
            "all adds nothing, since every source of data.train has format text, of which every "
            "token is learned: set it to targets",
            (("data", "train"),),
        )
    warm = regularizer.warmup_steps
    too_long = steps is not None and warm >= steps
    if too_long and regularizer.has_schedule and is_news("warmup_steps"):
        yield Relation(
            (*place, "warmup_steps"),
            f"{warm} is not less than train.steps {steps}, so the weight would never be reached: "
            "lower it",
            (("train", "steps"),),
        )
    never = steps is not None and regularizer.every > steps
    if never and regularizer.has_divergence and is_news("every"):
        yield Relation(
            (*place, "every"),
            f"{regularizer.every} is more than train.steps {steps}, so the divergence would never "
            "act: lower it",
            (("train", "steps"),),
        )


def _of_probe(config: Config, place: Key, regularizer: Regularizer) -> Iterator[Relation]:
    """A budget on text that is trained on would be held by learning it."""
    budget = regularizer.budget
    if budget is None or budget.probe.builtin:
        return
    if budget.probe.domain_field is not None and budget.probe.domain is None:
        yield Relation(
            (*place, "budget", "probe", "domain_field"),
            "a probe is one text: name one of its domains as domain, or leave domain_field out",
        )
    trained = {("data", "train"): config.data.train, (*place, "replay"): regularizer.replay}
    for key, sources in trained.items():
        if any(source.place == budget.probe.place for source in sources):
            yield Relation(
                (*place, "budget", "probe"),
                f"is also in {dotted_key(key)}: a budget needs text that is not trained on",
                (key,),
            )


def _of_anchors(config: Config, key: Key, regularizer: Regularizer) -> Iterator[Relation]:
    """What is measured must not be held in training; rows are cut like those of the data."""
    anchors, budget = regularizer.anchors, regularizer.budget
    assert anchors is not None
    measured: dict[Key, Corpus] = {("retention", n): c for n, c in config.retention.items()}
    if budget is not None:
        measured[(*key[:-1], "budget", "probe")] = budget.probe
    # The base's own texts are drawn apart for both.
    shared = [k for k, c in measured.items() if not anchors.builtin and c.shares_text(anchors)]
    shared += [
        ("data", "eval", index)
        for index, source in enumerate(config.data.eval)
        if source.place == anchors.place
    ]
    for place in shared:
        yield Relation(
            key,
            f"is also in {dotted_key(place)}: what is measured must not be held in training: give "
            "another text",
            (place,),
        )
    if anchors.window_tokens > config.data.max_length:
        yield Relation(
            (*key, "window_tokens"),
            f"{anchors.window_tokens} is more than data.max_length {config.data.max_length}, the "
            "tokens of a row: lower it",
            (("data", "max_length"),),
        )


def _of_l2(config: Config, kind: Key) -> Iterator[Relation]:
    """The norm of B A is read beside the layers, from whole matrices."""
    parallel = config.parallel
    refused = [
        (
            config.adapter.method == "lora",
            ("adapter", "method"),
            "set adapter.method to lora",
        ),
        (parallel.zero_stage != 3, ("parallel", "zero_stage"), "set zero_stage to 2 or less"),
        (
            parallel.tensor_parallel_degree == 1,
            ("parallel", "tensor_parallel_degree"),
            "set tensor_parallel_degree to 1",
        ),
        (
            config.train.gradient_checkpointing != "reentrant",
            ("train", "gradient_checkpointing"),
            "set gradient_checkpointing to non_reentrant",
        ),
    ]
    for fits, key, fix in refused:
        if not fits:
            yield Relation(
                kind, f"l2 is not done with {'.'.join(key)} as it is: {fix}", (kind, key)
            )


# ---------------------------------------------------------------- from a file


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads, overrides, resolves and checks a recipe.

    Relative paths resolve against the folder of the recipe; those of overrides, and the default
    `output.dir`, against the current folder. An override that switches something off takes the
    file's options of it along; it is an error to set them on the command line as well.

    Raises:
        UserErrors: everything that is wrong, each in one line with its place and its fix.
    """
    recipe = read_recipe(path, overrides)
    if recipe.data.get("name") is None:
        recipe.data["name"] = _default_name(Path(path))
    resolve_paths(recipe)
    drop_removed(recipe.data)
    return validate(Config, recipe, _PLACEHOLDERS, extra=_secrets)


def _secrets(config: Config) -> Iterator[Relation]:
    """The recipe is copied into the run directory and to MLflow: no password may be in it."""
    if re.search(r"://[^/\s]*@", config.track.uri or ""):
        yield Relation(
            ("track", "uri"),
            "holds a user or password, and recipes are copied to where the results go: put them "
            "into MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or the whole URI into "
            "MLFLOW_TRACKING_URI",
        )


# Stand-ins for what a recipe must have, so that its other parts are still checked without it.
_PLACEHOLDERS: Mapping[Key, Any] = {
    ("name",): "x",
    ("model",): {"name_or_path": "x"},
    ("model", "name_or_path"): "x",
    ("data",): {"train": [{"path": "x"}]},
    ("data", "train"): [{"path": "x"}],
    ("train",): {},
}


def _without_null(values: dict[str, Any]) -> dict[str, Any]:
    """Drops what is null because nobody set it; `max_grad_norm: null` says something."""

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return _without_null(cast("dict[str, Any]", value))
        return [clean(v) for v in cast("list[Any]", value)] if isinstance(value, list) else value

    return {k: clean(v) for k, v in values.items() if v is not None or k == "max_grad_norm"}


def _default_name(path: Path) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).strip("-._") or "run"
