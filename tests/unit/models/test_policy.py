"""The policy: its reference is the base bit for bit, and what would break that is refused."""

from __future__ import annotations

from pathlib import Path

import bitsandbytes as bnb
import bitsandbytes.functional as bnb_functional
import pytest
import torch
import transformers
from torch import nn

from moored.adapted import adapters_off, dropout_off
from moored.config import Config, load_config
from moored.data.batch import Batch, Sample, collate
from moored.loss.divergence import Objective, Scales
from moored.loss.head import LossSums
from moored.models import forward
from moored.models.loading import load_base
from moored.models.nf4 import FrozenLinear4bit, make_zero_safe
from moored.models.policy import PolicyModel, load_policy
from moored.models.weights import Loader
from moored.utils.errors import UserError
from tiny import ALONE, tiny_model, tiny_recipe, write_recipe

CPU = torch.device("cpu")


def config_of(
    folder: Path, *overrides: str, architecture: str = "llama", **model: object
) -> Config:
    recipe = tiny_recipe(folder, architecture, **model)
    return load_config(write_recipe(folder, recipe), list(overrides))


def policy_of(config: Config) -> PolicyModel:
    return load_policy(Path(config.model.name_or_path), config, ALONE)


def some_batch(rows: int = 2, length: int = 12, vocab_size: int = 259, seed: int = 0):
    ids = torch.randint(
        0, vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed)
    )
    samples = [
        Sample(
            sample_id=f"s{i}",
            input_ids=row.numpy().astype("int32"),
            label_mask=torch.ones(length, dtype=torch.bool).numpy(),
        )
        for i, row in enumerate(ids)
    ]
    return collate([[sample] for sample in samples], pad_token_id=0)


def loss_of(
    policy: PolicyModel, batch: Batch, scales: Scales, reference: torch.Tensor | None = None
) -> tuple[torch.Tensor, LossSums]:
    return policy(batch, reference, use=PolicyModel.loss, objective=Objective(), scales=scales)


def train_a_little(policy: PolicyModel, steps: int) -> None:
    optimizer = torch.optim.AdamW(policy.trainable().values(), lr=1e-2)
    for step in range(steps):
        batch = some_batch(seed=step)
        loss, _ = loss_of(policy, batch, Scales(1 / batch.num_targets))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("llama", {"tie_word_embeddings": False}),
        ("qwen3", {"tie_word_embeddings": True}),
        ("gemma2", {"final_logit_softcapping": 5.0}),
    ],
)
def test_reference_is_the_untouched_base_bit_for_bit(
    tmp_path, architecture, settings, dtype, quantization
):
    overrides = [f"model.dtype={dtype}", f"model.quantization={quantization}"]
    config = config_of(tmp_path, *overrides, architecture=architecture, **settings)
    base = load_base(Path(config.model.name_or_path), config.model, ALONE, config.parallel)[0]
    batch = some_batch()
    with (
        torch.no_grad(),
        dropout_off(base),
        torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"),
    ):
        pristine = base.model(
            input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False
        ).last_hidden_state
        pristine = pristine.flatten(0, 1)[batch.target_index]
        pristine_logits = base.lm_head(pristine)
    policy = policy_of(config)
    with adapters_off(policy):
        assert torch.equal(policy(batch), pristine)
    train_a_little(policy, steps=20)
    with adapters_off(policy):
        after = policy(batch)
        assert torch.equal(after, pristine)
        assert torch.equal(policy.head(after), pristine_logits)
    with torch.no_grad():
        assert not torch.equal(policy(batch), pristine), "the policy itself must have moved"


def test_tmkl_is_exactly_zero_at_step_0_and_so_is_its_gradient(tmp_path):
    policy = policy_of(config_of(tmp_path))
    batch = some_batch()
    with adapters_off(policy):
        reference = policy(batch)
    loss, sums = loss_of(policy, batch, Scales(0.0, 1.0), reference)
    assert sums.kl_sum.item() == 0.0
    loss.backward()
    assert all(not p.grad.any() for p in policy.trainable().values())


def test_loss_and_gradients_equal_hugging_faces_own_cross_entropy(tmp_path):
    config = config_of(tmp_path, architecture="gemma2", final_logit_softcapping=3.0)
    policy = policy_of(config)
    train_a_little(policy, steps=2)
    batch = some_batch(rows=3, length=9)
    loss, _ = loss_of(policy, batch, Scales(1 / batch.num_targets))
    loss.backward()
    ours = {name: p.grad.clone() for name, p in policy.trainable().items()}
    policy.zero_grad()
    policy.causal_lm(input_ids=batch.input_ids, labels=batch.input_ids, use_cache=False)[
        "loss"
    ].backward()
    for name, parameter in policy.trainable().items():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-4, atol=1e-7)


def test_the_reference_pass_sets_flags_and_looks_for_nothing(tmp_path, monkeypatch):
    """At 80 layers PEFT's `disable_adapter` takes the host longer than the forward."""
    policy = policy_of(config_of(tmp_path, "adapter.dropout=0.5"))
    train_a_little(policy, steps=2)
    batch = some_batch()
    with torch.no_grad(), dropout_off(policy), policy.causal_lm.disable_adapter():
        expected = policy(batch)
    walks = []
    walk = torch.nn.Module.named_modules
    with monkeypatch.context() as patch:
        patch.setattr(
            torch.nn.Module, "named_modules", lambda *a, **k: (walks.append(a), walk(*a, **k))[1]
        )
        with adapters_off(policy):
            assert walks == []
            assert torch.equal(policy(batch), expected)
        with dropout_off(policy):
            assert walks == []
    with adapters_off(policy), adapters_off(policy):
        pass
    with torch.no_grad(), dropout_off(policy):
        assert not torch.equal(policy(batch), expected), "they are on again"


def test_reference_pass_leaves_random_state_and_training_flags_alone(tmp_path):
    config = config_of(tmp_path, "adapter.dropout=0.5")
    policy = policy_of(config)
    train_a_little(policy, steps=2)
    batch = some_batch()
    before, flags = torch.get_rng_state(), [m.training for m in policy.modules()]
    with adapters_off(policy):
        first = policy(batch)
        second = policy(batch)
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), before)
    assert [m.training for m in policy.modules()] == flags
    with pytest.raises(ZeroDivisionError), adapters_off(policy):
        _ = 1 / 0
    assert [m.training for m in policy.modules()] == flags
    assert all(p.requires_grad for p in policy.trainable().values())
    with torch.no_grad():
        assert not torch.equal(policy(batch), policy(batch)), "the policy's own dropout is on"


@pytest.mark.parametrize(
    ("fraction", "recomputed"), [(1.0, 4), (0.75, 3), (0.6, 3), (0.5, 2), (0.01, 1)]
)
@pytest.mark.parametrize("kind", ["reentrant", "non_reentrant"])
def test_as_many_layers_are_recomputed_as_the_recipe_says(tmp_path, kind, fraction, recomputed):
    overrides = [f"train.gradient_checkpointing={kind}", f"train.checkpointed_layers={fraction}"]
    policy = policy_of(config_of(tmp_path, *overrides, num_hidden_layers=4))
    layers = policy.causal_lm.get_base_model().model.layers
    calls = [0] * 4
    for i, layer in enumerate(layers):

        def count(*_: object, i: int = i) -> None:
            calls[i] += 1

        layer.mlp.register_forward_pre_hook(count)
    batch = some_batch()
    loss, _ = loss_of(policy, batch, Scales(1 / batch.num_targets))
    loss.backward()
    assert calls == [2] * recomputed + [1] * (4 - recomputed)


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_adapters_on_the_head_or_the_embedding_are_refused(tmp_path, target):
    config = config_of(tmp_path, f"adapter.target_modules=[q_proj, {target}]")
    with pytest.raises(UserError, match=f"{target} is the .*remove it"):
        policy_of(config)


def test_unknown_target_modules_are_refused_in_one_line(tmp_path):
    config = config_of(tmp_path, "adapter.target_modules=[no_such_module]")
    with pytest.raises(UserError, match="no_such_module") as caught:
        policy_of(config)
    assert "\n" not in str(caught.value)


class OddLlama(transformers.LlamaForCausalLM):
    """A model whose forward adds something to the logits."""

    slope = 1.0

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits + self.slope * torch.arange(output.logits.shape[-1])
        return output


def odd_llama(config: transformers.LlamaConfig, *, dtype: torch.dtype, **_: object) -> OddLlama:
    return OddLlama(config).to(dtype)


@pytest.mark.parametrize("slope", [1.0, 1e-6])
def test_a_forward_that_does_more_to_the_logits_is_refused_by_name(tmp_path, monkeypatch, slope):
    config = config_of(tmp_path)
    monkeypatch.setattr(OddLlama, "slope", slope)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_config", odd_llama)
    with pytest.raises(UserError, match="OddLlama: its forward does more to the logits"):
        policy_of(config)


def test_logit_scale_of_the_architecture_reaches_the_head(tmp_path):
    granite = transformers.GraniteConfig(
        vocab_size=259,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        logits_scaling=8.0,
    )
    path = odd_base(tmp_path / "granite", granite)
    settings = config_of(tmp_path, f"model.name_or_path={path}")
    policy = policy_of(settings)
    batch = some_batch()
    loss, _ = loss_of(policy, batch, Scales(1 / batch.num_targets))
    theirs = policy.causal_lm(input_ids=batch.input_ids, labels=batch.input_ids, use_cache=False)
    torch.testing.assert_close(loss, theirs["loss"], rtol=1e-5, atol=0)


def test_a_missing_model_is_one_line(tmp_path):
    config = config_of(tmp_path)
    with pytest.raises(UserError, match="cannot be loaded") as caught:
        load_base(tmp_path / "nowhere", config.model, ALONE, config.parallel)
    assert "\n" not in str(caught.value)


def test_frozen_linear4bit_equals_its_dequantised_weight_in_both_directions():
    torch.manual_seed(0)
    layer = bnb.nn.Linear4bit(
        128, 96, bias=True, compute_dtype=torch.float32, compress_statistics=True, quant_type="nf4"
    )
    nn.init.normal_(layer.weight)
    model = nn.Sequential(layer.to("cpu"))
    assert make_zero_safe(model) == 1
    assert isinstance(model[0], FrozenLinear4bit)
    weight = bnb_functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).double()
    x = torch.randn(5, 7, 128, requires_grad=True)
    y = model(x)
    grad = torch.randn_like(y)
    y.backward(grad)
    expected = x.detach().double() @ weight.t() + layer.bias.detach().double()
    # One fp32 product of length 128 / 96: rounding of at most n * eps relative to sum |a||b|.
    bound = 128 * 2**-24 * (x.detach().double().abs() @ weight.abs().t())
    assert ((y.detach().double() - expected).abs() <= bound + 1e-6).all()
    bound = 96 * 2**-24 * (grad.double().abs() @ weight.abs())
    assert ((x.grad.double() - grad.double() @ weight).abs() <= bound + 1e-6).all()


def saved_base(config: Config, folder: Path, change: str) -> Path:
    """The recipe's base, saved again with something wrong."""
    path = Path(config.model.name_or_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(path)
    state = model.state_dict()
    name = "model.layers.1.self_attn.q_proj.weight"
    if change == "missing":
        del state[name]
    elif change == "mismatched":
        state[name] = torch.zeros(8, 8)
    elif change == "not finite":
        state[name][0, 0] = float("inf")
    model.save_pretrained(folder, state_dict=state)
    transformers.AutoTokenizer.from_pretrained(path).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("missing", "tensors are missing .*layers.1.self_attn.q_proj.weight"),
        ("mismatched", "are missing|are broken|a trial forward fails"),
        ("not finite", "not finite"),
    ],
)
def test_a_base_that_would_not_be_its_own_is_refused(tmp_path, quantization, change, says):
    config = config_of(tmp_path, f"model.quantization={quantization}")
    folder = saved_base(config, tmp_path / "broken", change)
    with pytest.raises(UserError, match=says) as caught:
        load_policy(folder, config, ALONE)
    assert "\n" not in str(caught.value)


def test_truncated_weights_are_one_line(tmp_path):
    config = config_of(tmp_path)
    weights = Path(config.model.name_or_path) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])
    with pytest.raises(UserError, match=r"weights are broken.*download the model again"):
        policy_of(config)


def quantised_checkpoint(config: Config, folder: Path, **settings: object) -> Path:
    path = Path(config.model.name_or_path)
    quantization = transformers.BitsAndBytesConfig(**settings)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, quantization_config=quantization, device_map={"": "cpu"}
    )
    model.save_pretrained(folder)
    return folder


def test_a_checkpoint_in_nf4_is_the_base_that_it_was_made_of(tmp_path):
    config = config_of(tmp_path)
    settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    folder = quantised_checkpoint(
        config, tmp_path / "nf4", **settings, bnb_4bit_use_double_quant=True
    )
    batch = some_batch()
    with torch.no_grad():
        ours, theirs = policy_of(config)(batch), load_policy(folder, config, ALONE)(batch)
    assert torch.equal(ours, theirs)
    with pytest.raises(UserError, match=r"set model\.quantization to nf4"):
        load_policy(folder, config_of(tmp_path, "model.quantization=none"), ALONE)
    with pytest.raises(UserError, match=r"set model\.double_quantization to true"):
        load_policy(folder, config_of(tmp_path, "model.double_quantization=false"), ALONE)


@pytest.mark.parametrize(
    "settings", [{"load_in_8bit": True}, {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}]
)
@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_a_checkpoint_quantised_otherwise_is_refused(tmp_path, settings, quantization):
    """Its codes would be taken for weights."""
    config = config_of(tmp_path, f"model.quantization={quantization}")
    folder = quantised_checkpoint(config, tmp_path / "other", **settings)
    with pytest.raises(UserError, match="quantised already"):
        load_policy(folder, config, ALONE)


def odd_base(folder: Path, config: transformers.PretrainedConfig) -> Path:
    path = tiny_model(folder)
    (path / "model.safetensors").unlink()
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path


def test_the_dropout_of_the_base_is_off_in_the_policy_too(tmp_path):
    """Else the KL to the reference would measure it."""
    gpt2 = transformers.GPT2Config(vocab_size=259, n_embd=64, n_layer=2, n_head=4, n_positions=64)
    assert gpt2.resid_pdrop > 0
    path = odd_base(tmp_path / "gpt2", gpt2)
    policy = load_policy(path, config_of(tmp_path), ALONE)
    batch = some_batch()
    with torch.no_grad():
        reference = policy(batch)
    _, sums = loss_of(policy, batch, Scales(1.0, 1.0), reference)
    assert sums.kl_sum.item() == 0.0


def test_layers_that_stay_out_of_4_bits(tmp_path, caplog):
    falcon = transformers.FalconConfig(
        vocab_size=259, hidden_size=64, num_hidden_layers=1, num_attention_heads=4
    )
    with pytest.raises(UserError, match=r"FalconForCausalLM: none .* model\.quantization to none"):
        load_policy(odd_base(tmp_path / "falcon", falcon), config_of(tmp_path), ALONE)
    mixtral = transformers.MixtralConfig(
        vocab_size=259,
        hidden_size=64,
        intermediate_size=2,  # so that routers are much of it
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=64,
    )
    config = config_of(tmp_path)
    load_base(odd_base(tmp_path / "mixtral", mixtral), config.model, ALONE, config.parallel)
    assert "GB in 1 tensors are not held in 4 bits (first: model.layers.0.mlp.gate" in caplog.text


def test_names_that_would_do_nothing_are_refused(tmp_path):
    config = config_of(tmp_path, "adapter.target_modules=[q_proj, k_prj]")
    with pytest.raises(UserError, match=r"no module is named k_prj: did you mean k_proj\?"):
        policy_of(config)


def test_an_adapter_of_another_base_is_refused(tmp_path, caplog):
    config = config_of(tmp_path)
    policy = policy_of(config)
    policy.causal_lm.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    again = load_policy(
        Path(config.model.name_or_path), config, ALONE, adapter=tmp_path / "adapter"
    )
    assert again.trainable().keys() == policy.trainable().keys()
    shallow = config_of(tmp_path / "shallow", num_hidden_layers=1)
    with pytest.raises(UserError, match=r"the base has no place for .*layers\.1"):
        load_policy(Path(shallow.model.name_or_path), shallow, ALONE, adapter=tmp_path / "adapter")
    deep = config_of(tmp_path / "deep", num_hidden_layers=3)
    load_policy(Path(deep.model.name_or_path), deep, ALONE, adapter=tmp_path / "adapter")
    assert "was trained on" in caplog.text  # its names fit the first two layers: not told apart


def test_an_adapter_may_carry_what_the_base_has_anyway(tmp_path):
    config = config_of(tmp_path, tie_word_embeddings=False)
    policy = policy_of(config)
    policy.causal_lm.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    path = Path(config.model.name_or_path)
    again = load_policy(path, config, ALONE, adapter=tmp_path / "adapter")
    assert again.head is again.causal_lm.get_base_model().get_output_embeddings()


def test_a_base_that_does_not_fit_is_not_called_broken(tmp_path, monkeypatch):
    config = config_of(tmp_path)

    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(Loader, "load", full)
    with pytest.raises(UserError, match="does not fit into the memory"):
        policy_of(config)


def test_a_peer_that_is_lost_while_the_base_is_tried_is_not_called_an_odd_model(
    tmp_path, monkeypatch
):
    def lost(*_: object) -> None:
        raise RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]")

    monkeypatch.setattr(forward, "final_hidden", lost)
    with pytest.raises(RuntimeError, match="closed by peer"):
        policy_of(config_of(tmp_path))
