"""A model's sizes from its config.json alone: which matrices there are, how they are cut.

Holds how a config.json is found and read; no weights are opened and no network is asked. Models
that are known by their names are in `known_models.py`.

Letters: D hidden size, I size of the MLP, Q and K features of the queries and of the keys, L
layers, V vocabulary, E experts.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from moored.config import ModelConfig
from moored.plan.known_models import known_config
from moored.utils.errors import UserError

Cut = Literal["columns", "rows"]  # of the output features, of the input features


@dataclass(frozen=True, slots=True)
class LinearSize:
    """A linear layer of every decoder layer.

    Attributes:
        name: as modules are called.
        inputs: features.
        outputs: features.
        cut: along which tensor parallelism cuts it: `columns` its outputs, `rows` its inputs.
    """

    name: str
    inputs: int
    outputs: int
    cut: Cut

    @property
    def size(self) -> int:
        """Elements of its weight."""
        return self.inputs * self.outputs


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """What of a model memory and time depend on.

    Attributes:
        model_type: of its config.json.
        origin: where that was found, in words.
        hidden_size: D.
        num_layers: L.
        vocab_size: V.
        is_tied: the head is the embedding.
        num_heads: of queries.
        num_kv_heads: of keys.
        query_size: Q.
        key_size: K.
        mlp_size: I, or what the experts of one token have together.
        linears: of a layer, those that are held in 4 bits.
        num_experts: E, of a layer; 0 without.
        expert_size: elements of all experts' matrices of a layer.
        active_expert_size: of those that one token goes through.
        other_size: elements beside linears, experts, embedding and head: norms, biases, routers.
        stored_bytes: of a parameter in the files.
        max_positions: the longest row it was made for; None where nothing is said.
        eager: its attention keeps all scores, since no fused kernel computes it.
        by_tokens: sequence parallelism may spread its layers; else a part of them may look at more
            than one token.
        notes: what of it is not counted, or only supposed.
    """

    model_type: str
    origin: str
    hidden_size: int
    num_layers: int
    vocab_size: int
    is_tied: bool
    num_heads: int
    num_kv_heads: int
    query_size: int
    key_size: int
    mlp_size: int
    linears: Sequence[LinearSize]
    num_experts: int = 0
    expert_size: int = 0
    active_expert_size: int = 0
    other_size: int = 0
    stored_bytes: int = 2
    max_positions: int | None = None
    eager: bool = False
    by_tokens: bool = True
    notes: Sequence[str] = field(default_factory=tuple)

    @property
    def linear_size(self) -> int:
        """N: elements of the linear layers of all layers, without experts."""
        return self.num_layers * sum(linear.size for linear in self.linears)

    @property
    def embedding_size(self) -> int:
        """Elements of embedding and head; once where they are tied."""
        return (1 if self.is_tied else 2) * self.vocab_size * self.hidden_size

    @property
    def num_parameters(self) -> int:
        """All of them."""
        experts = self.num_layers * self.expert_size
        return self.linear_size + experts + self.embedding_size + self.other_size

    def experts_of(self, degree: int) -> float:
        """Elements of the experts of a layer on the fullest of so many ranks; none is cut."""
        if not self.num_experts:
            return 0.0
        return self.expert_size / self.num_experts * -(-self.num_experts // degree)

    @property
    def expert_width(self) -> int:
        """I of one expert, which has a gate, an up and a down projection."""
        return self.expert_size // (3 * self.hidden_size * max(1, self.num_experts))

    @property
    def experts_per_token(self) -> int:
        """K: how many of a layer's experts a token goes through."""
        return self.active_expert_size * self.num_experts // max(1, self.expert_size)

    def part(self, size: int, cut: Cut, linear: LinearSize, degree: int) -> float:
        """`size` inputs or outputs of a linear layer, or this rank's share where they are cut."""
        is_cut = linear.cut == cut
        return size / degree if is_cut else size


def find_architecture(model: ModelConfig) -> Architecture:
    """A model's sizes: from its folder, the hub's cache on this machine, or by a known name.

    Raises:
        UserError: there is no config.json and the name is not known, or it is of a kind whose
            sizes are not known.
    """
    config, origin, _ = find_config(model)
    return read_architecture(config, origin)


def find_config(model: ModelConfig) -> tuple[dict[str, Any], str, Path | None]:
    """The config.json of a model: what it says, where it was found in words, and its folder.

    Of a known name without files there is no folder, and what is said is what sizes depend on.

    Raises:
        UserError: there is none, and the name is not known.
    """
    name = model.name_or_path
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(
                f"model.name_or_path={name}: no config.json in this folder, and a plan needs it: "
                "give a Hugging Face model folder, or a hub name"
            )
        return _json(folder / "config.json"), str(folder), folder
    if folder.is_file():
        raise UserError(
            f"model.name_or_path={name}: a plan reads a config.json, which a GGUF file has not: "
            "give the folder or the hub name of the model that it was made of"
        )
    cached = _in_cache(name, model.revision)
    if cached is not None:
        origin = f"the hub's cache ({cached.parent.name[:12]})"
        return _json(cached), origin, cached.parent
    known = known_config(name)
    if known is not None:
        return known[1], f"the table of known models ({known[0]})", None
    raise UserError(
        f"model.name_or_path={name}: its config.json is not in the hub's cache on this machine, "
        f"and it is none of the known models: run `hf download {name} config.json` where there is "
        "a network (a few kB), or give a folder that has it"
    )


def _in_cache(name: str, revision: str | None) -> Path | None:
    """The config.json of a hub name in its cache, in the layout that the hub's client documents."""
    cache = os.environ.get("HF_HUB_CACHE")
    if not cache:
        home = os.environ.get("HF_HOME")
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        cache = str(Path(home or Path(base) / "huggingface") / "hub")
    folder = Path(cache).expanduser() / f"models--{name.replace('/', '--')}"
    commit = revision or "main"
    with contextlib.suppress(OSError):  # a commit has no reference
        commit = (folder / "refs" / commit).read_text().strip()
    path = folder / "snapshots" / commit / "config.json"
    return path if path.is_file() else None


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): copy the model folder again") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} holds no object: copy the model folder again")
    return found


# Like Llama, but for what `_FEATURES` says: q, k, v, o, gate, up, down, two norms a layer.
_GATED = (
    *("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "smollm3"),
    *("granite", "olmo2", "mixtral", "qwen3_moe", "qwen2_moe", "phi3", "ministral", "arcee"),
)
_PLAIN = ("phi", "starcoder2")  # an MLP of two matrices
_NOT_KNOWN = {  # attention or layers of another kind
    *("kv_lora_rank", "ssm_cfg", "state_size", "mamba_d_state", "layers_block_type"),
    *("linear_key_head_dim", "num_nextn_predict_layers"),
}
_NORMS = {"gemma2": 4, "gemma3_text": 4, "olmo2": 2, "phi": 1}  # a layer, 2 by default
_HEAD_NORMS = ("qwen3", "qwen3_moe", "gemma3_text")  # of q and k, over a head's features
_QKV_BIAS = ("qwen2", "qwen2_moe")
_WITH_BIAS = ("phi", "starcoder2")  # all linear layers and norms
# Layers with parts beside attention and MLP which transformers' plan for them does not name, so
# that sequence parallelism is not for them; `why_not_by_tokens` in layout.py asks the model itself.
_WHOLE_ROWS = {
    *("axk1", "bailing_hybrid", "deepseek_v3", "flint", "gemma3n_text", "gemma4_text"),
    *("kimi_linear", "minimax", "olmo_hybrid", "youtu"),
}
_EAGER = ("gemma2",)  # caps its scores, for which torch has no fused kernel


def read_architecture(config: Mapping[str, Any], origin: str) -> Architecture:
    """The sizes that a config.json says.

    Args:
        config: its content.
        origin: where it was found, in words.

    Raises:
        UserError: it is of a kind whose sizes are not known, or says too little.
    """
    notes: list[str] = []
    outer = config
    if isinstance(config.get("text_config"), dict):
        config = {**config["text_config"]}
        notes.append("the model sees more than text: only its language model is counted")
    kind = str(config.get("model_type") or outer.get("model_type") or "")
    strange = sorted(_NOT_KNOWN & config.keys())
    if kind in ("gpt2", "gpt_neox", "gpt_oss", "bloom", "opt", "falcon", "mamba") or strange:
        why = f" ({strange[0]})" if strange else ""
        raise UserError(
            f"config.json of {origin}: the sizes of model_type {kind or 'null'}{why} are not known "
            f"to a plan: known are {', '.join(sorted({*_GATED, *_PLAIN}))}"
        )
    if kind not in (*_GATED, *_PLAIN):
        notes.append(f"model_type {kind or 'null'} is not known, and is taken to be like Llama")
    take = _Fields(config, origin)
    D, L, V = take("hidden_size"), take("num_hidden_layers"), take("vocab_size")
    heads = take("num_attention_heads")
    kv_heads = take("num_key_value_heads", heads)
    head_dim = take("head_dim", D // heads)
    Q, K = heads * head_dim, kv_heads * head_dim
    num_experts = _experts(config)
    I = take("moe_intermediate_size" if num_experts and "moe_intermediate_size" in config  # noqa: E741
             else "intermediate_size", 4 * D if kind in _PLAIN else None)  # fmt: skip
    attention = [
        LinearSize("q_proj", D, Q, "columns"),
        LinearSize("k_proj", D, K, "columns"),
        LinearSize("v_proj", D, K, "columns"),
        LinearSize("dense" if kind == "phi" else "o_proj", Q, D, "rows"),
    ]
    mlp = [LinearSize("up_proj", D, I, "columns"), LinearSize("down_proj", I, D, "rows")]
    if kind == "phi":
        mlp = [LinearSize("fc1", D, I, "columns"), LinearSize("fc2", I, D, "rows")]
    elif kind == "starcoder2":
        mlp = [LinearSize("c_fc", D, I, "columns"), LinearSize("c_proj", I, D, "rows")]
    elif kind != "arcee":
        mlp.insert(0, LinearSize("gate_proj", D, I, "columns"))
    if kind == "phi3":
        attention = [LinearSize("qkv_proj", D, Q + 2 * K, "columns"), attention[3]]
        mlp = [LinearSize("gate_up_proj", D, 2 * I, "columns"), mlp[-1]]
    experts = active = 0
    if num_experts:
        per_token = take("num_experts_per_tok")
        experts, active = num_experts * 3 * D * I, per_token * 3 * D * I
        shared = config.get("shared_expert_intermediate_size")
        mlp = []
        if shared:
            mlp = [
                LinearSize("gate_proj", D, shared, "columns"),
                LinearSize("up_proj", D, shared, "columns"),
                LinearSize("down_proj", shared, D, "rows"),
            ]
        I = per_token * I + (shared or 0)  # noqa: E741
    tied = config.get("tie_word_embeddings", outer.get("tie_word_embeddings"))
    if tied is None:
        tied = kind in ("gemma", "gemma2", "gemma3_text", "starcoder2")
    dtype = str(config.get("dtype") or config.get("torch_dtype") or outer.get("dtype") or "")
    linears = tuple([*attention, *mlp])
    return Architecture(
        model_type=kind,
        origin=origin,
        hidden_size=D,
        num_layers=L,
        vocab_size=V,
        is_tied=bool(tied),
        num_heads=heads,
        num_kv_heads=kv_heads,
        query_size=Q,
        key_size=K,
        mlp_size=I,
        linears=linears,
        num_experts=num_experts,
        expert_size=experts,
        active_expert_size=active,
        other_size=_others(kind, config, linears, D, Q, K, V, head_dim, num_experts, L),
        stored_bytes=4 if dtype == "float32" else 2,
        max_positions=config.get("max_position_embeddings"),
        eager=kind in _EAGER,
        by_tokens=kind not in _WHOLE_ROWS,
        notes=tuple(notes),
    )


class _Fields:
    """Whole numbers of a config.json, or an error that names the one that is missing."""

    def __init__(self, config: Mapping[str, Any], origin: str):
        self._config, self._origin = config, origin

    def __call__(self, name: str, default: int | None = None) -> int:
        value = self._config.get(name)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(
                f"config.json of {self._origin}: {name} is {value!r}, and a plan needs a whole "
                "number above 0: give the config.json of a causal language model"
            )
        return value


def _experts(config: Mapping[str, Any]) -> int:
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    return next((int(config[n]) for n in names if isinstance(config.get(n), int)), 0)


def _others(
    kind: str,
    config: Mapping[str, Any],
    linears: Sequence[LinearSize],
    D: int,
    Q: int,
    K: int,
    V: int,
    head_dim: int,
    num_experts: int,
    num_layers: int,
) -> int:
    """Norms, biases and routers: a ten-thousandth of a model, counted so that totals are exact."""
    layer = _NORMS.get(kind, 2) * D
    last = D
    if kind in _HEAD_NORMS:
        layer += 2 * head_dim
    if kind == "olmo2":
        layer += Q + K
    if kind in _WITH_BIAS:
        layer += _NORMS.get(kind, 2) * D + sum(linear.outputs for linear in linears)
        last = 2 * D + (V if kind == "phi" else 0)
    elif config.get("attention_bias") or kind in _QKV_BIAS:
        layer += Q + 2 * K + (D if kind not in _QKV_BIAS else 0)
    if num_experts:
        layer += num_experts * D
        if config.get("shared_expert_intermediate_size"):
            layer += D
    return num_layers * layer + last
