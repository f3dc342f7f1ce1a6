"""Weights in fewer bits: the formats, and the ways there and back.

A matrix [.., O, I] is packed along its inputs I.

bf16: the upper half of each fp32, rounded to the nearest, ties to even. `data` [.., O, I] bfloat16, no scales.

int8, int4: blocks of 32 inputs with one fp16 scale each, `scale` [.., O, N], N = ceil(I / 32); a weight is q * scale.
Inputs that fill the last block are zeros. `data` is [.., O, 32 N] int8 with q in -127..127, or [.., O, 16 N] uint8
with q in -8..7: byte i of a block's 16 bytes holds input i in its lower four bits and input 16 + i in its upper four,
each in two's complement. So one widening of 16 bytes and one shift give 32 weights in order.

An error is at most half a scale with int8, the scale being the block's largest magnitude / 127 (rounded to fp16). With
int4 each block takes, of a few scales, the one with the least squared error; one of them is the largest magnitude / 7,
so that the root of a block's mean squared error is at most half of that.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
from torch import Tensor

from ...core.errors import UserError, did_you_mean

__all__ = ["BLOCK", "KINDS", "Kind", "Packed", "bytes_of", "pack", "unpack"]

Kind = Literal["bf16", "int8", "int4"]
KINDS: dict[str, int] = {"bf16": 1, "int8": 2, "int4": 3}
"""Kinds by name, with the numbers that the C kernels know them by."""
BLOCK = 32
_DTYPES = {"bf16": torch.bfloat16, "int8": torch.int8, "int4": torch.uint8}
# What the weight of largest magnitude is divided by, to be -8 or a little beyond: tried beside 7, which clips nothing.
_DIVISORS = (-8.0, -8.5)


@dataclasses.dataclass(frozen=True)
class Packed:
    """A matrix, or a stack of them, in fewer bits. inputs: I. scale: None for bf16. See the module for the layout."""

    kind: Kind
    data: Tensor
    scale: Tensor | None
    inputs: int

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(f"unknown kind {self.kind!r}{did_you_mean(self.kind, KINDS)}; known: {', '.join(KINDS)}")
        blocks = -(-self.inputs // BLOCK)
        width = {"bf16": self.inputs, "int8": BLOCK * blocks, "int4": BLOCK // 2 * blocks}[self.kind]
        scale = None if self.kind == "bf16" else (*self.data.shape[:-1], blocks)
        found = None if self.scale is None else tuple(self.scale.shape)
        fp16 = self.scale is None or self.scale.dtype == torch.float16
        if self.data.dtype != _DTYPES[self.kind] or self.data.shape[-1] != width or found != scale or not fp16:
            raise UserError(
                f"{self.kind} of {self.inputs} inputs has data [.., {width}] {_DTYPES[self.kind]} and fp16 scales "
                f"{scale}; found {list(self.data.shape)} {self.data.dtype} and {found}"
            )

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weights, [.., O, I]."""
        return (*self.data.shape[:-1], self.inputs)

    @property
    def nbytes(self) -> int:
        """Bytes of data and scales."""
        return self.data.nbytes + (0 if self.scale is None else self.scale.nbytes)

    def __getitem__(self, e: int) -> Packed:
        """Entry e of the first axis, as a view."""
        return Packed(self.kind, self.data[e], None if self.scale is None else self.scale[e], self.inputs)


def bytes_of(kind: Kind, shape: tuple[int, ...]) -> int:
    """Bytes that a tensor [.., O, I] takes when packed."""
    rows = torch.Size(shape[:-1]).numel()
    blocks = -(-shape[-1] // BLOCK)
    return rows * {"bf16": 2 * shape[-1], "int8": 34 * blocks, "int4": 18 * blocks}[kind]


def pack(weight: Tensor, kind: Kind) -> Packed:
    """A floating tensor [.., O, I] in fewer bits; on its own device, without a gradient.

    Raises `UserError` for numbers that are not finite, or too large for the format.
    """
    if kind not in KINDS:
        raise UserError(f"unknown kind {kind!r}{did_you_mean(kind, KINDS)}; known: {', '.join(KINDS)}")
    weight = weight.detach()
    if weight.ndim < 1 or not weight.is_floating_point():
        raise UserError(f"only floating tensors with inputs are packed, not {weight.dtype} {list(weight.shape)}")
    if not bool(torch.isfinite(weight).all()):
        raise UserError("a weight that is not finite cannot be packed")
    inputs = weight.shape[-1]
    if kind == "bf16":
        data = weight.to(torch.bfloat16).contiguous()
        if not bool(torch.isfinite(data).all()):
            raise UserError("a weight is too large for bf16")
        return Packed(kind, data, None, inputs)
    blocks = -(-inputs // BLOCK)
    lead = weight.shape[:-1]
    flat = weight.reshape(lead.numel(), inputs)
    data = torch.empty(flat.shape[0], blocks * BLOCK // (1 if kind == "int8" else 2), dtype=_DTYPES[kind])
    scale = torch.empty(flat.shape[0], blocks, dtype=torch.float16)
    data, scale = data.to(weight.device), scale.to(weight.device)
    step = max(1, 2**22 // max(1, blocks * BLOCK))  # rows at a time: what lies between stays small
    for start in range(0, flat.shape[0], step):
        part = flat[start : start + step].float()
        part = torch.nn.functional.pad(part, (0, blocks * BLOCK - inputs)).view(len(part), blocks, BLOCK)
        q, s = _int8(part) if kind == "int8" else _int4(part)
        data[start : start + step], scale[start : start + step] = q, s
    return Packed(kind, data.view(*lead, data.shape[1]), scale.view(*lead, blocks), inputs)


def unpack(packed: Packed) -> Tensor:
    """[.., O, I] fp32: exactly the weights that the packed ones stand for."""
    data, scale = packed.data, packed.scale
    if scale is None:
        return data.float()
    if packed.kind == "int4":
        halves = data.unflatten(-1, (-1, BLOCK // 2)).to(torch.int8)  # upper four bits keep their sign
        data = torch.cat([(halves << 4) >> 4, halves >> 4], dim=-1).flatten(-2)
    weight = data.unflatten(-1, (-1, BLOCK)).float() * scale.float()[..., None]
    return weight.flatten(-2)[..., : packed.inputs].contiguous()


def _int8(w: Tensor) -> tuple[Tensor, Tensor]:
    """w [R, N, 32] -> q [R, 32 N] int8, scale [R, N]."""
    scale = _scale(w.abs().amax(-1), 127)
    q = _rounded(w, scale, -127, 127)
    return q.flatten(1).to(torch.int8), scale


def _int4(w: Tensor) -> tuple[Tensor, Tensor]:
    """w [R, N, 32] -> q [R, 16 N] uint8, scale [R, N]."""
    largest = w.gather(-1, w.abs().argmax(-1, keepdim=True))[..., 0]
    scales = [_scale(largest.abs(), 7), *((largest / d).to(torch.float16) for d in _DIVISORS)]
    rounded = [_rounded(w, scale, -8, 7) for scale in scales]
    lost = [(q * s.float()[..., None] - w).square_().sum(-1) for q, s in zip(rounded, scales)]
    best, q, least = scales[0], rounded[0], lost[0]
    for other, made, error in zip(scales[1:], rounded[1:], lost[1:]):
        better = error < least
        best, least = torch.where(better, other, best), torch.where(better, error, least)
        q = torch.where(better[..., None], made, q)
    low, high = q.to(torch.int8).view(torch.uint8).split(BLOCK // 2, dim=-1)
    return ((low & 15) | (high << 4)).flatten(1), best


def _scale(largest: Tensor, levels: int) -> Tensor:
    """The fp16 nearest to largest / levels, or the next one up where that would leave the largest out of reach."""
    scale = (largest / levels).to(torch.float16)
    if not bool(torch.isfinite(scale).all()):
        raise UserError(f"a weight is too large for blocks with fp16 scales (at most {65504 * levels:g})")
    short = scale.float() * (levels + 0.5) < largest
    return torch.where(short, (scale.view(torch.int16) + 1).view(torch.float16), scale)


def _rounded(w: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    """w / scale as whole numbers in low..high; a block whose scale is zero is zeros."""
    inverse = torch.where(scale == 0, 0.0, 1 / scale.float())
    return (w * inverse[..., None]).round_().clamp_(low, high)
