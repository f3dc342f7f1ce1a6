"""Configs of losses. Each is one published equation with its coefficient. Built without sizes: `config.build()`."""

from __future__ import annotations

from typing import ClassVar, Literal

from ..core.config import Config, config
from .pair_config import MNR, MNRPlus, PairLoss, pair_examples

__all__ = [
    "MNR",
    "GShardBalance",
    "ImportanceCV2",
    "LoadCV2",
    "Loss",
    "MNRPlus",
    "MutualInformation",
    "PairLoss",
    "PerUnitBalance",
    "RoutingEntropy",
    "SequenceBalance",
    "SpecifiedExpert",
    "SwitchBalance",
    "TokenInformation",
    "ZLoss",
    "examples",
    "pair_examples",
]


@config
class Loss(Config):
    """Base of losses on plans: what is built follows `core.protocols.Loss`."""

    coefficient: float = 0.0
    """Factor with which the loss joins the total; 0 = computed and logged only."""


# Balance ----------------------------------------------------------------------------------------------------------


@config
class SwitchBalance(Loss):
    """E * sum_e f_e P_e over the batch (Switch Transformer eq. 4-6): 1 when uniform, E when one expert takes all."""

    builds: ClassVar[str] = "moestro.losses.balance:SwitchBalanceLoss"
    coefficient: float = 0.01
    """Factor with which the loss joins the total; 0 = computed and logged only."""
    of: Literal["selected", "unmixed"] = "selected"
    """What P is the mean of: the distribution selected from, or the one before the router's mix step, if it has one."""


@config
class PerUnitBalance(Loss):
    """E * sum_e F_e P_e, F_e = share of units that chose e (as in Mixtral and top-p routing): mean K if uniform."""

    builds: ClassVar[str] = "moestro.losses.balance:PerUnitBalanceLoss"
    coefficient: float = 0.01
    """Factor with which the loss joins the total; 0 = computed and logged only."""
    of: Literal["selected", "unmixed"] = "selected"
    """What P is the mean of: the distribution selected from, or the one before the router's mix step, if it has one."""


@config
class GShardBalance(Loss):
    """E * sum_e c_e P_e with c_e the share of first choices only (GShard algorithm 1): 1 when uniform."""

    builds: ClassVar[str] = "moestro.losses.balance:GShardBalanceLoss"
    coefficient: float = 0.01
    """Factor with which the loss joins the total; 0 = computed and logged only."""


@config
class SequenceBalance(Loss):
    """The Switch equation inside every sequence, averaged over sequences (DeepSeek-V3 eq. 17-20). Needs `segment`."""

    builds: ClassVar[str] = "moestro.losses.balance:SequenceBalanceLoss"
    coefficient: float = 0.0001
    """Factor with which the loss joins the total; 0 = computed and logged only."""
    of: Literal["all", "first"] = "all"
    """Which choices are counted: all of them, or each unit's first (13)."""


# Coefficients of variation ----------------------------------------------------------------------------------------


@config
class ImportanceCV2(Loss):
    """Squared coefficient of variation of the experts' summed weights (Shazeer et al. 2017, eq. 6-7): 0 when equal."""

    builds: ClassVar[str] = "moestro.losses.variation:ImportanceLoss"
    coefficient: float = 0.01
    """Factor with which the loss joins the total; 0 = computed and logged only."""
    of: Literal["weight", "probs"] = "weight"
    """What is summed: combine weights (Shazeer 2017) or the whole distribution (V-MoE)."""
    unbiased: bool = False
    """Divide the variance by E - 1 instead of E (many reimplementations)."""


@config
class LoadCV2(Loss):
    """Squared coefficient of variation of the smooth loads under the router's noise (Shazeer et al. 2017, eq. 8-11)."""

    builds: ClassVar[str] = "moestro.losses.variation:LoadLoss"
    coefficient: float = 0.01
    """Factor with which the loss joins the total; 0 = computed and logged only."""
    unbiased: bool = False
    """Divide the variance by E - 1 instead of E (many reimplementations)."""


# Logits and distributions -----------------------------------------------------------------------------------------


@config
class ZLoss(Loss):
    """Mean squared log-sum-exp of the router's logits (ST-MoE eq. 5): keeps logits small."""

    builds: ClassVar[str] = "moestro.losses.distribution:ZLossTerm"
    coefficient: float = 0.001
    """Factor with which the loss joins the total; 0 = computed and logged only."""


@config
class RoutingEntropy(Loss):
    """Mean entropy of the units' distributions, nats (L_d of top-p routing); a positive coefficient lowers it."""

    builds: ClassVar[str] = "moestro.losses.distribution:RoutingEntropyLoss"
    coefficient: float = 0.0001
    """Factor with which the loss joins the total; negative = flatter distributions, 0 = logged only."""


@config
class TokenInformation(Loss):
    """Minus the information between unit and expert, nats: mean entropy minus entropy of the mean distribution."""

    builds: ClassVar[str] = "moestro.losses.distribution:TokenInformationLoss"
    coefficient: float = 0.001
    """Factor with which the loss joins the total; 0 = computed and logged only."""


@config
class MutualInformation(Loss):
    """Minus the mutual information between task and expert, nats (Mod-Squad). Needs `task`."""

    builds: ClassVar[str] = "moestro.losses.distribution:MutualInformationLoss"
    coefficient: float = 0.001
    """Factor with which the loss joins the total; 0 = computed and logged only."""
    num_tasks: int = 2
    """Number of tasks; task ids are 0..num_tasks-1, and -1 means none."""
    prior: Literal["uniform", "counts"] = "uniform"
    """Weight of each task that occurs: equal (Mod-Squad), or by its number of units."""

    def __post_init__(self) -> None:
        self.at_least(1, "num_tasks")


@config
class SpecifiedExpert(Loss):
    """Mean cross-entropy of the router's logits to the expert that a signal names, nats (brief 34, first version)."""

    builds: ClassVar[str] = "moestro.losses.distribution:SpecifiedExpertLoss"
    coefficient: float = 0.01
    """Factor with which the loss joins the total; 0 = computed and logged only."""
    signal: Literal["label", "task"] = "task"
    """The signal that holds expert numbers; -1 = none is asked for."""


def examples() -> dict[str, Loss]:
    """One small config of every loss, by name; tests of third parties and of this library are generated from it."""
    return {
        "switch_balance": SwitchBalance(),
        "per_unit_balance": PerUnitBalance(),
        "gshard_balance": GShardBalance(),
        "sequence_balance": SequenceBalance(),
        "sequence_balance_first": SequenceBalance(of="first"),
        "importance_cv2": ImportanceCV2(),
        "importance_cv2_probs": ImportanceCV2(of="probs", unbiased=True),
        "load_cv2": LoadCV2(),
        "z_loss": ZLoss(),
        "routing_entropy": RoutingEntropy(),
        "token_information": TokenInformation(),
        "mutual_information": MutualInformation(),
        "mutual_information_counts": MutualInformation(num_tasks=3, prior="counts"),
        "specified_expert": SpecifiedExpert(),
    }
