"""Which rank holds which rows and columns of which layer: a pure function of model and degree.

The styles come from the architecture's own plan (`base_model_tp_plan` of its Hugging Face config).
Nothing here is sent, loaded or hooked.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from moored.models.experts import experts_of
from moored.models.nf4 import BLOCK as NF4_BLOCK
from moored.utils.errors import UserError

_PER_TOKEN = re.compile(r"Norm|Dropout|Identity|Activation|GELU|SiLU|ReLU")
Style = Literal["column", "row", "gathered", "split", "vocabulary", "experts"]
# The plan's words for the styles. A norm of each head by itself acts on any share of the heads.
_STYLES: Mapping[str, Style | None] = {
    "colwise": "column",
    "rowwise": "row",
    "colwise_gather_output": "gathered",
    "rowwise_split_input": "split",
    "replicated_with_grad_allreduce": None,
}


@dataclass(frozen=True, slots=True)
class Split:
    """How one dimension is dealt out.

    Attributes:
        dim: of the weight: 0 its rows (output features), 1 its columns (input features).
        bounds: rank i holds [bounds[i], bounds[i + 1]).
    """

    dim: int
    bounds: tuple[int, ...]

    @staticmethod
    def even(dim: int, size: int, unit: int, degree: int) -> Split:
        """Deal whole units as evenly as they go; the first ranks get one more."""
        num_units = size // unit
        per_rank, more = divmod(num_units, degree)
        counts = [per_rank + (rank < more) for rank in range(degree)]
        return Split(dim, tuple(unit * sum(counts[:rank]) for rank in range(degree + 1)))

    @property
    def whole(self) -> int:
        """Length of the undivided dimension."""
        return self.bounds[-1]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Each rank's length."""
        return tuple(b - a for a, b in zip(self.bounds, self.bounds[1:], strict=False))

    def range_of(self, rank: int) -> tuple[int, int]:
        """What `rank` holds: [start, stop)."""
        return self.bounds[rank], self.bounds[rank + 1]


@dataclass(frozen=True, slots=True)
class Sharded:
    """A layer that is spread over the ranks.

    Attributes:
        style: `column`: rows of the weight, the output stays apart. `row`: columns of the weight,
            the outputs are summed. `gathered`: `column` with the output joined again. `split`:
            `row` whose input is whole and is cut first. `vocabulary`: rows of an embedding or head.
            `experts`: whole experts of a layer, whose outputs are summed.
        split: of the weight; of `experts` along the first of its three dimensions.
    """

    style: Style
    split: Split

    @property
    def sums_output(self) -> bool:
        """Whether each rank has but its share of the sum that is the output."""
        return self.style in ("row", "split")


@dataclass(frozen=True, slots=True)
class ShardLayout:
    """The whole of it.

    Attributes:
        degree: ranks that share the model.
        layers: sharded layers by the path of their module.
        regions: modules whose input is the same on every rank, and whose layers share it: the
            parents of the sharded layers.
        stack: path of the list of decoder layers.
        blocks: modules with a router and its experts, which sequence parallelism shows all tokens.
    """

    degree: int
    layers: Mapping[str, Sharded] = field(default_factory=dict[str, Sharded])
    regions: tuple[str, ...] = ()
    stack: str = ""
    blocks: tuple[str, ...] = ()

    def in_block(self, path: str) -> bool:
        """Whether a module lies beside experts, or is those."""
        return any(path.startswith(f"{block}.") for block in self.blocks)

    def of_parameter(self, name: str) -> Split | None:
        """How a parameter of the base is dealt out; None where every rank holds all of it."""
        path, _, kind = name.rpartition(".")
        layer = self.layers.get(path)
        if layer is None or (kind == "bias" and layer.split.dim == 1):
            return None
        return layer.split


def layout_of(causal_lm: Any, degree: int, *, in_blocks: bool) -> ShardLayout:
    """The layout of a Hugging Face causal language model, by its architecture's own plan.

    Heads are dealt out in whole key/value groups, the columns of 4-bit layers in whole blocks, and
    experts whole; what does not divide is dealt out unevenly.

    Args:
        causal_lm: the model, whose layers still have their whole sizes; it may be on `meta`.
        degree: ranks that share it.
        in_blocks: whether the linear layers are held in NF4.

    Raises:
        UserError: the architecture carries no plan, or one that cannot be followed exactly.
    """
    model = _Model(causal_lm, degree, in_blocks)
    plan = model.plan()
    regions: dict[str, dict[str, Style]] = defaultdict(dict)
    for path in model.linear:
        style = _STYLES.get(plan.get(_pattern(path), ""))
        if style is not None:
            regions[path.rpartition(".")[0]][path] = style
    groups: list[_Group] = []
    for parent, members in regions.items():
        model.require_region(parent, members, plan)
        groups += model.groups_of(parent, members)
    if groups and min(group.num_units for group in groups) < degree:
        raise model.too_many_ranks(min(groups, key=lambda group: group.num_units))
    model.require_experts()
    layers = {path: layer for group in groups for path, layer in group.dealt(degree).items()}
    for module in (causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings()):
        path = next(p for p, m in causal_lm.named_modules() if m is module)
        layers[path] = Sharded("vocabulary", Split.even(0, module.weight.shape[0], 1, degree))
    for path, experts in model.experts.items():
        layers[path] = Sharded("experts", Split.even(0, experts.num_experts, 1, degree))
    blocks = tuple(path.rpartition(".")[0] for path in model.experts)
    stacks = {_pattern(parent).split(".*")[0] for parent in regions}
    if len(stacks) != 1:
        raise model.refusal(f"its layers are in {len(stacks)} stacks, not in one")
    return ShardLayout(degree, layers, tuple(regions), stacks.pop(), blocks)


def why_not_by_tokens(causal_lm: nn.Module, layout: ShardLayout) -> str | None:
    """Why there is no sequence parallelism: a layer has parts that may mix tokens. None: there is.

    Such a part is neither a region nor known to work on each token by itself.
    """
    stack: Any = causal_lm.get_submodule(layout.stack)
    if alone := [block for block in layout.blocks if block.rpartition(".")[0] == layout.stack]:
        return f"{alone[0]} has experts beside its attention, not in a part of their own"
    for index, layer in enumerate(stack):
        for name, part in layer.named_modules():
            path = f"{layout.stack}.{index}.{name}"
            if path in layout.blocks or layout.in_block(path):
                continue
            within = any(f"{path}.".startswith(f"{region}.") for region in layout.regions)
            around = any(region.startswith(f"{path}.") for region in layout.regions)
            if not name or within or around or _PER_TOKEN.search(type(part).__name__):
                continue
            return (
                f"{path} ({type(part).__name__}) is not in its architecture's plan, and may look "
                "at more than one token"
            )
    return None


def _pattern(path: str) -> str:
    return re.sub(r"\.\d+(?=\.|$)", ".*", path)


@dataclass(frozen=True, slots=True)
class _Group:
    """Layers of one region that are cut at the same units.

    Attributes:
        parent: path of the region.
        styles: of the layers, by path.
        widths: of the dimension that is cut.
        num_units: into how many equal units each width may be cut at most.
        what: they are, for people.
    """

    parent: str
    styles: Mapping[str, Style]
    widths: Mapping[str, int]
    num_units: int
    what: str

    def dealt(self, degree: int) -> dict[str, Sharded]:
        """The layers with their splits."""
        layers: dict[str, Sharded] = {}
        for path, width in self.widths.items():
            dim = 1 if self.styles[path] in ("row", "split") else 0
            split = Split.even(dim, width, width // self.num_units, degree)
            layers[path] = Sharded(self.styles[path], split)
        return layers


class _Model:
    """The questions that the layout asks of a model."""

    def __init__(self, causal_lm: Any, degree: int, in_blocks: bool):
        self.causal_lm, self.degree, self.in_blocks = causal_lm, degree, in_blocks
        head = causal_lm.get_output_embeddings()
        self.linear: dict[str, nn.Linear] = {
            path: module
            for path, module in causal_lm.named_modules()
            if isinstance(module, nn.Linear) and module is not head
        }
        self.experts: dict[str, Any] = experts_of(causal_lm)

    def refusal(self, why: str, remedy: str = "") -> UserError:
        remedy = remedy or "set it to 1 and use parallel.zero_stage 3 to spread the base"
        name = type(self.causal_lm).__name__
        return UserError(f"parallel.tensor_parallel_degree={self.degree}: {name}: {why}: {remedy}")

    def plan(self) -> dict[str, str]:
        """The architecture's plan by pattern of module paths, as seen from the whole model."""
        prefix = self.causal_lm.base_model_prefix
        backbone: Any = getattr(self.causal_lm, prefix, None)
        config = getattr(backbone, "config", None)
        own: dict[str, str] = getattr(config, "base_model_tp_plan", None) or {}
        if not own:
            raise self.refusal("the architecture carries no tensor-parallel plan in transformers")
        plan = {f"{prefix}.{pattern}": style for pattern, style in own.items()}
        present = {_pattern(path) for path, _ in self.causal_lm.named_modules()}
        present |= {_pattern(path) for path, _ in self.causal_lm.named_parameters()}
        experts = {_pattern(path) for path in self.experts}
        for pattern, style in plan.items():
            if {pattern, pattern.rpartition(".")[0]} & experts:
                continue  # dealt out whole, see `require_experts`
            if pattern in present and style not in _STYLES and "embed" not in pattern:
                raise self.refusal(f"its plan splits {pattern} by {style}, which is not known here")
        return plan

    def require_experts(self) -> None:
        """As many experts as ranks: their matrices are not cut.

        A cut through each would have to be at whole blocks of both projections, decode a part of
        every expert on every rank and, under double quantisation, hold the scales in fp32. Whole
        ones are as they are on one rank, bit for bit.
        """
        few = min((experts.num_experts for experts in self.experts.values()), default=self.degree)
        if few < self.degree:
            raise self.refusal(
                f"its layers have {few} experts, which are dealt out whole",
                f"set it to {few} or less" if few > 1 else "",
            )

    def require_region(
        self, parent: str, members: Mapping[str, Style], plan: Mapping[str, str]
    ) -> None:
        """Everything in a region follows the plan, and one of its layers joins what is split."""
        whole = "gathered" in members.values()  # beside what is joined before it is used
        for name, parameter in self.causal_lm.get_submodule(parent).named_parameters(parent):
            path = name.rpartition(".")[0]
            if path not in members and not whole and _pattern(path) not in plan:
                raise self.refusal(
                    f"{name} {tuple(parameter.shape)} is not in its plan, beside "
                    f"{next(iter(members))}"
                )
        if not {"row", "split"} & set(members.values()):
            raise self.refusal(f"nothing in {parent} joins what its plan splits")

    def groups_of(self, parent: str, members: Mapping[str, Style]) -> list[_Group]:
        """Column and row layers of one parent share their units; joined ones stand alone."""
        together = [path for path, style in members.items() if style in ("column", "row")]
        groups = [together] if together else []
        groups += [[path] for path in members if path not in together]
        found: list[_Group] = []
        for paths in groups:
            widths = {path: self._width(path, members) for path in paths}
            num_units = math.gcd(*widths.values())
            what = f"{num_units} columns"
            if paths is together and re.search("attn|attention", parent.rpartition(".")[2]):
                num_units = self._num_heads(parent, num_units)
                what = f"{num_units} key/value heads"
            aligned = self._aligned(num_units, paths, members)
            found.append(_Group(parent, {p: members[p] for p in paths}, widths, aligned, what))
        return found

    def too_many_ranks(self, group: _Group) -> UserError:
        """The refusal of a degree that one group cannot be dealt out to."""
        most = max(group.num_units, 1)
        blocks = f" in whole NF4 blocks of {NF4_BLOCK}" if self.in_blocks else ""
        return self.refusal(
            f"{group.parent} has {group.what}, which{blocks} can be dealt to {most} rank"
            f"{'s' if most > 1 else ''} at most",
            f"set it to {most} or less" if most > 1 else "",
        )

    def _num_heads(self, parent: str, common_width: int) -> int:
        """Key/value heads: the common width of all projections of an attention, in heads."""
        attention = self.causal_lm.get_submodule(parent)
        sizes = (getattr(attention, name, None) for name in ("head_dim", "head_size"))
        head_dim = next((size for size in sizes if isinstance(size, int) and size > 0), None)
        if head_dim is None or common_width % head_dim:
            raise self.refusal(f"{parent} does not say of what size its heads are")
        return common_width // head_dim

    def _width(self, path: str, members: Mapping[str, Style]) -> int:
        layer = self.linear[path]
        return layer.in_features if members[path] in ("row", "split") else layer.out_features

    def _aligned(self, num_units: int, paths: Sequence[str], members: Mapping[str, Style]) -> int:
        """The finest units, as few of the given as needed joined, that begin at whole blocks."""
        if not self.in_blocks:
            return num_units
        for joined in range(1, num_units + 1):
            if num_units % joined == 0 and all(
                self._begins_at_blocks(path, members, num_units // joined) for path in paths
            ):
                return num_units // joined
        return 0

    def _begins_at_blocks(self, path: str, members: Mapping[str, Style], num_units: int) -> bool:
        unit, columns = self._width(path, members) // num_units, self.linear[path].in_features
        if members[path] in ("row", "split"):
            return unit % NF4_BLOCK == 0 and columns % NF4_BLOCK == 0
        return unit * columns % NF4_BLOCK == 0
