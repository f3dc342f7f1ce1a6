"""Options of a conversion as flags of the command line, or from a recipe in YAML."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import inspect
import itertools
import textwrap
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from ..core.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from ..convert.config import Conversion

__all__ = ["method", "recipe_of", "simple", "value_of", "with_method"]


def method(name: Any) -> type[Conversion] | None:
    from ..convert.config import METHODS

    if name == "none":
        return None
    if name not in METHODS:
        raise UserError(f"--method: unknown method {name!r}{did_you_mean(str(name), [*METHODS, 'none'])}")
    return METHODS[name]


def value_of(args: Sequence[str], flag: str) -> str | None:
    """The value of a flag, before anything else is read; the last one counts."""
    found = None
    for i, arg in enumerate(args):
        if arg == flag and i + 1 < len(args):
            found = args[i + 1]
        elif arg.startswith(f"{flag}="):
            found = arg.partition("=")[2]
    return found


def recipe_of(path: str | None) -> dict[str, Any]:
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


def simple(kind: type[Conversion]) -> list[str]:
    """Fields that are flags: those that hold no configs."""
    hints = typing.get_type_hints(kind)
    return [f.name for f in dataclasses.fields(kind) if "moestro." not in str(hints[f.name])]


def with_method(options: type[Any], kind: type[Conversion] | None) -> type[Any]:
    """The class `options` with the method's simple fields as flags of their own."""
    if kind is None:
        return options
    hints, texts = typing.get_type_hints(kind), _texts(kind)
    fields = []
    for field in dataclasses.fields(kind):
        if field.name in simple(kind):
            hint = Annotated[hints[field.name], tyro.conf.arg(help=texts.get(field.name, ""))]
            fields.append((field.name, hint, dataclasses.field(default=field.default)))
    made = dataclasses.make_dataclass("Options", fields, bases=(options,), frozen=True, kw_only=True)
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
