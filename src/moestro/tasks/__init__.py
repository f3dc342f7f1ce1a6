"""Tasks: the material, its batches and the objective, by modality. Language modelling so far."""

from .config import Corpus, NextToken, Objective, StandardLibrary, Text

__all__ = ["Corpus", "NextToken", "Objective", "StandardLibrary", "Text"]
