"""Options of conversions: what to turn into what, and how. `options.build(model, text=...)` carries one out."""

from __future__ import annotations

from typing import ClassVar, Literal

from ..core.config import config
from ..core.errors import UserError
from ..losses.config import Loss, SwitchBalance
from ..models.config import Block
from ..routers.config import Weigh
from .base import Conversion
from .specialists import BranchAttendMix, BranchTrainMix, Specialists

__all__ = [
    "METHODS",
    "AddExperts",
    "Average",
    "BranchAttendMix",
    "BranchTrainMix",
    "Cluster",
    "Conversion",
    "Copy",
    "Densify",
    "Distil",
    "Extend",
    "GranularSplit",
    "Grow",
    "MergeExperts",
    "Modular",
    "MostLoaded",
    "PartialReinit",
    "Prune",
    "Resize",
    "Specialists",
    "Taylor",
    "Upcycle",
]


# Dense to MoE -----------------------------------------------------------------------------------------------------


@config
class Upcycle(Conversion):
    """Base of conversions from dense feed-forward layers to routed ones."""

    num_experts: int | tuple[int, ...] = 8
    """Routed experts of each converted layer; a tuple gives every one its own number."""
    top_k: int = 2
    """Experts per token, K."""
    router: Literal["random", "centroids", "label"] = "random"
    """Router rows: small random ones, or directions of the clusters of what the layer sees on the given text; or no
    rows: the signal `label` names each token's expert (one expert per domain, brief 34)."""
    router_std: float = 0.02
    """Standard deviation of random rows; length of centroid rows times sqrt(dim)."""
    weigh: Weigh | None = None
    """How chosen experts are weighted; null = what keeps the output closest to that of the dense layer."""
    losses: tuple[Loss, ...] = (SwitchBalance(),)
    """Losses of the new layers; labels need none and get none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(1, "top_k")
        if self.router == "label" and self.top_k != 1:
            raise UserError(f"{type(self).__name__}.top_k: a label names one expert, not {self.top_k}; set it to 1")
        if self.router_std < 0:
            raise UserError(f"{type(self).__name__}.router_std must not be negative, found {self.router_std}")
        counts = self.num_experts if isinstance(self.num_experts, tuple) else (self.num_experts,)
        for n in counts or (0,):
            if n < self.top_k:
                raise UserError(f"{type(self).__name__}: num_experts {n} is below top_k {self.top_k}")

    def counts(self, layers: int) -> tuple[int, ...]:
        """Experts of each of that many converted layers. Raises `UserError` where a tuple has another length."""
        if isinstance(self.num_experts, int):
            return (self.num_experts,) * layers
        if len(self.num_experts) != layers:
            raise UserError(
                f"{type(self).__name__}.num_experts: {len(self.num_experts)} numbers for {layers} converted layers"
            )
        return self.num_experts

    @property
    def reads_text(self) -> bool:
        """Whether the conversion cannot do without text."""
        return self.needs_text or self.router == "centroids"


@config
class Copy(Upcycle):
    """Every expert is the dense layer (sparse upcycling, Komatsuzaki et al., arXiv 2212.05055). Output unchanged."""

    builds: ClassVar[str] = "moestro.convert.upcycle.methods:copy"
    shared: bool = False
    """Whether a copy also becomes a shared expert; it and the routed ones then count half."""


@config
class GranularSplit(Upcycle):
    """Experts are slices of the dense layer: E / G copies of G slices each (He et al., arXiv 2410.07524).

    The slices of one copy have the same router row: at the start each token meets each slice once per copy it is routed
    to (top_k / granularity copies), and the output is unchanged.
    """

    builds: ClassVar[str] = "moestro.convert.upcycle.methods:granular"
    granularity: int = 2
    """Slices of the dense layer, G; num_experts and top_k are multiples of it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(1, "granularity")
        counts = self.num_experts if isinstance(self.num_experts, tuple) else (self.num_experts,)
        for name, value in (("top_k", self.top_k), *(("num_experts", n) for n in counts)):
            if value % self.granularity:
                raise UserError(f"GranularSplit: {name} {value} is no multiple of granularity {self.granularity}")


@config
class Modular(Upcycle):
    """Experts are slices of the dense layer behind a frozen random router, averaged (SMoE-Dropout, arXiv 2303.01610).

    Outputs of slices are scaled by their number, so that the mean of all of them is the dense layer, and the mean of a
    few an estimate of it, as in dropout. Train it with a schedule of top_k, evaluate it at any.
    """

    builds: ClassVar[str] = "moestro.convert.upcycle.methods:modular"
    num_experts: int | tuple[int, ...] = 16
    """Slices of each converted layer, N; its width is a multiple of it."""
    top_k: int = 16
    """Experts per token, K, where no schedule says it."""
    weigh: Weigh | None = None
    """How chosen experts are weighted; null = equally, 1 / K each; SoftmaxKept is the published rule, not exact."""
    losses: tuple[Loss, ...] = ()
    """Losses of the new layers; a router that never learns needs none."""
    frozen: bool = True
    """Whether the router never learns."""


@config
class PartialReinit(Upcycle):
    """Copies of which a share of neurons is drawn anew, for each expert others (Drop-Upcycling, arXiv 2502.19261)."""

    builds: ClassVar[str] = "moestro.convert.upcycle.methods:reinit"
    share: float = 0.5
    """Share of each expert's neurons that is drawn anew, normal with the mean and deviation of the original matrix."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.share <= 1:
            raise UserError(f"PartialReinit.share must lie in 0..1, found {self.share}")


@config
class Cluster(Upcycle):
    """Neurons are dealt to experts by k-means (MoEfication, arXiv 2110.01786). All experts together are the layer."""

    builds: ClassVar[str] = "moestro.convert.upcycle.methods:cluster"
    by: Literal["weights", "activations"] = "weights"
    """What neurons are grouped by: their rows of the first matrix, or when they are active on the given text."""
    balanced: bool = True
    """Whether all experts are equally wide; otherwise as k-means finds them (gated layers)."""
    iterations: int = 20
    """Rounds of k-means."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(1, "iterations")

    @property
    def reads_text(self) -> bool:
        return super().reads_text or self.by == "activations"


@config
class Taylor(Upcycle):
    """The neurons that matter most become a shared expert, the rest is dealt to routed ones (Dense2MoE, brief 01).

    Importance of a neuron: sum over tokens of |a * dL/da|, a its activation, on the given text.
    """

    builds: ClassVar[str] = "moestro.convert.upcycle.methods:taylor"
    needs_text: ClassVar[bool] = True
    shared: float = 0.25
    """Share of the neurons that goes to the shared expert."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.shared < 1:
            raise UserError(f"Taylor.shared must lie between 0 and 1, found {self.shared}")


# MoE to dense -----------------------------------------------------------------------------------------------------


@config
class Densify(Conversion):
    """Base of conversions from routed layers to dense ones."""

    @property
    def reads_text(self) -> bool:
        return self.needs_text


@config
class Average(Densify):
    """The mean of the experts (the last step of Experts Weights Averaging, brief 48)."""

    builds: ClassVar[str] = "moestro.convert.reduce.dense:average"


@config
class MostLoaded(Densify):
    """The expert that most tokens of the given text chose."""

    builds: ClassVar[str] = "moestro.convert.reduce.dense:most_loaded"
    needs_text: ClassVar[bool] = True


@config
class Distil(Densify):
    """A dense layer, started from the mean of the experts, trained to do what the routed one does on the given text."""

    builds: ClassVar[str] = "moestro.convert.reduce.distil:distil"
    needs_text: ClassVar[bool] = True
    match: Literal["layers", "logits"] = "layers"
    """What is matched: each layer's output given its input, or the distribution of the whole model."""
    steps: int = 200
    """Optimiser steps."""
    batch: int = 256
    """Tokens per step (layers), or at most so many tokens of whole sequences (logits)."""
    lr: float = 1e-3
    """Learning rate of Adam, falling linearly to 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(1, "steps", "batch")
        self.positive("lr")


# MoE to MoE -------------------------------------------------------------------------------------------------------


@config
class Resize(Conversion):
    """Base of conversions that change the number of experts."""


def _per_layer(value: int | tuple[int, ...], layers: int, name: str) -> tuple[int, ...]:
    if isinstance(value, int):
        return (value,) * layers
    if len(value) != layers:
        raise UserError(f"{name}: {len(value)} numbers for {layers} converted layers")
    return value


def _all_positive(value: int | tuple[int, ...], name: str) -> None:
    for n in (value if isinstance(value, tuple) else (value,)) or (0,):
        if n < 1:
            raise UserError(f"{name}: every number must be at least 1, found {n}")


@config
class Prune(Resize):
    """Keep the experts of the highest score, and their router rows as they are."""

    builds: ClassVar[str] = "moestro.convert.reduce.resize:prune"
    keep: int | tuple[int, ...] = 4
    """Experts that stay in each converted layer; a tuple gives every one its own number."""
    score: Literal["load", "weighted_norm", "output_similarity", "weight_similarity"] = "weighted_norm"
    """What an expert is worth: tokens that chose it; mean router-weighted norm of its output (REAP, arXiv 2510.13999);
    or the less loaded one of the two most similar experts goes first, similar in outputs or in weights."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _all_positive(self.keep, "Prune.keep")

    def counts(self, layers: int) -> tuple[int, ...]:
        return _per_layer(self.keep, layers, "Prune.keep")

    @property
    def reads_text(self) -> bool:
        return True


@config
class MergeExperts(Resize):
    """Similar experts, and their router rows, become one: the mean, weighted by load."""

    builds: ClassVar[str] = "moestro.convert.reduce.resize:merge"
    keep: int | tuple[int, ...] = 4
    """Experts that remain in each converted layer; a tuple gives every one its own number."""
    score: Literal["output_similarity", "weight_similarity"] = "output_similarity"
    """What makes two experts similar: the cosine of their outputs on the given text, or of their weights."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _all_positive(self.keep, "MergeExperts.keep")

    def counts(self, layers: int) -> tuple[int, ...]:
        return _per_layer(self.keep, layers, "MergeExperts.keep")

    @property
    def reads_text(self) -> bool:
        return True


@config
class AddExperts(Resize):
    """New experts that start as copies, with noise, of the highest scored ones, and so do their router rows."""

    builds: ClassVar[str] = "moestro.convert.reduce.resize:add"
    add: int | tuple[int, ...] = 1
    """New experts of each converted layer; a tuple gives every one its own number."""
    score: Literal["order", "load", "weighted_norm"] = "order"
    """Which experts are copied: the first ones in order, the most loaded, those of the largest weighted output."""
    noise: float = 0.0
    """Noise on the copies' matrices and router rows, relative to the standard deviation of each."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _all_positive(self.add, "AddExperts.add")
        if self.noise < 0:
            raise UserError(f"AddExperts.noise must not be negative, found {self.noise}")

    def counts(self, layers: int) -> tuple[int, ...]:
        return _per_layer(self.add, layers, "AddExperts.add")

    @property
    def reads_text(self) -> bool:
        return self.score != "order"


# Wider ------------------------------------------------------------------------------------------------------------


@config
class Extend(Conversion):
    """Plain MLP experts get a multiplicative branch that starts at one; the output is unchanged (brief 34)."""

    builds: ClassVar[str] = "moestro.convert.change.extend:extend"


# Deeper ----------------------------------------------------------------------------------------------------------


@config
class Grow(Conversion):
    """New blocks on top of a trained model, which stands still from there on (Growing Transformers, brief 45)."""

    builds: ClassVar[str] = "moestro.convert.change.grow:grow"
    blocks: int = 1
    """New blocks."""
    block: Block | None = None
    """What the new blocks are; null = like the last one."""
    start: Literal["identity", "random"] = "identity"
    """Maps of new blocks that write into the residual stream start at zero, so that nothing changes; or at random."""
    freeze: bool = True
    """Whether the embedding and all old blocks are frozen in the new model."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(1, "blocks")


METHODS: dict[str, type[Conversion]] = {
    "copy": Copy,
    "granular": GranularSplit,
    "modular": Modular,
    "reinit": PartialReinit,
    "cluster": Cluster,
    "taylor": Taylor,
    "btx": BranchTrainMix,
    "bam": BranchAttendMix,
    "average": Average,
    "most-loaded": MostLoaded,
    "distil": Distil,
    "prune": Prune,
    "merge": MergeExperts,
    "add": AddExperts,
    "extend": Extend,
    "grow": Grow,
}
"""Name on the command line and in recipes -> options."""
