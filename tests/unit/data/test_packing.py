"""Packed samples do not see one another in real transformers models: logits and gradients.

Neither under transformers' masks, nor attended to one by one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from moored.data.batch import Batch, Sample, collate
from moored.models import attention
from moored.models.attention import attend_by_sample
from moored.models.forward import final_hidden, probe_batch

VOCAB = 61
# fp32, sums of at most 32 products per dot product and a few layers: rounding is about
# 32 * 2**-24 * |logit| = 2e-6 relative; the logits of these models are below 1.
TOLERANCE = 5e-6


def tiny(architecture: str, attention: str) -> torch.nn.Module:
    shared = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "attn_implementation": attention,
    }
    kinds = {
        "llama": lambda: transformers.LlamaConfig(**shared),
        "qwen2": lambda: transformers.Qwen2Config(**shared),
        # Alternating layers look back four tokens only: samples are longer than that.
        "gemma2": lambda: transformers.Gemma2Config(**shared, head_dim=8, sliding_window=4),
        "gemma3": lambda: transformers.Gemma3TextConfig(
            **shared,
            head_dim=8,
            sliding_window=4,
            layer_types=["sliding_attention", "full_attention"],
        ),
    }
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(kinds[architecture]()).float()
    return model.eval()


def sample(name: str, seed: int, length: int) -> Sample:
    ids = np.random.default_rng(seed).integers(0, VOCAB, size=length).astype(np.int32)
    return Sample(sample_id=name, input_ids=ids, label_mask=np.ones(length, dtype=bool))


def run(model: torch.nn.Module, batch: Batch, where: slice, row: int = 0):
    """Logits at `where` of a row, and the gradient of their loss with respect to all embeddings."""
    embeddings = model.get_input_embeddings()(batch.input_ids).detach().requires_grad_()
    logits = model(
        inputs_embeds=embeddings,
        position_ids=batch.position_ids,
        attention_mask=None,
        use_cache=False,
    ).logits[row, where]
    targets = batch.input_ids[row, where][1:]
    loss = torch.nn.functional.cross_entropy(logits[:-1], targets, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, embeddings)
    return logits.detach(), gradient


# Gemma 2 (soft-capped attention) has no sdpa in transformers; Gemma 3 has sliding windows in both.
KINDS = [
    (architecture, attention)
    for architecture in ("llama", "qwen2", "gemma2", "gemma3")
    for attention in ("sdpa", "eager")
    if (architecture, attention) != ("gemma2", "sdpa")
]


@pytest.fixture(params=KINDS, ids="-".join, scope="module")
def model(request):
    return tiny(*request.param)


A, OTHER_A, B, C = (
    sample(n, i, k) for i, (n, k) in enumerate((("a", 9), ("a", 9), ("b", 11), ("c", 6)))
)
IN_PACK = slice(len(A), len(A) + len(B))


@pytest.mark.parametrize("pad_to", [None, 40], ids=["full", "padded"])
def test_changing_one_packed_sample_leaves_the_other(model, pad_to):
    before, gradient = run(model, collate([[A, B, C]], 0, pad_to), IN_PACK)
    after, gradient_after = run(model, collate([[OTHER_A, B, C]], 0, pad_to), IN_PACK)
    assert torch.equal(before, after)
    assert torch.equal(gradient[0, IN_PACK], gradient_after[0, IN_PACK])
    outside = torch.ones(gradient.shape[1], dtype=torch.bool)
    outside[IN_PACK] = False
    assert gradient[0, outside].abs().max() == 0
    assert gradient[0, IN_PACK].abs().max() > 0


@pytest.mark.parametrize(
    ("rows", "row", "where"),
    [
        ([[A, B, C]], 0, IN_PACK),  # in the middle of a pack
        ([[C], [B]], 1, slice(0, len(B))),  # longest of a padded batch
        ([[sample("long", 9, 20)], [B]], 1, slice(0, len(B))),  # padded, positions run on
        ([[A, C, C], [B]], 1, slice(0, len(B))),  # padded beside a pack, positions restart
        ([[B, C], []], 0, slice(0, len(B))),  # beside an empty row
    ],
    ids=["packed", "longest", "padded", "beside-pack", "empty-row"],
)
def test_packed_and_padded_equal_alone(model, rows, row, where):
    alone, gradient_alone = run(model, collate([[B]], 0), slice(0, len(B)))
    logits, gradient = run(model, collate(rows, 0), where, row)
    assert (logits - alone).abs().max() < TOLERANCE
    assert (gradient[row, where] - gradient_alone[0]).abs().max() < TOLERANCE
    other_rows = [i for i in range(len(rows)) if i != row]
    assert not other_rows or gradient[other_rows].abs().max() == 0


@pytest.mark.parametrize("pad_to", [None, 25])
def test_the_padding_token_does_not_matter(model, pad_to):
    rows = [[A, C], [B]]
    logits, _ = run(model, collate(rows, 0, pad_to), slice(0, len(B)), 1)
    other, _ = run(model, collate(rows, VOCAB - 1, pad_to), slice(0, len(B)), 1)
    assert torch.equal(logits, other)


def test_the_test_can_fail(model):
    """With a mask of ones, transformers looks at no positions and samples do leak."""
    batch, other = (collate([[first, B]], 0) for first in (A, OTHER_A))
    leaked = [
        model(
            input_ids=b.input_ids,
            position_ids=b.position_ids,
            attention_mask=torch.ones_like(b.input_ids),
            use_cache=False,
        ).logits[0, IN_PACK]
        for b in (batch, other)
    ]
    assert (leaked[0] - leaked[1]).abs().max() > 1e-3


def test_targets_are_the_next_tokens(model):
    """The loss over `target_index` is the sum of the samples' own shifted losses."""
    batch = collate([[A, B], [C]], 0)
    logits = model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        attention_mask=None,
        use_cache=False,
    ).logits.reshape(-1, VOCAB)
    together = torch.nn.functional.cross_entropy(
        logits[batch.target_index], batch.targets, reduction="sum"
    )
    apart = torch.zeros(())
    for one in (A, B, C):
        ids = torch.from_numpy(one.input_ids).long()[None]
        own = model(input_ids=ids, use_cache=False).logits[0]
        apart = apart + torch.nn.functional.cross_entropy(own[:-1], ids[0, 1:], reduction="sum")
    assert abs((together - apart).item()) < TOLERANCE * batch.num_targets


# ---------------------------------------------------------------- one by one

LENGTHS = ((5, 60, 1, 53), (94, 12), (30,))


@pytest.fixture
def masks(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Which masks transformers was asked for, and gave."""
    made: list[Any] = []
    inner = attention.sdpa_mask

    def spy(*args: Any, **kwargs: Any) -> Any:
        made.append(inner(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(attention, "sdpa_mask", spy)
    return made


def packed(lengths: Any = LENGTHS, pad_to: int | None = None) -> Batch:
    rows = [
        [sample(f"{r}.{i}", 10 * r + i, n) for i, n in enumerate(row)]
        for r, row in enumerate(lengths)
    ]
    return collate(rows, 0, pad_to)


def try_it(model: Any) -> bool:
    batch = probe_batch(VOCAB, torch.device("cpu"))
    return attend_by_sample(model, final_hidden(model, batch), lambda: final_hidden(model, batch))


def hidden_and_gradient(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, list[torch.Tensor]]:
    hidden = final_hidden(model, batch)
    weights = torch.linspace(-1, 1, hidden.numel()).reshape(hidden.shape)
    model.zero_grad()
    (hidden * weights).sum().backward()
    gradients = [p.grad for p in model.get_decoder().parameters()]  # pyright: ignore
    assert all(gradient is not None for gradient in gradients)
    return hidden.detach(), gradients


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["none", "hooks", "reentrant"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@pytest.mark.parametrize("pad_to", [None, 130])
def test_equals_the_masked_model(
    architecture: str, pad_to: int | None, checkpointing: bool | None, masks: list[Any]
) -> None:
    """Hidden states and all gradients, in fp64 so that nothing but rounding may differ."""
    model = tiny(architecture, "sdpa").double()
    if checkpointing is not None:
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})  # pyright: ignore
        model.enable_input_require_grads()  # pyright: ignore
    batch = packed(pad_to=pad_to)
    want, want_grads = hidden_and_gradient(model, batch)
    assert try_it(model)
    masks.clear()
    found, grads = hidden_and_gradient(model, batch)
    assert masks == []
    torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grads, want_grads, rtol=1e-10, atol=1e-12)


def test_a_sample_does_not_depend_on_its_row_by_a_single_bit() -> None:
    """Beyond what the masks give: attention has the same shape whatever stands beside a sample."""
    model = tiny("llama", "sdpa")
    assert try_it(model)
    attended: list[torch.Tensor] = []
    module = model.model.layers[0].self_attn  # pyright: ignore
    module.o_proj.register_forward_pre_hook(lambda _, args: attended.append(args[0]))
    for row in ((40, 33), (33, 40)):
        both = [sample("a", 1, 40), sample("b", 2, 33)]
        final_hidden(model, collate([both if row[0] == 40 else both[::-1]], 0))
    first, second = attended
    torch.testing.assert_close(first[0, :40], second[0, 33:], rtol=0, atol=0)


def test_samples_beyond_a_sliding_window_keep_the_mask(masks: list[Any]) -> None:
    model = tiny("gemma3", "sdpa")  # a window of 4
    assert not try_it(model)  # even the trial's samples are longer
    short = tiny("gemma3", "sdpa")
    short.config.sliding_window = 64
    for layer in short.model.layers:  # pyright: ignore
        if layer.self_attn.sliding_window is not None:
            layer.self_attn.sliding_window = 64
    within, beyond = packed(((30, 64), (60, 34))), packed(((30, 65), (60, 34)))
    want = [final_hidden(short, x) for x in (within, beyond)]
    assert try_it(short)
    for batch, expected, num_masks in ((within, want[0], 0), (beyond, want[1], 2)):
        masks.clear()
        torch.testing.assert_close(final_hidden(short, batch), expected, rtol=1e-4, atol=1e-5)
        assert len(masks) == num_masks


def test_what_does_not_hand_the_lengths_on_keeps_the_mask(masks: list[Any]) -> None:
    model = tiny("llama", "sdpa")
    inner = model.model.forward  # pyright: ignore

    def forgetful(*args: Any, sample_lengths: object = None, **kwargs: Any) -> Any:
        return inner(*args, **kwargs)

    model.model.forward = forgetful  # pyright: ignore
    batch = packed()
    want = final_hidden(model, batch)
    assert not try_it(model)
    masks.clear()
    assert torch.equal(final_hidden(model, batch), want)
    assert len(masks) == 1


def test_other_kernels_are_left_alone() -> None:
    assert not try_it(tiny("llama", "eager"))


def test_many_short_samples_and_unpacked_rows_take_one_call(masks: list[Any]) -> None:
    model = tiny("llama", "sdpa")
    assert try_it(model)
    for lengths in (((3,) * 20,), ((40,), (30,))):
        masks.clear()
        final_hidden(model, packed(lengths))
        assert len(masks) == 1


def test_generation_keeps_its_masks() -> None:
    """Padded prompts are told apart by a mask, before and after a packed forward."""
    model: Any = tiny("llama", "sdpa").eval()
    ids = torch.tensor([[0, 0, 5, 7], [3, 4, 5, 7]])
    how = {
        "attention_mask": torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]),
        "do_sample": False,
        "max_new_tokens": 8,
        "pad_token_id": 0,
    }
    want = model.generate(ids, **how)
    assert try_it(model)
    final_hidden(model, packed())
    assert torch.equal(model.generate(ids, **how), want)
    assert transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS["sdpa"] is attention._attention
