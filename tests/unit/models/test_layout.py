"""Who holds which rows and columns, for the shapes of real models: nothing here is downloaded."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import accelerate
import pytest
import transformers
from torch import nn

from moored.models.tensor_parallel import (
    NF4_BLOCK,
    Sharded,
    ShardLayout,
    Split,
    layout_of,
    why_not_by_tokens,
)
from moored.utils.errors import UserError

LLAMA_70B = {
    "vocab_size": 128256,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
}
QWEN_72B = LLAMA_70B | {"vocab_size": 152064, "intermediate_size": 29568}
SMOLLM2 = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
}
SMALL = {
    "vocab_size": 259,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "pad_token_id": 0,
}
ATTENTION, MLP = "model.layers.0.self_attn", "model.layers.0.mlp"


def skeleton(config: type[transformers.PretrainedConfig], sizes: dict, **changes: object):
    with accelerate.init_empty_weights():
        return transformers.AutoModelForCausalLM.from_config(
            config(**({"num_hidden_layers": 2} | sizes | changes))
        )


def llama(sizes: dict = SMALL, **changes: object):
    return skeleton(transformers.LlamaConfig, sizes, **changes)


def with_layer_beside(parent: str):
    model = llama()
    with accelerate.init_empty_weights():
        model.get_submodule(parent).add_module("extra", nn.Linear(128, 8))
    return model


def refused(model: nn.Module, degree: int, *, in_blocks: bool) -> str:
    with pytest.raises(UserError) as caught:
        layout_of(model, degree, in_blocks=in_blocks)
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith(f"parallel.tensor_parallel_degree={degree}: {type(model).__name__}: ")
    return text


def styles_of(layout: ShardLayout, parent: str) -> dict[str, str]:
    return {
        path.removeprefix(f"{parent}."): layer.style
        for path, layer in layout.layers.items()
        if path.startswith(f"{parent}.")
    }


def sizes_of(layout: ShardLayout, parent: str, *names: str) -> list[tuple[int, ...]]:
    return [layout.layers[f"{parent}.{name}"].split.sizes for name in names]


def require_whole_blocks(model: nn.Module, layout: ShardLayout) -> None:
    """Every rank's slice begins where a block of the whole weight begins."""
    for path, layer in layout.layers.items():
        if layer.style == "vocabulary":
            continue
        columns = model.get_submodule(path).weight.shape[1]
        for start in layer.split.bounds:
            elements = start if layer.split.dim == 1 else start * columns
            assert elements % NF4_BLOCK == 0, path
        assert layer.split.dim == 0 or columns % NF4_BLOCK == 0, path


# ---------------------------------------------------------------- dealing out


@pytest.mark.parametrize("unit", [1, 3, 16, 64])
@pytest.mark.parametrize("degree", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("num_units", [8, 9, 13, 231, 462])
def test_even_tiles_the_dimension_without_gaps_by_whole_units(unit, degree, num_units):
    split = Split.even(0, num_units * unit, unit, degree)
    assert len(split.sizes) == degree
    assert split.bounds[0] == 0
    assert split.whole == split.bounds[-1] == sum(split.sizes) == num_units * unit
    assert [split.range_of(rank) for rank in range(degree)] == list(pairwise(split.bounds))
    assert all(size > 0 and size % unit == 0 for size in split.sizes)
    assert max(split.sizes) - min(split.sizes) <= unit
    assert list(split.sizes) == sorted(split.sizes, reverse=True)


# ---------------------------------------------------------------- real shapes


@pytest.mark.parametrize("in_blocks", [True, False])
def test_llama_70b_over_eight_ranks_is_cut_into_equal_eighths(in_blocks):
    model = llama(LLAMA_70B)
    layout = layout_of(model, 8, in_blocks=in_blocks)
    assert layout.degree == 8
    assert layout.stack == "model.layers"
    assert set(layout.regions) == {
        f"model.layers.{i}.{part}" for i in (0, 1) for part in ("self_attn", "mlp")
    }
    assert len(layout.layers) == 2 * 7 + 2
    for layer in layout.layers.values():
        assert layer.split.sizes == (layer.split.whole // 8,) * 8
    wholes = {path: layer.split.whole for path, layer in layout.layers.items()}
    assert wholes[f"{ATTENTION}.q_proj"] == wholes[f"{ATTENTION}.o_proj"] == 8192
    assert wholes[f"{ATTENTION}.k_proj"] == wholes[f"{ATTENTION}.v_proj"] == 1024
    assert {wholes[f"{MLP}.{name}_proj"] for name in ("gate", "up", "down")} == {28672}
    assert wholes["model.embed_tokens"] == wholes["lm_head"] == 128256


def test_the_plan_of_llama_gives_columns_rows_and_a_vocabulary():
    layout = layout_of(llama(), 2, in_blocks=False)
    assert styles_of(layout, ATTENTION) == {
        "q_proj": "column",
        "k_proj": "column",
        "v_proj": "column",
        "o_proj": "row",
    }
    assert styles_of(layout, MLP) == {
        "gate_proj": "column",
        "up_proj": "column",
        "down_proj": "row",
    }
    for path, layer in layout.layers.items():
        assert layer.split.dim == (1 if layer.style == "row" else 0), path
        assert layer.sums_output == (layer.style == "row"), path
    assert layout.layers["model.embed_tokens"].style == "vocabulary"
    assert layout.layers["lm_head"].style == "vocabulary"


def test_the_mlp_of_qwen_72b_is_dealt_out_unevenly_in_whole_blocks():
    model = skeleton(transformers.Qwen2Config, QWEN_72B)
    layout = layout_of(model, 8, in_blocks=True)
    blocks = (58, 58, 58, 58, 58, 58, 57, 57)
    expected = tuple(64 * count for count in blocks)
    assert sizes_of(layout, MLP, "gate_proj", "up_proj", "down_proj") == [expected] * 3
    assert sizes_of(layout, ATTENTION, "q_proj", "o_proj") == [(1024,) * 8] * 2
    assert all(bound % 64 == 0 for bound in layout.layers[f"{MLP}.down_proj"].split.bounds)
    require_whole_blocks(model, layout)


def test_the_mlp_of_qwen_72b_is_dealt_out_evenly_where_there_are_no_blocks():
    layout = layout_of(skeleton(transformers.Qwen2Config, QWEN_72B), 8, in_blocks=False)
    names = ("gate_proj", "up_proj", "down_proj")
    assert sizes_of(layout, MLP, *names) == [(3696,) * 8] * 3


@pytest.mark.parametrize("in_blocks", [True, False])
@pytest.mark.parametrize(("degree", "groups"), [(2, (2, 1)), (3, (1, 1, 1))])
def test_heads_of_smollm2_go_in_whole_key_value_groups(degree, groups, in_blocks):
    model = llama(SMOLLM2)
    layout = layout_of(model, degree, in_blocks=in_blocks)
    query = tuple(3 * 64 * n for n in groups)
    assert sizes_of(layout, ATTENTION, "q_proj", "o_proj") == [query] * 2
    assert sizes_of(layout, ATTENTION, "k_proj", "v_proj") == [tuple(64 * n for n in groups)] * 2
    names = ("gate_proj", "up_proj", "down_proj")
    assert sizes_of(layout, MLP, *names) == [(1536 // degree,) * degree] * 3
    if in_blocks:
        require_whole_blocks(model, layout)


@pytest.mark.parametrize("degree", [2, 4])
def test_a_vocabulary_that_does_not_divide_is_dealt_out_by_single_rows(degree):
    layout = layout_of(llama(), degree, in_blocks=False)
    expected = {2: (130, 129), 4: (65, 65, 65, 64)}[degree]
    for path in ("model.embed_tokens", "lm_head"):
        assert layout.layers[path] == Sharded("vocabulary", Split.even(0, 259, 1, degree))
        assert layout.layers[path].split.sizes == expected


def test_tied_head_and_embedding_hold_the_same_rows():
    layers = layout_of(llama(tie_word_embeddings=True), 2, in_blocks=False).layers
    assert layers["lm_head"] == layers["model.embed_tokens"]


# ---------------------------------------------------------------- parameters


def test_biases_follow_the_rows_of_their_weight():
    layout = layout_of(skeleton(transformers.Qwen2Config, QWEN_72B), 8, in_blocks=True)
    for name in ("q_proj", "k_proj", "v_proj"):
        path = f"{ATTENTION}.{name}"
        assert layout.of_parameter(f"{path}.bias") == layout.layers[path].split
        assert layout.of_parameter(f"{path}.weight") == layout.layers[path].split
        assert layout.of_parameter(f"{path}.bias").dim == 0


def test_the_bias_of_a_row_layer_and_the_norms_are_whole_on_every_rank():
    model = llama(attention_bias=True, mlp_bias=True)
    layout = layout_of(model, 2, in_blocks=False)
    whole = {name for name, _ in model.named_parameters() if layout.of_parameter(name) is None}
    assert whole == {"model.norm.weight"} | {
        f"model.layers.{i}.{name}"
        for i in (0, 1)
        for name in (
            "input_layernorm.weight",
            "post_attention_layernorm.weight",
            "self_attn.o_proj.bias",
            "mlp.down_proj.bias",
        )
    }
    assert layout.of_parameter(f"{MLP}.down_proj.weight").dim == 1


def test_norms_of_single_heads_are_whole_on_every_rank():
    layout = layout_of(skeleton(transformers.Qwen3Config, SMALL), 2, in_blocks=False)
    assert layout.of_parameter(f"{ATTENTION}.q_norm.weight") is None
    assert layout.of_parameter(f"{ATTENTION}.k_norm.weight") is None


# ---------------------------------------------------------------- fused, and normed over all heads


@pytest.mark.parametrize("degree", [2, 3])
def test_fused_layers_of_phi3_are_gathered_and_their_followers_split(degree):
    sizes = {key: value for key, value in SMALL.items() if key != "head_dim"}
    model = skeleton(transformers.Phi3Config, sizes, hidden_size=256, intermediate_size=320)
    layout = layout_of(model, degree, in_blocks=True)
    assert styles_of(layout, ATTENTION) == {"qkv_proj": "gathered", "o_proj": "split"}
    assert styles_of(layout, MLP) == {"gate_up_proj": "gathered", "down_proj": "split"}
    assert not layout.layers[f"{MLP}.gate_up_proj"].sums_output
    assert layout.layers[f"{MLP}.down_proj"].sums_output
    fused = layout.layers[f"{ATTENTION}.qkv_proj"].split
    assert (fused.dim, fused.whole) == (0, 256 + 2 * 128)
    assert max(fused.sizes) - min(fused.sizes) <= 1
    blocks = {2: (3, 2), 3: (2, 2, 1)}[degree]
    assert sizes_of(layout, MLP, "down_proj") == [tuple(64 * n for n in blocks)]
    require_whole_blocks(model, layout)


def test_attention_of_olmo2_is_gathered_and_its_mlp_is_not():
    layout = layout_of(skeleton(transformers.Olmo2Config, SMALL), 2, in_blocks=True)
    assert styles_of(layout, ATTENTION) == {
        "q_proj": "gathered",
        "k_proj": "gathered",
        "v_proj": "gathered",
        "o_proj": "split",
    }
    assert styles_of(layout, MLP) == {
        "gate_proj": "column",
        "up_proj": "column",
        "down_proj": "row",
    }
    assert layout.of_parameter(f"{ATTENTION}.q_norm.weight") is None


# ---------------------------------------------------------------- whole blocks of NF4


def test_small_heads_are_joined_until_row_slices_begin_at_whole_blocks():
    model = llama(num_attention_heads=8, num_key_value_heads=4)
    layout = layout_of(model, 2, in_blocks=True)
    assert sizes_of(layout, ATTENTION, "q_proj", "o_proj") == [(64, 64)] * 2
    assert sizes_of(layout, ATTENTION, "k_proj", "v_proj") == [(32, 32)] * 2
    require_whole_blocks(model, layout)
    free = layout_of(model, 3, in_blocks=False)
    assert sizes_of(free, ATTENTION, "q_proj", "k_proj") == [(64, 32, 32), (32, 16, 16)]


def test_an_odd_number_of_joined_groups_is_dealt_out_unevenly():
    model = llama(hidden_size=192, num_attention_heads=12, num_key_value_heads=12)
    layout = layout_of(model, 2, in_blocks=True)
    assert sizes_of(layout, ATTENTION, "q_proj", "k_proj", "o_proj") == [(128, 64)] * 3
    require_whole_blocks(model, layout)


def test_rows_of_one_and_a_half_blocks_are_dealt_out_in_pairs():
    sizes = {"hidden_size": 96, "intermediate_size": 320, "head_dim": 64}
    glm = skeleton(transformers.GlmConfig, SMALL, **sizes)
    layout = layout_of(glm, 3, in_blocks=True)
    assert sizes_of(layout, MLP, "gate_up_proj") == [(214, 214, 212)]
    free = layout_of(glm, 3, in_blocks=False)
    assert sizes_of(free, MLP, "gate_up_proj") == [(214, 213, 213)]


def test_too_few_joined_groups_are_refused_with_what_is_possible():
    text = refused(llama(), 3, in_blocks=True)
    blocks = "which in whole NF4 blocks of 64 can be dealt to 2 ranks at most"
    assert f"{ATTENTION} has 4 key/value heads, {blocks}" in text
    assert text.endswith("set it to 2 or less")
    layout_of(llama(), 2, in_blocks=True)
    narrow = llama(hidden_size=64, num_attention_heads=4)
    text = refused(narrow, 2, in_blocks=True)
    assert "can be dealt to 1 rank at most: set it to 1 and use parallel.zero_stage 3" in text
    layout_of(narrow, 4, in_blocks=False)


def test_a_row_layer_whose_columns_are_no_whole_blocks_is_refused():
    text = refused(llama(intermediate_size=224), 2, in_blocks=True)
    assert f"{MLP} has 224 columns" in text
    assert "can be dealt to 1 rank at most: set it to 1 and use parallel.zero_stage 3" in text
    assert layout_of(llama(intermediate_size=224), 2, in_blocks=False)


# ---------------------------------------------------------------- refused


@pytest.mark.parametrize("in_blocks", [True, False])
@pytest.mark.parametrize(("sizes", "most"), [(LLAMA_70B, 8), (SMOLLM2, 3)])
def test_more_ranks_than_key_value_heads_are_refused_with_how_many_are_possible(
    sizes, most, in_blocks
):
    model = llama(sizes)
    text = refused(model, most + 1, in_blocks=in_blocks)
    assert f"{ATTENTION} has {most} key/value heads" in text
    assert f"can be dealt to {most} ranks at most" in text
    assert text.endswith(f"set it to {most} or less")
    layout_of(model, most, in_blocks=in_blocks)


def test_more_ranks_than_blocks_of_the_mlp_are_refused():
    model = llama(SMOLLM2, intermediate_size=128)
    text = refused(model, 3, in_blocks=True)
    blocks = "which in whole NF4 blocks of 64 can be dealt to 2 ranks at most"
    assert f"{MLP} has 128 columns, {blocks}" in text
    assert text.endswith("set it to 2 or less")
    layout_of(model, 2, in_blocks=True)


def test_the_degree_that_a_refusal_names_is_possible_for_every_layer():
    """Attention would take eight ranks, the MLP behind it only two."""
    model = llama(LLAMA_70B, intermediate_size=128)
    assert refused(model, 16, in_blocks=True).endswith("set it to 2 or less")
    layout_of(model, 2, in_blocks=True)


def test_an_architecture_without_a_plan_is_refused_with_the_remedy():
    with accelerate.init_empty_weights():
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.GPT2Config(n_embd=64, n_head=4, n_layer=1)
        )
    text = refused(model, 2, in_blocks=True)
    assert "carries no tensor-parallel plan" in text
    assert text.endswith("set it to 1 and use parallel.zero_stage 3 to spread the base")


MIXTURES = [
    (transformers.MixtralConfig, {"num_local_experts": 5}),
    (transformers.Qwen3MoeConfig, {"num_experts": 5, "moe_intermediate_size": 24}),
]


@pytest.mark.parametrize(("config", "changes"), MIXTURES)
@pytest.mark.parametrize("in_blocks", [True, False])
def test_experts_are_dealt_out_whole_and_unevenly(config, changes, in_blocks):
    """Even where their width could not be cut at whole blocks."""
    model = skeleton(config, SMALL, **changes)
    layout = layout_of(model, 2, in_blocks=in_blocks)
    path = "model.layers.0.mlp.experts"
    assert layout.layers[path] == Sharded("experts", Split(0, (0, 3, 5)))
    for kind in ("gate_up_proj", "down_proj"):
        assert layout.of_parameter(f"{path}.{kind}") == Split(0, (0, 3, 5))
    assert layout.of_parameter("model.layers.0.mlp.gate.weight") is None
    assert "model.layers.0.mlp" in layout.blocks
    assert layout.in_block("model.layers.0.mlp.gate")
    assert not layout.in_block("model.layers.0.self_attn.q_proj")
    assert why_not_by_tokens(model, layout) is None


@pytest.mark.parametrize(("config", "changes"), MIXTURES)
def test_more_ranks_than_experts_are_refused(config, changes):
    few = {name: 1 for name in changes if name.startswith("num_")} | {"num_experts_per_tok": 1}
    text = refused(skeleton(config, SMALL, **(changes | few)), 2, in_blocks=True)
    assert "its layers have 1 experts, which are dealt out whole" in text
    assert text.endswith("set it to 1 and use parallel.zero_stage 3 to spread the base")


def test_a_style_that_is_not_known_is_refused_by_name():
    config = transformers.DeepseekV2Config
    sizes = {"n_routed_experts": 4, "moe_intermediate_size": 64, "kv_lora_rank": 16}
    text = refused(skeleton(config, SMALL, **sizes), 2, in_blocks=False)
    assert "its plan splits model.layers.*.self_attn.kv_a_proj_with_mqa" in text
    assert "which is not known here" in text


@pytest.mark.parametrize("parent", [ATTENTION, MLP])
def test_a_layer_beside_the_plan_is_refused_by_its_name(parent):
    text = refused(with_layer_beside(parent), 2, in_blocks=False)
    assert f"{parent}.extra.weight " in text
    assert f"is not in its plan, beside {parent}." in text
    assert text.endswith("set it to 1 and use parallel.zero_stage 3 to spread the base")


def test_a_plan_that_splits_without_joining_again_is_refused():
    model = llama()
    plan = model.config.base_model_tp_plan
    model.model.config.base_model_tp_plan = {
        pattern: style for pattern, style in plan.items() if "down_proj" not in pattern
    }
    del model.model.layers[0].mlp.down_proj, model.model.layers[1].mlp.down_proj
    assert f"nothing in {MLP} joins what its plan splits" in refused(model, 2, in_blocks=False)


def test_an_attention_that_does_not_say_how_wide_its_heads_are_is_refused():
    model = llama(num_key_value_heads=4)
    model.get_submodule(ATTENTION).head_dim = 48
    assert f"{ATTENTION} does not say of what size its heads are" in refused(
        model, 2, in_blocks=False
    )


def olmo_hybrid():
    """Every second layer mixes tokens by a recurrence that is not in the plan."""
    return skeleton(
        transformers.OlmoHybridConfig,
        SMALL | {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]},
    )


def test_there_is_no_sequence_parallelism_beside_parts_that_may_mix_tokens():
    model = olmo_hybrid()
    why = why_not_by_tokens(model, layout_of(model, 2, in_blocks=False))
    assert why is not None
    assert why.startswith("model.layers.0.linear_attn (Olmo")


def test_there_is_no_sequence_parallelism_where_experts_are_beside_the_attention():
    model = skeleton(MIXTURES[0][0], SMALL, **MIXTURES[0][1])
    layout = layout_of(model, 2, in_blocks=False)
    layout = dataclasses.replace(layout, blocks=("model.layers.0",))
    why = why_not_by_tokens(model, layout)
    assert why is not None
    assert "model.layers.0 has experts beside its attention" in why


@pytest.mark.parametrize("kind", ["Llama", "Qwen3", "Gemma2", "Phi3", "Olmo2", "Granite", "Phi"])
def test_there_is_sequence_parallelism_beside_norms_and_activations(kind):
    model = skeleton(getattr(transformers, f"{kind}Config"), SMALL | {"pad_token_id": 0})
    assert why_not_by_tokens(model, layout_of(model, 2, in_blocks=False)) is None


def test_a_model_without_its_own_backbone_is_refused():
    model = llama()
    model.base_model_prefix = "language_model"
    assert "carries no tensor-parallel plan" in refused(model, 2, in_blocks=False)
