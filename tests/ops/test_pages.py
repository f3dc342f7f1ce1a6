"""Large pages change nothing but the pages."""

import re
from pathlib import Path

import pytest
import torch

from moestro.experts.config import Gated
from moestro.ops import pages
from moestro.ops.pages import LARGE, large_pages

SWITCH = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def huge_bytes(tensor: torch.Tensor) -> int:
    """Bytes in large pages of the mapping that the tensor lies in."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        found = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
        if found:
            inside = int(found[1], 16) <= tensor.data_ptr() + tensor.nbytes // 2 < int(found[2], 16)
        elif inside and line.startswith("AnonHugePages:"):
            return 1024 * int(line.split()[1])
    return 0


@pytest.mark.skipif(not SWITCH.exists() or "[never]" in SWITCH.read_text(), reason="this system has no large pages")
@pytest.mark.parametrize("fresh", [True, False])
def test_they_come_and_the_numbers_stay(fresh: bool) -> None:
    tensor = torch.empty(8 * LARGE // 4)
    if fresh:
        large_pages(tensor, fresh=True)
    tensor.copy_(torch.arange(tensor.numel()))
    if not fresh:
        large_pages(tensor)
    assert torch.equal(tensor, torch.arange(tensor.numel()).float())
    if fresh or huge_bytes(tensor):  # older systems have no way to ask for them afterwards
        assert huge_bytes(tensor) >= tensor.nbytes // 2


def test_what_it_is_not_for_is_left_alone() -> None:
    for tensor in (torch.ones(3), torch.ones(2 * LARGE // 4)[::2], torch.ones(LARGE, device="meta"), torch.empty(0)):
        assert large_pages(tensor) is tensor


def test_a_system_that_refuses_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.ones(LARGE // 4)
    for answer in (None, lambda *_: -1):
        monkeypatch.setattr(pages, "_madvise", lambda answer=answer: answer)
        assert bool((large_pages(tensor) == 1).all())


def test_banks_ask_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(pages, "_madvise", lambda: lambda start, size, how: asked.append((start, size)) or 0)
    bank = Gated(width=256).build(dim=256, num_experts=16)
    assert any(start <= bank.gate_up.data_ptr() + LARGE // 2 < start + size for start, size in asked)
