"""LoRA layers that add to the base's output: PEFT's results and gradients, in fewer passes."""

from __future__ import annotations

import copy
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from moored.models.adapters import AddingLinear, FusedLinear, FusedLinear4bit, fuse
from moored.models.nf4 import FrozenLinear4bit, make_zero_safe

IN, OUT = 96, 160


class Net(nn.Module):
    """One layer, under a name that PEFT can target."""

    def __init__(self, *, quantized: bool):
        super().__init__()
        torch.manual_seed(0)
        self.proj: nn.Module = nn.Linear(IN, OUT)
        self.is_loaded_in_4bit = quantized  # by which PEFT picks its layer
        if quantized:
            layer = bnb.nn.Linear4bit(IN, OUT, compute_dtype=torch.float32, quant_type="nf4")
            layer.load_state_dict(self.proj.state_dict())
            self.proj = layer.to("cpu")
            make_zero_safe(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


def adapted(*, quantized: bool = True, dropout: float = 0.0, **settings: Any) -> Any:
    """A net with a LoRA that is not zero."""
    config = LoraConfig(
        r=8, lora_alpha=24, target_modules=["proj"], lora_dropout=dropout, **settings
    )
    model = get_peft_model(Net(quantized=quantized), config)  # pyright: ignore
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter.data) * 0.3
    return model


def run(model: Any, x: Tensor, *, bf16: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
    """The output and the gradients of the input and of the adapter, of a fixed loss."""
    x = x.clone().requires_grad_()
    torch.manual_seed(2)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        y = model(x)
    weights = torch.linspace(-1, 1, y.numel()).view(y.shape).to(y.dtype)
    (y * weights).sum().backward()
    assert x.grad is not None
    grads = {"x": x.grad}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None
            grads[name], parameter.grad = parameter.grad.clone(), None
    return y.detach(), grads


@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("shape", [(5, IN), (2, 3, IN), (0, IN)])
def test_outputs_and_gradients_are_pefts(
    quantized: bool, dropout: float, shape: tuple[int, ...]
) -> None:
    theirs = adapted(quantized=quantized, dropout=dropout)
    ours = copy.deepcopy(theirs)
    assert fuse(ours) == 1
    kind = FusedLinear4bit if quantized else FusedLinear
    assert type(ours.base_model.model.proj) is kind
    x = torch.randn(shape)
    expected, gradients = run(theirs, x)
    found, own = run(ours, x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert own.keys() == gradients.keys()
    for name, value in gradients.items():
        assert (own[name] - value).norm() <= 1e-6 * value.norm()


def test_against_plain_fp64() -> None:
    model = adapted()
    fuse(model)
    layer = model.base_model.model.proj
    base: FrozenLinear4bit = layer.base_layer
    weight = base.dequantized(torch.float32).double()
    a, b = (getattr(layer, part)["default"].weight for part in ("lora_A", "lora_B"))
    x = torch.randn(7, IN)
    found, own = run(model, x)
    exact = {name: p.detach().double().requires_grad_() for name, p in {"a": a, "b": b}.items()}
    wide = x.double().requires_grad_()
    y = wide @ weight.t() + base.bias.double() + 3.0 * (wide @ exact["a"].t() @ exact["b"].t())
    (y * torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape)).sum().backward()
    torch.testing.assert_close(found.double(), y.detach(), rtol=1e-5, atol=1e-5)
    pairs = {"x": wide, "lora_A": exact["a"], "lora_B": exact["b"]}
    for name, tensor in pairs.items():
        (key,) = (key for key in own if key == name or f".{name}." in key)
        assert tensor.grad is not None
        assert (own[key].double() - tensor.grad).norm() < 1e-6 * tensor.grad.norm()


@pytest.mark.parametrize("quantized", [True, False])
def test_bf16_is_as_near_to_fp32_as_pefts(quantized: bool) -> None:
    theirs = adapted(quantized=quantized)
    if quantized:
        theirs.base_model.model.proj.base_layer.compute_dtype = torch.bfloat16
    else:
        theirs.base_model.model.proj.base_layer.to(torch.bfloat16)
    ours, x = copy.deepcopy(theirs), torch.randn(64, IN).bfloat16()
    fuse(ours)
    expected, gradients = run(theirs, x, bf16=True)
    found, own = run(ours, x, bf16=True)
    assert found.dtype == expected.dtype == torch.bfloat16
    exact, exact_gradients = run(adapted(quantized=quantized), x.float())

    def error(value: Tensor, of: Tensor) -> float:
        return float((value.float() - of).norm() / of.norm())

    assert error(found, exact) <= 1.05 * error(expected, exact)  # it rounds once less
    for name, value in exact_gradients.items():
        assert own[name].dtype == gradients[name].dtype
        assert error(own[name], value) < 1.2 * error(gradients[name], value) + 1e-3


def test_the_base_alone_is_the_base() -> None:
    model = adapted()
    fuse(model)
    x = torch.randn(4, IN)
    with model.disable_adapter():
        assert torch.equal(model(x), Net(quantized=True)(x))


def test_what_is_kept_has_pefts_names() -> None:
    theirs = adapted()
    ours = copy.deepcopy(theirs)
    fuse(ours)
    assert list(get_peft_model_state_dict(ours)) == list(get_peft_model_state_dict(theirs))


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"lora_bias": True}])
def test_what_is_not_plain_stays_pefts(settings: dict[str, Any]) -> None:
    model = adapted(quantized=False, **settings)
    before = run(model, torch.ones(3, IN))[0]
    assert fuse(model) == 0
    assert not any(isinstance(module, AddingLinear) for module in model.modules())
    assert torch.equal(run(model, torch.ones(3, IN))[0], before)


def test_two_adapters_at_once_are_summed_by_peft() -> None:
    model = adapted()
    model.add_adapter("second", LoraConfig(r=4, target_modules=["proj"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])
    x = torch.randn(3, IN)
    expected = model(x)
    fuse(model)
    assert torch.equal(model(x), expected)


def test_it_takes_no_pass_over_the_output_of_its_own() -> None:
    """PEFT's three, of the output's size, in the forward: copy, scale, add."""

    def passes(model: Any) -> list[str]:
        x = torch.randn(32, IN)
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as watched:
            model(x)
        elementwise = {"aten::mul", "aten::add", "aten::clone"}
        return [
            event.name
            for event in watched.events() or []
            if event.name in elementwise and [32, OUT] in event.input_shapes[:1]
        ]

    model = adapted(quantized=False)
    assert len(passes(model)) == 2
    fuse(model)
    assert passes(model) == []
