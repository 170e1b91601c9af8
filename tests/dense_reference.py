"""The loss written in the plainest way: fp64, dense, one row at a time, gradients by autograd.

Shares no formula with src/moored: the softmaxes are built with the target's column deleted, the
divergences as sums of p (log p - log q), and the soft cap, scale and bias as they are defined.
Where that cancels even in fp64 (a KL of 1e-8, a target of probability 1 - 1e-12), `many_digits`
does the same in 60 digits, with the gradients written down as the paper defines them.
"""

from __future__ import annotations

import math

import mpmath
import torch
from torch import Tensor


def divergence(s: Tensor, t: Tensor, direction: str) -> Tensor:
    """KL or JSD of two rows of logits, by definition."""
    log_p, log_q = torch.log_softmax(s, 0), torch.log_softmax(t, 0)
    p, q = log_p.exp(), log_q.exp()
    if direction == "forward":
        return (q * (log_q - log_p)).sum()
    if direction == "reverse":
        return (p * (log_p - log_q)).sum()
    log_m = torch.logaddexp(log_p, log_q) - torch.log(torch.tensor(2.0, dtype=s.dtype))
    return 0.5 * (q * (log_q - log_m)).sum() + 0.5 * (p * (log_p - log_m)).sum()


def per_row(
    policy: Tensor,
    reference: Tensor | None,
    targets: Tensor,
    *,
    direction: str = "forward",
    mask_target: bool = True,
    temperature: float = 1.0,
    ignore_index: int = -100,
    kl_mask: Tensor | None = None,
    vocab_size: int | None = None,
    target_weight: float = 0.0,
    rest_factor: str = "one",
) -> tuple[Tensor, Tensor]:
    """Cross-entropy and KL of each row, 0 where they do not apply; logits [T, V]."""
    vocab_size = policy.shape[1] if vocab_size is None else vocab_size
    ces, kls = [], []
    for i, y in enumerate(targets.tolist()):
        zero = policy[i].sum() * 0 if policy[i].isfinite().all() else policy.new_zeros(())
        s = policy[i, :vocab_size].double()
        ces.append(zero.double() if y == ignore_index else torch.logsumexp(s, 0) - s[y])
        if y == ignore_index or reference is None or (kl_mask is not None and not kl_mask[i]):
            kls.append(zero.double())
            continue
        t = reference[i, :vocab_size].detach().double()
        s, t, more, factor = s / temperature, t / temperature, 0.0, 1.0
        if mask_target:
            others = [torch.cat([x[:y], x[y + 1 :]]) for x in (s, t)]
            pairs = [
                torch.stack([x[y], torch.logsumexp(rest, 0)])
                for x, rest in zip((s, t), others, strict=True)
            ]
            if target_weight:
                more = target_weight * divergence(*pairs, direction)
            if rest_factor == "base":
                factor = torch.softmax(pairs[1], 0)[1]
            s, t = others
        kls.append(temperature**2 * (factor * divergence(s, t, direction) + more))
    if not ces:
        return policy.new_zeros(0).double(), policy.new_zeros(0).double()
    return torch.stack(ces), torch.stack(kls)


def dense_loss(
    policy: Tensor,
    reference: Tensor | None,
    targets: Tensor,
    *,
    kl_weight: float = 1.0,
    reduction: str = "mean",
    **options: object,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, ce, kl) in fp64 with a graph back to `policy`."""
    ce, kl = per_row(policy, reference, targets, **options)  # type: ignore[arg-type]
    if reduction != "none":
        valid = targets != options.get("ignore_index", -100)
        mask = options.get("kl_mask")
        with_kl = valid if mask is None else valid & mask  # type: ignore[operator]
        ce, kl = ce.sum(), kl.sum()
        if reduction == "mean":
            ce, kl = ce / max(1, int(valid.sum())), kl / max(1, int(with_kl.sum()))
    return ce + kl_weight * kl, ce, kl


def dense_with_prompt(
    policy: Tensor,
    reference: Tensor,
    targets: Tensor,
    *,
    kl_mask: Tensor,
    kl_weight: float,
    prompt_weight: float,
    reduction: str = "mean",
    ignore_index: int = -100,
    kl_weights: Tensor | None = None,
    **options: object,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, ce, kl, kl at rows without a target) in fp64; there it is over every column."""
    how = {"kl_mask": kl_mask, "ignore_index": ignore_index, **options}
    ce, kl = per_row(policy, reference, targets, **how)  # type: ignore[arg-type]
    temperature = float(options.get("temperature", 1.0))  # type: ignore[arg-type]
    vocab_size = options.get("vocab_size", policy.shape[1])
    prompt, rows = (targets == ignore_index) & kl_mask, []
    for i, is_prompt in enumerate(prompt.tolist()):
        s, t = (x[i, :vocab_size].double() / temperature for x in (policy, reference.detach()))  # type: ignore[misc]
        kind = str(options.get("direction", "forward"))
        rows.append(temperature**2 * divergence(s, t, kind) if is_prompt else 0.0 * kl[i])
    alone = torch.stack(rows)
    by_row = torch.ones_like(kl) if kl_weights is None else kl_weights.double()
    if reduction == "none":
        return ce + kl_weight * by_row * kl + prompt_weight * by_row * alone, ce, kl, alone
    sizes = [1, 1, 1]
    if reduction == "mean":
        valid = targets != ignore_index
        sizes = [max(1, int(x.sum())) for x in (valid, valid & kl_mask, prompt)]
    loss = ce.sum() / sizes[0] + kl_weight * (by_row * kl).sum() / sizes[1]
    loss = loss + prompt_weight * (by_row * alone).sum() / sizes[2]
    return loss, ce.sum() / sizes[0], kl.sum() / sizes[1], alone.sum() / sizes[2]


def dense_logits(
    hidden: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
) -> Tensor:
    """Logits in fp64, as the contract defines them."""
    logits = hidden.double() @ weight.double().T
    if bias is not None:
        logits = logits + bias.double()
    logits = logits * logit_scale
    if logit_softcap is not None:
        logits = logit_softcap * torch.tanh(logits / logit_softcap)
    return logits


def gradient_bound(hidden: Tensor, reference_hidden: Tensor, weight: Tensor) -> float:
    """Relative error of the head's whole gradient in units of u; derived in test_head.py."""
    h, h0, w = hidden.detach().double(), reference_hidden.double(), weight.double()
    products = h.norm(dim=1).max() * w.norm(dim=1).max()
    logits = h @ w.T
    spread = (logits.amax(1) - logits.amin(1)).amax() + 3 * ((h0 - h) @ w.T).abs().amax()
    return float(2 * products + spread + 32 + math.sqrt(len(w)))


def many_digits(
    policy: Tensor, reference: Tensor, targets: Tensor, *, direction: str, mask_target: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Per row: cross-entropy, KL, and their gradients [T, V], computed in 60 digits."""
    ces, kls, ce_grads, kl_grads = [], [], [], []
    with mpmath.workdps(60):
        for s_row, t_row, y in zip(
            policy.tolist(), reference.tolist(), targets.tolist(), strict=True
        ):
            full = _mp_softmax([mpmath.mpf(x) for x in s_row])
            ces.append(-mpmath.log(full[y]))
            ce_grads.append([p - (v == y) for v, p in enumerate(full)])
            kept = [v for v in range(len(s_row)) if v != y or not mask_target]
            p = _mp_softmax([mpmath.mpf(s_row[v]) for v in kept])
            q = _mp_softmax([mpmath.mpf(t_row[v]) for v in kept])
            m = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
            if direction == "forward":
                kls.append(_mp_kl(q, p))
                inner = [a - b for a, b in zip(p, q, strict=True)]
            elif direction == "reverse":
                kls.append(_mp_kl(p, q))
                inner = [a * (mpmath.log(a / b) - kls[-1]) for a, b in zip(p, q, strict=True)]
            else:
                to_m = _mp_kl(p, m)
                kls.append((_mp_kl(q, m) + to_m) / 2)
                inner = [a * (mpmath.log(a / b) - to_m) / 2 for a, b in zip(p, m, strict=True)]
            row = [mpmath.mpf(0)] * len(s_row)
            for v, value in zip(kept, inner, strict=True):
                row[v] = value
            kl_grads.append(row)
        columns = [ces, kls, ce_grads, kl_grads]
        ce, kl, ce_grad, kl_grad = (_to_tensor(column) for column in columns)
        return ce, kl, ce_grad, kl_grad


def _mp_softmax(logits: list[mpmath.mpf]) -> list[mpmath.mpf]:
    weights = [mpmath.exp(x) for x in logits]
    total = mpmath.fsum(weights)
    return [w / total for w in weights]


def _mp_kl(a: list[mpmath.mpf], b: list[mpmath.mpf]) -> mpmath.mpf:
    return mpmath.fsum(x * mpmath.log(x / y) for x, y in zip(a, b, strict=True))


def _to_tensor(values: list) -> Tensor:
    return torch.tensor(
        [[float(x) for x in v] if isinstance(v, list) else float(v) for v in values],
        dtype=torch.float64,
    )
