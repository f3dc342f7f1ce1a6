"""Reading files of data sets: text, JSON, CSV and arrays, plain or gzipped. Nothing is executed, nothing is fetched."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ...core.errors import UserError
from ...core.folders import data_root
from .config import Data

__all__ = ["Rows", "arrays", "find", "home", "json_file", "json_lines", "missing", "table", "text"]

MOST = 1 << 30  # bytes of one file once unpacked; no data set here comes near
K = TypeVar("K")
_BAD_ARRAYS = OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, KeyError, AttributeError, TypeError


def home(data: Data) -> Path:
    """The folder of a data set: its own, else the one of its name below `core.folders.data_root`."""
    return Path(data.folder).expanduser() if data.folder else data_root() / data.slug


def find(data: Data, *names: str) -> Path:
    """The first of these files (or the same name with .gz) that the data set's folder has; `UserError` for none."""
    found = there(data, *names)
    if found is None:
        raise missing(data, names[0])
    return found


def there(data: Data, *names: str) -> Path | None:
    """The same, or None."""
    for name in names:
        for path in (home(data) / name, home(data) / f"{name}.gz"):
            if path.is_file():
                return path
    return None


def missing(data: Data, name: str) -> UserError:
    """The one line about a file that is not there."""
    where = "give another folder" if data.folder else f"set MOESTRO_DATA to the folder that holds {data.slug}/"
    return UserError(f"{home(data) / name}: no such file, with .gz or without; get it from {data.source}, or {where}")


def text(path: Path) -> str:
    """A UTF-8 file, gzipped or not, with line ends as \\n."""
    try:
        return _raw(path).decode("utf-8").removeprefix("\ufeff").replace("\r\n", "\n")
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text; get the file again") from None


def json_file(path: Path) -> Any:
    """The value in a JSON file."""
    said = text(path)
    try:
        return json.loads(said)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: no JSON ({error}); get the file again") from None


def json_lines(path: Path) -> Rows:
    """A JSON object per line."""
    rows = []
    for number, line in enumerate(text(path).split("\n"), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except (ValueError, RecursionError):
                raise UserError(f"{path}, line {number}: no JSON; get the file again") from None
    return Rows(path, rows)


def table(path: Path) -> Rows:
    """A CSV file with a head line; every value is text."""
    try:
        return Rows(path, list(csv.DictReader(io.StringIO(text(path), newline=""))))
    except csv.Error as error:
        raise UserError(f"{path}: no CSV table ({error}); get the file again") from None


def arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a .npz file, without pickled objects."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except (
        OSError,
        ValueError,
        EOFError,
        zipfile.BadZipFile,
        zlib.error,
        KeyError,
        AttributeError,
        TypeError,
    ) as error:
        raise UserError(f"{path}: no readable arrays ({error}); get the file again") from None


def _raw(path: Path) -> bytes:
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            found: bytes = file.read(MOST + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read ({error}); get the file again") from None
    if len(found) > MOST:
        raise UserError(f"{path}: more than {MOST >> 20} MB once unpacked, so it is not this data set")
    return found


class Rows:
    """Objects read from a file, whose fields are checked as they are taken."""

    def __init__(self, path: Path, rows: Iterable[Any], inside: str = "row") -> None:
        self.path, self.rows, self.inside = path, list(rows), inside

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        for number, row in enumerate(self.rows, 1):
            yield Row(row, f"{self.path}, {self.inside} {number}")


class Row:
    """One object of a file. where: for messages."""

    def __init__(self, values: Any, where: str) -> None:
        if not isinstance(values, dict):
            raise UserError(f"{where}: no object with named fields; is this the file of this data set?")
        self.values, self.where = values, where

    def get(self, kind: type[K], *names: str) -> K:
        """The field with the first of these names that is there. A wrong kind or a missing field raise `UserError`."""
        for name in names:
            if name in self.values:
                value = self.values[name]
                if isinstance(value, kind):
                    return value
                raise UserError(f"{self.where}: {name} should be {kind.__name__}, found {type(value).__name__}")
        raise UserError(f"{self.where}: no field {names[0]!r}; is this the file of this data set?")

    def text(self, *names: str) -> str:
        return self.get(str, *names)

    def number(self, *names: str) -> float:
        value = self.get(object, *names)
        try:
            return float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            raise UserError(f"{self.where}: {names[0]} is no number") from None

    def rows(self, *names: str) -> Rows:
        """A list of objects inside this one."""
        found = Rows(Path(), self.get(list, *names))
        found.path, found.inside = Path(self.where), names[0]
        return found
