"""The base with the adapter merged into it, from safetensors to safetensors, a shard at a time.

What the adapter does to a tensor is `adapter_changes.py`'s; what the result is worth is measured
elsewhere. A tensor has a name in the files and one in the model: mostly the same, and where they
are not (experts one by one in the files and in one tensor in the model), transformers' own
conversions lead there and back.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
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
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    apply_renamings,
    dot_natural_key,
    rename_source_key,
)
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import get_hf_quantizer

from moored.config import ModelConfig
from moored.export.adapter_changes import Changes, Moved, changes_of, squared_distance, squares
from moored.models import nf4
from moored.models.base_files import resolve_dtype
from moored.models.weights import INDEX, SINGLE, Files
from moored.utils.errors import UserError
from moored.utils.progress import Phase


class OtherNamesError(Exception):
    """The files of a base name its tensors otherwise than the model does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Tensors of the files that stand for tensors of the model.

    Attributes:
        stored: their names in the files, in the order in which they are converted.
        names: their names in the model.
        there: from the files to the model; None where a tensor is the same in both.
        back: from the model to the files.
    """

    stored: tuple[str, ...]
    names: tuple[str, ...]
    there: Step | None = None
    back: Step | None = None

    def to_model(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The model's tensors of the files'."""
        if self.there is None:
            return {self.names[0]: tensors[self.stored[0]]}
        return self.there.run(tensors)

    def to_files(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The files' tensors of the model's."""
        if self.back is None:
            return {self.stored[0]: tensors[self.names[0]]}
        return self.back.run(tensors)


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One conversion of transformers, in one direction.

    Attributes:
        converter: its own, unused; each run takes a copy, since it collects what it converts.
        key: the name that the converter goes by.
        patterns: by the names of what goes in, in this order: which of its patterns each fits.
        renamed: names of what comes out, by the converter's names for them.
        model: without weights, for conversions that ask for its sizes.
    """

    converter: WeightConverter
    key: str
    patterns: Mapping[str, str]
    renamed: Mapping[str, str]
    model: Any

    def run(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What comes out, by name."""
        converter = deepcopy(self.converter)
        for name, pattern in self.patterns.items():
            converter.add_tensor(self.key, name, pattern, tensors[name])  # pyright: ignore
        out = converter.convert(self.key, model=self.model, config=self.model.config)
        whole = {name: t[0] if isinstance(t, list) else t for name, t in out.items()}
        return {self.renamed.get(name, name): tensor for name, tensor in whole.items()}


def parts_of(model: Any, shapes: Mapping[str, list[int]]) -> list[Part]:
    """How a base's files make up its model, as transformers would load them.

    Tensors that the model has no place for are left out.

    Args:
        model: without weights.
        shapes: of the tensors in the files, by name.

    Raises:
        OtherNamesError: transformers' conversions do not lead back to the files' names and shapes.
    """
    conversions = get_model_conversion_mapping(model)
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    of_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    prefix, known = model.base_model_prefix, model.state_dict()
    parts: list[Part] = []
    converted: dict[str, dict[str, str]] = {}  # the model's name: files' names and patterns
    for name in sorted(shapes, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, known)
        if target not in known and name in known:  # as transformers has it
            target, pattern = rename_source_key(name, [], [], prefix, known)
        if target not in known:
            continue
        if pattern is None:
            parts.append(Part(stored=(name,), names=(target,)))
        else:
            converted.setdefault(target, {})[name] = pattern
    for target, patterns in converted.items():
        converter = of_pattern[next(iter(patterns.values()))]
        try:
            parts.append(_converted(model, target, converter, patterns, renamings, shapes))
        except (ValueError, KeyError, RuntimeError, TypeError, NotImplementedError) as error:
            raise OtherNamesError(target) from error
    return parts


def _converted(
    model: Any,
    target: str,
    converter: WeightConverter,
    patterns: Mapping[str, str],
    renamings: list[WeightRenaming],
    shapes: Mapping[str, list[int]],
) -> Part:
    """A part whose tensors are converted, tried on tensors without values."""
    there = Step(converter=converter, key=target, patterns=patterns, renamed={}, model=model)
    known = model.state_dict()
    whole = there.run({name: torch.empty(shapes[name], device="meta") for name in patterns})
    for name, tensor in whole.items():
        if tensor.shape != known[name].shape:
            raise ValueError(f"{name} has shape {list(tensor.shape)} once it is converted")
    reverse: Any = converter.reverse_transform()
    keys = {name: reverse.rename_source_key(name) for name in sorted(whole, key=dot_natural_key)}
    back = Step(
        converter=reverse,
        key=next(iter(keys.values()))[0],
        patterns={name: pattern for name, (_, pattern) in keys.items()},
        renamed=_renamed(patterns, renamings, model.base_model_prefix),
        model=model,
    )
    again = back.run(whole)
    if {name: list(t.shape) for name, t in again.items()} != {n: shapes[n] for n in patterns}:
        raise ValueError(f"{target} does not lead back to its files")
    return Part(stored=tuple(patterns), names=tuple(whole), there=there, back=back)


def _renamed(stored: Iterable[str], renamings: list[WeightRenaming], prefix: str) -> dict[str, str]:
    """The files' names by those that a conversion has for them, with the model's prefix or not."""
    names = {apply_renamings(name, renamings): name for name in stored}
    for key, name in list(names.items()):
        names.setdefault(f"{prefix}.{key}", name)
        names.setdefault(key.removeprefix(f"{prefix}."), name)
    return names


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
        packed: paths of the layers that are 4-bit in the run; empty for `w16`.
        transposed: those among all weights that bitsandbytes turns over before it packs them.
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
    path, _, kind = name.rpartition(".")
    return kind == "weight" and path in plan.packed


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
    """The values of a layer in 4 bits [as stored], by the arithmetic of the loader."""
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
