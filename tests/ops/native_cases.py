"""Where the tests of compiled kernels run."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

__all__ = ["compiles"]

# Found without the code under test: where a compiler and the CPU are there, nothing below is skipped.
FLAGS = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []
CAN = sys.platform == "linux" and "avx2" in FLAGS and bool(shutil.which("gcc"))
compiles = pytest.mark.skipif(not CAN, reason="needs Linux, gcc and AVX2: elsewhere torch's operators are used")
