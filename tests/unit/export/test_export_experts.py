"""Mixtures of experts, merged: files that hold experts otherwise than the model does."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from adapterkit import adapter_on, in_nf4
from moored.config import ModelConfig
from moored.export import merge
from tiny import tiny_model, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("forked_verification")

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
CPU = torch.device("cpu")
# How each of them has its experts in its files: one by one, or in one tensor.
KINDS = {
    "qwen3_moe": (transformers.Qwen3MoeConfig, FEW | {"moe_intermediate_size": 32}),
    "qwen2_moe": (
        transformers.Qwen2MoeConfig,
        FEW | {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
    ),
    "olmoe": (transformers.OlmoeConfig, FEW),
    "mixtral": (transformers.MixtralConfig, {"num_local_experts": 4}),
    "gpt_oss": (transformers.GptOssConfig, {"num_local_experts": 4, "head_dim": 16}),
    "deepseek_v3": (
        transformers.DeepseekV3Config,
        {
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
        },
    ),
}


def experts(folder: Path, kind: str, **settings: object) -> Path:
    config, own = KINDS[kind]
    torch.manual_seed(0)
    whole = config(**(SIZES | own | settings))
    transformers.AutoModelForCausalLM.from_config(whole).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def merged(source: Path, adapter: Path, out: Path, base: str = "w16") -> Path:
    out.mkdir()
    config = ModelConfig(name_or_path=str(source), dtype="float32")
    merge.write(merge.plan(source, config, adapter, base, CPU), out, CPU)
    return out


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for f in folder.glob("*.safetensors") for k, v in load_file(f).items()}


def logits_of(folder: Path, adapter: Path | None = None) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        return model.eval()((torch.arange(24)[None] * 7919 + 3) % 300).logits


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_experts_are_merged_as_peft_does_and_named_as_in_the_base(
    tmp_path, monkeypatch, kind, tied
):
    source = experts(tmp_path / "model", kind, tie_word_embeddings=tied)
    adapter = tmp_path / "adapter"
    inside = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    adapter_on(source, adapter, target_modules="all-linear", target_parameters=inside)
    monkeypatch.setattr(merge, "SHARD_BYTES", 60_000)  # experts of a layer in several files
    out = merged(source, adapter, tmp_path / "merged")

    assert len(list(out.glob("*.safetensors"))) > 3
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload()
    model.save_pretrained(tmp_path / "stock")
    stock, ours, base = (tensors_of(p) for p in (tmp_path / "stock", out, source))
    assert ours.keys() == base.keys() == stock.keys()
    for name, tensor in stock.items():
        # One sum and one rounding in fp32 more or less.
        assert (ours[name] - tensor).abs().max() <= 1e-6 * tensor.abs().max(), name
    changed = {name for name in ours if not torch.equal(ours[name], base[name])}
    assert sum("experts" in name for name in changed) >= 2 * (2 - (kind == "deepseek_v3"))
    expected, before = logits_of(source, adapter), logits_of(source)
    difference = (logits_of(out) - expected).abs().max()
    assert difference <= 1e-5 * expected.abs().max()
    assert (before - expected).abs().max() > 100 * difference  # it could fail


def test_experts_keep_their_values_beside_layers_in_4_bits(tmp_path):
    """bitsandbytes packs linear layers only: what the run had of the experts was unrounded."""
    source = experts(tmp_path / "model", "mixtral", tie_word_embeddings=False)
    adapter = tmp_path / "adapter"
    tensors = adapter_on(
        source, adapter, target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"]
    )
    ours = tensors_of(merged(source, adapter, tmp_path / "merged", "nf4"))
    base = tensors_of(source)
    experts_at = "model.layers.0.block_sparse_moe.experts.0"
    assert torch.equal(ours[f"{experts_at}.w1.weight"], base[f"{experts_at}.w1.weight"])
    assert torch.equal(
        ours["model.layers.1.self_attn.k_proj.weight"],
        in_nf4(base["model.layers.1.self_attn.k_proj.weight"]),
    )
    key = "base_model.model.model.layers.0.mlp.experts"
    a, b = tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"]
    first = b.reshape(64, -1, 4)[..., 0].double() @ a.reshape(4, -1, 96)[0].double()  # expert 0
    name = f"{experts_at}.w2.weight"
    change = ours[name].double() - base[name].double()
    assert (change - 2 * first).abs().max() <= 1e-6 * base[name].abs().max()


def test_files_that_are_no_safetensors_are_converted_first(tmp_path):
    source = tiny_model(tmp_path / "model")
    adapter_on(source, tmp_path / "adapter", target_modules=["q_proj"])
    expected = logits_of(source, tmp_path / "adapter")
    torch.save(load_file(source / "model.safetensors"), source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    config = ModelConfig(name_or_path=str(source), dtype="float32")
    with pytest.raises(merge.OtherNamesError):
        merge.plan(source, config, tmp_path / "adapter", "w16", CPU)
    merge.renamed(source, config, tmp_path / "renamed")
    out = merged(tmp_path / "renamed", tmp_path / "adapter", tmp_path / "merged")
    assert (logits_of(out) - expected).abs().max() <= 1e-5 * expected.abs().max()
