"""Modules that hold packed weights as buffers: what casting and loading must not do to them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

__all__ = ["apply_keeping", "check_kinds"]


def apply_keeping(module: nn.Module, apply: Callable[[], Any]) -> None:
    """Run the module's own `_apply`; buffers go where it takes them, and keep their dtypes, which are their format."""
    before = {name: buffer for name, buffer in module._buffers.items() if buffer is not None}
    apply()
    for name, old in before.items():
        now = module._buffers[name]
        if now is not None and now.dtype != old.dtype:
            module._buffers[name] = old.to(now.device)


def check_kinds(module: nn.Module, state: Mapping[str, Any], prefix: str, errors: list[str]) -> None:
    """Note every buffer that is given in another dtype: copying it would be silent nonsense."""
    for name, own in module._buffers.items():
        given = state.get(prefix + name)
        if own is not None and isinstance(given, Tensor) and given.dtype != own.dtype:
            errors.append(f"{prefix}{name}: {given.dtype} given, {own.dtype} wanted: weights of another kind")
