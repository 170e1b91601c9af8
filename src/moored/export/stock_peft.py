"""A model as its users load it, by stock transformers and PEFT, and its logits in a file.

A script that `verification.py` runs; imports nothing of Moored, so that what it proves holds
without it, but for the one module that an adapter which PEFT lacks is named to need.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
from typing import Any

import bitsandbytes as bnb
import bitsandbytes.functional as bnb_functional
import peft
import torch
import transformers
from safetensors.torch import load_file, save_file


def main(task: dict[str, Any]) -> None:
    """Load a model, and an adapter on it if one is named, and write what it computes.

    Args:
        task: `model` (folder), `adapter` (folder or null), `tokenizer` (folder or null), `text`,
            `rows` (lists of token ids), `dtype`, `device`, `attention` (or null), `double` (null:
            not quantised here; else whether NF4 scales are quantised, too), `plain` (what stays
            unquantised, or null for what transformers leaves so), `trust_remote_code`,
            `imports` (a module to import first, or null), `out` (a file: logits fp32 [tokens, V] as
            `on`, with an adapter the base's as `off`; the token ids of `text` and the chat template
            in its header).
    """
    if task["imports"] is not None:
        importlib.import_module(task["imports"])
    dtype = getattr(torch, task["dtype"])
    options: dict[str, Any] = {}
    if task["double"] is not None:
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=task["double"],
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=task["plain"],
        )
    if task["attention"] is not None:
        options["attn_implementation"] = task["attention"]
    load: Any = transformers.AutoModelForCausalLM.from_pretrained  # returns a pair here
    model, loaded = load(
        task["model"],
        dtype=dtype,
        device_map={"": task["device"]},
        trust_remote_code=task["trust_remote_code"],
        output_loading_info=True,
        **options,
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if loaded[kind] and (kind != "unexpected_keys" or task["adapter"] is None):
            raise SystemExit(f"{kind.replace('_', ' ')}: {sorted(map(str, loaded[kind]))[:3]}")
    if task["double"] is not None:
        round_experts(model, double=task["double"])
    if task["adapter"] is not None:
        model = peft.PeftModel.from_pretrained(model, task["adapter"])
        require_exact(model, task["adapter"])
    model.eval()
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            # Else some CPUs repack it, and round its products to bf16 whatever the dtype is.
            module.training = True
    with _autocast(model, task["device"], dtype):
        out = {"on": _logits(model, task)}
        if task["adapter"] is not None:
            with model.disable_adapter():
                out["off"] = _logits(model, task)
    facts = {}
    if task["tokenizer"] is not None:
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(
            task["tokenizer"], trust_remote_code=task["trust_remote_code"]
        )
        ids = tokenizer(task["text"], add_special_tokens=False)["input_ids"]
        facts = {"ids": json.dumps(ids), "template": tokenizer.chat_template or ""}
    save_file(out, task["out"], metadata=facts)


@torch.no_grad()
def round_experts(model: Any, *, double: bool) -> None:
    """Give experts, which transformers leaves unquantised, the values that NF4 has for them.

    Args:
        model: loaded with its linear layers in NF4.
        double: whether scales are quantised, too.
    """
    for module in model.modules():
        if not all(hasattr(module, flag) for flag in ("is_transposed", "has_gate", "num_experts")):
            continue
        for parameter in module.parameters(recurse=False):
            if parameter.dim() != 3:
                continue
            for stored in parameter:
                matrix = stored.t() if module.is_transposed else stored
                packed, state = bnb_functional.quantize_4bit(
                    matrix.contiguous(), compress_statistics=double, quant_type="nf4"
                )
                matrix.copy_(bnb_functional.dequantize_4bit(packed, state))


def require_exact(model: Any, adapter: str) -> None:
    """Every tensor of the file is in the model bit for bit, none is empty, and none is missing.

    What the model has under several names (RandLoRA's bases) is in the file under one of them.

    Args:
        model: the PEFT model.
        adapter: the folder it was loaded from.

    Raises:
        SystemExit: it is not so; the message is what the process leaves behind.
    """
    stored = load_file(f"{adapter}/adapter_model.safetensors")
    own = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    # Of the base itself, which some adapters bring: biases, an embedding.
    own |= {name: p for name, p in model.state_dict().items() if name in stored.keys() - own.keys()}
    shared = {own[name].data_ptr() for name in stored.keys() & own.keys()}
    missing = {n for n in own.keys() - stored.keys() if own[n].data_ptr() not in shared}
    if odd := sorted(missing | (stored.keys() - own.keys())):
        side = "lacks" if odd[0] in own else "has no place in the model for"
        raise SystemExit(f"{len(odd)} keys are not exact: the adapter {side} {odd[0]}")
    for name, tensor in stored.items():
        if tensor.numel() == 0:
            raise SystemExit(f"{name} is empty")
        if not torch.equal(own[name].cpu().to(tensor.dtype), tensor):
            raise SystemExit(f"{name} has other values once loaded")


def _autocast(
    model: Any, device: str, dtype: torch.dtype
) -> contextlib.AbstractContextManager[Any]:
    """PEFT's RandLoRA on 4-bit layers hands on fp32, which a head in bf16 takes under it only."""
    is_4bit = any(isinstance(module, bnb.nn.Linear4bit) for module in model.modules())
    kinds = {config.peft_type for config in getattr(model, "peft_config", {}).values()}
    needed = is_4bit and "RANDLORA" in kinds and dtype != torch.float32
    kind = torch.device(device).type
    return torch.autocast(kind, dtype) if needed else contextlib.nullcontext()


@torch.no_grad()
def _logits(model: Any, task: dict[str, Any]) -> torch.Tensor:
    rows = (torch.tensor([row], device=task["device"]) for row in task["rows"])
    # A prompt that was learned has logits, too, before the row's own.
    return torch.cat(
        [model(input_ids=r, use_cache=False).logits[0, -r.shape[1] :].float().cpu() for r in rows]
    )


if __name__ == "__main__":
    main(json.load(sys.stdin))
