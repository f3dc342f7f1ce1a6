"""The bank of arbitrary modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map_only

from ..core import account
from ..core.errors import UserError, did_you_mean
from ..core.rows import Rows
from .bank import Bank, scaled
from .config import Modules
from .touch import touch

__all__ = ["ModuleBank"]

Modular = Modules | Sequence[nn.Module] | Callable[[int], nn.Module]


class ModuleBank(Bank):
    """One module per expert, each run on its own rows: MLPs, convolutions, heads, whole blocks, of any kinds mixed.

    Built from a config, from a list of modules, or from a function `e -> module`. A module takes its rows, and the
    context as a second argument where the caller gave one. Experts without rows are not run (no statistics of a
    normalisation move); their parameters still receive gradients of zeros.

    Shapes: rows [R, *unit] -> [R, *unit'], the same unit' for all experts. Parameters are called `<e>.<name>`, and so
    are the keys of `weights`. `index.weight`, where given, multiplies the rows that come out.
    Raises `UserError` for a list whose length is not the number of experts.
    """

    def __init__(self, modules: Modular, dim: int = 0, num_experts: int | None = None) -> None:
        made = _make(modules, dim, num_experts)
        super().__init__(dim, len(made))
        for e, module in enumerate(made):
            self.add_module(str(e), module)

    def forward(
        self, rows: Tensor, index: Rows, context: Any = None, weights: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        substitutes = self._substitutes(weights)
        outs: list[Tensor] = []
        idle: list[Tensor] = []
        sizes = index.offsets.diff().tolist()
        for e, (module, part) in enumerate(zip(self.members(), rows.split(sizes), strict=True)):
            if sizes[e]:
                outs.append(_call(module, part, context, substitutes[e]))
            else:
                idle += [substitutes[e].get(n, p) for n, p in module.named_parameters()]
        out = torch.cat(outs) if outs else self._nothing(rows, context)
        return touch(scaled(out, index), idle)

    def members(self) -> list[nn.Module]:
        """The experts' modules, in order; the same one may stand for several experts."""
        return [m for m in self._modules.values() if m is not None]

    def _substitutes(self, weights: Mapping[str, Tensor] | None) -> list[dict[str, Tensor]]:
        """Per expert, the entries of `weights` under their names inside the module."""
        found: list[dict[str, Tensor]] = [{} for _ in range(self.num_experts)]
        if weights:
            known = dict(self.named_parameters(remove_duplicate=False)) | dict(self.named_buffers())
            for name, value in weights.items():
                if name not in known:
                    raise UserError(f"weights: the bank has no parameter {name!r}{did_you_mean(name, known)}")
                e, _, inner = name.partition(".")
                found[int(e)][inner] = value
        return found

    def _nothing(self, rows: Tensor, context: Any) -> Tensor:
        """[0, *unit'] in the right shape and dtype, found by running the first module on the meta device."""
        module = self.members()[0]
        tensors = [*module.named_parameters(), *module.named_buffers()]
        empty = {n: torch.empty_like(t, device="meta") for n, t in tensors}
        context = tree_map_only(Tensor, lambda t: t.to("meta"), context)
        with torch.no_grad():
            one = _call(module, rows.new_empty(2, *rows.shape[1:], device="meta"), context, empty)
        # Part of the graph through `rows`, whose gradient is then zeros and not missing.
        return torch.empty_like(one[:0], device=rows.device) + rows.sum().to(one.dtype)

    def per_row(self) -> tuple[int, int]:
        costs = [account.cost(m) for m in self.members()]
        return sum(p.numel() for p in self.parameters()), sum(c.flops for c in costs)


def _make(modules: Modular, dim: int, num_experts: int | None) -> list[nn.Module]:
    if isinstance(modules, Modules):
        if num_experts is None:
            raise UserError("ModuleBank: num_experts is needed to build a bank from a config")
        configs = modules.experts * num_experts if len(modules.experts) == 1 else modules.experts
        if len(configs) != num_experts:
            raise UserError(
                f"Modules.experts: {len(configs)} configs for {num_experts} experts; give one each, or one for all"
            )
        return [c.build(dim=dim) for c in configs]
    if isinstance(modules, Sequence | nn.ModuleList):
        made = list(modules)
        if not made or num_experts not in (None, len(made)):
            raise UserError(f"ModuleBank: {len(made)} modules for {num_experts or 'no'} experts")
        return made
    if num_experts is None:
        raise UserError("ModuleBank: num_experts is needed to build a bank from a function")
    return [modules(e) for e in range(num_experts)]


def _call(module: nn.Module, rows: Tensor, context: Any, substitutes: dict[str, Tensor]) -> Tensor:
    args = (rows,) if context is None else (rows, context)
    return functional_call(module, substitutes, args) if substitutes else module(*args)
