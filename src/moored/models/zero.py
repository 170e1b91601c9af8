"""DeepSpeed's configuration, and ZeRO-3's partitions of the base while it loads.

The only importer of deepspeed. No rank ever holds the whole base, not even before DeepSpeed's
engine exists. Until then hooks gather each layer for its forward; the engine takes over the
partitions as they are.
"""

# DeepSpeed is typed in part only.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

import contextlib
import copy
import os
import re
import sys
from collections.abc import Hashable
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from moored.config import Config
from moored.distributed.mesh import Mesh
from moored.models.experts import matrices_of

os.environ.setdefault("DS_SKIP_CUDA_CHECK", "1")
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

# DeepSpeed's autotuner imports MLflow if it can: a second of every start, for what is not used
# here. Where it cannot, it goes on without.
hides_mlflow = "mlflow" not in sys.modules
if hides_mlflow:
    sys.modules["mlflow"] = None  # pyright: ignore[reportArgumentType]
try:
    import deepspeed
finally:
    if hides_mlflow:
        del sys.modules["mlflow"]

# On CPUs DeepSpeed would compile a C++ extension (over a minute) at the first collective.
with contextlib.suppress(ImportError, AttributeError):
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


# Elements of DeepSpeed's buffer of gradients, 64 MiB in fp32. The default, 5e8, takes 1.9 GiB, even
# where little is trained; a gradient that is larger than the buffer is sent by itself.
REDUCE_BUCKET = 2**24


def zero_config(config: Config, model: nn.Module | None = None) -> dict[str, Any]:
    """DeepSpeed's configuration for a recipe (pure).

    Micro-batch and accumulation are fixed at 1: the step sets the boundary itself, because the
    number of micro-batches differs from step to step.

    Args:
        config: the recipe.
        model: whose layers are gathered at stage 3; None: it is not known yet.
    """
    stage = config.parallel.zero_stage
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": REDUCE_BUCKET}
    if config.parallel.offload == "optimizer":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if stage == 3:
        # Let go of a layer after its use: by default up to 1e9 elements stay gathered for reuse.
        zero["stage3_max_reuse_distance"] = 0
        if model is not None:
            # One layer at work and one ahead. DeepSpeed would fetch ahead up to 1e9 elements.
            zero["stage3_max_live_parameters"] = 2 * _largest_layer(model)
    if stage in (1, 2):
        zero |= {"overlap_comm": False, "contiguous_gradients": True}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        # Stage 0 is clipped in `Engine.step`, where its norm is computed anyway.
        "gradient_clipping": (config.optim.max_grad_norm or 0.0) if stage else 0.0,
        "zero_optimization": zero,
        # One AdamW (torch's) on every stage, so that all stages compute the same update.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
        "timers": {"throughput": {"enabled": False}},  # which waits for the device
    }


def _largest_layer(model: nn.Module) -> int:
    """Elements of the largest decoder layer, as they are stored and whole."""
    sizes: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if (layer := re.match(r".*?\.\d+\.", name)) is not None:
            size = int(getattr(parameter, "ds_numel", parameter.numel()))
            sizes[layer[0]] = sizes.get(layer[0], 0) + size
    return max(sizes.values(), default=1)


class Traces:
    """What ZeRO-3 fetches ahead by: the order of modules, one for each kind of call of the root.

    DeepSpeed knows one order only. A call of another kind (of the base, of the policy without its
    base, of an evaluation) would have it forget that, and it would take two more calls to learn it
    again: so each kind has its own.

    Args:
        optimizer: of DeepSpeed's engine; below stage 3 there is nothing to do.
    """

    def __init__(self, optimizer: Any):
        self._offload: Any = getattr(optimizer, "parameter_offload", None)
        self._by_kind: dict[Hashable, Any] = {}
        if self._offload is not None:
            self._blank = self._offload.param_coordinator

    def follow(self, kind: Hashable) -> None:
        """Say which modules are called next; before the call of the root module."""
        if self._offload is None:
            return
        if kind not in self._by_kind:
            self._by_kind[kind] = copy.copy(self._blank)  # what is on its way is known to them all
            self._by_kind[kind]._clear_trace_structures()
        self._offload.param_coordinator = self._by_kind[kind]

    def begin(self, kind: Hashable) -> None:
        """Say that such an order begins here, within a call of the root module."""
        if self._offload is not None:
            self.follow(kind)
            self._offload.get_param_coordinator().reset_step()


class Partition:
    """Cuts linear layers and experts over the data-parallel axis, each as soon as it is filled.

    Args:
        config: the recipe.
        mesh: the processes.
    """

    def __init__(self, config: Config, mesh: Mesh):
        deepspeed.init_distributed(dist_init_required=False, verbose=False)
        self._config, self._group = zero_config(config), mesh.dp.group
        self._first: Any = None
        self._handles: list[RemovableHandle] = []

    def __call__(self, path: str, module: nn.Module) -> None:
        """Cut the weights of a layer of the stack; leave every other module. Collective."""
        in_stack = re.search(r"\.\d+\.", path)
        kinds = ("weight",) if isinstance(module, nn.Linear) else matrices_of(module)
        weights: list[Any] = [getattr(module, kind) for kind in kinds]
        if not in_stack or not weights or any(weight.is_meta for weight in weights):
            return
        if self._first is None:
            holder = nn.Module()
            holder.weight = self._first = weights[0]
            deepspeed.zero.Init(
                module=holder, data_parallel_group=self._group, config_dict_or_path=self._config
            )
            self._first.convert_to_zero_parameters(param_list=weights[1:])
        else:
            self._first.convert_to_zero_parameters(param_list=weights)

        def gather(*_: Any) -> None:
            for weight in weights:
                weight.all_gather()

        def release(*_: Any) -> None:
            for weight in weights:
                weight.partition()

        self._handles.append(module.register_forward_pre_hook(gather))
        self._handles.append(module.register_forward_hook(release))

    def hand_over(self) -> None:
        """Stop gathering: the engine does from now on."""
        while self._handles:
            self._handles.pop().remove()
