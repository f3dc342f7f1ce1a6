"""Tasks: the material, its batches, the objective and the metrics, by modality."""

from . import data
from .config import (
    Classify,
    Corpus,
    FindSpan,
    MatchPairs,
    NextToken,
    Objective,
    StandardLibrary,
    Text,
    Translate,
    TwoPass,
    objectives,
)

__all__ = [
    "Classify",
    "Corpus",
    "FindSpan",
    "MatchPairs",
    "NextToken",
    "Objective",
    "StandardLibrary",
    "Text",
    "Translate",
    "TwoPass",
    "data",
    "objectives",
]
