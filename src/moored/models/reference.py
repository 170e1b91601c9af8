"""The base as the reference: the same frozen weights with the adapters off.

Also the checks that it really is the base. No loss is computed here.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor, nn

from moored.data.batch import Batch
from moored.utils.errors import UserError


@contextlib.contextmanager
def dropout_off(model: nn.Module) -> Iterator[None]:
    """Run the body with every module's `training` flag off, then restore each as it was.

    The flags are set one by one instead of by `eval()`, which some layers override with side
    effects. No random number is drawn by a module whose flag is off.
    """
    was_training = [module for module in model.modules() if module.training]
    try:
        for module in was_training:
            module.training = False
        yield
    finally:
        for module in was_training:
            module.training = True


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


@contextlib.contextmanager
def _base_values(model: PeftModel) -> Iterator[None]:
    replaced: tuple[Replaced, ...] = getattr(model, "replaced", ())
    adapted = [one.parameter.data for one in replaced]
    try:
        for one in replaced:
            one.parameter.data = one.base
        yield
    finally:
        for one, values in zip(replaced, adapted, strict=True):
            one.parameter.data = values


@contextlib.contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Run the body as the base: adapters off, dropout off, no gradient, random state untouched.

    Args:
        model: the policy; its PEFT model is found inside it.
    """
    peft_models = [module for module in model.modules() if isinstance(module, PeftModel)]
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(dropout_off(model))
        for peft_model in peft_models:
            with warnings.catch_warnings():  # the biases that it leaves there are off, too
                warnings.filterwarnings("ignore", "Careful, disabling adapter layers")
                stack.enter_context(peft_model.disable_adapter())
            stack.enter_context(_base_values(peft_model))
        yield


def of_base(policy: nn.Module, batch: Batch) -> torch.Tensor:
    """The final hidden states of a policy's base at the targets of a batch, [N, D]."""
    with adapters_off(policy):
        return policy(batch)


def require_identity(
    pristine: torch.Tensor, adapters_off: torch.Tensor, *, adapter: str, where: str
) -> None:
    """Refuse adapters that change the base.

    Args:
        pristine: the probe's final hidden states before any adapter existed, [N, D].
        adapters_off: the same with the adapters in place but off, [N, D].
        adapter: how the recipe names the adapter, for the message.
        where: when this was looked at, for the message.

    Raises:
        UserError: one bit differs.
    """
    if torch.equal(pristine, adapters_off):
        return
    difference = (pristine.double() - adapters_off.double()).abs().max().item()
    raise UserError(
        f"adapter {adapter} changes the base ({where}: with adapters off the final hidden states "
        f"differ by up to {difference:.3g}), so the reference would be wrong: use an "
        "initialisation that leaves the base weights alone, such as adapter.init: default"
    )
