"""DeepSpeed's configuration, and how it is imported; nothing else imports it.

At stage 3 gradients and the optimizer's state are DeepSpeed's, cut as at stage 2; the base is cut
by `partition.py`.
"""

# DeepSpeed is typed in part only.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

import contextlib
import os
import sys
from typing import Any

import torch

from moored.config import Config

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


def zero_config(config: Config) -> dict[str, Any]:
    """DeepSpeed's configuration for a recipe (pure).

    Micro-batch and accumulation are fixed at 1: the step sets the boundary itself, because the
    number of micro-batches differs from step to step.
    """
    stage = min(2, config.parallel.zero_stage)
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": REDUCE_BUCKET}
    if config.parallel.offload == "optimizer":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if stage:
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
