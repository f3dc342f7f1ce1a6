"""A bank of frozen experts with low-rank updates, computed on the routed rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.account import Cost
from ...core.errors import UserError
from ...core.params import ParamInfo
from ...core.plan import AnyPlan
from ...core.rows import Rows
from ...core.signals import Signals
from ...experts.bank import Bank, scaled
from ...experts.gated import GatedBank
from ...experts.mlp import MLPBank
from ...ops.grouped import grouped_linear
from ..config import LoRA
from ..draws import Place, drop, unit_ids
from .factors import add_product, draw, low_rank, new_pair

__all__ = ["LoRABank", "adaptable", "parts_of"]

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "leaky_relu": F.leaky_relu,
}
_PARTS = {GatedBank: ("gate", "up", "down"), MLPBank: ("up", "down")}


def parts_of(bank: nn.Module) -> tuple[str, ...]:
    """Logical names of the matrices of a bank."""
    return _PARTS.get(type(bank), ())  # type: ignore[call-overload]


def adaptable(bank: nn.Module) -> tuple[bool, str]:
    """Whether a bank can be adapted, and why not."""
    if isinstance(bank, LoRABank):
        return False, "it has adapters already; unload them first"
    if type(bank) not in _PARTS:
        return False, f"{type(bank).__name__} is no stacked bank of MLP experts"
    if getattr(bank, "widths", None) is not None:
        return False, "its experts have unequal widths"
    config: Any = bank.config
    if config.deterministic:
        return False, "it promises deterministic=True, and the low-rank path does not"
    if config.activation not in _ACTIVATIONS:
        return False, f"its activation {config.activation!r} is not known here"
    return True, ""


class LoRABank(Bank):
    """The experts of a `GatedBank` or `MLPBank`, frozen, each matrix W_e as W_e + alpha / r * B_e A_e.

    The updates of gate and up enter before the activation, on the routed rows: [R, r] is the largest thing that a
    low-rank path holds besides its rows, and no tensor of the size of all experts' updates is ever made.

    Parameters keep the source's names (`gate_up`, `down`, ...); factors are called `<part>_a` and `<part>_b` with the
    parts gate, up, down, or gate_up where gate and up have one A (`joined`). Shapes: A [E, r, I], B [E, O, r], without
    the expert axis where shared. rows [R, D] -> [R, D].

    `context`, where it is `Signals`, gives dropout its seed and unit ids. Raises `UserError` for banks that cannot be
    adapted, for parts they do not have, and for training while merged. Source: Hu et al. 2021 (LoRA).
    """

    takes_signals = True

    def __init__(self, source: Bank, config: LoRA, parts: tuple[str, ...] | None = None, path: str = "") -> None:
        fits, why = adaptable(source)
        if not fits:
            raise UserError(f"LoRA on {path or 'a bank'}: {why}")
        every = parts_of(source)
        parts = every if parts is None else tuple(p for p in every if p in parts)
        super().__init__(source.dim, source.num_experts)
        self.config, self.lora, self.parts = source.config, config, parts
        self.role, self.met = source.role, source.met
        self.place = Place(config.seed, path)
        self.scale = config.alpha / config.rank
        self.gated = isinstance(source, GatedBank)
        self._parameters.update(source._parameters)
        self.requires_grad_(False)
        self._frozen = tuple(n for n, p in source._parameters.items() if p is not None)
        self._info: dict[str, ParamInfo] = source.param_info()  # type: ignore[operator]
        source._parameters = self._parameters  # the source computes with whatever parameters this module has
        self._source = [source]  # a list hides it from the module tree
        self._kept: dict[str, Tensor] | None = None
        self._merged = False
        self.pairs = _pairs(parts, config.joined)
        for name in self.pairs:
            outputs, inputs = self._sizes(name)
            E = self.num_experts
            a, b = new_pair(outputs, inputs, config.rank, self._weight(name), E, config.shared)
            self.register_parameter(f"{name}_a", a)
            self.register_parameter(f"{name}_b", b)
            draw(a, config.seed, f"{path}.{name}_a")
        self.train(source.training)
        self.register_state_dict_pre_hook(_refuse_merged)

    # What the matrices are -------------------------------------------------------------------------------------------

    def _sizes(self, name: str) -> tuple[int, int]:
        """(outputs, inputs) of a part."""
        weight = self._weight(name)
        return weight.shape[1], weight.shape[2]

    def _weight(self, name: str) -> Tensor:
        """The stack [E, O, I] that a part is, as a view."""
        if not self.gated or name in ("down", "gate_up"):
            return getattr(self, name)
        F_ = self.gate_up.shape[1] // 2  # type: ignore[union-attr, index]
        return self.gate_up[:, :F_] if name == "gate" else self.gate_up[:, F_:]  # type: ignore[index, return-value]

    @property
    def source(self) -> Bank:
        """The bank without adapters; it shares the parameters, so it is what merging has made of it."""
        return self._source[0]

    @property
    def merged(self) -> bool:
        """Whether the updates have been added into the weights."""
        return self._merged

    # Calls -----------------------------------------------------------------------------------------------------------

    def forward(
        self, rows: Tensor, index: Rows, context: Any = None, weights: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        if self._merged:
            self._refuse_training()
            return self.source(rows, index, context, weights)
        p, offsets = self.values(weights), index.offsets
        signals = context if isinstance(context, Signals) else None
        x, act = self._dropped(rows, index, signals, "in"), _ACTIVATIONS[self.config.activation]
        if self.gated:
            both = grouped_linear(rows, p["gate_up"], offsets)
            if "gate_up" in self.pairs:
                both = both + self._delta(x, p, "gate_up", offsets)
            gate, up = both.chunk(2, dim=-1)
            if "gate" in self.pairs:
                gate = gate + self._delta(x, p, "gate", offsets)
            if "up" in self.pairs:
                up = up + self._delta(x, p, "up", offsets)
            inner, bias = act(gate) * up, None
        else:
            up = grouped_linear(rows, p["up"], offsets, p.get("up_bias"))
            if "up" in self.pairs:
                up = up + self._delta(x, p, "up", offsets)
            inner, bias = act(up), p.get("down_bias")
        out = grouped_linear(inner, p["down"], offsets, bias)
        if "down" in self.pairs:
            out = out + self._delta(self._dropped(inner, index, signals, "inner"), p, "down", offsets)
        return scaled(out, index)

    def mixture(
        self, units: Tensor, plan: AnyPlan, context: Any = None, weights: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """y [T, D] of units [T, D] under a plan: through rows; once merged, by the source's fused operation."""
        if self._merged:
            self._refuse_training()
            return self.source.mixture(units, plan, context, weights)
        return super().mixture(units, plan, context, weights)

    def _delta(self, rows: Tensor, p: Mapping[str, Any], name: str, offsets: Tensor) -> Tensor:
        return self.scale * low_rank(rows, p[f"{name}_a"], p[f"{name}_b"], offsets)

    def _dropped(self, rows: Tensor, index: Rows, signals: Signals | None, name: str) -> Tensor:
        if not (self.training and self.lora.dropout):
            return rows
        ids = unit_ids(signals, index.num_units, rows.device).index_select(0, index.unit.clamp_min(0))
        expert = index.expert + self.num_experts  # another mask for each expert that a unit meets
        return drop(rows, self.lora.dropout, self.place, signals, name, ids * (2 * self.num_experts) + expert)

    def _refuse_training(self) -> None:
        if self.training and torch.is_grad_enabled():
            raise UserError("merged adapters do not train: call adapt.attach.unmerge(model) first, or model.eval()")

    # Merging ---------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def merge(self, keep: bool = True) -> None:
        """Add the updates into the weights. keep: hold a copy of the weights, so that `unmerge` is exact to the bit;
        without it the updates are subtracted again, which rounds."""
        if self._merged:
            return
        names = {self._parameter_of(name) for name in self.pairs}
        self._kept = {n: getattr(self, n).detach().clone() for n in sorted(names)} if keep else None
        self._add(self.scale)
        self._merged = True

    @torch.no_grad()
    def unmerge(self) -> None:
        """The weights as they were before `merge`."""
        if not self._merged:
            return
        if self._kept is None:
            self._add(-self.scale)
        else:
            for name, value in self._kept.items():
                getattr(self, name).copy_(value)
        self._kept, self._merged = None, False

    def _add(self, scale: float) -> None:
        for name in self.pairs:
            add_product(self._weight(name).detach(), getattr(self, f"{name}_a"), getattr(self, f"{name}_b"), scale)

    def _parameter_of(self, name: str) -> str:
        return "gate_up" if self.gated and name in ("gate", "up") else name

    def unload(self) -> Bank:
        """The source bank with the weights as they are now, apart from this module."""
        source = self.source
        source._parameters = {n: p for n, p in self._parameters.items() if n in source_names(source, self)}
        return source

    # Descriptions ----------------------------------------------------------------------------------------------------

    def cost(self, seq_len: int = 1) -> Cost:
        """As the source's, and the factors': shared ones are met by every unit; frozen weights have no gradient."""
        p: dict[str, Any] = {n: t for n, t in self._parameters.items() if t is not None}
        share = self.met / self.num_experts
        base = [t for n, t in p.items() if n in self._frozen]
        flops = round(share * sum(2 * t.numel() for t in base if t.ndim > 2))
        total = Cost(sum(t.numel() for t in base), round(share * sum(t.numel() for t in base)), flops, -flops)
        for n, t in p.items():
            if n not in self._frozen:
                met = t.numel() * (share if t.ndim == 3 else self.met)
                total += Cost(t.numel(), round(t.numel() * share) if t.ndim == 3 else t.numel(), round(2 * met))
        return total

    def param_info(self) -> dict[str, ParamInfo]:
        info = dict(self._info)
        for n, t in self._parameters.items():
            if n not in self._frozen and t is not None:
                axes = (1, 2) if t.ndim == 3 else (0, 1)
                zeros = 0.0 if n.endswith("_b") else None
                axis = 0 if t.ndim == 3 else None
                info[n] = ParamInfo(role=self.role, expert_axis=axis, matrix_axes=axes, init_std=zeros)
        return info

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, parts={','.join(self.pairs)}, rank={self.lora.rank}, shared={self.lora.shared}"


def source_names(source: Bank, bank: LoRABank) -> tuple[str, ...]:
    """Names of all parameters that the source was built with, those that are None too."""
    return (*bank._frozen, *(n for n, p in bank._parameters.items() if p is None))


def _pairs(parts: tuple[str, ...], joined: bool) -> tuple[str, ...]:
    if joined and "gate" in parts and "up" in parts:
        return ("gate_up", *(p for p in parts if p not in ("gate", "up")))
    return parts


def _refuse_merged(module: Any, prefix: str, keep_vars: bool) -> None:
    if module._merged:
        raise UserError(
            f"{prefix.rstrip('.') or 'the bank'}: adapters are merged into the weights, and saving both would add them "
            "twice; unmerge first, or unload the adapters"
        )
