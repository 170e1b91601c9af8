"""A causal language model as the loss sees it: its final hidden states, and our head after them.

Proves on a trial batch that the two together are the model's own logits.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import nn

from moored.adapted import dropout_off, logit_factors
from moored.data.batch import Batch
from moored.distributed.mesh import Mesh, is_lost_peer
from moored.loss.head import Head
from moored.models.attention import samples_apart
from moored.models.tensor_parallel import Sharding
from moored.models.tensor_parallel.regions import TokensNotApartError
from moored.utils.errors import UserError


def final_hidden(causal_lm: Any, batch: Batch) -> torch.Tensor:
    """The backbone's final hidden states at the batch's targets, [N, D].

    Samples are kept apart by `position_ids`, which transformers honours only with
    `attention_mask=None` and `use_cache=False`; or are attended to one by one.
    """
    backbone = getattr(causal_lm, causal_lm.base_model_prefix)
    with samples_apart(causal_lm, batch) as arguments:
        output = backbone(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            attention_mask=None,
            use_cache=False,
            **arguments,
        )
    hidden = output.last_hidden_state
    return hidden.reshape(-1, hidden.shape[-1])[batch.target_index]


def probe_batch(vocab_size: int, device: torch.device) -> Batch:
    """Two packed samples of 8 tokens; every second position has its next token as target."""
    ids = (torch.arange(16) * 7919 + 3) % vocab_size
    index = torch.tensor([0, 2, 4, 6, 8, 10, 12, 14])
    return Batch(
        input_ids=ids[None],
        position_ids=torch.arange(8).repeat(2)[None],
        target_index=index,
        targets=ids[index + 1],
        kl_mask=torch.ones(len(index), dtype=torch.bool),
        sample_ids=("probe-a", "probe-b"),
        num_targets=len(index),
        num_kl=len(index),
        num_tokens=16,
        sample_lengths=((8, 8),),
    ).to(device)


def install_head(causal_lm: Any, device: torch.device, sharding: Sharding | None = None) -> None:
    """Put our head, with lm_head's own weight, in its place.

    Args:
        causal_lm: the base.
        device: where it is.
        sharding: how it is spread over ranks; the head then has this rank's vocabulary.

    Raises:
        UserError: the model's logits are not those of a linear head with a scale or a soft cap.
    """
    name = type(causal_lm).__name__
    lm_head = causal_lm.get_output_embeddings()
    if not isinstance(lm_head, nn.Linear) or type(lm_head) is not nn.Linear:
        raise UserError(
            f"{name}: its output layer is {type(lm_head).__name__}, not a plain linear lm_head: "
            "use a causal language model with an unquantised lm_head"
        )
    scale, softcap = logit_factors(causal_lm.config.get_text_config())
    shard = sharding.vocabulary(lm_head, causal_lm) if sharding else None
    head = Head(
        cast(nn.Parameter, lm_head.weight),
        lm_head.bias,
        logit_scale=scale,
        logit_softcap=softcap,
        shard=shard,
    )
    vocab_size = shard.vocab_size if shard else lm_head.weight.shape[0]
    batch = probe_batch(vocab_size, device)
    try:
        with torch.no_grad(), dropout_off(causal_lm):
            full = causal_lm(
                input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False
            ).logits[0, batch.target_index]
            hidden = final_hidden(causal_lm, batch)
            ours = nn.functional.linear(hidden, head.weight, head.bias).float() * scale
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, AttributeError, ValueError, IndexError) as error:
        if is_lost_peer(error):
            raise
        raise UserError(
            f"{name}: a trial forward fails ({str(error).splitlines()[0][:160]}): this "
            "architecture is not supported (or not in 4 bits: try model.quantization none)"
        ) from error
    if not bool(torch.isfinite(hidden).all() and torch.isfinite(full).all()):
        raise UserError(
            f"{name}: its hidden states or logits are not finite: the weights are broken, or "
            f"overflow in {full.dtype}: download the model again, or set model.dtype to float32"
        )
    if softcap is not None:
        ours = softcap * torch.tanh(ours / softcap)
    # The two differ by the rounding of the logits to the model's dtype, and by the order in which
    # a product of another shape sums D terms: some sqrt(D) roundings of the norms' product in fp32.
    wide = torch.float32
    norms = [torch.linalg.vector_norm(x, dim=-1, dtype=wide).max() for x in (hidden, head.weight)]
    summing = torch.finfo(wide).eps * hidden.shape[-1] ** 0.5 * abs(scale) * float(math.prod(norms))
    bound = 4 * torch.finfo(full.dtype).eps * max(1.0, full.abs().max().item()) + summing
    difference = (ours - full.float()).abs().max().item()
    if difference > bound:
        raise UserError(
            f"{name}: its forward does more to the logits than a soft cap or a scale, which the "
            f"loss would not see (they differ by {difference:.2g}, rounding explains {bound:.2g}): "
            "this architecture is not supported"
        )
    causal_lm.set_output_embeddings(head)


def changed_by_tokens(causal_lm: Any, mesh: Mesh, sharding: Sharding) -> str | None:
    """Why there is no sequence parallelism, by the hidden states with and without. Collective.

    None where they are the same; else something in the layers looks at more than one token, and is
    not in the plan.
    """
    batch = probe_batch(causal_lm.config.get_text_config().vocab_size, mesh.device)
    name = type(causal_lm).__name__
    with torch.no_grad(), dropout_off(causal_lm):
        sharding.connect(causal_lm, by_tokens=False)
        whole = final_hidden(causal_lm, batch)
        sharding.connect(causal_lm, by_tokens=True)
        try:
            by_tokens = final_hidden(causal_lm, batch)
        except TokensNotApartError as error:  # on all ranks, before anything is sent
            return f"{name}: {error}"
    # The sums are the same but for their order, in the dtype of the activations.
    bound = 64 * torch.finfo(whole.dtype).eps * max(1.0, whole.abs().max().item())
    differs = (by_tokens - whole).abs().max().item() > bound
    if mesh.tp.max(float(differs), mesh.device):  # one answer for all, whatever a sum's order is
        return f"{name} gives other hidden states with it"
    return None
