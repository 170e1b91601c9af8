"""DeepSpeed ZeRO around the policy: forward, backward, update, and the state to save.

DeepSpeed itself comes from `zero.py`, its only importer. No loss and no schedule is decided here.

Precision is ours, not DeepSpeed's: adapters, gradients and moments are fp32 (so the adapter is its
own fp32 master), the base computes in its own dtype, and DeepSpeed's bf16 mode stays off, which
would cast the packed 4-bit bytes.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import torch

from moored.config import Config
from moored.data.batch import Batch
from moored.distributed.mesh import Mesh, leave_mesh
from moored.loss.divergence import Objective, Scales
from moored.loss.drift import DriftSums
from moored.loss.head import LossSums
from moored.models.forward import probe_batch
from moored.models.policy import PolicyModel
from moored.models.reference import Reference, of_base
from moored.models.reference_cache import ReferenceCache, open_cache
from moored.models.zero import deepspeed, zero_config
from moored.utils.errors import TrainingRefusedError, UserError

log = logging.getLogger(__name__)
MOMENTS = ("exp_avg", "exp_avg_sq")


class Engine:
    """The policy under ZeRO, and the optimizer that moves its adapters.

    Attributes:
        policy: the model; its base may be cut (stage 3).
        stage: the ZeRO stage.
        references: what is kept of the base's hidden states; None: nothing.
    """

    def __init__(self, policy: PolicyModel, config: Config, mesh: Mesh):
        deepspeed.utils.logger.setLevel(logging.ERROR)
        self.policy, self.mesh, self.stage = policy, mesh, config.parallel.zero_stage
        self.references: ReferenceCache | None = None
        self._max_grad_norm = config.optim.max_grad_norm
        self._trainable = policy.trainable()
        if not self._trainable:
            raise UserError("adapter: no module matches adapter.target_modules: nothing to train")
        self._sharding = sharding = policy.sharding
        self._cut = {name for name in self._trainable if sharding and sharding.split_of(name)}
        for name in self._cut:
            # DeepSpeed counts what is cut once per rank in the norm, what is shared once in all.
            self._trainable[name].model_parallel = True  # pyright: ignore[reportAttributeAccessIssue]
        cut = [parameter for name, parameter in self._trainable.items() if name in self._cut]
        rest = [parameter for name, parameter in self._trainable.items() if name not in self._cut]
        optimizer = adamw([group for group in (cut, rest) if group], config)
        self._fused = bool(optimizer.defaults["fused"])
        if sharding is not None and rest:
            optimizer.param_groups[-1]["is_shared"] = True
            optimizer.register_step_pre_hook(self._take_first_gradients)
        deepspeed.init_distributed(dist_init_required=False, verbose=False)
        unit = _ModelParallelUnit(mesh) if mesh.tp.size > 1 else None
        if policy.partition is not None:
            policy.partition.hand_over(policy)
        deepspeed.utils.groups.mpu = unit  # not that of an earlier engine of this process
        self._engine: Any = deepspeed.initialize(
            model=policy,
            optimizer=optimizer,
            config=zero_config(config),
            dist_init_required=False,
            mpu=unit,
        )[0]
        if len(optimizer.param_groups) > 1:
            # DeepSpeed looks for it once the first group has taken its first step.
            self._create_optimizer_state(0.0)

    # -- forward and backward ---------------------------------------------------------------

    def reference(self, batch: Batch) -> Reference:
        """The base's final hidden states at the batch's targets: adapters off, no grad.

        They are read where they are kept; else the next `forward` or `drift` with them runs the
        base, in the same call as the policy.

        Args:
            batch: better with its tensors on the CPU, where a cache looks at them.
        """
        return self.references_of([batch])[0]

    def references_of(self, batches: Sequence[Batch]) -> list[Reference]:
        """`reference` of several batches, over which the ranks agree at once."""
        if self.references is None:
            return [Reference(batch=batch) for batch in batches]
        found = self.references.find_all(batches)
        return [Reference(batch=b, hidden=h) for b, h in zip(batches, found, strict=True)]

    def keep_references(self, config: Config, revision: str, vocab_size: int) -> None:
        """Read the base's hidden states where they are kept, and keep them, if the recipe says so.

        Args:
            config: the recipe.
            revision: of the base, see `ResolvedModel`.
            vocab_size: of the base.
        """
        if config.reference.cache:
            self._begin("base")
            probe = of_base(self._engine.module, probe_batch(vocab_size, self.mesh.device))
            self.references = open_cache(
                config, revision, self.mesh, probe, by_tokens=self.policy.sequence_parallel
            )

    def _begin(self, kind: Hashable) -> None:
        """Say what kind of call follows: each needs the layers in an order of its own."""
        if self.policy.partition is not None:
            self.policy.partition.begin(kind)

    @contextlib.contextmanager
    def _calling(self, use: str, reference: Reference | torch.Tensor | None) -> Iterator[None]:
        """Around a call of the policy, which runs the base too where the reference is not known."""
        asked = reference if isinstance(reference, Reference) and reference.hidden is None else None
        self._begin((use, asked is not None))
        yield
        if asked is not None and self.references is not None:
            assert asked.hidden is not None
            self.references.keep(asked.batch, asked.hidden)

    def forward(
        self,
        batch: Batch,
        reference_hidden: Reference | torch.Tensor | None,
        objective: Objective,
        scales: Scales,
        l2_scale: float = 0.0,
    ) -> tuple[torch.Tensor, LossSums]:
        """The micro-batch's share of the global loss (0-dim, with grad) and its detached sums."""
        with self._calling("loss", reference_hidden):
            return self._engine(
                batch,
                use=PolicyModel.loss,
                reference_hidden=reference_hidden,
                objective=objective,
                scales=scales,
                l2_scale=l2_scale,
            )

    def base_cross_entropy(self, batch: Batch, reference_hidden: Reference) -> torch.Tensor:
        """Of the base at the batch's N targets, [N] in nats: no grad, no dropout.

        Args:
            batch: with N targets, on the device.
            reference_hidden: what `reference` said of it.
        """
        with torch.no_grad(), self._calling("select", reference_hidden):
            return self._engine.module(
                batch, use=PolicyModel.base_cross_entropy, reference_hidden=reference_hidden
            )

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Accumulate gradients that come out *summed* over the data-parallel axis.

        Args:
            loss: this rank's share of the global loss.
            last: whether it is the update's last micro-batch on this rank.
        """
        self._engine.set_gradient_accumulation_boundary(last)
        # ZeRO averages gradients over dp; shares of one global loss must be summed.
        self._engine.backward(loss * self.mesh.dp.size, scale_wrt_gas=False)

    def step(self, learning_rate: float) -> float:
        """Apply the accumulated gradients, or refuse them on every rank alike.

        Args:
            learning_rate: of this update.

        Returns:
            The global gradient norm before clipping. If it is not finite (inf or nan), nothing
            was changed but the gradients, which are gone.
        """
        if self.policy.partition is not None:
            self.policy.partition.release()
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        if self.stage == 0:
            return self._step_unpartitioned()
        self._engine.step()
        norm = float(self._engine.get_global_grad_norm())
        return norm if self._engine.was_step_applied() else float("nan")

    def rehearse(
        self, batch: Batch, objective: Objective, *, with_kl: bool, l2_scale: float = 0.0
    ) -> None:
        """A forward, a backward and an update that is refused: the memory of a step, and no trace.

        The loss is made no number, and what comes of that changes nothing (`step`). The optimizer's
        state is there afterwards, as it is after a first update. Collective.

        Args:
            batch: as large as any of the run's.
            objective: what the run descends.
            with_kl: whether its steps run the base.
            l2_scale: as of `forward`.
        """
        device = self.mesh.device
        if not self._adam_state.get(self._flat_parameters[0]):
            self._create_optimizer_state(0.0)
        with self.uncached():
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                reference = self.reference(batch) if with_kl else None
                scales = Scales(1.0, float(with_kl))
                loss, _ = self.forward(batch.to(device), reference, objective, scales, l2_scale)
                self.backward(loss * float("nan"), last=True)
            norm = self.step(0.0)
        assert not math.isfinite(norm)

    @contextlib.contextmanager
    def uncached(self) -> Iterator[None]:
        """What the base makes of a batch is neither read from the reference cache nor kept."""
        kept, self.references = self.references, None
        try:
            yield
        finally:
            self.references = kept

    def _take_first_gradients(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Give a tensor-parallel group one gradient of what it shares: its first rank's.

        Each of its ranks has summed that with the ranks of its own data-parallel group, of which
        none promises the order of another; and where a gradient is nothing but rounding, Adam makes
        steps of the whole learning rate of it.
        """
        shared = [group for group in optimizer.param_groups if group.get("is_shared")]
        parameters = (parameter for group in shared for parameter in group["params"])
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if not gradients:
            return
        flat = torch.cat([gradient.flatten() for gradient in gradients]).to(self.mesh.device)
        parts = self.mesh.tp.take_first_(flat).split([gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))

    def _step_unpartitioned(self) -> float:
        norm = self._grad_norm()
        if not torch.isfinite(norm):
            for parameter in self._trainable.values():
                parameter.grad = None
            return float("nan")
        if self._max_grad_norm:
            torch.nn.utils.clip_grads_with_norm_(
                self._trainable.values(), self._max_grad_norm, norm
            )
        self._engine.step()
        return float(norm)

    def _grad_norm(self) -> torch.Tensor:
        """Over all parameters, each counted once however many ranks hold it."""
        grads = {name: p.grad for name, p in self._trainable.items() if p.grad is not None}
        if self._sharding is None:
            return torch.nn.utils.get_total_norm(grads.values())
        cut = [grad for name, grad in grads.items() if name in self._cut]
        shared = [grad for name, grad in grads.items() if name not in self._cut]
        norms = [torch.nn.utils.get_total_norm(part).double() for part in (cut, shared)]
        norm = (self.mesh.tp.sum(norms[0] ** 2) + norms[1] ** 2).sqrt()
        return self.mesh.world.take_first_(norm)  # sums of other groups may be rounded otherwise

    # -- evaluation -------------------------------------------------------------------------

    def drift(
        self,
        batch: Batch,
        reference_hidden: Reference | torch.Tensor | None = None,
        num_spots: int = 0,
    ) -> DriftSums:
        """Policy against base on a batch, row by row: no grad, no dropout.

        Args:
            batch: with N targets.
            reference_hidden: the base's final hidden states there, [N, D], if they were asked for.
            num_spots: look at as many targets that drift most, few of each row.
        """
        if reference_hidden is None:
            reference_hidden = self.reference(batch)
        off = self.policy.switches.dropout_off()
        with torch.no_grad(), off, self._calling("drift", reference_hidden):
            return self._engine.module(
                batch,
                use=PolicyModel.drift,
                reference_hidden=reference_hidden,
                num_spots=num_spots,
            )

    def generate(self, *, base: bool = False, **arguments: Any) -> torch.Tensor:
        """Token ids from Hugging Face's `generate`, by the policy or (`base`) by the base."""
        switches = self.policy.switches
        off = switches.adapters_off() if base else switches.dropout_off()
        with torch.no_grad(), off, self.generating() as is_whole:
            arguments["synced_gpus"] = not is_whole
            with self._forward_by_forward("base" if base else "policy"):
                return self._engine.module(use=PolicyModel.generate, **arguments)

    @contextlib.contextmanager
    def generating(self) -> Iterator[bool]:
        """Gather what ZeRO-3 has cut once for several generations, where it fits. Collective.

        Yields:
            Whether every rank has the whole base, so that none need walk along with the others.
        """
        if self.policy.partition is None:
            yield True
            return
        partition, mesh = self.policy.partition, self.mesh
        with partition.whole_if_it_fits(mesh.device, mesh.world) as is_whole:
            yield is_whole

    @contextlib.contextmanager
    def _forward_by_forward(self, of: str) -> Iterator[None]:
        """Every forward of a generation has the same modules, however many forwards there are."""
        handle = self.policy.causal_lm.get_base_model().register_forward_pre_hook(
            lambda *_: self._begin(("token", of)), prepend=True
        )
        try:
            yield
        finally:
            handle.remove()

    # -- state to save and to load ------------------------------------------------------------

    def adapter_tensors(self, *, wanted: bool = True) -> dict[str, torch.Tensor]:
        """Every adapter parameter, whole and in fp32 on the CPU. Collective.

        Args:
            wanted: whether this rank has a use for them; the others get none, and no copies.
        """
        tensors = {}
        for name, parameter in self._trainable.items():
            whole = self._whole(name, parameter.detach())
            if wanted:
                tensors[name] = _on_host(whole)
        return tensors

    def require_equal_replicas(self) -> None:
        """Look whether what a tensor-parallel group shares is the same bit for bit. Collective.

        Raises:
            TrainingRefusedError: it is not, so that the ranks no longer train one model.
        """
        if self._sharding is None:
            return
        names = [name for name in self._trainable if name not in self._cut]
        sums = [self._checksum(self._trainable[name]) for name in names]
        if not sums:
            return
        low, high = self.mesh.tp.extremes(torch.stack(sums))
        odd = (low != high).nonzero().flatten().tolist()
        if odd:
            raise TrainingRefusedError(
                f"{names[odd[0]]} ({len(odd)} tensors in all) differs between the ranks of a "
                "tensor-parallel group: one of them computes or receives wrongly: start again on "
                "other nodes, from a checkpoint before it"
            )

    def _checksum(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        bits = parameter.detach().contiguous().view(torch.int32).flatten().long()
        return (bits * torch.arange(1, len(bits) + 1, device=bits.device)).sum()

    def _whole(self, name: str, local: torch.Tensor) -> torch.Tensor:
        return local if self._sharding is None else self._sharding.whole(name, local)

    def _local(self, name: str, whole: torch.Tensor) -> torch.Tensor:
        return whole if self._sharding is None else self._sharding.local(name, whole)

    def optimizer_tensors(self, *, wanted: bool = True) -> dict[str, torch.Tensor]:
        """The fp32 master, Adam's moments and step per parameter, whole, on the CPU. Collective.

        Args:
            wanted: as of `adapter_tensors`.
        """
        masters = self.adapter_tensors(wanted=wanted)
        tensors = {f"{name}.master": tensor for name, tensor in masters.items()}
        steps = torch.tensor(self._steps_taken(), dtype=torch.float32)
        for name, parameter in self._trainable.items():
            for key in MOMENTS:
                whole = self._whole(name, self._get_moment(parameter, key))
                if wanted:
                    tensors[f"{name}.{key}"] = _on_host(whole)
            if wanted:
                tensors[f"{name}.step"] = steps.clone()
        return tensors

    def load_optimizer_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take up moments and step as `optimizer_tensors` gave them, before the first step.

        The masters go into the policy before the engine is built (`checkpoint.load_masters`).
        """
        steps = tensors[f"{next(iter(self._trainable))}.step"]
        self._create_optimizer_state(float(steps))
        for name, parameter in self._trainable.items():
            for key in MOMENTS:
                moment = self._local(name, tensors[f"{name}.{key}"])
                self._set_moment(parameter, key, moment)

    @property
    def _flat_parameters(self) -> list[torch.Tensor]:
        """What torch's AdamW really steps: parameters, or this rank's flat fp32 partitions."""
        optimizer = self._engine.optimizer
        if self.stage == 0:
            return list(self._trainable.values())
        return list(optimizer.single_partition_of_fp32_groups)

    @property
    def _adam_state(self) -> Any:
        optimizer = self._engine.optimizer
        return optimizer.state if self.stage == 0 else optimizer.optimizer.state

    def _steps_taken(self) -> float:
        state = self._adam_state.get(self._flat_parameters[0], {})
        return float(state.get("step", 0.0))

    def _create_optimizer_state(self, steps: float) -> None:
        # DeepSpeed has none before its first step, and its setters need it to exist.
        for flat in self._flat_parameters:
            state = self._adam_state[flat]
            if not state:
                where = flat.device if self._fused else None
                state["step"] = torch.tensor(0.0, dtype=torch.float32, device=where)
                state.update({key: torch.zeros_like(flat) for key in MOMENTS})
            state["step"].fill_(steps)
        if self.stage:
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()

    def _get_moment(self, parameter: torch.nn.Parameter, key: str) -> torch.Tensor:
        if not self._adam_state.get(self._flat_parameters[0]):
            return torch.zeros(parameter.shape, dtype=torch.float32, device=self.mesh.device)
        if self.stage == 0:
            return self._adam_state[parameter][key].detach()
        whole = deepspeed.utils.safe_get_full_optimizer_state(parameter, key)
        assert whole is not None
        return whole.detach()

    def _set_moment(self, parameter: torch.nn.Parameter, key: str, value: torch.Tensor) -> None:
        value = value.to(self.mesh.device)
        if self.stage == 0:
            self._adam_state[parameter][key].copy_(value)
        else:
            deepspeed.utils.safe_set_full_optimizer_state(parameter, value, key)

    def close(self) -> None:
        """Let go of DeepSpeed's hooks and buffers, so that another engine can follow."""
        if self.references is not None:
            self.references.flush()
        if self.policy.partition is not None:
            self.policy.partition.release()
        self._engine.destroy()


def adamw(groups: list[list[torch.nn.Parameter]], config: Config) -> torch.optim.AdamW:
    """The recipe's optimizer: on a GPU one kernel for all, elsewhere parameter by parameter.

    What is offloaded is stepped on the CPU, whose numbers are then those of every stage.
    """
    on_gpu = all(parameter.is_cuda for group in groups for parameter in group)
    return torch.optim.AdamW(
        [{"params": group} for group in groups],
        lr=config.optim.learning_rate,
        betas=config.optim.betas,
        eps=config.optim.eps,
        weight_decay=config.optim.weight_decay,
        foreach=False,
        fused=on_gpu and config.parallel.offload != "optimizer",
    )


def _on_host(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to("cpu", torch.float32, copy=True)


class _ModelParallelUnit:
    """The mesh in the words in which DeepSpeed asks for it."""

    def __init__(self, mesh: Mesh):
        self._dp, self._tp = mesh.dp, mesh.tp

    def get_data_parallel_group(self, **_: Any) -> Any:
        return self._dp.group

    def get_data_parallel_group_ranks(self) -> list[int]:
        return torch.distributed.get_process_group_ranks(self._dp.group)

    def get_data_parallel_rank(self) -> int:
        return self._dp.rank

    def get_data_parallel_world_size(self) -> int:
        return self._dp.size

    def get_model_parallel_group(self) -> Any:
        return self._tp.group

    def get_model_parallel_rank(self) -> int:
        return self._tp.rank

    def get_model_parallel_world_size(self) -> int:
        return self._tp.size

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size


def leave() -> None:
    """Leave the process group and have DeepSpeed forget it, so that another run can follow."""
    if deepspeed.comm.is_initialized():
        deepspeed.comm.destroy_process_group()
    leave_mesh()
