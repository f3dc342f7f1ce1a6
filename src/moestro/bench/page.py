"""Pages that hold figures of records: what stands between two marks is made from the record that the first one names.

    <!-- record: ../results/bench-layer/record.json goals -->
    <!-- end of record -->

After the file, relative to the page: "about" (command, machine, versions), "goals", "tables" with the routings to show,
or "picture". `fill` puts it there; a test compares every page with its records.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from ..core.errors import UserError
from .tables import about, goals_table, markdown, regime_tables, upcycling_table

__all__ = ["MISSING", "fill", "filled", "pictures"]

MISSING = "Not measured yet.\n"
_MARK = re.compile(r"(<!-- record: (\S+) (\w+)((?: \w+)*) -->\n)(.*?)(<!-- end of record -->)", re.DOTALL)


def filled(page: Path) -> str:
    """The text that a page should have."""

    def made(match: re.Match[str]) -> str:
        begin, name, part, options, _, end = match.groups()
        file = page.parent / name
        body = _part(json.loads(file.read_text(encoding="utf-8")), part, options.split(), file, page)
        return f"{begin}\n{body}\n{end}"

    def either(match: re.Match[str]) -> str:
        known = (page.parent / match[2]).is_file()
        return made(match) if known else f"{match[1]}\n{MISSING}\n{match[6]}"

    return _MARK.sub(either, page.read_text(encoding="utf-8"))


def fill(page: Path | str) -> None:
    """Write the figures of the records that a page names into it, and copy their pictures beside it."""
    page = Path(page)
    for source, target in pictures(page).items():
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(source, target)
    page.write_text(filled(page), encoding="utf-8")


def pictures(page: Path) -> dict[Path, Path]:
    """Pictures of the records that a page shows -> where it has them."""
    found = {}
    for match in _MARK.finditer(page.read_text(encoding="utf-8")):
        file = page.parent / match[2]
        if match[3] == "picture" and file.is_file():
            found[file.with_name("picture.svg")] = page.parent / _place(file)
    return found


def _place(file: Path) -> str:
    return f"assets/{file.resolve().parent.name}.svg"


def _part(record: dict[str, Any], part: str, options: list[str], file: Path, page: Path) -> str:
    if part == "about":
        return f"`{record['machine']['command']}`: {about(record)}.\n"
    if part == "goals":
        return markdown(goals_table([record]))
    if part == "tables":
        tables = [upcycling_table(record)] if "arms" in record else regime_tables(record, options or None)
        return "\n".join(map(markdown, tables))
    if part == "picture":
        return f"![{record['what']}]({_place(file)})\n"
    raise UserError(f"{page}: a record has no {part!r}; known: about, goals, tables, picture")
