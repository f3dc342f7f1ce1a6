"""Writing a trace: a safetensors file whose metadata holds a JSON header. The specification is docs/trace-format.md."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import numpy as safetensors

from ..core import files
from ..core.errors import UserError
from .tables import FORMAT, OBJECTS, VERSION, Array, Table, Trace

__all__ = ["smallest", "write"]

_INTEGERS = (np.uint8, np.int8, np.int16, np.int32, np.int64)
_IDS = (np.int8, np.int16, np.int32)
_COUNTS = ("first", "last", "demand", "load", "units", "entropy", "entropy_units")


def smallest(values: Array, dtypes: tuple[type, ...] = _INTEGERS) -> Array:
    """Integers in the first of `dtypes` that holds them all; booleans as uint8."""
    values = np.asarray(values)
    if values.dtype == np.bool_ or not values.size:
        return values.astype(dtypes[0])
    low, high = int(values.min()), int(values.max())
    for dtype in dtypes:
        if np.iinfo(dtype).min <= low and high <= np.iinfo(dtype).max:
            return values.astype(dtype)
    raise UserError(f"integers in {low}..{high} do not fit {np.dtype(dtypes[-1]).name}")


def write(trace: Trace, path: str | os.PathLike[str]) -> None:
    """Write the file under a temporary name and rename it: the path holds the old file or the whole new one."""
    header, arrays = _encode(trace)
    metadata = {FORMAT: json.dumps(header, allow_nan=False)}  # one entry: safetensors writes several in any order
    content = safetensors.save({n: np.ascontiguousarray(a) for n, a in arrays.items()}, metadata=metadata)
    path = Path(path)
    try:
        files.write(path, content)
    except OSError as error:
        raise UserError(
            f"cannot write the trace {path}: {error.strerror or error}; what was there is unchanged"
        ) from error


def _encode(trace: Trace) -> tuple[dict[str, Any], dict[str, Array]]:
    counts = trace.counts
    arrays: dict[str, Array] = {f"counts.{n}": getattr(counts, n) for n in _COUNTS}
    if np.array_equal(counts.demand, counts.load):
        del arrays["counts.load"]
    samples = []
    for i, sample in enumerate(trace.samples):
        arrays |= {f"sample.{i}.{name}": _column(values) for name, values in sample.columns.items()}
        tables = []
        for j, table in enumerate(sample.tables):
            arrays |= {f"sample.{i}.table.{j}.{name}": values for name, values in _table_arrays(table).items()}
            tables.append(
                {
                    "layer": table.layer,
                    "pass": table.pass_,
                    "type": table.type,
                    "units": table.units,
                    "capacity": table.capacity,
                    "complete": table.complete,
                }
            )
        columns = sorted(sample.columns)
        samples.append({"step": sample.step, "name": sample.name, "columns": columns, "tables": tables})
    header = {
        "version": VERSION,
        "layers": [dataclasses.asdict(layer) | {"virtual": list(layer.virtual)} for layer in trace.layers],
        "samples": samples,
        "labels": {kind: list(names) for kind, names in trace.labels.items()},
        "tokenizer": trace.tokenizer,
        "pieces": {str(i): text for i, text in trace.pieces.items()},
    }
    return header | {name: dict(getattr(trace, name)) for name in OBJECTS}, arrays


def _column(values: Array) -> Array:
    return smallest(values) if values.dtype.kind in "iub" else values


def _table_arrays(table: Table) -> dict[str, Array]:
    out: dict[str, Array] = {"weight": table.weight}
    for name in ("expert", "unit"):
        ids = getattr(table, name)
        if ids is not None:
            out[name] = smallest(ids, _IDS)
    for name in ("kept", "valid"):
        flags = getattr(table, name)
        if flags is not None:
            out[name] = np.packbits(flags.reshape(-1), bitorder="little")
    if table.entropy is not None:
        out["entropy"] = table.entropy
    return out | {f"meta.{name}": smallest(values) for name, values in table.meta.items()}
