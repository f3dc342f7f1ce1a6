"""Tasks: the material, its batches, the objective and the metrics, by modality."""

from . import data
from .config import (
    Classify,
    Corpus,
    Examples,
    FindSpan,
    LabelledTexts,
    MatchPairs,
    Material,
    NextToken,
    Objective,
    SpanQuestions,
    StandardLibrary,
    Text,
    TextPairs,
    Translate,
    Translations,
    TwoPass,
    objectives,
)

__all__ = [
    "Classify",
    "Corpus",
    "Examples",
    "FindSpan",
    "LabelledTexts",
    "MatchPairs",
    "Material",
    "NextToken",
    "Objective",
    "SpanQuestions",
    "StandardLibrary",
    "Text",
    "TextPairs",
    "Translate",
    "Translations",
    "TwoPass",
    "data",
    "objectives",
]
