"""The held-out text or examples of a finished run, and the loss of its model on it."""

from __future__ import annotations

from collections.abc import Callable

from ..core.errors import UserError
from ..tasks.batches import Batches, Feed
from ..tasks.config import Corpus
from ..tasks.corpus import cache_folder, open_corpus
from ..tasks.feed import prepare_examples
from ..tasks.vocabulary_file import VocabularyTokenizer
from .evaluate import Evaluation, evaluate
from .load import Loaded
from .ranks import Ranks

__all__ = ["evaluated", "held_out", "held_out_text", "validate"]


def held_out(loaded: Loaded) -> Feed:
    """The text of a run, tokenised as it was then, or its examples, read again. Raises `UserError` where the text is no
    longer kept, or the examples are no longer what they were."""
    if isinstance(loaded.config.data, Corpus):
        return held_out_text(loaded)
    config, tokenizer = loaded.config, loaded.tokenizer
    assert isinstance(tokenizer, VocabularyTokenizer)
    made = prepare_examples(config.data, tokenizer.vocabulary)  # type: ignore[arg-type]
    if made.key != loaded.corpus["key"]:
        raise UserError(f"{made.record['title']}: the data is not what this run was trained on; restore it")
    return made.feed(config.seq_len, config.seed)


def held_out_text(loaded: Loaded) -> Batches:
    """The same, of a run on text."""
    config, key = loaded.config, loaded.corpus["key"]
    assert isinstance(config.data, Corpus)
    folders = [cache_folder(config.data.cache), loaded.folder / "text", loaded.folder.parent / "text"]
    for folder in folders:
        if (folder / key).is_dir():
            return Batches(open_corpus(folder, key), config.seq_len, config.seed)
    raise UserError(
        f"the tokenised text of this run is not in {folders[0]}; moestro train --resume --out {loaded.folder} makes it "
        "again"
    )


def evaluated(loaded: Loaded, batches: Feed, watch: Callable[[int, int], None] | None = None) -> Evaluation:
    """The model, as it is now, on the run's validation sequences. watch: (sequences done, in all)."""
    config = loaded.config
    device = str(next(loaded.model.parameters()).device)
    return evaluate(loaded.model, config.objective.build(), batches, config, Ranks(device=device), watch=watch)


def validate(loaded: Loaded, batches: Feed, watch: Callable[[int, int], None] | None = None) -> float:
    """The same in one number: bits per byte of text, nats per target of examples."""
    return evaluated(loaded, batches, watch).score
