"""The shipped C source: in the package, compiling, and declared as it is."""

from __future__ import annotations

import ctypes
import importlib.resources
import re
import subprocess
from pathlib import Path

import pytest

from moestro.ops.native import compiler, cpu, library
from moestro.ops.native.signatures import ABI, SIGNATURES
from ops.native_cases import compiles

SHIPPED = Path(str(importlib.resources.files("moestro.ops.native") / "source"))
MISTAKES = [
    f"-Werror={kind}"
    for kind in ("implicit-function-declaration", "incompatible-pointer-types", "int-conversion", "return-type")
]
TYPES = {
    "void": None,
    "int": ctypes.c_int,
    "int64_t": ctypes.c_int64,
    "float": ctypes.c_float,
    "double": ctypes.c_double,
}


def test_the_sources_are_in_the_package() -> None:
    names = {file.name for file in SHIPPED.iterdir()}
    assert "probe.c" in names
    assert {Path(name).suffix for name in names} <= {".c", ".h"}


@compiles
def test_the_table_says_what_the_source_says(tmp_path: Path) -> None:
    """gcc lists the functions that a file defines: the same names, results and arguments, in the same order."""
    defined, level = {}, compiler._SPELLED["avx512"]
    for source in sorted(SHIPPED.glob("*.c")):
        listing = tmp_path / f"{source.stem}.txt"
        line = ["gcc", "-std=gnu11", *level, "-fopenmp", "-fsyntax-only", "-aux-info", listing, source]
        subprocess.run(line, check=True)
        for found in re.finditer(r"^/\* \S+:\d+:.F \*/ extern (.+?)(\w+) \((.*?)\);", listing.read_text(), re.M):
            result, name, arguments = found.groups()
            if str(source.parent) in found.group(0):
                defined[name] = (kind(result), tuple(kind(a) for a in arguments.split(", ") if a != "void"))
    assert sorted(defined) == sorted(SIGNATURES)
    assert [name for name in defined if defined[name] != SIGNATURES[name]] == []


def kind(declared: str) -> object:
    if "*" in declared:
        return ctypes.c_void_p
    words = [word for word in declared.split() if word != "const"]
    return TYPES[words[0]]


@compiles
@pytest.mark.parametrize("level", list(cpu.LEVELS))
def test_the_sources_compile(level: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For either instruction set, on whatever machine, no name undeclared; loaded where the CPU can."""
    monkeypatch.setattr(compiler, "_COMPILE", (*compiler._COMPILE, "-O1", *MISTAKES))
    made = compiler.compile_library(compiler.find(), sorted(SHIPPED.glob("*.c")), level, tmp_path)
    if level == "avx2" or cpu.instruction_set() == level:
        assert library.Library(made, level).moestro_abi() == ABI
