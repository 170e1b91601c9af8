"""Every adapter is its formula, starts at the base, leaves it alone, and is what PEFT loads.

The formulas are written below in the plainest way, in fp64, from the tensors that training moves.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, get_args

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

from forking import stock
from moored import sinelora
from moored.adapted import adapters_off
from moored.config import AdapterConfig, Config, ModelConfig, load_config
from moored.export import merge
from moored.models.adapters import add_adapters, frozen_buffers, scaled, write_scaled
from moored.models.nf4 import FrozenLinear4bit
from moored.models.policy import PolicyModel, load_policy
from moored.training import checkpoint
from moored.utils.errors import UserError, UserErrors
from tiny import ALONE, tiny_recipe, write_recipe
from unit.export.test_export import gpt2
from unit.models.test_policy import policy_of, some_batch, train_a_little

METHODS = {
    "lora": {"method": "lora"},
    "rslora": {"method": "lora", "use_rslora": True},
    "dora": {"method": "dora"},
    "randlora": {"method": "randlora"},
    "randlora-uneven": {"method": "randlora", "r": 5},  # 64 and 32 are no multiples of 5
    "sinelora": {"method": "sinelora"},
    "sinelora-slow": {"method": "sinelora", "omega": 7.0, "use_rslora": True},
    "oft": {"method": "oft", "oft_block_size": 16},
    "oft-exact": {"method": "oft", "oft_block_size": 8, "use_cayley_neumann": False},
}


def config_of(folder: Path, adapter: dict[str, Any], *overrides: str) -> Config:
    recipe = tiny_recipe(folder)
    recipe["adapter"] = ({} if adapter.get("method") == "oft" else {"r": 4}) | adapter
    return load_config(write_recipe(folder, recipe), list(overrides))


def fill(policy: PolicyModel) -> None:
    fill_values(policy.trainable())


def fill_values(parameters: dict[str, nn.Parameter]) -> None:
    """Values far from the first ones: phases of a few radians, changes as large as the weights."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in parameters.items():
            noise = torch.randn(p.shape, generator=generator)
            if "magnitude" in name or "gamma" in name:
                p.mul_(1 + 0.3 * noise)
            else:
                p.copy_((0.02 if "lambda" in name else 0.1) * noise)


# ---------------------------------------------------------------- the formulas


def plain_change(layer: Any, config: AdapterConfig, parts: dict[str, torch.Tensor]) -> torch.Tensor:
    """dW [out, in] of LoRA, RandLoRA and SineLoRA from fp64 leaves."""
    r, alpha = config.r, config.alpha
    if config.method == "randlora":
        rows, columns = layer.out_features, layer.in_features
        small, large = min(rows, columns), max(rows, columns)
        num_bases = math.ceil(small / r)
        random_a = layer.randlora_A["default"].double()  # [r, 1, the smallest side of all layers]
        random_b = layer.randlora_B["default"].double()  # [the largest side, bases of all, r]
        columns_b = random_b[:large, :num_bases].reshape(large, num_bases * r)
        total = torch.zeros(large, small, dtype=torch.float64)
        for k in range(r):
            for j in range(num_bases):
                row = parts["lambda"][k, j] * random_a[k, 0, :small] * parts["gamma"][j]
                total = total + torch.outer(columns_b[:, k * num_bases + j], row)
        return alpha / r * (total if columns == small else total.t())
    scale = alpha / (math.sqrt(r) if config.use_rslora else r)
    product = parts["B"] @ parts["A"]
    if config.method == "sinelora":
        return scale * torch.sin(config.omega * product) / math.sqrt(layer.in_features)
    return scale * product


def plain_rotation(config: AdapterConfig, parts: dict[str, torch.Tensor]) -> torch.Tensor:
    """OFT's R [in, in], by which the inputs are multiplied: a block for each run of them.

    With Q skew-symmetric, (I - Q) (I + Q)^-1, or the first terms of its series in -Q.
    """
    size, blocks = config.oft_block_size, []
    one = torch.eye(size, dtype=torch.float64)
    for values in parts["R"]:
        q = torch.zeros(size, size, dtype=torch.float64)
        rows, columns = zip(*((i, j) for i in range(size) for j in range(i + 1, size)), strict=True)
        q = q.index_put((torch.tensor(rows), torch.tensor(columns)), values)
        q = q - q.t()
        if config.use_cayley_neumann:
            blocks.append(one + 2 * q + 2 * q @ q + 2 * q @ q @ q + q @ q @ q @ q)
        else:
            blocks.append((one - q) @ torch.linalg.inv(one + q))
    return torch.block_diag(*blocks)


def plain_output(
    layer: Any, config: AdapterConfig, parts: dict[str, torch.Tensor], x: torch.Tensor
) -> torch.Tensor:
    base = layer.get_base_layer()
    weight = base.dequantized(torch.float64) if isinstance(base, FrozenLinear4bit) else base.weight
    weight = weight.detach().double()
    if config.method == "oft":
        return x @ plain_rotation(config, parts) @ weight.t()
    change = plain_change(layer, config, parts)
    if config.method != "dora":
        return x @ (weight + change).t()
    norm = (weight + change).norm(dim=1, keepdim=True).detach()  # a constant: section 4.3 of DoRA
    return x @ (parts["magnitude"][:, None] * (weight + change) / norm).t()


def parts_of(layer: nn.Module) -> dict[str, nn.Parameter]:
    """lambda, gamma, A, B, magnitude, R -> parameter."""
    found = {}
    for name, parameter in layer.named_parameters():
        if parameter.requires_grad:
            part = name.split(".")[0].removeprefix("rand").removeprefix("lora_")
            found[part.removeprefix("oft_")] = parameter
    return {name.removesuffix("_vector"): parameter for name, parameter in found.items()}


@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize("kind", METHODS)
def test_output_and_gradients_are_the_formula_in_fp64(tmp_path, monkeypatch, kind, quantization):
    """fp32 sums of at most 128 terms whose phases reach some ten radians: 1e-5 of the norm."""
    monkeypatch.setattr(sinelora, "BLOCK_ELEMENTS", 24 * 64)  # several blocks, the last one short
    config = config_of(tmp_path, METHODS[kind], f"model.quantization={quantization}")
    policy = policy_of(config)
    fill(policy)
    stack: Any = policy.causal_lm.get_base_model().model.layers[0]
    for layer in (stack.self_attn.k_proj, stack.mlp.up_proj, stack.mlp.down_proj):
        x = torch.randn(2, 5, layer.in_features, requires_grad=True)
        dy = torch.randn(2, 5, layer.out_features)
        y = layer(x)
        y.backward(dy)
        own = parts_of(layer)
        exact = {name: p.detach().double().requires_grad_() for name, p in own.items()}
        exact_x = x.detach().double().requires_grad_()
        expected = plain_output(layer, config.adapter, exact, exact_x)
        expected.backward(dy.double())
        pairs = [("y", y, expected), ("x", x.grad, exact_x.grad)]
        pairs += [(name, p.grad, exact[name].grad) for name, p in own.items()]
        for name, got, wanted in pairs:
            assert wanted.norm() > 0, name
            distance = (got.double() - wanted).norm() / wanted.norm()
            assert distance < 1e-5, (name, float(distance))
        base = layer.get_base_layer()(x.detach())
        assert (y - base).norm() > 0.1 * base.norm(), "the adapter must matter"


def test_the_sine_keeps_no_matrix_of_the_weights_size():
    x, weight_a = torch.randn(3, 64), torch.randn(4, 64, requires_grad=True)
    weight_b = torch.randn(96, 4, requires_grad=True)
    y: Any = sinelora._SineLinear.apply(x, weight_a, weight_b, 2.0, 1.0)
    assert sum(t.numel() for t in y.grad_fn.saved_tensors) == 3 * 64 + 4 * 64 + 96 * 4


# ---------------------------------------------------------------- start, and the base


@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["dora", "randlora", "sinelora", "oft", "oft-exact"])
def test_training_starts_at_the_base_and_leaves_it_alone(tmp_path, kind, dtype, quantization):
    config = config_of(
        tmp_path, METHODS[kind], f"model.quantization={quantization}", f"model.dtype={dtype}"
    )
    policy = policy_of(config)
    batch = some_batch()
    with adapters_off(policy):
        pristine = policy(batch)
    with torch.no_grad():
        fresh = policy(batch)
    assert fresh.dtype == pristine.dtype
    if kind != "dora":  # whose magnitudes are norms, to rounding
        assert torch.equal(fresh, pristine)
    assert all(p.dtype == torch.float32 for p in policy.trainable().values())
    before = {name: p.detach().clone() for name, p in policy.trainable().items()}
    bases = {name: t.clone() for name, t in frozen_buffers(policy.causal_lm).items()}
    train_a_little(policy, steps=3)
    for name, p in policy.trainable().items():
        assert not torch.equal(p, before[name]), f"{name} is not trained"
    for name, tensor in frozen_buffers(policy.causal_lm).items():
        assert torch.equal(tensor, bases[name])
    assert bool(bases) == (kind == "randlora")
    with adapters_off(policy):
        assert torch.equal(policy(batch), pristine)
    with torch.no_grad():
        assert not torch.equal(policy(batch), pristine)


def test_the_seed_draws_what_is_random(tmp_path):
    for kind, part in (("randlora", "base_model.randlora_B"), ("sinelora", "lora_A")):
        drawn = []
        for seed in (0, 0, 1):
            policy = policy_of(config_of(tmp_path, METHODS[kind], f"train.seed={seed}"))
            named = policy.trainable() | frozen_buffers(policy.causal_lm)
            drawn.append(next(tensor for name, tensor in named.items() if part in name))
        assert torch.equal(drawn[0], drawn[1])
        assert not torch.equal(drawn[0], drawn[2])


# ---------------------------------------------------------------- what is refused


def peft_inits() -> list[str]:
    """Every name that this PEFT knows for `init_lora_weights`."""
    field = peft.LoraConfig.__dataclass_fields__["init_lora_weights"]
    kinds: Any = eval(field.type, vars(peft.tuners.lora.config))  # annotations are text there
    names = [name for kind in get_args(kinds) for name in get_args(kind)]
    assert {"pissa", "olora", "corda", "eva", "loftq", "gaussian"} <= set(names)
    return ["pissa_niter_4" if "[" in name else name for name in names] + ["lora_ga"]


@pytest.mark.parametrize("init", peft_inits())
@pytest.mark.parametrize("method", ["lora", "dora", "sinelora"])
def test_every_other_start_that_peft_knows_is_refused_by_name(tmp_path, method, init):
    adapter = {"method": method, "init": init}
    if init == "gaussian":
        policy_of(config_of(tmp_path, adapter))  # which looks whether it starts at the base
        return
    with pytest.raises(UserErrors) as caught:
        config_of(tmp_path, adapter)
    assert f"adapter.init: {init} " in str(caught.value)
    assert str(caught.value).endswith(": use default or gaussian")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("init", "says"),
    [
        ("pissa", "changes the base"),
        ("olora", "changes the base"),
        ("orthogonal", "a fresh adapter already changes the model's output"),
    ],
)
def test_what_the_recipe_refuses_is_found_in_the_model_too(tmp_path, init, says):
    config = config_of(tmp_path, {}, "model.quantization=none")
    config = config.model_copy(update={"adapter": AdapterConfig(r=4, init=init)})
    with pytest.raises(UserError, match=rf"{says}.*adapter\.init: default"):
        policy_of(config)


@pytest.mark.parametrize(
    ("adapter", "says"),
    [
        ({"method": "randlora", "use_rslora": True}, "use_rslora: would be ignored, since method"),
        ({"method": "randlora", "init": "gaussian"}, "init: would be ignored"),
        ({"method": "lora", "omega": 30.0}, "omega: would be ignored, since method is lora"),
        ({"method": "sinelora", "omega": 0.0}, "omega: must be greater than 0"),
        ({"method": "sinlora"}, "did you mean sinelora"),
        ({"method": "oft", "r": 4}, "adapter.r: would be ignored, since method is oft"),
        ({"method": "oft", "dropout": 0.1}, "dropout: would be ignored, since method is oft"),
        ({"method": "lora", "oft_block_size": 16}, "oft_block_size: would be ignored"),
        ({"method": "oft", "oft_block_size": 1}, "oft_block_size: must be at least 2"),
        ({"method": "osf"}, r"adapter.method: osf takes every weight apart .*: use lora, dora"),
    ],
)
def test_options_of_another_method_are_refused(tmp_path, adapter, says):
    with pytest.raises(UserErrors, match=says):
        config_of(tmp_path, adapter)


def test_what_a_mesh_cannot_spread_is_refused_by_the_recipe(tmp_path):
    with pytest.raises(UserErrors, match=r"adapter\.method: randlora's bases .*degree to 1"):
        config_of(tmp_path, METHODS["randlora"], "parallel.tensor_parallel_degree=2")
    with pytest.raises(UserErrors, match=r"adapter\.method: oft's rotations .*degree to 1"):
        config_of(tmp_path, METHODS["oft"], "parallel.tensor_parallel_degree=2")
    with pytest.raises(UserErrors, match=r"adapter\.method: DoRA reads .*zero_stage to 2"):
        config_of(tmp_path, {"method": "dora"}, "parallel.zero_stage=3")


def test_blocks_that_do_not_fill_a_layer_are_refused(tmp_path):
    """PEFT would take others, with a warning."""
    says = (
        r"adapter\.oft_block_size: 48 does not divide the 64 inputs of model\.layers\.0\.self_attn"
    )
    with pytest.raises(UserError, match=says):
        policy_of(config_of(tmp_path, {"method": "oft", "oft_block_size": 48}))


def test_why_osf_is_no_method():
    """What is said of it is so in this PEFT: it starts beside the base, and trains half of it."""
    layer = nn.Sequential(nn.Linear(64, 64, bias=False))
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = layer(x)
        model = peft.get_peft_model(layer, peft.OSFConfig(target_modules=["0"]))
        assert not torch.equal(model(x), before)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) > 64 * 64


def test_a_recipe_resolves_its_method(tmp_path):
    plain = config_of(tmp_path, {})
    assert plain.adapter.method == "lora"
    assert "omega" not in plain.resolved()["adapter"]  # nor in the fingerprint of older runs
    randlora = config_of(tmp_path, {"method": "randlora", "r": 3})
    assert randlora.resolved()["adapter"]["alpha"] == 60.0
    assert load_config(write_recipe(tmp_path, randlora.resolved())) == randlora
    given = config_of(tmp_path, {"method": "randlora", "r": 3, "alpha": 9.0})
    assert given.adapter.alpha == 9.0


# ---------------------------------------------------------------- saved, and loaded by PEFT


def saved(folder: Path, kind: str) -> tuple[Config, PolicyModel, Path]:
    config = config_of(folder, METHODS[kind], "model.quantization=none")
    policy = policy_of(config)
    fill(policy)
    tensors = {name: p.detach() for name, p in policy.trainable().items()}
    checkpoint.save_adapter(
        folder / "adapter", tensors, policy.causal_lm, config.model.name_or_path
    )
    return config, policy, folder / "adapter"


@pytest.mark.parametrize(
    "kind", ["rslora", "dora", "randlora", "randlora-uneven", "sinelora", "oft"]
)
def test_peft_loads_and_merges_what_was_saved(tmp_path, kind):
    config, policy, adapter = saved(tmp_path, kind)
    ids = some_batch().input_ids
    stock = transformers.AutoModelForCausalLM.from_pretrained(config.model.name_or_path)
    model: Any = peft.PeftModel.from_pretrained(stock, str(adapter)).eval()
    again = load_policy(Path(config.model.name_or_path), config, ALONE, adapter=adapter)
    with torch.no_grad():
        trained = policy.causal_lm(input_ids=ids, use_cache=False).logits
        logits = model(input_ids=ids).logits
        assert torch.equal(logits, trained)
        assert torch.equal(again.causal_lm(input_ids=ids, use_cache=False).logits, trained)
        with model.disable_adapter():
            base = model(input_ids=ids).logits
        merged = model.merge_and_unload()(input_ids=ids).logits
    assert (logits - base).norm() > 0.1 * base.norm()
    assert (merged - logits).norm() < 1e-5 * logits.norm()


def test_random_bases_travel_with_their_adapter_once(tmp_path):
    """So that a machine that would draw others loads the same adapter."""
    config, policy, adapter = saved(tmp_path, "randlora")
    tensors = load_file(adapter / "adapter_model.safetensors")
    bases = {name: t for name, t in tensors.items() if "randlora_A" in name or "_B" in name}
    assert bases.keys() == {"base_model.randlora_A", "base_model.randlora_B"}
    assert {t.dtype for t in bases.values()} == {torch.bfloat16}
    settings = json.loads((adapter / "adapter_config.json").read_text())
    assert settings["save_projection"] is True
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {"projection_prng_key": 9}))
    stock = transformers.AutoModelForCausalLM.from_pretrained(config.model.name_or_path)
    model: Any = peft.PeftModel.from_pretrained(stock, str(adapter)).eval()
    ids = some_batch().input_ids
    with torch.no_grad():
        trained = policy.causal_lm(input_ids=ids, use_cache=False).logits
        assert torch.equal(model(input_ids=ids).logits, trained)


def test_an_adapter_that_peft_wrote_itself_is_opened(tmp_path):
    config, policy, _ = saved(tmp_path, "randlora")
    policy.causal_lm.save_pretrained(tmp_path / "peft", save_embedding_layers=False)
    again = load_policy(Path(config.model.name_or_path), config, ALONE, adapter=tmp_path / "peft")
    batch = some_batch()
    with torch.no_grad():
        assert torch.equal(again(batch), policy(batch))


def test_peft_alone_refuses_a_sine_instead_of_taking_it_for_lora(tmp_path):
    _, _, adapter = saved(tmp_path, "sinelora")
    script = tmp_path / "alone.py"
    script.write_text(f"import peft; peft.PeftConfig.from_pretrained({str(adapter)!r})")
    alone = stock([str(script)])
    assert alone.returncode == 1
    assert "SINELORA" in alone.stderr
    assert peft.PeftConfig.from_pretrained(str(adapter)).omega == 200.0


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", ["randlora", "sinelora"])
def test_every_merged_matrix_is_the_formula(tmp_path, kind, architecture):
    """RandLoRA's sums of 64 terms in fp32 are good to 1e-6 of the largest entry.

    SineLoRA's phases reach 20 radians in sums of 4 terms: 20 * 5 * 2**-24 = 6e-6 of it.
    """
    if architecture == "llama":
        config, policy, adapter = saved(tmp_path, kind)
        source, model = Path(config.model.name_or_path), policy.causal_lm
        settings = config.adapter
    else:  # whose layers hold their weights transposed
        source, adapter = gpt2(tmp_path / "gpt2"), tmp_path / "adapter"
        settings = AdapterConfig(r=4, target_modules=["c_attn", "c_fc"], **METHODS[kind])
        stock = transformers.AutoModelForCausalLM.from_pretrained(source)
        model = add_adapters(stock, settings, seed=0)
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        fill_values(trained)
        checkpoint.save_adapter(adapter, {n: p.detach() for n, p in trained.items()}, model, "x")
    held = ModelConfig(name_or_path=str(source), dtype="float32")
    (tmp_path / "out").mkdir()
    cpu = torch.device("cpu")
    merge.write(merge.plan(source, held, adapter, "w16", cpu), tmp_path / "out", cpu)
    before, after = (load_file(at / "model.safetensors") for at in (source, tmp_path / "out"))
    changed = 0
    for name, weight in before.items():
        layer: Any = model.get_base_model().get_submodule(name.rpartition(".")[0])
        if not hasattr(layer, "base_layer"):
            assert torch.equal(after[name], weight), name
            continue
        if not name.endswith(".weight"):
            continue
        changed += 1
        parts = {part: p.detach().double() for part, p in parts_of(layer).items()}
        change = plain_change(layer, settings, parts)
        expected = weight.double() + (change.t() if architecture == "gpt2" else change)
        bound = (6e-6 if kind == "sinelora" else 1e-6) * expected.abs().max()
        assert (after[name].double() - expected).abs().max() < bound, name
        assert change.abs().max() > 1000 * bound
    assert changed == (14 if architecture == "llama" else 4)


# ---------------------------------------------------------------- in part


@pytest.mark.parametrize("kind", ["oft", "oft-exact"])
def test_every_merged_matrix_is_the_rotated_one(tmp_path, kind):
    """Sums of 16 terms in fp32, of blocks that are good to some 1e-6."""
    config, policy, adapter = saved(tmp_path, kind)
    source, cpu = Path(config.model.name_or_path), torch.device("cpu")
    held = ModelConfig(name_or_path=str(source), dtype="float32")
    (tmp_path / "out").mkdir()
    merge.write(merge.plan(source, held, adapter, "w16", cpu), tmp_path / "out", cpu)
    before, after = (load_file(at / "model.safetensors") for at in (source, tmp_path / "out"))
    changed = 0
    for name, weight in before.items():
        layer: Any = policy.causal_lm.get_base_model().get_submodule(name.rpartition(".")[0])
        if not hasattr(layer, "base_layer"):
            assert torch.equal(after[name], weight), name
            continue
        changed += 1
        parts = {part: p.detach().double() for part, p in parts_of(layer).items()}
        expected = weight.double() @ plain_rotation(config.adapter, parts).t()
        assert (after[name].double() - expected).norm() < 3e-6 * expected.norm(), name
        assert (expected - weight).norm() > 0.1 * expected.norm()
    assert changed == 14


@pytest.mark.parametrize("kind", ["rslora", "randlora", "sinelora"])
def test_a_scale_is_a_factor_of_all_that_is_added(tmp_path, kind):
    config, policy, adapter = saved(tmp_path, kind)
    layer: Any = policy.causal_lm.get_base_model().model.layers[1].mlp.down_proj
    x = torch.randn(7, layer.in_features)
    write_scaled(adapter, tmp_path / "part", 0.3)
    part = load_policy(Path(config.model.name_or_path), config, ALONE, adapter=tmp_path / "part")
    written: Any = part.causal_lm.get_base_model().model.layers[1].mlp.down_proj
    with torch.no_grad():
        base, whole = layer.get_base_layer()(x), layer(x)
        with scaled(policy.causal_lm, 0.3):
            some = layer(x)
        assert torch.equal(layer(x), whole)
        expected = base + 0.3 * (whole - base)
        bound = 1e-5 * whole.norm()
        assert (some - expected).norm() < bound < 0.1 * (whole - expected).norm()
        assert (written(x) - expected).norm() < bound


@pytest.mark.parametrize("kind", ["dora", "oft"])
def test_an_adapter_that_is_not_linear_has_no_scale(tmp_path, kind):
    _, policy, adapter = saved(tmp_path, kind)
    with (
        pytest.raises(UserError, match="this one is not: leave it out"),
        scaled(policy.causal_lm, 0.5),
    ):
        pass
    with pytest.raises(UserError, match="this one is not: leave it out"):
        write_scaled(adapter, tmp_path / "part", 0.5)
