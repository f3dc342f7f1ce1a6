"""How every picture is drawn: one look, as inline SVG whose colours follow the page's light or dark theme.

matplotlib is imported here and nowhere else, when the first picture is drawn.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "GRID",
    "INK",
    "MAP",
    "MOST_PANELS",
    "MUTED",
    "PAPER",
    "Picture",
    "canvas",
    "clip",
    "colour_bar",
    "depth_colour",
    "heatmap",
    "panels",
    "plain",
    "series_colour",
    "short",
    "svg",
    "thin",
]

# Colours that no drawing contains by chance; each becomes a CSS variable of the page.
INK, MUTED, GRID, PAPER = "#010101", "#010102", "#010103", "#010104"
_SERIES = tuple(f"#0101{16 + i:02x}" for i in range(7))
_VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--grid", PAPER: "--paper"} | {
    colour: f"--s{i}" for i, colour in enumerate(_SERIES)
}
_DEPTHS = tuple(f"#0102{16 + i:02x}" for i in range(9))
_VARIABLES |= {colour: f"--d{i}" for i, colour in enumerate(_DEPTHS)}
MOST_PANELS = 12  # more layers than that are shown by an even selection
MAP = "viridis"  # readable in both themes and without colour vision

_LOOK: Any = {
    "axes.axisbelow": True,
    "axes.edgecolor": GRID,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 8.5,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "figure.facecolor": "none",
    "font.family": ["DejaVu Sans"],
    "font.size": 8.5,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "savefig.facecolor": "none",
    "svg.fonttype": "none",
    "svg.hashsalt": "moestro",
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": GRID,
    "xtick.labelcolor": MUTED,
    "xtick.labelsize": 8,
    "ytick.color": GRID,
    "ytick.labelcolor": MUTED,
    "ytick.labelsize": 8,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Picture:
    """One picture with the numbers behind it. svg: inline SVG. columns: headers with units. rows: the data table."""

    title: str
    caption: str
    svg: str
    width: int
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]


@contextlib.contextmanager
def canvas(width: float, height: float) -> Iterator[Figure]:
    """A figure of that many inches in the house look. Draw into it and call `svg` before leaving."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_LOOK), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the reader's fonts draw the text, not ours
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        yield figure


def plain(text: object) -> str:
    """Text that XML and HTML can hold, and that cannot turn its surroundings: control characters, lone surrogates and
    changes of writing direction become visible stand-ins."""
    made = str(text).encode("utf-8", "replace").decode("utf-8")
    made = "".join(
        chr(0x2400 + ord(c)) if c < " " and c not in "\t\n" else "\u2421" if c == "\x7f" else c for c in made
    )
    return re.sub("[\u0080-\u009f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ufffe\uffff]", "\ufffd", made)


def svg(figure: Figure, title: str, prefix: str) -> str:
    """The figure as one <svg> element for a page: theme colours, the page's font, ids under `prefix`, no links out."""
    layout = figure.get_layout_engine()
    if layout is not None:  # once, here: saving would otherwise draw everything a second time to lay it out
        layout.execute(figure)
        figure.set_layout_engine("none")
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    root = ET.fromstring(buffer.getvalue())
    used: set[str] = set()
    for element in root.iter():
        for name, value in list(element.attrib.items()):
            if name.endswith("}href"):
                del element.attrib[name]
                element.set("href", value if not value.startswith("#") else f"#{prefix}{value[1:]}")
            used.update(re.findall(r"url\(#([^)]+)\)", value))
            used.update([value[1:]] if name.endswith("href") and value.startswith("#") else [])
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.rpartition("}")[2] in ("metadata", "style"):
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        _restyle(element, prefix, used)
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.set("xmlns", "http://www.w3.org/2000/svg")
    root.set("role", "img")
    root.set("aria-label", plain(title))
    return ET.tostring(root, encoding="unicode")


def _restyle(element: ET.Element, prefix: str, used: set[str]) -> None:
    if "id" in element.attrib:
        name = element.attrib.pop("id")
        if name in used:
            element.set("id", prefix + name)
    style = element.get("style")
    if style is not None:
        style = re.sub(r"font(-family)?: [^;]*?'[^;]*(;|$)", lambda m: _font(m.group(0)), style)
        for colour, variable in _VARIABLES.items():
            style = style.replace(colour, f"var({variable})")
        element.set("style", style)
    for name, value in element.attrib.items():
        if "url(#" in value:
            element.set(name, value.replace("url(#", f"url(#{prefix}"))
        if name in ("d", "x", "y", "points"):
            element.set(name, re.sub(r"-?\d+\.\d{3,}", lambda m: f"{float(m.group()):.2f}", value).replace("\n", " "))


def _font(declaration: str) -> str:
    """A font declaration without its family, so that the page's own applies."""
    if declaration.startswith("font-family"):
        return ""
    size = re.search(r"[\d.]+px", declaration)
    weight = "font-weight: 600; " if re.search(r"\b[6-9]00\b|bold", declaration) else ""
    return f"{weight}font-size: {size.group() if size else '8px'};"


def series_colour(i: int) -> str:
    """The i-th colour for unordered things (runs); they repeat after seven."""
    return _SERIES[i % len(_SERIES)]


def depth_colour(i: int, n: int) -> str:
    """A colour for the i-th of n ordered things (layers), along the colour map: early ones stand out less."""
    return _DEPTHS[round(i / max(n - 1, 1) * (len(_DEPTHS) - 1))]


def clip(name: str, most: int = 26) -> str:
    """A name for a legend or a tick, cut on the right: a long one would leave no room for the picture."""
    made = plain(name)
    return made if len(made) <= most else made[: most - 1] + "…"


def short(path: str, most: int = 30) -> str:
    """A module path for a panel's title, cut on the left."""
    made = plain(path)
    return made if len(made) <= most else "…" + made[1 - most :]


def panels(figure: Figure, number: int, columns: int, **options: Any) -> list[Axes]:
    """`number` axes in a grid of so many columns; the unused places of the last row are removed."""
    columns = min(columns, number)
    grid = figure.subplots(-(-number // columns), columns, squeeze=False, **options)
    flat = list(grid.reshape(-1))
    for spare in flat[number:]:
        spare.remove()
    return flat[:number]


def heatmap(axes: Axes, values: Any, low: float, high: float, extent: Sequence[float] | None = None) -> Any:
    """An image of `values` [rows, columns], row 0 on top; NaN stays the page's colour."""
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(length=0)
    masked = np.ma.masked_invalid(np.asarray(values, np.float64))
    return axes.imshow(
        masked,
        cmap=MAP,
        vmin=low,
        vmax=high if high > low else low + 1.0,
        aspect="auto",
        interpolation="none",
        extent=tuple(extent) if extent is not None else None,  # type: ignore[arg-type]
    )


def colour_bar(
    figure: Figure, image: Any, grid: list[Axes], label: str, *, fraction: float, open_end: bool = False
) -> None:
    """The key of the heat maps in `grid`, on their right."""
    bar = figure.colorbar(image, ax=grid, fraction=fraction, pad=0.015, extend="max" if open_end else "neither")
    bar.set_label(label)
    bar.outline.set_visible(False)  # type: ignore[operator]


def thin(rows: Sequence[Any], most: int) -> list[Any]:
    """At most `most` of the rows, evenly spaced, with the first and the last."""
    if len(rows) <= most:
        return list(rows)
    return [rows[i] for i in np.unique(np.linspace(0, len(rows) - 1, most).round().astype(int))]
