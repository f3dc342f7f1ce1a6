"""The fields of a config.json, taken one by one, each checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, overload

from ...core.errors import UserError

__all__ = ["Fields"]

V = TypeVar("V")
D = TypeVar("D")
_UNSET: Any = object()


class Fields:
    """config.json as a family reads it. `where` is named in errors.

    A field that is absent or null has its default; without a default it is an error that names the field.
    """

    def __init__(self, data: Mapping[str, Any], where: object = "config.json") -> None:
        self.data = dict(data)
        self.where = where
        self.taken: set[str] = set()

    def error(self, name: str, problem: str) -> UserError:
        """An error about a field, to be raised."""
        return UserError(f"{self.where}: {name}: {problem}")

    def has(self, name: str) -> bool:
        """Whether the field is there and not null. It counts as taken."""
        self.taken.add(name)
        return self.data.get(name) is not None

    @overload
    def take(self, name: str, kind: type[V], *, also: Sequence[str] = ()) -> V: ...

    @overload
    def take(self, name: str, kind: type[V], default: D, *, also: Sequence[str] = ()) -> V | D: ...

    def take(self, name: str, kind: type[Any], default: Any = _UNSET, *, also: Sequence[str] = ()) -> Any:
        """The field's value, of the given type (int passes for float). also: older names of the field."""
        self.taken.update((name, *also))
        for key in (name, *also):
            value = self.data.get(key)
            if value is None:
                continue
            if kind is float and type(value) is int:
                value = float(value)
            if type(value) is not kind:
                raise self.error(key, f"expected {kind.__name__}, found {value!r}")
            return value
        if default is _UNSET:
            raise self.error(name, "is missing; the checkpoint's config.json must give it")
        return default

    def only(self, name: str, *values: Any, default: Any = _UNSET) -> Any:
        """The field's value, which must be one of those given (the first where it is absent, or `default`)."""
        self.taken.add(name)
        value = self.data.get(name)
        if value is None:
            value = values[0] if default is _UNSET else default
        for known in values:
            if value == known and isinstance(value, bool) == isinstance(known, bool):
                return known
        known_values = ", ".join(map(repr, values))
        raise self.error(name, f"{value!r} cannot be expressed here; known: {known_values}")

    def choice(self, name: str, values: Mapping[str, V], default: str) -> V:
        """What the field's value stands for."""
        return values[self.only(name, *values, default=default)]

    def ints(self, name: str, default: Sequence[int] = ()) -> list[int]:
        """A list of integers."""
        value = self.take(name, list, list(default))
        if not all(type(v) is int for v in value):
            raise self.error(name, f"expected a list of integers, found {value!r}")
        return value

    def strings(self, name: str) -> list[str] | None:
        """A list of strings, or None where it is absent."""
        value = self.take(name, list, None)
        if value is not None and not all(type(v) is str for v in value):
            raise self.error(name, f"expected a list of strings, found {value!r}")
        return value
