"""Configs: frozen keyword-only dataclasses that build things, count them, and travel as JSON. No torch at import.

A config class lives in the `config.py` of the folder whose parts it builds and names its target as a string, so that
configs, presets and command-line help can be read without loading torch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import types
import typing
from typing import Any, ClassVar, Literal, Self, TypeVar, Union

from .errors import UserError, did_you_mean

__all__ = ["Config", "config", "find_type"]

_TYPES: dict[str, type[Config]] = {}
_HOMES = ("routers", "experts", "dispatch", "losses", "nn", "moe", "models", "optim", "tasks", "train", "trace")
_HOMES += ("adapt", "convert")

C = TypeVar("C", bound=type)


@typing.dataclass_transform(frozen_default=True, kw_only_default=True)
def config(cls: C) -> C:
    """Class decorator: a frozen keyword-only dataclass that `Config.from_dict` can find by name."""
    made = dataclasses.dataclass(frozen=True, kw_only=True)(cls)
    _TYPES[made.type_name()] = made
    return made


class Config:
    """Base of all configs. Subclasses are decorated with `@config` and set `builds = "package.module:Class"`."""

    builds: ClassVar[str] = ""

    def build(self, *args: Any, **sizes: Any) -> Any:
        """Build the part. `sizes` are what the surroundings decide (dim, num_experts)."""
        module, _, name = self.builds.partition(":")
        if not name:
            raise NotImplementedError(f"{type(self).__name__} says in no `builds` what it builds")
        return getattr(importlib.import_module(module), name)(self, *args, **sizes)

    @classmethod
    def type_name(cls) -> str:
        """`folder.Class` for our own configs, the full path for others."""
        parts = cls.__module__.split(".")
        return f"{parts[1]}.{cls.__name__}" if parts[0] == "moestro" else f"{cls.__module__}.{cls.__name__}"

    def num_params(self, **sizes: Any) -> int:
        """Number of parameters of what is built, counted on the meta device; shared ones once."""
        return self._cost(sizes).params

    def num_active_params(self, **sizes: Any) -> int:
        """Parameters that one token meets: all but the experts it is not routed to."""
        return self._cost(sizes).active

    def flops_per_token(self, seq_len: int, mode: Literal["forward", "train"] = "forward", **sizes: Any) -> int:
        """Matrix-product FLOPs per token in a sequence of `seq_len`, of the forward pass or of forward and backward."""
        cost = self._cost(sizes, seq_len)
        return cost.train_flops if mode == "train" else cost.flops

    def _cost(self, sizes: dict[str, Any], seq_len: int = 1) -> Any:
        import torch

        from .account import cost

        with torch.device("meta"):
            return cost(self.build(**sizes), seq_len)

    def at_least(self, least: float, *names: str) -> None:
        """Raise `UserError` for a field that is less; for `__post_init__`."""
        for name in names:
            if getattr(self, name) < least:
                raise UserError(f"{type(self).__name__}.{name} must be at least {least}, found {getattr(self, name)}")

    def positive(self, *names: str) -> None:
        """Raise `UserError` for a field that is not above 0 (None passes); for `__post_init__`."""
        for name in names:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"{type(self).__name__}.{name} must be positive, found {value}")

    def replace(self, **changes: Any) -> Self:
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form; nested configs carry their type name."""
        return {"type": self.type_name()} | {
            f.name: _plain(getattr(self, f.name))
            for f in dataclasses.fields(self)  # type: ignore[arg-type]
        }

    @classmethod
    def from_dict(cls, data: Any, where: str = "config") -> Self:
        """Rebuild a config. Unknown types and fields and values of a wrong type raise `UserError` naming the place."""
        made = _read(data, cls, where)
        return typing.cast(Self, made)


def _plain(value: Any) -> Any:
    if isinstance(value, Config):
        return value.to_dict()
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    return value


def find_type(name: str, where: str) -> type[Config]:
    """The config class of this `type_name`. Raises `UserError` for an unknown one."""
    if name not in _TYPES and name.split(".")[0] in _HOMES:
        home = f"moestro.{name.split('.')[0]}.config"
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module(home)
    if name not in _TYPES:
        raise UserError(f"{where}: unknown config type {name!r}{did_you_mean(name, _TYPES)}")
    return _TYPES[name]


def _read_config(data: Any, base: type[Config], where: str) -> Config:
    if not isinstance(data, dict):
        raise UserError(f"{where}: expected an object for {base.__name__}, found {_show(data)}")
    cls = find_type(str(data["type"]), where) if "type" in data else base
    if not issubclass(cls, base):
        raise UserError(f"{where}: {cls.__name__} is no {base.__name__}")
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for name, value in data.items():
        if name == "type":
            continue
        if name not in fields:
            raise UserError(f"{where}: {cls.__name__} has no field {name!r}{did_you_mean(name, fields)}")
        values[name] = _read(value, hints[name], f"{where}.{name}")
    try:
        return cls(**values)
    except (TypeError, UserError) as error:  # what is missing, or a value that cannot be
        raise UserError(f"{where}: {error}") from None


def _read(value: Any, hint: Any, where: str) -> Any:
    """`value` from JSON as what the annotation asks for."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        nested = [a for a in args if isinstance(a, type) and issubclass(a, Config)]
        if len(nested) > 1 and isinstance(value, dict) and "type" in value:
            kind = find_type(str(value["type"]), where)
            nested = [a for a in nested if issubclass(kind, a)] or nested
        if len(nested) == 1 and isinstance(value, dict):
            return _read(value, nested[0], where)
        problems: list[str] = []
        for option in args:
            try:
                return _read(value, option, where)
            except UserError as error:
                problems.append(str(error))
        raise UserError(problems[0] if len(problems) == 1 else f"{where}: {_show(value)} fits none of {hint}")
    if hint is type(None):
        if value is None:
            return None
        raise UserError(f"{where}: expected null, found {_show(value)}")
    if isinstance(hint, type) and issubclass(hint, Config):
        return _read_config(value, hint, where)
    if origin is tuple and isinstance(value, list | tuple):
        if len(args) == 2 and args[1] is Ellipsis:
            return tuple(_read(v, args[0], f"{where}[{i}]") for i, v in enumerate(value))
        if len(args) == len(value):
            return tuple(_read(v, a, f"{where}[{i}]") for i, (v, a) in enumerate(zip(value, args)))
    if origin is dict and isinstance(value, dict):
        return {_read(k, args[0], where): _read(v, args[1], f"{where}.{k}") for k, v in value.items()}
    if origin is Literal:
        if value in args:
            return value
        raise UserError(f"{where}: {_show(value)} is none of {', '.join(map(repr, args))}")
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if hint in (int, str, bool) and type(value) is hint:
        return value
    raise UserError(f"{where}: expected {getattr(hint, '__name__', hint)}, found {_show(value)}")


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
