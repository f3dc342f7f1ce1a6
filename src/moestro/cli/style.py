"""How figures and tables are printed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TextIO

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

__all__ = ["count", "duration", "print_table", "size"]


def print_table(
    stream: TextIO, title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], note: str = "", left: int = 1
) -> None:
    """A plain table: the first `left` columns to the left, figures to the right. Nothing is cut in files and pipes."""
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    for i, name in enumerate(columns):
        table.add_column(name, justify="left" if i < left else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console = Console(file=stream, highlight=False, markup=False)
    if not console.is_terminal:
        console.width = 200
    console.print(table)
    if note:
        console.print(note, soft_wrap=True)


def count(number: float) -> str:
    """1234567 -> 1.23M, three digits."""
    for unit, power in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(number) >= power:
            return _three(number / power) + unit
    return f"{number:.3g}" if isinstance(number, float) else str(number)


def size(number: float) -> str:
    """Bytes in powers of 1024: 1536 -> 1.5 KiB."""
    for unit, power in (("TiB", 4), ("GiB", 3), ("MiB", 2), ("KiB", 1)):
        if number >= 1024**power:
            return f"{_three(number / 1024**power)} {unit}"
    return f"{number:.0f} B"


def duration(seconds: float) -> str:
    """75 -> 1:15."""
    hours, rest = divmod(round(seconds), 3600)
    minutes, left = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{left:02d}" if hours else f"{minutes}:{left:02d}"


def _three(number: float) -> str:
    return f"{number:.0f}" if abs(number) >= 99.95 else f"{number:.3g}"
