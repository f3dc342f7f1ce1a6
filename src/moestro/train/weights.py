"""A model's tensors by name, and putting them back with every one accounted for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..core.errors import UserError

__all__ = ["load_weights", "tensors_of"]


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers; a tensor that has several names appears under the first."""
    seen: set[int] = set()
    out: dict[str, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            out[name] = tensor.detach()
    return out


@torch.no_grad()
def load_weights(model: nn.Module, tensors: Mapping[str, Tensor], where: Path) -> None:
    """Copy tensors into the model. Raises `UserError` naming what is missing, left over, of another shape or dtype."""
    own = tensors_of(model)
    missing, extra = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    if missing or extra:
        said = [f"lacks {', '.join(missing[:3])}"] if missing else []
        said += [f"has {', '.join(extra[:3])} that the model does not have"] if extra else []
        more = max(len(missing) - 3, 0) + max(len(extra) - 3, 0)
        raise UserError(
            f"{where}: {' and '.join(said)}{f' (and {more} more)' if more else ''}; "
            "the file belongs to another model or version, use the config.json beside it"
        )
    for name, target in own.items():
        given = tensors[name]
        if given.shape != target.shape or given.dtype != target.dtype:
            raise UserError(
                f"{where}: {name} is {list(given.shape)} {given.dtype}, the model's is {list(target.shape)} "
                f"{target.dtype}; the file belongs to another model, use the config.json beside it"
            )
        target.copy_(given)
