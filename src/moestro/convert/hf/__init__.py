"""Moestro inside transformers: importing this registers our experts as `experts_implementation="moestro"`, and our
decoders with the Auto classes and Trainer."""

from __future__ import annotations

from .configuration import MoestroConfig
from .experts import Explanation, explain, register_experts
from .model import MoestroForCausalLM
from .register import register_models
from .trainer import RouterStepsCallback, router_steps
from .use import use

__all__ = [
    "Explanation",
    "MoestroConfig",
    "MoestroForCausalLM",
    "RouterStepsCallback",
    "explain",
    "register_experts",
    "router_steps",
    "use",
]

register_experts()
register_models()
