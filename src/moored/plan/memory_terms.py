"""What a run holds in a GPU, in the host's memory and on disk: bytes by term, each with its doubt.

The formulas of `docs/parallelism.md`, for any mesh. They follow the code that allocates: `nf4.py`,
`zero.py`, `engine.py` and `head.py`; `benchmarks/plan_accuracy.py` compares them with storages.

Letters: T tokens of a micro-batch, D hidden size, I of the MLP, Q features of the queries, V
vocabulary, v of it on one rank, t tensor-parallel degree, d data-parallel ranks, P parameters of
the adapter on a rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moored.plan.architecture import Architecture, LinearSize
from moored.plan.workload import Workload

GIB = 2**30
BUCKET = 2**26  # bytes of DeepSpeed's buffer of gradients, see `REDUCE_BUCKET` in zero.py
# A process that has opened CUDA holds its context, cuBLAS' workspaces and loaded kernels; NCCL
# holds buffers per group of ranks. Beside torch's own count, and different from driver to driver.
CONTEXT, NCCL = 0.6 * GIB, 0.3 * GIB
FRAGMENTATION = 0.06  # of what is allocated and freed in every step
IMPORTS = 1.0 * GIB  # of the host, per process: torch, transformers, peft, deepspeed
CUDA_HOST = 2.0 * GIB  # likewise: CUDA's libraries and pinned buffers


@dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """One part of a sum.

    Attributes:
        name: what it is.
        bytes: how much.
        within: by which part of it reality may differ.
        why: of what it is made, and where the doubt comes from.
    """

    name: str
    bytes: float
    within: float
    why: str


def total(terms: Sequence[Term]) -> float:
    """Bytes of all."""
    return sum(term.bytes for term in terms)


def doubt(terms: Sequence[Term]) -> float:
    """The part by which the sum may be off, if all terms err to one side."""
    return sum(term.bytes * term.within for term in terms) / max(1.0, total(terms))


def adapter_size(architecture: Architecture, work: Workload, degree: int = 1) -> float:
    """P: parameters of the adapter that one rank of a tensor-parallel group holds."""
    linear = sum(
        _adapter_of(linear, architecture, work, degree)
        for linear in adapted(architecture, work)
    )  # fmt: skip
    here = -(-architecture.num_experts // degree)
    D, I = architecture.hidden_size, architecture.expert_width  # noqa: E741
    sizes = {"gate_up_proj": D + 2 * I, "down_proj": I + D}
    experts = here * work.r * sum(sizes[kind] for kind in adapted_experts(architecture, work))
    return architecture.num_layers * (linear + experts)


def adapted(architecture: Architecture, work: Workload) -> list[LinearSize]:
    """The linear layers of a decoder layer that get an adapter."""
    if work.targets is None:
        return list(architecture.linears)
    return [linear for linear in architecture.linears if linear.name in work.targets]


def adapted_experts(architecture: Architecture, work: Workload) -> list[str]:
    """The projections of experts that get an adapter: where they are named."""
    if not architecture.num_experts or work.targets is None:
        return []
    linear = {each.name for each in architecture.linears}
    names = [name.rpartition(".")[::2] for name in work.targets]
    of_experts = {leaf for place, leaf in names if "experts" in place or leaf not in linear}
    return [kind for kind in ("gate_up_proj", "down_proj") if kind in of_experts]


def _adapter_of(
    linear: LinearSize, architecture: Architecture, work: Workload, degree: int
) -> float:
    inputs = architecture.part(linear.inputs, "rows", linear, degree)
    outputs = architecture.part(linear.outputs, "columns", linear, degree)
    if work.family == "randlora":
        smaller = min(linear.inputs, linear.outputs)
        num_bases = -(-smaller // work.r)
        return num_bases * (work.r + smaller)
    if work.family == "oft":
        return linear.inputs * (work.oft_block_size - 1) / 2
    return work.r * (inputs + outputs) + (outputs if work.family == "dora" else 0)


def chunk_rows(architecture: Architecture, work: Workload, *, on_gpu: bool = True) -> int:
    """C: rows of logits at a time, as `default_chunk_tokens` says."""
    columns = max(1, architecture.vocab_size // work.tensor_parallel_degree)
    size, multiple, least = (2**27, 128, 64) if on_gpu else (2**24, 16, 256)
    return max(1, min(work.tokens, max(least, min(4096, size // columns // multiple * multiple))))


# ---------------------------------------------------------------- held all the time


def held(architecture: Architecture, work: Workload, world: int) -> list[Term]:
    """What one process holds from loading to the end: the base, and what is trained."""
    t = work.tensor_parallel_degree
    d = world // t
    cut = shards(work, d)
    adapters = adapter_size(architecture, work, t)
    terms = [_base(architecture, work, t, cut)]
    if architecture.num_experts:
        terms.append(_experts(architecture, work, t, cut))
    words = architecture.embedding_size * work.compute_bytes / t / cut
    if architecture.other_size:
        words += architecture.other_size * work.compute_bytes
    which = "one table, tied" if architecture.is_tied else "two tables"
    terms.append(
        Term(name="embedding, head, norms", bytes=words, within=0.02,
             why=f"{which}, {work.compute_bytes * 8} bits")
    )  # fmt: skip
    state = 8 * adapters if work.zero_stage == 0 else 12 * adapters / d
    if work.offload:
        state = 0.0
    gradients = 4.0
    why = "fp32: parameters, gradients, Adam's two moments"
    if work.zero_stage >= 2:
        gradients = 4 / d
        why = "fp32: parameters; gradients, masters and moments over the data-parallel ranks"
    elif work.zero_stage == 1:
        why = "fp32: parameters, gradients; masters and moments over the data-parallel ranks"
    if work.offload:
        why += "; the optimizer's in the host's memory"
    terms.append(
        Term(name="adapter", bytes=(4 + gradients) * adapters + state,
             within=0.03 if work.family == "lora" else 0.2, why=why)
    )  # fmt: skip
    return terms


def shards(work: Workload, d: int) -> int:
    """Ranks over which the base is cut: by ZeRO-3 those of data parallelism, or of a part of it."""
    return min(d, work.zero_hpz_partition_size or d) if work.zero_stage == 3 else 1


def _bits(work: Workload, *, whole: bool = False) -> float:
    """Bits of a parameter of the quantised base, with its share of the scales."""
    # Of a slice the scales are those of the whole, cut in fp32; experts are held whole.
    nested = work.double_quantization and (whole or work.tensor_parallel_degree == 1)
    return 4 + (8 / 64 + 32 / (64 * 256) if nested else 32 / 64)


def _base(architecture: Architecture, work: Workload, t: int, cut: int) -> Term:
    size = architecture.linear_size / t
    if not work.nf4:
        return Term(name="base", bytes=size * work.compute_bytes / cut, within=0.02,
                    why=f"linear layers in {work.compute_bytes * 8} bits")  # fmt: skip
    bits = _bits(work)
    scales = (bits - 4) / 8 * size  # kept whole on every rank under ZeRO-3
    why = f"linear layers in NF4, {bits:.2f} bits a parameter"
    if t > 1 and bits == 4.5 and work.double_quantization:
        why += " (scales of the whole, in fp32: the same base on every mesh)"
    if cut > 1:
        why += "; scales whole on every rank"
    return Term(name="base", bytes=size / 2 / cut + scales, within=0.01, why=why)


def _experts(architecture: Architecture, work: Workload, t: int, cut: int) -> Term:
    size = architecture.num_layers * architecture.experts_of(t)
    if not work.nf4:
        return Term(name="experts", bytes=size * work.compute_bytes / cut, within=0.02,
                    why=f"in {work.compute_bytes * 8} bits")  # fmt: skip
    bits = _bits(work, whole=True)
    scales = (bits - 4) / 8 * size
    why = f"in NF4, {bits:.2f} bits a parameter" + ", whole experts" * (t > 1)
    return Term(name="experts", bytes=size / 2 / cut + scales, within=0.02, why=why)


# ---------------------------------------------------------------- of a step


def of_a_step(
    architecture: Architecture, work: Workload, world: int, *, on_gpu: bool = True
) -> list[Term]:
    """What a step takes above that: activations kept, the work at its peak, buffers."""
    t = work.tensor_parallel_degree
    d = world // t
    b, T, D = work.compute_bytes, work.tokens, architecture.hidden_size
    again = work.recomputed(architecture.num_layers)
    by_token = t if work.sequence_parallel else 1
    # Tokens are dealt out within the first layer, which is called with all of them.
    inputs = b * T * D * ((again - 1) / by_token + 1 if again else 0)
    wide = 6 * architecture.query_size + 8 * architecture.mlp_size
    whole = (architecture.num_layers - again) * T * (12 * D + wide / t) * b / 2
    named = f"inputs of {again} layers" + (
        f", all of {architecture.num_layers - again}" * (whole > 0)
    )
    terms = [Term(name="checkpoints", bytes=inputs + whole, within=0.03 if not whole else 0.1,
                  why=f"{named}, {T:,} tokens")]  # fmt: skip
    head, layer = _head(architecture, work, on_gpu=on_gpu), _layer(architecture, work)
    largest, what = (head, "the head's chunk") if head >= layer else (layer, "a layer's backward")
    terms.append(
        Term(name="at work", bytes=largest, within=0.1,
             why=f"{what} (head {head / GIB:.2f}, layer {layer / GIB:.2f} GiB)")
    )  # fmt: skip
    if work.zero_stage and d > 1:
        size, why = float(BUCKET), "DeepSpeed's bucket of gradients"
        if work.zero_stage == 3:
            per_layer = architecture.linear_size / architecture.num_layers / t
            per_layer += architecture.experts_of(t)
            size += 2 * per_layer * (0.5 if work.nf4 else work.compute_bytes)
            why += ", two gathered layers (one at work, one ahead)"
        terms.append(Term(name="ZeRO's buffers", bytes=size, within=0.5, why=why))
    return terms


def _head(architecture: Architecture, work: Workload, *, on_gpu: bool) -> float:
    """Logits of a chunk, hidden states and their gradient."""
    both = work.has_kl and not work.selects_targets  # else one model's logits at a time
    T, D = work.tokens, architecture.hidden_size
    v = architecture.vocab_size / work.tensor_parallel_degree
    chunk = chunk_rows(architecture, work, on_gpu=on_gpu)
    gathered = work.compute_bytes * v * D if work.zero_stage == 3 else 0
    if not on_gpu or work.compute_bytes == 4:
        # fp32 logits of each model; hidden states, their gradient and what is made of them.
        return (2 if both else 1) * 4 * chunk * v + (22 if both else 16) * T * D + gathered
    # Logits of each model in fp32 and their gradient in fp16; the weight in fp16; hidden states.
    return (10 if both else 6) * chunk * v + 2 * v * D + (16 if both else 12) * T * D + gathered


def _layer(architecture: Architecture, work: Workload) -> float:
    """The backward of one layer that is computed again, and its largest decoded weight."""
    t, T = work.tensor_parallel_degree, work.tokens
    D, Q, I = architecture.hidden_size, architecture.query_size, architecture.mlp_size  # noqa: E741
    wide = (6 * Q + 12 * I) / t
    size = T * (12 * D + wide) * work.compute_bytes / 2
    if work.nf4:
        largest = max(linear.size for linear in architecture.linears) / t
        size += work.compute_bytes * max(largest, 2 * D * architecture.expert_width)
    if architecture.num_experts:
        # A row for each expert of a token: its output, and three such in fp32 around the sum.
        size += T * architecture.experts_per_token * D * (work.compute_bytes + 12) / t
    if work.eager_attention or architecture.eager:
        rows, heads = work.micro_batch_size, architecture.num_heads / t
        size += rows * heads * work.max_length**2 * (8 + work.compute_bytes)
    if work.family in ("dora", "sinelora", "randlora"):
        # The adapter's product, whole and in fp32, its gradient, and what is made of it.
        size += 12 * max(linear.size for linear in architecture.linears) / t
    if work.family == "oft":
        # The inputs of every adapted layer in fp32, and as they enter the rotation and leave it.
        inputs = sum(linear.inputs for linear in adapted(architecture, work))
        size += T * inputs * (4 + 2 * work.compute_bytes)
    return size


def beside_torch(work: Workload, world: int, terms: Sequence[Term]) -> list[Term]:
    """What nobody's count of tensors shows: CUDA's context, NCCL's buffers, holes."""
    groups = (world > 1) + (work.tensor_parallel_degree > 1)
    step = sum(t.bytes for t in terms if t.name in ("checkpoints", "at work", "ZeRO's buffers"))
    why = "cuBLAS, kernels" + (", NCCL's buffers" if groups else "") + "; differs between drivers"
    return [
        Term(name="CUDA's context", bytes=CONTEXT + NCCL * groups, within=0.4, why=why),
        Term(name="fragmentation", bytes=FRAGMENTATION * step, within=1.0,
             why=f"{FRAGMENTATION:.0%} of what comes and goes in a step; supposed"),
    ]  # fmt: skip


def gpu_memory(architecture: Architecture, work: Workload, world: int) -> list[Term]:
    """All that one GPU must have."""
    terms = [*held(architecture, work, world), *of_a_step(architecture, work, world)]
    return [*terms, *beside_torch(work, world, terms)]


def torch_peak(architecture: Architecture, work: Workload, world: int = 1) -> float:
    """What torch counts as allocated at most, as `perf/peak_memory_bytes` and reports show it."""
    return total([*held(architecture, work, world), *of_a_step(architecture, work, world)])


# ---------------------------------------------------------------- host and disk


def host_memory(architecture: Architecture, work: Workload, gpus_per_node: int) -> list[Term]:
    """What a node needs of its own memory while the base is loaded."""
    t = work.tensor_parallel_degree
    widest = max(
        architecture.vocab_size * architecture.hidden_size,
        max(linear.size for linear in architecture.linears),
        # One expert's matrix at a time where they are packed, else those of a layer.
        architecture.expert_size // (3 * max(1, architecture.num_experts) if work.nf4 else 3),
    )
    terms = [
        Term(name="processes", bytes=(IMPORTS + CUDA_HOST) * gpus_per_node, within=0.4,
             why=f"{gpus_per_node} x torch, CUDA and the libraries around them"),
        Term(name="one tensor each", bytes=widest / t * architecture.stored_bytes * gpus_per_node,
             within=0.5, why="the largest of the files, as it is read"),
    ]  # fmt: skip
    if work.offload:
        size = 12 * adapter_size(architecture, work, t) * t
        terms.append(Term(name="optimizer", bytes=size, within=0.1, why="offloaded, of one node"))
    return terms


def on_disk(architecture: Architecture, work: Workload, targets_per_step: float) -> list[Term]:
    """What lies in files: the model, what is kept of it, checkpoints, hidden states."""
    whole = adapter_size(architecture, work)
    checkpoint = 16 * whole
    files = architecture.num_parameters * architecture.stored_bytes
    terms = [
        Term(name="the model's files", bytes=files, within=0.02,
             why="in the hub's cache or your folder; again in storage.scratch, if set"),
        Term(name="checkpoints", bytes=checkpoint * (work.keep_checkpoints + 1), within=0.05,
             why=f"{work.keep_checkpoints} kept and one being written, "
                 f"{checkpoint / 1e9:.2f} GB each: adapter, masters, moments"),
        Term(name="the adapter", bytes=4 * whole, within=0.02, why="fp32, the result"),
    ]  # fmt: skip
    if work.cache_quantized and work.nf4:
        linear = architecture.linear_size * _bits(work) / 8
        linear += architecture.num_layers * architecture.expert_size * _bits(work, whole=True) / 8
        size = linear + architecture.embedding_size * work.compute_bytes
        terms.append(
            Term(name="quantised base", bytes=size, within=0.1, why="model.cache_quantized")
        )
    if work.cached_reference and work.steps is not None:
        epochs = max(1.0, work.epochs or 1.0) if work.cached_by_sample else 1.0
        tokens = targets_per_step * work.steps / epochs
        size = tokens * architecture.hidden_size * work.compute_bytes
        terms.append(
            Term(name="reference cache", bytes=size, within=0.5,
                 why="final hidden states of every position"
                 + ("" if work.holds_prompt else " that is learned"))
        )  # fmt: skip
    return terms
