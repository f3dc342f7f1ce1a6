"""The compiled kernels for either instruction set, whichever this machine would choose."""

from __future__ import annotations

import ctypes
import functools
import importlib.resources
import subprocess
import tempfile
import types
from pathlib import Path
from typing import Any

from moestro.ops.native import compiler, cpu
from moestro.ops.native.signatures import SIGNATURES

__all__ = ["SOURCE", "levels", "loader", "own_source"]

SOURCE = Path(str(importlib.resources.files("moestro.ops.native") / "source"))


def levels() -> list[str]:
    """The instruction sets that this CPU has: of one with AVX-512, AVX2 too."""
    try:
        best = cpu.instruction_set()
    except Exception:  # no such CPU: the tests that use them are skipped
        return ["avx2"]
    return list(cpu.LEVELS)[list(cpu.LEVELS).index(best) :]


@functools.cache
def loader(level: str) -> Any:
    """Stands for `moestro.ops.native`: all kernels, compiled for a named instruction set.

    level "none": there are none.
    """
    with tempfile.TemporaryDirectory() as folder:
        made = None
        if level != "none":
            path = compiler.compile_library(compiler.find(), sorted(SOURCE.glob("*.c")), level, Path(folder))
            handle = ctypes.CDLL(str(path))
            made = types.SimpleNamespace(instructions=level)
            for name, (result, arguments) in SIGNATURES.items():
                if hasattr(handle, name):
                    function = getattr(handle, name)
                    function.restype, function.argtypes = result, arguments
                    setattr(made, name, function)
        return types.SimpleNamespace(load=lambda: made)


def own_source(text: str, level: str, folder: Path) -> Any:
    """A library of a test's own C source, which may include the shipped headers."""
    source, made = folder / "own.c", folder / "own.so"
    source.write_text(text)
    flags = [*compiler._SPELLED[level], "-O3", "-std=gnu11", "-fPIC", "-ffp-contract=fast", f"-I{SOURCE}"]
    subprocess.run(["gcc", *flags, "-shared", source, "-o", made, "-lm"], check=True)
    return ctypes.CDLL(str(made))
