"""Mixtures of experts, merged: files that hold experts otherwise than the model does."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from adapterkit import adapter_on
from distributed.runner import mostly_long, run_distributed
from expertskit import KINDS, dense_twin, experts, is_expert, tensors_of
from moored.config import Config, ModelConfig, ParallelConfig, load_config
from moored.export import merge, run_command
from moored.export.verification import experts_bytes
from moored.models.experts import experts_of
from moored.models.loading import load_base, require_architecture
from moored.training import train
from tiny import ALONE, tiny_model, tiny_recipe, write_recipe

pytestmark = pytest.mark.usefixtures("forked_verification")

CPU = torch.device("cpu")
IDS = (torch.arange(24)[None] * 7919 + 3) % 300


def merged(source: Path, adapter: Path, out: Path, base: str = "w16") -> Path:
    out.mkdir()
    config = ModelConfig(name_or_path=str(source), dtype="float32")
    merge.write(merge.plan(source, config, adapter, base, CPU), out, CPU)
    return out


def logits_of(folder: Path, adapter: Path | None = None) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        return model.eval()(IDS).logits


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
    assert sum("experts" in name for name in changed) >= 2 * (2 - kind.startswith("deepseek"))
    expected, before = logits_of(source, adapter), logits_of(source)
    difference = (logits_of(out) - expected).abs().max()
    assert difference <= 1e-5 * expected.abs().max()
    assert (before - expected).abs().max() > 100 * difference  # it could fail


@pytest.mark.parametrize("kind", KINDS)
def test_experts_are_merged_into_their_decoded_values(tmp_path, kind):
    """Each expert is packed by itself, however the files and the model lay it out."""
    source = experts(tmp_path / "model", kind, tie_word_embeddings=False)
    adapter = tmp_path / "adapter"
    inside = ["mlp.experts.down_proj"]
    adapter_on(source, adapter, target_modules=["o_proj"], target_parameters=inside)
    out = merged(source, adapter, tmp_path / "merged", "nf4")
    assert tensors_of(out).keys() == tensors_of(source).keys()

    twin = dense_twin(source).float()
    twin.set_experts_implementation("eager")
    with torch.no_grad():
        expected = peft.PeftModel.from_pretrained(twin, adapter).eval()(IDS).logits
    # A sum, and a rounding in fp32, more or less.
    assert (logits_of(out) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (logits_of(source, adapter) - expected).abs().max() > 1e-3 * expected.abs().max()


def test_the_merged_base_is_what_the_run_has_in_4_bits(tmp_path):
    source = experts(tmp_path / "model", "mixtral", tie_word_embeddings=False)
    adapter = tmp_path / "adapter"
    tensors = adapter_on(
        source, adapter, target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"]
    )
    ours = tensors_of(merged(source, adapter, tmp_path / "merged", "nf4"))
    config = ModelConfig(name_or_path=str(source), dtype="float32")
    base, _ = load_base(source, config, ALONE, ParallelConfig())
    held = next(iter(experts_of(base).values()))
    at = "model.layers.0.block_sparse_moe.experts"
    key = "base_model.model.model.layers.0.mlp.experts"
    a, b = tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"]
    for expert in range(4):
        both = torch.cat([ours[f"{at}.{expert}.{name}.weight"] for name in ("w1", "w3")])
        assert torch.equal(both, held.dequantized("gate_up_proj", expert, torch.float32))
        before = held.dequantized("down_proj", expert, torch.float64)
        low = a.reshape(4, -1, 96)[expert].double()
        added = 2 * b.reshape(64, -1, 4)[..., expert].double() @ low
        change = ours[f"{at}.{expert}.w2.weight"].double() - before
        assert (change - added).abs().max() <= 1e-6 * before.abs().max()


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


def test_what_stock_transformers_holds_of_experts_is_counted_in_16_bits(tmp_path):
    source = experts(tmp_path, "mixtral")
    config = ModelConfig(name_or_path=str(source))
    size = experts_bytes(require_architecture(source, config), torch.bfloat16)
    assert size == 2 * sum(t.numel() for name, t in tensors_of(source).items() if is_expert(name))


RUNS = {
    "mixtral": ["q_proj", "experts.gate_up_proj", "experts.down_proj"],
    "gpt_oss": ["o_proj", "experts.down_proj"],
    "qwen2_moe": "all-linear",
}


def trained(rank: int, world_size: int, config: Config, path: Path) -> None:
    train.run(config, path=path, parent=path.parent)


@pytest.mark.parametrize("kind", mostly_long(RUNS, "mixtral"))
def test_a_run_over_packed_experts_is_exported_verified_and_merged(tmp_path, kind):
    """Stock transformers leaves experts in 16 bits; what it is compared with has decoded ones."""
    recipe = tiny_recipe(tmp_path)
    source = experts(tmp_path / "experts", kind)
    recipe["model"]["name_or_path"] = str(source)
    recipe["adapter"]["target_modules"] = RUNS[kind]
    recipe["optim"]["learning_rate"] = 0.05  # so that the adapter's effect stands out
    recipe["train"]["gradient_checkpointing"] = "non_reentrant"
    config = load_config(write_recipe(tmp_path, recipe))
    run = tmp_path / "run"
    run_distributed(trained, 1, config, run)
    run_command(run, tmp_path / "adapter")
    run_command(run, tmp_path / "merged", merged=True, base="nf4")

    twin = dense_twin(source).float()
    with torch.no_grad():
        on = peft.PeftModel.from_pretrained(twin, tmp_path / "adapter").eval()(IDS).logits
    off = dense_twin(source)(IDS).logits
    difference = (logits_of(tmp_path / "merged") - on).abs().max()
    assert difference <= 1e-4 * on.abs().max()
    assert (on - off).abs().max() > 10 * difference
