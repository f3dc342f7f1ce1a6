"""Moestro's experts inside transformers: the function that is registered as `experts_implementation="moestro"`.

It is given a decorated experts module of whatever class and chooses, at every call, from what the module is made of:

    fused        gather, both products, activation and combine in one operation: for plain gated and plain MLP experts
    fused rows   the same on sorted rows, then the module's own norm, then combine
    grouped      our grouped products with the module's own gate, biases and norm between them; transposed stacks are
                 read as they lie
    grouped_mm   transformers' grouped products: for parameters that are spread over devices, and under torch.compile
    eager        the forward that the class was written with: for everything else

On the CPU few choices are never sorted: without a gradient, and with one in the steps of `grouped`, whatever the path.
No path copies weights.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.integrations import moe

from ...core.errors import UserError
from ...core.plan import Plan
from ...core.rows import Rows
from ...ops.combine import combine, gather_rows
from ...ops.expert_mlp import FEW, gated_few, gated_mixture, gated_mlp, mlp, mlp_mixture
from ...ops.grouped import grouped_linear
from ...ops.precision import sum_dtype
from ...ops.rows import rows as derive_rows
from .few import few
from .grouped import grouped
from .recognise import Layout, activation_of, decorated, default_gate, layout_of, original_forward

__all__ = ["NAME", "Explanation", "explain", "forward", "register_experts"]

NAME = "moestro"

_COMPILED = "under torch.compile, transformers' grouped_mm"

Path = Literal["fused", "fused rows", "grouped", "grouped_mm", "eager"]


class Explanation(NamedTuple):
    """path: how a module is computed, as listed above. reason: why not by the one before it, and
    what happens under torch.compile."""

    path: Path
    reason: str


class _Choice(NamedTuple):
    path: Path
    reason: str
    layout: Layout
    activation: str  # ours, for the fused paths


def register_experts() -> None:
    """Make "moestro" known to transformers' ExpertsInterface. Registering twice changes nothing."""
    moe.ExpertsInterface.register(NAME, forward)


def explain(module: nn.Module) -> Explanation:
    """How Moestro computes an experts module of transformers, and why. Raises `UserError` for an undecorated one."""
    if not decorated(module):
        raise UserError(f"explain: {type(module).__name__} is no experts class that transformers lets others compute")
    path, reason = _choose(module)[:2]
    return Explanation(path, reason if path == "grouped_mm" else f"{reason}; {_COMPILED}")


def forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The weighted sum of every unit's experts, as `self` defines them.

    Shapes: hidden_states [T, D], top_k_index [T, K] integers, top_k_weights [T, K] -> [T, D] in the dtype of
    hidden_states. Ids from `self.num_experts` on (experts of other ranks) add nothing and their weights get gradients
    of zero.
    """
    if torch.compiler.is_compiling():  # our choice looks at objects that a tracer does not see as they are
        return moe.grouped_mm_experts_forward(self, hidden_states, top_k_index, top_k_weights)
    choice = _choose(self)
    layout = choice.layout
    if choice.path == "eager" or hidden_states.ndim != 2 or top_k_index.ndim != 2:
        return original_forward(self)(self, hidden_states, top_k_index, top_k_weights)
    first = getattr(self, layout.first)
    if choice.path == "grouped_mm":
        return moe.grouped_mm_experts_forward(self, hidden_states, top_k_index, top_k_weights)
    x = hidden_states
    if x.dtype != first.dtype and not torch.is_autocast_enabled(x.device.type):
        x = x.to(first.dtype)  # as transformers' grouped products do
    down: Tensor = self.down_proj
    biases = (None, None)
    if layout.has_bias:
        biases = getattr(self, f"{layout.first}_bias"), self.down_proj_bias
    weight, expert = top_k_weights.to(sum_dtype(x.dtype)), top_k_index.long()
    if _few(self, expert, x, weight, first, down):
        if choice.path == "fused" and layout.has_gate:
            y = gated_few(x, expert, weight, first, down, choice.activation)
        else:
            y = few(self, layout, x, expert, weight, first, down, *biases)
        return y.to(hidden_states.dtype)
    if x.device.type == "cpu" and (choice.path == "grouped" or expert.numel() <= FEW):
        return grouped(self, layout, x, expert, weight, first, down, *biases).to(hidden_states.dtype)
    index = _rows(self, expert, weight, x)
    if choice.path == "fused":
        y = _fused(choice, x, weight, index, first, down, *biases)
    elif choice.path == "fused rows":
        xs = gather_rows(x, index)
        if layout.has_gate:
            out = gated_mlp(xs, first, down, index.offsets, choice.activation)
        else:
            out = mlp(xs, first, down, index.offsets, choice.activation, *biases)
        y = combine(self.post_expert_norm(out), weight, index)
    else:  # off the CPU
        y = combine(_grouped(self, layout, gather_rows(x, index), index, first, down, *biases), weight, index)
    return y.to(hidden_states.dtype)


def _fused(
    choice: _Choice,
    x: Tensor,
    weight: Tensor,
    index: Rows,
    first: Tensor,
    down: Tensor,
    first_bias: Tensor | None,
    down_bias: Tensor | None,
) -> Tensor:
    if choice.layout.has_gate:
        return gated_mixture(x, weight, index, first, down, choice.activation)
    return mlp_mixture(x, weight, index, first, down, choice.activation, first_bias, down_bias)


def _grouped(
    module: Any,
    layout: Layout,
    rows: Tensor,
    index: Rows,
    first: Tensor,
    down: Tensor,
    first_bias: Tensor | None,
    down_bias: Tensor | None,
) -> Tensor:
    """[R, D] -> [R, D]: two grouped products with whatever the module puts between and after them."""
    turned = layout.is_transposed
    pre = grouped_linear(rows, first, index.offsets, first_bias, transposed=turned)
    h = module._apply_gate(pre) if layout.has_gate else module.act_fn(pre)
    out = grouped_linear(h, down, index.offsets, down_bias, transposed=turned)
    return module.post_expert_norm(out) if layout.has_post_expert_norm else out


def _rows(module: Any, expert: Tensor, weight: Tensor, x: Tensor) -> Rows:
    """Where looking at the choices is free, foreign ids are found; elsewhere the module says whether there are any."""
    complete = x.device.type != "cpu" and not module._is_expert_parallel
    plan = Plan(expert=expert, weight=weight, num_experts=module.num_experts, complete=complete)
    return derive_rows(plan)


def _few(module: nn.Module, expert: Tensor, *tensors: Tensor) -> bool:
    """Whether there are so few choices, and no gradient, that looking at each of them is the shortest way."""
    if expert.numel() > FEW or expert.device.type != "cpu":
        return False
    if not torch.is_grad_enabled():
        return True
    return not any(t.requires_grad for t in tensors) and not any(p.requires_grad for p in module.parameters())


def _choose(module: Any) -> _Choice:
    """The path for a module, by what it is made of. Looks at no values."""
    layout = layout_of(module)

    def take(path: Path, reason: str, activation: str = "") -> _Choice:
        return _Choice(path, reason, layout, activation)

    stop = _unreadable(module, layout)
    if stop is not None:
        return take(*stop)
    if layout.has_gate and not layout.is_concatenated and default_gate(module):
        return take("eager", "its gate and up columns alternate, which transformers' own gate does not know")
    if layout.has_gate and not default_gate(module):
        return take("grouped", "it has a gate of its own")
    if layout.is_transposed:
        return take("grouped", "its stacks are transposed: our operation would have to copy them")
    if layout.has_gate and layout.has_bias:
        return take("grouped", "its gated experts have biases")
    activation, why = activation_of(module.act_fn)
    if activation is None:
        return take("grouped", why)
    if not (getattr(module, layout.first).is_contiguous() and module.down_proj.is_contiguous()):
        return take("grouped", "its stacks are not contiguous: our operation would have to copy them")
    kind = "gated" if layout.has_gate else "plain"
    if layout.has_post_expert_norm:
        return take("fused rows", f"{kind} experts with {activation}, and a norm behind each", activation)
    return take("fused", f"{kind} experts with {activation}", activation)


def _unreadable(module: Any, layout: Layout) -> tuple[Path, str] | None:
    """Why the parameters are not for our operations, if they are not."""
    E = module.num_experts
    dtype = None
    for name in layout.parameters:
        p = getattr(module, name, None)
        if not isinstance(p, Tensor):
            return "eager", f"it has no {name}"
        if isinstance(p, DTensor):
            return "grouped_mm", f"{name} is spread over devices"
        if type(p) is not Tensor and type(p) is not nn.Parameter:
            return "eager", f"{name} is a {type(p).__name__}"
        if not p.is_floating_point() or p.element_size() < 2:
            return "eager", f"{name} holds {str(p.dtype).removeprefix('torch.')}"
        if p.shape[0] != E:
            return "eager", f"{name} holds {p.shape[0]} experts where num_experts is {E}"
        if dtype is not None and p.dtype != dtype:
            return "eager", f"{name} is of another dtype than {layout.first}"
        dtype = p.dtype
    return None
