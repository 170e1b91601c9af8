"""The plug-in's loss and gradients against a dense fp64 reference, for a loop of one's own."""

from __future__ import annotations

import inspect
from dataclasses import asdict
from typing import Any

import peft
import pytest
import torch

from moored.config import Regularizer
from moored.plugin import Options, attach, detach
from pluginkit import adapted, batch, dense, gradients


@pytest.mark.parametrize(
    "options",
    [
        Options(0.7),
        Options(0.7, kind="kl"),
        Options(0.7, direction="reverse"),
        Options(0.7, temperature=2.0),
        Options(0.7, positions="all", prompt_weight=0.4),
    ],
    ids=lambda o: f"{o.kind}-{o.direction}-{o.temperature:g}-{o.positions}",
)
@pytest.mark.parametrize("num_items", [None, 50])
def test_loss_and_gradient_are_those_of_whole_logits(
    options: Options, num_items: int | None
) -> None:
    model, given = adapted(), batch()
    expected = dense(model, given, options, num_items=num_items)
    expected["loss"].backward()
    wanted = gradients(model)
    named = asdict(options)
    attached = attach(model, **named)
    more = {} if num_items is None else {"num_items_in_batch": torch.tensor(num_items)}
    output = model(**given, **more)
    output.loss.backward()
    torch.testing.assert_close(output.loss, expected["loss"].detach(), rtol=1e-9, atol=0)
    torch.testing.assert_close(gradients(model), wanted, rtol=1e-7, atol=1e-11)
    logged = attached.pop_metrics()
    assert logged["ce"] == pytest.approx(expected["ce"].item())
    assert logged[options.kind] == pytest.approx(expected["kl"].item())
    if options.positions == "all":
        assert logged["kl_prompt"] == pytest.approx(expected["prompt"].item())
    assert attached.pop_metrics() == {}


def require_dense_gradient(model: Any, given: dict[str, Any]) -> None:
    """That of the attached loss of a weight is that of whole logits."""
    expected = dense(model, given, Options(0.5))
    expected["loss"].backward()
    wanted = gradients(model)
    attach(model, 0.5)
    model(**given).loss.backward()
    torch.testing.assert_close(gradients(model), wanted, rtol=1e-7, atol=1e-11)


@pytest.mark.parametrize("architecture", ["Gemma2", "Cohere", "Granite", "Qwen3"])
def test_heads_with_a_scale_or_a_soft_cap(architecture: str) -> None:
    require_dense_gradient(adapted(architecture), batch())


def test_packed_rows_hold_no_prompt_across_samples() -> None:
    model, given = adapted(), batch(rows=2)
    del given["attention_mask"]
    places = torch.arange(5).repeat(3)[None, :12].repeat(2, 1)
    given["position_ids"] = places
    given["labels"][:, 5] = given["labels"][:, 10] = -100
    attached = attach(model, 0.5, positions="all")
    held = int(attached.count(given)[1])
    model(**given)
    valid = given["labels"][:, 1:] != -100
    starts = places[:, 1:] == 0
    assert held == int((~valid & ~starts).sum())
    assert int(attached.count(given)[0]) == int(valid.sum())


def test_labels_that_came_shifted() -> None:
    model, given = adapted(), batch()
    attach(model, 0.5)
    wanted = model(**given).loss
    labels = torch.nn.functional.pad(given.pop("labels")[:, 1:], (0, 1), value=-100)
    assert torch.equal(model(**given, shift_labels=labels).loss, wanted)


def test_without_labels_or_gradient_the_forward_is_the_models_own() -> None:
    model, given = adapted(), batch()
    inputs = {name: x for name, x in given.items() if name != "labels"}
    logits = model(**inputs).logits
    with torch.no_grad():
        evaluated = model(**given)
    causal_lm: Any = model.get_base_model()
    signature = inspect.signature(causal_lm.forward)
    attached = attach(model, 0.5)
    assert inspect.signature(causal_lm.forward) == signature
    assert torch.equal(model(**inputs).logits, logits)
    with torch.no_grad():
        again = model(**given)
    assert torch.equal(again.loss, evaluated.loss)
    assert torch.equal(again.logits, evaluated.logits)
    assert attached.num_losses == 0


def test_detached_it_is_as_it_was() -> None:
    model, given = adapted(), batch()
    causal_lm: Any = model.get_base_model()
    before = set(vars(causal_lm))
    plain = model(**given).loss
    attach(model, 0.5)
    held = model(**given).loss
    detach(model)
    assert set(vars(causal_lm)) == before
    assert torch.equal(model(**given).loss, plain)
    assert held > plain
    with pytest.raises(ValueError, match="nothing is attached"):
        detach(model)


def test_dropout_is_the_adapted_models_alone() -> None:
    """The base draws no random number, and every module's mode is as it was."""
    model, given = adapted(dropout=0.5), batch()
    attach(model, 0.5)
    torch.manual_seed(3)
    first = model(**given).loss
    assert all(module.training for module in model.modules())
    after = torch.rand(1)
    detach(model)
    torch.manual_seed(3)
    expected = dense(model, given, Options(0.5))["loss"]
    assert torch.equal(torch.rand(1), after)
    torch.testing.assert_close(first, expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_gives_the_same_gradient(reentrant: bool) -> None:
    model, given = adapted(), batch()
    attach(model, 0.5)
    model(**given).loss.backward()
    wanted = gradients(model)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model(**given).loss.backward()
    torch.testing.assert_close(gradients(model), wanted, rtol=1e-9, atol=1e-13)


def test_under_autocast_adapters_get_their_gradient() -> None:
    """Casts that the base's pass made without a gradient are not what the adapted one uses."""
    model, given = adapted(dtype=torch.float32), batch()
    attach(model, 0.5)
    model(**given).loss.backward()
    wanted = gradients(model)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**given).loss
    loss.backward()
    found = gradients(model)
    assert found.dtype == torch.float32
    assert (found - wanted).norm() < 0.05 * wanted.norm()


def test_several_adapters_of_which_one_is_active() -> None:
    model, given = adapted(), batch()
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    model.set_adapter("default")
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    require_dense_gradient(model, given)
    assert flags == {name: p.requires_grad for name, p in model.named_parameters()}


def test_modules_to_save_are_the_bases_in_the_base() -> None:
    model, given = adapted(tie_word_embeddings=False), batch()
    base: Any = model.unload()
    config = peft.LoraConfig(
        r=4,
        target_modules=["q_proj"],
        modules_to_save=["embed_tokens"],
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(base, config).double().train()
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(0.1)  # pyright: ignore
    require_dense_gradient(model, given)


def test_every_second_update_has_the_divergence_at_twice_the_weight() -> None:
    model, given = adapted(), batch()
    attached = attach(model, 0.5, every=2)
    with pytest.raises(ValueError, match="which update"):
        model(**given)
    attached.step = 0
    plain = dense(model, given, Options(1.0))
    assert model(**given).loss.item() == pytest.approx(plain["ce"].item())
    assert "tmkl" not in attached.pop_metrics()
    attached.step = 1
    found = model(**given).loss.item()
    assert found == pytest.approx((plain["ce"] + 2 * 0.5 * plain["kl"]).item())


def test_the_weight_has_a_schedule() -> None:
    model, given = adapted(), batch()
    attached = attach(model, 0.5, schedule="linear", end_ratio=0.5)
    attached.step, attached.num_steps = 5, 10
    parts = dense(model, given, Options(0.5))
    assert model(**given).loss.item() == pytest.approx((parts["ce"] + 0.375 * parts["kl"]).item())


def test_a_batch_without_targets_is_a_connected_zero() -> None:
    model, given = adapted(), batch()
    attach(model, 0.5)
    given["labels"].fill_(-100)
    loss = model(**given).loss
    loss.backward()
    assert loss.item() == 0
    assert not gradients(model).any()


def test_options_are_the_recipes() -> None:
    for name in asdict(Options()):
        assert getattr(Options(), name) == Regularizer.model_fields[name].get_default(), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": -1}, "weight=-1"),
        ({"weight": float("nan")}, "weight=nan"),
        ({"kind": "l2"}, "kind='l2': expected tmkl or kl"),
        ({"positions": "prompt"}, "positions='prompt'"),
        ({"direction": "back"}, "direction='back'"),
        ({"every": 0}, "every=0"),
        ({"schedule": "step"}, "schedule='step'"),
        ({"temperature": 0}, "temperature=0"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attach(adapted(), **options)


def _merged() -> Any:
    model = adapted()
    model.merge_adapter()
    return model


def _head_adapted() -> Any:
    return _with(target_modules=["q_proj", "lm_head"])


def _with(**settings: Any) -> Any:
    base: Any = adapted(tie_word_embeddings=False, dtype=torch.float32).unload()
    config = peft.LoraConfig(**{"target_modules": ["q_proj"], "task_type": "CAUSAL_LM"} | settings)
    return peft.get_peft_model(base, config)


def _prompted() -> Any:
    base: Any = adapted().unload()
    config = peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    return peft.get_peft_model(base, config)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: adapted().unload(), "no adapter that can be turned off"),
        (lambda: torch.nn.Linear(2, 2), "not a causal language model"),
        (_merged, "unmerge_adapter"),
        (_head_adapted, "lm_head has an adapter"),
        (lambda: _with(modules_to_save=["lm_head"]), "lm_head has an adapter"),
        (lambda: _with(init_lora_weights="pissa"), "pissa"),
        (_prompted, "prompt-learning"),
    ],
)
def test_models_without_a_base_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attach(make())


def test_a_base_that_is_trained_is_refused() -> None:
    model = adapted()
    model.get_base_model().model.norm.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"norm\.weight of the base is trained"):
        attach(model)


def test_attached_twice_is_refused() -> None:
    model = adapted()
    attach(model)
    with pytest.raises(ValueError, match="detach it first"):
        attach(model)


def test_a_model_that_does_more_to_its_logits_is_refused() -> None:
    model, given = adapted(), batch()
    causal_lm: Any = model.get_base_model()
    own = causal_lm.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        output = own(*args, **kwargs)
        output.logits = output.logits * 1.5
        return output

    causal_lm.forward = forward
    attach(model)
    with pytest.raises(ValueError, match="does more to its logits"):
        model(**given)
