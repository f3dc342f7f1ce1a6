"""Adapters: low-rank updates of frozen weights, mixtures of them, what routers do meanwhile, and PEFT's files."""

from .config import Adapter, Allocation, LayerAllocation, LoRA, Mixture, RouterPolicy, ShapedAllocation
from .growth_config import GrowthSchedule, Stage

__all__ = [
    "Adapter",
    "Allocation",
    "GrowthSchedule",
    "LayerAllocation",
    "LoRA",
    "Mixture",
    "RouterPolicy",
    "ShapedAllocation",
    "Stage",
]
