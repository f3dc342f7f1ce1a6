"""Configs of what runs learn from besides running text: examples of a task, from a user's files or a published set."""

from __future__ import annotations

from typing import Any, ClassVar

from ..core.config import Config, config
from ..core.errors import UserError
from .data.config import Data, Multi30k, PairDomains, Vocabulary, WordVocabulary

__all__ = ["Examples", "LabelledTexts", "Material", "SpanQuestions", "TextPairs", "Translations"]


@config
class Material(Config):
    """Base of what a run learns from: text (`Corpus`), or examples of a task (`Examples`)."""


@config
class Examples(Material):
    """Base of examples of a task. Built with (): a `tasks.data.examples.DataSet`.

    The length of an example is the run's `seq_len`; what is longer is cut.
    """

    fields: ClassVar[tuple[str, ...]] = ()
    """What rows of a file must have."""
    path: str = ""
    """File of examples, or a folder: its files train, valid and test where it has a train file, else all its files."""
    published: Data | PairDomains | None = None
    """A published data set, used where there is no path."""
    validation: float = 0.1
    """Share of the examples held out for validation, where no file is for that. Published sets have splits."""
    vocabulary: Vocabulary = WordVocabulary()
    """What text becomes; words and byte pairs are learnt from the training examples."""
    pool: int = 1
    """So many batches are drawn together and dealt by length, so that less of them is padding; 1 = not."""

    def __post_init__(self) -> None:
        self.at_least(1, "pool")
        if not 0 < self.validation < 1:
            raise UserError(
                f"{type(self).__name__}.validation must lie between 0 and 1, found {self.validation}: it is a share"
            )

    def at(self, path: str) -> Any:
        """The same with the examples of a file or folder."""
        return self.replace(path=path, published=None)


@config
class Translations(Examples):
    """Sentences and their translations, for an encoder-decoder. Rows: source, target (and domain, if you like).

    Source and target have one vocabulary.
    """

    builds: ClassVar[str] = "moestro.tasks.own:translations"
    fields: ClassVar[tuple[str, ...]] = ("source", "target")
    published: Data | PairDomains | None = Multi30k()
    """A published data set, used where there is no path."""


@config
class LabelledTexts(Examples):
    """Texts of one class each, for an encoder with a class head. Rows: text, label (and domain, if you like).

    Classes are what the rows name; where there is no file for validation, a share of each class is held out.
    """

    builds: ClassVar[str] = "moestro.tasks.own:labelled"
    fields: ClassVar[tuple[str, ...]] = ("text", "label")


@config
class SpanQuestions(Examples):
    """Questions answered by a stretch of a context, for an encoder with a span head. Files in SQuAD's format, or rows
    of JSON: context, question, answers (and id). Held out are contexts with all their questions."""

    builds: ClassVar[str] = "moestro.tasks.own:span_questions"
    fields: ClassVar[tuple[str, ...]] = ("context", "question", "answers")
    stride: int = 32
    """Tokens that neighbouring windows of a long context share."""
    unanswered: bool = False
    """Keep windows without an answer, whose answer is then the first token; else they are left out."""
    copies: int = 0
    """Changed copies of every training question that are learnt from too, answers as they are (easy augmentation)."""
    synonyms: str = ""
    """File of synonyms for the copies (tasks.data.synonyms); empty = words of like company in the training texts."""
    replaced: float = 0.3
    """Share of a context's words that become synonyms in some of the copies."""
    deleted: float = 0.1
    """Share of its words that are left out in the others."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(0, "stride", "copies")


@config
class TextPairs(Examples):
    """Pairs of texts that belong together, for an encoder with an embedding head. Rows: a, b (and domain, similar).

    Domains are numbered in the order of their names; a pair's is the routing signal `label` (and `task`) of its tokens.
    Pairs that are not similar are left out: a pair's negatives are the other pairs of its batch.
    """

    builds: ClassVar[str] = "moestro.tasks.own:pairs"
    fields: ClassVar[tuple[str, ...]] = ("a", "b")
    domain_tokens: bool = False
    """Begin every text with a token of its domain, in place of the one that all texts have."""
    swap: bool = False
    """Let the two texts of half of the pairs change places, always the same pairs."""
