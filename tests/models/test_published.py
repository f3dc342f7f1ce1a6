"""Published totals, to the digits given, and active parameters within 2 percent."""

from __future__ import annotations

import math

import pytest

from moestro.core.errors import UserError
from moestro.models import published
from moestro.models.published import PUBLISHED
from moestro.nn import LatentAttention

FIGURES = {  # billions: total, its rounding, active
    "mixtral-8x7b": (46.70, 2, 12.88),
    "qwen3-30b-a3b": (30.53, 2, 3.35),
    "olmoe-1b-7b": (6.9, 1, 1.3),
    "deepseek-v2-lite": (15.71, 2, 2.66),
    "deepseek-v3": (671.03, 2, 37.55),
    "moonlight-16b-a3b": (15.96, 2, 2.91),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes(name: str) -> None:
    total, digits, active = FIGURES[name]
    config = published(name)
    assert round(config.num_params() / 1e9, digits) == total
    assert config.num_active_params() / 1e9 == pytest.approx(active, rel=0.02)


def test_deepseek_v3_to_the_last_digit_that_is_published() -> None:
    """671.03B and 37.55B count both embeddings and leave out the module that predicts a second token, and biases of the
    routers, which are no parameters. 37B, as often quoted, counts one embedding."""
    config = published("deepseek-v3")
    assert config.num_params() == 671_026_404_352
    active = config.num_active_params()
    assert round(active / 1e9, 2) == 37.55
    embedding = config.vocab_size * config.dim
    assert round((active - embedding) / 1e9) == 37
    experts = 3 * 7168 * 2048
    assert config.num_params() - active == 58 * (256 - 8) * experts
    # one vector of 512 + 64 numbers per token and layer, where full keys and values would be 128 heads of 192 + 128
    assert isinstance(config.attention, LatentAttention)
    assert config.attention.cache_width == 576
    scale = config.attention.replace(num_heads=1).build(8).scale
    assert scale == pytest.approx(192**-0.5 * (0.1 * math.log(40) + 1) ** 2)


@pytest.mark.parametrize(("name", "total", "active"), [("moonlight-16b-a3b", 15.29, 2.24)])
def test_figures_without_embeddings(name: str, total: float, active: float) -> None:
    """Moonlight's report (arXiv 2502.16982, table 4) counts neither embedding."""
    config = published(name)
    embeddings = 2 * config.vocab_size * config.dim
    assert round((config.num_params() - embeddings) / 1e9, 2) == total
    assert round((config.num_active_params() - embeddings) / 1e9, 2) == active


def test_deepseek_v2_lite_without_the_input_embedding() -> None:
    """Its 2.4B active leave out the input embedding (arXiv 2405.04434 appendix B: 15.7B, 2.4B)."""
    config = published("deepseek-v2-lite")
    assert (config.num_active_params() - config.vocab_size * config.dim) / 1e9 == pytest.approx(2.4, abs=0.06)


@pytest.mark.parametrize("name", PUBLISHED)
def test_configs_travel(name: str) -> None:
    config = published(name)
    assert type(config).from_dict(config.to_dict()) == config


def test_unknown_name() -> None:
    with pytest.raises(UserError, match="did you mean 'mixtral-8x7b'"):
        published("mixtral-8x7")
