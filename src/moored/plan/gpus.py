"""What GPUs hold and how fast they are, by the manufacturers' own figures; and clusters of them.

Nothing here is measured: how much of these figures a step reaches is `step_time.py`'s.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from moored.plan.calibration import Calibration
from moored.utils.errors import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuFacts:
    """One kind of GPU.

    Attributes:
        name: as `--gpus` takes it.
        title: as people say it.
        memory_gb: as sold, in 10^9 bytes; drivers and error correction take a few percent of it,
            or show that a few percent more are there.
        bf16_tflops: dense bf16 products with fp32 sums, 10^12 operations per second.
        bandwidth_gbs: of its memory, 10^9 bytes per second.
        link_gbs: to the other GPUs of a node, in each direction, 10^9 bytes per second.
        link: what that is.
        source: the manufacturer's document.
    """

    name: str
    title: str
    memory_gb: float
    bf16_tflops: float
    bandwidth_gbs: float
    link_gbs: float
    link: str
    source: str

    @property
    def memory_bytes(self) -> float:
        """All of it."""
        return self.memory_gb * 1e9


_PCIE4, _PCIE5 = "PCIe 4.0 x16", "PCIe 5.0 x16"
_AMPERE = "NVIDIA A100 Tensor Core GPU datasheet"
_HOPPER = "NVIDIA H100 Tensor Core GPU datasheet"
# Data sheets that give a rate "with sparsity" have it halved here.
GPUS = {
    facts.name: facts
    for facts in (
        GpuFacts(
            name="a100-40gb", title="A100 40 GB", memory_gb=40, bf16_tflops=312,
            bandwidth_gbs=1555, link_gbs=300, link="NVLink 3", source=_AMPERE,
        ),
        GpuFacts(
            name="a100-80gb", title="A100 80 GB", memory_gb=80, bf16_tflops=312,
            bandwidth_gbs=2039, link_gbs=300, link="NVLink 3", source=_AMPERE,
        ),
        GpuFacts(
            name="h100-80gb", title="H100 80 GB (SXM)", memory_gb=80, bf16_tflops=989,
            bandwidth_gbs=3350, link_gbs=450, link="NVLink 4", source=_HOPPER,
        ),
        GpuFacts(
            name="h100-pcie-80gb", title="H100 80 GB (PCIe)", memory_gb=80, bf16_tflops=756,
            bandwidth_gbs=2000, link_gbs=64, link=_PCIE5,
            source="NVIDIA H100 Tensor Core GPU datasheet, PCIe column of its first edition",
        ),
        GpuFacts(
            name="h200-141gb", title="H200 141 GB", memory_gb=141, bf16_tflops=989,
            bandwidth_gbs=4800, link_gbs=450, link="NVLink 4",
            source="NVIDIA H200 Tensor Core GPU datasheet",
        ),
        GpuFacts(
            name="b200-180gb", title="B200 180 GB", memory_gb=180, bf16_tflops=2250,
            bandwidth_gbs=8000, link_gbs=900, link="NVLink 5",
            source="NVIDIA DGX B200 datasheet, an eighth of it",
        ),
        GpuFacts(
            name="l40s-48gb", title="L40S 48 GB", memory_gb=48, bf16_tflops=362,
            bandwidth_gbs=864, link_gbs=32, link=_PCIE4, source="NVIDIA L40S GPU datasheet",
        ),
        GpuFacts(
            name="l4-24gb", title="L4 24 GB", memory_gb=24, bf16_tflops=121,
            bandwidth_gbs=300, link_gbs=32, link=_PCIE4,
            source="NVIDIA L4 Tensor Core GPU datasheet",
        ),
        GpuFacts(
            name="rtx3090-24gb", title="GeForce RTX 3090", memory_gb=24, bf16_tflops=71,
            bandwidth_gbs=936, link_gbs=32, link=_PCIE4,
            source="NVIDIA Ampere GA102 GPU Architecture whitepaper",
        ),
        GpuFacts(
            name="rtx4090-24gb", title="GeForce RTX 4090", memory_gb=24, bf16_tflops=165.2,
            bandwidth_gbs=1008, link_gbs=32, link=_PCIE4,
            source="NVIDIA Ada GPU Architecture whitepaper",
        ),
        GpuFacts(
            name="rtx5090-32gb", title="GeForce RTX 5090", memory_gb=32, bf16_tflops=209.5,
            bandwidth_gbs=1792, link_gbs=64, link=_PCIE5,
            source="NVIDIA RTX Blackwell GPU Architecture whitepaper",
        ),
        GpuFacts(
            name="mi300x-192gb", title="MI300X 192 GB", memory_gb=192, bf16_tflops=1307.4,
            bandwidth_gbs=5300, link_gbs=64, link="Infinity Fabric, per link",
            source="AMD Instinct MI300X Accelerator data sheet",
        ),
    )
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """Equal nodes with equal GPUs.

    Attributes:
        gpu: of which kind.
        gpus_per_node: how many in each.
        nodes: how many.
        network_gbs: between nodes, of a whole node and in each direction, 10^9 bytes per second;
            an assumption, 200 Gbit/s, since no document says what a site has.
        calibration: what a probe measured there; None: nothing.
    """

    gpu: GpuFacts
    gpus_per_node: int
    nodes: int = 1
    network_gbs: float = 25.0
    calibration: Calibration | None = None

    @property
    def world(self) -> int:
        """All GPUs, one process each."""
        return self.gpus_per_node * self.nodes

    def __str__(self) -> str:
        nodes = f"{self.nodes} nodes of " if self.nodes > 1 else ""
        return f"{nodes}{self.gpus_per_node}x{self.gpu.name}"


def gpu_named(name: str) -> GpuFacts:
    """The facts of a GPU by its name, `h100-80gb`, or short of its memory where only one has it.

    Raises:
        UserError: it is not known, or there are several of that name; the line lists the known.
    """
    wanted = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-").removeprefix("nvidia-")
    if wanted in GPUS:
        return GPUS[wanted]
    short = [known for known in GPUS if known.rpartition("-")[0] == wanted]
    if len(short) == 1:
        return GPUS[short[0]]
    flat = wanted.replace("-", "").removeprefix("geforce")
    same = [known for known in GPUS if known.replace("-", "") in (flat, f"{flat}gb")]
    same += [k for k in GPUS if k.rpartition("-")[0].replace("-", "") == flat]
    if len(set(same)) == 1:
        return GPUS[same[0]]
    if short or same:
        which = " or ".join(sorted({*short, *same}))
        raise UserError(f"GPU {name}: there are several of that name: say {which}")
    near = difflib.get_close_matches(wanted, GPUS, 1, 0.7)
    hint = f"did you mean {near[0]}? " if near else ""
    raise UserError(f"GPU {name} is not known: {hint}there are {', '.join(GPUS)}")


def gpu_of_device(device: str, memory_bytes: int) -> GpuFacts | None:
    """The facts of a device as its driver names it, `NVIDIA H100 80GB HBM3`; None: not known.

    Args:
        device: the name.
        memory_bytes: what it has.
    """
    words = set(re.findall(r"[a-z0-9]+", device.lower()))
    flat = "".join(re.findall(r"[a-z0-9]+", device.lower()))
    for facts in sorted(GPUS.values(), key=lambda facts: -len(facts.name)):
        kind = facts.name.rpartition("-")[0]
        is_named = set(kind.split("-")) <= words or (kind.startswith("rtx") and kind in flat)
        if is_named and 0.85 < memory_bytes / facts.memory_bytes < 1.15:
            return facts
    return None


def cluster_of(text: str, nodes: int = 1) -> Cluster:
    """Read `8xh100-80gb`: how many GPUs of which kind each node has.

    Raises:
        UserError: that is not what it says, or the GPU is not known.
    """
    match = re.fullmatch(r"\s*(\d{1,5})\s*[x*]\s*([A-Za-z].*)", text)
    if match is None or int(match[1]) == 0:
        example = "write COUNTxNAME, such as 8xh100-80gb or 1xrtx4090-24gb"
        raise UserError(f"--gpus {text}: {example}; the names are {', '.join(GPUS)}")
    return Cluster(gpu=gpu_named(match[2].strip()), gpus_per_node=int(match[1]), nodes=nodes)
