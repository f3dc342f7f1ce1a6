"""Pictures as files of their own: SVG and PNG in the page's light theme."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ..style import CSS
from .draw import GRID, INK, MUTED, PAPER, canvas

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["SeveralForms", "light", "picture_file"]

SeveralForms = dict[str, bytes]


def light() -> dict[str, str]:
    """The colours of the page's light theme by name."""
    return dict(re.findall(r"--([\w-]+): (#[0-9a-f]+);", CSS.partition("@media")[0]))


@contextlib.contextmanager
def picture_file(width: float, height: float, title: str) -> Iterator[tuple[Figure, SeveralForms]]:
    """A figure of that many inches to draw into; {"svg": ..., "png": ...} is filled on leaving."""
    import matplotlib

    theme = light()
    place = {GRID: theme["grid"], INK: theme["ink"], MUTED: theme["muted"], PAPER: theme["paper"]}
    made: SeveralForms = {}
    with canvas(width, height) as figure:
        look: Any = {k: place[v] for k, v in matplotlib.rcParams.items() if isinstance(v, str) and v in place}
        with matplotlib.rc_context(look):
            figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold", color=theme["ink"])
            yield figure, made
            for form in ("svg", "png"):
                buffer = io.BytesIO()
                options: Any = {"metadata": {"Date": None}} if form == "svg" else {"dpi": 160}
                figure.savefig(buffer, format=form, facecolor=theme["paper"], **options)
                made[form] = buffer.getvalue()
