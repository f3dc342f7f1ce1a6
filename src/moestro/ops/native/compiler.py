"""The C compiler: finding it, what it is told, and one compilation."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from .unavailable import Unavailable

__all__ = ["Compiler", "compile_library", "find", "flags"]

# Contraction to fused multiply-add is wanted; -ffast-math is not, because it changes sums, NaN and infinity.
_COMPILE = ("-O3", "-std=gnu11", "-fPIC", "-fopenmp", "-ffp-contract=fast")
# Without -fopenmp: its functions are found at load time in the runtime that torch has loaded, hence in torch's threads.
_LINK = ("-shared", "-Wl,-Bsymbolic", "-lm")

_LEVEL = {"avx512": "-march=x86-64-v4", "avx2": "-march=x86-64-v3"}
_AVX2 = ("-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2", "-mlzcnt", "-mmovbe")
_SPELLED = {  # for compilers from before the levels had names
    "avx512": (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512cd", "-mavx512dq", "-mavx512vl"),
    "avx2": _AVX2,
}
_TUNE = ("-mtune=native",)  # chooses among instructions of the level, adds none
_SECONDS = 300


class Compiler(NamedTuple):
    """command: the program (absolute) and arguments given with it. version: the first line of `--version`."""

    command: tuple[str, ...]
    version: str


def find() -> Compiler:
    """`$CC` where it is set, else the first of gcc, cc and clang on the path. Raises `Unavailable`."""
    said = os.environ.get("CC", "").strip()
    try:
        wanted = [shlex.split(said)] if said else [["gcc"], ["cc"], ["clang"]]
    except ValueError:
        raise Unavailable(f"CC={said!r} is no command line") from None
    for name, *arguments in wanted:
        if program := shutil.which(name):
            command = (os.path.abspath(program), *arguments)
            done = _run((*command, "--version"), None)
            if done.returncode:
                raise Unavailable(f"{program} --version failed ({_said(done)})")
            return Compiler(command, next(iter(done.stdout.splitlines()), ""))
    raise Unavailable(f"there is no compiler {said!r}, which CC names" if said else "there is no C compiler (gcc)")


def flags(instructions: str) -> tuple[str, ...]:
    """All flags that are wanted. What one compiler knows of them follows from the compiler."""
    return (*_COMPILE, _LEVEL[instructions], *_SPELLED[instructions], *_TUNE, *_LINK)


def compile_library(compiler: Compiler, sources: Sequence[Path], instructions: str, folder: Path) -> Path:
    """Compile the sources, each by itself, into one shared library in `folder`. Raises `Unavailable`."""
    chosen = (*_COMPILE, *_machine_flags(compiler, instructions, folder))
    objects = [folder / f"{source.stem}.o" for source in sources]
    lines = [(*compiler.command, *chosen, "-c", str(s), "-o", str(o)) for s, o in zip(sources, objects, strict=True)]
    with _running(lines, folder) as processes:  # side by side: every file takes its time
        for process in processes:
            _check(compiler, _finish(process))
    library = folder / "kernels.so"
    _check(compiler, _run((*compiler.command, "-o", str(library), *map(str, objects), *_LINK), folder))
    if not library.is_file():
        raise Unavailable(f"{compiler.command[0]} wrote no library")
    return library


def _machine_flags(compiler: Compiler, instructions: str, folder: Path) -> tuple[str, ...]:
    def accepted(*some: str) -> bool:
        return not _run((*compiler.command, *some, "-x", "c", "-E", os.devnull), folder).returncode

    level = (_LEVEL[instructions],)
    level = level if accepted(*level) else _SPELLED[instructions]
    return (*level, *_TUNE) if accepted(*level, *_TUNE) else level


def _start(line: Sequence[str], folder: Path | None) -> subprocess.Popen[str]:
    surroundings = {**os.environ, "LC_ALL": "C"}
    if folder is not None:
        surroundings["TMPDIR"] = str(folder)
    pipe = subprocess.PIPE
    try:
        return subprocess.Popen(
            line, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True, errors="replace", env=surroundings
        )
    except OSError as error:
        raise Unavailable(f"{line[0]} cannot be run ({error.strerror})") from error


@contextlib.contextmanager
def _running(lines: Sequence[Sequence[str]], folder: Path) -> Iterator[list[subprocess.Popen[str]]]:
    """Started processes; none is left when the block ends, however it ends."""
    processes: list[subprocess.Popen[str]] = []
    try:
        for line in lines:
            processes.append(_start(line, folder))
        yield processes
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.communicate()


def _finish(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    try:
        stdout, stderr = process.communicate(timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise Unavailable(f"{_program(process.args)} took more than {_SECONDS} s") from None
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def _run(line: Sequence[str], folder: Path | None) -> subprocess.CompletedProcess[str]:
    return _finish(_start(line, folder))


def _program(arguments: object) -> str:
    return str(arguments[0]) if isinstance(arguments, tuple) else str(arguments)


def _check(compiler: Compiler, done: subprocess.CompletedProcess[str]) -> None:
    if done.returncode:
        raise Unavailable(f"{compiler.command[0]} could not compile them ({_said(done)})")


def _said(done: subprocess.CompletedProcess[str]) -> str:
    """The first error that the compiler printed, on one line."""
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    chosen = next((line for line in lines if "error" in line.lower()), lines[-1] if lines else "")
    return chosen[:200] or f"exit status {done.returncode}"
