"""What does not fit, gathered, so that one error tells all of it."""

from __future__ import annotations

from ...core.errors import UserError

__all__ = ["Problems"]

_SHOWN = 3


class Problems:
    """What does not fit, by kind; one error at the end."""

    def __init__(self) -> None:
        self._kinds: dict[str, list[str]] = {}

    def add(self, kind: str, what: str) -> None:
        self._kinds.setdefault(kind, []).append(what)

    def __bool__(self) -> bool:
        return bool(self._kinds)

    def raise_if_any(self, where: object, remedy: str) -> None:
        if not self._kinds:
            return
        said: list[str] = []
        for kind, names in self._kinds.items():
            names = sorted(names)
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            said.append(f"{kind} {', '.join(names[:_SHOWN])}{more}")
        raise UserError(f"{where}: {'; '.join(said)}. {remedy}")
