"""`--set PATH=VALUE`: changing a config by path, also to another type of part.

Flags can change the fields of the parts that a preset has; `--set` can put another part in their place:

    --set model.moe.router.select=routers.TopP                          another type, with its defaults
    --set model.moe.router.select='{"type": "routers.TopP", "p": 0.4}'  another type, with values
    --set model.moe.router='{"activation": "sigmoid"}'                  fields of the part that is there
"""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Sequence
from typing import Any, TypeVar

from ..core.config import Config, find_type
from ..core.errors import UserError, did_you_mean

__all__ = ["override"]

C = TypeVar("C", bound=Config)


def override(config: C, settings: Sequence[str]) -> C:
    """The config after every `path=value`, in order; it must make sense after all of them, not after each.

    Unknown fields and types and unfit values raise `UserError`.
    """
    if not settings:
        return config
    data: Any = config.to_dict()
    for setting in settings:
        path, equals, text = setting.partition("=")
        if not equals or not path:
            raise UserError(f"--set {setting!r}: write it as PATH=VALUE, for example --set model.dim=128")
        steps = path.strip().replace("-", "_").split(".")
        data = _changed(data, type(config), steps, _value(text), path.strip())
    return type(config).from_dict(data)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        if text.lstrip()[:1] in ("{", "[", '"'):
            raise UserError(f"--set: {text!r} is no valid JSON") from None
        return text


def _changed(here: Any, hint: Any, steps: list[str], value: Any, path: str) -> Any:
    """`here` (the JSON form of something annotated as `hint`) with `value` at `steps`."""
    if not steps:
        return _leaf(here, hint, value)
    step, *rest = steps
    if isinstance(here, dict) and "type" in here:
        kind = find_type(here["type"], f"--set {path}")
        names = [f.name for f in dataclasses.fields(kind)]  # type: ignore[arg-type]
        if step not in names:
            raise UserError(f"--set {path}: {kind.__name__} has no field {step!r}{did_you_mean(step, names)}")
        inner = typing.get_type_hints(kind)[step]
        # A part that was only named by its type has no values yet: what is below it starts from its defaults.
        before = here[step] if step in here else kind().to_dict()[step]
        return here | {step: _changed(before, inner, rest, value, path)}
    if isinstance(here, list):
        if not step.isdecimal() or int(step) >= len(here):
            raise UserError(f"--set {path}: {step!r} is no place in a list of {len(here)}; they count from 0")
        items = list(here)
        items[int(step)] = _changed(here[int(step)], _element(hint), rest, value, path)
        return items
    raise UserError(f"--set {path}: there is nothing called {step!r} below {here!r}; set the part above it")


def _leaf(here: Any, hint: Any, value: Any) -> Any:
    """A value as the annotation asks for: a text names a type of part, an object without a type changes the part."""
    if isinstance(value, list):
        return [_leaf(None, _element(hint), v) for v in value]
    if not _holds_config(hint):
        return value
    if isinstance(value, str):
        return {"type": value}
    if isinstance(value, dict) and "type" not in value and isinstance(here, dict):
        return here | value
    return value


def _element(hint: Any) -> Any:
    """What a list of this annotation holds."""
    for option in (hint, *typing.get_args(hint)):
        if typing.get_origin(option) is tuple:
            return typing.get_args(option)[0]
    return Any


def _holds_config(hint: Any) -> bool:
    if isinstance(hint, type):
        return issubclass(hint, Config)
    return any(_holds_config(a) for a in typing.get_args(hint))
