"""The page of all systems: what stands between its marks is made from the catalogue and the committed records.

    <!-- papers: systems -->
    <!-- end of papers -->

"systems" is the table of all, "records" one section for every system that has a record.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from ..core.errors import UserError
from .catalogue import CATALOGUE, Entry
from .registry import STATES, State, records, state
from .tables import Table, about, tables

__all__ = ["NONE", "fill", "filled", "pictures"]

NONE = "Nothing is recorded yet.\n"
_MARK = re.compile(r"(<!-- papers: (\w+) -->\n)(.*?)(<!-- end of papers -->)", re.DOTALL)


def filled(page: Path, folder: Path | None = None) -> str:
    """The text that the page should have. folder: of the records, default those of the checkout."""

    def made(match: re.Match[str]) -> str:
        if match[2] not in _PARTS:
            raise UserError(f"{page}: no part {match[2]!r}; known: {', '.join(_PARTS)}")
        return f"{match[1]}\n{_PARTS[match[2]](folder)}\n{match[4]}"

    return _MARK.sub(made, page.read_text(encoding="utf-8"))


def fill(page: Path | str, folder: Path | None = None) -> None:
    """Write what the marks of a page ask for into it, and copy the pictures beside it."""
    page = Path(page)
    for source, target in pictures(page, folder).items():
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(source, target)
    page.write_text(filled(page, folder), encoding="utf-8")


def pictures(page: Path, folder: Path | None = None) -> dict[Path, Path]:
    """Pictures of the records -> where the page has them."""
    folder = folder or records()
    if folder is None:
        return {}
    shown = {folder / e.slug / "picture.svg": page.parent / _place(e) for e, _ in _recorded(folder)}
    return {source: target for source, target in shown.items() if source.is_file()}


def _place(entry: Entry) -> str:
    return f"assets/paper-{entry.slug}.svg"


def _recorded(folder: Path | None) -> list[tuple[Entry, State]]:
    found = [(e, state(e, folder)) for e in CATALOGUE.values()]
    return [(e, s) for e, s in found if s.word == "recorded"]


def _systems(folder: Path | None) -> str:
    rows = []
    for e in CATALOGUE.values():
        now = state(e, folder)
        link = f"[{e.title}](https://arxiv.org/abs/{e.arxiv})"
        rows.append((f"{e.number:02d}", f"`{e.slug}`", link, str(e.year), e.adds, now.word, now.verdict or "–"))
    columns = ("no.", "name", "paper", "year", "what it adds", "state", "verdict")
    words = "\n".join(f"- **{word}**: {meaning}." for word, meaning in STATES.items())
    return f"{_markdown(columns, rows)}\nStates:\n\n{words}\n"


def _records(folder: Path | None) -> str:
    return "\n".join(_section(e, s, folder) for e, s in _recorded(folder)) or NONE


def _section(entry: Entry, found: State, folder: Path | None) -> str:
    record, base = found.record or {}, folder or records()
    lines = [f"### {entry.number:02d} {entry.slug}: {found.verdict}\n", f"`{record['command']}`: {about(record)}.\n"]
    lines += [_table(table) for table in tables(record)]
    if base is not None and (base / entry.slug / "picture.svg").is_file():
        lines.append(f"![{entry.title}]({_place(entry)})\n")
    lines += [f"- {note}" for note in record["summary"]["notes"]]
    return "\n".join(lines) + ("\n" if record["summary"]["notes"] else "")


def _table(table: Table) -> str:
    return f"**{table.title}**\n\n{_markdown(table.columns, table.rows)}" + (f"\n{table.note}\n" if table.note else "")


def _markdown(columns: tuple[str, ...], rows: object) -> str:
    cells = [columns, ("---",) * len(columns), *rows]  # type: ignore[misc]
    return "".join("| " + " | ".join(str(c).replace("|", "\\|") for c in row) + " |\n" for row in cells)


_PARTS = {"systems": _systems, "records": _records}
