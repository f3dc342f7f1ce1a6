"""How unlike the experts of a layer are: mean cosine (41, arXiv 2303.01610), mean Frobenius distance (32, MoLA).

Both are means over the pairs of a layer's experts, in float64, of weights entry by entry: neurons are not matched.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..core.errors import UserError
from ..core.params import describe

__all__ = ["Diversity", "Experts", "cosines", "diversity", "diversity_of_model", "diversity_of_products"]

Experts = Tensor | Sequence[Tensor] | Mapping[str, Tensor]


class Diversity(NamedTuple):
    """Means over the pairs of experts. cosine: their redundancy, 1 for equal directions, about 0 for random ones.
    distance: Frobenius norm of the difference of two. One expert alone has 1 and 0."""

    cosine: float
    distance: float


@torch.no_grad()
def diversity(experts: Experts) -> Diversity:
    """Of weights: a stack [E, ...], or one tensor per expert, or name -> stack, whose entries are joined.

    Raises `UserError` for experts of different shapes.
    """
    flat = _flat(experts)
    return _over_pairs(flat @ flat.T, torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist"))


@torch.no_grad()
def diversity_of_products(left: Tensor, right: Tensor) -> Diversity:
    """Of products left[e] @ right[e], such as the updates B A of LoRA experts, without making them.

    Shapes: left [E, O, R], right [E, R, I]. <B_i A_i, B_j A_j> = sum of (B_i' B_j) * (A_i A_j').
    """
    b, a = left.double().cpu(), right.double().cpu()
    inner = (torch.einsum("mor,nos->mnrs", b, b) * torch.einsum("mri,nsi->mnrs", a, a)).sum((2, 3))
    norm = inner.diagonal()
    return _over_pairs(inner, (norm[:, None] + norm[None] - 2 * inner).clamp_min(0).sqrt())


def diversity_of_model(model: nn.Module, roles: Sequence[str] = ("expert",)) -> dict[str, Diversity]:
    """Path of a bank of experts -> means over pairs of its experts, of all matrices of an expert together.

    Of every bank whose parameters say which axis counts experts (`core.params`). roles: of the parameters that count.
    """
    infos = describe(model)
    banks: dict[str, dict[str, Tensor]] = {}
    for name, parameter in model.named_parameters():
        info = infos[name]
        if info.expert_axis is not None and info.role in roles and info.matrix_axes is not None:
            path, _, own = name.rpartition(".")
            banks.setdefault(path, {})[own] = parameter.detach().movedim(info.expert_axis, 0)
    return {path: diversity(stacks) for path, stacks in banks.items()}


@torch.no_grad()
def cosines(experts: Experts) -> Tensor:
    """[E, E] float64 on the CPU: the cosine of every two experts' weights; 0 with an expert of zeros."""
    flat = _flat(experts)
    return _cosines(flat @ flat.T)


def _cosines(inner: Tensor) -> Tensor:
    size = inner.diagonal().clamp_min(0).sqrt()
    both = size[:, None] * size[None]
    return torch.where(both > 0, inner / both.clamp_min(torch.finfo(both.dtype).tiny), 0.0)


def _over_pairs(inner: Tensor, distance: Tensor) -> Diversity:
    first, second = torch.triu_indices(len(inner), len(inner), 1)
    if not len(first):
        return Diversity(1.0, 0.0)
    return Diversity(float(_cosines(inner)[first, second].mean()), float(distance[first, second].mean()))


def _flat(experts: Experts) -> Tensor:
    """[E, N] float64 on the CPU."""
    stacks = list(experts.values()) if isinstance(experts, Mapping) else [experts]
    made = []
    for stack in stacks:
        if not isinstance(stack, Tensor):
            shapes = {tuple(one.shape) for one in stack}
            if len(shapes) > 1:
                raise UserError(f"experts of different shapes cannot be compared; found {sorted(shapes)}")
            stack = torch.stack([one.detach() for one in stack])
        made.append(stack.detach().double().cpu().flatten(1))
    if len({len(one) for one in made}) != 1:
        raise UserError(f"stacks of different numbers of experts: {[len(one) for one in made]}")
    return torch.cat(made, 1)
