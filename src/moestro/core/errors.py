"""Errors that the library raises on purpose, and the one function that suggests a name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["MissingSignalError", "RecomputationError", "UserError", "did_you_mean"]


class UserError(ValueError):
    """Something the user gave cannot work; the message says what, where and what to do. The CLI prints one line."""


class MissingSignalError(UserError):
    """A router, loss or expert needs a signal (positions, segments, labels, ...) that the caller did not give."""


class RecomputationError(RuntimeError):
    """A routing decision was about to be taken a second time, inside a backward pass.

    Activation checkpointing that does not save routing decisions would route the recomputed tokens anew, and the
    gradients would belong to experts that did not make the output. The message names the remedy.
    """


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`" (did you mean 'x'?)"` for the closest known name, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""
