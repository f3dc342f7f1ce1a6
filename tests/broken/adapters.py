"""Failure 10: adapters that skip stacked experts, or that write out the updates of all of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moestro.adapt import LoRA
from moestro.adapt.attach import attach
from moestro.experts.gated import GatedBank
from moestro.models.decoder import Decoder


def every_linear_layer(model: Decoder) -> None:
    """What "all linear layers" reaches: no expert is a linear layer."""
    attach(model, LoRA(targets=tuple(n for n, m in model.named_modules() if type(m) is nn.Linear), rank=2))


class WritesOut(GatedBank):
    """Adds B A of all experts to the weights in every pass, as parametrisations do."""

    def forward(self, rows: Tensor, index: Any, context: Any = None, weights: Any = None) -> Tensor:
        own = {n: getattr(self, n).detach() for n in ("gate_up", "down")}
        whole = {n: own[n] + getattr(self, f"{n}_b") @ getattr(self, f"{n}_a") for n in own}
        return super().forward(rows, index, context, whole)


def write_out_all_updates(model: Decoder) -> None:
    model.requires_grad_(False)
    for layer in model.layers:
        bank: Any = layer.ffn.experts
        bank.__class__ = WritesOut
        for n in ("gate_up", "down"):
            E, O, I = getattr(bank, n).shape
            setattr(bank, f"{n}_a", nn.Parameter(torch.randn(E, 2, I)))
            setattr(bank, f"{n}_b", nn.Parameter(torch.zeros(E, O, 2)))
