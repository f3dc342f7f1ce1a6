"""Metrics of tasks: BLEU, exact match and F1 of spans, best F1 over thresholds, accuracy, bits of answers."""

from .bleu import Bleu, bleu
from .choice import accuracy, accuracy_by
from .pairs import BestF1, Similarities, best_f1, similarities
from .spans import SpanScores, best_spans, exact_match, normalised, span_scores, token_f1

__all__ = [
    "BestF1",
    "Bleu",
    "Similarities",
    "SpanScores",
    "accuracy",
    "accuracy_by",
    "best_f1",
    "best_spans",
    "bleu",
    "exact_match",
    "normalised",
    "similarities",
    "span_scores",
    "token_f1",
]
