"""The policy: the frozen base with its adapters, and one forward for backbone and head.

Nothing here knows ZeRO, optimizers or files of a run.
"""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from moored.adapted import Switches, dropout_off
from moored.config import Config
from moored.data.batch import Batch, answer_offsets
from moored.distributed.mesh import Mesh
from moored.loss.divergence import Objective, Scales
from moored.loss.drift import DriftSums
from moored.loss.head import Head, LossSums, attach_gradient
from moored.models.adapters import add_adapters, product_norm
from moored.models.attention import attend_by_sample, share_rows
from moored.models.base_files import resolve_dtype
from moored.models.forward import final_hidden, probe_batch
from moored.models.loading import load_base
from moored.models.open_adapters import (
    open_adapter,
    read_settings,
    require_language_model,
    require_measurable,
)
from moored.models.partition import Partition
from moored.models.reference import Reference, of_base, require_identity
from moored.models.tensor_parallel import Sharding
from moored.utils.errors import UserError

log = logging.getLogger(__name__)


class PolicyModel(nn.Module):
    """Backbone and head in one module, so that one forward gathers both under ZeRO-3.

    Attributes:
        causal_lm: the PEFT model around the Hugging Face causal language model.
        compute_dtype: the dtype of the base's activations; adapters are kept in fp32.
        sharding: how the model is spread over ranks; None on one.
        partition: of the base's layers under ZeRO-3; None where every rank has them whole.
        head: from hidden states to losses, the module in lm_head's place; or, where a saved adapter
            brings an lm_head of its own, one for the policy with the base's beside it.
        switches: of its adapters and its dropout.
    """

    def __init__(
        self,
        causal_lm: PeftModel,
        compute_dtype: torch.dtype,
        sharding: Sharding | None = None,
        partition: Partition | None = None,
        head: Head | None = None,
    ):
        super().__init__()
        self.causal_lm = causal_lm
        self.compute_dtype = compute_dtype
        self.sharding, self.partition = sharding, partition
        self.own_head = head
        self.switches = Switches(self)

    @property
    def head(self) -> Head:
        """The module in lm_head's place, or the policy's own."""
        if self.own_head is not None:
            return self.own_head
        base: Any = self.causal_lm.get_base_model()
        head = base.get_output_embeddings()
        assert isinstance(head, Head)
        return head

    @property
    def sequence_parallel(self) -> bool:
        """Whether each rank of a tensor-parallel group has its share of the tokens."""
        return self.sharding is not None and self.sharding.sequence_parallel

    def forward(self, *inputs: Any, use: Callable[..., Any] | None = None, **options: Any) -> Any:
        """Whatever the method `use` of this class makes of its arguments: `hidden`, if it is None.

        All uses pass through here because ZeRO-3 hangs its bookkeeping on the module's call.
        """
        return (use or PolicyModel.hidden)(self, *inputs, **options)

    def hidden(self, batch: Batch) -> torch.Tensor:
        """The final hidden states at the batch's N targets, [N, D]."""
        with self._autocast():
            return final_hidden(self.causal_lm.get_base_model(), batch)

    def _of_reference(
        self, batch: Batch, reference: Reference | torch.Tensor | None
    ) -> torch.Tensor | None:
        """The base's final hidden states, [N, D], found here if they are not known.

        Here, not in a call of its own: ZeRO-3 fetches ahead within one call of this module, and
        only if the same modules follow each other in every such call.
        """
        if not isinstance(reference, Reference):
            return reference
        if reference.hidden is None:
            with self.switches.adapters_off():
                reference.hidden = self.hidden(batch)
        return reference.hidden.to(batch.input_ids.device, non_blocking=True)

    def loss(
        self,
        batch: Batch,
        reference_hidden: Reference | torch.Tensor | None = None,
        *,
        objective: Objective,
        scales: Scales,
        l2_scale: float = 0.0,
    ) -> tuple[torch.Tensor, LossSums]:
        """A micro-batch's share of the loss (0-dim, with a graph), and its sums.

        Args:
            batch: with N positions.
            reference_hidden: the base's final hidden states there, [N, D], or where they are to be
                found; None: no KL.
            objective: what is descended.
            scales: factors of the sums of cross-entropies and of KLs: 1 / (targets of the global
                batch), and each KL's weight / (its positions there).
            l2_scale: factor of the squared norm of the adapter's product.
        """
        of_reference = self._of_reference(batch, reference_hidden)
        hidden = self.hidden(batch)
        everywhere = batch.num_kl == len(batch.targets)
        grad_hidden, sums = self.head(
            hidden,
            of_reference,
            batch.targets,
            use=Head.loss,
            objective=objective,
            scales=scales,
            kl_mask=None if everywhere else batch.kl_mask,
            kl_weights=objective.kl_weights(answer_offsets(batch.target_index, batch.targets)),
            num_targets=batch.num_targets,
            num_kl=batch.num_kl,
            num_prompt=batch.num_prompt,
        )
        total = attach_gradient(hidden, grad_hidden, sums)
        if l2_scale:
            total = total + l2_scale * product_norm(self.causal_lm)
        return total, sums

    def base_cross_entropy(self, batch: Batch, reference_hidden: Reference) -> torch.Tensor:
        """Of the base at the batch's N targets, [N] in nats.

        Args:
            batch: with N targets.
            reference_hidden: the base's final hidden states there, or where they are to be found.
        """
        of_reference = self._of_reference(batch, reference_hidden)
        return self.head(of_reference, batch.targets, use=Head.cross_entropy)

    def drift(
        self, batch: Batch, reference_hidden: Reference | torch.Tensor, *, num_spots: int = 0
    ) -> DriftSums:
        """Policy against base at the batch's N targets.

        Args:
            batch: with N targets.
            reference_hidden: the base's final hidden states there, [N, D], or where they are to be
                found.
            num_spots: look at as many targets that drift most, few of each row.
        """
        of_reference = self._of_reference(batch, reference_hidden)
        return self.head(
            self.hidden(batch),
            of_reference,
            batch.targets,
            use=Head.drift,
            num_spots=num_spots,
            spot_groups=batch.target_index // batch.input_ids.shape[1],
        )

    def generate(self, **arguments: Any) -> torch.Tensor:
        """Token ids from Hugging Face's `generate`."""
        with self._autocast():
            return self.causal_lm.generate(**arguments)  # pyright: ignore

    def _autocast(self) -> torch.autocast:
        return torch.autocast(
            self.head.weight.device.type,
            dtype=torch.bfloat16,
            enabled=self.compute_dtype == torch.bfloat16,
            cache_enabled=False,
        )

    @torch.no_grad()
    def product_norm(self) -> float:
        """Squared Frobenius norm of what the adapters add, over all layers."""
        return product_norm(self.causal_lm).item()

    def trainable(self) -> dict[str, nn.Parameter]:
        """The adapter's parameters by name, in the model's order."""
        return {n: p for n, p in self.named_parameters() if p.requires_grad}


def load_policy(
    path: Path,
    config: Config,
    mesh: Mesh,
    adapter: Path | None = None,
    *,
    to_measure: bool = True,
) -> PolicyModel:
    """Base, head and adapters, with the reference proved to be the base.

    Args:
        path: a local folder with the model.
        config: the recipe.
        mesh: the processes; the model is spread over its tensor-parallel axis. Collective.
        adapter: a PEFT folder whose adapter is loaded; None makes a fresh one by the recipe.
        to_measure: whether `forward` is called; else PEFT's own forward alone, which knows more.

    Raises:
        UserError: see `load_base`, `add_adapters`; the adapters change the base; packing would
            let samples see each other.
    """
    if adapter is not None:
        (require_measurable if to_measure else require_language_model)(adapter)
    partition = _partition(config, mesh)
    # DoRA's magnitudes are made of whole weights: then the base is cut later.
    at_once = None if _is_dora(config, adapter) else partition
    causal_lm, sharding = load_base(path, config.model, mesh, config.parallel, at_once)
    dtype = resolve_dtype(config.model, mesh.device)
    vocab_size = causal_lm.config.get_text_config().vocab_size  # pyright: ignore
    batch = probe_batch(vocab_size, mesh.device)
    pristine = _pristine_hidden(causal_lm, batch, dtype)
    if config.data.packing or config.model.attention == "flash_attention_2":  # rows of several
        option = "data.packing" if config.data.packing else "model.attention"
        _require_isolation(causal_lm, batch, pristine, dtype, vocab_size, option)
    if config.data.packing or mesh.cp.size > 1:
        again = partial(_pristine_hidden, causal_lm, batch, dtype)
        attend_by_sample(causal_lm, pristine, again)
    if mesh.cp.size > 1:
        _share_rows(causal_lm, config, mesh, batch, pristine, dtype)
    head = None
    if adapter is None:
        label = f"{config.adapter.method} with init {config.adapter.init}"
        model = add_adapters(causal_lm, config.adapter, config.train.seed, sharding)
    else:
        label = str(adapter)
        opened = open_adapter(causal_lm, adapter, sharding)
        model, head = opened.model, opened.head
        if partition is not None and (head is not None or getattr(model, "replaced", ())):
            raise UserError(
                f"parallel.zero_stage: {adapter} has weights in place of the base's own, which "
                "ZeRO-3 cannot cut: measure it with parallel.zero_stage=2"
            )
        made_for = model.peft_config["default"].base_model_name_or_path
        if made_for and made_for != config.model.name_or_path:
            log.warning(
                "%s was trained on %s, but is measured on %s",
                adapter,
                made_for,
                config.model.name_or_path,
            )
    policy = PolicyModel(model, dtype, sharding, partition, head)
    policy.train()
    off = of_base(policy, batch)
    require_identity(pristine, off, adapter=label, where="before training")
    if adapter is None and config.adapter.method != "dora":
        with torch.no_grad(), dropout_off(policy):
            _require_neutral(policy(batch), off, label)
    train = config.train
    _set_checkpointing(policy.causal_lm, train.gradient_checkpointing, train.checkpointed_layers)
    return policy


def _partition(config: Config, mesh: Mesh) -> Partition | None:
    """How the base is cut: under ZeRO-3."""
    is_cut = config.parallel.zero_stage == 3 and mesh.shards.size > 1
    return Partition(mesh.shards) if is_cut else None


def _is_dora(config: Config, adapter: Path | None) -> bool:
    if adapter is not None:
        return bool(read_settings(adapter).get("use_dora"))
    return config.adapter.method == "dora"


def _require_neutral(on: torch.Tensor, off: torch.Tensor, adapter: str) -> None:
    if not torch.equal(on, off):
        raise UserError(
            f"adapter {adapter}: a fresh adapter already changes the model's output (by "
            f"{(on.double() - off.double()).abs().max().item():.3g}), so training would not "
            "start at the base: use adapter.init: default"
        )


def _pristine_hidden(causal_lm: nn.Module, batch: Batch, dtype: torch.dtype) -> torch.Tensor:
    on_bf16 = torch.autocast(
        batch.input_ids.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16
    )
    with torch.no_grad(), dropout_off(causal_lm), on_bf16:
        return final_hidden(causal_lm, batch)


def _require_isolation(
    causal_lm: Any,
    batch: Batch,
    pristine: torch.Tensor,
    dtype: torch.dtype,
    vocab_size: int,
    option: str,
) -> None:
    """Change the first packed sample; the second one's hidden states must not move."""
    ids = batch.input_ids.clone()
    ids[:, :8] = (ids[:, :8] + 1) % vocab_size
    fields = {name: getattr(batch, name) for name in Batch.__slots__}
    moved = _pristine_hidden(causal_lm, Batch(**{**fields, "input_ids": ids}), dtype)
    first, second = (moved - pristine).float().abs().amax(dim=1).split(4)
    if second.max() > 1e-3 * pristine.float().abs().max() or not first.max() > 0:
        raise UserError(
            f"{option}: {type(causal_lm).__name__} lets packed samples see each other (attention "
            f"{causal_lm.config._attn_implementation}): set data.packing to false, and "
            "model.attention not to flash_attention_2, which packs them always"
        )


def _share_rows(
    causal_lm: Any,
    config: Config,
    mesh: Mesh,
    batch: Batch,
    pristine: torch.Tensor,
    dtype: torch.dtype,
) -> None:
    """Let the ranks of `mesh.cp` share rows, where that gives the hidden states of whole ones."""
    degree = mesh.cp.size
    label = f"parallel.context_parallel_degree={degree}: {type(causal_lm).__name__}"
    sizes = causal_lm.config.get_text_config()
    heads = int(getattr(sizes, "num_key_value_heads", None) or sizes.num_attention_heads)
    if heads % (degree * mesh.tp.size) or sizes.num_attention_heads % (degree * mesh.tp.size):
        spread = f", which {mesh.tp.size} tensor-parallel ranks share," if mesh.tp.size > 1 else ""
        most = math.gcd(heads // mesh.tp.size, degree)
        raise UserError(
            f"{label}: its {heads} key/value heads{spread} cannot be dealt out evenly to {degree} "
            f"ranks: set it to {most}"
        )
    why = share_rows(causal_lm, mesh.cp, config.data.max_length)
    differs = 0.0
    if why is None:
        mine = _pristine_hidden(causal_lm, batch.part(mesh.cp.rank, degree), dtype)
        expected = pristine[batch.part_of_targets(mesh.cp.rank, degree)]
        bound = min(0.1, 1000 * torch.finfo(mine.dtype).eps) * pristine.abs().max()
        differs = float(len(mine) > 0 and bool((mine - expected).abs().max() > bound))
    if mesh.world.max(differs, mesh.device):
        why = "it gives other hidden states with rows that are shared"
    if why is not None:
        raise UserError(
            f"{label}: {why}: set it to 1, and use parallel.tensor_parallel_degree for long rows"
        )


def num_checkpointed(fraction: float, num_layers: int) -> int:
    """How many of the layers, the first ones, are recomputed in the backward."""
    return math.ceil(round(fraction * num_layers, 9))


def _set_checkpointing(model: PeftModel, kind: str, fraction: float) -> None:
    if kind == "none":
        return
    causal_lm: Any = model.get_base_model()
    if "gradient_checkpointing_kwargs" not in inspect.signature(
        causal_lm.gradient_checkpointing_enable
    ).parameters or not getattr(causal_lm, "supports_gradient_checkpointing", False):
        raise UserError(
            f"train.gradient_checkpointing: {type(causal_lm).__name__} does not support it: "
            "set it to none"
        )
    reentrant = kind == "reentrant"
    causal_lm.gradient_checkpointing_enable(
        gradient_checkpointing_kwargs={"use_reentrant": reentrant}
    )
    if reentrant:
        # A reentrant segment has a backward only if its input requires grad.
        causal_lm.enable_input_require_grads()
    layers = [m for m in causal_lm.modules() if isinstance(m, GradientCheckpointingLayer)]
    if fraction < 1 and not layers:
        raise UserError(
            f"train.checkpointed_layers: {type(causal_lm).__name__} recomputes all layers or none: "
            "set it to 1"
        )
    # The last ones keep theirs: those are given up first, before any layer is recomputed.
    for layer in layers[num_checkpointed(fraction, len(layers)) :]:
        layer.gradient_checkpointing = False
