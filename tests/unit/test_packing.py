"""Packed samples do not see one another in real transformers models: logits and gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers

from moored.batch import Batch, Sample, collate

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
