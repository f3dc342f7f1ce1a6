"""What is made when training is over: the summary and the report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ..tasks.tokenizer import Tokenizer
from .compare import Line
from .config import TrainRun
from .save import Store

__all__ = ["finish"]


def finish(
    config: TrainRun,
    stores: Mapping[Path, Store],
    lines: Sequence[Line],
    tokenizer: Tokenizer,
    say: Callable[[str], None],
) -> None:
    """Write summary and report, and mark the run complete. stores: folder -> store, the run's own first."""
    main, *others = stores.values()
    for other in others:
        other.commit(complete=True)
    main.put({"summary.json": {"lines": [line.to_dict() for line in lines]}})
    main.commit(complete=True)
