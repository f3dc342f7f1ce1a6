"""Configs of routers: five replaceable steps (score, mix, select, weigh, limit) and the composite that runs them."""

from __future__ import annotations

from typing import ClassVar, Literal

from ..core.config import Config, config
from ..core.errors import UserError
from .bases import Limit, Mix, Priority, Score, Select, Weigh
from .limits import (
    BatchPrioritised,
    ByPosition,
    ByProbability,
    Capacity,
    FirstChoices,
    FixedCapacity,
    RandomSecond,
    Recycle,
)
from .mixes import AttentionMix, SimilarityMix
from .scores import MLP, Cosine, FixedNoise, Frozen, Jitter, Linear, Noisy, SegmentMean, Uniform

__all__ = [
    "All",
    "AnyRouter",
    "AttentionMix",
    "BatchPrioritised",
    "ByPosition",
    "ByProbability",
    "Capacity",
    "Constant",
    "Cosine",
    "ExpertChoiceSelect",
    "FirstChoices",
    "FixedCapacity",
    "FixedNoise",
    "Frozen",
    "GroupLimited",
    "Gumbel",
    "Jitter",
    "Label",
    "Limit",
    "Linear",
    "LossFree",
    "MLP",
    "Mix",
    "NearBest",
    "Noisy",
    "Partition",
    "Priority",
    "Random",
    "RandomSecond",
    "Raw",
    "Recycle",
    "Renormalised",
    "Router",
    "Score",
    "SegmentMean",
    "Select",
    "SimilarityMix",
    "SoftmaxKept",
    "SparseMixer",
    "TopK",
    "TopP",
    "Uniform",
    "Weigh",
]


# Select -----------------------------------------------------------------------------------------------------------


@config
class TopK(Select):
    """The k highest probabilities of each unit; equal ones go to the lower index. Call-time knob: top_k."""

    builds: ClassVar[str] = "moestro.routers.select:TopKSelect"
    k: int = 2
    """Experts per unit."""

    def __post_init__(self) -> None:
        self.positive("k")


@config
class TopP(Select):
    """The fewest experts whose probabilities sum to more than p (dynamic routing). Call-time knob: top_p."""

    builds: ClassVar[str] = "moestro.routers.select:TopPSelect"
    p: float = 0.4
    """The sum to be passed; at 1 or more every expert is taken, up to max_k."""
    max_k: int | None = None
    """The most experts of a unit; None = all of them."""
    expected: float | None = None
    """Mean experts per unit that parameters and FLOPs are counted with; None = the most that a unit may take."""
    as_released: bool = False
    """Softmax and cumulative sum in bfloat16, as the authors' code runs: choices change where a sum is close to p."""

    def __post_init__(self) -> None:
        self.positive("p")
        self.positive("max_k")
        self.positive("expected")


@config
class ExpertChoiceSelect(Select):
    """Each expert takes its share of the units, by probability (expert choice); not causal. Knob: capacity_factor."""

    builds: ClassVar[str] = "moestro.routers.by_expert:ExpertChoiceSelection"
    capacity_factor: float = 1.0
    """Mean number of experts per unit: an expert takes floor(capacity_factor * units / experts) units, at least 1."""
    per: Literal["batch", "segment"] = "batch"
    """Units that are chosen from together: the whole batch, or each segment (image, sequence)."""

    def __post_init__(self) -> None:
        self.positive("capacity_factor")


@config
class Label(Select):
    """The expert whose number a signal names; -1 = none."""

    builds: ClassVar[str] = "moestro.routers.unscored:LabelSelect"
    signal: Literal["label", "task"] = "label"
    """The signal that holds expert numbers."""


@config
class Random(Select):
    """k different experts drawn uniformly, in training and inference (THOR). Call-time knob: top_k."""

    builds: ClassVar[str] = "moestro.routers.unscored:RandomSelect"
    k: int = 1
    """Experts per unit."""
    level: Literal["token", "sequence", "batch"] = "token"
    """What shares a draw: nothing, the units of one segment, or the whole batch."""
    evaluation: Literal["token", "sequence", "batch"] | None = None
    """The same for evaluation (THOR trains with "batch" and translates with "sequence"); None = as in training."""
    as_released: bool = False
    """Draw "sequence" per position, the same for all sequences, as THOR's code does."""

    def __post_init__(self) -> None:
        self.positive("k")


@config
class Partition(Select):
    """The units of a batch shuffled and cut into equal parts, one per expert, in training (EWA); in evaluation every
    unit draws for itself, as with Random."""

    builds: ClassVar[str] = "moestro.routers.unscored:PartitionSelect"


@config
class Gumbel(Select):
    """k experts sampled from the distribution without replacement (Gumbel top-k). Knobs: top_k, temperature."""

    builds: ClassVar[str] = "moestro.routers.unscored:GumbelSelect"
    k: int = 2
    """Experts per unit."""
    when: Literal["train", "always"] = "train"
    """When to sample; otherwise the k highest are taken."""

    def __post_init__(self) -> None:
        self.positive("k")


@config
class SparseMixer(Select):
    """Experts one after the other, in training drawn among those near the best (Phi-3.5-MoE). Knob: top_k."""

    builds: ClassVar[str] = "moestro.routers.sparse_mixer:SparseMixerSelect"
    k: int = 2
    """Experts per unit."""
    epsilon: float = 0.01
    """An expert is near the best if its logit lacks less than twice this share of the larger of the two."""

    def __post_init__(self) -> None:
        self.positive("k", "epsilon")


@config
class All(Select):
    """Every expert meets every unit."""

    builds: ClassVar[str] = "moestro.routers.select:AllSelect"


@config
class GroupLimited(Select):
    """Another selection, inside the best groups of experts only (DeepSeek-V2 and V3)."""

    builds: ClassVar[str] = "moestro.routers.groups:GroupLimitedSelect"
    groups: int = 4
    """Number of groups of consecutive experts."""
    kept: int = 2
    """Groups a unit may choose from."""
    by: Literal["max", "top2"] = "top2"
    """What ranks a group: its highest entry (V2) or the sum of its two highest (V3)."""
    inner: Select = TopK()
    """The selection inside the kept groups."""

    def __post_init__(self) -> None:
        self.positive("groups", "kept")
        if self.kept > self.groups:
            raise UserError(f"GroupLimited.kept: {self.kept} of {self.groups} groups cannot be kept")


@config
class LossFree(Select):
    """Another selection by probability + bias, where the bias follows the load (DeepSeek-V3); weights ignore it."""

    builds: ClassVar[str] = "moestro.routers.loss_free:LossFreeSelect"
    inner: Select = TopK()
    """The selection: TopK, or GroupLimited with TopK inside."""
    rate: float = 0.001
    """How far a bias moves per optimiser step."""


# Weigh ------------------------------------------------------------------------------------------------------------


@config
class Renormalised(Weigh):
    """The probabilities of the chosen experts, divided by their sum (Mixtral, GShard)."""

    builds: ClassVar[str] = "moestro.routers.weigh:RenormalisedWeight"
    scale: float = 1.0
    """Factor on the result."""
    epsilon: float = 0.0
    """Added to the sum (released DeepSeek-V3: 1e-20)."""
    floor: float = 0.0
    """The least that is divided by (ERNIE 4.5: 1e-12); smaller sums of probabilities stay below one."""

    def __post_init__(self) -> None:
        self.at_least(0.0, "epsilon", "floor")


@config
class Raw(Weigh):
    """The probabilities as they are (Switch, V-MoE, top-p, expert choice)."""

    builds: ClassVar[str] = "moestro.routers.weigh:RawWeight"
    scale: float = 1.0
    """Factor on the result."""


@config
class SoftmaxKept(Weigh):
    """A softmax over the logits of the chosen experts (SMoE-Dropout, Shazeer 2017)."""

    builds: ClassVar[str] = "moestro.routers.weigh:SoftmaxKeptWeight"
    scale: float = 1.0
    """Factor on the result."""


@config
class NearBest(Weigh):
    """A softmax over the experts near the best of those not chosen before (the weight of SparseMixer, Phi-3.5-MoE)."""

    builds: ClassVar[str] = "moestro.routers.sparse_mixer:NearBestWeight"
    epsilon: float = 0.01
    """As in SparseMixer."""

    def __post_init__(self) -> None:
        self.positive("epsilon")


@config
class Constant(Weigh):
    """The same weight for every choice (THOR)."""

    builds: ClassVar[str] = "moestro.routers.weigh:ConstantWeight"
    value: float | None = None
    """The weight; None = one over the number of the unit's choices."""


# The composite ----------------------------------------------------------------------------------------------------


@config
class AnyRouter(Config):
    """Base of all routers. Built with (dim, num_experts)."""


@config
class Router(AnyRouter):
    """A router of five steps."""

    builds: ClassVar[str] = "moestro.routers.router:StepRouter"
    score: Score = Linear()
    """How x becomes logits."""
    activation: Literal["softmax", "sigmoid", "identity"] = "softmax"
    """How logits become the distribution that is selected from ("identity": similarities are used as they are)."""
    temperature: float = 1.0
    """Logits are divided by this before the activation. Call-time knob: temperature."""
    mix: Mix | None = None
    """How distributions of different units are combined before selection."""
    select: Select = TopK()
    """Which experts each unit takes."""
    weigh: Weigh = Renormalised()
    """With which weight."""
    limit: Limit | None = None
    """What happens when an expert is chosen too often; None = nothing is dropped."""
    virtual: tuple[Literal["null", "copy"], ...] = ()
    """Extra ids after the real experts: "null" adds nothing, "copy" adds weight * x."""
    subset: tuple[int, ...] | None = None
    """The experts of the bank that this router addresses; None = all. Plans speak of the bank's ids."""

    def __post_init__(self) -> None:
        self.positive("temperature")
        for kind in self.virtual:
            if kind not in ("null", "copy"):
                raise UserError(f"Router.virtual: {kind!r} is neither 'null' nor 'copy'")
        chooser = self.select
        while isinstance(chooser, GroupLimited | LossFree):
            chooser = chooser.inner
        if self.activation == "identity" and isinstance(chooser, TopP | Gumbel):
            raise UserError(f"Router: {type(chooser).__name__} needs probabilities; use activation softmax or sigmoid")
        if isinstance(chooser, TopP) and chooser.as_released and (self.mix or self.activation != "softmax"):
            raise UserError("Router: TopP(as_released=True) makes its own softmax; use activation softmax and no mix")
        if isinstance(self.select, SparseMixer) and self.mix is not None:
            raise UserError("Router: SparseMixer looks at logits, which mix does not change; leave one of them out")
        if isinstance(self.weigh, SoftmaxKept | NearBest) and self.mix is not None:
            raise UserError(
                f"Router: {type(self.weigh).__name__} makes weights of logits, which mix does not change; use "
                "weigh=Renormalised()"
            )
        select, weigh = self.select, self.weigh
        if isinstance(select, SparseMixer) and isinstance(weigh, NearBest) and select.epsilon != weigh.epsilon:
            raise UserError(
                f"Router: epsilon is {select.epsilon} in SparseMixer and {weigh.epsilon} in NearBest; "
                "give both the same"
            )
        alone = isinstance(chooser, TopK | Gumbel) and chooser.k == 1
        if alone and isinstance(self.weigh, Renormalised | SoftmaxKept):
            raise UserError(
                f"Router: with one expert per unit the weight of {type(self.weigh).__name__} is always 1, and the "
                f"router would learn nothing from the output; use weigh=Raw()"
            )
