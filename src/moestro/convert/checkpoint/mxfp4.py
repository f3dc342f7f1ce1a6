"""MXFP4: blocks of 32 numbers of four bits and one scale of eight (OCP Microscaling Formats 1.0, sections 5.3 and 5.4).

GPT-OSS stores its expert matrices so: `<name>_blocks` [..., G, 16] holds two numbers per byte, the first in the low
half; `<name>_scales` [..., G] holds the exponents of the blocks.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ...core.errors import UserError
from .boxes import read_box, slices
from .rules import Box, whole
from .tensors import Entry, Tensors

__all__ = ["Dequantised", "dequantise"]

BLOCK = 32
_BLOCKS, _SCALES = "_blocks", "_scales"


def _numbers() -> Tensor:
    """The 16 values of E2M1: sign, two bits of exponent with bias 1, one of mantissa; exponent 0 is subnormal."""
    half = [m / 2 if e == 0 else (1 + m / 2) * 2.0 ** (e - 1) for e in range(4) for m in range(2)]
    return torch.tensor(half + [-v for v in half])


def _scale(exponent: Tensor) -> Tensor:
    """2^(s - 127) of E8M0 exponents [...] uint8, in fp32; 255 is NaN."""
    bits = exponent.to(torch.int32) << 23
    bits = torch.where(exponent == 0, 1 << 22, bits)  # 2^-127 is subnormal in fp32
    return torch.where(exponent == 255, float("nan"), bits.view(torch.float32))


def dequantise(blocks: Tensor, scales: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The numbers of MXFP4 blocks, exactly: each has two significant bits, which bf16 and fp32 hold.

    Shapes: blocks [..., G, 16] uint8, scales [..., G] uint8 -> [..., 32 G]. Raises `UserError` for others.
    """
    if blocks.dtype != torch.uint8 or scales.dtype != torch.uint8:
        raise UserError(f"MXFP4: blocks and scales are bytes (uint8), not {blocks.dtype} and {scales.dtype}")
    if blocks.shape != (*scales.shape, BLOCK // 2):
        raise UserError(
            f"MXFP4: blocks {list(blocks.shape)} and scales {list(scales.shape)} do not fit; wanted [..., G, 16] and "
            "[..., G]"
        )
    pairs = torch.stack((blocks & 15, blocks >> 4), dim=-1)  # [..., G, 16, 2]
    numbers = _numbers().to(blocks.device).index_select(0, pairs.flatten().to(torch.int64))
    return (numbers.view(*scales.shape, BLOCK) * _scale(scales)[..., None]).flatten(-2).to(dtype)


class Dequantised:
    """Tensors of which pairs `<name>_blocks` and `<name>_scales` appear as one, `<name>`, in bf16 and transposed.

    [E, O, G, 16] and [E, O, G] become [E, 32 G, O], as the same matrices lie in a checkpoint that is not quantised.
    One expert is unpacked at a time. Raises `UserError` for blocks without scales.
    """

    def __init__(self, source: Tensors) -> None:
        self._source = source
        entries = dict(source.entries())
        self._packed: set[str] = set()
        for name in [n for n in entries if n.endswith(_BLOCKS)]:
            plain = name.removesuffix(_BLOCKS)
            blocks, scales = entries.pop(name), entries.pop(plain + _SCALES, None)
            if scales is None:
                raise UserError(f"{name}: there is no {plain + _SCALES} for these blocks; get the checkpoint again")
            shape = blocks.shape
            if len(shape) != 4 or scales.shape != shape[:3] or shape[3] != BLOCK // 2:
                raise UserError(
                    f"{name}: {list(shape)} and scales {list(scales.shape)} are no MXFP4 blocks; wanted [E, O, G, 16] "
                    "and [E, O, G]"
                )
            entries[plain] = Entry((shape[0], shape[2] * BLOCK, shape[1]), torch.bfloat16)
            self._packed.add(plain)
        self._entries = entries

    def entries(self) -> Mapping[str, Entry]:
        return self._entries

    def read(self, name: str) -> Tensor:
        return self.read_box(name, whole(self._entries[name].shape))

    def read_box(self, name: str, box: Box) -> Tensor:
        if name not in self._packed:
            return read_box(self._source, name, box)
        experts, *inside = box
        entries = self._source.entries()
        blocks, scales = (
            read_box(self._source, name + part, (experts, *whole(entries[name + part].shape)[1:]))
            for part in (_BLOCKS, _SCALES)
        )
        out = torch.empty([b - a for a, b in box], dtype=torch.bfloat16)
        for e, (b, s) in enumerate(zip(blocks, scales, strict=True)):
            out[e].copy_(dequantise(b, s).t()[slices(tuple(inside))])
        return out
