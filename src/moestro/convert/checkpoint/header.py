"""The header of a safetensors file, checked before a byte of data is believed."""

from __future__ import annotations

import json
import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...core.errors import UserError
from .tensors import Entry

__all__ = ["DTYPES", "SafeFile", "dtype_name"]

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_LONGEST = 100_000_000  # bytes of a header, as in the format's definition


def dtype_name(dtype: torch.dtype) -> str:
    """The format's name of a dtype. Raises `UserError` for one that the format does not know."""
    for name, known in DTYPES.items():
        if known == dtype:
            return name
    raise UserError(f"safetensors: {dtype} has no name in the format; convert the tensor first")


class _Place(NamedTuple):
    entry: Entry
    start: int
    stop: int


class SafeFile:
    """A safetensors file: its entries, and its tensors memory-mapped.

    Raises `UserError` for what is no such file: cut short, with a header that is no JSON, offsets that overlap, leave
    gaps or lead out of the file, sizes that contradict shape and dtype.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                size = file.seek(0, 2)
                file.seek(0)
                head = file.read(8)
                length = int.from_bytes(head, "little")
                if len(head) < 8 or length > min(size - 8, _LONGEST):
                    raise self._damaged("it is cut short, or no safetensors file")
                header = self._json(file.read(length))
                self._places = self._checked(header, size - 8 - length)
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # private, and never written to
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); check the path") from None
        self._data = 8 + length

    def _damaged(self, why: str) -> UserError:
        return UserError(f"{self.path}: {why}; get the file again")

    def _json(self, content: bytes) -> dict[str, Any]:
        def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
            if len({key for key, _ in pairs}) < len(pairs):
                raise ValueError
            return dict(pairs)

        try:
            header = json.loads(content, object_pairs_hook=once)
        except (ValueError, RecursionError):
            raise self._damaged("its header is no JSON, so it is damaged or no safetensors file") from None
        if not isinstance(header, dict):
            raise self._damaged("its header lists no tensors")
        header.pop("__metadata__", None)
        return header

    def _checked(self, header: dict[str, Any], size: int) -> dict[str, _Place]:
        places: dict[str, _Place] = {}
        for name, said in header.items():
            try:
                shape, (start, stop), kind = said["shape"], said["data_offsets"], said["dtype"]
                numbers = [*shape, start, stop]
                if not all(type(n) is int and n >= 0 for n in numbers):
                    raise ValueError
            except (KeyError, TypeError, ValueError):
                raise self._damaged(f"its header says nothing sensible of {name!r}") from None
            if kind not in DTYPES:
                raise UserError(f"{self.path}: {name} is of dtype {kind!r}, which is none of {', '.join(DTYPES)}")
            entry = Entry(tuple(shape), DTYPES[kind])
            if stop - start != entry.nbytes:
                raise self._damaged(f"its header gives {name} {stop - start} bytes where {entry} takes {entry.nbytes}")
            places[name] = _Place(entry, start, stop)
        end = 0
        for name, place in sorted(places.items(), key=lambda item: (item[1].start, item[1].stop)):
            if place.start != end:
                raise self._damaged(f"the data of {name} does not begin where those before it end")
            end = place.stop
        if end != size:
            raise self._damaged(f"it holds {size} bytes of data where its header lists {end}")
        return places

    def entries(self) -> dict[str, Entry]:
        return {name: place.entry for name, place in self._places.items()}

    def read(self, name: str) -> Tensor:
        """The tensor, memory-mapped. Do not write into it."""
        entry, start, _ = self._places[name]
        if not entry.numel:
            return torch.empty(entry.shape, dtype=entry.dtype)
        offset = self._data + start
        if offset % entry.dtype.itemsize:
            raw = torch.frombuffer(self._map, dtype=torch.uint8, count=entry.nbytes, offset=offset)
            return raw.clone().view(entry.dtype).view(entry.shape)
        return torch.frombuffer(self._map, dtype=entry.dtype, count=entry.numel, offset=offset).view(entry.shape)
