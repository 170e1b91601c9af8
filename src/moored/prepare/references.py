"""What the base makes of the training data, computed beforehand for the reference cache."""

from __future__ import annotations

import contextlib

import torch

from moored.config import Config
from moored.data import BaseIdentity, TrainStream, load_samples
from moored.data.heldout import anchor_samples
from moored.distributed.mesh import alone
from moored.models.base_files import BaseFiles
from moored.models.forward import probe_batch
from moored.models.policy import load_policy
from moored.models.reference import of_base
from moored.models.reference_cache import ReferenceCache, open_cache
from moored.utils.errors import UserError
from moored.utils.progress import Phase


def require_fillable(config: Config) -> None:
    """Refuse what `fill` cannot do, before anything is fetched.

    Raises:
        UserError: the recipe keeps nothing, or is for tensor-parallel ranks, whose sums differ.
    """
    if not config.reference.cache:
        raise UserError("the recipe keeps no hidden states: set reference.cache to true")
    degree = config.parallel.tensor_parallel_degree
    if degree > 1:
        raise UserError(
            f"parallel.tensor_parallel_degree is {degree}, and one process adds up in another "
            "order than these: leave it to the first run, which keeps what it computes"
        )


def fill(config: Config, located: BaseFiles, *, num_ranks: int) -> ReferenceCache:
    """Run the base over every micro-batch of a run, in one process; what is kept is passed over.

    It may be stopped at any point, and goes on there.

    Args:
        config: the recipe; see `require_fillable`.
        located: the base.
        num_ranks: data-parallel ranks of the run, on which its micro-batches depend.

    Returns:
        The cache.
    """
    mesh = alone("cuda" if torch.cuda.is_available() else "cpu")
    whole = config.parallel.model_copy(update={"zero_stage": 0, "offload": "none"})
    policy = load_policy(located.source.path, config.model_copy(update={"parallel": whole}), mesh)
    probe = of_base(policy, probe_batch(located.vocab_size, mesh.device))
    cache = open_cache(config, located.source.revision, mesh, probe, by_tokens=False)
    samples = load_samples(config.data.train, located.tokenizer, config.data, located.vocab_size)
    ranks = [TrainStream(config, located.tokenizer, samples) for _ in range(num_ranks)]
    steps = range(ranks[0].total_steps())
    base = BaseIdentity(model=config.model, revision=located.source.revision)
    windows = anchor_samples(config, located.tokenizer, base)
    anchors = [
        TrainStream.of_anchors(config, located.tokenizer, windows, len(steps))
        for _ in range(num_ranks if windows else 0)
    ]
    with contextlib.ExitStack() as stack:
        stack.callback(cache.flush)  # also when it is broken off
        phase = stack.enter_context(Phase("hidden states of the base", len(steps), "steps"))
        for step in phase.over(steps):
            # Anchors are drawn where there is a divergence.
            drawn = anchors if (step + 1) % config.regularizer.every == 0 else []
            for rank, stream in (*enumerate(ranks), *enumerate(drawn)):
                for batch in stream.next_step(dp_rank=rank, dp_size=num_ranks):
                    if not cache.has(batch):
                        cache.keep(batch, of_base(policy, batch.to(mesh.device)))
    return cache
