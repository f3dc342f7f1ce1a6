"""The held-out text of a finished run, and the loss of its model on it."""

from __future__ import annotations

from collections.abc import Callable

from ..core.errors import UserError
from ..tasks.batches import Batches
from ..tasks.corpus import cache_folder, open_corpus
from .evaluate import evaluate
from .load import Loaded
from .ranks import Ranks

__all__ = ["held_out", "validate"]


def held_out(loaded: Loaded) -> Batches:
    """The text of a run, tokenised as it was then. Raises `UserError` where it is no longer kept."""
    config, key = loaded.config, loaded.corpus["key"]
    folders = [cache_folder(config.data.cache), loaded.folder / "text", loaded.folder.parent / "text"]
    for folder in folders:
        if (folder / key).is_dir():
            return Batches(open_corpus(folder, key), config.seq_len, config.seed)
    raise UserError(
        f"the tokenised text of this run is not in {folders[0]}; moestro train --resume --out {loaded.folder} makes it "
        "again"
    )


def validate(loaded: Loaded, batches: Batches, watch: Callable[[int, int], None] | None = None) -> float:
    """Bits per byte of the model, as it is now, on the run's validation windows. watch: (windows done, in all)."""
    config = loaded.config
    device = str(next(loaded.model.parameters()).device)
    found = evaluate(loaded.model, config.objective.build(), batches, config, Ranks(device=device), watch=watch)
    return found.bits_per_byte
