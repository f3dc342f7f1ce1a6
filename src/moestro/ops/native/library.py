"""The compiled library, with its functions declared."""

from __future__ import annotations

import _ctypes
import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch  # noqa: F401 - loads the OpenMP runtime that the library's functions run in

from .signatures import ABI, SIGNATURES
from .unavailable import Unavailable

__all__ = ["Library"]


class Library:
    """Every function of `SIGNATURES` as an attribute. Raises `Unavailable` where one is missing or ABIs differ.

    instructions: "avx512" or "avx2".
    """

    def __init__(self, path: Path, instructions: str) -> None:
        self.instructions = instructions
        try:
            handle = ctypes.CDLL(str(path))
        except OSError as error:
            raise Unavailable(_why(str(error))) from error
        try:
            for name, (result, arguments) in SIGNATURES.items():
                function = getattr(handle, name, None)
                if function is None:
                    raise Unavailable(f"the library has no function {name}")
                function.restype, function.argtypes = result, arguments
                setattr(self, name, function)
            if (abi := self.moestro_abi()) != ABI:
                raise Unavailable(f"the library has interface {abi}, and {ABI} is wanted")
        except Unavailable:
            _ctypes.dlclose(handle._handle)  # else a better file of the same name would never be read
            raise

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Callable[..., Any]: ...


def _why(said: str) -> str:
    line = said.splitlines()[0] if said else "no reason given"
    if "GOMP_" in line:
        return f"torch has loaded no OpenMP runtime of GCC's ({line})"
    if "__kmpc_" in line:
        return f"the compiler wants an OpenMP runtime that torch has not loaded; install gcc ({line})"
    return f"the library cannot be loaded ({line})"
