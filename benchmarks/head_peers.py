"""Who computes cross-entropy with or without a KL from hidden states: ours, and everybody else.

`head.py` measures them. A peer whose package is not installed is left out and named.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))
from moored.loss.head import linear_tmkl_loss

CHUNK = 256
# (hidden, hidden of the base, targets) -> the mean loss over the targets
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Contestant:
    """One way to compute the loss.

    Attributes:
        make: weight (V, D) -> loss.
        computes: "tmkl" and "kl" with cross-entropy, "jsd" likewise, "ce" alone.
        note: what one has to know to compare it.
        package: has to be installed for it.
        is_compiled: its first call compiles.
        is_ours: Moored's own.
    """

    make: Callable[[Tensor], Loss]
    computes: Literal["tmkl", "kl", "jsd", "ce"]
    note: str
    package: str = "torch"
    is_compiled: bool = False
    is_ours: bool = False

    @property
    def is_installed(self) -> bool:
        """Whether its package is there."""
        return importlib.util.find_spec(self.package) is not None


def eager(weight: Tensor) -> Loss:
    """All logits at once, and autograd."""

    def loss(hidden: Tensor, reference: Tensor, targets: Tensor) -> Tensor:
        policy = hidden @ weight.T
        with torch.no_grad():
            base = (reference @ weight.T).scatter_(1, targets[:, None], -1e30)
            log_q = base.log_softmax(-1)
            del base
        ce = functional.cross_entropy(policy, targets, reduction="sum")
        log_p = policy.scatter(1, targets[:, None], -1e30).log_softmax(-1)
        kl = functional.kl_div(log_p, log_q, log_target=True, reduction="sum")
        return (ce + kl) / len(targets)

    return loss


def compiled(weight: Tensor) -> Loss:
    """The same through torch.compile."""
    return torch.compile(eager(weight), dynamic=False)


def checkpointed(weight: Tensor) -> Loss:
    """Chunks of it that are computed again in the backward."""
    whole = eager(weight)

    def loss(hidden: Tensor, reference: Tensor, targets: Tensor) -> Tensor:
        parts = zip(*(x.split(CHUNK) for x in (hidden, reference, targets)), strict=True)
        parts = (checkpoint(whole, *part, use_reentrant=False) * len(part[0]) for part in parts)
        return sum(parts) / len(targets)

    return loss


def liger_jsd(weight: Tensor) -> Loss:
    """Liger's fused linear JSD as it is shipped, but that it is not compiled."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    fused = LigerFusedLinearJSDLoss(compiled=False, chunk_size=CHUNK)
    student = weight.clone().requires_grad_()

    def loss(hidden: Tensor, reference: Tensor, targets: Tensor) -> Tensor:
        student.grad = None
        return fused(hidden, student, reference, weight, targets)

    return loss


def liger_kl(weight: Tensor) -> Loss:
    """Liger's loss of a chunk at beta 0, the forward KL, differentiated by the states alone."""
    from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDFunction as Fused

    def of_chunk(part: Tensor, reference: Tensor, targets: Tensor, every: Tensor) -> tuple:
        return Fused._compute_loss(
            part,
            weight,
            reference,
            weight,
            targets,
            distillation_loss_fn=Fused.distillation_loss_fn,
            full_target=every,
            weight_hard_loss=1.0,
            weight_soft_loss=1.0,
            beta=0.0,
        )

    class WithoutWeight(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, hidden: Tensor, reference: Tensor, targets: Tensor) -> Tensor:
            grads, total = [], hidden.new_zeros(())
            for part in zip(*(x.split(CHUNK) for x in (hidden, reference, targets)), strict=True):
                found = torch.func.grad_and_value(of_chunk, has_aux=True)(*part, targets)
                grads.append(found[0])
                total += found[1][0]
            ctx.save_for_backward(torch.cat(grads))
            return total

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:
            return ctx.saved_tensors[0] * grad, None, None

    return WithoutWeight.apply


def torchtune_kl(weight: Tensor) -> Loss:
    """The chunked cross-entropy and forward KL over logits in 8 chunks, of torchtune."""
    # By file: the package's own __init__ needs versions of torchao that this torch has left behind.
    kl = _module("torchtune", "modules/loss/kd_losses.py").ForwardKLWithChunkedOutputLoss()
    chunked = _module("torchtune", "modules/loss/ce_chunked_output_loss.py")
    ce = chunked.CEWithChunkedOutputLoss()

    def loss(hidden: Tensor, reference: Tensor, targets: Tensor) -> Tensor:
        policy = [part @ weight.T for part in hidden[None].chunk(8, dim=1)]
        with torch.no_grad():
            base = [part @ weight.T for part in reference[None].chunk(8, dim=1)]
        return ce(policy, targets[None]) + kl(policy, base, targets[None])

    return loss


def _module(package: str, path: str) -> Any:
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    file = Path(spec.origin).parent / path
    found = importlib.util.spec_from_file_location(f"{package}_{file.stem}", file)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def torch_ce(weight: Tensor) -> Loss:
    """The fused linear cross-entropy of torch."""
    return lambda hidden, reference, targets: functional.linear_cross_entropy(
        hidden, weight, targets
    )


def cut_ce(weight: Tensor) -> Loss:
    """Apple's cut cross-entropy, as it runs without a GPU."""
    from cut_cross_entropy import linear_cross_entropy

    return lambda hidden, reference, targets: linear_cross_entropy(
        hidden, weight, targets, impl="torch_compile"
    )


def ours(weight: Tensor) -> Loss:
    """Both."""
    return lambda hidden, reference, targets: (
        linear_tmkl_loss(hidden, reference, weight, targets).loss
    )


def ours_ce(weight: Tensor) -> Loss:
    """Without a KL: two products."""
    return lambda hidden, reference, targets: (
        linear_tmkl_loss(hidden, None, weight, targets, kl_weight=0.0).loss
    )


CONTESTANTS = {
    "ours": Contestant(ours, "tmkl", "`linear_tmkl_loss`", is_ours=True),
    "eager": Contestant(eager, "tmkl", "all logits at once, autograd"),
    "compiled": Contestant(compiled, "tmkl", "eager through torch.compile", is_compiled=True),
    "checkpointed": Contestant(
        checkpointed, "tmkl", f"eager by chunks of {CHUNK}, computed again in the backward"
    ),
    "torchtune": Contestant(torchtune_kl, "kl", "chunked CE + forward KL", "torchtune"),
    "liger-kl": Contestant(
        liger_kl, "kl", "its chunk's loss at beta 0, without dW, uncompiled", "liger_kernel"
    ),
    "liger-jsd": Contestant(
        liger_jsd, "jsd", "fused linear JSD as shipped (forms dW), uncompiled", "liger_kernel"
    ),
    "ours-ce": Contestant(
        ours_ce, "ce", "`linear_tmkl_loss`, kl_weight=0: two products", is_ours=True
    ),
    "torch-ce": Contestant(torch_ce, "ce", "`torch.nn.functional.linear_cross_entropy`"),
    "cut-ce": Contestant(
        cut_ce, "ce", 'impl="torch_compile", as without a GPU', "cut_cross_entropy", True
    ),
}
