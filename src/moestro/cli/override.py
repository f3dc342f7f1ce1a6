"""`--set PATH=VALUE`: changing a config by path, also to another type of part.

Flags can change the fields of the parts that a preset has; `--set` can put another part in their place:

    --set model.moe.router.select=routers.TopP                        another type, with its defaults
    --set model.moe.router.select='{"type": "routers.TopP", "p": 0.4}'  another type, with values
    --set model.moe.router='{"activation": "sigmoid"}'                  fields of the part that is there
"""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Sequence
from typing import Any, TypeVar

from ..core.config import Config
from ..core.errors import UserError, did_you_mean

__all__ = ["override"]

C = TypeVar("C", bound=Config)


def override(config: C, settings: Sequence[str]) -> C:
    """The config after every `path=value`, in order. Unknown fields and unfit values raise `UserError`."""
    for setting in settings:
        path, equals, text = setting.partition("=")
        if not equals or not path:
            raise UserError(f"--set {setting!r}: write it as PATH=VALUE, for example --set model.dim=128")
        steps = path.strip().replace("-", "_").split(".")
        data = _changed(config, type(config), steps, _value(text), path.strip())
        config = type(config).from_dict(data, where="config")
    return config


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        if text.lstrip()[:1] in ("{", "[", '"'):
            raise UserError(f"--set: {text!r} is no valid JSON") from None
        return text


def _changed(here: Any, hint: Any, steps: list[str], value: Any, path: str) -> Any:
    """The JSON form of `here` with `value` at `steps`."""
    if not steps:
        return _leaf(here, hint, value)
    step, *rest = steps
    if isinstance(here, Config):
        names = [f.name for f in dataclasses.fields(here)]  # type: ignore[arg-type]
        if step not in names:
            raise UserError(f"--set {path}: {type(here).__name__} has no field {step!r}{did_you_mean(step, names)}")
        hints = typing.get_type_hints(type(here))
        return here.to_dict() | {step: _changed(getattr(here, step), hints[step], rest, value, path)}
    if isinstance(here, tuple):
        if not step.isdecimal() or int(step) >= len(here):
            raise UserError(f"--set {path}: {step!r} is no place in a list of {len(here)}; they count from 0")
        inner = next((a for a in typing.get_args(hint) if a is not Ellipsis), Any)
        items = [_plain(v) for v in here]
        items[int(step)] = _changed(here[int(step)], inner, rest, value, path)
        return items
    raise UserError(f"--set {path}: there is nothing called {step!r} below {_plain(here)!r}; set the part above it")


def _leaf(here: Any, hint: Any, value: Any) -> Any:
    if isinstance(value, list):
        inner = next((a for a in typing.get_args(hint) if a is not Ellipsis), Any)
        return [_leaf(None, inner, v) for v in value]
    if not _holds_config(hint):
        return value
    if isinstance(value, str):
        return {"type": value}
    if isinstance(value, dict) and "type" not in value and isinstance(here, Config):
        return here.to_dict() | value
    return value


def _holds_config(hint: Any) -> bool:
    if isinstance(hint, type):
        return issubclass(hint, Config)
    return any(_holds_config(a) for a in typing.get_args(hint))


def _plain(value: Any) -> Any:
    return value.to_dict() if isinstance(value, Config) else value
