"""Kernels are compiled only for what the CPU, all its cores and the kernel of the system offer."""

from __future__ import annotations

import platform
import re
import sys
from pathlib import Path

import pytest

from moestro.ops.native import cpu
from moestro.ops.native.unavailable import Unavailable

INFO = "processor : 0\nmodel name : x\nflags\t\t: fpu {}\nbogomips : 1\n"
AVX2 = " ".join(cpu.LEVELS["avx2"])
AVX512 = " ".join(cpu.LEVELS["avx512"])


@pytest.mark.parametrize(
    ("cores", "expected"),
    [
        ([AVX512], "avx512"),
        ([AVX512 + " amx"], "avx512"),
        ([AVX512.replace("avx512dq", "")], "avx2"),
        ([AVX2], "avx2"),
        ([AVX512, AVX2], "avx2"),
        ([AVX2.replace("f16c", "")], "they need AVX2, FMA and F16C, and this CPU lacks f16c"),
        ([AVX2, AVX2.replace("avx2", "").replace("fma", "")], "and this CPU lacks avx2, fma"),
        ([], "this CPU lacks avx, avx2"),
        (None, "cannot be read (No such file or directory)"),
    ],
)
def test_instruction_sets(
    cores: list[str] | None, expected: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    info = tmp_path / "cpuinfo"
    if cores is not None:
        info.write_text("\n".join(INFO.format(flags) for flags in cores))
    if expected in cpu.LEVELS:
        assert cpu.instruction_set(info) == expected
    else:
        with pytest.raises(Unavailable, match=re.escape(expected)):
            cpu.instruction_set(info)
