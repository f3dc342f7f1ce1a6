"""Dense feed-forward layers as values: found in any module tree by their structure, sliced, stacked into banks."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.errors import UserError
from ...experts.config import MLP, Activation, Experts, Gated
from ...moe.routed import Routed
from ...nn.feedforward import FeedForward, PlainFeedForward

__all__ = ["DenseMLP", "Place", "bank_of", "find", "read_mlp"]

ACTIVATIONS: dict[Activation, Any] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "leaky_relu": F.leaky_relu,
}
PROBE = 8  # rows on which a candidate is compared with the module it was read from


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenseMLP:
    """down(act(up x + up_bias)) + down_bias, or with a gate: down(act(gate x) * up x).

    Shapes: gate, up [F, D]; down [D, F]; up_bias [F]; down_bias [D].
    """

    up: Tensor
    down: Tensor
    activation: Activation
    gate: Tensor | None = None
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None

    @property
    def dim(self) -> int:
        return self.up.shape[1]

    @property
    def width(self) -> int:
        return self.up.shape[0]

    @property
    def reads(self) -> Tensor:
        """The matrix that decides when a neuron is active, [F, D]."""
        return self.up if self.gate is None else self.gate

    def tensors(self) -> dict[str, Tensor]:
        """Those that are there, by field name."""
        names = ("gate", "up", "down", "up_bias", "down_bias")
        return {n: t for n in names if (t := getattr(self, n)) is not None}

    def changed(self, **tensors: Tensor) -> DenseMLP:
        return dataclasses.replace(self, **tensors)

    def clone(self) -> DenseMLP:
        """The same values in tensors of its own, without a graph."""
        return self.changed(**{n: t.detach().clone() for n, t in self.tensors().items()})

    def hidden(self, x: Tensor) -> Tensor:
        """Activations of the neurons: x [T, D] -> [T, F]."""
        act, up = ACTIVATIONS[self.activation], F.linear(x, self.up, self.up_bias)
        return act(up) if self.gate is None else act(F.linear(x, self.gate)) * up

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(self.hidden(x), self.down, self.down_bias)

    def neurons(self, ids: Tensor, bias_share: float = 1.0) -> DenseMLP:
        """The layer of these neurons only, with that share of the output's bias."""
        parts: dict[str, Tensor] = {"up": self.up[ids], "down": self.down[:, ids]}
        if self.gate is not None:
            parts["gate"] = self.gate[ids]
        if self.up_bias is not None:
            parts["up_bias"] = self.up_bias[ids]
        if self.down_bias is not None:
            parts["down_bias"] = self.down_bias * bias_share
        return self.changed(**parts)

    def scaled(self, factor: float, bias_factor: float | None = None) -> DenseMLP:
        """The layer with its output times `factor` (its bias times `bias_factor`, if that is another)."""
        parts = {"down": self.down * factor}
        if self.down_bias is not None:
            parts["down_bias"] = self.down_bias * (factor if bias_factor is None else bias_factor)
        return self.changed(**parts)

    def beside(self, other: DenseMLP) -> DenseMLP:
        """The layer whose output is the sum of both: neurons side by side, biases added."""
        parts: dict[str, Tensor] = {"up": torch.cat([self.up, other.up]), "down": torch.cat([self.down, other.down], 1)}
        if self.gate is not None and other.gate is not None:
            parts["gate"] = torch.cat([self.gate, other.gate])
        if self.up_bias is not None and other.up_bias is not None:
            parts["up_bias"] = torch.cat([self.up_bias, other.up_bias])
        if self.down_bias is not None and other.down_bias is not None:
            parts["down_bias"] = self.down_bias + other.down_bias
        return self.changed(**parts)


@dataclasses.dataclass(frozen=True)
class Place:
    """A dense layer in a model. names: field of `mlp` -> attribute path of its tensor, for reports."""

    path: str
    mlp: DenseMLP
    notes: tuple[str, ...] = ()


def find(model: nn.Module) -> list[Place]:
    """Every dense feed-forward layer that is understood, in the order of the model.

    Our own dense layers, and any module of linear maps (`nn.Linear`, or transformers' `Conv1D`) whose output on random
    rows is that of a plain or gated MLP; inside of routed layers nothing is looked for. Linear maps are found by their
    shapes, the activation by comparing outputs: names of classes and attributes mean nothing.
    """
    places: list[Place] = []
    done: list[str] = []
    for path, module in model.named_modules():
        if any(path.startswith(d + ".") for d in done):
            continue
        if isinstance(module, Routed):
            done.append(path)
            continue
        mlp = read_mlp(module)
        if mlp is not None:
            done.append(path)
            places.append(Place(path, mlp, _notes(module)))
    return places


def read_mlp(module: nn.Module) -> DenseMLP | None:
    """The layer as a value (it shares the module's tensors), or None for anything else."""
    if isinstance(module, FeedForward | PlainFeedForward):
        candidates = _own(module)
    else:
        linears = [found for child in module.children() if (found := _linear(child)) is not None]
        deeper = sum(1 for child in module.children() if _linear(child) is None and list(child.parameters()))
        if deeper or not 2 <= len(linears) <= 3:
            return None
        candidates = _candidates(linears)
    return _confirmed(module, list(candidates))


def _own(module: FeedForward | PlainFeedForward) -> Iterator[DenseMLP]:
    activation = module.config.activation
    if isinstance(module, FeedForward):
        gate, up = module.gate_up.chunk(2)
        yield DenseMLP(gate=gate, up=up, down=module.down, activation=activation)
    else:
        biases = {"up_bias": module.up_bias, "down_bias": module.down_bias}
        yield DenseMLP(up=module.up, down=module.down, activation=activation, **biases)


def _linear(module: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """(weight [out, in], bias) of a linear map; transformers' Conv1D stores the transpose."""
    if isinstance(module, nn.Linear):
        return module.weight, module.bias
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        return module.weight.t(), module.bias  # type: ignore[operator, return-value]
    return None


def _candidates(linears: Sequence[tuple[Tensor, Tensor | None]]) -> Iterator[DenseMLP]:
    """Every way in which these maps could be an MLP, by shapes."""
    for order in itertools.permutations(linears):
        *ups, (down, down_bias) = order
        D, width = down.shape
        shapes = [tuple(w.shape) for w, _ in ups]
        if len(ups) == 1 and shapes[0] == (width, D):
            up, bias = ups[0]
            for name in ACTIVATIONS:
                yield DenseMLP(up=up, down=down, up_bias=bias, down_bias=down_bias, activation=name)
        elif len(ups) == 1 and shapes[0] == (2 * width, D) and ups[0][1] is None and down_bias is None:
            for gate, up in itertools.permutations(ups[0][0].chunk(2)):
                for name in ACTIVATIONS:
                    yield DenseMLP(gate=gate, up=up, down=down, activation=name)
        elif shapes == [(width, D)] * 2 and all(b is None for _, b in order):
            for name in ACTIVATIONS:
                yield DenseMLP(gate=ups[0][0], up=ups[1][0], down=down, activation=name)


@torch.no_grad()
def _confirmed(module: nn.Module, candidates: Sequence[DenseMLP]) -> DenseMLP | None:
    """The first candidate that computes what the module does."""
    if not candidates or candidates[0].up.is_meta:
        return None
    exact = copy.deepcopy(module).eval().double()
    first = candidates[0]
    x = torch.randn(PROBE, first.dim, generator=torch.Generator().manual_seed(0)).to(first.up.device).double()
    try:
        want = exact(x[None])
    except Exception:  # whatever a foreign forward raises: it is not called like a feed-forward layer
        return None
    want = want[0] if isinstance(want, tuple) else want
    if not isinstance(want, Tensor) or want.shape != x[None].shape:
        return None
    for candidate in candidates:
        got = candidate.changed(**{n: t.double() for n, t in candidate.tensors().items()})(x)
        if float((got - want[0]).norm()) <= 1e-9 * float(want.norm()):
            return candidate
    return None


def _notes(module: nn.Module) -> tuple[str, ...]:
    rates = [m.p for m in module.modules() if isinstance(m, nn.Dropout) and m.p > 0]
    return (f"dropout of {max(rates)} inside the layer is left out",) if rates else ()


def bank_of(experts: Sequence[DenseMLP]) -> tuple[Experts, dict[str, Tensor], str | None]:
    """(config, tensors by parameter name, a note or None) of the bank that holds these experts, in order.

    Plain MLPs of unequal widths are filled up with neurons of zeros, which add nothing.
    """
    first = experts[0]
    widths = tuple(e.width for e in experts)
    if first.gate is not None:
        if len(set(widths)) == 1:
            config = Gated(width=widths[0], activation=first.activation)
            gate_up = torch.stack([torch.cat([_gate(e), e.up]) for e in experts])
            return config, {"gate_up": gate_up, "down": torch.stack([e.down for e in experts])}, None
        gate_up = torch.cat([torch.cat([_gate(e), e.up]) for e in experts])
        down = torch.cat([e.down.t() for e in experts])
        return Gated(width=widths, activation=first.activation), {"gate_up": gate_up, "down": down}, None
    width = max(widths)
    up = torch.stack([F.pad(e.up, (0, 0, 0, width - e.width)) for e in experts])
    down = torch.stack([F.pad(e.down, (0, width - e.width)) for e in experts])
    tensors = {"up": up, "down": down}
    bias = any(e.up_bias is not None or e.down_bias is not None for e in experts)
    if bias:
        ups = [e.up.new_zeros(e.width) if e.up_bias is None else e.up_bias for e in experts]
        tensors["up_bias"] = torch.stack([F.pad(b, (0, width - b.shape[0])) for b in ups])
        downs = [e.down.new_zeros(e.dim) if e.down_bias is None else e.down_bias for e in experts]
        tensors["down_bias"] = torch.stack(downs)
    note = None if len(set(widths)) == 1 else f"experts of widths {widths} are filled up with zeros to {width}"
    return MLP(width=width, activation=first.activation, bias=bias), tensors, note


def _gate(mlp: DenseMLP) -> Tensor:
    if mlp.gate is None:
        raise UserError("a gated and a plain layer cannot be experts of one bank")
    return mlp.gate
