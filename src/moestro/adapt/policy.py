"""What routers do while a model is fine-tuned: train, stay as they are, or move their biases only."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, get_args

from torch import nn

from ..core.errors import UserError, did_you_mean
from ..core.params import Role, describe
from .config import RouterPolicy

__all__ = ["PolicyReport", "apply_policy", "coefficients", "parameter_groups", "stepping"]


@dataclasses.dataclass(frozen=True)
class PolicyReport:
    """What a policy did. trains, frozen: full names of routers' parameters. lines: what to print."""

    policy: RouterPolicy
    trains: tuple[str, ...]
    frozen: tuple[str, ...]
    lines: tuple[str, ...]


def apply_policy(model: nn.Module, policy: RouterPolicy) -> PolicyReport:
    """Set which parameters with the role "router" train; all others stay as they are, those of `Frozen` scores too.

    train: all of them. freeze: none, and balancing biases that follow the load do not move either (`stepping`).
    bias_only: those added to the scores (named `bias`) and balancing biases. Raises `UserError` for an unknown policy,
    and for bias_only where no router has a bias of either kind.
    """
    if policy not in get_args(RouterPolicy):
        raise UserError(
            f"unknown router policy {policy!r}{did_you_mean(policy, get_args(RouterPolicy))}; "
            f"known: {', '.join(get_args(RouterPolicy))}"
        )
    names = [n for n, info in describe(model).items() if info.role == "router" and not _in_adapter(model, n)]
    fixed = _never_trained(model)
    names = [n for n in names if n not in fixed]
    parameters = dict(model.named_parameters())
    moving = _loads(model)
    trains = [n for n in names if policy == "train" or (policy == "bias_only" and n.rpartition(".")[2] == "bias")]
    if policy == "bias_only" and names and not trains and not moving:
        raise UserError(
            "router policy bias_only: no router has a bias; give them one (routers.Linear bias=True, or LossFree), or "
            "choose train or freeze"
        )
    for n in names:
        if n in parameters:
            parameters[n].requires_grad_(n in trains)
    for module in moving:
        module.still = policy == "freeze"
    lines = [f"routers: {policy}, {len(trains)} of {len(names)} tensors train"]
    if moving:
        does = "stand still" if policy == "freeze" else "follow the load"
        lines.append(f"routers: {len(moving)} balancing biases {does}")
    acting = coefficients(model)
    lines += [f"loss {name}: coefficient {c:g} in {n} layers" for (name, c), n in acting.items()]
    if policy != "train" and names and any(c for _, c in acting):
        lines.append("losses still act on what these routers read; set their coefficient to 0 where that is not wanted")
    return PolicyReport(policy, tuple(trains), tuple(n for n in names if n not in trains), tuple(lines))


def coefficients(model: nn.Module) -> dict[tuple[str, float], int]:
    """(loss, coefficient) -> number of layers that have it; of mixtures of adapters, the pooled loss's."""
    out: dict[tuple[str, float], int] = {}
    for module in model.modules():
        losses = getattr(module, "losses", ())
        if not isinstance(losses, tuple | list):
            continue
        for loss in losses:
            key = (str(loss.name), float(loss.coefficient or getattr(module, "pooled_coefficient", 0.0)))
            out[key] = out.get(key, 0) + 1
    return out


def stepping(model: nn.Module) -> bool:
    """Whether balancing biases are to follow the load after optimiser steps."""
    return not any(getattr(m, "still", False) for m in _loads(model))


def parameter_groups(model: nn.Module, options: Mapping[str, Mapping[str, Any]] | None = None) -> list[dict[str, Any]]:
    """Trainable parameters in groups by role, for any torch optimiser; `options` adds settings (lr, ...) by role.

    Matrices and what is not decayed are apart (weight_decay 0). Raises `UserError` for options of a role that no
    trainable parameter has.
    """
    options = options or {}
    made: dict[tuple[str, bool], list[Any]] = {}
    infos = describe(model)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            made.setdefault((infos[name].role, infos[name].decay), []).append(parameter)
    present = {role for role, _ in made}
    for role in options:
        if role not in get_args(Role):
            raise UserError(f"parameter_groups: unknown role {role!r}{did_you_mean(role, get_args(Role))}")
        if role not in present:
            raise UserError(f"parameter_groups: no trainable parameter has the role {role!r}")
    groups: list[dict[str, Any]] = []
    for (role, decay), parameters in sorted(made.items(), key=lambda item: (item[0][0], not item[0][1])):
        group = {"params": parameters, "role": role, **options.get(role, {})}
        groups.append(group if decay else group | {"weight_decay": 0.0})
    return groups


def _loads(model: nn.Module) -> list[Any]:
    """Parts of the model's routers, not of those that adapters brought, whose state follows the load."""
    from ..routers.loss_free import LossFreeSelect

    return [m for n, m in model.named_modules() if isinstance(m, LossFreeSelect) and not _in_adapter(model, n)]


def _never_trained(model: nn.Module) -> set[str]:
    """Full names of parameters whose score step says that they take no gradient, whatever the policy."""
    from ..routers.score import FrozenScore

    steps = {path: m for path, m in model.named_modules() if isinstance(m, FrozenScore)}
    return {f"{path}.{n}" if path else n for path, m in steps.items() for n, _ in m.named_parameters()}


def _in_adapter(model: nn.Module, name: str) -> bool:
    """Whether a parameter belongs to a router that an adapter brought."""
    from .linear import Delta

    parts = name.split(".")
    return any(isinstance(model.get_submodule(".".join(parts[:i])), Delta) for i in range(1, len(parts)))
