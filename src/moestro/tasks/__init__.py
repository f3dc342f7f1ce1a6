"""Tasks: the material, its batches, the objective and the metrics, by modality."""

from . import data
from .config import Corpus, NextToken, Objective, StandardLibrary, Text

__all__ = ["Corpus", "NextToken", "Objective", "StandardLibrary", "Text", "data"]
