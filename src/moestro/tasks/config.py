"""Configs of tasks: the material (corpora, and examples from `material`) and the objective."""

from __future__ import annotations

from typing import ClassVar

from ..core.config import config
from ..core.errors import UserError
from .material import Examples, LabelledTexts, Material, SpanQuestions, TextPairs, Translations
from .objectives import Classify, FindSpan, MatchPairs, NextToken, Objective, Translate, TwoPass, objectives

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
    "objectives",
]

# Material ---------------------------------------------------------------------------------------------------------


@config
class Corpus(Material):
    """Base of text corpora. Built with (): what is built lists the files and how they are split."""

    tokenizer: str = ""
    """File of a tokenizer in the format of Hugging Face's tokenizers (JSON); empty = bytes, 256 ids."""
    cache: str = ""
    """Folder that keeps tokenised corpora; empty = $MOESTRO_DATA, or the user's cache folder."""


@config
class StandardLibrary(Corpus):
    """The source text of Python's standard library, without tests, encodings and near-duplicates; split by package."""

    builds: ClassVar[str] = "moestro.tasks.stdlib:find"


@config
class Text(Corpus):
    """A text file, or all text files below a folder. Whole files are held out where there are enough, else the tail."""

    builds: ClassVar[str] = "moestro.tasks.files:find"
    path: str = ""
    """File or folder. Binary and hidden files in a folder are skipped and counted."""
    validation: float = 0.09
    """Share of the text that is held out for validation."""

    def __post_init__(self) -> None:
        if not 0 < self.validation < 1:
            raise UserError(f"Text.validation must lie between 0 and 1, found {self.validation}")
