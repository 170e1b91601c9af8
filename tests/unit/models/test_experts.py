"""Experts in 4 bits: what they hold, what they compute, and what is refused."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import peft
import pytest
import torch
import transformers
from peft.tuners import lora
from peft.tuners.lora import LoraLayer

from adapterkit import in_nf4
from expertskit import (
    KINDS,
    SIZES,
    dense_twin,
    experts,
    is_expert,
    mixed,
    rewrite,
    tensors_of,
)
from moored.config import Config, ModelConfig, ParallelConfig, load_config
from moored.models.adapters import ExpertLora
from moored.models.experts import Experts4bit, Routed, experts_of
from moored.models.loading import load_base, require_architecture
from moored.models.policy import load_policy
from moored.utils.errors import UserError
from tiny import ALONE, tiny_recipe, write_recipe

IDS = (torch.arange(24)[None] * 7919 + 3) % 300


def model_config(folder: Path, **settings: Any) -> ModelConfig:
    given = {"quantization": "nf4", "dtype": "float32"} | settings
    return ModelConfig.model_validate({"name_or_path": str(folder)} | given)


def base_of(folder: Path, **settings: Any) -> Any:
    return load_base(folder, model_config(folder, **settings), ALONE, ParallelConfig())[0]


def layer_of(folder: Path, **settings: Any) -> Any:
    return next(iter(experts_of(base_of(folder, **settings)).values()))


def seen(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Final hidden states, and the gradient of a sum of them with respect to the embeddings."""
    words = model.get_input_embeddings()(IDS).detach().requires_grad_()
    hidden = model.model(inputs_embeds=words).last_hidden_state
    torch.manual_seed(3)
    hidden.backward(torch.randn(hidden.shape, dtype=torch.float64).to(hidden.dtype))
    assert words.grad is not None
    return hidden.detach().double(), words.grad.double()


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_is_the_dense_one_of_decoded_weights(tmp_path, kind, double):
    source = experts(tmp_path / "model", kind)
    base = base_of(source, double_quantization=double)
    assert all(isinstance(module, Experts4bit) for module in experts_of(base).values())
    assert experts_of(base)
    twin = dense_twin(source, double=double)
    twin.requires_grad_(False)
    for ours, theirs in zip(seen(base), seen(twin), strict=True):
        # Sums of some hundred fp32 terms over two layers, each off by 6e-8 at most.
        assert (ours - theirs).abs().max() <= 3e-5 * theirs.abs().max()
    assert not any(p.requires_grad or p.grad is not None for p in base.parameters())


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_4_bit_mixture_holds_half_a_byte_for_each_weight(tmp_path, kind, double):
    """Counted from storages: all that is reachable from the model."""
    source = experts(tmp_path / "model", kind, hidden_size=128, intermediate_size=256)
    base = base_of(source, dtype="bfloat16", double_quantization=double)
    stored = {k: v for k, v in tensors_of(source).items() if is_expert(k)}
    elements = sum(v.numel() for v in stored.values())
    tensors = [t for m in experts_of(base).values() for _, t in m.held()]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    per_weight = 8 * sum(storages.values()) / elements
    # Codes, and a scale for 64 of them: 32 bits, or 8 and what is for 256 scales or an expert.
    assert 4 < per_weight <= (4.2 if double else 4.5)
    floats = {name: p for name, p in base.named_parameters() if p.is_floating_point()}
    assert not any(p.dim() == 3 for p in floats.values())
    assert all(p.numel() * p.itemsize < 5e5 for p in floats.values())


@pytest.mark.parametrize("kind", KINDS)
def test_routers_stay_in_full_precision_and_shared_experts_do_not(tmp_path, kind):
    source = experts(tmp_path / "model", kind)
    base, stored = base_of(source), tensors_of(source)
    known = dict(base.named_parameters())
    shared = 0
    for path, module in base.named_modules():
        if "shared_expert" in path and path.endswith("_proj"):
            shared += isinstance(module, bnb.nn.Linear4bit)
    assert (shared > 0) == (kind in ("qwen2_moe", "deepseek_v2", "deepseek_v3"))
    routers = [name for name in known if ".gate." in name or "router" in name or "_gate." in name]
    assert routers
    for name in routers:
        in_files = name.replace("mlp.gate", "block_sparse_moe.gate") if kind == "mixtral" else name
        assert torch.equal(known[name], stored[in_files]), name


def in_fp64(layer: Experts4bit) -> Experts4bit:
    layer.compute_dtype = torch.float64
    return layer


def test_the_products_are_those_of_one_expert_and_one_token_at_a_time(tmp_path):
    """In fp64, with gradients for input and weights of the routing; one expert gets no token."""
    source = experts(tmp_path / "model", "qwen3_moe")
    layer, stored = in_fp64(layer_of(source)), tensors_of(source)
    at = "model.layers.0.mlp.experts"

    def decoded(name: str) -> torch.Tensor:
        return in_nf4(stored[name]).double()

    gate_up = [
        # Gate above up, as transformers puts them: one matrix, whose scales share their scales.
        in_nf4(
            torch.cat([stored[f"{at}.{e}.gate_proj.weight"], stored[f"{at}.{e}.up_proj.weight"]])
        )
        for e in range(4)
    ]
    down = [decoded(f"{at}.{e}.down_proj.weight") for e in range(4)]
    torch.manual_seed(1)
    x = torch.randn(13, 64, dtype=torch.float64, requires_grad=True)
    index = torch.stack([torch.randperm(3)[:2] for _ in range(13)])  # never the last expert
    weights = torch.rand(13, 2, dtype=torch.float64, requires_grad=True)
    up = torch.randn(13, 64, dtype=torch.float64)
    ours = layer(x, index, weights)
    found = torch.autograd.grad(ours, [x, weights], up)
    theirs = mixed(x, index, weights, [m.double() for m in gate_up], down)
    for a, b in zip(found, torch.autograd.grad(theirs, [x, weights], up), strict=True):
        assert (a - b).abs().max() <= 1e-13 * max(1.0, float(b.abs().max()))
    assert (ours - theirs).abs().max() <= 1e-13 * theirs.abs().max()


def test_an_expert_without_tokens_is_not_decoded_and_none_is_kept(tmp_path, monkeypatch):
    layer = layer_of(experts(tmp_path / "model", "olmoe"))
    decoded: list[int] = []
    decode = type(layer).dequantized

    def noted(self: Any, kind: str, expert: int, dtype: torch.dtype) -> torch.Tensor:
        decoded.append(expert)
        return decode(self, kind, expert, dtype)

    monkeypatch.setattr(type(layer), "dequantized", noted)
    x = torch.randn(5, 64, requires_grad=True)
    saved: list[torch.Tensor] = []
    index = torch.tensor([[0, 2]] * 5)

    def note(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        y = layer(x, index, torch.ones(5, 2))
    y.sum().backward()
    assert sorted(set(decoded)) == [0, 2]
    matrices = {layer.shape_of(kind) for kind in layer.matrices}
    sizes = matrices | {shape[::-1] for shape in matrices}
    assert not any(tuple(tensor.shape[-2:]) in sizes for tensor in saved)


@pytest.mark.parametrize("num_tokens", [0, 1, 7])
def test_what_is_held_elsewhere_adds_nothing(tmp_path, num_tokens):
    layer = in_fp64(layer_of(experts(tmp_path / "model", "gpt_oss")))
    x = torch.randn(num_tokens, 64, dtype=torch.float64, requires_grad=True)
    index = torch.stack([torch.arange(num_tokens) % 4, (torch.arange(num_tokens) + 1) % 4], 1)
    weights = torch.rand(num_tokens, 2, dtype=torch.float64)
    whole = layer(x, index, weights)
    parts = torch.zeros_like(whole)
    for held in range(4):
        # Four is past the last: an expert of another rank.
        parts = parts + layer(x, torch.where(index == held, index, 4), weights)
    assert whole.shape == x.shape
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-12)
    assert layer(x, torch.full_like(index, 4), weights).abs().sum() == 0
    whole.sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_pairs_are_sorted_by_expert_and_keep_their_order():
    routed = Routed.of(torch.tensor([[3, 0], [0, 5], [3, 1]]), 4)
    assert routed.groups == ((0, 0, 2), (1, 2, 3), (3, 3, 5))
    assert routed.pairs.tolist() == [1, 2, 5, 0, 4]
    assert routed.tokens.tolist() == [0, 1, 2, 0, 2]


def test_bf16_computes_in_bf16_and_weighs_as_the_router_says(tmp_path):
    source = experts(tmp_path / "model", "mixtral")
    layer = layer_of(source, dtype="bfloat16")
    up, down = (
        [layer.dequantized(kind, expert, torch.float64) for expert in range(4)]
        for kind in layer.matrices
    )
    torch.manual_seed(0)
    x = torch.randn(9, 64, dtype=torch.bfloat16)
    index = torch.stack([torch.randperm(4)[:2] for _ in range(9)])
    weights = torch.rand(9, 2)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x, index, weights)
    assert y.dtype == torch.bfloat16
    expected = mixed(x.double(), index, weights.double(), up, down)
    # Both products, the gate and the sum are rounded to the 8 bits of bf16.
    assert (y.double() - expected).abs().max() <= 4 * 2**-9 * expected.abs().max()


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_what_is_in_the_cache_is_what_was_quantised(tmp_path, monkeypatch, caplog, kind):
    monkeypatch.setenv("MOORED_CACHE", str(tmp_path / "cache"))
    source = experts(tmp_path / "model", kind)
    first = base_of(source, cache_quantized=True)
    # Whatever is quantised from here on would be another thing.
    monkeypatch.setattr("moored.models.weights.pack", None)
    with caplog.at_level(logging.INFO):
        again = base_of(source, cache_quantized=True)
    assert "quantised weights from" in caplog.text
    for one, other in zip(experts_of(first).values(), experts_of(again).values(), strict=True):
        ours, theirs = dict(one.held()), dict(other.held())
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert torch.equal(first(IDS).logits, again(IDS).logits)


# ---------------------------------------------------------------- what is refused

REFUSED = {
    "dbrx": (
        transformers.DbrxConfig,
        {
            "d_model": 64,
            "n_heads": 4,
            "n_layers": 1,
            "vocab_size": 300,
            "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
            "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4},
        },
    ),
    "jetmoe": (
        transformers.JetMoeConfig,
        SIZES | {"num_local_experts": 4, "kv_channels": 16, "num_experts_per_tok": 2},
    ),
    "llama4": (
        transformers.Llama4TextConfig,
        SIZES | {"num_local_experts": 4, "intermediate_size_mlp": 64, "head_dim": 16},
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_experts_that_would_stay_in_16_bits_are_refused_by_config_json_alone(tmp_path, kind):
    config, settings = REFUSED[kind]
    config(**settings).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"cannot be held in 4 bits.*model\.quantization to none"):
        require_architecture(tmp_path, model_config(tmp_path))
    require_architecture(tmp_path, model_config(tmp_path, quantization="none"))


@pytest.mark.parametrize(
    ("method", "named"), [("mxfp4", "Mxfp4Config"), ("fp8", "FineGrainedFP8Config")]
)
def test_a_mixture_that_is_quantised_otherwise_is_refused_with_what_decodes_it(
    tmp_path, method, named
):
    source = experts(tmp_path, "gpt_oss" if method == "mxfp4" else "deepseek_v3")
    rewrite(source, tensors_of(source), quantization_config={"quant_method": method})
    with pytest.raises(UserError, match=rf"quantised already \({method}\).*{named}\(dequantize"):
        require_architecture(source, model_config(source))
    assert hasattr(transformers, named)


def test_experts_that_were_packed_one_by_one_are_refused(tmp_path):
    source = experts(tmp_path, "mixtral")
    own = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    own["bnb_4bit_use_double_quant"] = True
    rewrite(source, tensors_of(source), quantization_config=own)
    with pytest.raises(UserError, match=r"packed in 4 bits one by one.*the unquantised model"):
        require_architecture(source, model_config(source))


def test_files_whose_conversion_is_not_known_are_refused_instead_of_held_in_16_bits(
    tmp_path, caplog
):
    source = experts(tmp_path, "mixtral")
    tensors = tensors_of(source)
    (source / "model.safetensors").unlink()
    torch.save(tensors, source / "pytorch_model.bin")
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(UserError, match=r"would stay in 16 bits.*save_original_format=False"),
    ):
        base_of(source)


@pytest.mark.parametrize("change", ["one less", "one more", "narrower"])
def test_files_of_other_experts_than_config_json_says_are_called_broken(tmp_path, change):
    source = experts(tmp_path, "mixtral")
    tensors = tensors_of(source)
    at = "model.layers.0.block_sparse_moe.experts"
    for name in [name for name in tensors if name.startswith(f"{at}.3.")]:
        if change == "one less":
            del tensors[name]
        elif change == "one more":
            tensors[name.replace(f"{at}.3.", f"{at}.4.")] = tensors[name].clone()
        else:
            tensors[name] = tensors[name][:32].clone()
    rewrite(source, tensors)
    with pytest.raises(UserError, match=r"not those of its config\.json|stay in 16|missing"):
        base_of(source)


def test_a_mixture_saved_under_the_models_own_names_is_the_same(tmp_path):
    source = experts(tmp_path / "model", "qwen2_moe")
    fused = tmp_path / "fused"
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    model.save_pretrained(fused, save_original_format=False)
    assert tensors_of(fused).keys() != tensors_of(source).keys()
    for one, other in zip(*(experts_of(base_of(f)).values() for f in (source, fused)), strict=True):
        ours, theirs = dict(one.held()), dict(other.held())
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_mixture_in_full_precision_is_streamed_and_equal_to_transformers(tmp_path):
    source = experts(tmp_path / "model", "mixtral")
    base = base_of(source, quantization="none")
    stock = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    ours, theirs = base.state_dict(), stock.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


# ---------------------------------------------------------------- adapters

EXPERTS = ("experts.gate_up_proj", "experts.down_proj")


def recipe_of(folder: Path, kind: str, targets: list[str] | str, **settings: Any) -> Config:
    recipe = tiny_recipe(folder)
    source = experts(folder / "experts", kind, **settings)
    recipe["model"]["name_or_path"] = str(source)
    recipe["adapter"]["target_modules"] = targets
    return load_config(write_recipe(folder, recipe))


def policy_of(config: Config, adapter: Path | None = None) -> Any:
    return load_policy(Path(config.model.name_or_path), config, ALONE, adapter=adapter)


def fill(policy: Any) -> None:
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.normal_(std=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_adapted_experts_are_pefts_on_decoded_weights(tmp_path, kind):
    """Hidden states, and the gradients of every A and B; PEFT adds their product to the weights."""
    config = recipe_of(tmp_path, kind, ["o_proj", *EXPERTS])
    policy = policy_of(config)
    fill(policy)
    model = policy.causal_lm
    assert sum(isinstance(module, ExpertLora) for module in model.modules()) >= 2
    twin = dense_twin(Path(config.model.name_or_path))
    settings = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["o_proj"], target_parameters=list(EXPERTS)
    )
    dense = peft.get_peft_model(twin, settings).double()
    ours, theirs = dict(model.named_parameters()), dict(dense.named_parameters())
    trained = [name for name, parameter in theirs.items() if parameter.requires_grad]
    assert set(trained) == {name for name, p in ours.items() if p.requires_grad}
    with torch.no_grad():
        for name in trained:
            theirs[name].copy_(ours[name])
    found = [m.base_model.model.model(IDS).last_hidden_state for m in (model, dense)]
    assert (found[0] - found[1]).abs().max() <= 3e-5 * found[1].abs().max()
    up = torch.randn(found[1].shape, dtype=torch.float64)
    for hidden in found:
        hidden.backward(up.to(hidden.dtype))
    for name in trained:
        grad, expected = ours[name].grad, theirs[name].grad
        assert grad is not None
        assert (grad.double() - expected).norm() <= 3e-5 * expected.norm(), name
    with model.disable_adapter(), torch.no_grad():
        off = model.base_model.model.model(IDS).last_hidden_state
    base = base_of(Path(config.model.name_or_path))
    with torch.no_grad():
        assert torch.equal(off, base.model(IDS).last_hidden_state)


def test_a_saved_adapter_of_experts_is_opened_again_and_by_stock_peft(tmp_path):
    config = recipe_of(tmp_path, "qwen3_moe", ["q_proj", *EXPERTS])
    policy = policy_of(config)
    fill(policy)
    policy.causal_lm.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    again = policy_of(config, adapter=tmp_path / "adapter")
    ours, theirs = policy.trainable(), again.trainable()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    with torch.no_grad():
        hidden = [
            p.causal_lm.base_model.model.model(IDS).last_hidden_state for p in (policy, again)
        ]
    assert torch.equal(*hidden)
    twin = dense_twin(Path(config.model.name_or_path)).float()
    stock = peft.PeftModel.from_pretrained(twin, tmp_path / "adapter")
    with torch.no_grad():
        expected = stock.base_model.model.model(IDS).last_hidden_state
    assert (hidden[0] - expected).abs().max() <= 3e-5 * expected.abs().max()


def test_the_norm_of_what_is_added_is_summed_over_experts(tmp_path):
    policy = policy_of(recipe_of(tmp_path, "gpt_oss", ["q_proj", *EXPERTS]))
    fill(policy)
    total = 0.0
    for layer in policy.causal_lm.modules():
        if isinstance(layer, LoraLayer) and layer.lora_A:
            a, b = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
            if isinstance(layer, ExpertLora):
                for e in range(4):
                    product = b[:, e::4] @ a[4 * e : 4 * e + 4]  # r = 4 of each of 4 experts
                    total += float((2 * product).square().sum())
            else:
                total += float((2 * b @ a).square().sum())
    assert policy.product_norm() == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_all_linear_is_linear_layers_and_nothing_else(tmp_path, kind, caplog):
    policy = policy_of(recipe_of(tmp_path, kind, "all-linear"))
    adapted = {path for path, m in policy.causal_lm.named_modules() if isinstance(m, LoraLayer)}
    assert adapted
    assert not any(isinstance(m, lora.ParamWrapper) for m in policy.causal_lm.modules())
    names = {path.rpartition(".")[2] for path in adapted}
    assert names >= ({"o_proj"} if kind.startswith("deepseek") else {"q_proj", "k_proj", "o_proj"})
    # PEFT takes these names for experts of an older transformers, where experts are alike.
    assert ("down_proj" in names) == (kind == "qwen2_moe")
    assert ("all-linear leaves down_proj" in caplog.text) == kind.startswith("deepseek")


@pytest.mark.parametrize(
    ("kind", "targets", "said"),
    [
        ("mixtral", ["q_proj", "w1"], r"w1 is taken by PEFT .* name experts\.down_proj and"),
        ("qwen3_moe", ["up_proj"], r"up_proj is taken by PEFT .* experts\.gate_up_proj"),
        ("mixtral", ["gate"], "gate is taken by PEFT for a part of the experts or their router"),
        ("deepseek_v3", ["gate_proj"], "gate_proj is taken by PEFT"),
        ("qwen2_moe", ["expert.down"], "no module is named expert.down"),
    ],
)
def test_names_that_peft_would_take_for_something_else_are_refused(tmp_path, kind, targets, said):
    with pytest.raises(UserError, match=said):
        policy_of(recipe_of(tmp_path, kind, targets))


@pytest.mark.parametrize("change", [{"method": "dora"}, {"method": "sinelora"}, {"dropout": 0.1}])
def test_experts_take_plain_lora_only(tmp_path, change):
    config = recipe_of(tmp_path, "mixtral", ["q_proj", "experts.down_proj"])
    adapter = config.adapter.model_copy(update=change)
    with pytest.raises(UserError, match="experts take LoRA without dropout only"):
        policy_of(config.model_copy(update={"adapter": adapter}))


def test_a_name_of_shared_and_routed_experts_means_the_shared_one_until_it_says_experts(tmp_path):
    def adapted(targets: list[str], folder: str) -> set[str]:
        config = recipe_of(tmp_path / folder, "qwen2_moe", targets)
        modules = policy_of(config).causal_lm.named_modules()
        return {path.split(".mlp.")[-1] for path, m in modules if isinstance(m, LoraLayer)}

    assert adapted(["down_proj"], "a") == {"shared_expert.down_proj"}
    assert adapted(["experts.down_proj"], "b") == {"experts"}
    assert adapted(["gate_up_proj"], "c") == {"experts"}
