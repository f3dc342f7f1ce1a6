"""`moestro convert`: checkpoints into other formats, dense models into MoE and back, with a receipt."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import inspect
import itertools
import json
import sys
import textwrap
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from ..core.errors import UserError, did_you_mean
from .override import override
from .parse import Settings, parse
from .style import count, print_table

if TYPE_CHECKING:
    from torch import nn

    from ..convert.config import Conversion
    from ..convert.receipt import Receipt
    from ..tasks.tokenizer import Tokenizer

__all__ = ["convert", "main"]

Dtype = Literal["float64", "float32", "bfloat16", "float16"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Write a model in another format, or change it first: dense to MoE, MoE to dense, fewer or more experts.

    SOURCE is a run folder, or a checkpoint folder of transformers or of this library. Methods: none (the format only),
    copy, granular, reinit, cluster, taylor; btx, bam (several SOURCEs); average, most-loaded, distil; prune, merge,
    add. `--method NAME --help` lists a method's options. receipt.json in OUT says what is exact, what was measured and
    what was invented.
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
    receipt = convert(
        sources,
        out,
        conversion,
        to=options.to,
        text=options.text,
        tokens=options.tokens,
        seq_len=options.seq_len,
        dtype=options.dtype,
    )
    if receipt is not None:
        show(receipt)
    print(f"written: {out}")
    return 0


def convert(
    sources: Sequence[str | Path],
    out: str | Path,
    conversion: Conversion | None = None,
    *,
    to: str | None = None,
    text: str | Path | None = None,
    tokens: int = 8192,
    seq_len: int = 256,
    dtype: Dtype | None = None,
) -> Receipt | None:
    """Convert what lies in `sources` and write it to the new folder `out`, with `receipt.json` in it.

    conversion None = the format only: checkpoint folders are then rewritten from disk to disk, and there is no receipt.
    Returns the receipt. Raises `UserError`; nothing is left at `out` then.
    """
    import torch

    from ..convert import save, stream
    from ..convert.config import Resize
    from ..convert.shards import new_folder
    from ..train.layout import is_run

    out, kind = Path(out), None if dtype is None else getattr(torch, dtype)
    folders = [Path(s) for s in sources]
    several = conversion is not None and conversion.several
    if len(folders) != 1 and not several:
        name = "none" if conversion is None else type(conversion).__name__
        raise UserError(f"method {name} takes one SOURCE, found {len(folders)}")
    if several and len(folders) < 2:
        raise UserError(
            f"method {type(conversion).__name__} takes several SOURCEs and OUT, found {len(folders)} SOURCE"
        )
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; name a run or a checkpoint folder")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists already; name a new folder, or remove it first")
    if conversion is None and not is_run(folders[0]):
        stream(folders[0], out, to=_family(folders[0]) if to is None else to, dtype=kind)
        return None
    opened = [_open(folder) for folder in folders]
    _same_words(folders)
    source, first = folders[0], opened[0]
    model, tokenizer, loaded = first.model, first.tokenizer, first.loaded
    family = to or (loaded.family.model_type if loaded and isinstance(conversion, Resize) else "moestro")
    files = _tokenizer_files(source, tokenizer)
    receipt = None
    if conversion is not None:
        given: dict[str, Any] = {}
        if text is not None:
            tokenizer = tokenizer or _tokenizer(source, model)
            given = _tokens(Path(text), tokenizer, tokens, min(seq_len, getattr(model.config, "context", seq_len)))
        models = [o.model for o in opened] if several else model
        model, receipt = conversion.build(models, sources=tuple(map(str, folders)), **given)
    with new_folder(out) as new:
        new.rmdir()
        save(model, new, to=family, source=_source(loaded, family), dtype=kind, tokenizer=files)
        _generation(loaded, new)
        if receipt is not None:
            receipt.write(new)
    return receipt


@dataclasses.dataclass(frozen=True)
class _Opened:
    """A source. tokenizer: of a run; loaded: of a checkpoint folder."""

    model: nn.Module
    tokenizer: Tokenizer | None = None
    loaded: Any = None


def _open(source: Path) -> _Opened:
    from ..train.layout import is_run

    if is_run(source):
        from ..train.load import load as load_run

        found = load_run(source)
        return _Opened(found.model, tokenizer=found.tokenizer)
    from ..convert import load

    loaded = load(source)
    return _Opened(loaded.model, loaded=loaded)


def _same_words(folders: Sequence[Path]) -> None:
    """Raise `UserError` where the sources' tokenizers give different ids."""
    known: dict[Path, Any] = {}
    for folder in folders:
        with contextlib.suppress(OSError, ValueError):
            data = json.loads((folder / "tokenizer.json").read_bytes())
            if isinstance(data, dict) and "model" in data:
                known[folder] = [data["model"], data.get("added_tokens")]
    for folder, words in known.items():
        if words != next(iter(known.values())):
            raise UserError(f"{folder}: its tokenizer is not that of {next(iter(known))}; models need a common one")


def _source(loaded: Any, family: str) -> Any:
    """config.json of the source, where the new one is of the same family and keeps its other fields."""
    return loaded.source if loaded is not None and loaded.family.model_type == family else None


def _generation(loaded: Any, out: Path) -> None:
    name = "generation_config.json"
    if loaded is not None and (loaded.folder / name).is_file():
        (out / name).write_bytes((loaded.folder / name).read_bytes())


def _tokenizer_files(source: Path, tokenizer: Tokenizer | None) -> Path | str | None:
    """The folder whose tokenizer files belong to the new one, or the word for bytes."""
    from ..convert.tokenizer import BYTES
    from ..tasks.tokenizer import Bytes

    if isinstance(tokenizer, Bytes):
        return BYTES
    return source if (source / "tokenizer.json").is_file() else None


def _family(source: Path) -> str:
    from ..convert.loading import open_folder

    return open_folder(source).family.model_type


def _tokenizer(source: Path, model: nn.Module) -> Tokenizer:
    from ..tasks.tokenizer import Bytes
    from ..tasks.tokenizer_file import read_tokenizer

    if (source / "tokenizer.json").is_file():
        return read_tokenizer(source / "tokenizer.json")
    if getattr(model.config, "vocab_size", None) == Bytes.vocab_size:
        return Bytes()
    raise UserError(f"{source}: has no tokenizer.json, so --text cannot become tokens; put the tokenizer there")


def _tokens(path: Path, tokenizer: Tokenizer, most: int, seq_len: int) -> dict[str, Any]:
    """text [B, S] and the bytes that its targets stand for."""
    import torch

    if seq_len < 2 or most < 2:
        raise UserError("--tokens and --seq-len must be at least 2")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read the text {path}: {error.strerror or error}") from None
    ids, lengths = tokenizer.encode(content)
    rows = min(most, len(ids)) // seq_len
    if not rows:
        if len(ids) < 2:
            raise UserError(f"{path}: {len(ids)} tokens are no text to compare models on")
        rows, seq_len = 1, min(most, len(ids))
    whole = torch.from_numpy(ids[: rows * seq_len].copy()).view(rows, seq_len)
    met = torch.from_numpy(lengths[: rows * seq_len].copy()).view(rows, seq_len)[:, 1:]
    return {"text": whole, "num_bytes": int(met.sum())}


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
    recipe = _recipe(_value_of(args, "--recipe"))
    name = _value_of(args, "--method") or recipe.get("method", "none")
    kind = _kind(name)
    made = _with_method(kind)
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
        start |= {n: getattr(base, n) for n in _simple(type(base))}
    usage = "convert SOURCE... OUT [--method NAME]"
    options: Any = parse(made, args, verb="convert", usage=usage, default=made(**start))
    if base is None:
        if options.set:
            raise UserError("--set: method none has no options")
        return options, None
    conversion = base.replace(**{n: getattr(options, n) for n in _simple(type(base))})
    return options, override(conversion, options.set)


def _kind(name: Any) -> type[Conversion] | None:
    from ..convert.config import METHODS

    if name == "none":
        return None
    if name not in METHODS:
        raise UserError(f"--method: unknown method {name!r}{did_you_mean(str(name), [*METHODS, 'none'])}")
    return METHODS[name]


def _value_of(args: Sequence[str], flag: str) -> str | None:
    """The value of a flag, before anything else is read; the last one counts."""
    found = None
    for i, arg in enumerate(args):
        if arg == flag and i + 1 < len(args):
            found = args[i + 1]
        elif arg.startswith(f"{flag}="):
            found = arg.partition("=")[2]
    return found


def _recipe(path: str | None) -> dict[str, Any]:
    """The content of a YAML file; safe_load makes plain values only."""
    if path is None:
        return {}
    try:
        import yaml
    except ImportError:
        raise UserError("--recipe needs the package pyyaml; pip install 'moestro[hf]'") from None
    try:
        data = yaml.safe_load(Path(path).read_bytes())
    except OSError as error:
        raise UserError(f"cannot read the recipe {path}: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: no valid YAML of plain values ({' '.join(str(error).split())})") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: a recipe is a mapping of options, such as 'method: copy'")
    return data


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


def _simple(kind: type[Conversion]) -> list[str]:
    """Fields that are flags: those that hold no configs."""
    hints = typing.get_type_hints(kind)
    return [f.name for f in dataclasses.fields(kind) if "moestro." not in str(hints[f.name])]


def _with_method(kind: type[Conversion] | None) -> type[Any]:
    """`Options` with the method's simple fields as flags of their own."""
    if kind is None:
        return Options
    hints, texts = typing.get_type_hints(kind), _texts(kind)
    fields = []
    for field in dataclasses.fields(kind):
        if field.name in _simple(kind):
            hint = Annotated[hints[field.name], tyro.conf.arg(help=texts.get(field.name, ""))]
            fields.append((field.name, hint, dataclasses.field(default=field.default)))
    made = dataclasses.make_dataclass("Options", fields, bases=(Options,), frozen=True, kw_only=True)
    made.__doc__ = f"{inspect.cleandoc(kind.__doc__ or '')}"
    return made


def _texts(kind: type[Any]) -> dict[str, str]:
    """Field -> the string below it, of a class and its bases."""
    out: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        with contextlib.suppress(OSError, TypeError):
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
            body = typing.cast(ast.ClassDef, tree.body[0]).body
            for line, below in itertools.pairwise(body):
                if isinstance(line, ast.AnnAssign) and isinstance(below, ast.Expr):
                    name, text = typing.cast(ast.Name, line.target).id, getattr(below.value, "value", None)
                    if isinstance(text, str):
                        out[name] = " ".join(text.split())
    return out
