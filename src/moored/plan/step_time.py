"""How long a step takes on a GPU, and what it sends: a roofline with measured efficiencies.

Three things are taken as the time of a micro-batch: what the GPU computes and moves, what ranks
send each other, and the host's floor, i.e. the time in which a processor starts all the kernels.
The greater of the GPU's and the host's counts. Constants were fitted to the runs on H100s of
`docs/performance.md`; on other GPUs the same shares of the makers' figures are supposed.

Letters as in `memory_terms.py`; S tokens of a row, N elements of the linear layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moored.distributed.traffic import MicroBatch, Sent, Spread, micro_batch_traffic
from moored.plan.architecture import Architecture
from moored.plan.gpus import Cluster
from moored.plan.memory_terms import adapted, adapter_size, chunk_rows, shards
from moored.plan.workload import Workload

# Shares of the makers' figures that are reached.
LINEAR = 0.68  # of products of 4-bit layers, decoded before
ATTENTION = 0.5  # of torch's fused attention, causal
HEAD = 0.71  # of the head's products: 701 to 710 of 989 TFLOP/s measured
BANDWIDTH = 0.57  # of the many small kernels between products
STREAM = 0.88  # of one large kernel that reads and writes once: 2.95 of 3.35 TB/s measured
LINK, NETWORK = 0.7, 0.7
# The host, ms a layer and micro-batch, on the fastest of three machines that were measured; the
# others took 1.75 and 1.9 times as long. Without a figure of yours it is taken to be between.
HOST_PASS, HOST_REFERENCE = 12.5e-3, 4.0e-3
HOST_ZERO_3 = 1.5  # one gather a layer and pass: 1.30 s against 0.89 s at 80 layers
HOST_FACTOR, HOST_FACTORS = 1.4, (1.0, 1.9)


@dataclass(frozen=True, slots=True, kw_only=True)
class Counted:
    """Operations and bytes of one micro-batch on one rank.

    Attributes:
        linear: operations of linear layers and adapters.
        attention: of attention.
        head: of the head.
        moved: bytes of the kernels between products.
        decoded: bytes of decoding 4-bit weights.
        logits: bytes of passes over logits.
    """

    linear: float
    attention: float
    head: float
    moved: float
    decoded: float
    logits: float

    @property
    def operations(self) -> float:
        """All of them, which is what a processor's time is in proportion to."""
        return self.linear + self.attention + self.head


def counted(architecture: Architecture, work: Workload, *, reference: bool) -> Counted:
    """What one micro-batch costs.

    Args:
        architecture: the model.
        work: the recipe.
        reference: whether the base is run, too.
    """
    t = work.tensor_parallel_degree
    S = work.row_tokens
    T = S * work.micro_batch_size / work.context_parallel_degree
    again = work.recomputed(architecture.num_layers) / architecture.num_layers
    active = architecture.linear_size + architecture.num_layers * architecture.active_expert_size
    adapters = adapter_size(architecture, work)
    # Frozen weights: a backward is one product, not two. Adapters have both.
    passes = 2 + again
    linear = 2 * T * (active * (passes + reference) + adapters * (3 + again)) / t
    seen = _seen(work, S)
    scores = 4 * T * seen / 2 * architecture.query_size * architecture.num_layers / t
    attention = scores * (1 + again + 2.5 + reference)
    rows = T * work.head_share
    words = 2 * rows * architecture.vocab_size * architecture.hidden_size / t
    has_kl = work.has_kl and (reference or not work.anchors_alone)
    head = words * (3 if has_kl else 2)
    logits = rows * architecture.vocab_size / t * (18 if has_kl else 9)
    moved = architecture.num_layers * T * _moved(architecture, work, t) * (3 + again)
    if reference:
        moved += 0.75 * architecture.num_layers * T * _moved(architecture, work, t)
    decoded = 0.0
    if work.nf4:
        # All experts of a layer: with thousands of tokens each of them gets some.
        held = architecture.linear_size / t + architecture.num_layers * architecture.experts_of(t)
        decoded = (0.5 + 2 * work.compute_bytes) * held * (passes + reference)
    return Counted(linear=linear, attention=attention, head=head, moved=moved,
                   decoded=decoded, logits=logits)  # fmt: skip


def _seen(work: Workload, row: float) -> float:
    """Tokens that the last token of a sample attends to."""
    if work.packing and work.data is not None:
        return min(row, work.data.mean_tokens)
    return row


def _moved(architecture: Architecture, work: Workload, t: int) -> float:
    """Bytes a token and layer of a forward between its products, in bf16.

    Norms in fp32 (36 D each), residuals, rotation of queries and keys, the gate, and the sums of
    adapters to the outputs of their layers.
    """
    D, Q = architecture.hidden_size, architecture.query_size
    K, I = architecture.key_size, architecture.mlp_size  # noqa: E741
    by_token = t if work.sequence_parallel else 1
    outputs = sum(
        architecture.part(x.outputs, "columns", x, t) * 4
        + architecture.part(x.inputs, "rows", x, t) * 2
        for x in adapted(architecture, work)
    )
    return 84 * D / by_token + (22 * Q + 18 * K + 10 * I) / t + outputs


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """Seconds of a step, by part; those of a micro-batch are of the slowest rank.

    Attributes:
        micro_batches: of one rank in a step.
        gpu: of a micro-batch, computing and moving.
        sent: of a micro-batch, between ranks.
        host: of a micro-batch, the floor; `host_range` on the machines that were measured.
        host_range: the least and the greatest.
        update: of a step: the optimizer, and the sum of the adapter's gradients.
        tokens: of a step, all ranks.
    """

    micro_batches: int
    gpu: float
    sent: float
    host: float
    host_range: tuple[float, float]
    update: float
    tokens: float

    def seconds(self, host: float | None = None) -> float:
        """Seconds of a step."""
        floor = self.host if host is None else host
        return self.micro_batches * max(self.gpu + self.sent, floor) + self.update

    @property
    def range(self) -> tuple[float, float]:
        """Seconds of a step at least and at most: a fifth for the GPU, and the hosts seen."""
        least, most = self.host_range
        on_gpu = self.gpu + self.sent
        return (
            self.micro_batches * max(0.8 * on_gpu, least) + self.update,
            self.micro_batches * max(1.25 * on_gpu, most) + self.update,
        )

    @property
    def is_host_bound(self) -> bool:
        """Whether the GPU waits for the processor."""
        return self.host > self.gpu + self.sent


def gpu_seconds(count: Counted, cluster: Cluster) -> float:
    """The work of one micro-batch on one GPU."""
    gpu = cluster.gpu
    rate, bandwidth = gpu.bf16_tflops * 1e12, gpu.bandwidth_gbs * 1e9
    return (
        count.linear / (LINEAR * rate)
        + count.attention / (ATTENTION * rate)
        + head_seconds(count, cluster)
        + count.moved / (BANDWIDTH * bandwidth)
        + count.decoded / (BANDWIDTH * bandwidth)
    )


def head_seconds(count: Counted, cluster: Cluster) -> float:
    """The work of the head in one micro-batch."""
    gpu = cluster.gpu
    return count.head / (HEAD * gpu.bf16_tflops * 1e12) + count.logits / (
        STREAM * gpu.bandwidth_gbs * 1e9
    )


def step_time(
    architecture: Architecture, work: Workload, cluster: Cluster, host_factor: float | None = None
) -> StepTime:
    """Seconds of a step on average.

    Args:
        architecture: the model.
        work: the recipe.
        cluster: the GPUs.
        host_factor: how much slower than on the fastest machine measured the host is; None: as it
            was probed on the cluster, else not known, and taken as `HOST_FACTOR`.
    """
    probed = cluster.calibration
    if host_factor is None and probed is not None:
        host_factor = probed.host_factor
    factor = 1.0 if probed is None else probed.gpu_factor
    degree = work.tensor_parallel_degree
    d = max(1, cluster.world // degree)
    share = _share_of_references(work)
    with_kl, without = (counted(architecture, work, reference=x) for x in (True, False))
    gpu = share * gpu_seconds(with_kl, cluster) + (1 - share) * gpu_seconds(without, cluster)
    layers = architecture.num_layers
    again = 0.75 + 0.25 * work.recomputed(layers) / layers
    base = layers * (HOST_PASS * again + share * HOST_REFERENCE)
    base *= HOST_ZERO_3 if work.zero_stage == 3 and d > 1 else 1.0
    low, high = HOST_FACTORS if host_factor is None else (host_factor, host_factor)
    adapters = adapter_size(architecture, work, degree)
    sharers = max(1, d // work.context_parallel_degree)  # groups of ranks, each with its own rows
    rows_per_rank, anchors_per_rank = (
        -(-n // sharers) for n in (work.rows_per_step, work.anchor_rows)
    )
    moved = 4 * 7 * adapters / (d if work.zero_stage else 1)
    update = moved / (BANDWIDTH * cluster.gpu.bandwidth_gbs * 1e9)
    update += seconds_sent(reduced_bytes(architecture, work, d), d * degree, cluster)
    return StepTime(
        micro_batches=-(-rows_per_rank // work.micro_batch_size)
        - (-anchors_per_rank // work.micro_batch_size),
        gpu=gpu * factor,
        sent=_sent_seconds(architecture, work, cluster, share) * factor,
        host=base * (HOST_FACTOR if host_factor is None else host_factor),
        host_range=(base * low, base * high),
        update=update,
        tokens=work.rows_per_step * work.row_tokens,
    )


def _share_of_references(work: Workload) -> float:
    """Part of the micro-batches for which the base is run."""
    if not work.has_kl:
        return 0.0
    share = 1 / work.kl_every
    if work.anchors_alone:  # of which there are none in the other steps
        share = work.anchor_rows / (work.rows_per_step + work.anchor_rows)
    if work.cached_reference and work.cached_by_sample:
        return share / max(1.0, work.epochs or 1.0)
    return share


# ---------------------------------------------------------------- what is sent


def exchanged_bytes(architecture: Architecture, work: Workload, share: float = 1.0) -> float:
    """What a rank sends of queries, keys, values and outputs of attention in one micro-batch.

    Args:
        architecture: the model.
        work: the recipe.
        share: of the micro-batches, that run the base.
    """
    c, t = work.context_parallel_degree, work.tensor_parallel_degree
    passes = 2 + work.recomputed(architecture.num_layers) / architecture.num_layers
    passes += share * work.has_kl
    features = 2 * (architecture.query_size + architecture.key_size) / t
    tokens = work.row_tokens * work.micro_batch_size / c
    size = architecture.num_layers * tokens * features * work.compute_bytes
    return passes * size * (c - 1) / c


def tensor_parallel_traffic(architecture: Architecture, work: Workload) -> list[Sent]:
    """Collectives of one micro-batch within a tensor-parallel group, of full rows."""
    rows = work.micro_batch_size
    length = round(work.row_tokens / work.context_parallel_degree)
    degree = work.tensor_parallel_degree
    shared = [
        work.r * (linear.inputs if linear.cut == "columns" else linear.outputs)
        for linear in adapted(architecture, work)
    ]
    spread = Spread(
        degree=degree,
        hidden_size=architecture.hidden_size,
        num_layers=architecture.num_layers,
        activation_bytes=work.compute_bytes,
        shared_adapter_sizes=shared * architecture.num_layers,
        sequence_parallel=work.sequence_parallel,
        checkpointing=work.checkpointing,
        num_recomputed=work.recomputed(architecture.num_layers),
        chunk_tokens=chunk_rows(architecture, work),
        direction=work.direction,
        is_warm=work.is_warm,
        ce_by_entropy=work.ce_by_entropy,
        kl_by_entropy=work.kl_by_entropy,
        by_kernels=True,  # a plan is of GPUs
    )
    num = round(rows * length * work.head_share)
    with_kl = num * work.has_kl
    batch = MicroBatch(
        rows=rows,
        length=length,
        num_targets=num,
        num_kl=0 if work.selects_targets else with_kl,
        num_selected_from=with_kl if work.selects_targets else 0,
    )
    return micro_batch_traffic(spread, batch)


def gathered_bytes(architecture: Architecture, work: Workload, d: int) -> float:
    """What a rank receives of the others under ZeRO-3 in one micro-batch."""
    cut = shards(work, d)
    if cut == 1:
        return 0.0
    bases = _share_of_references(work) if work.anchors_alone else float(work.has_kl)
    passes = 2 + bases  # what is recomputed is there for its backward, too
    per = 0.5 if work.nf4 else work.compute_bytes
    linear = per * architecture.linear_size
    experts = per * architecture.num_layers * architecture.expert_size
    table = architecture.embedding_size * work.compute_bytes / (1 if architecture.is_tied else 2)
    # The embedding is gathered in each forward, the head once.
    whole = passes * (linear + experts + table)
    return whole / work.tensor_parallel_degree * (cut - 1) / cut


def reduced_bytes(architecture: Architecture, work: Workload, d: int) -> float:
    """What a rank sends for the adapter's gradients in one step, by the ring algorithm."""
    adapters = adapter_size(architecture, work, work.tensor_parallel_degree)
    return 2 * (d - 1) / d * 4 * adapters


def seconds_sent(size: float, ranks: int, cluster: Cluster) -> float:
    """How long `size` bytes take, sent by every rank of a ring over the first `ranks` GPUs."""
    if size == 0 or ranks <= 1:
        return 0.0
    if ranks > cluster.gpus_per_node:
        # A ring leaves a node once, or, where it is over ranks of equal place, once per place.
        return size / (NETWORK * cluster.network_gbs * 1e9)
    return size / (LINK * cluster.gpu.link_gbs * 1e9)


def _sent_seconds(
    architecture: Architecture, work: Workload, cluster: Cluster, share: float
) -> float:
    degree = work.tensor_parallel_degree
    d = max(1, cluster.world // degree)
    sent: Sequence[Sent] = tensor_parallel_traffic(architecture, work) if degree > 1 else ()
    size = sum(each.wire_bytes(degree) for each in sent)
    if share < 1 and work.has_kl:
        size *= 1 - (1 - share) * 0.25
    seconds = seconds_sent(size, degree, cluster)
    shared = exchanged_bytes(architecture, work, share)
    seconds += seconds_sent(shared, work.context_parallel_degree * degree, cluster)
    ranks = shards(work, d) * degree
    return seconds + seconds_sent(gathered_bytes(architecture, work, d), ranks, cluster)
