"""Packing the weights of a loaded run, with what it saves and what it costs."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console

from ..core.errors import UserError
from ..tasks.config import Corpus
from .style import print_table, size

if TYPE_CHECKING:
    from ..ops.packed import Kind
    from ..serve.weights import Packing
    from ..train.load import Loaded

__all__ = ["pack_loaded"]

EVERY = 5.0  # seconds between plain lines of progress


def pack_loaded(loaded: Loaded, kind: Kind, measure: bool, stream: TextIO) -> dict[str, Any]:
    """Pack the model of a run in place; bytes and bits per byte before and after, said on `stream` and returned.
    Where the run's targets are no text, nats per target stand for bits per byte (`measure`)."""
    from ..serve.weights import pack_model
    from ..train.held_out import held_out, validate

    bits: dict[str, float] | None = None
    batches, missing = None, "not asked for"
    if measure:
        try:
            batches = held_out(loaded)
        except UserError as error:
            missing = str(error)
    if batches is not None:
        bits = {"fp32": validate(loaded, batches, _watch(stream, "fp32"))}
    packing = pack_model(loaded.model, kind)
    if batches is not None and bits is not None:
        bits[kind] = validate(loaded, batches, _watch(stream, kind))
    unit = "bits per byte" if isinstance(loaded.config.data, Corpus) else "nats per target"
    _say(packing, bits, unit, missing if measure else "", stream)
    return {
        "kind": kind,
        "bytes": {"before": packing.before, "after": packing.after},
        "packed": list(packing.packed),
        "kept": packing.kept,
        "bits_per_byte": bits,
        "bits_per_byte_missing": None if bits is not None else missing,
        **({} if unit == "bits per byte" else {"measure": unit}),
    }


def _say(packing: Packing, bits: dict[str, float] | None, unit: str, missing: str, stream: TextIO) -> None:
    kind, before, after = packing.kind, packing.before, packing.after
    rows = [[name, size(before[name]), size(after.get(name, 0))] for name in before]
    rows.append(["all", size(sum(before.values())), size(sum(after.values()))])
    print_table(stream, f"weights in {kind}", ["bytes of", "before", "after"], rows)
    for path, why in packing.kept.items():
        print(f"{path} stays as it is: {why}", file=stream)
    if bits is not None:
        change = bits[kind] - bits["fp32"]
        print(
            f"validation: {bits[kind]:.4f} {unit} with {kind}, {bits['fp32']:.4f} with fp32 ({change:+.4f})",
            file=stream,
            flush=True,
        )
    elif missing:
        print(f"validation: not measured: {missing}", file=stream, flush=True)


def _watch(stream: TextIO, what: str) -> Callable[[int, int], None]:
    """Progress: one line, written over, on a terminal; elsewhere a line every few seconds, none if it is quick."""
    terminal = Console(file=stream).is_terminal
    said = time.monotonic()

    def watch(done: int, total: int) -> None:
        nonlocal said
        text = f"validation with {what}: {done} of {total} windows"
        if terminal:
            stream.write(f"\r{text}" + ("\r" + " " * len(text) + "\r" if done == total else ""))
            stream.flush()
        elif time.monotonic() - said >= EVERY:
            said = time.monotonic()
            print(text, file=stream, flush=True)

    return watch
