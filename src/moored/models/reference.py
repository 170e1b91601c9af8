"""The base as the reference: what it makes of a batch, and the proof that it is the base.

How the adapters are turned off is `adapted.py`'s matter. No loss is computed here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moored.adapted import adapters_off
from moored.data.batch import Batch
from moored.utils.errors import UserError


@dataclass(slots=True, kw_only=True)
class Reference:
    """What the base makes of a batch: known, or found in the call of the policy that asks for it.

    Attributes:
        batch: better with its tensors on the CPU, where a cache looks at them.
        hidden: the base's final hidden states at its N targets, [N, D]; None until they are found.
            What a cache had is on the CPU.
    """

    batch: Batch
    hidden: Tensor | None = None


def of_base(policy: nn.Module, batch: Batch) -> torch.Tensor:
    """The final hidden states of a policy's base at the targets of a batch, [N, D], by itself."""
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
