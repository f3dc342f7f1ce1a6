"""Muon: updates of matrices made orthogonal, each expert and each fused part a matrix of its own."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..core.errors import UserError
from ..core.params import ParamInfo, describe
from .adamw import AdamWOptimizer
from .config import Muon

__all__ = ["MuonOptimizer", "as_matrices", "from_matrices", "orthogonalised"]

_ROLES = ("attention", "dense", "expert", "shared_expert")
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_EPS = 1e-7
_AT_ONCE = 2**24  # numbers orthogonalised at a time: the iteration holds some five copies of them


@dataclasses.dataclass(frozen=True)
class _Matrix:
    """A parameter that is one or several matrices, with what is kept of its gradients."""

    parameter: nn.Parameter
    info: ParamInfo
    momentum: Tensor


class MuonOptimizer:
    """Muon on matrices, AdamW on everything else; the state is nothing but named tensors.

    Which parameters are matrices, and of how many parts, their `ParamInfo` says: `gate_up` [E, 2F, D] is 2E matrices
    [F, D], never one of [2EF, D]. Matrices of roles attention, dense, expert and shared_expert are stepped by Muon;
    what declares no matrix (vectors, blocks of unequal widths), embeddings, head and routers by AdamW.

        m = momentum * m + (1 - momentum) * g;  u = momentum * m + (1 - momentum) * g  (nesterov; else u = m)
        W = (1 - lr * decay) * W - lr * scale * NS(u)

    NS runs in fp32 on the CPU and bf16 on GPUs (float64 for float64). Of a gradient that is sparse over experts,
    touched experts take a step, and all others stay as they are.
    Raises `UserError` for a model without such a matrix. Source: Jordan et al. 2024; Moonlight, arXiv 2502.16982.
    """

    def __init__(self, config: Muon, model: nn.Module) -> None:
        self.config = config
        infos = describe(model)
        self.matrices: dict[str, _Matrix] = {}
        for name, p in model.named_parameters():
            if p.requires_grad and infos[name].role in _ROLES and infos[name].matrix_axes is not None:
                self.matrices[name] = _Matrix(p, infos[name], torch.zeros_like(p))
        if not self.matrices:
            raise UserError("Muon: the model has no trainable matrix of attention, dense layers or experts; use AdamW")
        rest = [n for n, p in model.named_parameters() if p.requires_grad and n not in self.matrices]
        self.rest = AdamWOptimizer(config, model, rest) if rest else None

    def clear(self) -> None:
        """Forget the gradients."""
        for m in self.matrices.values():
            m.parameter.grad = None
        if self.rest is not None:
            self.rest.clear()

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """One update at `factor` of the peak learning rate."""
        for m in self.matrices.values():
            if m.parameter.grad is not None:
                self._step(m, m.parameter.grad, factor)
        if self.rest is not None:
            self.rest.step(factor)

    def _step(self, m: _Matrix, grad: Tensor, factor: float) -> None:
        lr = self.config.lr * factor * self._lr(m.info)
        decay = 1 - lr * self.config.weight_decay if m.info.decay else 1.0
        if not grad.is_sparse:
            m.momentum.lerp_(grad, 1 - self.config.momentum)
            update = self._update(m.info, grad, m.momentum)
            m.parameter.mul_(decay).add_(update, alpha=-lr)
            return
        grad = grad.coalesce()
        touched, grad = grad.indices()[0], grad.values()
        momentum = m.momentum.index_select(0, touched).lerp_(grad, 1 - self.config.momentum)
        update = self._update(m.info, grad, momentum)
        m.momentum.index_copy_(0, touched, momentum)
        rows = m.parameter.detach().index_select(0, touched)
        m.parameter.index_copy_(0, touched, rows.mul_(decay).add_(update, alpha=-lr))

    def _update(self, info: ParamInfo, grad: Tensor, momentum: Tensor) -> Tensor:
        """What is subtracted at a learning rate of 1."""
        ahead = grad.lerp(momentum, self.config.momentum) if self.config.nesterov else momentum
        matrices = as_matrices(ahead, info)
        A, B = matrices.shape[1:]
        scale = 0.2 * math.sqrt(max(A, B)) if self.config.scale == "match_rms" else math.sqrt(max(1, A / B))
        parts = matrices.split(max(1, _AT_ONCE // max(1, A * B)))
        made = torch.cat([orthogonalised(p, self.config.iterations).to(grad.dtype) for p in parts])
        return from_matrices(made.mul_(scale), info, grad.shape)

    def _lr(self, info: ParamInfo) -> float:
        expert = self.config.lr_expert if info.role in ("expert", "shared_expert") else 1.0
        return self.config.lr_matrix * expert

    def to_tensors(self) -> dict[str, Tensor]:
        """The state as `parameter name/what` -> tensor."""
        own = {f"{name}/momentum": m.momentum for name, m in self.matrices.items()}
        return own if self.rest is None else own | self.rest.to_tensors()

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over a state written by `to_tensors`. Raises `UserError` where names or shapes do not fit."""
        own = {key: value for key, value in tensors.items() if key.rpartition("/")[0] in self.matrices}
        rest = {key: value for key, value in tensors.items() if key not in own}
        for name, m in self.matrices.items():
            value = own.pop(f"{name}/momentum", None)
            if value is None:
                raise UserError(f"the optimiser's state of {name!r} is incomplete: it has no momentum")
            if value.shape != m.momentum.shape:
                raise UserError(
                    f"the optimiser's state '{name}/momentum' has shape {list(value.shape)}, "
                    f"its parameter {list(m.momentum.shape)}"
                )
            m.momentum.copy_(value)
        if own or (rest and self.rest is None):
            raise UserError(
                f"the optimiser's state has a tensor {next(iter(own or rest))!r} that fits no parameter of this model"
            )
        if self.rest is not None:
            self.rest.load(rest)


def as_matrices(tensor: Tensor, info: ParamInfo) -> Tensor:
    """The matrices that a parameter is, [N, A, B]: experts, and inside each the fused parts, in order."""
    assert info.matrix_axes is not None
    order = (*_before(info), *info.matrix_axes)
    stack = tensor.permute(order).reshape(-1, *(tensor.shape[a] for a in info.matrix_axes))
    P = max(1, len(info.parts))
    return stack.reshape(stack.shape[0] * P, stack.shape[1] // P, stack.shape[2])


def from_matrices(matrices: Tensor, info: ParamInfo, shape: torch.Size) -> Tensor:
    """The inverse of `as_matrices`."""
    assert info.matrix_axes is not None
    order = (*_before(info), *info.matrix_axes)
    stack = matrices.reshape([shape[a] for a in order])
    return stack.permute([order.index(a) for a in range(len(order))])


def _before(info: ParamInfo) -> tuple[int, ...]:
    return () if info.expert_axis is None else (info.expert_axis,)


def orthogonalised(matrices: Tensor, iterations: int = 5) -> Tensor:
    """Each matrix with its singular values moved near 1 (0.7 to 1.2), by a quintic Newton-Schulz iteration.

    Shapes: [N, A, B] -> [N, A, B], in fp32 on the CPU, bf16 elsewhere, float64 for float64.
    """
    a, b, c = _COEFFICIENTS
    fast = torch.float32 if matrices.device.type == "cpu" else torch.bfloat16
    x = matrices if matrices.dtype == torch.float64 else matrices.to(fast)
    tall = x.shape[1] > x.shape[2]
    x = x.transpose(1, 2) if tall else x
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp_min(_EPS)
    for _ in range(iterations):
        gram = x @ x.transpose(1, 2)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.transpose(1, 2) if tall else x
