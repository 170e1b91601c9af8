"""The plug-in under everybody's parallelism: the update is that of the global batch, dense."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from distributed.runner import mostly_long, run_distributed
from moored.plugin import TMKL, Options, attach
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
    found = trainer(folder, model, rows(given), TMKL(**options), **arguments)
    found.train()
    assert how != "zero3" or all(hasattr(p, "ds_id") for p in found.model.parameters())
    after = _whole(found, before)
    moved = torch.cat([(before[n] - after[n]).flatten().double() for n in before])
    return found.state.log_history[0]["loss"], moved


def _whole(found: Any, names: Any) -> dict[str, Tensor]:
    """The adapter's parameters in one piece, whatever has cut them."""
    state: dict[str, Tensor] = {}
    for name, parameter in found.model.named_parameters():
        if name not in names:
            continue
        if hasattr(parameter, "ds_id"):
            import deepspeed

            with deepspeed.zero.GatheredParameters([parameter]):
                state[name] = parameter.detach().clone()
        else:
            state[name] = parameter.detach().clone()
    return state


WAYS = ["ddp-1", "ddp-2", "zero1-1", "zero2-2", "zero3-1", "zero3-2"]


@pytest.mark.parametrize("way", mostly_long(WAYS, "ddp-2", "zero3-2"))
@pytest.mark.parametrize("options", [Options(0.7), PROMPT], ids=["targets", "all"])
def test_the_update_is_that_of_the_global_batch(tmp_path: Path, way: str, options: Options) -> None:
    """Accumulated micro-batches of unequal numbers of targets on two ranks count as one batch."""
    how, accumulated = way.split("-")
    found = run_distributed(_updated, WORLD, tmp_path, how, int(accumulated), asdict(options))
    loss, wanted = expected(options, torch.float32 if how.startswith("zero") else torch.float64)
    for logged, moved in found:
        assert logged == pytest.approx(loss, rel=1e-5)
        assert (moved - wanted).norm() < 1e-5 * wanted.norm()


def _by_fsdp2(rank: int, world_size: int, head_apart: bool, options: dict[str, Any]) -> Any:
    """Loss and gradient of a loop of one's own over a model that torch has cut."""
    tied = {"tie_word_embeddings": not head_apart}
    model, given = adapted(**tied), batch(rows=ROWS, length=24)
    attached = attach(model, **options)
    causal_lm: Any = model.get_base_model()
    for layer in causal_lm.model.layers:
        fully_shard(layer)
    if head_apart:
        fully_shard(causal_lm.lm_head)
    fully_shard(model)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    counts = attached.count(given)
    attached.counts = counts[0], counts[1]
    mine = [given_of(given, rank * 4 + i) for i in (0, 2)]
    losses = []
    for micro_batch in mine:
        loss = model(**micro_batch, num_items_in_batch=counts[0]).loss * world_size
        loss.backward()
        losses.append(loss.detach())
    total = torch.stack(losses).sum() / world_size
    dist.all_reduce(total)
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(isinstance(grad, DTensor) for grad in grads)
    return total.item(), torch.cat([grad.full_tensor().flatten() for grad in grads])  # pyright: ignore


def given_of(given: dict[str, Tensor], first: int) -> dict[str, Tensor]:
    """Two rows of a batch."""
    return {name: x[first : first + 2] for name, x in given.items()}


@pytest.mark.parametrize("head_apart", [False, True])
@pytest.mark.parametrize("options", [Options(0.7), PROMPT], ids=["targets", "all"])
def test_parameters_that_fsdp2_has_cut(options: Options, head_apart: bool) -> None:
    found = run_distributed(_by_fsdp2, WORLD, head_apart, asdict(options))
    model = adapted(tie_word_embeddings=not head_apart)
    expected = dense(model, batch(rows=ROWS, length=24), options)
    expected["loss"].backward()
    wanted = gradients(model)
    for loss, gradient in found:
        assert loss == pytest.approx(expected["loss"].item(), rel=1e-9)
        assert (gradient - wanted).norm() < 1e-7 * wanted.norm()
