"""From a folder to the frozen base on this rank: quantised, its share of it, the head in place.

Two ways lead to the same base: weights are streamed from safetensors tensor by tensor
(`weights.py`), or, where a checkpoint needs conversions that only transformers knows, loaded by it.
"""

# transformers and accelerate are typed in part only.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import accelerate
import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import get_hf_quantizer

from moored.config import ModelConfig, ParallelConfig
from moored.distributed.mesh import Mesh, is_lost_peer
from moored.models import quantized_cache
from moored.models.base_files import resolve_dtype
from moored.models.conversions import OtherNamesError, Part, parts_of
from moored.models.experts import (
    Experts4bit,
    experts_of,
    hold_in_4_bits,
    matrices_of,
    require_quantisable,
)
from moored.models.forward import changed_by_tokens, install_head
from moored.models.nf4 import make_zero_safe
from moored.models.tensor_parallel import Sharding, layout_of, why_not_by_tokens
from moored.models.weights import (
    AfterModule,
    Files,
    Loader,
    RandomFiles,
    is_out_of_address_space,
)
from moored.utils.errors import UserError

log = logging.getLogger(__name__)


def load_base(
    path: Path,
    config: ModelConfig,
    mesh: Mesh,
    parallel: ParallelConfig,
    after: AfterModule | None = None,
) -> tuple[nn.Module, Sharding | None]:
    """The frozen base from a local folder, quantised as the recipe says, head in place.

    Args:
        path: the folder.
        config: how it is held.
        mesh: the processes; the model is spread over its tensor-parallel axis.
        parallel: how it is spread.
        after: called with each module's path and the module, once its weights are there.

    Returns:
        The Hugging Face causal language model, and how it is spread (None on one rank).

    Raises:
        UserError: the architecture cannot be loaded or spread, or computes its logits in a way
            that the head does not know.
    """
    dtype = resolve_dtype(config, mesh.device)
    with _failures_named(config, mesh.device):
        hf_config = transformers.AutoConfig.from_pretrained(
            path, trust_remote_code=config.trust_remote_code
        )
        _without_dropout(hf_config)
        quantization = _quantization(hf_config, config, dtype)
        causal_lm, sharding, absent = _stream(
            path, hf_config, config, mesh, parallel, dtype, quantization, after
        )
        if causal_lm is None:
            if config.cache_quantized:
                log.warning("model.cache_quantized: not for a checkpoint that needs conversion")
            causal_lm, absent = _by_transformers(
                path, hf_config, config, mesh.device, dtype, quantization
            )
            if after is not None:
                for name, module in causal_lm.named_modules():
                    after(name, module)
    if absent:
        raise UserError(
            f"model.name_or_path={config.name_or_path}: {len(absent)} tensors are missing from its "
            f"weights (first: {absent[0]}), and would be random: copy or download the model again"
        )
    causal_lm.requires_grad_(False)
    causal_lm.config.use_cache = False
    num_layers = make_zero_safe(causal_lm, dtype)
    for module in causal_lm.modules():
        if isinstance(module, Experts4bit):
            module.compute_dtype = dtype
    if config.quantization == "nf4":
        _require_quantized(causal_lm, num_layers, config)
    if sharding is None:
        install_head(causal_lm, mesh.device)
        return causal_lm, None
    by_tokens = sharding.sequence_parallel
    sharding.connect(causal_lm, by_tokens=False)  # what the head is tried with works either way
    install_head(causal_lm, mesh.device, sharding)
    if by_tokens:
        why = changed_by_tokens(causal_lm, mesh, sharding)
        sharding.connect(causal_lm, by_tokens=_by_tokens(parallel, why))
    return causal_lm, sharding


@contextlib.contextmanager
def _failures_named(config: ModelConfig, device: torch.device) -> Iterator[None]:
    label = f"model.name_or_path={config.name_or_path}"
    try:
        yield
    except (OSError, ValueError, ImportError, KeyError) as error:
        _require_mapped(label, error)
        raise UserError(
            f"{label}: cannot be loaded as a causal language model: {str(error).splitlines()[0]}"
        ) from error
    except MemoryError as error:  # of safetensors, which maps a file before torch does
        _require_mapped(label, error)
        raise
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{label}: does not fit into the memory of {device} "
            f"({str(error).splitlines()[0][:160]}): free it, or take nf4 or a smaller model"
        ) from error
    except (SafetensorError, RuntimeError) as error:
        if is_lost_peer(error):
            raise
        _require_mapped(label, error)
        raise UserError(
            f"{label}: its weights are broken or not those of its config.json "
            f"({str(error).splitlines()[0]}): copy or download the model again"
        ) from error


def _require_mapped(label: str, error: Exception) -> None:
    """Say of a file that the machine would not map that it is too large for it, not broken."""
    if not is_out_of_address_space(error):
        return
    text = str(error).splitlines()[0] if str(error) else ""
    raise UserError(
        f"{label}: this machine does not map a file of that size into memory ({text[:200]}): raise "
        "the limit of the job's memory (ulimit -v, SLURM's --mem) or allow overcommitment "
        "(vm.overcommit_memory=1), or save the model in parts (save_pretrained with max_shard_size)"
    ) from error


# ---------------------------------------------------------------- streamed


def _stream(
    path: Path,
    hf_config: Any,
    config: ModelConfig,
    mesh: Mesh,
    parallel: ParallelConfig,
    dtype: torch.dtype,
    quantization: dict[str, Any],
    after: AfterModule | None,
) -> tuple[Any, Sharding | None, list[str]]:
    """The model with this rank's slices, its sharding, and what is missing.

    The model is None where only transformers can load the checkpoint.
    """
    is_random = config.weights == "random"
    files = Files(path)
    if not files.names and mesh.tp.size == 1 and not is_random:
        return None, None, []
    causal_lm = _without_weights(path, hf_config, config, dtype)
    if is_random:
        files = RandomFiles(causal_lm, mesh.device)
    if config.quantization == "nf4":
        _require_held(hf_config, config, causal_lm)
    convertible = any(isinstance(module, Conv1D) for module in causal_lm.modules())
    if is_random and convertible:
        raise UserError(
            f"model.weights=random: the layers of {type(causal_lm).__name__} are converted when "
            "they are read, and there is nothing to read: give a model with weights"
        )
    parts = None if is_random else _parts(causal_lm, files)
    names = {name for name, _ in causal_lm.named_parameters()}
    unknown = names - (files.names if parts is None else parts.keys())
    if mesh.tp.size == 1 and (convertible or unknown - causal_lm.all_tied_weights_keys.keys()):
        return None, None, []
    sharding = None
    if mesh.tp.size > 1:
        _require_own_names(causal_lm, files, unknown, convertible=convertible)
        layout = layout_of(causal_lm, mesh.tp.size, in_blocks=config.quantization == "nf4")
        why = why_not_by_tokens(causal_lm, layout)
        by_tokens = _by_tokens(parallel, why)
        sharding = Sharding(layout, mesh.tp, sequence_parallel=by_tokens)
    quantizer = _quantizer(hf_config, quantization, mesh.device)
    if quantizer is not None:
        quantizer.preprocess_model(model=causal_lm, device_map={"": mesh.device}, dtype=dtype)
        hold_in_4_bits(causal_lm)
    if sharding is not None:
        sharding.narrow(causal_lm)
    loader = Loader(
        files=files,
        dtype=dtype,
        device=mesh.device,
        double=config.double_quantization,
        layout=sharding.layout if sharding else None,
        axis=mesh.tp,
        keep_fp32=frozenset(causal_lm._keep_in_fp32_modules_strict or ()),
        parts=parts,
    )
    if config.cache_quantized and config.quantization == "nf4":
        absent = quantized_cache.load(causal_lm, loader, path, mesh, after)
    else:
        absent = loader.load(causal_lm, after)
    causal_lm.tie_weights(missing_keys=absent, recompute_mapping=False)
    if quantizer is not None:
        quantizer.postprocess_model(causal_lm)
    causal_lm.eval()
    return causal_lm, sharding, sorted(absent)


def _parts(causal_lm: Any, files: Files) -> dict[str, Part] | None:
    """How the files make up a model with experts, by the model's names; None where they are it.

    Most checkpoints have experts one by one, and the model those of a layer in one tensor.
    """
    names = {name for name, _ in causal_lm.named_parameters()}
    if (
        not experts_of(causal_lm)
        or not names - files.names - causal_lm.all_tied_weights_keys.keys()
    ):
        return None
    try:
        parts = parts_of(causal_lm, files.shapes())
    except OtherNamesError:
        return None
    return {name: part for part in parts for name in part.names}


def _require_own_names(
    causal_lm: Any, files: Files, unknown: set[str], *, convertible: bool
) -> None:
    """Slices are read by the model's own names, from safetensors."""
    remedy = (
        "load it by transformers and save it by save_pretrained(FOLDER, save_original_format=False)"
    )
    label = f"parallel.tensor_parallel_degree: {type(causal_lm).__name__}"
    if not files.names:
        raise UserError(
            f"{label}: the folder has no safetensors, of which slices are read: {remedy}"
        )
    tied = causal_lm.all_tied_weights_keys  # target -> source; either may be in the files
    absent = sorted(unknown - tied.keys() - set(tied.values()))
    if absent or convertible:
        what = f"{len(absent)} tensors (first: {absent[0]})" if absent else "some tensors"
        raise UserError(
            f"{label}: {what} are not in its files as the model names and lays them out, so that "
            f"they are missing, or need a conversion: {remedy}"
        )


def require_layout(path: Path, config: ModelConfig, parallel: ParallelConfig) -> None:
    """Refuse a degree that the model cannot be spread over; no weights are read.

    Raises:
        UserError: see `layout_of` and `require_architecture`.
    """
    causal_lm = require_architecture(path, config)
    degree = parallel.tensor_parallel_degree
    layout = layout_of(causal_lm, degree, in_blocks=config.quantization == "nf4")
    _by_tokens(parallel, why_not_by_tokens(causal_lm, layout))


def require_architecture(path: Path, config: ModelConfig) -> Any:
    """The model without its weights.

    Raises:
        UserError: transformers does not know it, its own code cannot be had or may not be run, or
            it cannot be held as the recipe says.
    """
    with _failures_named(config, torch.device("cpu")):
        hf_config = transformers.AutoConfig.from_pretrained(
            path, trust_remote_code=config.trust_remote_code
        )
        _quantization(hf_config, config, torch.float32)
        causal_lm = _without_weights(path, hf_config, config, torch.float32)
        if config.quantization == "nf4":
            _require_held(hf_config, config, causal_lm)
        return causal_lm


def _by_tokens(parallel: ParallelConfig, why_not: str | None) -> bool:
    """Whether tokens are spread, too: refused only where it was asked for."""
    wanted = parallel.sequence_parallel
    if why_not is None or wanted is False:
        return bool(wanted)
    if wanted is True:
        raise UserError(f"parallel.sequence_parallel: {why_not}: set it to false, or leave it out")
    log.info("parallel.sequence_parallel is off: %s", why_not)
    return False


def _without_weights(path: Path, hf_config: Any, config: ModelConfig, dtype: torch.dtype) -> Any:
    """The architecture with every parameter on `meta`, and its buffers where they belong."""
    with accelerate.init_empty_weights(include_buffers=False), no_init_weights():
        causal_lm: Any = transformers.AutoModelForCausalLM.from_config(
            hf_config,
            dtype=dtype,
            attn_implementation=None if config.attention == "auto" else config.attention,
            trust_remote_code=config.trust_remote_code,
        )
    if (path / transformers.utils.GENERATION_CONFIG_NAME).is_file():
        causal_lm.generation_config = transformers.GenerationConfig.from_pretrained(path)
    return causal_lm


def _quantizer(hf_config: Any, quantization: dict[str, Any], device: torch.device) -> Any:
    """Transformers' own quantiser, which knows what stays out of 4 bits; None without one."""
    return get_hf_quantizer(
        hf_config, quantization.get("quantization_config"), {"": device}, True, {}
    )[0]


# ---------------------------------------------------------------- by transformers


def _by_transformers(
    path: Path,
    hf_config: Any,
    config: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    quantization: dict[str, Any],
) -> tuple[Any, list[str]]:
    load: Any = transformers.AutoModelForCausalLM.from_pretrained  # may return a pair
    causal_lm, loaded = load(
        path,
        config=hf_config,
        dtype=dtype,
        attn_implementation=None if config.attention == "auto" else config.attention,
        trust_remote_code=config.trust_remote_code,
        device_map={"": device},
        output_loading_info=True,
        **quantization,
    )
    absent = {*loaded["missing_keys"], *(key for key, *_ in loaded["mismatched_keys"])}
    return causal_lm, sorted(absent)


# ---------------------------------------------------------------- what it must be


def _quantization(hf_config: Any, config: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    """What to tell transformers of it; nothing where the checkpoint is in NF4 already.

    Raises:
        UserError: the checkpoint is quantised otherwise than the recipe says.
    """
    label = f"model.name_or_path={config.name_or_path}"
    own: Any = getattr(hf_config, "quantization_config", None)
    if own is None:
        if config.quantization == "none":
            return {}
        return {
            "quantization_config": transformers.BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=config.double_quantization,
                bnb_4bit_compute_dtype=dtype,
            )
        }
    own = own if isinstance(own, dict) else own.to_dict()
    if not (own.get("load_in_4bit") and own.get("bnb_4bit_quant_type") == "nf4"):
        bits = "8-bit " if own.get("load_in_8bit") else ""
        remedy = "give the unquantised model"
        if decoder := _DECODERS.get(str(own.get("quant_method"))):
            remedy += (
                f", or make it: AutoModelForCausalLM.from_pretrained(..., dtype='bfloat16', "
                f"quantization_config={decoder}(dequantize=True)).save_pretrained(FOLDER)"
            )
        raise UserError(
            f"{label}: its weights are quantised already ({bits}{own.get('quant_method')}), and "
            f"not to NF4: {remedy}"
        )
    if config.quantization != "nf4":
        raise UserError(f"{label}: its weights are in NF4 already: set model.quantization to nf4")
    double = bool(own.get("bnb_4bit_use_double_quant"))
    if double != config.double_quantization:
        raise UserError(
            f"{label}: its weights are in NF4 already, {'with' if double else 'without'} double "
            f"quantisation: set model.double_quantization to {str(double).lower()}"
        )
    return {}


_DECODERS = {"mxfp4": "Mxfp4Config", "fp8": "FineGrainedFP8Config"}  # as mixtures of experts come


def _require_held(hf_config: Any, config: ModelConfig, causal_lm: Any) -> None:
    """The experts of a 4-bit base must be ones that can be packed, and are not yet."""
    require_quantisable(causal_lm)
    if getattr(hf_config, "quantization_config", None) is not None and experts_of(causal_lm):
        raise UserError(
            f"model.name_or_path={config.name_or_path}: its experts are packed in 4 bits one by "
            "one, which this transformers cannot read: give the unquantised model"
        )


def _without_dropout(hf_config: Any) -> None:
    """The base is frozen: its own dropout would only part the policy from the reference."""
    for part in {id(part): part for part in (hf_config, hf_config.get_text_config())}.values():
        for name, value in list(vars(part).items()):
            if ("dropout" in name or "pdrop" in name) and isinstance(value, float):
                setattr(part, name, 0.0)


def _require_quantized(causal_lm: Any, num_layers: int, config: ModelConfig) -> None:
    """A 4-bit base must be one: some architectures have layers that bitsandbytes passes by."""
    name = type(causal_lm).__name__
    experts = experts_of(causal_lm)
    if left := [path for path, m in experts.items() if not isinstance(m, Experts4bit)]:
        raise UserError(
            f"model.name_or_path={config.name_or_path}: the experts of {name} ({left[0]}) would "
            "stay in 16 bits, since its files need a conversion that is not known here: load it by "
            "transformers and save it by save_pretrained(FOLDER, save_original_format=False)"
        )
    if num_layers == 0:
        raise UserError(
            f"{name}: none of its layers can be held in 4 bits: set model.quantization to none"
        )
    vocabulary = [causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings()]
    known = {id(p) for module in vocabulary if module is not None for p in module.parameters()}
    large = {
        key: p.numel() * p.element_size()
        for key, p in causal_lm.named_parameters()
        if p.dim() > 1 and p.is_floating_point() and id(p) not in known and not key.endswith("bias")
    }
    states = (getattr(p, "quant_state", None) for p in causal_lm.parameters())
    packed = sum(state.shape.numel() // 2 for state in states if state is not None)
    packed += sum(getattr(m, kind).nbytes for m in experts.values() for kind in matrices_of(m))
    if sum(large.values()) > 0.1 * packed:
        log.warning(
            "%s: %.2f GB in %d tensors are not held in 4 bits (first: %s), beside %.2f GB that are",
            name,
            sum(large.values()) / 1e9,
            len(large),
            next(iter(large)),
            packed / 1e9,
        )
