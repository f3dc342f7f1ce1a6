"""Configs of losses. Each is one published equation with its coefficient."""

from __future__ import annotations

from typing import ClassVar

from ..core.config import Config, config


@config
class Loss(Config):
    """Base of losses on plans: what is built follows `core.protocols.Loss`."""

    coefficient: float = 0.0
    """Factor with which the loss joins the total; 0 = computed and logged only."""


@config
class SwitchBalance(Loss):
    """E * sum_e f_e P_e over the batch (Switch Transformer eq. 4-6): 1 when uniform, E when one expert takes all."""

    builds: ClassVar[str] = "moestro.losses.balance:SwitchBalanceLoss"
    coefficient: float = 0.01
