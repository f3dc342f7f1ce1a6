"""Initial values that depend on the seed and a parameter's name only."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor, nn

from ..core.errors import UserError
from ..core.params import ParamInfo, describe

__all__ = ["OUTPUTS", "initialise"]

OUTPUTS = ("o", "down")  # logical names of matrices that write into the residual stream


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def _logical(name: str) -> str:
    """`layers.0.mixer.o.weight` -> `o`; `layers.0.ffn.down` -> `down`."""
    parts = name.split(".")
    return parts[-2] if parts[-1] == "weight" and len(parts) > 1 else parts[-1]


@torch.no_grad()
def initialise(model: nn.Module, seed: int = 0, std: float | None = 0.02, residual_branches: int | None = None) -> None:
    """Give every parameter its initial value.

    Matrices are normal with `ParamInfo.init_std` or `std` (None = 1 / sqrt(inputs), and 1 for embeddings), gains one,
    biases zero; vectors of any other kind without an init_std keep what their module gave them. Each parameter draws
    from a generator of its own, seeded with a hash of (seed, full name), in fp32 on the CPU: parameters of equal name
    and shape are equal in two different models, on any device.
    With `residual_branches` N, matrices named in `OUTPUTS` are scaled by 1 / sqrt(N) (GPT-2; N = 2 L for a decoder).
    Raises `UserError` for a model on the meta device.
    """
    infos = describe(model)
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise UserError(
                f"{name} is on the meta device and cannot be initialised; call model.to_empty(device=...) first"
            )
        scale = 1.0 if residual_branches is None or _logical(name) not in OUTPUTS else 1 / math.sqrt(residual_branches)
        value = _value(name, parameter, infos[name], seed, std, scale)
        if value is not None:
            parameter.copy_(value)


def _value(name: str, parameter: Tensor, info: ParamInfo, seed: int, std: float | None, scale: float) -> Tensor | None:
    if info.ones:
        return torch.ones(parameter.shape)
    if info.init_std == 0 or _logical(name).endswith("bias"):
        return torch.zeros(parameter.shape)
    if parameter.ndim < 2 and info.matrix_axes is None and info.init_std is None:
        return None
    if info.init_std is not None:
        width = info.init_std
    else:
        width = scale * (_by_inputs(parameter, info) if std is None else std)
    shape = list(parameter.shape)
    if info.alike and info.expert_axis is not None:
        shape[info.expert_axis] = 1
    return torch.empty(shape).normal_(0.0, width, generator=_generator(seed, name)).expand(parameter.shape)


def _by_inputs(parameter: Tensor, info: ParamInfo) -> float:
    """The standard deviation that keeps the size of what passes: 1 / sqrt(inputs); 1 for embeddings, which add nothing.

    Banks of unequal widths describe no matrix; their blocks read the last axis.
    """
    if info.role == "embedding":
        return 1.0
    inputs = parameter.shape[info.matrix_axes[1] if info.matrix_axes else -1]
    return 1 / math.sqrt(max(1, inputs))
