"""Published totals, to the digits given, and active parameters within 2 percent."""

from __future__ import annotations

import pytest

from moestro.core.errors import UserError
from moestro.models import published
from moestro.models.published import PUBLISHED

FIGURES = {  # billions: total, its rounding, active
    "mixtral-8x7b": (46.70, 2, 12.88),
    "qwen3-30b-a3b": (30.53, 2, 3.35),
    "olmoe-1b-7b": (6.9, 1, 1.3),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes(name: str) -> None:
    total, digits, active = FIGURES[name]
    config = published(name)
    assert round(config.num_params() / 1e9, digits) == total
    assert config.num_active_params() / 1e9 == pytest.approx(active, rel=0.02)


def test_unknown_name() -> None:
    with pytest.raises(UserError, match="did you mean 'mixtral-8x7b'"):
        published("mixtral-8x7")
