"""A causal language model with PEFT's adapters: its base and back, and what it does to its logits.

Needs torch and PEFT alone, of any version that has `disable_adapter`: the plug-in uses it beside
other trainers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn


@dataclass(frozen=True, slots=True, kw_only=True)
class Replaced:
    """A parameter of the base that an adapter has other values for.

    Attributes:
        parameter: which of the base, with the adapter's values.
        base: its own.
    """

    parameter: nn.Parameter
    base: Tensor

    def own(self) -> Tensor:
        """The adapter's values, in the base's dtype."""
        return self.parameter.detach().to(self.base.dtype)


def on_with_adapters(model: PeftModel, replaced: Sequence[Replaced]) -> None:
    """Have `adapters_off` give the base its own values back; PEFT leaves the adapter's there."""
    for one in replaced:
        one.parameter.requires_grad_(False)
    vars(model)["replaced"] = tuple(replaced)


class Switches:
    """The flags that turn a model into its base and back, looked for once.

    At 70B a walk over all modules takes the host longer than the flags of those that have any. No
    module may be added to the model later on.

    Args:
        model: the policy; its PEFT model, or its layers with adapters, are found inside it.
    """

    def __init__(self, model: nn.Module):
        self._modules = list(model.modules())
        models = [module for module in self._modules if isinstance(module, PeftModel)]
        by_flags = [model for model in models if _is_off_by_flags(model)]
        self._others = [model for model in models if model not in by_flags]
        kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
        within = {module for model in self._others for module in model.modules()}
        self._layers: list[Any] = [
            layer for layer in self._modules if isinstance(layer, kinds) and layer not in within
        ]
        self._replaced: list[Replaced] = [
            one for model in models for one in getattr(model, "replaced", ())
        ]

    @contextlib.contextmanager
    def dropout_off(self) -> Iterator[None]:
        """Run the body with every module's `training` flag off, then restore each as it was.

        The flags are set one by one instead of by `eval()`, which some layers override with side
        effects. No random number is drawn by a module whose flag is off.
        """
        was_training = [vars(module) for module in self._modules if module.training]
        try:
            for state in was_training:  # past Module.__setattr__, which takes ten times as long
                state["training"] = False
            yield
        finally:
            for state in was_training:
                state["training"] = True

    @contextlib.contextmanager
    def adapters_off(self) -> Iterator[None]:
        """Run the body as the base: see the function of this name."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(self.dropout_off())
            stack.enter_context(self._flags_off())
            for model in self._others:
                stack.enter_context(model.disable_adapter())
            stack.enter_context(self._base_values())
            yield

    @contextlib.contextmanager
    def _flags_off(self) -> Iterator[None]:
        """What PEFT's `disable_adapter` does, without its looks at every parameter."""
        before = [layer._disable_adapters for layer in self._layers]
        try:
            for layer in self._layers:
                layer._disable_adapters = True
            yield
        finally:
            for layer, was_off in zip(self._layers, before, strict=True):
                layer._disable_adapters = was_off

    @contextlib.contextmanager
    def _base_values(self) -> Iterator[None]:
        adapted = [one.parameter.data for one in self._replaced]
        try:
            for one in self._replaced:
                one.parameter.data = one.base
            yield
        finally:
            for one, values in zip(self._replaced, adapted, strict=True):
                one.parameter.data = values


def _is_off_by_flags(model: PeftModel) -> bool:
    """Whether the layers' own flags turn the adapter off: not that of prompts before the text."""
    tuner: Any = model.base_model
    disable = getattr(type(tuner), "disable_adapter_layers", None)
    return not model.active_peft_config.is_prompt_learning and (
        disable is BaseTuner.disable_adapter_layers
    )


def _switches(model: nn.Module) -> Switches:
    return getattr(model, "switches", None) or Switches(model)


def dropout_off(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Run the body with dropout off, see `Switches.dropout_off`."""
    return _switches(model).dropout_off()


def adapters_off(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Run the body as the base: adapters off, dropout off, no gradient, random state untouched.

    Args:
        model: the policy; its PEFT model is found inside it.
    """
    return _switches(model).adapters_off()


def logit_factors(config: Any) -> tuple[float, float | None]:
    """The scale and the soft cap that a model's forward applies to lm_head's output.

    The names are those of transformers' configurations; a model that does something else is found
    out by comparing its own logits.

    Args:
        config: of the language model, as transformers has it.
    """
    scale = 1.0
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        scale *= float(getattr(config, name, None) or 1.0)
    divisor = float(getattr(config, "logits_scaling", None) or 1.0)
    multiplies = getattr(config, "model_type", "") == "hyperclovax"
    scale = scale * divisor if multiplies else scale / divisor
    return scale, getattr(config, "final_logit_softcapping", None)
