"""What a routing trace holds, as frozen values of numpy arrays; `write` and `read` turn it into a file and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..core.errors import UserError, did_you_mean

__all__ = ["FORMAT", "OBJECTS", "VERSION", "Array", "Counts", "Layer", "Sample", "Table", "Trace"]

FORMAT, VERSION = "moestro-trace", 1
OBJECTS = ("run", "model", "data", "code")  # free-form JSON objects of the header

Array = NDArray[Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer:
    """One routed layer. path: as in `named_modules`. num_experts: E. virtual: meaning of the ids from E on."""

    path: str
    num_experts: int
    virtual: tuple[str, ...] = ()
    kind: str = "token"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counts:
    """Sums over training steps, one row per step or per run of neighbouring steps.

    Shapes (N rows, L layers, E = most experts of any layer; 0 beyond a layer's own):
        first, last: [N] int64, the steps that a row sums, inclusive.
        demand, load: [N, L, E] int64, choices before and rows after capacity.
        units: [N, L] int64, valid units.
        entropy: [N, L] float64, sum of routing entropies in nats, over entropy_units [N, L] int64 units.
    """

    first: Array
    last: Array
    demand: Array
    load: Array
    units: Array
    entropy: Array
    entropy_units: Array

    def __len__(self) -> int:
        return len(self.first)

    def mean_entropy(self) -> Array:
        """[N, L] mean routing entropy in nats, NaN where it was not recorded."""
        known = self.entropy_units > 0
        return np.where(known, self.entropy / np.maximum(self.entropy_units, 1), np.nan)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """The choices of one layer on one sampled batch.

    Shapes, by `type`:
        Plan: expert [T, K] integers (-1 = none), weight [T, K], kept [T, K] bool or None.
        ExpertChoice: unit [G, E, C] integers (-1 = empty), weight [G, E, C].
        Dense: weight [T, E].
        All: valid [T] bool or None, entropy [T] nats or None, meta name -> [T].
    """

    layer: int
    pass_: int
    type: str
    units: int
    weight: Array
    expert: Array | None = None
    unit: Array | None = None
    kept: Array | None = None
    valid: Array | None = None
    entropy: Array | None = None
    meta: Mapping[str, Array] = dataclasses.field(default_factory=dict)
    capacity: int | None = None
    complete: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """One sampled batch. columns: name -> [T] values per unit: token, position, segment, label.<kind>, loss, ..."""

    step: int
    name: str
    columns: Mapping[str, Array]
    tables: tuple[Table, ...]

    def table(self, layer: int, pass_: int = 0) -> Table | None:
        """The table of a layer and pass, or None."""
        return next((t for t in self.tables if t.layer == layer and t.pass_ == pass_), None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trace:
    """A routing trace. labels: kind -> names. run, model, data, code: JSON objects. pieces: token id -> its text."""

    layers: tuple[Layer, ...]
    counts: Counts
    samples: tuple[Sample, ...] = ()
    labels: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    tokenizer: str = "bytes"
    pieces: Mapping[int, str] = dataclasses.field(default_factory=dict)
    run: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    model: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    data: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    code: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def index(self, path: str) -> int:
        """The number of the layer with this path."""
        paths = [layer.path for layer in self.layers]
        if path not in paths:
            raise UserError(f"the trace has no layer {path!r}{did_you_mean(path, paths)}; it has {', '.join(paths)}")
        return paths.index(path)

    def demand(self, layer: int) -> Array:
        """[N, E] choices of one layer's experts, without the padding of `Counts`."""
        return self.counts.demand[:, layer, : self.layers[layer].num_experts]

    def load(self, layer: int) -> Array:
        """[N, E] rows of one layer's experts."""
        return self.counts.load[:, layer, : self.layers[layer].num_experts]

    def last(self, name: str | None = None) -> Sample | None:
        """The latest sample (of this name), or None."""
        return next((s for s in reversed(self.samples) if name in (None, s.name)), None)
