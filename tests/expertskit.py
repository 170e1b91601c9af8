"""Tiny mixtures of experts of many architectures, and their experts written plainly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from adapterkit import in_nf4
from tiny import tiny_tokenizer

SIZES = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "eos_token_id": 0,
    "bos_token_id": None,
    "pad_token_id": 0,
}
FEW = {"num_experts": 4, "num_experts_per_tok": 2}
MLA = {
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
}
# How each of them has its experts in its files: one by one, or in one tensor.
KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "qwen3_moe": (transformers.Qwen3MoeConfig, FEW | {"moe_intermediate_size": 32}),
    "qwen2_moe": (
        transformers.Qwen2MoeConfig,
        FEW | {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
    ),
    "olmoe": (transformers.OlmoeConfig, FEW),
    "mixtral": (transformers.MixtralConfig, {"num_local_experts": 4}),
    "gpt_oss": (
        transformers.GptOssConfig,
        {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16},
    ),
    "deepseek_v2": (transformers.DeepseekV2Config, MLA | {"topk_method": "greedy"}),
    "deepseek_v3": (transformers.DeepseekV3Config, MLA),
}


def experts(folder: Path, kind: str, **settings: Any) -> Path:
    """Save a tiny mixture of experts with random weights, biases among them, and a tokenizer."""
    config, own = KINDS[kind]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config(**(SIZES | own | settings)))
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "experts" in name or "gate.weight" in name or "router" in name:
                tensor.normal_(std=0.04)  # biases, too
            elif "e_score_correction_bias" in name:
                tensor.uniform_(-0.2, 0.2)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def is_expert(name: str) -> bool:
    """Whether a tensor of a model is the matrices of a layer's experts."""
    return "experts." in name and "shared" not in name and not name.endswith("bias")


def dense_twin(folder: Path, *, double: bool = True) -> Any:
    """Stock transformers in fp64 with every value that is held in 4 bits decoded, experts eager."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager", attn_implementation="eager"
    )
    modules = dict(model.named_modules())
    with torch.no_grad():
        for name, weight in model.named_parameters():
            owner = modules[name.rpartition(".")[0]]
            if is_expert(name):
                transposed = getattr(owner, "is_transposed", False)
                for matrix in weight:
                    matrix.copy_(in_nf4(matrix, transposed=transposed, double=double))
            elif (
                isinstance(owner, torch.nn.Linear)
                and owner is not model.get_output_embeddings()
                and weight.shape[0] > 1  # the gate of a shared expert
                and weight.dim() == 2
            ):
                weight.copy_(in_nf4(weight, double=double))
    return model.double().eval()


def mixed(
    x: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up: list[Tensor],
    down: list[Tensor],
) -> Tensor:
    """What experts with SiLU gates make of tokens [T, D], one token and one expert at a time."""
    rows = []
    for token in range(len(x)):
        total = torch.zeros_like(x[token])
        for k in range(top_k_index.shape[1]):
            expert = int(top_k_index[token, k])
            both = gate_up[expert] @ x[token]
            gate, up = both[: len(both) // 2], both[len(both) // 2 :]
            hidden = gate / (1 + torch.exp(-gate)) * up
            total = total + top_k_weights[token, k] * (down[expert] @ hidden)
        rows.append(total)
    return torch.stack(rows)


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder."""
    return {k: v for f in folder.glob("*.safetensors") for k, v in load_file(f).items()}


def rewrite(folder: Path, tensors: dict[str, Tensor], **config: Any) -> None:
    """Put other tensors, and other settings, into a saved model."""
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
