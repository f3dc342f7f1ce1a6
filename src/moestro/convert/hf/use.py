"""Switching a loaded transformers model to Moestro's experts, with a word about every module."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.integrations import moe

from ...core.errors import UserError
from .experts import NAME, Explanation, explain, forward
from .recognise import decorated, interface_of

__all__ = ["experts_of", "use"]


def use(model: nn.Module) -> dict[str, Explanation]:
    """Let Moestro compute the experts of a transformers model. Returns, by module path, how it does so and why.

    Raises `UserError`, and changes nothing, where the model has no experts, none that transformers lets others compute
    (it would accept the name and do nothing: Switch Transformers, Llama 4, DBRX, ...), or only some; the message names
    them.
    """
    ours, others = experts_of(model)
    if not ours and not others:
        raise UserError(f"use: {type(model).__name__} has no routed experts; nothing was switched")
    if others:
        named = "; ".join(f"{path} ({why})" for path, why in list(others.items())[:4])
        more = f"; and {len(others) - 4} more" if len(others) > 4 else ""
        what = f"{len(ours)} experts modules could be switched, these could not" if ours else "nothing can be switched"
        raise UserError(f"use: {type(model).__name__}: {what}: {named}{more}. The model is as it was")
    before = {id(m): m.config._experts_implementation for m in ours.values()}
    try:
        if hasattr(model, "set_experts_implementation"):
            model.set_experts_implementation(NAME)  # type: ignore[operator]
        for module in ours.values():
            # It is the module's own config that decides, and transformers reaches only those that its models hold.
            if module.config._experts_implementation != NAME:
                module.config._experts_implementation_internal = NAME
    except Exception:
        for module in ours.values():
            module.config._experts_implementation_internal = before[id(module)]
        raise
    return {path: explain(module) for path, module in ours.items()}


def experts_of(model: nn.Module) -> tuple[dict[str, Any], dict[str, str]]:
    """(path -> module that Moestro can compute, path -> why it cannot), of all routed experts in a model."""
    ours: dict[str, Any] = {}
    others: dict[str, str] = {}
    for path, module in model.named_modules():
        if _inside(path, ours) or _inside(path, others):
            continue
        why = _refused(module)
        if why is None:
            ours[path] = module
        elif _routed(path, module):
            others[path] = why
    return ours, others


def _refused(module: nn.Module) -> str | None:
    """Why a module is not switched by the name of an implementation; None if it is."""
    name = type(module).__name__
    if decorated(module):
        found = interface_of(module)
        if found.get(NAME) is forward:
            return None
        return f"{name} looks its implementation up in {type(found).__name__}, not in {moe.ExpertsInterface.__name__}"
    if any(decorated(cls) for cls in type(module).__mro__ if issubclass(cls, nn.Module)):
        return f"{name} overrides the forward that asks for an implementation"
    return f"{name} computes its experts itself"


def _routed(path: str, module: nn.Module) -> bool:
    """Whether a module that is not ours holds routed experts, by its name: every expert of it, not a shared one."""
    last, cls = path.rsplit(".", 1)[-1], type(module).__name__
    if "shared" in path.lower() or "shared" in cls.lower() or not any(True for _ in module.parameters()):
        return False
    return last == "experts" or cls.endswith("Experts")


def _inside(path: str, found: Any) -> bool:
    return any(path.startswith(f"{outer}.") for outer in found)
