"""What must fit between the sections of a recipe; within one it is the section's own matter."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from moored.config.regularizer import Regularizer
from moored.config.section import Key, Relation, dotted_key

if TYPE_CHECKING:
    from moored.config.config import Config


def across_sections(config: Config) -> Iterator[Relation]:
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


def _of_regularizer(config: Config, place: Key, regularizer: Regularizer) -> Iterator[Relation]:
    """Of the recipe's, or of an arm's where that is not the recipe's own in this."""
    own, steps = config.regularizer, config.train.steps

    def is_news(*names: str) -> bool:
        differs = any(getattr(regularizer, name) != getattr(own, name) for name in names)
        return regularizer is own or differs

    if regularizer.kind == "l2" and is_news("kind"):
        yield from _of_l2(config, (*place, "kind"))
    if is_news("budget", "replay"):
        yield from _of_probe(config, place, regularizer)
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
    if never and regularizer.is_divergent and is_news("every"):
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
