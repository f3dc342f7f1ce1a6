"""Rotary positions against complex multiplication and the formulas of the papers, term by term."""

from __future__ import annotations

import math

import pytest
import torch

from moestro.core.errors import UserError
from moestro.nn import Attention, LongRoPE, Rotary, YaRN
from moestro.nn.rotary import frequencies, rotate
from moestro.testing.compare import assert_close


def by_complex_numbers(x: torch.Tensor, position: torch.Tensor, theta: torch.Tensor, style: str) -> torch.Tensor:
    """x [B, S, H, d] float64, position [B, S]: pair j of a token at p is turned by p * theta_j."""
    r = len(theta)
    pairs = [(2 * j, 2 * j + 1) if style == "interleaved" else (j, j + r) for j in range(r)]
    out = x.clone()
    for j, (a, b) in enumerate(pairs):
        turn = torch.polar(torch.ones_like(position, dtype=torch.float64), position.double() * theta[j])[..., None]
        z = torch.complex(x[..., a], x[..., b]) * turn
        out[..., a], out[..., b] = z.real, z.imag
    return out


@pytest.mark.parametrize("style", ["half", "interleaved"])
@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_rotation_is_a_complex_product(style: str, fraction: float) -> None:
    x = torch.randn(2, 5, 3, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    k = torch.randn(2, 5, 1, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    config = Rotary(style=style, fraction=fraction, base=100.0)  # type: ignore[arg-type]
    rotary = config.build(12)
    position = torch.tensor([[0, 1, 2, 3, 4], [0, 0, 3, 7, 30]])
    width = int(12 * fraction)
    theta = torch.tensor([100.0 ** (-2 * j / width) for j in range(width // 2)], dtype=torch.float64)
    got_q, got_k = rotary(x, k, position)
    assert_close("q", got_q, by_complex_numbers(x, position, theta, style), 1e-6)
    assert_close("k", got_k, by_complex_numbers(k, position, theta, style), 1e-6)
    assert_close("default positions", rotary(x, k, None, start=3)[0], rotary(x, k, torch.arange(3, 8).expand(2, 5))[0])


@pytest.mark.parametrize("interleaved", [False, True])
def test_gradient_of_the_rotation(interleaved: bool) -> None:
    x = torch.randn(2, 3, 2, 6, dtype=torch.float64, requires_grad=True)
    angle = torch.rand(3, 1, 2, dtype=torch.float64)

    def turned(x: torch.Tensor) -> torch.Tensor:
        return rotate(x, angle.cos() * 1.3, angle.sin() * 1.3, interleaved)

    assert torch.autograd.gradcheck(turned, (x,))
    assert torch.autograd.gradgradcheck(turned, (x,))


def test_low_precision_rounds_the_result_only() -> None:
    x = torch.randn(1, 6, 2, 8).to(torch.bfloat16).requires_grad_()
    rotary = Rotary().build(8).to(torch.bfloat16)
    got, _ = rotary(x, x, None, start=1000)
    want = rotary(x.float(), x.float(), None, start=1000)[0].to(torch.bfloat16)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, want)
    got.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.bfloat16


def test_scores_depend_on_distance_only() -> None:
    rotary = Rotary(scaling=YaRN(factor=3.0, original_context=16)).build(8)
    q, k = torch.randn(2, 1, 6, 1, 8, dtype=torch.float64)
    near = [torch.einsum("bshd,bthd->st", *rotary(q, k, None, start=s)) for s in (0, 40)]
    assert_close("scores", near[1], near[0], 1e-5)


def test_yarn_by_its_formulas() -> None:
    """Peng et al. 2023: h(theta) = (1 - gamma(r)) theta / s + gamma(r) theta, r = L theta / 2 pi; 0.1 ln s + 1."""
    s, L, b, width = 8.0, 2048, 10_000.0, 64
    got, factor = frequencies(Rotary(base=b, scaling=YaRN(factor=s, original_context=L)), width)
    want = []
    for j in range(width // 2):
        theta = b ** (-2 * j / width)
        turns = L * theta / (2 * math.pi)
        gamma = min(1.0, max(0.0, (turns - 1) / (32 - 1)))
        want.append((1 - gamma) * theta / s + gamma * theta)
    assert_close("frequencies", got, torch.tensor(want, dtype=torch.float64), 1e-12)
    assert factor == pytest.approx(0.1 * math.log(s) + 1)
    theta = torch.tensor([b ** (-2 * j / width) for j in range(width // 2)], dtype=torch.float64)
    assert got[0] == theta[0], "fast dimensions stay"
    assert got[-1] == theta[-1] / s, "slow ones are interpolated"


def test_yarn_as_released() -> None:
    """The ramp of the authors' code: linear in the dimension index between rounded correction dimensions."""
    s, L, b, width = 40.0, 4096, 10_000.0, 64
    got, _ = frequencies(Rotary(base=b, scaling=YaRN(factor=s, original_context=L, as_released=True)), width)
    low = math.floor(width * math.log(L / (32 * 2 * math.pi)) / (2 * math.log(b)))
    high = math.ceil(width * math.log(L / (1 * 2 * math.pi)) / (2 * math.log(b)))
    assert (low, high) == (10, 23)
    for j in range(width // 2):
        theta = b ** (-2 * j / width)
        ramp = min(1.0, max(0.0, (j - low) / (high - low)))
        assert float(got[j]) == pytest.approx(theta / s * ramp + theta * (1 - ramp), rel=1e-12)


def test_yarn_between_bounds_that_are_not_rounded() -> None:
    s, L, b, width = 32.0, 4096, 150_000.0, 64
    config = Rotary(base=b, scaling=YaRN(factor=s, original_context=L, as_released=True, truncate=False))
    got, _ = frequencies(config, width)
    low, high = (width * math.log(L / (turns * 2 * math.pi)) / (2 * math.log(b)) for turns in (32, 1))
    for j in range(width // 2):
        theta = b ** (-2 * j / width)
        ramp = min(1.0, max(0.0, (j - low) / (high - low)))
        assert float(got[j]) == pytest.approx(theta / s * ramp + theta * (1 - ramp), rel=1e-12)
    rounded, _ = frequencies(config.replace(scaling=YaRN(factor=s, original_context=L, as_released=True)), width)
    assert not torch.equal(got, rounded)


def test_two_mscales_make_the_attention_factor() -> None:
    both = YaRN(factor=40.0, mscale=0.7, mscale_all_dim=1.3)
    want = (0.07 * math.log(40) + 1) / (0.13 * math.log(40) + 1)
    assert frequencies(Rotary(scaling=both), 8)[1] == pytest.approx(want)
    assert frequencies(Rotary(scaling=both.replace(mscale=1.3)), 8)[1] == 1.0
    for alone in (both.replace(mscale=None), both.replace(mscale_all_dim=None)):
        assert frequencies(Rotary(scaling=alone), 8)[1] == pytest.approx(0.1 * math.log(40) + 1)
    assert frequencies(Rotary(scaling=both.replace(attention_factor=1.1)), 8)[1] == 1.1


def test_the_attention_factor_scales_scores_by_its_square() -> None:
    q, k = torch.randn(2, 1, 4, 2, 8, dtype=torch.float64)
    plain = Rotary(scaling=YaRN(factor=4.0, attention_factor=1.0)).build(8)
    sharp = Rotary(scaling=YaRN(factor=4.0, attention_factor=1.5)).build(8)
    scores = [torch.einsum("bshd,bthd->hst", *rotary(q, k, None)) for rotary in (plain, sharp)]
    assert_close("scores", scores[1], 2.25 * scores[0], 1e-6)


LONG = LongRoPE(
    short_factor=(1.0, 1.5, 2.0), long_factor=(1.0, 4.0, 9.0), original_context=4, short_scale=1.1, long_scale=1.3
)


def turned(x: torch.Tensor, start: int, divisor: tuple[float, ...], scale: float) -> torch.Tensor:
    """x [B, S, H, 6] float64 by its definition: angle p / (divisor_j * base^(2j/6)), times the scale."""
    position = torch.arange(start, start + x.shape[1]).expand(x.shape[0], -1)
    theta = torch.tensor([10_000.0 ** (-2 * j / 6) / divisor[j] for j in range(3)], dtype=torch.float64)
    return by_complex_numbers(x, position, theta, "half") * scale


def test_longrope_chooses_by_the_last_position_of_a_pass() -> None:
    assert LONG.short_factor
    assert LONG.long_factor
    short, long = (LONG.short_factor, LONG.short_scale), (LONG.long_factor, LONG.long_scale)
    x = torch.randn(2, 5, 1, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rotary = Rotary(scaling=LONG).build(6)
    for start, n, case in ((0, 4, short), (0, 5, long), (1, 3, short), (5, 3, long)):
        want = turned(x[:, :n], start, *case)
        assert_close(f"{n} from {start}", rotary(x[:, :n], x[:, :n], None, start)[0], want, 1e-6)
    place = torch.tensor([[0, 1, 2], [1, 2, 3]])
    for shift, case in ((0, short), (1, long)):
        want = torch.cat([turned(x[r : r + 1, :3], r + shift, *case) for r in (0, 1)])
        assert_close(f"given positions + {shift}", rotary(x[:, :3], x[:, :3], place + shift)[0], want, 1e-6)
    for use, case in (("short", short), ("long", long)):
        fixed = Rotary(scaling=LONG.replace(use=use)).build(6)
        assert_close(use, fixed(x, x, None, start=2)[0], turned(x, 2, *case), 1e-6)
    assert torch.equal(rotary.to(torch.bfloat16).long_frequency, frequencies(Rotary(scaling=LONG), 6, True)[0].float())
    plain = Rotary(scaling=LongRoPE()).build(6)
    assert_close("no factors", plain(x, x, None)[0], Rotary().build(6)(x, x, None)[0], 0.0)


def test_longrope_in_cached_passes() -> None:
    """Inside one set they equal the whole; where the set changes half-way they are refused."""
    torch.manual_seed(0)
    x = torch.randn(1, 8, 12)
    for use, first in (("auto", 5), ("long", 2), ("short", 2)):
        m = Attention(num_heads=2, positions=Rotary(scaling=LONG.replace(use=use))).build(12)
        with torch.no_grad():
            want, state, parts = m(x)[0], m.new_state(8), []
            for part in x.split((first,) + (1,) * (8 - first), dim=1):
                y, state = m(part, None, state)
                parts.append(y)
        assert_close(f"{use}, token by token", torch.cat(parts, 1), want, 1e-5)
    for grad in (True, False):
        m = Attention(num_heads=2, positions=Rotary(scaling=LONG)).build(12)
        with torch.set_grad_enabled(grad):
            _, state = m(x[:, :4], None, m.new_state(8))
            with pytest.raises(UserError, match=r"beyond the original context of 4 tokens.*use=\"long\""):
                m(x[:, 4:5], None, state)


def test_longrope_errors() -> None:
    with pytest.raises(UserError, match="2 factors for 3 rotated pairs"):
        Rotary(scaling=LongRoPE(short_factor=(1.0, 2.0), long_factor=(1.0, 2.0))).build(6)
    with pytest.raises(UserError, match="must be positive"):
        LongRoPE(short_factor=(0.0, 1.0))


def test_frequencies_survive_casts_and_the_meta_device() -> None:
    rotary = Rotary().build(8)
    want = rotary.frequency.clone()
    assert torch.equal(rotary.to(torch.bfloat16).frequency, want)
    assert rotary.frequency.dtype == torch.float32
    with torch.device("meta"):
        empty = Rotary().build(8)
    assert empty.frequency.is_meta
    assert torch.equal(empty.to_empty(device="cpu").frequency, want)
    assert not rotary.state_dict()


def test_impossible_settings() -> None:
    with pytest.raises(UserError, match="no even number"):
        Rotary(fraction=0.5).build(6)
    with pytest.raises(UserError, match="fraction"):
        Rotary(fraction=1.5)
    with pytest.raises(UserError, match="factor"):
        YaRN(factor=0.5)
