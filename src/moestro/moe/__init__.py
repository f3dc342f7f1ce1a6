"""The routed layer, the drop-in FFN and the composers. Configs load no torch."""

from .config import ConcatMerge, GateMerge, MeanMerge, Merge, MoELayer, Serial, SumMerge, Whole

__all__ = ["ConcatMerge", "GateMerge", "MeanMerge", "Merge", "MoELayer", "Serial", "SumMerge", "Whole"]
