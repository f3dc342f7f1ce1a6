"""A bank whose matrices are packed: bf16, or blocks of int8 or int4."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..core.errors import UserError, did_you_mean
from ..core.params import ParamInfo
from ..core.plan import AnyPlan, Plan
from ..core.rows import Rows
from ..ops.combine import through
from ..ops.packed import FEW, KINDS, Kind, Packed, pack, packed_few, packed_rows
from ..ops.packed.buffers import apply_keeping, check_kinds
from ..ops.pages import large_pages
from .bank import Bank, scaled
from .gated import GatedBank
from .mlp import MLPBank
from .tied import Tied

__all__ = ["PackedBank", "packable"]

Mode = Literal["frozen", "live"]
_MATRICES = {GatedBank: ("gate_up", "down"), MLPBank: ("up", "down")}


def packable(bank: nn.Module) -> tuple[bool, str]:
    """Whether a bank can be packed, and why not."""
    if type(bank) not in _MATRICES:
        return False, f"{type(bank).__name__} is no stacked bank of MLP experts"
    if getattr(bank, "widths", None) is not None:
        return False, "its experts have unequal widths"
    return True, ""


class PackedBank(Bank):
    """The experts of a `GatedBank` or an `MLPBank` with matrices in fewer bits. It has no gradient.

    mode "frozen": only the packed matrices are kept, as the buffers `<name>_data` and `<name>_scale`; they move with
    the module, keep their format whatever dtype the module is cast to, and are saved and loaded with `state_dict`.
    Biases are buffers too, in the source's dtype.

    mode "live": the bank has the source's own parameters, under their names, and packed copies of them that are made
    again at the first call after a change (`tied.Tied` says which changes are seen; `repack` makes sure). It saves and
    loads as its source does, and takes more memory, not less.

    Few choices without a gradient read the packed matrices as they are; more unpack one expert at a time.
    Shapes: rows [R, D] -> [R, D]. Raises `UserError` for banks that are no such stacks or have experts of unequal
    widths, for substituted `weights`, and where a gradient is asked for.
    """

    def __init__(self, source: nn.Module, kind: Kind, mode: Mode = "frozen") -> None:
        if kind not in KINDS:
            raise UserError(f"unknown kind {kind!r}{did_you_mean(kind, KINDS)}; known: {', '.join(KINDS)}")
        if mode not in ("frozen", "live"):
            raise UserError(f"PackedBank: mode is 'frozen' or 'live', not {mode!r}")
        fits, why = packable(source)
        if not fits:
            raise UserError(f"PackedBank: {why}; it cannot be packed")
        assert isinstance(source, GatedBank | MLPBank)
        super().__init__(source.dim, source.num_experts)
        self.config, self.mode = source.config, mode
        self.kind: Kind = kind
        self.role, self.met = source.role, source.met
        self.gated = isinstance(source, GatedBank)
        self.biased = isinstance(source, MLPBank) and source.up_bias is not None
        self.matrices = _MATRICES[type(source)]
        self.inputs = {name: getattr(source, name).shape[-1] for name in self.matrices}
        self._cost = source.per_row()
        self._info = source.param_info()
        self._tied = {name: Tied(kind) for name in self.matrices} if mode == "live" else {}
        self._made: dict[str, Packed] = {}
        self.train(source.training)
        if mode == "live":
            self._parameters = source._parameters  # shared: a parameter put in the place of another is seen
            return
        for name, value in source._parameters.items():
            if name in self.matrices:
                packed = pack(getattr(source, name), kind)
                self.register_buffer(f"{name}_data", large_pages(packed.data))
                if packed.scale is not None:
                    self.register_buffer(f"{name}_scale", packed.scale)
            else:
                self.register_buffer(name, None if value is None else value.detach().clone())

    def forward(
        self, rows: Tensor, index: Rows, context: Any = None, weights: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        first, down = self._packed(weights)
        deterministic = self.config.deterministic
        biases = self._bias("up_bias"), self._bias("down_bias")
        made = packed_rows(rows, index.offsets, first, down, self.config.activation, self.gated, *biases, deterministic)
        return scaled(made, index)

    def mixture(
        self, units: Tensor, plan: AnyPlan, context: Any = None, weights: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """y [T, D] of units [T, D] under a plan; few choices read the packed matrices as they are."""
        if not isinstance(plan, Plan) or not self._few(plan):
            return through(self, units, plan, context, None if weights is None else dict(weights))
        first, down = self._packed(weights)
        real = plan.kept is None and plan.valid is None
        expert = plan.expert if real else torch.where(plan.routed(), plan.expert, -1)
        return packed_few(units, expert, plan.weight, first, down, self.config.activation, self.gated)

    def repack(self) -> None:
        """Make the packed copies of a live bank again at the next call, whatever was seen of a change."""
        for tied in self._tied.values():
            tied.forget()

    @property
    def nbytes(self) -> int:
        """Bytes of the packed matrices and of the biases; of a live bank, of its copies as they would be frozen."""
        biases = (self._bias(name) for name in ("up_bias", "down_bias"))
        return sum(p.nbytes for p in self._both()) + sum(b.nbytes for b in biases if b is not None)

    def per_row(self) -> tuple[int, int]:
        return self._cost

    def param_info(self) -> dict[str, ParamInfo]:
        return self._info if self.mode == "live" else {}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, kind={self.kind}, mode={self.mode}"

    def _few(self, plan: Plan) -> bool:
        if self.config.deterministic or plan.expert.numel() > FEW or self.biased:
            return False
        return not (torch.is_grad_enabled() and plan.weight.requires_grad)

    def _packed(self, weights: Mapping[str, Tensor] | None) -> tuple[Packed, Packed]:
        if weights is not None:
            raise UserError("a packed bank takes no other weights in place of its own; use the fp32 bank")
        if torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters()):
            raise UserError("packed experts have no gradient; run them under torch.no_grad, or train the fp32 bank")
        return self._both()

    def _both(self) -> tuple[Packed, Packed]:
        """The first and the second matrices, as they are now."""
        first, down = (self._one(name) for name in self.matrices)
        return first, down

    def _one(self, name: str) -> Packed:
        if self.mode == "live":
            return self._tied[name](getattr(self, name))
        buffers = self._buffers  # as attributes, for less of the time of a small layer
        data, made = buffers[f"{name}_data"], self._made.get(name)
        if made is None or made.data is not data or made.scale is not buffers.get(f"{name}_scale"):
            assert data is not None
            made = self._made[name] = Packed(self.kind, data, buffers.get(f"{name}_scale"), self.inputs[name])
        return made

    def _bias(self, name: str) -> Tensor | None:
        return getattr(self, name) if self.biased else None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedBank:
        self._made.clear()
        apply_keeping(self, lambda: super(PackedBank, self)._apply(fn, recurse))
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        check_kinds(self, state_dict, prefix, rest[-1])
        super()._load_from_state_dict(state_dict, prefix, *rest)
