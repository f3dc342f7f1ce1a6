"""`moestro info`: parameters, active parameters, FLOPs and bytes, layer by layer."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

import tyro

from ..core.config import Config
from ..core.errors import UserError
from ..models.config import Decoder
from .find import checkpoint, find
from .override import override
from .parse import Settings, parse
from .style import count, print_table, size

__all__ = ["describe", "main"]

BYTES = {"float32": 4, "bfloat16": 2}
DEFAULT_LENGTH = 512
"""Sequence length for models that name none."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Parameters, active parameters, FLOPs and bytes of a model, layer by layer, without building it."""

    name: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="NAME")]]
    """A preset or published model (moestro presets lists both), the folder of a run or of a checkpoint of a known
    family (its tensors are not read), or a config.json."""
    seq_len: int | None = None
    """Sequence length that attention is counted at; None = the run's, or a published model's context."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What parameters are stored in."""
    twin: bool = False
    """Describe the dense twin of equal active FLOPs per token instead."""
    set: Settings = ()
    """PATH=VALUE: change the model first, as in moestro train; its paths begin with "model."."""
    json: bool = False
    """Print one line of JSON instead of a table."""


def main(args: Sequence[str]) -> int:
    options = parse(Options, args, verb="info")
    model, seq_len = _model(options)
    if options.twin:
        from ..models.twin import dense_twin

        model = dense_twin(model, seq_len)
    about = describe(model, seq_len, options.dtype)
    if options.json:
        print(json.dumps({"name": options.name, **about}))
    else:
        _show(options.name, about)
    return 0


def _model(options: Options) -> tuple[Any, int]:
    """The model's config and the sequence length to count at."""
    model = checkpoint(options.name)
    if model is None or isinstance(model, Decoder):
        run = override(find(options.name), options.set)
        return run.model, options.seq_len or run.seq_len
    if options.set or options.twin:
        raise UserError(f"{options.name}: --set and --twin are for decoders, this is a {type(model).__name__}")
    return model, options.seq_len or DEFAULT_LENGTH


def describe(model: Config, seq_len: int, dtype: Literal["float32", "bfloat16"] = "float32") -> dict[str, Any]:
    """What a model of this config costs, counted on the meta device.

    parameters, active (those that one token meets), flops and train_flops (of matrix products, per token in sequences
    of `seq_len`: forward, and forward with backward), bytes; the same for every part under `parts`.
    """
    import torch

    from ..core.account import CostLine, breakdown

    with torch.device("meta"):
        lines = breakdown(model.build(), seq_len, depth=3)

    def row(line: CostLine) -> dict[str, Any]:
        c = line.cost
        counted = {"parameters": c.params, "active": c.active, "flops": c.flops, "train_flops": c.train_flops}
        return {"path": line.path, "kind": line.kind, **counted, "bytes": c.params * BYTES[dtype]}

    whole, *parts = (row(line) for line in lines if line.kind != "ModuleList")
    del whole["path"]
    return {**whole, "seq_len": seq_len, "dtype": dtype, "parts": parts}


def _show(name: str, about: dict[str, Any]) -> None:
    names = ("parameters", "active", "flops", "train_flops")
    rows = [[path, r["kind"], *(count(r[n]) for n in names), size(r["bytes"])] for path, r in _folded(about["parts"])]
    rows.append(["total", about["kind"], *(count(about[n]) for n in names), size(about["bytes"])])
    print_table(
        sys.stdout,
        name,
        ["part", "kind", "parameters", "active", "FLOPs forward", "FLOPs training", "bytes"],
        rows,
        f"active: parameters that one token meets. FLOPs: of matrix products, per token in sequences of "
        f"{about['seq_len']}. Bytes of parameters in {about['dtype']}. Figures of several layers are those of each.",
        left=2,
    )


def _folded(parts: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(path, row), with runs of equal layers shown once as layers.0-3."""
    layers: dict[int, list[dict[str, Any]]] = {}
    order: list[Any] = []
    for row in parts:
        layer = re.match(r"layers\.(\d+)", row["path"])
        if layer is None:
            order.append(row)
        else:
            number = int(layer.group(1))
            if number not in layers:
                order.append(number)
            layers.setdefault(number, []).append(row)

    def inside(number: int) -> list[Any]:
        return [{**row, "path": row["path"].removeprefix(f"layers.{number}")} for row in layers[number]]

    i = 0
    while i < len(order):
        if not isinstance(order[i], int):
            yield order[i]["path"], order[i]
            i += 1
            continue
        first, alike = order[i], inside(order[i])
        while i < len(order) and isinstance(order[i], int) and inside(order[i]) == alike:
            i += 1
        last = order[i - 1]
        for row in alike:
            yield (f"layers.{first}" if last == first else f"layers.{first}-{last}") + row["path"], row
