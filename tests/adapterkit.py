"""Adapters as stock PEFT writes them, and plain arithmetic of what they stand for."""

from __future__ import annotations

from pathlib import Path

import bitsandbytes.functional as bnb_functional
import peft
import torch
import transformers
from safetensors.torch import load_file


def adapter_on(model_folder: Path, folder: Path, **settings) -> dict[str, torch.Tensor]:
    """A random adapter, made and saved by stock PEFT."""
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    config = peft.LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **settings)
    model = peft.get_peft_model(model, config)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            # DoRA's magnitudes stay positive, near where they were
            noise = torch.rand_like(parameter) - 0.5
            parameter.data = parameter.data * (1 + noise) if "magnitude" in name else noise / 5
    model.save_pretrained(folder)
    return load_file(folder / "adapter_model.safetensors")


def in_nf4(weight, *, transposed=False, double=True):
    weight = weight.float().t() if transposed else weight.float()
    packed, state = bnb_functional.quantize_4bit(
        weight.contiguous(), compress_statistics=double, quant_type="nf4"
    )
    values = bnb_functional.dequantize_4bit(packed, state)
    return values.t() if transposed else values
