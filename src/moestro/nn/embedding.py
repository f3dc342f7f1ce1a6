"""Embeddings that are fixed in advance: a buffer in place of a parameter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.errors import UserError
from .embeddings import FrozenEmbedding
from .embeddings import FrozenTable as FrozenTableConfig
from .embeddings import Glyphs as GlyphsConfig
from .embeddings import IdCode as IdCodeConfig

__all__ = ["Frozen", "FrozenTable", "Glyphs", "IdCode", "read_table"]


class Frozen(nn.Module):
    """`tokens [...] int64 -> [..., D]`, times a factor, from a table that no optimiser sees.

    Buffer: weight [V, D]. It counts as no parameter. Where it follows exactly from the config (`saved` is False) it is
    not in the state dict. A model made on the meta device gets its table with `to_empty`; where that cannot be computed
    (the file is elsewhere) it is NaN until it is loaded, so that it never passes for a table.
    """

    role = "embedding"
    saved = True
    weight: Tensor

    def __init__(self, config: FrozenEmbedding, vocab_size: int, dim: int, scale: float | None = None) -> None:
        super().__init__()
        self.config, self.num_embeddings, self.embedding_dim, self.scale = config, vocab_size, dim, scale
        self.check()
        device = torch.get_default_device()
        if device.type == "meta":
            table = torch.empty(vocab_size, dim)
        else:
            table = self._table().to(device=device, dtype=torch.get_default_dtype())
        self.register_buffer("weight", table, persistent=self.saved)

    def check(self) -> None:
        """Raise `UserError` for sizes that do not fit."""

    def compute(self) -> Tensor:
        """[V, D], on the CPU."""
        raise NotImplementedError

    def forward(self, tokens: Tensor) -> Tensor:
        h = F.embedding(tokens, self.weight)
        return h if self.scale is None else h * self.scale

    def _table(self) -> Tensor:
        with torch.device("cpu"), torch.no_grad():
            return self.compute()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        unknown = self.weight.is_meta
        super()._apply(fn, recurse)
        if unknown and not self.weight.is_meta:
            try:
                self.weight.copy_(self._table())
            except UserError:
                if not self.saved:
                    raise
                self.weight.fill_(float("nan"))
        return self

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, frozen"


class IdCode(Frozen):
    """Row n holds the bits of n, least significant first, repeated D / bits times."""

    saved = False
    config: IdCodeConfig

    def check(self) -> None:
        bits = self.config.bits
        if self.embedding_dim % bits:
            raise UserError(
                f"IdCode: the model's width {self.embedding_dim} is no multiple of the {bits} bits; change one"
            )
        if self.num_embeddings > 1 << bits:
            raise UserError(f"IdCode: {bits} bits tell {1 << bits} tokens apart, not {self.num_embeddings}; raise bits")

    def compute(self) -> Tensor:
        bits = self.config.bits
        code = (torch.arange(self.num_embeddings)[:, None] >> torch.arange(bits)) & 1
        return code.repeat(1, self.embedding_dim // bits).float()


class Glyphs(Frozen):
    """Principal components of the bitmaps of characters; rows have the norm 1."""

    config: GlyphsConfig

    def check(self) -> None:
        cell, dim = self.config.cell, self.embedding_dim
        if dim > cell * cell:
            raise UserError(f"Glyphs: {cell} x {cell} pixels have no {dim} components; raise cell")

    def compute(self) -> Tensor:
        from .glyphs import code_points, glyph_table

        c = self.config
        return glyph_table(code_points(self.num_embeddings, c.font), self.embedding_dim, c.cell, c.font)


class FrozenTable(Frozen):
    """The table of a file."""

    config: FrozenTableConfig

    def compute(self) -> Tensor:
        table = read_table(self.config.path, self.config.name)
        if list(table.shape) != [self.num_embeddings, self.embedding_dim]:
            raise UserError(
                f"{self.config.path}: the table is {list(table.shape)}, the model needs "
                f"{[self.num_embeddings, self.embedding_dim]}; set vocab_size and dim to the table's"
            )
        return table


def read_table(path: str | Path, name: str = "") -> Tensor:
    """A matrix of finite floating-point numbers from a .safetensors, .npy or .pt file. Never runs what a file holds.

    name: which tensor, in files of several; "" = the only one. Raises `UserError` for anything else.
    """
    file = Path(path)
    if not str(path) or not file.is_file():
        raise UserError(f"FrozenTable.path: {str(path)!r} is no file; name a .safetensors, .npy or .pt file")
    try:
        found = _tensors(file)
    except UserError:
        raise
    except Exception as error:
        why = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
        raise UserError(f"{file}: holds no plain tensors ({why})") from None
    if name and name not in found:
        raise UserError(f"{file}: has no tensor {name!r}, only {', '.join(sorted(found)[:5])}")
    if not name and len(found) != 1:
        raise UserError(
            f"{file}: holds {len(found)} tensors; set FrozenTable.name to one of {', '.join(sorted(found)[:5])}"
        )
    table = found[name] if name else next(iter(found.values()))
    if table.ndim != 2 or not table.is_floating_point() or not bool(torch.isfinite(table).all()):
        raise UserError(
            f"{file}: the table must be a matrix of finite floating-point numbers, found {list(table.shape)}"
        )
    return table


def _tensors(file: Path) -> dict[str, Tensor]:
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(file)
    if file.suffix == ".npy":
        return {"": torch.from_numpy(np.load(file, allow_pickle=False))}
    if file.suffix in (".pt", ".pth", ".bin"):
        made: Any = torch.load(file, map_location="cpu", weights_only=True)
        made = {"": made} if isinstance(made, Tensor) else made
        if not isinstance(made, dict) or not all(isinstance(t, Tensor) for t in made.values()):
            raise UserError(f"{file}: holds something else than tensors")
        return made
    raise UserError(f"{file}: tables are read from .safetensors, .npy and .pt files")
