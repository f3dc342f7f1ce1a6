"""transformers' experts inside our routed layer: same weights, same plans, their way to the rows and back."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from ..core.plan import AnyPlan, Plan
from ..core.signals import Signals
from ..experts.config import Gated
from ..moe.layer import MoELayer

__all__ = ["Absent", "TransformersLayer", "install", "transformers_experts", "transformers_modules", "why"]

ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu"}


class Absent(Exception):
    """A contender that cannot run here; the message is what its row says."""


def why(error: Exception) -> str:
    """What the row of a contender that could not be built or run says."""
    return str(error) if isinstance(error, Absent) else f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


class TransformersLayer(MoELayer):
    """A routed layer whose experts, sorting and combining are transformers' `Qwen3MoeExperts`.

    implementation: of transformers' experts ("grouped_mm", "batched_mm", "eager"). compiled: under torch.compile.
    """

    def __init__(self, like: MoELayer, implementation: str, compiled: bool) -> None:
        super().__init__(like.config, like.dim, experts=_experts(like, implementation))
        self.router.load_state_dict(like.router.state_dict())
        if self.config.shared is not None:
            raise Absent("layers with a shared expert are not compared")
        self._call = torch.compile(self.experts) if compiled else self.experts

    def run(self, units: Tensor, plan: AnyPlan, valid: Tensor | None = None, signals: Signals | None = None) -> Tensor:
        if not isinstance(plan, Plan) or not plan.complete:
            raise Absent("it knows neither dropped, virtual nor absent choices, nor experts that choose")
        return self._call(units, plan.expert, plan.weight.to(units.dtype))


def install(model: nn.Module, implementation: str, compiled: bool) -> None:
    """Put transformers' experts into every routed layer of a decoder. Raises `Absent` where they do not fit."""
    for block in model.layers:  # type: ignore[union-attr]
        if isinstance(block.ffn, MoELayer):
            block.ffn = TransformersLayer(block.ffn, implementation, compiled)  # type: ignore[union-attr]


def _experts(like: MoELayer, implementation: str) -> nn.Module:
    """Their module, holding a copy of our bank's weights."""
    ours = like.config.experts
    if not isinstance(ours, Gated) or not isinstance(ours.width, int) or ours.activation not in ACTIVATIONS:
        raise Absent(f"it has no counterpart of {type(ours).__name__} experts with these settings")
    gate_up, down = (t.detach().clone() for t in (like.experts.gate_up, like.experts.down))
    return transformers_experts(gate_up, down, implementation, ours.activation)


def transformers_experts(gate_up: Tensor, down: Tensor, implementation: str, activation: str = "silu") -> nn.Module:
    """Their `Qwen3MoeExperts` on these very tensors: gate_up [E, 2F, D], down [E, D, F]. It is called with
    (x [T, D], expert [T, K], weight [T, K]). Raises `Absent` where transformers cannot be imported."""
    config, modeling = transformers_modules()
    E, D, F = down.shape
    with torch.device("meta"):
        made: Any = modeling.Qwen3MoeExperts(
            config.Qwen3MoeConfig(
                num_experts=E, hidden_size=D, moe_intermediate_size=F, hidden_act=ACTIVATIONS[activation]
            )
        )
    made.config._experts_implementation = implementation
    made.gate_up_proj, made.down_proj = nn.Parameter(gate_up), nn.Parameter(down)
    return made


def transformers_modules() -> tuple[Any, Any]:
    """Their modules of Qwen3-MoE: (configuration, modeling). Raises `Absent` where there are none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from transformers.models.qwen3_moe import configuration_qwen3_moe, modeling_qwen3_moe
    except ImportError as error:
        raise Absent(f"transformers is not installed or too old ({error}): pip install 'moestro[bench]'") from None
    return configuration_qwen3_moe, modeling_qwen3_moe
