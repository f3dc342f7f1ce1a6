"""Adapters: low-rank updates of frozen weights, mixtures of them, what routers do meanwhile, and PEFT's files."""

from .config import LayerAllocation, LoRA, Mixture, RouterPolicy

__all__ = ["LayerAllocation", "LoRA", "Mixture", "RouterPolicy"]
