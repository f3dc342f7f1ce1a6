"""What a decorated experts class of transformers computes, told from what it is made of and never from its name.

A class that brings its own gate is its own gate: the function is compared with transformers' default. An activation is
taken for one of ours only if its type is exactly one of those below, nothing was put over its forward, nobody listens
to it, and it gave our values when it was tried.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import activations
from transformers.integrations import moe

from ...ops.expert_mlp.activations import ACTIVATIONS

__all__ = ["Layout", "activation_of", "decorated", "default_gate", "interface_of", "layout_of", "original_forward"]

_FLAGS = ("has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "is_concatenated")
_DISPATCH = moe.use_experts_implementation(type("Experts", (nn.Module,), {"forward": lambda self: None})).forward


@dataclasses.dataclass(frozen=True)
class Layout:
    """The flags that transformers' decorator sets on an instance, and the names of its parameters."""

    has_gate: bool
    has_bias: bool
    has_post_expert_norm: bool
    is_transposed: bool
    is_concatenated: bool

    @property
    def first(self) -> str:
        return "gate_up_proj" if self.has_gate else "up_proj"

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names: both stacks of matrices, and both biases where there are some."""
        names = (self.first, "down_proj")
        return (*names, *(f"{name}_bias" for name in names)) if self.has_bias else names


def decorated(module: nn.Module | type[nn.Module]) -> bool:
    """Whether the forward of a module (or of a class) is the one that transformers' decorator puts there."""
    cls = module if isinstance(module, type) else type(module)
    return getattr(cls.forward, "__code__", None) is _DISPATCH.__code__


def interface_of(module: nn.Module) -> Any:
    """The interface in which a decorated module looks its implementation up."""
    return _closed_over(module, "experts_interface")


def original_forward(module: nn.Module) -> Callable[..., Tensor]:
    """The forward that the class was written with: what "eager" means."""
    return _closed_over(module, "original_forward")


def _closed_over(module: nn.Module, name: str) -> Any:
    forward: Any = type(module).forward
    return forward.__closure__[forward.__code__.co_freevars.index(name)].cell_contents


def layout_of(module: Any) -> Layout:
    """The flags of a decorated module."""
    return Layout(*(bool(getattr(module, flag)) for flag in _FLAGS))


def default_gate(module: Any) -> bool:
    """Whether the gate is transformers' own: act_fn of the first half times the second half."""
    return getattr(module._apply_gate, "__func__", None) is moe._default_apply_gate


def activation_of(act: Any) -> tuple[str | None, str]:
    """(our name of an activation, "") or (None, why it is none of ours)."""
    if isinstance(act, nn.Module):
        cls = type(act)
        if "forward" in act.__dict__ or cls.__call__ is not nn.Module.__call__:
            return None, f"something was put over the forward of {cls.__name__}"
        if act._forward_hooks or act._forward_pre_hooks or act._backward_hooks or act._backward_pre_hooks:
            return None, f"hooks listen to {cls.__name__}"
        name, key = _MODULES.get(cls, _nothing)(act), cls.forward
    else:
        name, key = _FUNCTIONS.get(act) if callable(act) and _hashable(act) else None, act
    if name is None:
        return None, f"its activation {_called(act)} is none of {', '.join(ACTIVATIONS)}"
    if not _agrees(key, name, act):
        return None, f"its activation {_called(act)} does not give the values of {name}"
    return name, ""


def _gelu(act: Any) -> str | None:
    return "gelu" if act.act is F.gelu else None


def _gelu_tanh(act: Any) -> str | None:
    inner = act.act
    if not isinstance(inner, functools.partial) or inner.func is not F.gelu or inner.args:
        return None
    return "gelu_tanh" if inner.keywords == {"approximate": "tanh"} else None


def _torch_gelu(act: Any) -> str | None:
    return {"none": "gelu", "tanh": "gelu_tanh"}.get(act.approximate)


def _nothing(act: Any) -> None:
    return None


_MODULES: dict[type, Callable[[Any], str | None]] = {
    activations.SiLUActivation: lambda act: "silu",
    nn.SiLU: lambda act: "silu",
    activations.GELUActivation: _gelu,
    activations.GELUTanh: _gelu_tanh,
    nn.GELU: _torch_gelu,
    nn.ReLU: lambda act: "relu",
    nn.LeakyReLU: lambda act: "leaky_relu" if act.negative_slope == 0.01 else None,
    activations.ReLUSquaredActivation: lambda act: "relu2",
}
_FUNCTIONS: dict[Any, str] = {F.silu: "silu", F.gelu: "gelu", F.relu: "relu", torch.relu: "relu"}


def _hashable(value: Any) -> bool:
    return type(value).__hash__ is not None


def _called(act: Any) -> str:
    return type(act).__name__ if isinstance(act, nn.Module) else getattr(act, "__name__", repr(act))


_TRIED: dict[tuple[Any, str], bool] = {}


def _agrees(key: Any, name: str, act: Any) -> bool:
    """Whether the activation gives our values; tried once for every function and name."""
    known = _TRIED.get((key, name))
    if known is None:
        known = _TRIED[key, name] = _try(name, act)
    return known


def _try(name: str, act: Any) -> bool:
    with torch.no_grad(), torch.autocast("cpu", enabled=False), torch.device("cpu"):
        x = torch.linspace(-12, 12, 97, dtype=torch.float64)
        want = torch.empty_like(x)
        ACTIVATIONS[name].forward(x, want)
        return torch.allclose(act(x.clone()), want, rtol=1e-9, atol=1e-12)
