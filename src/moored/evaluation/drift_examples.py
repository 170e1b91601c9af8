"""Where a policy drifts on a text: gathered row by row while the text is measured.

The rows come from `drift.py`; what is made of them for people is `report/results.py`'s.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from moored.data.batch import Batch
from moored.distributed.mesh import Mesh
from moored.evaluation.report import Stretch, TokenChoice, TokenDrift, TokenExample, Where
from moored.loss.drift import MOST_PER_GROUP, DriftSums

EDGES = (16, 64, 256)  # tokens of context that part the stretches
CONTEXT_TOKENS = 24
MOST_TOKENS = 12
NUM_SPOTS = 8  # the worst ones of a text


@dataclass(slots=True)
class _Found:
    """One spot in token ids."""

    drift: float
    sample: str
    context: list[int]
    target: int
    base: float
    adapted: float
    choices: list[list[Any]]  # token, the base's probability, the policy's


class DriftCollector:
    """Adds up the drift of one text on this rank.

    Args:
        num_spots: examples to keep, and to look at in each batch: so the batches do not matter.
    """

    def __init__(self, num_spots: int = NUM_SPOTS):
        self.num_spots = num_spots
        self._stretches: Counter[int] = Counter()
        self._stretch_drift: Counter[int] = Counter()
        self._tokens: Counter[int] = Counter()
        self._token_drift: Counter[int] = Counter()
        self._spots: list[_Found] = []

    def add(self, batch: Batch, rows: DriftSums) -> None:
        """Take in what `Engine.drift` found on a batch of one sample a row."""
        drift = rows.kl.double().cpu()
        targets, at = batch.targets.cpu(), batch.target_index.cpu()
        places = batch.position_ids.flatten().cpu()[at] + 1  # tokens of context
        stretch = torch.bucketize(places, torch.tensor(EDGES), right=True)
        for keys, counts, sums in (
            (stretch, self._stretches, self._stretch_drift),
            (targets, self._tokens, self._token_drift),
        ):
            ids, inverse, number = keys.unique(return_inverse=True, return_counts=True)
            summed = torch.zeros(len(ids), dtype=drift.dtype).index_add_(0, inverse, drift)
            for key, count, value in zip(
                ids.tolist(), number.tolist(), summed.tolist(), strict=True
            ):
                counts[key] += count
                sums[key] += value
        if rows.spots is not None:
            self._add_spots(batch, rows)

    def _add_spots(self, batch: Batch, rows: DriftSums) -> None:
        spots = rows.spots
        assert spots is not None
        length = batch.input_ids.shape[1]
        for i, row in enumerate(spots.rows.tolist()):
            flat = int(batch.target_index[row])
            line, place = divmod(flat, length)
            ids = batch.input_ids[line, max(0, place + 1 - CONTEXT_TOKENS) : place + 1]
            pairs = zip(
                spots.log_p_reference[i].exp().tolist(),
                spots.log_p_policy[i].exp().tolist(),
                strict=True,
            )
            choices = dict(zip(spots.tokens[i].tolist(), pairs, strict=True))  # each token once
            self._spots.append(
                _Found(
                    drift=float(rows.kl[row]),
                    sample=batch.sample_ids[line],
                    context=ids.tolist(),
                    target=int(batch.targets[row]),
                    base=math.exp(-float(rows.ce_reference[row])),
                    adapted=math.exp(-float(rows.ce_policy[row])),
                    choices=[[token, *pair] for token, pair in choices.items()],
                )
            )
        self._spots = _worst(self._spots, self.num_spots)

    def _plain(self) -> dict[str, Any]:
        """All of it for the other ranks, as JSON; keys that are numbers go in pairs."""
        pairs = {
            "stretches": self._stretches,
            "stretch_drift": self._stretch_drift,
            "tokens": self._tokens,
            "token_drift": self._token_drift,
        }
        found = {name: [[k, v] for k, v in each.items()] for name, each in pairs.items()}
        return found | {"spots": [asdict(spot) for spot in self._spots]}

    def where(self, mesh: Mesh, tokenizer: Any) -> Where:
        """All ranks' together. Collective over the data-parallel axis."""
        parts = mesh.dp.gather(self._plain())
        stretches, stretch_drift, tokens, token_drift = (
            _added([part[name] for part in parts])
            for name in ("stretches", "stretch_drift", "tokens", "token_drift")
        )
        spots = _worst([_Found(**spot) for part in parts for spot in part["spots"]], self.num_spots)
        total = max(sum(token_drift.values()), 1e-30)
        bounds = [0, *EDGES]
        top = sorted(tokens, key=lambda token: (-token_drift[token], token))[:MOST_TOKENS]
        return Where(
            stretches=[
                Stretch(
                    first=bounds[key],
                    last=bounds[key + 1] - 1 if key + 1 < len(bounds) else None,
                    num_tokens=stretches[key],
                    drift=stretch_drift[key] / stretches[key],
                )
                for key in sorted(stretches)
            ],
            tokens=[
                TokenDrift(
                    token=tokenizer.decode([token]),
                    num_tokens=tokens[token],
                    drift=token_drift[token] / tokens[token],
                    share=token_drift[token] / total,
                )
                for token in top
            ],
            spots=[_spot(spot, tokenizer) for spot in spots],
        )


def _added(counts: Sequence[list[Any]]) -> Counter[int]:
    """The sum of ranks' (key, value) pairs, in which a figure that is not finite stays so."""
    found: Counter[int] = Counter()
    for pairs in counts:
        for key, value in pairs:
            found[key] += value
    return found


def _worst(spots: list[_Found], most: int) -> list[_Found]:
    """The greatest drifts, a few of each sample at most."""
    kept: list[_Found] = []
    per_sample: Counter[str] = Counter()
    for spot in sorted(spots, key=lambda spot: (-spot.drift, spot.sample, len(spot.context))):
        if per_sample[spot.sample] < MOST_PER_GROUP and len(kept) < most:
            per_sample[spot.sample] += 1
            kept.append(spot)
    return kept


def _spot(found: _Found, tokenizer: Any) -> TokenExample:
    ordered = sorted(found.choices, key=lambda choice: (-choice[1], choice[0]))
    return TokenExample(
        sample=found.sample,
        context=tokenizer.decode(found.context),
        target=tokenizer.decode([found.target]),
        drift=found.drift,
        base=found.base,
        adapted=found.adapted,
        choices=[
            TokenChoice(token=tokenizer.decode([token]), base=base, adapted=adapted)
            for token, base, adapted in ordered
        ],
    )
