"""What a run learns from, opened: text that was tokenised, or examples with their vocabulary, behind one face."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch

from ..core.errors import UserError
from ..core.trail import Trail
from ..tasks.batches import Batches, Feed
from ..tasks.config import Corpus as CorpusConfig
from ..tasks.config import Examples, Text
from ..tasks.corpus import Corpus, cache_folder, open_corpus, prepare, skipped_line, writable
from ..tasks.data.batches import LabelBatch, PairBatch, TranslationBatch
from ..tasks.feed import Prepared, prepare_examples
from ..tasks.labelling import Labels
from ..tasks.tokenizer import Tokenizer
from ..tasks.tokenizer_file import read_tokenizer
from ..tasks.vocabulary_file import VocabularyTokenizer, read_vocabulary
from .config import TrainRun
from .evaluate import Sampled
from .files import read_json
from .layout import Layout, is_run
from .models import Model, filled, routed_by_label
from .ranks import Ranks

__all__ = ["ExampleMaterial", "Material", "Seen", "TextMaterial", "open_material"]

MOST_KINDS = 16  # classes and domains beyond which the trace does not tell them apart


class Seen(Protocol):
    """What the trace keeps of held-out sequences besides their routing. labels: kind -> names."""

    @property
    def labels(self) -> Mapping[str, tuple[str, ...]]: ...

    def __call__(self, sampled: Sampled) -> tuple[Trail, dict[str, Any]]:
        """The part of the trail that the columns describe, and these columns."""
        ...


class Material(Protocol):
    """tokenizer, key, record (of `corpus.json`). pieces: token id -> its text for the trace, None for bytes."""

    tokenizer: Tokenizer
    key: str
    record: dict[str, Any]
    pieces: Callable[[int], str] | None

    def fill(self, config: TrainRun) -> Model:
        """The run's model with what the data decide: vocabulary, classes."""
        ...

    def feed(self, config: TrainRun) -> Feed: ...

    def seen(self, seq_len: int) -> Seen: ...

    def lead(self) -> str:
        """One sentence about it."""
        ...

    def note(self) -> str:
        """What was left out; empty for nothing."""
        ...


class TextMaterial:
    """Running text."""

    def __init__(self, corpus: Corpus, tokenizer: Tokenizer) -> None:
        self.corpus, self.tokenizer = corpus, tokenizer
        self.key, self.record = corpus.key, corpus.record
        self.pieces = None if tokenizer.vocab_size == 256 else lambda i: tokenizer.decode([i])

    def fill(self, config: TrainRun) -> Model:
        """The tokenizer's vocabulary, or that of the weights to begin with, which may have more than it uses."""
        size = self.tokenizer.vocab_size
        if config.start:
            room = config.model.replace().vocab_size  # type: ignore[union-attr]
            if size > room:
                raise UserError(
                    f"start: the tokenizer has {size} ids, the model of {config.start} embeds {room}; train with the "
                    "tokenizer of that model"
                )
            size = room
        return filled(config.model, vocab_size=size, seed=config.seed)

    def feed(self, config: TrainRun) -> Batches:
        return Batches(self.corpus, config.seq_len, config.seed)

    def seen(self, seq_len: int) -> Seen:
        return _SeenText(Labels(self.corpus, self.tokenizer, seq_len))

    def lead(self) -> str:
        record, text = self.record, self.record["splits"]
        skipped = skipped_line(record["skipped"])
        return (
            f"{record['title']}: {len(record['files'])} files, {text['train']['bytes'] / 1e6:.1f} MB to learn from, "
            f"{text['valid']['bytes'] / 1e6:.2f} MB held out{f'; left out: {skipped}' if skipped else ''}."
        )

    def note(self) -> str:
        skipped = skipped_line(self.record["skipped"])
        return f"{self.record['title']}: {len(self.record['files'])} files; left out: {skipped}" if skipped else ""


class _SeenText:
    def __init__(self, inner: Labels) -> None:
        self.inner, self.labels = inner, inner.names

    def __call__(self, sampled: Sampled) -> tuple[Trail, dict[str, Any]]:
        columns = _places(sampled.batch.tokens)
        return sampled.trail, columns | self.inner(sampled.starts)


class ExampleMaterial:
    """Examples of a task."""

    def __init__(self, prepared: Prepared) -> None:
        self.prepared = prepared
        self.tokenizer = VocabularyTokenizer(prepared.vocabulary)
        self.key, self.record, self.pieces = prepared.key, prepared.record, self.tokenizer.piece

    def fill(self, config: TrainRun) -> Model:
        vocabulary, data = self.prepared.vocabulary, self.prepared.data
        for layer in routed_by_label(config.model):
            if layer.num_experts < len(data.domains):
                raise UserError(
                    f"{data.title}: {len(data.domains)} domains ({', '.join(data.domains[:3])}, ...), but a layer "
                    f"whose experts are chosen by domain has {layer.num_experts}; give it as many (num_experts)"
                )
        size, classes = vocabulary.size, len(data.labels)
        return filled(config.model, vocab_size=size, seed=config.seed, start=vocabulary.bos, classes=classes)

    def feed(self, config: TrainRun) -> Feed:
        return self.prepared.feed(config.seq_len, config.seed)

    def seen(self, seq_len: int) -> Seen:
        return _SeenExamples(self.prepared)

    def lead(self) -> str:
        record, splits = self.record, self.record["splits"]
        return (
            f"{record['title']}: {splits['train']['examples']} examples to learn from, {splits['valid']['examples']} "
            f"held out, {record['vocab_size']} tokens."
        )

    def note(self) -> str:
        skipped = skipped_line(self.record["skipped"])
        return f"{self.record['title']}: left out: {skipped}" if skipped else ""


class _SeenExamples:
    """Of translations the target, of pairs the first texts: the trace tells tokens of one sequence apart."""

    def __init__(self, prepared: Prepared) -> None:
        kinds = {"domain": prepared.data.domains, "class": prepared.data.labels}
        self.labels = {kind: names for kind, names in kinds.items() if 1 < len(names) <= MOST_KINDS}

    def __call__(self, sampled: Sampled) -> tuple[Trail, dict[str, Any]]:
        batch, trail = sampled.batch, sampled.trail
        tokens = batch.a if isinstance(batch, PairBatch) else batch.tokens
        if isinstance(batch, TranslationBatch):
            trail = Trail({key: record for key, record in trail.items() if key.path.startswith("decoder.")})
        elif isinstance(batch, PairBatch):
            trail = Trail({key: record for key, record in trail.items() if not key.pass_})
        columns = _places(tokens)
        valid = batch.a_valid if isinstance(batch, PairBatch) else batch.valid
        for kind in self.labels:
            each = batch.labels if kind == "class" and isinstance(batch, LabelBatch) else batch.domain
            if kind == "domain" or isinstance(batch, LabelBatch):
                columns[f"label.{kind}"] = torch.where(valid, each[:, None], -1).reshape(-1)
        return trail, columns


def _places(tokens: Any) -> dict[str, Any]:
    """Columns of every token of [B, S]."""
    B, S = tokens.shape
    return {
        "token": tokens.reshape(-1),
        "position": torch.arange(S).repeat(B),
        "segment": torch.arange(B).repeat_interleave(S),
    }


# Opening ----------------------------------------------------------------------------------------------------------


def open_material(
    config: TrainRun, recorded: TrainRun | None, layout: Layout, ranks: Ranks, say: Callable[[str], None]
) -> Material:
    """The text or the examples of a run; of a resumed run, the same as before, else `UserError`.

    recorded: the settings that the run in `layout` began with.
    """
    key = read_json(layout.corpus)["key"] if recorded is not None else None
    if isinstance(config.data, CorpusConfig):
        made: Material = _open_text(config.data, recorded, key, layout, ranks, say)
        what = "text"
    else:
        assert isinstance(config.data, Examples)
        kept = recorded is not None and isinstance(recorded.data, Examples)
        kept = kept and recorded.data.vocabulary == config.data.vocabulary  # type: ignore[union-attr]
        vocabulary = read_vocabulary(layout.tokenizer) if kept else None
        made = ExampleMaterial(ranks.by_machine(lambda: prepare_examples(config.data, vocabulary)))  # type: ignore[arg-type]
        what = "data"
    if key is not None and made.key != key:
        raise UserError(
            f"resume: the {what} of {made.record['title']} is not the one that this run began with; restore it, or "
            "start a new run in another folder"
        )
    return made


def _open_text(
    data: CorpusConfig,
    recorded: TrainRun | None,
    key: str | None,
    layout: Layout,
    ranks: Ranks,
    say: Callable[[str], None],
) -> TextMaterial:
    before = recorded.data if recorded is not None else None
    kept = isinstance(before, CorpusConfig) and data.tokenizer == before.tokenizer
    tokenizer = read_tokenizer(layout.tokenizer if kept else data.tokenizer)

    def work() -> Corpus:
        folder = cache_folder(data.cache)
        if not data.cache and not writable(folder):
            folder = layout / "text"
        if key is not None and data == before:
            with contextlib.suppress(UserError):
                return open_corpus(folder, key)
        source = data.build(leave_out=is_run) if isinstance(data, Text) else data.build()
        return prepare(source, tokenizer, folder, say)

    return TextMaterial(ranks.by_machine(work), tokenizer)
