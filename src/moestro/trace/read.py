"""Reading a trace: every name, shape, dtype and range is checked, and nothing that the file contains is run."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors import numpy as safetensors

from ..core.errors import UserError
from .tables import FORMAT, OBJECTS, VERSION, Array, Counts, Layer, Sample, Table, Trace

__all__ = ["read"]


def read(path: str | os.PathLike[str]) -> Trace:
    """The trace in a file. Raises `UserError` for what is missing, truncated, foreign, or of another version."""
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read the trace {path}: {error.strerror or error}") from error
    header = _header(content, path)
    try:
        arrays = safetensors.load(content)
    except (SafetensorError, KeyError, ValueError) as error:
        raise UserError(f"{path} is damaged or cut short: {error}; copy it again or record a new trace") from error
    try:
        return _decode(header, arrays, str(path))
    except UserError:
        raise
    except (KeyError, TypeError, AttributeError, OverflowError, ValueError) as error:
        raise UserError(f"{path}: the trace's header is malformed ({type(error).__name__}: {error})") from error


def _header(content: bytes, path: Path) -> dict[str, Any]:
    size = int.from_bytes(content[:8], "little")
    if len(content) < 8 or size > len(content) - 8 or content[8:9] != b"{":
        raise UserError(f"{path} is no routing trace, or it is cut short (no safetensors header)")
    try:
        outer = json.loads(content[8 : 8 + size])
        metadata = outer.get("__metadata__", {})
        if not isinstance(metadata, dict) or not isinstance(metadata.get(FORMAT), str):
            raise UserError(f"{path} is a safetensors file, but no routing trace (its metadata has no {FORMAT!r})")
        header = json.loads(metadata[FORMAT])
    except (ValueError, RecursionError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: the header is no valid JSON ({error})") from error
    if not isinstance(header, dict) or header.get("version") != VERSION:
        version = header.get("version") if isinstance(header, dict) else None
        raise UserError(f"{path} has trace version {version!r}; this version of moestro reads version {VERSION}")
    return header


def _decode(header: dict[str, Any], arrays: dict[str, Array], where: str) -> Trace:
    take = _Taker(arrays, where)
    layers = tuple(_layer(entry, where) for entry in header["layers"])
    counts = _counts(take, layers)
    labels = {_text(kind, where): tuple(_text(n, where) for n in names) for kind, names in header["labels"].items()}
    samples = tuple(_sample(take, i, entry, layers, labels) for i, entry in enumerate(header["samples"]))
    if take.left:
        raise UserError(f"{where}: unexpected tensor {min(take.left)!r}; the file is no trace of this version")
    for name in OBJECTS:
        if not isinstance(header[name], dict):
            raise UserError(f"{where}: {name!r} in the header must be an object")
    return Trace(
        layers=layers,
        counts=counts,
        samples=samples,
        labels=labels,
        tokenizer=_text(header["tokenizer"], where),
        pieces={_whole(int(i), where): _text(text, where) for i, text in header["pieces"].items()},
        **{name: header[name] for name in OBJECTS},
    )


class _Taker:
    """Hands out the file's arrays by name, checked, and knows which nobody asked for."""

    def __init__(self, arrays: dict[str, Array], where: str) -> None:
        self.arrays, self.where, self.left = arrays, where, set(arrays)

    def has(self, name: str) -> bool:
        return name in self.arrays

    def __call__(self, name: str, shape: tuple[int | None, ...], kinds: str, dtype: Any = None) -> Array:
        if name not in self.arrays:
            raise UserError(f"{self.where}: the tensor {name!r} is missing")
        self.left.discard(name)
        found = self.arrays[name]
        fits = len(found.shape) == len(shape) and all(b in (None, a) for a, b in zip(found.shape, shape))
        if not fits or found.dtype.kind not in kinds or dtype not in (None, found.dtype):
            want = "x".join("?" if n is None else str(n) for n in shape)
            raise UserError(f"{self.where}: {name!r} is {found.dtype.name} {list(found.shape)}, expected {want}")
        if kinds == "f" and not np.isfinite(found).all():
            raise UserError(f"{self.where}: {name!r} has a NaN or an infinity")
        return found

    def ids(self, name: str, shape: tuple[int | None, ...], below: int) -> Array:
        found = self(name, shape, "iu")
        self.within(name, found, -1, below)
        return found

    def within(self, name: str, found: Array, low: int, below: int) -> None:
        if found.size and not (low <= int(found.min()) and int(found.max()) < below):
            raise UserError(f"{self.where}: {name!r} must lie in {low}..{below - 1}")

    def bits(self, name: str, shape: tuple[int, ...]) -> Array | None:
        if name not in self.arrays:
            return None
        number = int(np.prod(shape))
        packed = self(name, ((number + 7) // 8,), "u", np.uint8)
        return np.unpackbits(packed, count=number, bitorder="little").astype(bool).reshape(shape)


def _counts(take: _Taker, layers: tuple[Layer, ...]) -> Counts:
    first = take("counts.first", (None,), "i", np.int64)
    N, L = len(first), len(layers)
    last = take("counts.last", (N,), "i", np.int64)
    if (last < first).any() or (first[1:] <= last[:-1]).any():
        raise UserError(f"{take.where}: the rows of counts are not in the order of their steps")
    E = max((layer.num_experts for layer in layers), default=0)
    demand = take("counts.demand", (N, L, E), "i", np.int64)
    load = take("counts.load", (N, L, E), "i", np.int64) if take.has("counts.load") else demand
    out = Counts(
        first=first,
        last=last,
        demand=demand,
        load=load,
        units=take("counts.units", (N, L), "i", np.int64),
        entropy=take("counts.entropy", (N, L), "f", np.float64),
        entropy_units=take("counts.entropy_units", (N, L), "i", np.int64),
    )
    if min((int(a.min()) for a in (demand, load, out.units, out.entropy_units) if a.size), default=0) < 0:
        raise UserError(f"{take.where}: counts must not be negative")
    return out


def _sample(
    take: _Taker, i: int, entry: dict[str, Any], layers: tuple[Layer, ...], labels: Mapping[str, tuple[str, ...]]
) -> Sample:
    columns: dict[str, Array] = {}
    units = None
    for name in entry["columns"]:
        columns[name] = take(f"sample.{i}.{name}", (units,), "iuf")
        units = len(columns[name])
        if name.startswith("label.") and name[6:] in labels:
            take.within(f"sample.{i}.{name}", columns[name], -1, len(labels[name[6:]]))
    tables = tuple(_table(take, f"sample.{i}.table.{j}.", e, layers) for j, e in enumerate(entry["tables"]))
    return Sample(
        step=_whole(entry["step"], take.where), name=_text(entry["name"], take.where), columns=columns, tables=tables
    )


def _table(take: _Taker, at: str, entry: dict[str, Any], layers: tuple[Layer, ...]) -> Table:
    where, kind = take.where, entry["type"]
    T, number = _whole(entry["units"], where), _whole(entry["layer"], where)
    if number >= len(layers):
        raise UserError(f"{where}: {at}* belongs to layer {number}, but there are {len(layers)} layers")
    E = layers[number].num_experts
    expert = unit = kept = None
    if kind == "Plan":
        expert = take.ids(f"{at}expert", (T, None), E + len(layers[number].virtual))
        kept = take.bits(f"{at}kept", expert.shape)
        shape = expert.shape
    elif kind == "ExpertChoice":
        unit = take.ids(f"{at}unit", (None, E, None), T)
        shape = unit.shape
    elif kind == "Dense":
        shape = (T, E)
    else:
        raise UserError(f"{where}: unknown kind of table {kind!r}; this version knows Plan, ExpertChoice and Dense")
    meta = {n.removeprefix(f"{at}meta."): take(n, (T,), "iu") for n in sorted(take.left) if n.startswith(f"{at}meta.")}
    capacity = entry["capacity"]
    return Table(
        layer=number,
        pass_=_whole(entry["pass"], where),
        type=kind,
        units=T,
        weight=take(f"{at}weight", shape, "f"),
        expert=expert,
        unit=unit,
        kept=kept,
        valid=take.bits(f"{at}valid", (T,)),
        entropy=take(f"{at}entropy", (T,), "f") if take.has(f"{at}entropy") else None,
        meta=meta,
        capacity=None if capacity is None else _whole(capacity, where),
        complete=entry["complete"] is True,
    )


def _layer(entry: dict[str, Any], where: str) -> Layer:
    return Layer(
        path=_text(entry["path"], where),
        num_experts=_whole(entry["num_experts"], where),
        virtual=tuple(_text(v, where) for v in entry["virtual"]),
        kind=_text(entry["kind"], where),
    )


def _whole(value: Any, where: str) -> int:
    return _checked(value, lambda v: type(v) is int and v >= 0, "a whole number", where)


def _text(value: Any, where: str) -> str:
    return _checked(value, lambda v: isinstance(v, str), "a text", where)


def _checked(value: Any, fits: Callable[[Any], bool], what: str, where: str) -> Any:
    if not fits(value):
        raise UserError(f"{where}: the header has {str(value)[:60]!r} where {what} belongs")
    return value
