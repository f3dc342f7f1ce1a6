"""A user's corpus: one text file, or every text file below a folder."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

from ..core.errors import UserError
from .config import Text
from .source import CHUNK, Examined, Piece, Source, cut_before, examine, held_out, name_of

__all__ = ["find"]

_ENOUGH = 20  # files, from which on whole files are held out


def find(config: Text, leave_out: Callable[[Path], bool] = lambda folder: False) -> Source:
    """List the text of `config.path`, sorted by name, and hold a part out.

    leave_out: folders that are not part of the corpus (those of runs). Binary, hidden, empty and unreadable files of a
    folder are skipped and counted. A file that is binary, and a folder without text, raise `UserError`.
    """
    if not config.path:
        raise UserError("Text.path is empty; name a text file or a folder")
    root = Path(config.path).expanduser()
    if not root.exists():
        raise UserError(f"{config.path}: no such file or folder; check the path given as data")
    if root.is_dir():
        found, skipped = _walk(root, leave_out)
        if not found:
            said = ", ".join(f"{n} {reason}" for reason, n in skipped.items()) or "it has no files"
            raise UserError(f"{config.path}: no text in this folder ({said}); name a folder with text files")
    else:
        found, skipped = [(root, root.name, _single(root))], {}
    return Source(str(root), _split(found, config.validation), skipped)


def _single(path: Path) -> Examined:
    if not path.is_file():
        raise UserError(f"{path}: neither a file nor a folder; name a text file or a folder")
    seen = examine(path)
    if seen.binary:
        raise UserError(f"{path}: a binary file ({seen.binary}), no text; convert it to UTF-8 text first")
    if not seen.size:
        raise UserError(f"{path}: the file is empty; name a text file")
    return seen


def _walk(root: Path, leave_out: Callable[[Path], bool]) -> tuple[list[tuple[Path, str, Examined]], dict[str, int]]:
    found: list[tuple[Path, str, Examined]] = []
    skipped: dict[str, int] = {}

    def skip(reason: str) -> None:
        skipped[reason] = skipped.get(reason, 0) + 1

    for folder, below, names in os.walk(root):
        below[:] = [d for d in below if not d.startswith(".")]
        for name in [d for d in below if leave_out(Path(folder, d))]:
            below.remove(name)
            skip("run folder")
        for name in names:
            path = Path(folder, name)
            if name.startswith("."):
                skip("hidden")
                continue
            try:
                if not stat.S_ISREG(path.stat().st_mode):
                    skip("not a file")
                    continue
                seen = examine(path)
            except OSError:
                skip("unreadable")
                continue
            if seen.binary or not seen.size:
                skip("binary" if seen.binary else "empty")
            else:
                found.append((path, name_of(path, root), seen))
    return sorted(found, key=lambda f: f[1]), skipped


def _split(found: list[tuple[Path, str, Examined]], share: float) -> tuple[Piece, ...]:
    """Whole files where there are enough of them and none is too large; else the tail of the text in order."""
    sizes = {name: seen.size for _, name, seen in found}
    total = sum(sizes.values())
    if len(found) >= _ENOUGH:
        valid = held_out(sizes, 0.9 * share, 1.25 * share)
        if sum(sizes[n] for n in valid) >= 0.6 * share * total:
            return tuple(
                Piece(path, name, seen.sha256, 0, seen.size, "valid" if name in valid else "train")
                for path, name, seen in found
            )
    pieces: list[Piece] = []
    border, before = round((1 - share) * total), 0
    for path, name, seen in found:
        cut = min(max(border - before, 0), seen.size)
        if 0 < cut < seen.size:
            cut = _line_before(path, cut)
        if cut:
            pieces.append(Piece(path, name, seen.sha256, 0, cut, "train"))
        if cut < seen.size:
            pieces.append(Piece(path, name, seen.sha256, cut, seen.size, "valid"))
        before += seen.size
    return tuple(pieces)


def _line_before(path: Path, position: int) -> int:
    """The nearest place at or before `position` where a line ends, or else a character."""
    start = max(0, position - CHUNK // 16)
    with path.open("rb") as file:
        file.seek(start)
        return start + cut_before(file.read(position - start))
