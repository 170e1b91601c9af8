"""The plug-in under everybody's parallelism: the update is that of the global batch, dense."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distributed.runner import mostly_long, run_distributed
from moored.plugin import TMKL, Options
from pluginkit import adapted, batch, dense, gradients, rows, trainer

ROWS, WORLD = 8, 2
PROMPT = Options(0.7, positions="all", prompt_weight=0.4)
DEEPSPEED = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": "auto",
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero_allow_untested_optimizer": True,
    "gradient_clipping": 0.0,
}
FSDP = {
    "fsdp": True,
    "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]},
}


def expected(options: Options, dtype: torch.dtype) -> tuple[float, Tensor]:
    """Loss and gradient of all rows by whole logits of fp64, for the same weights."""
    model = adapted(dtype=dtype).double()
    found = dense(model, batch(rows=ROWS, length=24), options)
    found["loss"].backward()
    return found["loss"].item(), gradients(model)


def _updated(
    rank: int, world_size: int, folder: Path, how: str, accumulated: int, options: dict[str, Any]
) -> tuple[float, Tensor]:
    """Loss and adapter after one update of plain SGD, of which the gradient can be read."""
    torch.manual_seed(0)
    dtype = torch.float32 if how.startswith("zero") else torch.float64
    model, given = adapted(dtype=dtype), batch(rows=ROWS, length=24)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    arguments: dict[str, Any] = {
        "per_device_train_batch_size": ROWS // world_size // accumulated,
        "gradient_accumulation_steps": accumulated,
        "optim": "sgd",
        "learning_rate": 1.0,
        "lr_scheduler_type": "constant",
    }
    if how.startswith("zero"):
        zero = DEEPSPEED["zero_optimization"] | {"stage": int(how[-1])}
        size = arguments["per_device_train_batch_size"]
        arguments["deepspeed"] = DEEPSPEED | {
            "zero_optimization": zero,
            "train_micro_batch_size_per_gpu": size,
            "gradient_accumulation_steps": accumulated,
        }
    if how == "fsdp2":
        arguments |= FSDP
    found = trainer(folder, model, rows(given), TMKL(**options), **arguments)
    found.train()
    kinds = {"zero3": "ds_id", "fsdp2": "full_tensor"}
    assert all(hasattr(p, kinds.get(how, "grad")) for p in found.model.parameters())
    after = _whole(found, before)
    moved = torch.cat([(before[n] - after[n]).flatten().double() for n in before])
    return found.state.log_history[0]["loss"], moved


def _whole(found: Any, names: Any) -> dict[str, Tensor]:
    """The adapter's parameters in one piece, whatever has cut them."""
    state: dict[str, Tensor] = {}
    for name, parameter in found.model.named_parameters():
        plain = name.replace("_fsdp_wrapped_module.", "")
        if plain not in names:
            continue
        if hasattr(parameter, "ds_id"):
            import deepspeed

            with deepspeed.zero.GatheredParameters([parameter]):
                state[plain] = parameter.detach().clone()
        elif hasattr(parameter, "full_tensor"):
            state[plain] = parameter.detach().full_tensor()
        else:
            state[plain] = parameter.detach().clone()
    return state


WAYS = ["ddp-1", "ddp-2", "fsdp2-1", "fsdp2-2", "zero1-1", "zero2-2", "zero3-1", "zero3-2"]


@pytest.mark.parametrize("way", mostly_long(WAYS, "ddp-2", "fsdp2-2", "zero3-2"))
@pytest.mark.parametrize("options", [Options(0.7), PROMPT], ids=["targets", "all"])
def test_the_update_is_that_of_the_global_batch(tmp_path: Path, way: str, options: Options) -> None:
    """Accumulated micro-batches of unequal numbers of targets on two ranks count as one batch."""
    how, accumulated = way.split("-")
    found = run_distributed(_updated, WORLD, tmp_path, how, int(accumulated), asdict(options))
    loss, wanted = expected(options, torch.float32 if how.startswith("zero") else torch.float64)
    for logged, moved in found:
        assert logged == pytest.approx(loss, rel=1e-5)
        assert (moved - wanted).norm() < 1e-5 * wanted.norm()
