"""What the user reads when something fails: one line on stderr, and an exit status."""

from __future__ import annotations

import errno
import os
import signal
import sys

from ..core.errors import UserError

__all__ = ["explain", "report"]

USER, FAILED, INTERRUPTED = 2, 1, 128 + signal.SIGINT

_HINTS = {
    errno.ENOSPC: ("the disk is full", "free some space; a run can be continued with --resume", FAILED),
    errno.EDQUOT: ("the disk quota is used up", "free some space; a run can be continued with --resume", FAILED),
    errno.EIO: ("the device failed", "what was saved before is still there", FAILED),
    errno.EACCES: ("permission denied", "choose a place you may use", USER),
    errno.EPERM: ("permission denied", "choose a place you may use", USER),
    errno.EROFS: ("the file system is read-only", "choose a place you may write to", USER),
    errno.ENOTDIR: ("a part of the path is a file, not a folder", "choose another path", USER),
    errno.EEXIST: ("there is already something with this name", "choose another path", USER),
    errno.EISDIR: ("this is a folder, not a file", "name a file", USER),
    errno.ENOENT: ("no such file or folder", "check the path", USER),
    errno.ENAMETOOLONG: ("the path is too long", "choose a shorter one", USER),
}


def explain(error: BaseException) -> tuple[str, int]:
    """One line for the user, and the exit status: 2 for what the user can put right, 130 when interrupted, else 1."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", INTERRUPTED
    if isinstance(error, UserError):
        return _line(str(error)), USER
    if isinstance(error, OSError) and error.errno in _HINTS:
        what, remedy, status = _HINTS[error.errno]
        where = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes | os.PathLike) else ""
        return _line(f"{where}{what}; {remedy}"), status
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return "out of memory; use a smaller batch, shorter sequences or a smaller model", FAILED
    text = _line(str(error)) or "no message"
    return f"{type(error).__name__}: {text} (moestro --debug VERB ... shows where)", FAILED


def report(error: BaseException) -> int:
    """Print the line for `error` on stderr; returns the exit status."""
    if isinstance(error, BrokenPipeError):
        # The reader of our output has gone (`moestro info ... | head`): not worth a word. Whatever is still buffered
        # must not fail again while the interpreter shuts down.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    line, status = explain(error)
    print(f"moestro: error: {line}", file=sys.stderr, flush=True)
    return status


def _line(text: str) -> str:
    return " ".join(text.split())
