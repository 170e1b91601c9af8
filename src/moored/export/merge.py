"""The base with the adapter merged into it, from safetensors to safetensors, a shard at a time.

What the adapter does to a tensor is `adapter_changes.py`'s; what the result is worth is measured
elsewhere, and how files name and lay out tensors otherwise than the model is
`models/conversions.py`'s.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
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
from safetensors.torch import save_file
from torch import Tensor
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import get_hf_quantizer

from moored.config import ModelConfig
from moored.export.adapter_changes import Changes, Moved, changes_of, squared_distance, squares
from moored.models import nf4
from moored.models.base_files import resolve_dtype
from moored.models.conversions import OtherNamesError, Part, parts_of
from moored.models.experts import experts_of, hold_in_4_bits, matrices_of
from moored.models.weights import INDEX, SINGLE, Files
from moored.utils.errors import UserError
from moored.utils.progress import Phase

log = logging.getLogger(__name__)

SHARD_BYTES = 5 * 10**9  # held in memory while a file is written
COPIED_FILES = ("*.py", "generation_config.json", "LICENSE*", "NOTICE*", "USE_POLICY*")
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a merged model will hold, known before a weight is read.

    Attributes:
        source: folder of the base, its tensors under the names of the model.
        config: how the run holds its base.
        base: `w16` for the base's own weights, `nf4` for its 4-bit weights, dequantised.
        changes: what the adapter does to tensors, by their names in the model.
        parts: how the files make up the model.
        tensors: on `meta`, by name in the files: shapes, and the dtypes they are written in.
        untied: names of tied tensors that are tied no more, by what they were tied to.
        packed: names of the tensors that are 4-bit in the run; empty for `w16`.
        transposed: those among all weights that are turned over before they are packed.
        layers: of the model.
        width: the larger of hidden and intermediate size.
    """

    source: Path
    config: ModelConfig
    base: str
    changes: Changes
    parts: Sequence[Part]
    tensors: Mapping[str, Tensor]
    untied: Mapping[str, str]
    packed: frozenset[str]
    transposed: frozenset[str]
    layers: int
    width: int

    @property
    def num_bytes(self) -> int:
        """Size of all files of weights."""
        return sum(t.numel() * t.itemsize for t in self.tensors.values())

    @property
    def num_elements(self) -> int:
        """Numbers in all tensors."""
        return sum(t.numel() for t in self.tensors.values())

    @property
    def coarsest(self) -> torch.dtype:
        """The dtype written that rounds most."""
        floats = {t.dtype for t in self.tensors.values() if t.is_floating_point()}
        return max(floats, key=lambda dtype: torch.finfo(dtype).eps)


def is_quantised(folder: Path) -> bool:
    """Whether a base's own files hold it in 4 bits already."""
    return "quantization_config" in json.loads((folder / "config.json").read_text())


def plan(source: Path, config: ModelConfig, adapter: Path, base: str, device: torch.device) -> Plan:
    """What merging would write.

    Args:
        source: folder of the base, with safetensors.
        config: how the run holds its base.
        adapter: a PEFT folder.
        base: `w16` or `nf4`.
        device: where the run's base would be, which decides its dtype.

    Raises:
        UserError: there are no unquantised weights to merge into, or the adapter is none that can
            be merged into them.
        OtherNamesError: the files hold tensors otherwise than the model does, and no conversion
            of transformers leads there and back; see `renamed`.
    """
    if base == "w16" and is_quantised(source):
        raise UserError(
            f"--base w16: {config.name_or_path} holds 4-bit weights only: add --base nf4"
        )
    model, files = _on_meta(source, config), Files(source)
    tied, text = model.all_tied_weights_keys, model.config.get_text_config()
    parts = _parts(model, files)
    names = {name for part in parts for name in part.names}
    parts = [p for p in parts if not (p.names[0] in tied and tied[p.names[0]] in names)]
    stored_as = {part.names[0]: part.stored[0] for part in parts if part.there is None}
    default = getattr(model.config, "dtype", None) or resolve_dtype(config, device)
    tensors = _as_written(model, files, parts, default)
    transposed = {f"{path}.weight" for path, m in model.named_modules() if isinstance(m, Conv1D)}
    for path, module in experts_of(model).items():
        turned: Any = module
        transposed |= {f"{path}.{k}" for k in matrices_of(module) if turned.is_transposed}
    changes = changes_of(model, adapter, lambda name: files.whole(stored_as[tied.get(name, name)]))
    if odd := sorted(changes.of.keys() - names - tied.keys()):
        raise UserError(f"{adapter}: adapts {odd[0]}, which is not in the files of the base")
    untied = {
        name: other
        for name, other in tied.items()
        if changes.of.keys() & {name, other} and not changes.tied & {name, other}
    }
    return Plan(
        source=source,
        config=config,
        base=base,
        changes=changes,
        parts=parts + [Part(stored=(name,), names=(name,)) for name in untied],
        tensors=tensors | {name: tensors[stored_as[other]] for name, other in untied.items()},
        untied=untied,
        packed=frozenset(_packed(source, config, device) if base == "nf4" else ()),
        transposed=frozenset(transposed),
        layers=text.num_hidden_layers,
        width=max(text.hidden_size, getattr(text, "intermediate_size", None) or 0),
    )


def _parts(model: Any, files: Files) -> list[Part]:
    """How the files make up the model, in its order; every parameter is in one, or tied to it."""
    parts = parts_of(model, {name: files.shape(name) for name in files.names})
    own = [name for name, _ in model.named_parameters()]
    missing = set(own) - {name for part in parts for name in part.names}
    tied = model.all_tied_weights_keys
    if missing - tied.keys() - set(tied.values()):
        raise OtherNamesError(sorted(missing - tied.keys())[0])
    order = {name: place for place, name in enumerate(_whole(model))}
    return sorted(parts, key=lambda part: order.get(part.names[0], 0))


def _whole(model: Any) -> dict[str, Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


def _as_written(
    model: Any, files: Files, parts: Sequence[Part], default: torch.dtype
) -> dict[str, Tensor]:
    """The tensors that will be written, on `meta`, by their names in the files."""
    whole, tensors = _whole(model), dict[str, Tensor]()
    for part in parts:
        for name in part.stored:
            # Packed codes are written as what they stand for; counters and the like stay.
            like = whole[part.names[0]] if part.there is None else None
            packed_in = default if like is None or like.is_floating_point() else like.dtype
            dtype = _DTYPES.get(files.dtype(name), packed_in)
            shape = files.shape(name) if like is None else like.shape
            tensors[name] = torch.empty(shape, dtype=dtype, device="meta")
    return tensors


def renamed(source: Path, config: ModelConfig, folder: Path) -> None:
    """The base with its tensors under the model's own names, as transformers converts them.

    Unlike the rest this holds the whole model in memory.
    """
    log.info("transformers converts the base's weights: the whole model is held in memory for it")
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        source, dtype="auto", trust_remote_code=config.trust_remote_code
    )
    model.save_pretrained(folder, save_original_format=False)
    _copy_beside(source, folder)


def write(plan: Plan, folder: Path, device: torch.device) -> list[Moved]:
    """Write the merged model's weights and configuration into an existing folder.

    Args:
        plan: what to write.
        folder: gets config.json, safetensors in files of 5 GB and what lay beside the base.
        device: where 4-bit weights are made.

    Returns:
        How far each adapted tensor was moved, as written.

    Raises:
        UserError: PEFT cannot merge what the adapter does, or the result is not finite.
    """
    files, moved = Files(plan.source), list[Moved]()
    shards = split_torch_state_dict_into_shards(
        dict(plan.tensors),
        filename_pattern=SINGLE.replace(".safetensors", "{suffix}.safetensors"),
        max_shard_size=SHARD_BYTES,
    )
    part_of = {name: part for part in plan.parts for name in part.stored}
    ready: dict[str, Tensor] = {}  # of a part that two files share
    with Phase(f"merging into the {plan.base} weights", plan.num_bytes / 1e9, "GB") as phase:
        for file, names in shards.filename_to_tensors.items():
            tensors: dict[str, Tensor] = {}
            for name in names:
                if name not in ready:
                    ready |= _merged(plan, files, part_of[name], device, moved)
                tensors[name] = ready.pop(name)
                phase.advance(tensors[name].nbytes / 1e9)
            save_file(tensors, folder / file, metadata={"format": "pt"})
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    _write_config(plan, folder)
    _copy_beside(plan.source, folder)
    return moved


def _write_config(plan: Plan, folder: Path) -> None:
    values = json.loads((plan.source / "config.json").read_text())
    values.pop("quantization_config", None)
    if plan.untied:
        for section in (values, *(values[k] for k in ("text_config",) if k in values)):
            section["tie_word_embeddings"] = False
    (folder / "config.json").write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


def _copy_beside(source: Path, folder: Path) -> None:
    for path in (
        path for pattern in COPIED_FILES for path in source.glob(pattern) if path.is_file()
    ):
        shutil.copyfile(path, folder / path.name)


def _merged(
    plan: Plan, files: Files, part: Part, device: torch.device, moved: list[Moved]
) -> dict[str, Tensor]:
    """A part of the merged model as the files have it; sums are in fp32 and are rounded once.

    Adapted tensors are added to `moved`.
    """
    changed = [name for name in part.names if name in plan.changes.of]
    if not changed and not any(_is_packed(plan, name) for name in part.names):
        return {
            name: files.whole(_stored_as(plan, plan.untied.get(name, name))).to(like.dtype)
            for name, like in ((name, plan.tensors[name]) for name in part.stored)
        }
    values = _values(plan, files, part, device)
    before = {name: values[name].clone() for name in changed}  # PEFT adds in place
    for name in changed:
        for change in plan.changes.of[name]:
            values[name] = change(values[name])
    exact = part.to_files(values)
    written = {name: t.to(plan.tensors[name].dtype).contiguous() for name, t in exact.items()}
    for name, tensor in written.items():
        if tensor.shape != plan.tensors[name].shape:
            raise UserError(
                f"{name} has shape {list(plan.tensors[name].shape)} in the base and "
                f"{list(tensor.shape)} in the adapter: name the base that it was trained on"
            )
        if not bool(torch.isfinite(tensor).all()):
            raise UserError(
                f"{name} is not finite in {tensor.dtype} once the adapter is merged into it"
            )
    rounded = part.to_model({name: tensor.float() for name, tensor in written.items()})
    for name in changed:
        moved.append(
            Moved(
                name=name.removesuffix(".weight"),
                delta=squared_distance(rounded[name], before[name]),
                weight=squares(before[name]),
                rounding=squared_distance(rounded[name], values[name]),
            )
        )
    return written


def _is_packed(plan: Plan, name: str) -> bool:
    return name in plan.packed


def _stored_as(plan: Plan, name: str) -> str:
    """The name in the files of a tensor that is there as the model has it."""
    return next((p.stored[0] for p in plan.parts if p.names == (name,) and not p.there), name)


def _values(plan: Plan, files: Files, part: Part, device: torch.device) -> dict[str, Tensor]:
    """A part's tensors as the model has them, in fp32: as the run's base has them with `nf4`."""
    if part.names[0] in plan.untied:
        stored = _stored_as(plan, plan.untied[part.names[0]])
        return {part.names[0]: files.whole(stored).float()}
    if part.there is None and _is_packed(plan, part.names[0]):
        name = part.stored[0]
        pieces = {
            key.removeprefix(name.removesuffix("weight")): files.whole(key)
            for key in files.names
            if key.startswith(f"{name}.")
        }
        if pieces:  # in 4 bits already
            state: Any = bnb_functional.QuantState.from_dict(pieces, device=device)
            codes = files.whole(name).to(device)
            values = bnb_functional.dequantize_4bit(codes, state).cpu()
            return {part.names[0]: values.view(plan.tensors[name].shape).float()}
    # As they are stored: what is quantised is cut from these values, not from fp32 ones.
    values = part.to_model({name: files.whole(name) for name in part.stored})
    return {
        name: (_dequantised(plan, name, t, device) if _is_packed(plan, name) else t).float()
        for name, t in values.items()
    }


def _dequantised(plan: Plan, name: str, stored: Tensor, device: torch.device) -> Tensor:
    """The values of a layer in 4 bits [as stored], by the arithmetic of the loader.

    Experts, [E, as stored], are packed one by one.
    """
    if stored.dim() == 3:
        return torch.stack([_dequantised(plan, name, matrix, device) for matrix in stored])
    dtype, is_transposed = resolve_dtype(plan.config, device), name in plan.transposed
    weight = stored.t() if is_transposed else stored
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
    """Names of the tensors that the loader would hold in 4 bits."""
    model = _on_meta(source, config)
    dtype = resolve_dtype(config, device)
    wanted = None
    if not is_quantised(source):
        wanted = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    quantizer: Any = get_hf_quantizer(model.config, wanted, {"": device}, True, {})[0]
    quantizer.preprocess_model(model=model, device_map={"": device}, dtype=dtype)
    hold_in_4_bits(model)
    for path, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            yield f"{path}.weight"
        yield from (f"{path}.{kind}" for kind in matrices_of(module))


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
