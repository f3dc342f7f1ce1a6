"""From the shipped source to a loaded library: out of the cache, or compiled now, or a reason why not."""

from __future__ import annotations

import functools
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

import torch

from . import cache, compiler, cpu
from .library import Library
from .unavailable import Unavailable

__all__ = ["load", "reason"]

SOURCE = Path(__file__).with_name("source")
_ONE_AT_A_TIME = threading.Lock()


class _Outcome(NamedTuple):
    library: Library | None
    reason: str


def load() -> Library | None:
    """The compiled kernels, or None where they cannot be had.

    The first call of a process finds them in the cache, or compiles them and says so on stderr, or says there why it
    cannot. Everything after that is silent.
    """
    return _outcome().library


def reason() -> str:
    """Why `load()` gives None; else the instruction set and where the library came from, such as
    "avx512, compiled in 2.1 s" and "avx512, from the cache". Loads where nobody has."""
    return _outcome().reason


def _outcome() -> _Outcome:
    with _ONE_AT_A_TIME:
        return _first()


@functools.cache
def _first() -> _Outcome:
    try:
        return _get()
    except (Unavailable, OSError) as why:
        _say(f"no CPU kernels: {why}; using torch")
        return _Outcome(None, str(why))


def _get() -> _Outcome:
    instructions = cpu.instruction_set()
    if not torch.backends.openmp.is_available():
        raise Unavailable("this torch was built without OpenMP, whose threads they run in")
    found = compiler.find()
    sources = sorted(SOURCE.glob("*.c"))
    if not sources:
        raise Unavailable(f"the package was installed without its C source ({SOURCE})")
    name = cache.key(instructions, found, [*sources, *sorted(SOURCE.glob("*.h"))])
    path, obstacle = None, ""
    try:
        path = cache.folder() / name
    except Unavailable as why:
        obstacle = str(why)
    if path is not None and cache.intact(path):
        try:
            return _Outcome(Library(path, instructions), f"{instructions}, from the cache")
        except Unavailable:
            pass  # made anew below, once
    return _compile(found, sources, instructions, path, obstacle)


def _compile(
    found: compiler.Compiler, sources: list[Path], instructions: str, path: Path | None, obstacle: str
) -> _Outcome:
    """Compile in a private temporary folder, keep the result where it can be kept, and load it."""
    started = time.perf_counter()
    try:
        private = tempfile.TemporaryDirectory(prefix="moestro-")  # 0700; what is loaded outlives its file
    except OSError as error:
        raise Unavailable(f"there is no folder for temporary files ({error.strerror})") from error
    with private as work:
        made = compiler.compile_library(found, sources, instructions, Path(work))
        seconds = time.perf_counter() - started
        if path is not None:
            try:
                cache.put(made, path)
                made = path
            except Unavailable as why:
                obstacle = str(why)
        try:
            library = Library(made, instructions)
        except Unavailable as why:
            made.unlink(missing_ok=True)
            raise Unavailable(f"{why}; {obstacle}" if obstacle else str(why)) from why
    kept = f", for this process only: {obstacle}" if obstacle else ""
    _say(f"compiled the CPU kernels ({instructions}) in {seconds:.1f} s{kept}")
    return _Outcome(library, f"{instructions}, compiled in {seconds:.1f} s{kept}")


def _say(line: str) -> None:
    if sys.stderr is not None:
        sys.stderr.write(f"moestro: {line}\n")
        sys.stderr.flush()
