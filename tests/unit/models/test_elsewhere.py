"""Adapters of other trainers: measured and merged as stock PEFT has them, or refused in a line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from moored.adapted import adapters_off, dropout_off
from moored.config import Config, ModelConfig, load_config
from moored.data.batch import Batch
from moored.export import merge, run_command
from moored.models.adapters import scaled, write_scaled
from moored.models.policy import PolicyModel, load_policy
from moored.models.reference import of_base
from moored.utils.errors import UserError
from tiny import ALONE, tiny_recipe, write_recipe

pytestmark = pytest.mark.usefixtures("forked_verification")

CPU = torch.device("cpu")
IDS = (torch.arange(24)[None] * 7919 + 3) % 290
IDS[0, 3], IDS[0, 9] = 5, 7  # tokens that some adapters train
TWO = ["q_proj", "down_proj"]


def lora(**settings: Any) -> peft.LoraConfig:
    values = {"r": 4, "lora_alpha": 8, "target_modules": TWO, "task_type": "CAUSAL_LM"}
    return peft.LoraConfig(**(values | settings))


def on_two(config: Any, **settings: Any) -> Any:
    return config(target_modules=TWO, task_type="CAUSAL_LM", **settings)


WORK = {
    "head": lambda: lora(modules_to_save=["lm_head"]),
    "embedding": lambda: lora(modules_to_save=["embed_tokens"]),
    "both": lambda: lora(modules_to_save=["embed_tokens", "lm_head"]),
    "both-tied": lambda: lora(
        modules_to_save=["embed_tokens", "lm_head"], ensure_weight_tying=True
    ),
    "norm": lambda: lora(modules_to_save=["norm"]),
    "layer": lambda: lora(modules_to_save=["o_proj"]),
    "tokens": lambda: lora(trainable_token_indices=[5, 7]),
    "tokens-of-head": lambda: lora(trainable_token_indices={"lm_head": [5, 7]}),
    "tokens-alone": lambda: peft.TrainableTokensConfig(
        token_indices=[5, 7], target_modules=["embed_tokens"], task_type="CAUSAL_LM"
    ),
    "lora-on-head": lambda: lora(target_modules=[*TWO, "lm_head"]),
    "lora-on-embedding": lambda: lora(target_modules=[*TWO, "embed_tokens"]),
    "lora-on-both": lambda: lora(target_modules=["embed_tokens", "lm_head"]),
    "dora-on-head": lambda: lora(target_modules=[*TWO, "lm_head"], use_dora=True),
    "bias-all": lambda: lora(bias="all"),
    "bias-lora": lambda: lora(target_modules=["q_proj", "v_proj"], bias="lora_only"),
    "lora-bias": lambda: lora(target_modules=["q_proj", "v_proj"], lora_bias=True),
    "parameters": lambda: lora(target_parameters=["o_proj.weight"]),
    "excluded": lambda: lora(exclude_modules=["layers.0.*"]),
    "one-layer": lambda: lora(layers_to_transform=[1]),
    "fan-in": lambda: lora(fan_in_fan_out=True),
    "qalora": lambda: lora(use_qalora=True, qalora_group_size=16),
    "patterns": lambda: lora(rank_pattern={"q_proj": 8}, alpha_pattern={"down_proj": 32}),
    "no-task": lambda: lora(task_type=None),
    "ia3": lambda: on_two(peft.IA3Config, feedforward_modules=["down_proj"]),
    "oft": lambda: on_two(peft.OFTConfig, r=4, oft_block_size=0),
    "boft": lambda: on_two(peft.BOFTConfig, boft_block_size=4),
    "loha": lambda: on_two(peft.LoHaConfig, r=4),
    "lokr": lambda: on_two(peft.LoKrConfig, r=4),
    "hra": lambda: on_two(peft.HRAConfig, r=4),
    "adalora": lambda: on_two(peft.AdaLoraConfig, target_r=4, init_r=4, total_step=10),
    "fourierft": lambda: on_two(peft.FourierFTConfig, n_frequency=50),
    "vblora": lambda: on_two(peft.VBLoRAConfig, r=4, num_vectors=8, vector_length=16),
    "miss": lambda: on_two(peft.MissConfig, r=4),
    "shira": lambda: on_two(peft.ShiraConfig, r=4),
    "c3a": lambda: on_two(peft.C3AConfig, block_size=16),
    "vera": lambda: peft.VeraConfig(
        r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", save_projection=False
    ),
    "norms": lambda: peft.LNTuningConfig(task_type="CAUSAL_LM"),
}
TASK = "has causal language models only"
# What is said when it is measured, and when it is merged.
REFUSED = {
    "alora": (lambda: lora(alora_invocation_tokens=[10, 11]), "aLoRA .* its invocation only"),
    "more-layers": (lambda: lora(layer_replication=[(0, 2), (1, 2)]), "with more layers than"),
    "pissa": (lambda: lora(init_lora_weights="pissa"), "is pissa, by which PEFT rewrites the base"),
    "olora": (lambda: lora(init_lora_weights="olora"), "is olora, by which PEFT rewrites the base"),
    "classifier": (lambda: lora(task_type="SEQ_CLS"), f"task_type is SEQ_CLS, but Moored {TASK}"),
    "features": (lambda: lora(task_type="FEATURE_EXTRACTION"), TASK),
    "prompt": (
        lambda: peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
        "PROMPT_TUNING puts tokens before the text",
    ),
    "prefix": (
        lambda: peft.PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
        "PREFIX_TUNING puts tokens before the text",
    ),
}


def made_by_peft(folder: Path, config: Any, tied: bool, architecture: str = "llama") -> Config:
    """A model with an adapter that stock PEFT saved, all of it random, and a recipe of it."""
    recipe = tiny_recipe(folder, architecture, tie_word_embeddings=tied)
    recipe["model"]["quantization"] = "none"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    model = peft.get_peft_model(model, config)
    torch.manual_seed(3)
    for name, p in model.named_parameters():
        if p.requires_grad:  # magnitudes, norms and factors stay near 1
            near = "magnitude" in name or p.data.abs().max() > 0.9
            noise = torch.rand_like(p) * 0.3 if near else torch.randn_like(p) * 0.1
            p.data = p.data * (1 + noise) if near else p.data + noise
    model.save_pretrained(folder / "adapter")
    return load_config(write_recipe(folder, recipe))


def stock_logits(model: Path, adapter: Path | None = None) -> torch.Tensor:
    causal_lm = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    if adapter is not None:
        causal_lm = peft.PeftModel.from_pretrained(causal_lm, adapter)
    with torch.no_grad():
        return causal_lm.eval()(IDS).logits[0].double()


def all_targets() -> Batch:
    num = IDS.shape[1] - 1
    return Batch(
        input_ids=IDS,
        position_ids=torch.arange(num + 1)[None],
        target_index=torch.arange(num),
        targets=IDS[0, 1:],
        kl_mask=torch.ones(num, dtype=torch.bool),
        sample_ids=("a",),
        num_targets=num,
        num_kl=num,
        num_tokens=num + 1,
        sample_lengths=((num + 1,),),
    )


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", WORK)
def test_it_is_measured_and_merged_as_stock_peft_has_it(tmp_path, kind, tied):
    # Qwen2's projections of attention have biases.
    config = made_by_peft(tmp_path, WORK[kind](), tied, "qwen2" if "bias" in kind else "llama")
    model, adapter = tmp_path / "model", tmp_path / "adapter"
    on, off = stock_logits(model, adapter), stock_logits(model)
    effect = (on - off).abs().max()
    assert effect > 1e-3  # else nothing could be told

    policy, batch = load_policy(model, config, ALONE, adapter=adapter), all_targets()
    with torch.no_grad():
        reference = of_base(policy, batch)
        if not getattr(policy.causal_lm, "replaced", ()):  # which stay on by PEFT's own means
            with dropout_off(policy), policy.causal_lm.disable_adapter():
                assert torch.equal(policy(batch), reference)
        found = policy(batch, reference, use=PolicyModel.drift, num_spots=3)
        asked = {"input_ids": IDS[:, :8], "max_new_tokens": 6, "do_sample": False}
        answers = {"on": policy(use=PolicyModel.generate, **asked)}
        with adapters_off(policy):
            answers["off"] = policy(use=PolicyModel.generate, **asked)
    log_p, log_q = (logits[:-1].log_softmax(-1) for logits in (on, off))
    at = IDS[0, 1:, None]
    kl = (log_q.exp() * (log_q - log_p)).sum(-1)
    expected = (-log_p.gather(1, at)[:, 0], -log_q.gather(1, at)[:, 0], kl)
    for got, right in zip((found.ce_policy, found.ce_reference, found.kl), expected, strict=True):
        # fp32 logits of size 5, summed over 300 words
        assert (got - right).abs().max() <= 5e-6
    assert found.spots is not None
    spot = found.spots.rows
    right = log_p[spot].gather(1, found.spots.tokens)
    assert (found.spots.log_p_policy - right).abs().max() <= 5e-6
    right = log_q[spot].gather(1, found.spots.tokens)
    assert (found.spots.log_p_reference - right).abs().max() <= 5e-6
    stock = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    assert torch.equal(stock.generate(**asked), answers["off"])
    stock = peft.PeftModel.from_pretrained(stock, adapter).eval()
    assert torch.equal(stock.generate(**asked), answers["on"])

    out = tmp_path / "merged"
    out.mkdir()
    named = ModelConfig(name_or_path=str(model), dtype="float32")
    merge.write(merge.plan(model, named, adapter, "w16", CPU), out, CPU)
    assert (stock_logits(out) - on).abs().max() <= 1e-5 * on.abs().max()
    parts = kind in ("head", "embedding", "both", "both-tied") or kind.startswith("lora-on")
    parts = parts or kind in ("dora-on-head", "tokens-of-head")
    tensors = load_file(out / merge.SINGLE)
    assert ("lm_head.weight" in tensors) == (not tied or parts)


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_measured_or_merged_is_refused_in_a_line(tmp_path, kind):
    make, says = REFUSED[kind]
    config = made_by_peft(tmp_path, make(), True)
    model, adapter = tmp_path / "model", tmp_path / "adapter"
    named = ModelConfig(name_or_path=str(model), dtype="float32")
    for act in (
        lambda: load_policy(model, config, ALONE, adapter=adapter),
        lambda: merge.plan(model, named, adapter, "w16", CPU),
    ):
        with pytest.raises(UserError, match=says) as raised:
            act()
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("kind", ["alora", "prompt", "prefix"])
def test_what_acts_by_pefts_forward_alone_is_exported_as_it_is(tmp_path, kind, capsys):
    made_by_peft(tmp_path, REFUSED[kind][0](), True)
    out = tmp_path / "out"
    run_command(tmp_path / "adapter", out, recipe=tmp_path / "tiny.yaml")
    name = "adapter_model.safetensors"
    assert (out / name).read_bytes() == (tmp_path / "adapter" / name).read_bytes()
    assert "verified on" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["head", "tokens", "lora-on-embedding", "bias-all", "ia3"])
@pytest.mark.parametrize("merged", [False, True])
def test_it_is_exported_from_a_base_in_4_bits(tmp_path, kind, merged, capsys):
    """And verified there by stock PEFT in a fresh process, on its 4-bit weights."""
    made_by_peft(tmp_path, WORK[kind](), True, "qwen2" if "bias" in kind else "llama")
    recipe = json.loads((tmp_path / "tiny.yaml").read_text())
    recipe["model"]["quantization"] = "nf4"
    path = write_recipe(tmp_path, recipe)
    base = "nf4" if merged else None
    run_command(tmp_path / "adapter", tmp_path / "out", merged=merged, base=base, recipe=path)
    said = capsys.readouterr().out
    assert "verified on" in said
    found = json.loads((tmp_path / "out/export.json").read_text())["verified"]
    assert found["relative_rms_of_logits"]["share"] == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("changed", [False, True])
@pytest.mark.parametrize("tied", [True, False])
def test_tensors_of_the_base_in_the_file_count_where_they_differ(tmp_path, tied, changed):
    """PEFT writes head and embedding (save_embedding_layers), and loads them into the base."""
    config = made_by_peft(tmp_path, lora(), tied)
    model, adapter = tmp_path / "model", tmp_path / "adapter"
    file, base = adapter / "adapter_model.safetensors", load_file(model / "model.safetensors")
    value = base["model.embed_tokens.weight"] * (1.5 if changed else 1)
    tensors = load_file(file) | {"base_model.model.model.embed_tokens.weight": value}
    save_file(tensors, file)
    on, off = stock_logits(model, adapter), stock_logits(model)
    policy, batch = load_policy(model, config, ALONE, adapter=adapter), all_targets()
    with torch.no_grad():
        found = policy(batch, of_base(policy, batch), use=PolicyModel.drift)
    for got, logits in ((found.ce_policy, on), (found.ce_reference, off)):
        right = -logits[:-1].log_softmax(-1).gather(1, IDS[0, 1:, None])[:, 0]
        assert (got - right).abs().max() <= 5e-6
    out = tmp_path / "merged"
    out.mkdir()
    named = ModelConfig(name_or_path=str(model), dtype="float32")
    merge.write(merge.plan(model, named, adapter, "w16", CPU), out, CPU)
    assert (stock_logits(out) - on).abs().max() <= 1e-5 * on.abs().max()
    assert ("lm_head.weight" in load_file(out / merge.SINGLE)) != tied


def test_other_faults_are_named_in_a_line(tmp_path):
    config = made_by_peft(tmp_path, lora(modules_to_save=["lm_head"]), True)
    model, adapter = tmp_path / "model", tmp_path / "adapter"

    def refused(says: str, **changes: Any) -> None:
        named = ModelConfig(name_or_path=str(model), dtype="float32")
        folder = tmp_path / "changed"
        shutil.copytree(adapter, folder)
        settings = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(settings | changes))
        tensors = load_file(folder / "adapter_model.safetensors")
        key = "base_model.model.lm_head.weight"
        if "size mismatch" in says:
            tensors[key] = torch.cat([tensors[key], tensors[key][:3]])
        if "score" in says:
            tensors["base_model.model.score.weight"] = tensors[key][:2].clone()
        save_file(tensors, folder / "adapter_model.safetensors")
        for act in (
            lambda: load_policy(model, config, ALONE, adapter=folder),
            lambda: merge.plan(model, named, folder, "w16", CPU),
        ):
            with pytest.raises(UserError, match=says) as raised:
                act()
            assert "\n" not in str(raised.value)
        shutil.rmtree(folder)

    refused("not an adapter for this base: .*size mismatch for base_model.model.lm_head")
    refused(r"the base has no place for base_model\.model\.score\.weight")
    refused("not an adapter for this base: No modules were targeted", target_modules=["nowhere"])
    refused("not an adapter for this base: .*NOVEL", peft_type="NOVEL")
    made_by_peft(tmp_path / "bias", lora(lora_bias=True), True)
    named = ModelConfig(name_or_path=str(model), dtype="float32")
    with pytest.raises(UserError, match=r"lora_bias adds to .*q_proj, which has no bias in the"):
        merge.plan(model, named, tmp_path / "bias/adapter", "w16", CPU)


@pytest.mark.parametrize("kind", ["head", "tokens", "lora-on-head", "bias-all", "ia3", "dora"])
def test_what_alpha_does_not_scale_has_no_scale(tmp_path, kind):
    make = WORK.get(kind, lambda: lora(use_dora=True))
    config = made_by_peft(tmp_path, make(), True, "qwen2" if "bias" in kind else "llama")
    policy = load_policy(tmp_path / "model", config, ALONE, adapter=tmp_path / "adapter")
    with pytest.raises(UserError, match=r"--scale: .*this one is not"), scaled(policy.causal_lm, 2):
        pass
    if kind != "lora-on-head":  # whose file's alpha does scale it
        with pytest.raises(UserError, match=r"--scale: .*this one is not"):
            write_scaled(tmp_path / "adapter", tmp_path / "scaled", 2)
