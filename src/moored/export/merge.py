"""The base with the adapter merged into it, from safetensors to safetensors, a shard at a time.

PEFT's layers merge themselves (LoRA, rsLoRA, DoRA, RandLoRA, and `sinelora.py`'s), so that nothing
of their arithmetic is repeated; what the result is worth is measured elsewhere.
"""

# transformers, accelerate, PEFT and bitsandbytes are typed in part only.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import accelerate
import bitsandbytes as bnb
import bitsandbytes.functional as bnb_functional
import psutil
import torch
import transformers
from huggingface_hub import split_torch_state_dict_into_shards
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.randlora import RandLoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import get_hf_quantizer

from moored import nf4
from moored.adapters import frozen_buffers
from moored.base import resolve_dtype
from moored.config import ModelConfig
from moored.errors import UserError
from moored.export.deltas import Moved, squares
from moored.progress import Phase
from moored.weights import INDEX, SINGLE, Files

log = logging.getLogger(__name__)

SHARD_BYTES = 5 * 10**9  # held in memory while a file is written
BESIDE = ("*.py", "generation_config.json", "LICENSE*", "NOTICE*", "USE_POLICY*")
Adapted = LoraLayer | RandLoraLayer
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class OtherNamesError(Exception):
    """The files of a base name its tensors otherwise than the model does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a merged model will hold, known before a weight is read.

    Attributes:
        source: folder of the base, its tensors under the names of the model.
        config: how the run holds its base.
        base: `w16` for the base's own weights, `nf4` for its 4-bit weights, dequantised.
        tensors: on `meta`, by name: shapes, and the dtypes they are written in.
        packed: paths of the layers that are 4-bit in the run; empty for `w16`.
        transposed: those among all weights that bitsandbytes turns over before it packs them.
        layers: of the model.
        width: the larger of hidden and intermediate size.
    """

    source: Path
    config: ModelConfig
    base: str
    tensors: Mapping[str, Tensor]
    packed: frozenset[str]
    transposed: frozenset[str]
    layers: int
    width: int

    @property
    def num_bytes(self) -> int:
        """Of all files of weights."""
        return sum(t.numel() * t.itemsize for t in self.tensors.values())

    @property
    def num_elements(self) -> int:
        """Of all tensors."""
        return sum(t.numel() for t in self.tensors.values())

    @property
    def coarsest(self) -> torch.dtype:
        """The dtype written that rounds most."""
        floats = {t.dtype for t in self.tensors.values() if t.is_floating_point()}
        return max(floats, key=lambda dtype: torch.finfo(dtype).eps)


def is_quantised(folder: Path) -> bool:
    """Whether a base's own files hold it in 4 bits already."""
    return "quantization_config" in json.loads((folder / "config.json").read_text())


def plan(source: Path, config: ModelConfig, base: str, device: torch.device) -> Plan:
    """What merging would write.

    Args:
        source: folder of the base, with safetensors under the model's own names.
        config: how the run holds its base.
        base: `w16` or `nf4`.
        device: where the run's base would be, which decides its dtype.

    Raises:
        UserError: there are no unquantised weights to merge into.
        OtherNamesError: the files name tensors otherwise than the model; see `renamed`.
    """
    if base == "w16" and is_quantised(source):
        raise UserError(
            f"--base w16: {config.name_or_path} holds 4-bit weights only: add --base nf4"
        )
    model, files = _on_meta(source, config), Files(source)
    tied = model.all_tied_weights_keys
    known = {n for n, _ in model.named_parameters()} | {n for n, _ in model.named_buffers()}
    missing = {n for n, _ in model.named_parameters()} - files.names
    if missing - tied.keys() - set(tied.values()):
        raise OtherNamesError(sorted(missing - tied.keys())[0])
    names = [n for n in files.names & known if not (n in tied and tied[n] in files.names)]
    tensors: dict[str, Tensor] = {}
    default = getattr(model.config, "dtype", None) or resolve_dtype(config, device)
    whole = dict(model.named_parameters()) | dict(model.named_buffers())
    order = {name: place for place, name in enumerate(whole)}
    for name in sorted(names, key=order.__getitem__):
        with files.open(name) as stored:
            # Packed codes are written as what they stand for; counters and the like stay.
            packed_in = default if whole[name].is_floating_point() else whole[name].dtype
            dtype = _DTYPES.get(stored.get_dtype(), packed_in)
        tensors[name] = torch.empty(whole[name].shape, dtype=dtype, device="meta")
    packed = frozenset(_packed(source, config, device) if base == "nf4" else ())
    text = model.config.get_text_config()
    return Plan(
        source=source,
        config=config,
        base=base,
        tensors=tensors,
        packed=packed,
        transposed=frozenset(
            f"{path}.weight" for path, m in model.named_modules() if isinstance(m, Conv1D)
        ),
        layers=text.num_hidden_layers,
        width=max(text.hidden_size, getattr(text, "intermediate_size", None) or 0),
    )


def renamed(source: Path, config: ModelConfig, folder: Path) -> None:
    """The base with its tensors under the model's own names, as transformers converts them.

    Unlike the rest this holds the whole model in memory.
    """
    log.info("transformers converts the base's weights: the whole model is held in memory for it")
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        source, dtype="auto", trust_remote_code=config.trust_remote_code
    )
    model.save_pretrained(folder, save_original_format=False)
    for path in _beside(source):
        shutil.copyfile(path, folder / path.name)


def write(plan: Plan, adapter: Path, folder: Path, device: torch.device) -> list[Moved]:
    """Write the merged model's weights and configuration into an existing folder.

    Args:
        plan: what to write.
        adapter: a PEFT folder.
        folder: gets config.json, safetensors in files of 5 GB and what lay beside the base.
        device: where 4-bit weights are made.

    Returns:
        How far each adapted matrix was moved, as written.

    Raises:
        UserError: an adapter's layer is not in the files, or the result is not finite.
    """
    files, adapted = Files(plan.source), _adapted(plan, adapter)
    if lost := sorted(n for n in adapted if n not in plan.tensors):
        raise UserError(f"{adapter}: adapts {lost[0]}, which is not in the files of the base")
    shards = split_torch_state_dict_into_shards(
        dict(plan.tensors),
        filename_pattern=SINGLE.replace(".safetensors", "{suffix}.safetensors"),
        max_shard_size=SHARD_BYTES,
    )
    moved: list[Moved] = []
    with Phase(f"merging into the {plan.base} weights", plan.num_bytes / 1e9, "GB") as phase:
        for file, names in shards.filename_to_tensors.items():
            tensors: dict[str, Tensor] = {}
            for name in names:
                tensors[name] = _merged(plan, files, name, adapted, device, moved)
                phase.advance(tensors[name].nbytes / 1e9)
            save_file(tensors, folder / file, metadata={"format": "pt"})
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    values = json.loads((plan.source / "config.json").read_text())
    values.pop("quantization_config", None)
    (folder / "config.json").write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
    for path in _beside(plan.source):
        shutil.copyfile(path, folder / path.name)
    return moved


def _beside(source: Path) -> Iterator[Path]:
    for pattern in BESIDE:
        yield from (path for path in source.glob(pattern) if path.is_file())


def _merged(
    plan: Plan,
    files: Files,
    name: str,
    adapted: Mapping[str, Adapted],
    device: torch.device,
    moved: list[Moved],
) -> Tensor:
    """One tensor of the merged model; the sum is in fp32 and is rounded once.

    An adapted one is added to `moved`.
    """
    dtype, path = plan.tensors[name].dtype, name.rpartition(".")[0]
    is_packed = path in plan.packed and name.endswith(".weight")
    if not is_packed and name not in adapted:
        return files.whole(name).to(dtype)
    weight = _dequantised(plan, files, name, device) if is_packed else files.whole(name)
    weight = before = weight.float()
    if name in adapted:
        before = weight.clone()  # PEFT adds in place
        layer: Any = adapted[name]
        base_layer = layer.get_base_layer()
        base_layer.weight = nn.Parameter(weight, requires_grad=False)
        layer.merge(safe_merge=False)
        weight = base_layer.weight.data
        layer.merged_adapters.clear()
        base_layer.weight = nn.Parameter(plan.tensors[name], requires_grad=False)
    exact, weight = weight, weight.to(dtype)
    if not bool(torch.isfinite(weight).all()):
        raise UserError(f"{name} is not finite in {dtype} once the adapter is merged into it")
    if name in adapted:
        moved.append(
            Moved(
                name=path,
                delta=squares(weight.float() - before),
                weight=squares(before),
                rounding=squares(weight.float() - exact),
            )
        )
    return weight.contiguous()


def _dequantised(plan: Plan, files: Files, name: str, device: torch.device) -> Tensor:
    """The values of a 4-bit layer [as stored], by the arithmetic of the loader."""
    dtype, shape = resolve_dtype(plan.config, device), plan.tensors[name].shape
    parts = {
        key.removeprefix(name.removesuffix("weight")): files.whole(key)
        for key in files.names
        if key.startswith(f"{name}.")
    }
    if parts:
        state: Any = bnb_functional.QuantState.from_dict(parts, device=device)
        packed = files.whole(name).to(device)
        return bnb_functional.dequantize_4bit(packed, state).cpu().view(shape)
    is_transposed = name in plan.transposed
    weight = files.whole(name).t() if is_transposed else files.whole(name)
    rows, columns = weight.shape
    codes = nf4.quantize(iter([weight]), (rows, columns), dtype, device)
    state = nf4.state_of(codes, dtype, double=plan.config.double_quantization)
    values = bnb_functional.dequantize_4bit(codes.packed, state).cpu()
    return values.t() if is_transposed else values


def _on_meta(source: Path, config: ModelConfig) -> Any:
    hf_config = transformers.AutoConfig.from_pretrained(
        source, trust_remote_code=config.trust_remote_code
    )
    with accelerate.init_empty_weights(include_buffers=False), no_init_weights():
        return transformers.AutoModelForCausalLM.from_config(
            hf_config, trust_remote_code=config.trust_remote_code
        )


def _packed(source: Path, config: ModelConfig, device: torch.device) -> Iterator[str]:
    """Paths of the layers that transformers' own quantiser would hold in 4 bits."""
    model = _on_meta(source, config)
    dtype = resolve_dtype(config, device)
    wanted = None
    if not is_quantised(source):
        wanted = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    quantizer: Any = get_hf_quantizer(model.config, wanted, {"": device}, True, {})[0]
    quantizer.preprocess_model(model=model, device_map={"": device}, dtype=dtype)
    for path, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            yield path


def _adapted(plan: Plan, adapter: Path) -> dict[str, Adapted]:
    """The adapter's layers by the name of the weight they change; their bases are on `meta`."""
    model = _on_meta(plan.source, plan.config)
    peft = PeftModel.from_pretrained(
        model, str(adapter), low_cpu_mem_usage=True, torch_device="cpu"
    )
    # PEFT moves what it loads to where the base is, which is nowhere: once more, to stay.
    tensors = load_file(adapter / "adapter_model.safetensors")
    names = {n: n.replace(".default", "") for n, _ in peft.named_parameters() if "lora_" in n}
    names |= {f"{key}.default": key for key in frozen_buffers(peft)}
    names = {n: k if k in tensors else k.removesuffix(".weight") for n, k in names.items()}
    if absent := sorted(key for key in names.values() if key not in tensors):
        raise UserError(f"{adapter}: lacks {absent[0]} ({len(absent)} such tensors)")
    peft.load_state_dict({n: tensors[k] for n, k in names.items()}, strict=False, assign=True)
    return {
        path.removeprefix("base_model.model.") + ".weight": module
        for path, module in peft.named_modules()
        if isinstance(module, (LoraLayer, RandLoraLayer))
    }


def device_for(plan: Plan, device: torch.device) -> torch.device:
    """Where the merged model fits while it is verified: there, or on the CPU."""
    if device.type != "cuda":
        return device
    size = plan.num_elements * resolve_dtype(plan.config, device).itemsize
    total = torch.cuda.get_device_properties(device).total_memory
    return device if 1.2 * size < total else torch.device("cpu")


def require_memory(plan: Plan, device: torch.device) -> None:
    """Merging holds a shard; verifying holds the model.

    Raises:
        UserError: it does not fit.
    """
    if device.type != "cpu":
        return
    need = plan.num_elements * resolve_dtype(plan.config, device).itemsize
    free = psutil.virtual_memory().available
    if free < need:
        raise UserError(
            f"verifying the merged model takes {need / 1e9:.1f} GB of memory, and {free / 1e9:.1f} "
            "GB are free: use a larger machine, or export the adapter (without --merge)"
        )
