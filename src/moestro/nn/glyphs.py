"""What tokens look like: characters drawn as bitmaps, and the principal components of these (brief 45)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.errors import UserError

__all__ = ["bitmaps", "code_points", "glyph_table", "polar_order"]

_HEIGHT, _BASE = 0.75, 0.78  # of a character and of its baseline, in cells


def glyph_table(strings: Sequence[str], dim: int, cell: int = 32, font: str = "") -> Tensor:
    """[V, dim] fp32, rows of norm 1: the principal components, over the vocabulary, of the pixels of every string.

    Pixels are read from the centre outwards, in order of (radius, angle). The sign of a component is such that its
    largest entry is positive; components that the vocabulary does not have are zeros. The authors' small rotations,
    shifts and noise are left out: the same fixed ones for all tokens of a script. Raises `UserError` for a font that
    cannot be read and for more components than pixels.
    """
    if dim > cell * cell:
        raise UserError(f"glyph_table: {cell} x {cell} pixels have no {dim} components; raise cell")
    pixels = torch.from_numpy(bitmaps(strings, cell, font)).reshape(len(strings), -1)[:, polar_order(cell)].double()
    pixels = pixels - pixels.mean(0)
    few = len(strings) < cell * cell  # the smaller of the two products has the same eigenvalues
    values, axes = torch.linalg.eigh(pixels @ pixels.T if few else pixels.T @ pixels)
    values, axes = values.flip(0)[:dim], axes.flip(1)[:, :dim]
    axes = F.normalize(pixels.T @ axes, dim=0) if few else axes
    axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
    rank = int((values > 1e-9 * values[0].clamp_min(1e-300)).sum())
    rank = min(rank, axes.shape[1])
    found = pixels @ axes[:, :rank]
    return F.normalize(F.pad(found, (0, dim - rank)), dim=-1).float()


def polar_order(cell: int) -> Tensor:
    """[cell * cell] int64: flat numbers of the pixels, by distance from the centre, then by angle."""
    place = torch.arange(cell) - (cell - 1) / 2
    y, x = torch.meshgrid(place, place, indexing="ij")
    radius, angle = (4 * (x * x + y * y)).round().reshape(-1), torch.atan2(y, x).double().reshape(-1)
    order = angle.argsort(stable=True)
    return order[radius[order].argsort(stable=True)]


def code_points(count: int, font: str = "") -> list[str]:
    """The characters with the code points 0 to count - 1; their hexadecimal numbers where there is nothing to see."""
    drawn = _font(font, 16)
    return [chr(n) if chr(n).isprintable() and drawn.get_char_index(n) else f"{n:02X}" for n in range(count)]


def bitmaps(strings: Sequence[str], cell: int = 32, font: str = "") -> np.ndarray:
    """[V, cell, cell] uint8, 1 = black: every character in a cell of its own, side by side, squeezed into one cell."""
    drawn = _font(font, cell)
    one: dict[str, np.ndarray] = {}
    out = np.zeros((len(strings), cell, cell), dtype=np.uint8)
    for i, text in enumerate(strings):
        for c in text:
            if c not in one:
                one[c] = _draw(drawn, c, cell)
        if not text:
            continue
        strip = torch.from_numpy(np.concatenate([one[c] for c in text], axis=1)).float()
        if len(text) > 1:
            strip = F.interpolate(strip[None, None], size=(cell, cell), mode="bilinear", antialias=True)[0, 0]
        out[i] = (strip >= 0.5).numpy()
    return out


def _font(path: str, cell: int) -> Any:
    import matplotlib
    from matplotlib import ft2font

    file = Path(path) if path else Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    try:
        font = ft2font.FT2Font(str(file))
    except (OSError, RuntimeError) as error:
        raise UserError(f"Glyphs.font: {file} cannot be read ({error}); name a TrueType or OpenType file") from None
    font.set_size(_HEIGHT * cell, 72)
    return font


def _draw(font: Any, character: str, cell: int) -> np.ndarray:
    """[cell, cell] uint8, 1 = black; what lies outside of the cell is cut off, what the font lacks is empty."""
    from matplotlib import ft2font

    out = np.zeros((cell, cell), dtype=np.uint8)
    if not font.get_char_index(ord(character)):
        return out
    flags: Any = getattr(ft2font, "LoadFlags", None)
    font.set_text(character, 0.0, flags=ft2font.LOAD_NO_HINTING if flags is None else flags.NO_HINTING)  # type: ignore[attr-defined]
    font.draw_glyphs_to_bitmap(antialiased=True)
    image = np.asarray(font.get_image()) >= 128
    height, width = image.shape
    top = round(_BASE * cell) + round(font.get_descent() / 64) - height
    left = (cell - width) // 2
    rows = slice(max(0, top), min(cell, top + height))
    columns = slice(max(0, left), min(cell, left + width))
    if rows.start < rows.stop and columns.start < columns.stop:
        out[rows, columns] = image[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
    return out
