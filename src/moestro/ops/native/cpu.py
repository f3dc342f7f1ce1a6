"""Which instruction set of this CPU the kernels are compiled for."""

from __future__ import annotations

import platform
import sys
from pathlib import Path

from .unavailable import Unavailable

__all__ = ["LEVELS", "instruction_set"]

# All of x86-64-v3 and -v4 as Linux spells them, not only what the sources name: the compiler may use any of it.
_AVX2 = ("avx", "avx2", "fma", "f16c", "bmi1", "bmi2", "abm", "movbe")
LEVELS = {
    "avx512": (*_AVX2, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"),
    "avx2": _AVX2,
}
"""Instruction set -> the flags that the CPU must have, best first."""


def instruction_set(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The best of `LEVELS` that CPU and kernel offer. Raises `Unavailable`.

    The kernel lists only what it has switched on. torch.backends.cpu.get_cpu_capability() is not asked, because
    environment variables change its answer.
    """
    if sys.platform != "linux":
        raise Unavailable(f"they are for Linux, and this is {platform.system() or sys.platform}")
    if platform.machine() not in ("x86_64", "AMD64"):
        raise Unavailable(f"they are for x86-64, and this CPU is {platform.machine() or 'unknown'}")
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise Unavailable(f"{cpuinfo} cannot be read ({error.strerror}), so the CPU is unknown") from error
    # Some hybrid machines have cores of two kinds, and threads move between them.
    cores = [set(line.partition(":")[2].split()) for line in lines if line.startswith("flags")]
    has = set.intersection(*cores) if cores else set()
    for name, needed in LEVELS.items():
        if has.issuperset(needed):
            return name
    missing = [flag for flag in _AVX2 if flag not in has]
    raise Unavailable(f"they need AVX2, FMA and F16C, and this CPU lacks {', '.join(missing)}")
