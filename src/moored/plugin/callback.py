"""The divergence as a callback of the Hugging Face `Trainer` and of all that is built on it.

The only file of the plug-in that knows trainers: what they do to a loss, and where they would leave
it out without a word.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Any

import torch
from transformers import Trainer, TrainerCallback

from moored.plugin.attached import Attached, attach
from moored.plugin.plugin_options import Options


class TMKL(TrainerCallback):
    """Attaches the divergence when training begins, and detaches it when it ends.

    Args:
        weight: factor of the divergence's mean, per target token.
        options: see `Options`.

    Raises:
        ValueError: an option is out of its range. When training begins: model or trainer do not go
            with it; the line names the remedy.
    """

    def __init__(self, weight: float = Options.weight, **options: Any):
        self.options = Options(weight, **options)
        self._attached: Attached | None = None
        self._trainer: Any = None
        self._num_losses = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at the trainer, and give the model its other forward."""
        self._trainer = trainer = _calling_trainer()
        _require_own_loss(args, trainer)
        self._attached = attach(kwargs["model"], **asdict(self.options))
        self._attached.step, self._attached.num_steps = state.global_step, state.max_steps
        if trainer is not None:
            handler = trainer.callback_handler  # first, so that others report what it adds
            handler.callbacks = [self, *(one for one in handler.callbacks if one is not self)]
            if self.options.positions == "all":
                trainer.get_batch_samples = _Counting(trainer, self._attached)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Say which update it is."""
        assert self._attached is not None
        self._attached.step, self._attached.num_steps = state.global_step, state.max_steps
        self._num_losses = self._attached.num_losses

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuse a trainer that went another way."""
        assert self._attached is not None
        if self._attached.num_losses == self._num_losses:
            raise ValueError(
                "TMKL: the trainer took the labels away before the model saw them, or computed a "
                "loss of its own, so nothing was held to the base: switch that option of it off "
                "(loss_scale, a loss type, channel loss, sequence parallelism), or remove TMKL"
            )

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        """Add the parts of the loss to what is logged: nats per token since the last time."""
        if self._attached is None or logs is None or "loss" not in logs:
            return
        found = self._attached.pop_metrics()
        logs.update(found)
        if state.log_history:
            state.log_history[-1].update(found)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Give the model its own forward back."""
        if self._attached is not None:
            self._attached.detach()
        if self._trainer is not None and isinstance(
            vars(self._trainer).get("get_batch_samples"), _Counting
        ):
            del self._trainer.get_batch_samples
        self._attached = self._trainer = None


class _Counting:
    """A trainer's `get_batch_samples` that counts what is held in an update's global batch, too."""

    def __init__(self, trainer: Any, attached: Attached):
        self._trainer, self._attached = trainer, attached
        self._own = trainer.get_batch_samples

    def __call__(self, epoch_iterator: Any, num_batches: int, device: Any = None) -> Any:
        """The batches and their number of targets, as the trainer has them."""
        more = () if device is None else (device,)
        batches, num_items = self._own(epoch_iterator, num_batches, *more)
        counts = sum((self._attached.count(batch) for batch in batches), torch.zeros(2).long())
        counts = counts.to(self._trainer.args.device)
        if self._trainer.args.world_size > 1:
            torch.distributed.all_reduce(counts)
        self._attached.counts = counts[0], counts[1]
        return batches, num_items


def _calling_trainer() -> Any:
    """The trainer that calls a callback: none is told, so it is looked for among the callers."""
    frame = sys._getframe(1)
    while frame is not None:
        found = frame.f_locals.get("self")
        if isinstance(found, Trainer):
            return found
        frame = frame.f_back
    return None


def _require_own_loss(args: Any, trainer: Any) -> None:
    """Refuse trainers and options that take a loss of their own from the model's logits."""
    if getattr(args, "label_smoothing_factor", 0):
        raise ValueError(
            "TMKL: label_smoothing_factor makes the trainer take the labels away from the model: "
            "set it to 0"
        )
    if getattr(args, "n_gpu", 1) > 1:
        raise ValueError(
            "TMKL: torch.nn.DataParallel copies the model in every step: start one process per GPU "
            "with torchrun, or set CUDA_VISIBLE_DEVICES to one"
        )
    home = type(args).__module__.split(".")[0]
    if home == "trl" and "SFTConfig" not in [base.__name__ for base in type(args).__mro__]:
        raise ValueError(
            f"TMKL: {type(args).__name__} is not of supervised fine-tuning, and its labels are not "
            "what is learned: use TRL's SFTTrainer"
        )
    loss_type = getattr(args, "loss_type", None) or "nll"
    if home == "trl" and loss_type not in ("nll", "chunked_nll"):
        raise ValueError(f"TMKL: loss_type={loss_type!r} is another loss: set it to 'nll'")
    if trainer is None:
        return
    if getattr(trainer, "compute_loss_func", None) is not None:
        raise ValueError(
            "TMKL: compute_loss_func takes a loss of its own from the logits: remove it, or TMKL"
        )
    parallel = getattr(trainer.accelerator, "parallelism_config", None)
    if parallel is not None and (parallel.sp_enabled or parallel.cp_enabled):
        raise ValueError(
            "TMKL: sequence and context parallelism cut the rows between the processes, and the "
            "trainer averages their losses in a way of its own: switch them off"
        )
