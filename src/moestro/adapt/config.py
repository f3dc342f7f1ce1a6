"""Configs of adapters. `adapt.attach.attach(model, config)` puts them into a model."""

from __future__ import annotations

from typing import Literal

from ..core.config import Config, config
from ..core.errors import UserError
from ..routers.config import Renormalised, Router, TopK

RouterPolicy = Literal["train", "freeze", "bias_only"]

SHAPES: dict[str, tuple[int, ...]] = {  # shares of four groups of layers, from the bottom
    "triangle-down": (2, 4, 6, 8),
    "triangle-up": (8, 6, 4, 2),
    "hourglass": (8, 2, 2, 8),
    "rectangle": (1, 1, 1, 1),
    "middle": (2, 8, 8, 2),
    "triangle": (8, 6, 4, 2),  # the paper's words for the first two
    "inverted": (2, 4, 6, 8),
}

Shape = Literal["triangle-down", "triangle-up", "hourglass", "rectangle", "middle", "triangle", "inverted"]


@config
class Allocation(Config):
    """Base of allocations: how many adapters every layer has, how many a token chooses, and of what rank."""

    def of(self, layer: int, layers: int) -> tuple[int, int, int]:
        """(experts, top_k, rank) of layer number `layer` of `layers`, from the bottom."""
        raise NotImplementedError


@config
class LayerAllocation(Allocation):
    """Experts, choices and rank of the adapters in every layer; one number stands for all layers (MoLA)."""

    experts: tuple[int, ...] = (5,)
    """LoRA experts of each layer, from the bottom."""
    top_k: tuple[int, ...] = (2,)
    """Experts that a token chooses in each layer."""
    rank: tuple[int, ...] = (8,)
    """Rank of the experts of each layer."""

    def __post_init__(self) -> None:
        lengths = {len(v) for v in (self.experts, self.top_k, self.rank)}
        if 0 in lengths or len(lengths - {1}) > 1:
            raise UserError(
                f"LayerAllocation: experts, top_k and rank speak of {len(self.experts)}, {len(self.top_k)} and "
                f"{len(self.rank)} layers; give each one number, or one per layer"
            )
        for j in range(max(lengths)):
            experts, k, rank = self.of(j, max(lengths))
            if not (1 <= k <= experts and rank >= 1):
                raise UserError(
                    f"LayerAllocation: layer {j} has {experts} experts, {k} choices and rank {rank}; "
                    "a token chooses between 1 and all of the experts, and ranks start at 1"
                )

    def of(self, layer: int, layers: int) -> tuple[int, int, int]:
        """(experts, top_k, rank) of layer number `layer` of `layers`."""
        out: list[int] = []
        for name in ("experts", "top_k", "rank"):
            values: tuple[int, ...] = getattr(self, name)
            if len(values) not in (1, layers):
                raise UserError(
                    f"LayerAllocation.{name}: {len(values)} numbers for {layers} adapted layers; give one per layer"
                )
            out.append(values[layer if len(values) > 1 else 0])
        return out[0], out[1], out[2]


def allocation(shape: str, layers: int, total: int, *, top_k: int = 2, rank: int = 8) -> LayerAllocation:
    """A published shape by name, scaled to `total` experts over `layers` layers in four groups from bottom to top.

    Where the shares are no whole numbers, the largest fractions are rounded up, so that the total is exact. Raises
    `UserError` for an unknown name and for a budget that leaves a layer fewer experts than choices.
    Source: MoLA, arXiv 2402.08562 (2-4-6-8 for 32 layers and 160 experts); "middle", which its later version favours in
    words, is the hourglass the other way round.
    """
    if shape not in SHAPES:
        raise UserError(f"unknown allocation {shape!r}; known: {', '.join(SHAPES)}")
    if layers < 1:
        raise UserError(f"allocation: {layers} layers; there must be at least one")
    weight = [SHAPES[shape][4 * j // layers] for j in range(layers)]
    exact = [total * w / sum(weight) for w in weight]
    counts = [int(e) for e in exact]
    by_rest = sorted(range(layers), key=lambda j: (counts[j] - exact[j], j))
    for j in by_rest[: total - sum(counts)]:
        counts[j] += 1
    if min(counts) < top_k:
        raise UserError(
            f"allocation {shape!r}: {total} experts over {layers} layers leave a layer with {min(counts)}, fewer than "
            f"top_k {top_k}; raise the total, or lower top_k"
        )
    return LayerAllocation(experts=tuple(counts), top_k=(top_k,), rank=(rank,))


@config
class ShapedAllocation(Allocation):
    """A published shape by name, for as many layers as are adapted (`allocation`)."""

    shape: Shape = "triangle-down"
    """Where the experts are: triangle-down has most at the top, middle in between, rectangle as many everywhere."""
    total: int = 0
    """Experts of all layers together; 0 = five per layer, as published."""
    top_k: int = 2
    """Experts that a token chooses in each layer."""
    rank: int = 8
    """Rank of the experts."""

    def __post_init__(self) -> None:
        self.at_least(0, "total")
        self.at_least(1, "top_k", "rank")

    def of(self, layer: int, layers: int) -> tuple[int, int, int]:
        made = allocation(self.shape, layers, self.total or 5 * layers, top_k=self.top_k, rank=self.rank)
        return made.of(layer, layers)


@config
class Adapter(Config):
    """Base of adapters: what is put into a model whose own weights stay as they are."""

    targets: tuple[str, ...] = ()
    """What is adapted, by logical name or by a pattern on the paths of linear layers ("*.q_proj")."""
    layers: tuple[int, ...] = ()
    """Which layers, by the first number in their path; none = all."""
    alpha: float = 16.0
    """The update is scaled by alpha / rank."""
    dropout: float = 0.0
    """Share of the inputs of the low-rank path that is dropped in training."""
    router: RouterPolicy = "freeze"
    """What the model's own routers do: train, freeze, or bias_only (only biases move)."""
    seed: int = 0
    """Seed of initial values and of dropout."""

    def __post_init__(self) -> None:
        self.positive("alpha")
        if not 0 <= self.dropout < 1:
            raise UserError(f"{type(self).__name__}.dropout must lie in 0..1 (1 excluded), found {self.dropout}")
        if not self.targets:
            raise UserError(f"{type(self).__name__}.targets: adapters attached to nothing; name at least one target")


@config
class LoRA(Adapter):
    """Low-rank updates W + alpha / r * B A (Hu et al. 2021), of routed experts too.

    Logical names: experts, shared (routed and shared banks), ffn (dense feed-forward layers), each whole or as .gate,
    .up and .down; attention, whole or as .q, .k, .v and .o.
    """

    targets: tuple[str, ...] = ("experts",)
    """What is adapted: logical names, or patterns on the paths of linear layers ("*.q_proj")."""
    rank: int = 8
    """Rank of the update of every matrix."""
    shared: Literal["none", "a", "b", "both"] = "none"
    """Which factors of a bank all of its experts share."""
    joined: bool = False
    """Gate and up of routed experts have one A between them, as PEFT's adapters of fused matrices have."""
    partial: bool = False
    """Adapt only some of gate, up and down on purpose."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(1, "rank")


@config
class Mixture(Adapter):
    """A mixture of LoRA experts on every target, with a router of its own (MoLA, arXiv 2402.08562; X-LoRA-like)."""

    targets: tuple[str, ...] = ("attention", "ffn")
    """What is adapted: attention, ffn or their parts, or patterns on the paths of linear layers ("*.q_proj")."""
    allocation: Allocation = LayerAllocation()
    """Experts, choices and rank of every layer."""
    dropout: float = 0.05
    """Share of the experts' inputs that is dropped in training; the router sees all of them."""
    choice: Router = Router(select=TopK(k=2), weigh=Renormalised())
    """The router of every target; the allocation's top_k replaces k where it selects with TopK."""
    balance: float = 0.0
    """Coefficient of the balance loss, pooled over the targets of a layer and summed over layers; published: 0.001."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.balance < 0:
            raise UserError(f"Mixture.balance must not be negative, found {self.balance}")
