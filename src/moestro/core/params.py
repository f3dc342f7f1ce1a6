"""What a parameter is: metadata that optimisers, sharding, adapters, converters and initialisation read.

A module describes its own parameters in `param_info() -> {attribute name: ParamInfo}`; `describe(model)` collects them
by full name. Metadata lives with modules, not on tensors: copies, casts and sharded replacements of a tensor keep it.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from torch import nn

__all__ = ["ParamInfo", "Role", "describe"]

Role = Literal["embedding", "head", "attention", "norm", "router", "expert", "shared_expert", "dense", "other"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParamInfo:
    """What optimisers and others need to know of one parameter.

    role: what it serves. expert_axis: axis that counts experts, or None. matrix_axes: (out, in) axes of the matrix that
    it applies, or None for vectors. parts: logical names of the pieces fused along the out axis, such as
    ("gate", "up"), in order and of equal size unless the module says otherwise. decay: whether weight decay applies.
    init_std: standard deviation of the initial normal distribution, None = the model's default, 0 = zeros;
    ones: start at one instead (norm gains). alike: all entries along `expert_axis` start with the same values.
    """

    role: Role
    expert_axis: int | None = None
    matrix_axes: tuple[int, int] | None = None
    parts: tuple[str, ...] = ()
    decay: bool = True
    init_std: float | None = None
    ones: bool = False
    alike: bool = False


def describe(model: nn.Module) -> dict[str, ParamInfo]:
    """Full parameter name -> ParamInfo for every parameter of the model.

    A module that describes nothing gets "other"; `nn.Linear` and friends inherit the role that the nearest describing
    ancestor declares in its attribute `role`.
    """
    out: dict[str, ParamInfo] = {}

    def walk(module: nn.Module, prefix: str, role: Role) -> None:
        role = getattr(module, "role", role)
        own = module.param_info() if hasattr(module, "param_info") else {}  # type: ignore[operator]
        for name, parameter in module.named_parameters(recurse=False):
            info = own.get(name)
            if info is None:
                matrix = (0, 1) if parameter.ndim == 2 else None
                info = ParamInfo(role=role, matrix_axes=matrix, decay=parameter.ndim >= 2)
            out[prefix + name] = info
        for name, child in module.named_children():
            walk(child, f"{prefix}{name}.", role)

    walk(model, "", "other")
    return out
