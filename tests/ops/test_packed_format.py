"""Weights in fewer bits: the layout, bit by bit, and errors bounded by what the format says."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moestro.core.errors import UserError
from moestro.ops.packed import BLOCK, KINDS, Kind, Packed, bytes_of, pack, unpack
from moestro.ops.packed import kernels as compiled
from ops.native_cases import compiles
from ops.ops_cases import randn

SHAPES = [(1, 1), (3, 31), (2, 5, 32), (2, 3, 33), (7, 100), (0, 32), (2, 0)]


def blocks(w: Tensor) -> Tensor:
    """[.., N, 32], zeros where a block is not full."""
    return torch.nn.functional.pad(w, (0, -w.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))


def hard() -> Tensor:
    """Rows of very different sizes, zeros, one large weight among small ones, both signs."""
    w = randn(40, 96, seed=1) * torch.logspace(-6, 3, 40)[:, None]
    w[3] = 0
    w[4, ::2] = 0
    w[5, 7], w[6, 9], w[7] = 1e4, -1e4, w[7].abs()
    w[8] = torch.where(torch.arange(96) % 2 == 0, 1.0, -1.0)
    w[9] = 1e-9
    return w


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_and_bytes(kind: Kind, shape: tuple[int, ...]) -> None:
    w = randn(*shape)
    packed = pack(w, kind)
    assert packed.shape == shape
    assert packed.nbytes == bytes_of(kind, shape)
    assert unpack(packed).shape == shape
    assert unpack(packed).dtype == torch.float32


def test_bits_per_weight() -> None:
    shape = (32, 512, 512)
    weights = 32 * 512 * 512
    assert {kind: 8 * bytes_of(kind, shape) / weights for kind in KINDS} == {"bf16": 16.0, "int8": 8.5, "int4": 4.5}


def test_bf16_is_rounded_to_the_nearest_even() -> None:
    one = 2.0**-7  # the last place of bf16 at 1
    w = torch.tensor([1 + one / 2, 1 + 3 * one / 2, 1 + one / 2 + 2.0**-20, -1 - one / 2, 0.0])
    assert unpack(pack(w, "bf16")).tolist() == [1.0, 1 + 2 * one, 1 + one, -1.0, 0.0]
    w = hard()
    assert float(((unpack(pack(w, "bf16")) - w).abs() / w.abs().clamp_min(1e-30)).max()) <= 2.0**-8


def test_int8_is_half_a_scale_away_at_most() -> None:
    w = hard()
    packed = pack(w, "int8")
    assert packed.scale is not None
    scale, largest = packed.scale.float(), blocks(w).abs().amax(-1)
    # The scale is largest / 127 to the last place of fp16, whose subnormal numbers are 2^-24 apart.
    assert bool((scale <= largest / 127 * (1 + 2.0**-10) + 2.0**-24).all())
    error = (blocks(unpack(packed)) - blocks(w)).abs().amax(-1)
    assert bool((error <= scale / 2 * (1 + 1e-5)).all())
    assert int(packed.data.min()) >= -127


def test_int4_is_half_a_seventh_of_the_largest_away_at_most_in_the_mean() -> None:
    w = hard()
    error = (blocks(unpack(pack(w, "int4"))) - blocks(w)).square().mean(-1).sqrt()
    scale = blocks(w).abs().amax(-1) / 7 * (1 + 2.0**-10) + 2.0**-24
    assert bool((error <= scale / 2 * (1 + 1e-5)).all())


def test_int4_uses_all_sixteen_values() -> None:
    w = torch.arange(-8.0, 8.0).repeat(2)[None]
    packed = pack(w, "int4")
    assert torch.equal(unpack(packed), w)
    assert torch.equal(unpack(pack(-w, "int4")), -w)  # the scale may be negative
    # Better than a scale of largest / 7 alone, on what weights look like.
    w = randn(200, 96)
    plain = blocks(w).abs().amax(-1, keepdim=True) / 7
    lost = (blocks(w) / plain).round() * plain - blocks(w)
    assert float((unpack(pack(w, "int4")) - w).square().sum()) < 0.8 * float(lost.square().sum())


def test_the_layout_of_int4() -> None:
    q = torch.arange(32) % 16 - 8
    data = torch.zeros(16, dtype=torch.uint8)
    for i in range(16):
        data[i] = (int(q[i]) & 15) | (int(q[16 + i]) & 15) << 4
    scale = torch.tensor([[0.5]], dtype=torch.float16)
    assert torch.equal(unpack(Packed("int4", data[None], scale, 32))[0], q * 0.5)
    assert torch.equal(unpack(Packed("int4", data[None], scale, 17))[0], q[:17] * 0.5)


def test_the_layout_of_int8() -> None:
    q = torch.arange(-40, 24, dtype=torch.int8)
    scale = torch.tensor([[0.5, -2.0]], dtype=torch.float16)
    want = torch.cat([q[:32] * 0.5, q[32:] * -2.0])
    assert torch.equal(unpack(Packed("int8", q[None], scale, 64))[0], want)


@pytest.mark.parametrize("kind", list(KINDS))
def test_packing_does_not_depend_on_the_way_there(kind: Kind) -> None:
    w = randn(4, 6, 70)
    whole = pack(w, kind)
    for e in range(4):
        one = pack(w[e], kind)
        assert torch.equal(whole[e].data, one.data)
        assert kind == "bf16" or torch.equal(whole[e].scale, one.scale)  # type: ignore[index]
    assert torch.equal(pack(w.mT.contiguous().mT, kind).data, whole.data)
    assert torch.equal(pack(torch.nn.Parameter(w), kind).data, whole.data)
    assert torch.equal(pack(w.double(), kind).data, whole.data)


@pytest.mark.parametrize("kind", list(KINDS))
def test_refused(kind: Kind) -> None:
    for bad in (float("nan"), float("inf")):
        with pytest.raises(UserError, match="not finite"):
            pack(torch.tensor([[1.0, bad]]), kind)
    with pytest.raises(UserError, match="too large"):
        pack(torch.tensor([[3.4e38]]), kind)
    with pytest.raises(UserError, match="only floating"):
        pack(torch.ones(2, 2, dtype=torch.int64), kind)
    good = pack(randn(3, 40), kind)
    with pytest.raises(UserError, match="has data"):
        Packed(kind, good.data[:, :-1], good.scale, 40)
    with pytest.raises(UserError, match="has data"):
        Packed(kind, good.data, None if good.scale is not None else torch.ones(3, 2).half(), 40)
    if good.scale is not None:
        with pytest.raises(UserError, match="fp16 scales"):
            Packed(kind, good.data, good.scale.float(), 40)
    with pytest.raises(UserError, match="unknown kind 'int3'.*int8"):
        pack(randn(3, 40), "int3")  # type: ignore[arg-type]


@compiles
@pytest.mark.parametrize("kind", list(KINDS))
def test_unpacking_in_c_is_the_same_bit_by_bit(kind: Kind) -> None:
    for w in (hard(), randn(2, 3, 33), randn(5, 7)):
        packed = pack(w, kind)
        assert torch.equal(compiled.unpacked(packed), unpack(packed))
