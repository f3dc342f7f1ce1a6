"""`metrics.jsonl`: one JSON object per line, appended as training goes, cut back to a known size on resume."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..core.errors import UserError
from ..core.files import Seal, seal

__all__ = ["Metrics", "read_rows"]


class Metrics:
    """The growing file; `size` bytes of what is there are kept. It is open only while a row is written."""

    def __init__(self, path: Path, size: int = 0) -> None:
        self.path = path
        if path.exists():
            os.truncate(path, size)

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a row; it is with the system (not yet on the disk) when this returns."""
        line = (json.dumps(row, allow_nan=False) + "\n").encode()
        with self.path.open("ab", buffering=0) as file:
            if file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))

    def seal(self) -> Seal:
        """Bring everything to the disk; returns the seal of the file as it is now."""
        with self.path.open("ab") as file:
            os.fsync(file.fileno())
        return seal(self.path)


def read_rows(path: Path, kind: str | None = None) -> Iterator[dict[str, Any]]:
    """The rows of a metrics file (of one kind); an unfinished last line is passed over."""
    try:
        with path.open(encoding="utf-8") as file:
            for line in file:
                if not line.endswith("\n"):
                    return
                row = json.loads(line)
                if kind in (None, row.get("kind")):
                    yield row
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); name the folder of a run") from None
    except ValueError:
        raise UserError(f"{path}: damaged, a line is no JSON; restore the file from a copy") from None
