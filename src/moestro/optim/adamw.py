"""AdamW over groups by role, with a state that is nothing but named tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from ..core.errors import UserError
from ..core.params import ParamInfo, describe
from .config import AdamW

__all__ = ["AdamWOptimizer", "Group"]


@dataclasses.dataclass(frozen=True)
class Group:
    """Parameters that share a learning rate and a decay. lr: factor on the learning rate. decay: weight decay."""

    lr: float
    decay: float
    names: tuple[str, ...]


class AdamWOptimizer:
    """torch's fused AdamW on the trainable parameters of a model, grouped by `core.params.describe`.

    Of a gradient that is sparse over the expert axis, touched experts take a step and all others stay as they are,
    weights, moments and step count; see optim/touched.py for what that means.
    """

    def __init__(self, config: AdamW, model: nn.Module, names: Collection[str] | None = None) -> None:
        """names: the parameters to step; None = all that are trainable."""
        self.config = config
        chosen = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.parameters = {n: p for n, p in chosen.items() if names is None or n in names}
        if not self.parameters:
            raise UserError("the model has no trainable parameter")
        self.groups = group(config, model, self.parameters)
        self._inner = torch.optim.AdamW(
            [{"params": [self.parameters[n] for n in g.names], "weight_decay": g.decay} for g in self.groups],
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            fused=all(p.is_floating_point() for p in self.parameters.values()),
        )

    def clear(self) -> None:
        """Forget the gradients."""
        self._inner.zero_grad(set_to_none=True)

    def step(self, factor: float) -> None:
        """One update at `factor` of the peak learning rate."""
        for g, inner in zip(self.groups, self._inner.param_groups, strict=True):
            inner["lr"] = self.config.lr * g.lr * factor
        sparse = [p for p in self.parameters.values() if p.grad is not None and p.grad.is_sparse]
        grads = [p.grad.coalesce() for p in sparse]  # type: ignore[union-attr]
        for p in sparse:
            p.grad = None
        self._inner.step()
        for p, grad in zip(sparse, grads):
            p.grad = grad
            self._touched(p, grad)

    def _touched(self, parameter: Tensor, grad: Tensor) -> None:
        """One update of the experts that a sparse gradient holds."""
        state = self._inner.state[parameter]
        if not state:
            state["step"] = torch.zeros(parameter.shape[0], device=parameter.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        if state["step"].ndim == 0:
            raise UserError("the optimiser's state is one of full gradients, but this bank has sparse_grad=True")
        touched = grad.indices()[0].tolist()
        tensors = (parameter.detach(), state["exp_avg"], state["exp_avg_sq"], state["step"])
        weights, first, second, steps = ([t[e] for e in touched] for t in tensors)
        inner = next(g for g in self._inner.param_groups if any(p is parameter for p in g["params"]))
        adamw(
            weights,
            list(grad.values().unbind(0)),
            first,
            second,
            [],
            steps,
            fused=True,
            amsgrad=False,
            maximize=False,
            beta1=self.config.beta1,
            beta2=self.config.beta2,
            lr=inner["lr"],
            weight_decay=inner["weight_decay"],
            eps=self.config.eps,
        )

    def to_tensors(self) -> dict[str, Tensor]:
        """The state as `parameter name/what` -> tensor; parameters that never had a gradient have none."""
        return {
            f"{name}/{what}": value
            for name, parameter in self.parameters.items()
            for what, value in self._inner.state.get(parameter, {}).items()
        }

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over a state written by `to_tensors`. Raises `UserError` where names or shapes do not fit."""
        state: dict[str, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            name, _, what = key.rpartition("/")
            if name not in self.parameters or what not in ("step", "exp_avg", "exp_avg_sq"):
                raise UserError(f"the optimiser's state has a tensor {key!r} that fits no parameter of this model")
            if what != "step" and value.shape != self.parameters[name].shape:
                raise UserError(
                    f"the optimiser's state {key!r} has shape {list(value.shape)}, "
                    f"its parameter {list(self.parameters[name].shape)}"
                )
            state.setdefault(name, {})[what] = value
        self._inner.state.clear()
        for name, values in state.items():
            if len(values) != 3:
                raise UserError(f"the optimiser's state of {name!r} is incomplete: it has only {sorted(values)}")
            device = self.parameters[name].device
            self._inner.state[self.parameters[name]] = {w: v.clone().to(device) for w, v in values.items()}


def group(config: AdamW, model: nn.Module, names: Collection[str] | None = None) -> list[Group]:
    """The groups of a model's trainable parameters (or of those in `names`), in a fixed order."""
    made: dict[tuple[float, float], list[str]] = {}
    infos = describe(model)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and (names is None or name in names):
            info = infos[name]
            made.setdefault((_factor(config, info), config.weight_decay if info.decay else 0.0), []).append(name)
    return [Group(lr, decay, tuple(names)) for (lr, decay), names in sorted(made.items())]


def _factor(config: AdamW, info: ParamInfo) -> float:
    return {
        "expert": config.lr_expert,
        "shared_expert": config.lr_expert,
        "router": config.lr_router,
        "embedding": config.lr_embedding,
        "head": config.lr_head,
    }.get(info.role, 1.0)
