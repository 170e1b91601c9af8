"""Streamed weights are those that transformers loads, bit for bit; slices are those of the whole.

The ranks of a tensor-parallel axis are run here one after the other in this process.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import accelerate
import bitsandbytes as bnb
import bitsandbytes.functional as bnb_functional
import filelock
import pytest
import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.quantizers.auto import get_hf_quantizer

from moored.config import ModelConfig, ParallelConfig
from moored.models import loading, nf4, quantized_cache, weights
from moored.models.loading import load_base
from moored.models.tensor_parallel import Sharding, ShardLayout, Split, layout_of
from moored.models.weights import INDEX, SINGLE, Files, Loader, ShapeError
from moored.utils import atomic_dir
from moored.utils.errors import UserError
from tiny import ALONE, tiny_model

CPU = torch.device("cpu")
Q_PROJ = "model.layers.1.self_attn.q_proj"


def config_of(path: Path, **settings: object) -> ModelConfig:
    values = {"name_or_path": str(path), "dtype": "float32"} | settings
    return ModelConfig.model_validate(values)


def ours(path: Path, **settings: object) -> Any:
    return load_base(path, config_of(path, **settings), ALONE, ParallelConfig())[0]


def theirs(path: Path, dtype: torch.dtype = torch.float32, *, double: bool | None = None) -> Any:
    """By transformers alone; `double` quantises to NF4, with or without its own scales."""
    settings: dict[str, Any] = {}
    if double is not None:
        settings["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=double,
            bnb_4bit_compute_dtype=dtype,
        )
    return transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, device_map={"": "cpu"}, **settings
    )


def quantised_checkpoint(
    source: Path, folder: Path, *, double: bool, dtype: torch.dtype = torch.float32
) -> Path:
    theirs(source, dtype, double=double).save_pretrained(folder)
    assert f"{Q_PROJ}.weight.quant_map" in Files(folder).names
    return folder


def packed_layers(model: nn.Module) -> dict[str, Any]:
    return {p: m for p, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit)}


def dequantised(layer: Any) -> torch.Tensor:
    return bnb_functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)


def fp32_scales(state: Any) -> torch.Tensor:
    if not state.nested:
        return state.absmax
    return bnb_functional.dequantize_blockwise(state.absmax, state.state2) + state.offset


def require_equal(mine: torch.Tensor, other: torch.Tensor, name: str) -> None:
    assert (mine.dtype, mine.shape) == (other.dtype, other.shape), name
    assert not mine.is_meta, name
    assert torch.equal(mine, other), name


def require_same_base(mine: Any, other: Any) -> None:
    """Every parameter, quantisation state and buffer, and which of them are shared."""
    of_mine = dict(mine.named_parameters(remove_duplicate=False))
    of_other = dict(other.named_parameters(remove_duplicate=False))
    assert of_mine.keys() == of_other.keys()
    for name, parameter in of_other.items():
        require_equal(of_mine[name].data, parameter.data, name)
    shared = mine.get_input_embeddings().weight is mine.get_output_embeddings().weight
    assert shared == (other.get_input_embeddings().weight is other.get_output_embeddings().weight)
    of_mine, of_other = packed_layers(mine), packed_layers(other)
    assert of_mine.keys() == of_other.keys()
    for path, layer in of_other.items():
        require_same_state(of_mine[path], layer, path)
        require_equal(dequantised(of_mine[path]), dequantised(layer), path)
    of_mine, of_other = dict(mine.named_buffers()), dict(other.named_buffers())
    assert of_mine.keys() == of_other.keys()
    for name, buffer in of_other.items():
        require_equal(of_mine[name], buffer, name)
    assert mine.state_dict().keys() == other.state_dict().keys()


def require_same_state(mine: Any, other: Any, path: str) -> None:
    first, second = mine.weight.quant_state, other.weight.quant_state
    assert mine.quant_state is first, path
    assert first.nested == second.nested == mine.weight.compress_statistics, path
    if second.nested:
        require_equal(first.offset, second.offset, path)
    first, second = first.as_dict(packed=True), second.as_dict(packed=True)
    assert first.keys() == second.keys()
    for key, tensor in second.items():
        require_equal(first[key], tensor, f"{path}.{key}")


@pytest.fixture
def streamed(monkeypatch):
    """Whatever is loaded has not come by transformers."""

    def refuse(*_: object) -> None:
        raise AssertionError("transformers was asked to load the weights")

    monkeypatch.setattr(loading, "_by_transformers", refuse)


@pytest.fixture
def by_transformers(monkeypatch) -> list[Path]:
    """The folders that transformers was asked to load."""
    asked: list[Path] = []
    load = loading._by_transformers

    def counted(path: Path, *args: Any) -> Any:
        asked.append(path)
        return load(path, *args)

    monkeypatch.setattr(loading, "_by_transformers", counted)
    return asked


# ---------------------------------------------------------------- the whole model


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("double", [True, False, None], ids=["double", "single", "none"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_streamed_weights_are_those_of_transformers(tmp_path, streamed, tied, double, dtype):
    path = tiny_model(tmp_path, tie_word_embeddings=tied)
    mine = ours(
        path,
        dtype=dtype,
        quantization="none" if double is None else "nf4",
        double_quantization=bool(double),
    )
    other = theirs(path, getattr(torch, dtype), double=double)
    assert len(packed_layers(mine)) == (0 if double is None else 14)
    require_same_base(mine, other)
    assert not any(parameter.requires_grad for parameter in mine.parameters())
    assert not mine.training


@pytest.mark.parametrize("sharded", [True, False], ids=["sharded", "single file"])
@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize(
    ("architecture", "holds"),
    [
        ("qwen2", f"{Q_PROJ}.bias"),
        ("qwen3", "model.layers.0.self_attn.k_norm.weight"),
        ("gemma2", "model.layers.0.pre_feedforward_layernorm.weight"),
    ],
)
def test_biases_norms_and_shards_come_along(
    tmp_path, streamed, architecture, holds, quantization, sharded
):
    path = with_values_everywhere(tiny_model(tmp_path / "saved", architecture))
    if sharded:
        whole = transformers.AutoModelForCausalLM.from_pretrained(path)
        path = tmp_path / "sharded"
        whole.save_pretrained(path, max_shard_size="50KB")
        assert len(list(path.glob("*.safetensors"))) > 2
        assert (path / INDEX).is_file()
    mine = ours(path, quantization=quantization)
    require_same_base(mine, theirs(path, double=True if quantization == "nf4" else None))
    assert mine.get_parameter(holds).any()


def with_values_everywhere(path: Path) -> Path:
    """Biases and norms that tell themselves apart: new ones are all 0, or all 1."""
    state = load_file(path / SINGLE)
    generator = torch.Generator().manual_seed(1)
    for name, tensor in state.items():
        if tensor.dim() == 1:
            state[name] = torch.randn(tensor.shape, generator=generator)
    save_file(state, path / SINGLE, metadata={"format": "pt"})
    return path


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_a_checkpoint_of_another_dtype_is_cast_before_it_is_quantised(
    tmp_path, streamed, quantization, stored
):
    path = tiny_model(tmp_path)
    state = {name: t.to(stored) for name, t in load_file(path / SINGLE).items()}
    save_file(state, path / SINGLE, metadata={"format": "pt"})
    double = True if quantization == "nf4" else None
    for name in ("float32", "bfloat16"):
        mine = ours(path, dtype=name, quantization=quantization)
        require_same_base(mine, theirs(path, getattr(torch, name), double=double))


def test_buffers_without_dimensions_come_along(tmp_path, streamed):
    apertus = transformers.ApertusConfig(
        vocab_size=259,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    transformers.AutoModelForCausalLM.from_config(apertus).save_pretrained(tmp_path)
    name = "model.layers.0.mlp.act_fn.beta"
    changed(tmp_path, lambda state: state.update({name: torch.tensor(0.25)}))
    mine = ours(tmp_path, dtype="bfloat16")
    require_same_base(mine, theirs(tmp_path, torch.bfloat16, double=True))
    assert mine.get_buffer(name) == 0.25


def test_rotary_frequencies_stay_fp32_in_a_bf16_model(tmp_path, streamed):
    path = tiny_model(tmp_path, rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    mine = ours(path, dtype="bfloat16")
    expected = 500.0 ** (-torch.arange(0, 16, 2, dtype=torch.float64) / 16)
    inv_freq = dict(mine.named_buffers())["model.rotary_emb.inv_freq"]
    assert inv_freq.dtype == torch.float32
    torch.testing.assert_close(inv_freq.double(), expected, rtol=4 * 2**-23, atol=0)


@pytest.mark.parametrize("by_hand", [True, False], ids=["its own file", "of the config"])
def test_the_generation_config_is_kept(tmp_path, streamed, by_hand):
    path = tiny_model(tmp_path)
    if by_hand:
        transformers.GenerationConfig(
            do_sample=True, temperature=0.625, top_k=7, eos_token_id=[1, 2]
        ).save_pretrained(path)
    else:
        (path / "generation_config.json").unlink()
    mine, other = ours(path).generation_config, theirs(path, double=True).generation_config
    if by_hand:
        assert mine.to_dict() == other.to_dict()
        assert (mine.temperature, mine.top_k, mine.eos_token_id) == (0.625, 7, [1, 2])
    for name in ("do_sample", "eos_token_id", "pad_token_id", "bos_token_id", "max_length"):
        assert getattr(mine, name) == getattr(other, name), name


def test_what_peft_and_transformers_ask_of_a_quantised_model_is_there(tmp_path, streamed):
    path = tiny_model(tmp_path)
    mine, other = ours(path), theirs(path, double=True)
    for name in ("is_loaded_in_4bit", "is_quantized", "quantization_method", "name_or_path"):
        assert getattr(mine, name) == getattr(other, name), name
    assert mine.config.quantization_config.to_dict() == other.config.quantization_config.to_dict()
    assert mine.config.dtype == other.config.dtype
    assert mine.config._attn_implementation == other.config._attn_implementation


@pytest.mark.parametrize("same", [True, False], ids=["equal", "different"])
def test_a_tied_config_whose_checkpoint_has_a_head_is_loaded_like_transformers(tmp_path, same):
    path = tiny_model(tmp_path, tie_word_embeddings=True)
    state = load_file(path / SINGLE)
    head = state["model.embed_tokens.weight"].clone()
    state["lm_head.weight"] = head if same else head.flip(0).contiguous()
    save_file(state, path / SINGLE, metadata={"format": "pt"})
    require_same_base(ours(path, quantization="none"), theirs(path))


# ---------------------------------------------------------------- in NF4 already


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
def test_a_checkpoint_in_nf4_is_streamed_as_it_lies_there(tmp_path, streamed, double, dtype):
    source = tiny_model(tmp_path / "source", tie_word_embeddings=False)
    of = getattr(torch, dtype)
    path = quantised_checkpoint(source, tmp_path / "nf4", double=double, dtype=of)
    mine = ours(path, double_quantization=double, dtype=dtype)
    require_same_base(mine, theirs(path, of))
    require_same_base(mine, ours(source, double_quantization=double, dtype=dtype))
    stored = load_file(path / SINGLE)
    assert torch.equal(packed_layers(mine)[Q_PROJ].weight.data, stored[f"{Q_PROJ}.weight"])


def test_what_is_not_packed_in_a_checkpoint_in_nf4_is_cast_to_the_dtype_of_the_recipe(
    tmp_path, streamed
):
    """Transformers leaves it as it is stored."""
    source = tiny_model(tmp_path / "source", "qwen2")
    path = quantised_checkpoint(with_values_everywhere(source), tmp_path / "nf4", double=True)
    mine, other = ours(path, dtype="bfloat16"), theirs(path)
    for name, parameter in other.named_parameters():
        expected = parameter.data
        if expected.is_floating_point():
            expected = expected.bfloat16()
        require_equal(mine.get_parameter(name).data, expected, name)
    for layer, like in zip(
        packed_layers(mine).values(), packed_layers(other).values(), strict=True
    ):
        require_equal(layer.dequantized(torch.float32), dequantised(like), "a packed weight")


# ---------------------------------------------------------------- by transformers


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_a_checkpoint_without_safetensors_goes_by_transformers(
    tmp_path, by_transformers, quantization
):
    path = tiny_model(tmp_path / "bin")
    kept = shutil.copytree(path, tmp_path / "safetensors")
    torch.save(load_file(path / SINGLE), path / "pytorch_model.bin")
    (path / SINGLE).unlink()
    mine = ours(path, quantization=quantization)
    assert by_transformers == [path]
    require_same_base(mine, ours(kept, quantization=quantization))
    assert by_transformers == [path]


def test_gpt2_goes_by_transformers(tmp_path, by_transformers):
    gpt2 = transformers.GPT2Config(vocab_size=259, n_embd=64, n_layer=1, n_head=4, n_positions=64)
    transformers.AutoModelForCausalLM.from_config(gpt2).save_pretrained(tmp_path)
    mine = ours(tmp_path)
    assert by_transformers == [tmp_path]
    assert packed_layers(mine)
    require_same_base(mine, theirs(tmp_path, double=True))


# ---------------------------------------------------------------- in pieces


@pytest.mark.parametrize("shape", [(64, 64), (96, 128), (7, 33), (5, 100), (130, 3), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantising_in_pieces_of_any_size_equals_one_piece(shape, dtype):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    packed, state = bnb_functional.quantize_4bit(
        weight.to(dtype), blocksize=64, quant_type="nf4", compress_statistics=False
    )
    for elements in (1, 63, 64, 200, 1000, 5000, 10**6):
        ranges = list(nf4.rows_of(shape, elements))
        assert [a for a, _ in ranges] == [0, *(b for _, b in ranges[:-1])]
        assert ranges[-1][1] == shape[0]
        pieces = (weight[a:b] for a, b in ranges)
        codes = nf4.quantize(pieces, shape, dtype, CPU)
        require_equal(codes.packed, packed, f"codes at {elements}")
        require_equal(codes.scales, state.absmax, f"scales at {elements}")
    assert len(list(nf4.rows_of((64, 64), 1))) == 64


@pytest.mark.parametrize("rows", [31, 33])
def test_pieces_that_do_not_fill_the_shape_are_an_error(rows):
    with pytest.raises((ValueError, RuntimeError), match=r"elements|size"):
        nf4.quantize(iter([torch.ones(rows, 64)]), (32, 64), torch.float32, CPU)


@pytest.mark.parametrize("piece", [1, 300])
def test_the_loader_quantises_in_pieces(tmp_path, streamed, monkeypatch, piece):
    path = tiny_model(tmp_path)
    whole = ours(path)
    rows: list[int] = []
    quantize = nf4.quantize

    def counted(pieces: Iterator[torch.Tensor], *args: Any) -> Any:
        pieces = list(pieces)
        rows.extend(len(piece) for piece in pieces)
        return quantize(iter(pieces), *args)

    monkeypatch.setattr(nf4, "quantize", counted)
    monkeypatch.setattr(weights, "PIECE", {"cpu": piece})
    require_same_base(ours(path), whole)
    assert max(rows) == {1: 1, 300: 4}[piece]


# ---------------------------------------------------------------- slices


@dataclasses.dataclass
class FakeAxis:
    """One rank of an axis whose ranks run one after the other, each twice.

    At first `concatenate` notes each rank's part, and gives zeros; then it joins what was noted.
    """

    rank: int
    size: int
    noted: list[list[tuple[torch.Tensor, int, tuple[int, ...]]]]
    joined: bool = False
    calls: int = 0

    def concatenate(self, part: torch.Tensor, dim: int, sizes: Sequence[int]) -> torch.Tensor:
        if not self.joined:
            self.noted[self.rank].append((part, dim, tuple(sizes)))
            shape = list(part.shape)
            shape[dim] = sum(sizes)
            return part.new_zeros(shape)
        same = [parts[self.calls] for parts in self.noted]
        assert torch.equal(same[self.rank][0], part), "the ranks must not depend on what they get"
        assert {(d, s) for _, d, s in same} == {(dim, tuple(sizes))}
        assert tuple(p.shape[dim] for p, *_ in same) == tuple(sizes)
        self.calls += 1
        return torch.cat([p for p, *_ in same], dim)

    def gather(self, value: Any) -> list[Any]:
        return [value] * self.size


def on_every_rank(degree: int, load: Callable[[Any], Any]) -> list[Any]:
    noted: list[list[Any]] = [[] for _ in range(degree)]
    for rank in range(degree):
        load(FakeAxis(rank, degree, noted))
    assert len({len(parts) for parts in noted}) == 1, "a rank would wait for ever"
    axes = [FakeAxis(rank, degree, noted, joined=True) for rank in range(degree)]
    models = [load(axis) for axis in axes]
    assert len({axis.calls for axis in axes}) == 1, "a rank would wait for ever"
    return models


def shares(
    path: Path,
    degree: int,
    *,
    double: bool = True,
    dtype: torch.dtype = torch.float32,
    load: Callable[[Any, Loader, Any], set[str]] | None = None,
) -> tuple[list[Any], ShardLayout]:
    """Each rank's share of the model in a folder, filled by a `Loader`; and the layout."""
    layouts: list[ShardLayout] = []

    def of_rank(axis: Any) -> Any:
        hf_config = transformers.AutoConfig.from_pretrained(path)
        quantization = None
        if getattr(hf_config, "quantization_config", None) is None:
            quantization = transformers.BitsAndBytesConfig(load_in_4bit=True)
        with accelerate.init_empty_weights(include_buffers=False):
            model = transformers.AutoModelForCausalLM.from_config(hf_config, dtype=dtype)
        layouts.append(layout_of(model, degree, in_blocks=True))
        quantizer = get_hf_quantizer(hf_config, quantization, {"": CPU}, True, {})[0]
        quantizer.preprocess_model(model=model, device_map={"": CPU}, dtype=dtype)
        Sharding(layouts[0], axis).narrow(model)
        loader = Loader(
            files=Files(path),
            dtype=dtype,
            device=CPU,
            double=double,
            layout=layouts[0],
            axis=axis,
        )
        absent = load(model, loader, axis) if load else loader.load(model)
        assert absent <= model.all_tied_weights_keys.keys()
        return model

    return on_every_rank(degree, of_rank), layouts[0]


def slice_of(whole: torch.Tensor, split: Split | None, rank: int) -> torch.Tensor:
    if split is None:
        return whole
    start, stop = split.range_of(rank)
    return whole.narrow(split.dim, start, stop - start)


def codes_of(layer: Any) -> torch.Tensor:
    """One code an element, [out_features, in_features]."""
    packed = layer.weight.data.view(-1)
    codes = torch.stack([packed >> 4, packed & 15], dim=1)
    return codes.view(tuple(layer.weight.quant_state.shape))


def by_block(layer: Any) -> torch.Tensor:
    """Each element's scale, [out_features, in_features]."""
    scales = fp32_scales(layer.weight.quant_state)
    return scales.repeat_interleave(64).view(tuple(layer.weight.quant_state.shape))


def require_slices(models: list[Any], layout: ShardLayout, whole: Any) -> None:
    of_whole = packed_layers(whole)
    assert set(of_whole) == set(layout.layers) - {"model.embed_tokens", "lm_head"}
    for rank, model in enumerate(models):
        for path, layer in packed_layers(model).items():
            split = layout.layers[path].split
            require_equal(codes_of(layer), slice_of(codes_of(of_whole[path]), split, rank), path)
            expected = slice_of(dequantised(of_whole[path]), split, rank)
            expected = expected.to(layer.weight.quant_state.dtype)
            assert layer.weight.quant_state.shape == (layer.out_features, layer.in_features)
            assert layer.weight.shape == (expected.numel() // 2, 1)
            require_equal(by_block(layer), slice_of(by_block(of_whole[path]), split, rank), path)
            require_equal(dequantised(layer), expected, path)
        require_plain_slices(model, rank, layout, whole)


def require_plain_slices(model: Any, rank: int, layout: ShardLayout, whole: Any) -> None:
    of_whole = dict(whole.named_parameters(remove_duplicate=False))
    packed = {f"{path}.weight" for path in packed_layers(whole)}
    tied = {} if whole.config.tie_word_embeddings is False else whole.all_tied_weights_keys
    row_biases = {
        f"{path}.bias" for path, layer in layout.layers.items() if layer.split.dim == 1 and rank
    }
    names = dict(model.named_parameters(remove_duplicate=False)).keys()
    assert names == of_whole.keys() - row_biases
    for name in names - packed - set(tied):
        expected = slice_of(of_whole[name], layout.of_parameter(name), rank)
        mine = model.get_parameter(name).data
        require_equal(mine, expected.data.to(mine.dtype), name)
        assert mine.dtype == model.dtype


def uneven_llama(folder: Path, **settings: object) -> Path:
    """Three key/value heads and five blocks of columns over two ranks; 259 rows of vocabulary."""
    sizes = {
        "hidden_size": 192,
        "intermediate_size": 320,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "num_hidden_layers": 2,
        "tie_word_embeddings": False,
    }
    return tiny_model(folder, **(sizes | settings))


@pytest.mark.parametrize("degree", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slices_with_whole_scales_are_those_of_the_double_quantised_whole(tmp_path, dtype, degree):
    path = uneven_llama(tmp_path)
    models, layout = shares(path, degree, dtype=dtype)
    assert len(set(layout.layers["model.layers.0.mlp.down_proj"].split.sizes)) == 2
    require_slices(models, layout, theirs(path, dtype, double=True))
    for layer in packed_layers(models[0]).values():
        assert not layer.weight.quant_state.nested
        scales = layer.weight.quant_state.absmax
        assert scales.dtype == torch.float32
        assert scales.untyped_storage().nbytes() == scales.nbytes, "a view keeps the whole alive"
        assert layer.weight.quant_state.dtype == dtype


def test_slices_without_double_quantisation_need_no_other_rank(tmp_path):
    path = uneven_llama(tmp_path)
    asked: list[Any] = []

    def load(model: Any, loader: Loader, axis: Any) -> set[str]:
        absent = loader.load(model)
        asked.extend(axis.noted)
        return absent

    models, layout = shares(path, 2, double=False, load=load)
    require_slices(models, layout, theirs(path, double=False))
    assert not any(asked)


@pytest.mark.parametrize("stored", [True, False], ids=["double", "single"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slices_are_cut_from_a_checkpoint_in_nf4(tmp_path, stored, dtype):
    path = quantised_checkpoint(uneven_llama(tmp_path / "source"), tmp_path / "nf4", double=stored)
    models, layout = shares(path, 2, double=stored, dtype=dtype)
    for layer in packed_layers(models[0]).values():
        assert layer.weight.quant_state.dtype == dtype
        scales = layer.weight.quant_state.absmax
        assert scales.untyped_storage().nbytes() == scales.nbytes, "a view keeps the whole alive"
    require_slices(models, layout, theirs(path))


def test_biases_of_rows_are_cut_and_those_of_columns_lie_on_the_first_rank(tmp_path):
    path = uneven_llama(tmp_path, attention_bias=True, mlp_bias=True)
    path = with_values_everywhere(path)
    models, layout = shares(path, 2)
    require_slices(models, layout, theirs(path, double=True))
    down = [model.model.layers[0].mlp.down_proj for model in models]
    assert down[0].bias.any()
    assert down[1].bias is None


@pytest.mark.parametrize(
    "config",
    [
        transformers.Phi3Config(
            vocab_size=259,
            hidden_size=128,
            intermediate_size=320,
            num_hidden_layers=1,
            num_attention_heads=8,
            num_key_value_heads=4,
            pad_token_id=0,
        ),
        transformers.Olmo2Config(
            vocab_size=259,
            hidden_size=192,
            intermediate_size=320,
            num_hidden_layers=1,
            num_attention_heads=6,
            num_key_value_heads=3,
            pad_token_id=0,
        ),
    ],
    ids=["phi3", "olmo2"],
)
def test_slices_of_gathered_and_split_layers_are_those_of_the_whole(tmp_path, config):
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    models, layout = shares(tmp_path, 2)
    assert {layer.style for layer in layout.layers.values()} >= {"gathered", "split"}
    require_slices(models, layout, theirs(tmp_path, double=True))


def test_slices_of_tied_embeddings_leave_the_head_to_be_tied(tmp_path):
    path = uneven_llama(tmp_path, tie_word_embeddings=True)
    models, layout = shares(path, 2)
    require_slices(models, layout, theirs(path, double=True))
    assert [len(model.model.embed_tokens.weight) for model in models] == [
        *layout.layers["model.embed_tokens"].split.sizes
    ]


# ---------------------------------------------------------------- errors


def changed(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    state = load_file(path / SINGLE)
    change(state)
    save_file(state, path / SINGLE, metadata={"format": "pt"})
    return path


def refused(path: Path, **settings: object) -> str:
    with pytest.raises(UserError) as caught:
        ours(path, **settings)
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith(f"model.name_or_path={path}: ")
    return text


@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize("name", [f"{Q_PROJ}.weight", "model.norm.weight"])
def test_a_wrong_shape_names_the_tensor_and_both_shapes(tmp_path, streamed, quantization, name):
    path = tiny_model(tmp_path)
    right = list(load_file(path / SINGLE)[name].shape)
    wrong = [8, *right[1:]]
    changed(path, lambda state: state.update({name: torch.zeros(wrong)}))
    text = refused(path, quantization=quantization)
    assert f"{name} has shape {wrong}, but config.json says {right}" in text
    assert "download the model again" in text


def test_a_wrong_shape_of_a_checkpoint_in_nf4_names_the_tensor(tmp_path, streamed):
    path = quantised_checkpoint(tiny_model(tmp_path / "source"), tmp_path / "nf4", double=True)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"intermediate_size": 192}))
    text = refused(path)
    assert ".mlp.gate_proj.weight has shape [128, 64], but config.json says [192, 64]" in text


def test_a_slice_checks_the_shape_of_the_whole(tmp_path):
    path = uneven_llama(tmp_path)
    name = "model.layers.0.mlp.down_proj.weight"
    changed(path, lambda state: state.update({name: torch.zeros(192, 256)}))
    with pytest.raises(ShapeError, match=r"down_proj.*\[192, 256\].*says \[192, 320\]"):
        shares(path, 2)


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_a_missing_tensor_is_named(tmp_path, quantization):
    path = changed(tiny_model(tmp_path), lambda state: state.pop(f"{Q_PROJ}.weight"))
    text = refused(path, quantization=quantization)
    assert f"1 tensors are missing from its weights (first: {Q_PROJ}.weight)" in text


def sharded(folder: Path) -> Path:
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model(folder / "single"))
    model.save_pretrained(folder / "sharded", max_shard_size="50KB")
    return folder / "sharded"


def test_a_shard_that_is_not_there_is_named(tmp_path):
    path = sharded(tmp_path)
    gone = json.loads((path / INDEX).read_text())["weight_map"][f"{Q_PROJ}.weight"]
    (path / gone).unlink()
    text = refused(path)
    assert f"{gone} is missing, which should hold model." in text


@pytest.mark.parametrize("kept", [0, 4, 200, -1])
def test_truncated_safetensors_are_one_line(tmp_path, kept):
    path = tiny_model(tmp_path)
    whole = (path / SINGLE).read_bytes()
    (path / SINGLE).write_bytes(whole[:kept])
    assert "download the model again" in refused(path)


def test_a_truncated_shard_is_one_line(tmp_path):
    path = sharded(tmp_path)
    shard = path / json.loads((path / INDEX).read_text())["weight_map"][f"{Q_PROJ}.weight"]
    shard.write_bytes(shard.read_bytes()[:-1])
    assert "download the model again" in refused(path)


# ---------------------------------------------------------------- the cache of what was quantised


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("MOORED_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "quantized"


def folders_in(cache: Path) -> list[Path]:
    return sorted(path for path in cache.iterdir() if path.is_dir())


def ruin(path: Path) -> None:
    """Turn every weight into zeros, at the same size and time."""
    file = path / SINGLE
    before = file.stat()
    with safe_open(file, framework="pt") as stored:
        assert stored.keys()
    content = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    content[start:] = bytes(len(content) - start)
    file.write_bytes(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)


@pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_second_load_reads_nothing_but_the_cache(
    tmp_path, streamed, cache, architecture, double, dtype
):
    tied = architecture == "gemma2"
    path = tiny_model(tmp_path / "model", architecture, tie_word_embeddings=tied)
    with_values_everywhere(path)
    settings = {"double_quantization": double, "dtype": dtype}
    whole = ours(path, **settings)
    assert not cache.exists(), "it is not asked for"
    first = ours(path, **settings, cache_quantized=True)
    (folder,) = folders_in(cache)
    ruin(path)
    second = ours(path, **settings, cache_quantized=True)
    require_same_base(first, whole)
    require_same_base(second, whole)
    assert folders_in(cache) == [folder]


def test_a_second_load_quantises_nothing(tmp_path, streamed, cache, monkeypatch):
    path = tiny_model(tmp_path / "model")
    first = ours(path, cache_quantized=True)

    def refuse(*_: object) -> None:
        raise AssertionError("it quantised again")

    monkeypatch.setattr(nf4, "quantize", refuse)
    require_same_base(ours(path, cache_quantized=True), first)
    with pytest.raises(AssertionError, match="quantised again"):
        ours(path)


def test_the_cache_is_written_in_files_of_bounded_size(tmp_path, streamed, cache, monkeypatch):
    monkeypatch.setattr(quantized_cache, "FILE_BYTES", 20_000)
    path = tiny_model(tmp_path / "model")
    first = ours(path, cache_quantized=True)
    (folder,) = folders_in(cache)
    assert len(list(folder.glob("*.safetensors"))) > 3
    ruin(path)
    require_same_base(ours(path, cache_quantized=True), first)


def test_a_flipped_byte_in_the_cache_is_noticed_and_it_is_made_again(
    tmp_path, streamed, cache, caplog
):
    path = tiny_model(tmp_path / "model")
    first = ours(path, cache_quantized=True)
    (folder,) = folders_in(cache)
    (file,) = folder.glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)
    assert atomic_dir.verify(folder) is not None
    require_same_base(ours(path, cache_quantized=True), first)
    assert "other content than was written" in caplog.text
    assert folders_in(cache) == [folder]
    assert atomic_dir.verify(folder) is None
    ruin(path)
    require_same_base(ours(path, cache_quantized=True), first)


def test_a_source_of_another_time_is_cached_apart(tmp_path, streamed, cache):
    path = tiny_model(tmp_path / "model")
    ours(path, cache_quantized=True)
    (folder,) = folders_in(cache)
    changed(path, lambda state: state[f"{Q_PROJ}.weight"].neg_())
    later = (path / SINGLE).stat().st_mtime_ns + 10**9
    os.utime(path / SINGLE, ns=(later, later))
    require_same_base(ours(path, cache_quantized=True), ours(path))
    assert len(folders_in(cache)) == 2
    assert folder in folders_in(cache)


@pytest.mark.parametrize("settings", [{"double_quantization": False}, {"dtype": "bfloat16"}])
def test_what_is_quantised_otherwise_is_cached_apart(tmp_path, streamed, cache, settings):
    path = tiny_model(tmp_path / "model")
    ours(path, cache_quantized=True)
    require_same_base(ours(path, cache_quantized=True, **settings), ours(path, **settings))
    assert len(folders_in(cache)) == 2


def test_a_checkpoint_in_nf4_is_cached_like_another(tmp_path, streamed, cache):
    path = quantised_checkpoint(tiny_model(tmp_path / "source"), tmp_path / "nf4", double=True)
    first = ours(path, cache_quantized=True)
    ruin(path)
    require_same_base(ours(path, cache_quantized=True), first)


def cached(path: Path) -> Callable[[Any, Loader, Any], set[str]]:
    """By the cache, once every rank's part is known: else zeros would be written there."""

    def load(model: Any, loader: Loader, axis: Any) -> set[str]:
        if not axis.joined:
            return loader.load(model)
        return quantized_cache.load(
            model, loader, path, SimpleNamespace(tp=axis, first_on_machine=True)
        )

    return load


def require_same_shares(mine: list[Any], other: list[Any]) -> None:
    for model, like in zip(mine, other, strict=True):
        parameters = dict(model.named_parameters())
        assert parameters.keys() == dict(like.named_parameters()).keys()
        for name, parameter in like.named_parameters():
            require_equal(parameters[name].data, parameter.data, name)
        for path, layer in packed_layers(like).items():
            require_same_state(packed_layers(model)[path], layer, path)


def test_each_rank_caches_its_own_slices(tmp_path, cache):
    path = with_values_everywhere(uneven_llama(tmp_path / "model"))
    plain, _ = shares(path, 2)
    written, _ = shares(path, 2, load=cached(path))
    assert {folder.name[-7:] for folder in folders_in(cache)} == {"-0-of-2", "-1-of-2"}
    ruin(path)
    read, _ = shares(path, 2, load=cached(path))
    require_same_shares(written, plain)
    require_same_shares(read, plain)
    assert len(folders_in(cache)) == 2


def test_slices_of_biases_are_read_from_the_cache(tmp_path, cache):
    path = uneven_llama(tmp_path / "model", attention_bias=True, mlp_bias=True)
    with_values_everywhere(path)
    plain, _ = shares(path, 2)
    for _ in range(2):
        mine, _ = shares(path, 2, load=cached(path))
        require_same_shares(mine, plain)


def test_a_rank_without_its_cache_has_every_rank_quantise_again(tmp_path, cache, monkeypatch):
    """Else it would wait for the scales of the others."""
    path = uneven_llama(tmp_path / "model")
    plain, _ = shares(path, 2, load=cached(path))
    monkeypatch.setattr(FakeAxis, "gather", lambda _, value: [value, False])
    joined: list[int] = []

    def counted(model: Any, loader: Loader, axis: Any) -> set[str]:
        absent = cached(path)(model, loader, axis)
        joined.append(axis.calls)
        return absent

    again, _ = shares(path, 2, load=counted)
    assert joined == [0, 0, 14, 14]
    require_same_shares(again, plain)


def load_cached(path: Path) -> None:
    config = ModelConfig(name_or_path=str(path), cache_quantized=True)
    load_base(path, config, ALONE, ParallelConfig())


def test_what_a_killed_writer_left_in_the_cache_is_removed(tmp_path, cache):
    path = tiny_model(tmp_path / "model")
    load_cached(path)
    [folder] = cache.glob("model-*")
    left = folder.with_name(f".{folder.name}.killed.tmp")
    left.mkdir()
    shutil.rmtree(folder)
    load_cached(path)
    assert folder.is_dir()
    assert not left.exists()


def test_a_cache_that_another_process_writes_is_not_waited_for(tmp_path, cache):
    path = tiny_model(tmp_path / "model")
    load_cached(path)
    [folder] = cache.glob("model-*")
    shutil.rmtree(folder)
    with filelock.FileLock(folder.with_name(f".{folder.name}.lock")):
        load_cached(path)
    assert not folder.exists()


def test_a_cache_that_cannot_be_written_costs_a_warning(tmp_path, cache, caplog, monkeypatch):
    path = tiny_model(tmp_path / "model")

    def full(*_: object, **__: object) -> None:
        raise SafetensorError("No space left on device (os error 28)")

    monkeypatch.setattr(quantized_cache, "save_file", full)
    load_cached(path)
    assert "the quantised weights are not kept" in caplog.text
    assert not list(cache.glob("model-*"))
    assert not list(cache.glob(".*.tmp"))


# ---------------------------------------------------------------- files that cannot be mapped


@pytest.mark.parametrize("kind", list(weights._KINDS.values()), ids=str)
def test_what_is_read_by_place_is_what_is_mapped(tmp_path, kind):
    values = torch.arange(5 * 6 * 2).remainder(100)
    stored = {
        "cube": values.view(5, 6, 2).to(kind),
        "row": values[:7].clone().to(kind),
        "one": values[3].clone().to(kind),
        "none": torch.empty(0, 4, dtype=kind),
    }
    path = tmp_path / "model.safetensors"
    save_file(stored, path)
    cuts = (slice(None), slice(1, 3), slice(4, 4), slice(0, 9), (slice(None), slice(1, 2)))
    cuts = (*cuts, (slice(2, 4), slice(1, 3)), ...)
    with safe_open(path, framework="pt") as mapped, weights._ReadByPlace(path) as read:
        assert sorted(read.keys()) == sorted(mapped.keys())
        for name in stored:
            expected, found = mapped.get_slice(name), read.get_slice(name)
            assert found.get_shape() == expected.get_shape()
            assert found.get_dtype() == expected.get_dtype()
            for cut in cuts:
                if name == "one" and cut is not ...:
                    continue
                if name == "row" and isinstance(cut, tuple):
                    continue
                exact = stored[name][cut]
                assert found[cut].shape == exact.shape, (name, cut)
                bits = [x.reshape(-1).view(torch.uint8) for x in (found[cut], exact)]
                assert torch.equal(*bits), (name, cut)


@pytest.mark.parametrize(
    "broken",
    [
        lambda data: data[:-1],
        lambda data: data + b"x",
        lambda data: data[:5],
        lambda data: b"\xff" * 8 + data[8:],
        lambda data: data[:8] + b"[" + data[9:],
        lambda data: data.replace(b"[3,4]", b"[3,5]"),
        lambda data: data.replace(b'"F32"', b'"F99"'),
    ],
)
def test_a_broken_file_is_not_read_by_place(tmp_path, broken):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(3, 4)}, path)
    data = path.read_bytes()
    assert data != broken(data)
    path.write_bytes(broken(data))
    with pytest.raises(OSError, match=r"header"):
        weights._ReadByPlace(path)


def test_a_file_that_ends_while_it_is_read_is_said(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(3, 4)}, path)
    with weights._ReadByPlace(path) as read:
        os.truncate(path, path.stat().st_size - 8)
        with pytest.raises(OSError, match="8 too early"):
            read.get_slice("a")[:]
