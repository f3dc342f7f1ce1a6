"""LoRA on one linear map."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...core.errors import UserError
from ...core.signals import Signals
from ..config import LoRA
from ..draws import Place, drop, unit_ids
from ..linear import AdaptedFeedForward, AdaptedLinear, Delta
from .factors import add_product, draw, low_rank, new_pair

__all__ = ["LoRADelta", "LoRAFeedForward", "LoRALinear"]


class LoRADelta(Delta):
    """alpha / r * B A dropout(x). Shapes: a [r, I], b [O, r], x [..., I] -> [..., O]. Source: Hu et al. 2021."""

    def __init__(self, config: LoRA, inputs: int, outputs: int, like: Tensor, path: str = "") -> None:
        super().__init__()
        self.config, self.scale = config, config.alpha / config.rank
        self.place = Place(config.seed, path)
        self.a, self.b = new_pair(outputs, inputs, config.rank, like, None)
        draw(self.a, config.seed, f"{path}.a")
        self.merged = False
        self.register_state_dict_pre_hook(_refuse_merged)

    def forward(self, x: Tensor, signals: Signals | None = None) -> Tensor:
        if self.config.dropout and self.training:
            rows = x.reshape(-1, x.shape[-1])
            ids = unit_ids(signals, rows.shape[0], x.device)
            x = drop(rows, self.config.dropout, self.place, signals, "x", ids).view(x.shape)
        return self.scale * low_rank(x, self.a, self.b)

    def add(self, weight: Tensor, sign: float = 1.0) -> None:
        """weight [O, I] += sign * the update, in place."""
        add_product(weight, self.a, self.b, sign * self.scale)

    def extra_flops(self, seq_len: int) -> int:
        return 2 * (self.a.numel() + self.b.numel())


class _Merging(nn.Module):
    """Adding updates into weights and taking them out again, exactly where a copy was kept."""

    _kept: dict[str, Tensor] | None = None
    _merged = False

    def updates(self) -> list[tuple[LoRADelta, Tensor]]:
        """Every delta with the matrix it belongs to."""
        raise NotImplementedError

    @property
    def merged(self) -> bool:
        """Whether the updates have been added into the weights."""
        return self._merged

    @torch.no_grad()
    def merge(self, keep: bool = True) -> None:
        """Add the updates into the weights. keep: hold a copy of the weights, so that `unmerge` is exact to the bit."""
        if self._merged:
            return
        own: dict[str, Any] = {n: p for n, p in self._parameters.items() if p is not None}
        self._kept = {n: p.detach().clone() for n, p in own.items()} if keep else None
        self._all(1.0)
        self._mark(True)

    @torch.no_grad()
    def unmerge(self) -> None:
        """The weights as they were before `merge`."""
        if not self._merged:
            return
        if self._kept is None:
            self._all(-1.0)
        else:
            for name, value in self._kept.items():
                getattr(self, name).copy_(value)
        self._kept = None
        self._mark(False)

    def _all(self, sign: float) -> None:
        for delta, weight in self.updates():
            delta.add(weight.detach(), sign)

    def _mark(self, merged: bool) -> None:
        self._merged = merged
        for delta, _ in self.updates():
            delta.merged = merged

    def _refuse_training(self) -> None:
        if self.training and torch.is_grad_enabled():
            raise UserError("merged adapters do not train: call adapt.attach.unmerge(model) first, or model.eval()")


class LoRALinear(_Merging, AdaptedLinear):
    """y = W x + bias + alpha / r * B A dropout(x), W frozen. Shapes: x [..., I] -> y [..., O]."""

    delta: LoRADelta

    def __init__(self, base: nn.Linear, config: LoRA, path: str = "") -> None:
        AdaptedLinear.__init__(self, base, LoRADelta(config, base.in_features, base.out_features, base.weight, path))

    def forward(self, x: Tensor, signals: Signals | None = None) -> Tensor:
        if self._merged:
            self._refuse_training()
            return self.base(x)
        return super().forward(x, signals)

    def updates(self) -> list[tuple[LoRADelta, Tensor]]:
        return [(self.delta, self.weight)]  # type: ignore[list-item]


class LoRAFeedForward(_Merging, AdaptedFeedForward):
    """The dense gated MLP with LoRA on its parts."""

    def __init__(self, base: Any, config: LoRA, parts: tuple[str, ...], path: str = "") -> None:
        F_, D = base.config.width, base.gate_up.shape[1]
        sizes = {"gate": (D, F_), "up": (D, F_), "down": (F_, D)}
        deltas: dict[str, Delta] = {p: LoRADelta(config, *sizes[p], base.down, f"{path}.{p}") for p in parts}
        AdaptedFeedForward.__init__(self, base, deltas)

    def forward(self, x: Tensor, signals: Signals | None = None, carry: Any = None) -> Any:
        if self._merged:
            self._refuse_training()
            return self.base(x, signals, carry)
        return super().forward(x, signals, carry)

    def updates(self) -> list[tuple[LoRADelta, Tensor]]:
        return [(d, self.part(n)) for n, d in self.deltas.items() if isinstance(d, LoRADelta)]


def _refuse_merged(module: Any, prefix: str, keep_vars: bool) -> None:
    if module.merged:
        raise UserError(
            f"{prefix.rstrip('.')}: adapters are merged into the weights, and saving both would add them twice; "
            "unmerge first, or unload the adapters"
        )
