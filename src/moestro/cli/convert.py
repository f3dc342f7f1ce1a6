"""`moestro convert`: checkpoints into other formats, dense models into MoE and back, with a receipt."""

from __future__ import annotations

import dataclasses
import sys
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from ..core.errors import UserError, did_you_mean
from .methods import method, recipe_of, simple, value_of, with_method
from .override import override
from .parse import Settings, parse
from .style import count, print_table

if TYPE_CHECKING:
    from ..convert.config import Conversion
    from ..convert.receipt import Receipt

__all__ = ["main", "show"]

Dtype = Literal["float64", "float32", "bfloat16", "float16"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Write a model in another format, or change it first: dense to MoE, MoE to dense, fewer or more experts.

    SOURCE is a run folder, or a checkpoint folder of transformers or of this library. Methods: none (the format only),
    copy, granular, reinit, cluster, taylor; btx, bam (several SOURCEs); average, most-loaded, distil; prune, merge,
    add; grow. `--method NAME --help` lists a method's options. receipt.json in OUT says what is exact, what was
    measured and what was invented.
    """

    paths: tyro.conf.Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="SOURCE... OUT")]]
    """What to convert, and the new folder."""
    method: str = "none"
    """What to do to the model."""
    recipe: Path | None = None
    """A YAML file with the same options (method, to, text, ..., and those of the method); flags come first."""
    to: str | None = None
    """Family of the new folder: mixtral, olmoe, ... null = that of the source where nothing or only the number of
    experts changes, else moestro."""
    text: Path | None = None
    """A text file on which the old and the new model are compared, and that methods look at."""
    tokens: int = 8192
    """The most tokens of it to read, from the beginning."""
    seq_len: int = 256
    """Tokens per sequence; at most the model's context."""
    dtype: Dtype | None = None
    """Dtype of what is written; null = that of the source."""
    set: Settings = ()
    """Set any other option of the method: --set weigh=routers.Raw (repeatable)."""


def main(args: Sequence[str]) -> int:
    options, conversion = _read(args)
    if len(options.paths) < 2:
        raise UserError("name SOURCE and OUT; see moestro convert --help")
    *sources, out = options.paths
    import torch

    from ..train.conversion import convert

    receipt = convert(
        sources,
        out,
        conversion,
        to=options.to,
        text=options.text,
        tokens=options.tokens,
        seq_len=options.seq_len,
        dtype=None if options.dtype is None else getattr(torch, options.dtype),
    )
    if receipt is not None:
        show(receipt)
    print(f"written: {out}")
    return 0


def show(receipt: Receipt) -> None:
    """Print a receipt as a short table."""
    m = receipt.measured
    rows = [
        ("exact", receipt.exact or "nothing is claimed"),
        ("checked to", "" if receipt.bound is None else "every bit" if receipt.bound == 0 else f"{receipt.bound:g}"),
        ("measured on", f"{m.positions} positions, {m.source}"),
        ("against", m.against if len(receipt.sources) > 1 else ""),
        ("relative difference", f"{m.relative:.3g}"),
        ("largest difference", f"{m.largest:.3g}"),
        ("KL(old || new)", "" if m.kl is None else f"{m.kl:.3g} nats"),
        (f"bits per {m.unit}", "" if m.bits_before is None else f"{m.bits_before:.4f} -> {m.bits_after:.4f}"),
        ("parameters", f"{count(receipt.params_before)} -> {count(receipt.params_after)}"),
        ("active parameters", f"{count(receipt.active_before)} -> {count(receipt.active_after)}"),
        ("invented tensors", str(len(receipt.invented))),
        ("seed", str(receipt.seed)),
    ]
    print_table(sys.stdout, receipt.method, ["", ""], [r for r in rows if r[1]], left=2)
    columns = ["layer", "experts before", "experts after", "relative difference"]
    layers = [(w.path, str(w.experts_before), str(w.experts_after), f"{w.distance:.3g}") for w in receipt.layers]
    print_table(sys.stdout, "converted layers", columns, layers)
    for note in receipt.notes:
        print(f"note: {note}")


# Options --------------------------------------------------------------------------------------------------------


def _read(args: Sequence[str]) -> tuple[Any, Conversion | None]:
    """(general options, the method's options or None) of a command line and its recipe."""
    recipe = recipe_of(value_of(args, "--recipe"))
    name = value_of(args, "--method") or recipe.get("method", "none")
    kind = method(name)
    made = with_method(Options, kind)
    general = [f for f in dataclasses.fields(Options) if f.name not in ("paths", "recipe", "method", "set")]
    known = {f.name for f in general} | {"method"} | ({f.name for f in dataclasses.fields(kind)} if kind else set())
    for key in recipe:
        if key not in known:
            raise UserError(f"recipe: method {name} knows no {key!r}{did_you_mean(str(key), known)}")
    base = None
    if kind is not None:
        own = {f.name for f in dataclasses.fields(kind)}
        base = kind.from_dict({k: v for k, v in recipe.items() if k in own}, "recipe")
    start: dict[str, Any] = {"paths": (), "method": name}
    start |= _general(general, recipe)
    if base is not None:
        start |= {n: getattr(base, n) for n in simple(type(base))}
    usage = "convert SOURCE... OUT [--method NAME]"
    options: Any = parse(made, args, verb="convert", usage=usage, default=made(**start))
    if base is None:
        if options.set:
            raise UserError("--set: method none has no options")
        return options, None
    conversion = base.replace(**{n: getattr(options, n) for n in simple(type(base))})
    return options, override(conversion, options.set)


def _general(fields: Sequence[dataclasses.Field[Any]], recipe: dict[str, Any]) -> dict[str, Any]:
    from ..core.config import _read as read  # the one reader of annotated plain values

    hints = typing.get_type_hints(Options)
    out: dict[str, Any] = {}
    for field in fields:
        if field.name in recipe:
            hint, value = hints[field.name], recipe[field.name]
            if hint == Path | None:
                out[field.name] = None if value is None else Path(read(value, str, f"recipe.{field.name}"))
            else:
                out[field.name] = read(value, hint, f"recipe.{field.name}")
    return out
