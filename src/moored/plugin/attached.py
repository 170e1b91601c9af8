"""Another forward for a given model: with labels, its loss is cross-entropy plus the divergence.

What Liger and TRL do for their heads: the causal language model inside the adapters gets a
`forward` of its own, which runs its backbone twice, as base and as adapted, and hands both hidden
states to the fused head. The trainer keeps what is its: the adapters, accumulation, processes,
precision. Without labels, and where no gradient is asked for, the forward is the model's own.

Both passes lie inside one call of the trainer's wrapper (DDP, FSDP, DeepSpeed), and lm_head is
called as a module, so that their hooks gather what they have cut. Legend: B rows, L tokens in each,
T = B L, D hidden size, V vocabulary.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from moored.adapted import Switches, logit_factors
from moored.loss.chunks import Chunked, run_chunks
from moored.loss.divergence import NO_TARGET, Scales
from moored.loss.logits import Logits
from moored.loss.rows import RowPlan, compute_dtype, precomputed
from moored.plugin.plugin_options import Options

IGNORED = -100  # a label of which nothing is learned, as everywhere in the field
CHECKED_TOKENS = 16  # of the first batch, on which head and model must agree


def attach(model: nn.Module, weight: float = Options.weight, **options: Any) -> Attached:
    """Have a model with adapters hold to its base where it is trained.

    Args:
        model: a PEFT model of a causal language model, or what wraps one; or a transformers model
            that adapters were added to. The adapters stay the trainer's.
        weight: factor of the divergence's mean, per target token.
        options: see `Options`.

    Returns:
        What was attached: its figures (`pop_metrics`), the update it is at, and the way back.

    Raises:
        ValueError: an option is out of its range; the model has no adapters that can be turned off,
            or its base would not be the base. One line, which names the remedy.
    """
    causal_lm = _causal_lm(model)
    if isinstance(vars(causal_lm).get("forward"), _Forward):
        raise ValueError(
            "attach: the model has a divergence from its base already: detach it first"
        )
    _require_base(model, causal_lm)
    return Attached(causal_lm, Switches(model), Options(weight, **options))


def detach(model: nn.Module) -> None:
    """Give the model its own forward back; nothing else was changed.

    Raises:
        ValueError: nothing is attached.
    """
    forward = vars(_causal_lm(model)).get("forward")
    if not isinstance(forward, _Forward):
        raise ValueError("detach: the model has its own forward: nothing is attached to it")
    forward.attached.detach()


class Attached:
    """What holds one model near its base, until it is detached.

    Attributes:
        options: what is added to the loss.
        step: the update that the next forward is part of, from 0; None: it has not been said, and
            does not matter. Set it before each update of a loop of your own.
        num_steps: of the run, for a schedule.
        counts: targets and held prompt positions of the update's global batch, so that prompts are
            averaged over all of it; None: each micro-batch's mean counts by its share of targets.
        num_losses: forwards so far that had labels and a gradient.
    """

    def __init__(self, causal_lm: Any, switches: Switches, options: Options):
        self.options = options
        self.step: int | None = None
        self.num_steps = 0
        self.counts: tuple[Tensor, Tensor] | None = None
        self.num_losses = 0
        self._causal_lm, self._switches = causal_lm, switches
        self._is_checked = False
        self._sums: Tensor | None = None
        self._was_own = "forward" in vars(causal_lm)  # of TRL, say, or of accelerate
        self._forward = causal_lm.forward
        causal_lm.forward = _Forward(self, self._forward)

    def detach(self) -> None:
        """Give the model its own forward back."""
        if not isinstance(vars(self._causal_lm).get("forward"), _Forward):
            raise ValueError("detach: another forward was put over this one: undo that first")
        if self._was_own:
            self._causal_lm.forward = self._forward
        else:
            del self._causal_lm.forward

    def pop_metrics(self, *, over_ranks: bool = True) -> dict[str, float]:
        """Means over all tokens since the last time, in nats: `ce`, `tmkl` or `kl`, `kl_prompt`.

        Args:
            over_ranks: sum over the processes of the default group first, where there are any. It
                is a collective then.
        """
        if self._sums is None:
            return {}
        sums, self._sums = self._sums, None
        if over_ranks and torch.distributed.is_initialized():
            torch.distributed.all_reduce(sums)
        ce, kl, prompt, num_targets, num_kl, num_prompt = sums.tolist()
        found = {"ce": ce / max(1.0, num_targets)}
        if num_kl:
            found[self.options.kind] = kl / num_kl
        if num_prompt:
            found["kl_prompt"] = prompt / num_prompt
        return found

    def count(self, batch: Mapping[str, Any]) -> Tensor:
        """Targets and held prompt positions of a batch as the model gets it, int64 [2]."""
        targets_T, held_T = self._positions(batch, batch.get("labels"), batch.get("shift_labels"))
        valid_T = targets_T != IGNORED
        held = (held_T & ~valid_T).sum() if held_T is not None else torch.zeros_like(valid_T.sum())
        return torch.stack([valid_T.sum(), held])

    # ------------------------------------------------------------ the forward

    def loss(
        self,
        inputs: dict[str, Any],
        labels: Tensor | None,
        shift_labels: Tensor | None,
        num_items: Tensor | float | None,
        *,
        fused_output: bool,
    ) -> Any:
        """The loss of a batch, as an output of transformers, or as TRL's fused head has it.

        Args:
            inputs: of the backbone.
            labels: int64 [B, L], as transformers has them, or
            shift_labels: those that stand at the token before theirs already.
            num_items: targets of the update's global batch; None: the mean of this batch.
            fused_output: per token, for TRL.
        """
        self.num_losses += 1
        weight, prompt_weight = self._weights()
        targets_T, held_T = self._positions(inputs, labels, shift_labels)
        reference_TD = None
        self._check(inputs)
        if weight or prompt_weight:
            with self._switches.adapters_off():
                reference_TD = self._hidden(inputs).flatten(0, 1)
            if torch.is_autocast_enabled(reference_TD.device.type):
                torch.clear_autocast_cache()  # of casts made without a gradient
        hidden_BLD = self._hidden(inputs)
        hidden_TD = hidden_BLD.flatten(0, 1)
        plan, found = self._through_head(
            hidden_TD, reference_TD, targets_T, held_T, (weight, prompt_weight)
        )
        self._add(plan, found, with_kl=reference_TD is not None)
        if fused_output:
            from moored.plugin import trl

            return trl.output(self, found, hidden_BLD, targets_T, shifted=shift_labels is not None)
        assert found.grad_ND is not None
        value = found.weighted_N.sum().to(found.grad_ND.dtype)
        loss = precomputed(hidden_TD, value, found.grad_ND)
        if num_items is None:
            num_items = max(1, plan.num_targets)
        elif isinstance(num_items, Tensor):
            num_items = num_items.to(loss.device)
        from transformers.modeling_outputs import CausalLMOutputWithPast

        return CausalLMOutputWithPast(loss=loss / num_items)  # pyright: ignore[reportArgumentType]

    def _weights(self) -> tuple[float, float]:
        if self.step is None and self.options.needs_step:
            raise ValueError(
                "attach: every, schedule or warmup_steps is given, but not which update this is: "
                "set `step` (and `num_steps`) of what `attach` returned before each update"
            )
        return self.options.weights_at(self.step or 0, self.num_steps)

    def _positions(
        self, inputs: Mapping[str, Any], labels: Tensor | None, shift_labels: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The target after each token, int64 [T], and where the base is held to, bool [T].

        Of the last token of a sample nothing is known, of padding nothing is asked.
        """
        if shift_labels is not None:
            targets_BL = shift_labels
        else:
            assert labels is not None
            targets_BL = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
        if self.options.positions == "targets":
            return targets_BL.flatten(), None
        if shift_labels is not None:
            raise ValueError(
                "positions='all' with shift_labels: a row cut over ranks does not say where its "
                "samples end: use positions='targets'"
            )
        held_BL = torch.ones_like(targets_BL, dtype=torch.bool)
        held_BL[:, -1] = False
        mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
        if isinstance(mask, Tensor) and mask.dim() == 2:
            is_real_BL = mask.bool()
            held_BL[:, :-1] &= is_real_BL[:, :-1] & is_real_BL[:, 1:]
        elif mask is not None:
            raise ValueError(
                "positions='all' with an attention_mask that is not [batch, tokens]: which tokens "
                "are padding cannot be read from it: use positions='targets'"
            )
        if positions is not None:  # rows of several samples: each starts at 0
            held_BL[:, :-1] &= positions[..., 1:] == positions[..., :-1] + 1
        return targets_BL.flatten(), held_BL.flatten()

    def _hidden(self, inputs: dict[str, Any]) -> Tensor:
        """The backbone's final hidden states, [B, L, D]."""
        output = self._causal_lm.base_model(**inputs, use_cache=False, return_dict=True)
        return output.last_hidden_state

    def _through_head(
        self,
        hidden_TD: Tensor,
        reference_TD: Tensor | None,
        targets_T: Tensor,
        held_T: Tensor | None,
        weights: tuple[float, float],
    ) -> tuple[RowPlan, Chunked]:
        """Sums of a batch and the gradient of its hidden states, by lm_head called as a module."""

        def use(logits: Logits) -> tuple[RowPlan, Chunked]:
            with_kl = reference_TD is not None
            plan = RowPlan.of(
                targets_T,
                None if held_T is None else held_T | (targets_T != IGNORED),
                IGNORED,
                logits.shard.vocab_size,
                with_kl=with_kl,
                with_prompt=held_T is not None,
            )
            ids_T = targets_T
            if plan.prompt_N is not None:
                ids_T = targets_T.masked_fill(plan.prompt_N, NO_TARGET)
            scales = Scales(ce=1.0, kl=weights[0], prompt=weights[1] * self._prompt_ratio(plan))
            return plan, run_chunks(
                logits,
                hidden_TD.detach(),
                None if reference_TD is None else reference_TD.detach(),
                ids_T,
                plan,
                self.options.objective,
                scales,
                None,
                with_gradient=True,
            )

        return self.by_head(use)

    def _prompt_ratio(self, plan: RowPlan) -> Tensor | float:
        """What makes a sum over prompts, divided by the number of targets, a mean over prompts."""
        if self.counts is not None:
            num_targets, num_prompt = self.counts
            return num_targets.double() / num_prompt.clamp(min=1)
        return max(1, plan.num_targets) / max(1, plan.num_prompt)

    def by_head(self, use: Callable[[Logits], Any]) -> Any:
        """Whatever `use` makes of the head, inside a call of lm_head and without a graph."""
        config = self._causal_lm.config
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        scale, softcap = logit_factors(config)
        lm_head: Any = self._causal_lm.get_output_embeddings()
        # accelerate's hooks call what they have put aside under this name.
        name = "_old_forward" if hasattr(lm_head, "_hf_hook") else "forward"

        def forward(*_: Any) -> None:
            weight, bias = (_whole(x) for x in (lm_head.weight, lm_head.bias))
            assert weight is not None
            with torch.no_grad():
                results.append(use(Logits.of(weight, bias, scale, softcap, None)))

        results: list[Any] = []
        with _replaced(lm_head, name, forward):
            lm_head()
        return results[0]

    def _add(self, plan: RowPlan, found: Chunked, *, with_kl: bool) -> None:
        kl, prompt = (part_N.sum() for part_N in plan.by_kind(found.kl_N))
        counts = found.ce_N.new_tensor(
            [plan.num_targets, plan.num_kl if with_kl else 0, plan.num_prompt]
        )
        sums = torch.cat([torch.stack([found.ce_N.sum(), kl, prompt]), counts])
        self._sums = sums if self._sums is None else self._sums + sums

    # ------------------------------------------------------------ the first batch

    @torch.no_grad()
    def _check(self, inputs: dict[str, Any]) -> None:
        """Compare our logits of a few tokens with the model's own, once.

        Raises:
            ValueError: the model does more to its logits than is known here.
        """
        ids = inputs.get("input_ids")
        if self._is_checked or ids is None:
            return
        few = {"input_ids": ids[:1, :CHECKED_TOKENS]}
        with self._switches.adapters_off():
            own = self._forward(**few, use_cache=False).logits[0].float()
            hidden = self._hidden(few)[0]
        ours = self.by_head(lambda logits: plain_logits(logits, hidden))
        half = torch.finfo(hidden.dtype).eps
        bound = 8 * half * max(1.0, own.abs().max().item()) + 1e-5 * hidden.shape[-1] ** 0.5
        difference = (ours - own).abs().max().item()
        if not difference <= bound:
            raise ValueError(
                f"attach: {type(self._causal_lm).__name__} does more to its logits than a scale or "
                f"a soft cap, which the loss would not see (they differ by {difference:.2g}, "
                f"rounding explains {bound:.2g}): this architecture is not supported"
            )
        self._is_checked = True


class _Forward:
    """The forward in the model's own one's place; `inspect.signature` sees that one's."""

    def __init__(self, attached: Attached, own: Callable[..., Any]):
        self.attached, self._own = attached, own
        functools.update_wrapper(self, own)
        self._parameters = [
            name
            for name, parameter in inspect.signature(own).parameters.items()
            if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        ]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        has_labels = kwargs.get("labels") is not None or kwargs.get("shift_labels") is not None
        is_late = len(args) > self._place("labels")
        if not torch.is_grad_enabled() or not (has_labels or is_late):
            return self._own(*args, **kwargs)
        inputs = dict(zip(self._parameters, args, strict=False)) | kwargs
        taken = {
            name: inputs.pop(name, None)
            for name in ("labels", "shift_labels", "num_items_in_batch", "fused_lm_head")
        }
        if inputs.pop("output_router_logits", None):
            raise ValueError(
                "attach: the load balancing loss of experts is not part of this loss: set its "
                "coefficient (router_aux_loss_coef) to 0"
            )
        for name in ("use_cache", "return_dict", "logits_to_keep", "past_key_values"):
            inputs.pop(name, None)
        return self.attached.loss(
            inputs,
            taken["labels"],
            taken["shift_labels"],
            taken["num_items_in_batch"],
            fused_output=bool(taken["fused_lm_head"]),
        )

    def _place(self, name: str) -> int:
        return self._parameters.index(name) if name in self._parameters else len(self._parameters)


@contextlib.contextmanager
def _replaced(module: nn.Module, name: str, function: Callable[..., Any]) -> Iterator[None]:
    before = vars(module).get(name)
    vars(module)[name] = function
    try:
        yield
    finally:
        del vars(module)[name]
        if before is not None:
            vars(module)[name] = before


def _whole(tensor: Tensor | None) -> Tensor | None:
    """A tensor that FSDP2 has cut, in one piece; any other as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # pyright: ignore


def plain_logits(logits: Logits, hidden_ND: Tensor) -> Tensor:
    """What the model says of some hidden states, [N, V], in at least fp32."""
    dtype = compute_dtype(hidden_ND, logits.weight_vD)
    return logits.project(hidden_ND, None, dtype, logits.new_buffer(len(hidden_ND), dtype))[0]


# ---------------------------------------------------------------- whether there is a base


def _causal_lm(model: nn.Module) -> Any:
    """The causal language model inside adapters and wrappers."""
    found = [module for module in model.modules() if isinstance(module, PeftModel)]
    if len(found) > 1:
        raise ValueError(f"attach: {len(found)} PEFT models in one: attach to one of them")
    inner: Any = found[0].get_base_model() if found else model
    while not found and not hasattr(inner, "get_output_embeddings") and hasattr(inner, "module"):
        inner = inner.module
    if not hasattr(inner, "get_output_embeddings") or not hasattr(inner, "base_model"):
        raise ValueError(
            f"attach: {type(model).__name__} is not a causal language model of transformers with "
            "PEFT's adapters: make it one with peft.get_peft_model first"
        )
    return inner


def _require_base(model: nn.Module, causal_lm: Any) -> None:
    """Refuse what has no base to hold to, or another one than it seems."""
    for module in model.modules():
        if isinstance(module, PeftModel) and module.active_peft_config.is_prompt_learning:
            raise ValueError(
                "attach: a prompt-learning adapter stands before the text, and its base cannot be "
                "run beside it: use LoRA or another adapter of the layers"
            )
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    if not layers:
        raise ValueError(
            "attach: the model has no adapter that can be turned off, so there is no base to hold "
            "to: add one with peft.get_peft_model (LoRA, say) before training"
        )
    if any(layer.merged for layer in layers):
        raise ValueError("attach: adapters are merged into the base: unmerge_adapter() first")
    if "_original_forward" in vars(causal_lm):
        raise ValueError(
            "attach: accelerate has put autocast around this model's forward: make it a PEFT model "
            "with peft.get_peft_model, or attach before accelerator.prepare"
        )
    if causal_lm.base_model is causal_lm:
        raise ValueError(f"attach: {type(causal_lm).__name__} has no backbone apart from its head")
    lm_head = causal_lm.get_output_embeddings()
    if isinstance(lm_head, BaseTunerLayer | AuxiliaryTrainingWrapper):
        raise ValueError(
            "attach: lm_head has an adapter of its own, and the head must be the base's: leave it "
            "out of target_modules and modules_to_save"
        )
    if not isinstance(lm_head, nn.Linear) or not lm_head.weight.is_floating_point():
        raise ValueError(
            f"attach: lm_head is {type(lm_head).__name__}, not a plain linear layer in 16 or 32 "
            "bits: leave it unquantised"
        )
    _require_frozen(model, causal_lm)
    for config in getattr(model, "peft_config", {}).values():
        start = getattr(config, "init_lora_weights", True)
        if isinstance(start, str) and start.split("_")[0] in ("pissa", "olora", "corda", "loftq"):
            raise ValueError(
                f"attach: init_lora_weights={start!r} changes the base's weights, so that it would "
                "not be the base that is held to: use the default initialisation"
            )


def _require_frozen(model: nn.Module, causal_lm: Any) -> None:
    """Refuse parameters of the base that are trained: they would move the reference, too."""
    of_adapters: set[int] = set()
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            for name in module.adapter_layer_names:
                part = getattr(module, name, None)
                if isinstance(part, nn.Module):
                    of_adapters |= {id(p) for p in part.parameters()}
        elif isinstance(module, AuxiliaryTrainingWrapper):
            kept = getattr(module, "original_module", None)
            base = set() if kept is None else {id(p) for p in kept.parameters()}
            of_adapters |= {id(p) for p in module.parameters()} - base
    for name, parameter in causal_lm.named_parameters():
        if parameter.requires_grad and id(parameter) not in of_adapters:
            raise ValueError(
                f"attach: {name} of the base is trained, so that the base would move with it: "
                "freeze it (bias='none' in the adapter's configuration), or list its module in "
                "modules_to_save"
            )
