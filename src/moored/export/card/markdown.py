"""A forgetting card as a page: the README of a model on the Hugging Face hub.

What it says is in `facts.py`, how names are made harmless in `markdown_escape.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from moored.evaluation.report.words import count, duration, kind_name, ppl
from moored.export.card.before_after import figures
from moored.export.card.facts import Card, Delta, End, SourceFacts
from moored.export.card.front_matter import front_matter
from moored.export.card.markdown_escape import (
    NOT_KNOWN,
    NOT_MEASURED,
    code,
    listed,
    table,
    text,
)

MARK = "<!-- forgetting card, written by moored export -->"
JSON_NAME = "forgetting-card.json"
_METHODS = {"lora": "LoRA", "dora": "DoRA", "randlora": "RandLoRA", "sinelora": "SineLoRA"}
_DIVERGENCES = {
    "forward": "KL(base ‖ adapted)",
    "reverse": "KL(adapted ‖ base)",
    "jsd": "Jensen-Shannon divergence",
}


def markdown(card: Card) -> str:
    """The page, front matter and all."""
    sections = [
        [MARK, f"# {text(card.name)}", _what(card), f"> **{text(card.figures.headline, 0)}**"],
        figures(card),
        _training(card),
        _data(card),
        _deltas(card),
        _use(card),
        _provenance(card),
    ]
    body = "\n\n".join(part for section in sections for part in section if part)
    return f"{front_matter(card)}\n{body}\n"


# ---------------------------------------------------------------- what it is


def _what(card: Card) -> str:
    method = _METHODS.get(card.adapter.method, text(card.adapter.method.upper(), 24))
    base = _base(card)
    if card.merged is None:
        what = f"A {method} adapter for {base}"
    else:
        into = "4-bit weights, dequantised" if card.merged.into == "nf4" else "own weights"
        what = f"{base} with a {method} adapter merged into its {into}"
    how = ""
    if card.training is not None:
        how = f", trained with {_regularizer(card.training.regularizer)}"
    scale = "" if card.scale == 1 else f" What it adds is {card.scale:g} of what was trained."
    return f"{what}{how}.{scale}"


def _base(card: Card) -> str:
    hub = card.base.hub
    return f"[{text(hub)}](https://huggingface.co/{hub})" if hub else code(card.base.name)


def _regularizer(settings: Mapping[str, Any]) -> str:
    kind = str(settings.get("kind"))
    if kind == "none":
        return "plain fine-tuning (no regulariser)"
    start = " at the start, moved by a forgetting budget" if settings.get("budget") else ""
    parts = [f"weight {settings['weight']:g}{start}"] if "weight" in settings else []
    if direction := settings.get("direction"):
        parts.append(_DIVERGENCES.get(direction, text(direction, 24)))
    if settings.get("temperature", 1) != 1:
        parts.append(f"temperature {settings['temperature']:g}")
    if settings.get("every", 1) != 1:
        parts.append(f"every {settings['every']} steps")
    if settings.get("token_fraction", 1) != 1:
        parts.append(f"on {settings['token_fraction']:g} of the targets")
    if settings.get("token_weighting", "uniform") != "uniform":
        parts.append(f"targets weighed by {settings['token_weighting']}")
    if settings.get("first_tokens"):
        factor = settings.get("first_tokens_factor", 1)
        parts.append(f"the first {settings['first_tokens']} tokens times {factor:g}")
    if settings.get("schedule", "constant") != "constant":
        parts.append(f"{settings['schedule']} schedule")
    name = "target-masked KL to the base (TMKL)" if kind == "tmkl" else text(kind_name(kind))
    return f"{name}, {', '.join(parts)}" if parts else name


# ---------------------------------------------------------------- how it was made


def _training(card: Card) -> Iterator[str]:
    yield "## How it was trained"
    training, adapter = card.training, card.adapter
    rows: list[tuple[str, str]] = []
    if training is None:
        yield "Not known to Moored: the adapter was made elsewhere."
    else:
        optim, train = training.optim, training.train
        rows.append(("regulariser", _regularizer(training.regularizer)))
        spent = f", {duration(training.seconds)} of updates" if training.seconds else ""
        tokens = f"{count(training.tokens)} tokens" if training.tokens else "tokens not known"
        steps = NOT_KNOWN if training.steps is None else count(training.steps)
        rows.append(("length", f"{steps} steps, {tokens}{spent}"))
        rows.append(("batch", _batch(train)))
        rows.append(("learning rate", _rate(optim)))
        rows.append(("seed", str(train.get("seed", NOT_KNOWN))))
    rows.append(("adapter", _adapter(card)))
    rows.append(("adapted modules", _targets(adapter.target_modules)))
    held = {"nf4": "4 bits (NF4)", "none": "not quantised"}.get(card.base.quantization, NOT_KNOWN)
    double = ", scales quantised, too" if card.base.double_quantization else ""
    rows.append(("base it was verified on" if training is None else "base", f"{held}{double}"))
    yield listed(rows)


def _adapter(card: Card) -> str:
    adapter = card.adapter
    parts = [_METHODS.get(adapter.method, text(adapter.method, 24))]
    if adapter.r is not None:
        parts.append(f"rank {adapter.r}")
    if adapter.alpha is not None:
        by = "√rank" if adapter.rslora else "rank"
        parts.append(f"alpha {adapter.alpha:g} (scaled by alpha / {by})")
    if adapter.dropout:
        parts.append(f"dropout {adapter.dropout:g}")
    if adapter.num_parameters is not None:
        parts.append(f"{count(adapter.num_parameters)} parameters")
    return ", ".join(parts)


def _targets(targets: Sequence[str] | str | None) -> str:
    """Kinds of modules; PEFT may have written the whole path of each."""
    if targets is None:
        return NOT_KNOWN
    if isinstance(targets, str):
        return code(targets)
    kinds = sorted({name.rpartition(".")[2] for name in targets})
    shown = ", ".join(code(kind, 40) for kind in kinds[:12])
    more = f" and {len(kinds) - 12} more kinds" if len(kinds) > 12 else ""
    return f"{shown}{more}" + (f" ({len(targets)} modules)" if len(kinds) < len(targets) else "")


def _rate(optim: Mapping[str, Any]) -> str:
    steps = optim.get("warmup_steps")
    warmup = f", after {count(steps)} step{'s' if steps > 1 else ''} of warm-up" if steps else ""
    return f"{optim['learning_rate']:g} at its peak, {text(optim.get('schedule', ''))}{warmup}"


def _batch(train: Mapping[str, Any]) -> str:
    for unit in ("sequences", "tokens"):
        if size := train.get(f"global_batch_{unit}"):
            return f"{count(size)} {unit} per update"
    return NOT_KNOWN


def _data(card: Card) -> Iterator[str]:
    if card.data is None:
        return
    yield "## Data it was trained on"
    head = ("source", "format", "samples", "tokens", "passes per epoch", "SHA-256 of the tokens")
    sources = card.data.sources
    yield table(head, [_source(source) for source in sources], left=2)
    if card.data.sha256 is not None:
        total = f"{count(card.data.num_samples)} samples, {count(card.data.num_tokens)} tokens"
        apart = " (streamed sources are not counted)" if any(s.streamed for s in sources) else ""
        yield f"In all {total}{apart}; fingerprint {code(card.data.sha256)}."
    if card.data.replayed:
        yield "Replayed beside it, against forgetting:"
        yield table(head, [_source(source) for source in card.data.replayed], left=2)


def _source(source: SourceFacts) -> tuple[str, ...]:
    name = code(source.name, 60)
    if source.hub is not None:
        name = f"[{text(source.name, 60)}](https://huggingface.co/datasets/{source.hub})"
    return (
        name,
        text(source.format or NOT_KNOWN),
        _number(source.num_samples),
        _number(source.num_tokens),
        f"{source.passes:g}",
        NOT_KNOWN if source.sha256 is None else f"`{source.sha256[:16]}…`",
    )


def _number(value: int | None) -> str:
    return NOT_KNOWN if value is None else count(value)


# ---------------------------------------------------------------- the weights


def _deltas(card: Card) -> Iterator[str]:
    deltas = card.deltas
    yield "## How far the weights moved"
    if deltas.total is None:
        yield f"Not measured: {text(deltas.missing or NOT_KNOWN, 200)}."
        return
    total = deltas.total
    is_merged = deltas.of == "merged"
    what = "weights as written less those merged into" if is_merged else "scale · B A"
    relative = "" if total.relative is None else f", which is **{_share(total.relative)}** of ‖W‖"
    yield (
        f"By the Frobenius norm over {count(total.count)} matrices, ‖dW‖ = {_size(total.norm)}"
        f"{relative} (dW: {what})."
    )
    rows = [
        (code(name, 40), count(one.count), _size(one.norm), _relative(one))
        for name, one in deltas.by_module.items()
    ]
    yield table(("module", "matrices", "‖dW‖", "‖dW‖ / ‖W‖"), rows)
    notes: list[str] = []
    if deltas.largest is not None and deltas.largest_delta is not None:
        one = deltas.largest_delta
        by = f"‖dW‖ = {_size(one.norm)}"
        by = by if one.relative is None else f"{_share(one.relative)} of ‖W‖"
        notes.append(f"Most was moved in {code(deltas.largest)}: {by}.")
    if deltas.rounding:
        dtype = text(card.merged.dtype) if card.merged else "the dtype"
        notes.append(f"Rounding to {dtype} changed {_share(deltas.rounding)} of dW.")
    yield " ".join(notes)


def _relative(one: Delta) -> str:
    return NOT_MEASURED if one.relative is None else _share(one.relative)


def _size(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else ppl(value)


def _share(value: float) -> str:
    return f"{100 * value:.3g}\u00a0%" if math.isfinite(value) else ppl(value)


# ---------------------------------------------------------------- use and origin


def _use(card: Card) -> Iterator[str]:
    yield "## Use"
    load, imports = "AutoModelForCausalLM", "from transformers import AutoModelForCausalLM, "
    if card.merged is None:
        load = "AutoPeftModelForCausalLM"
        imports = f"from peft import {load}\nfrom transformers import "
    yield (
        f"```python\n{imports}AutoTokenizer\n\n"
        'folder = "."  # this folder, or its name on the hub\n'
        f"model = {load}.from_pretrained(folder)\n"
        "tokenizer = AutoTokenizer.from_pretrained(folder)\n```"
    )
    if card.merged is None and card.base.hub is None:
        yield (
            "The base was no model of the hub: `base_model_name_or_path` in `adapter_config.json` "
            "must name the folder that has it."
        )
    yield from _stops(card)


def _stops(card: Card) -> Iterator[str]:
    stops = card.stops
    if stops is None or not stops.learned:
        return
    learned, base = (", ".join(map(_token, ends)) for ends in (stops.learned, stops.base))
    if stops.are_the_base_s:
        yield f"A turn ends with {learned}, at which the base stops, too."
        return
    said = f"**A turn ends with {learned}**, at which the base, which stops at {base}, does not."
    if card.merged is not None:
        yield f"{said} `generation_config.json` stops at both."
        return
    yield (
        f"{said} With an adapter, transformers generates as the base's settings say, so tell it:"
    )
    yield f"```python\nmodel.generate(**inputs, eos_token_id={stops.ids})\n```"
    yield (
        "or `model.generation_config = GenerationConfig.from_pretrained(folder)`; vLLM takes "
        "`--generation-config FOLDER`."
    )


def _token(end: End) -> str:
    """A token as it is; `code` would write the bars of many otherwise, for tables."""
    return (
        f"`{end.token}`" if re.fullmatch(r"[\w<>|/\[\]:.-]{1,40}", end.token) else code(end.token)
    )


def _provenance(card: Card) -> Iterator[str]:
    base, adapter, made = card.base, card.adapter, card.provenance
    yield "## Provenance"
    rows: list[tuple[str, str]] = [
        ("base", f"{code(base.name)}, revision {code(base.revision or NOT_KNOWN)}"),
        ("base's files", _hashes(card)),
        ("base's licence", text(base.license or NOT_KNOWN)),
        ("adapter", f"SHA-256 {code(adapter.sha256 or NOT_KNOWN)}"),
    ]
    if card.training is not None:
        when = f"{made.began or NOT_KNOWN} to {made.ended or NOT_KNOWN}"
        rows.append(("trained", f"{when}, with {_versions(made.versions)}"))
        rows.append(("recipe", f"fingerprint {code(made.recipe_sha256 or NOT_KNOWN)}"))
        commits = ", ".join(map(code, made.commits)) or NOT_KNOWN
        rows.append(("git commit where it was started", commits))
    for store in made.mlflow:
        is_local = store["uri"].endswith(":")
        where = f"a local store ({text(store['uri'][:-1])})" if is_local else text(store["uri"])
        rows.append(("MLflow", f"run {code(store['run_id'])} in {where}"))
    rows.append(("exported", f"{card.created}, with {_versions(made.export_versions)}"))
    rows.append(("verified", _verified(card)))
    yield listed(rows)
    yield f"All of this, in full and for programs, is in `{JSON_NAME}`."


def _hashes(card: Card) -> str:
    weights = {n: f for n, f in card.base.files.items() if n.endswith(".safetensors")}
    hashed = [file for file in weights.values() if file.sha256]
    if not weights:
        return NOT_KNOWN
    if len(weights) == 1 and hashed:
        return f"SHA-256 of the weights {code(hashed[0].sha256)}"
    files = f"{len(weights)} files of weights"
    if not hashed:
        return f"{files}, not hashed"
    rest = "" if len(hashed) == len(weights) else f" ({len(weights) - len(hashed)} not hashed)"
    return f"{files}{rest}, their SHA-256 in `{JSON_NAME}`"


def _versions(versions: Mapping[str, Any]) -> str:
    shown = ("moored", "torch", "transformers", "peft", "bitsandbytes")
    return ", ".join(f"{n} {text(versions[n], 40)}" for n in shown if n in versions) or (
        f"versions {NOT_KNOWN}"
    )


def _verified(card: Card) -> str:
    found = card.verified.get("relative_rms_of_logits")
    if not found:
        return "no"
    return (
        f"in stock PEFT and transformers, logits of {count(card.verified['num_tokens'])} tokens: "
        f"they differ by {found['difference']:.2g} of their size, where rounding explains "
        f"{found['tolerance']:.2g} and the adapter moves them by {found['adapter_effect']:.2g}"
    )
