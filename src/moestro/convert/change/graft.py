"""A new model with some of its feed-forward layers exchanged; the old one is untouched, every tensor accounted for."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ...core.errors import UserError
from ...models.config import Stack as StackConfig
from ...models.headed import Headed
from ...models.stack import Stack
from ...moe.config import MoELayer
from ...moe.dropin import MoE
from ...nn.config import FFN, FeedForward, Mixer, PlainFeedForward
from ..receipt import ConversionError
from .mlp import DenseMLP

__all__ = ["DenseFFN", "Graft", "fill", "graft", "with_parts"]


class DenseFFN(nn.Module):
    """A dense feed-forward layer that is called as an FFN, `y = ffn(x)`: what a drop-in layer becomes again.

    Shapes: [..., D] -> [..., D]. Children: `gate` (gated ones only), `up`, `down`, all `nn.Linear`.
    """

    def __init__(self, mlp: DenseMLP) -> None:
        super().__init__()
        self.activation = mlp.activation
        for name in ("gate", "up", "down"):
            weight: Tensor | None = getattr(mlp, name)
            if weight is None:
                continue
            bias: Tensor | None = getattr(mlp, f"{name}_bias", None)
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None).to(weight)
            with torch.no_grad():
                linear.weight.copy_(weight)
                if bias is not None:
                    linear.bias.copy_(bias)
            self.add_module(name, linear)

    def forward(self, x: Tensor) -> Tensor:
        parts = dict(self.named_children())
        gate: nn.Module | None = parts.get("gate")
        up, down = parts["up"], parts["down"]
        weights = {f"{n}_bias": m.bias for n, m in parts.items() if n != "gate" and m.bias is not None}
        gated = {} if gate is None else {"gate": gate.weight}
        return DenseMLP(up=up.weight, down=down.weight, activation=self.activation, **gated, **weights)(x)  # type: ignore[arg-type]


@dataclasses.dataclass(frozen=True)
class Graft:
    """A new layer: a routed one (config, width and tensors by name inside the layer) or a dense one."""

    routed: MoELayer | None = None
    dim: int = 0
    tensors: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    dense: DenseMLP | None = None


def graft(model: nn.Module, layers: Mapping[str, Graft]) -> nn.Module:
    """A new model with these layers at these paths and copies of everything else.

    A `Decoder` or `Encoder`, also one with a head, is built anew from its config with other feed-forward layers; in any
    other model the modules are replaced by `moestro.MoE` or `DenseFFN`, called as an FFN. Raises `ConversionError` if a
    tensor would be left without a value.
    """
    if isinstance(model, Stack):
        return _stack(model, layers)
    if isinstance(model, Headed) and all(path.startswith("encoder.") for path in layers):
        return _headed(model, layers)
    for path, module in model.named_modules():
        if path and isinstance(module, Stack):
            raise UserError(
                f"{path} is a {type(module).__name__} inside of {type(model).__name__}; convert that part itself"
            )
    memo: dict[int, object] = {}
    for path, new in layers.items():
        if new.routed is not None and getattr(getattr(new.routed.router, "select", None), "signal", None):
            raise UserError(f"{path}: labels reach routed layers in models of Moestro only; choose another router")
        memo[id(model.get_submodule(path))] = _dropin(new, _like(model.get_submodule(path)))
    made = copy.deepcopy(model, memo)
    return made.train(model.training)


def _like(module: nn.Module) -> Tensor:
    """A tensor of the module's dtype and device."""
    return next(p for p in module.parameters() if p.is_floating_point())


def _dropin(new: Graft, like: Tensor) -> nn.Module:
    if new.dense is not None:
        return DenseFFN(new.dense)
    assert new.routed is not None
    layer = MoE(new.dim, config=new.routed).to(device=like.device, dtype=like.dtype)
    fill(layer, new.tensors)
    return layer


def _stack(model: Stack, layers: Mapping[str, Graft]) -> Stack:
    ffns: dict[int, MoELayer | FFN] = {}
    state = {n: t for n, t in model.state_dict().items() if not any(n.startswith(f"{p}.") for p in layers)}
    for path, new in layers.items():
        number = int(path.split(".")[1])
        if new.dense is not None:
            config, tensors = _own(new.dense)
        else:
            assert new.routed is not None
            config, tensors = new.routed, new.tensors
        ffns[number] = config
        state |= {f"{path}.{n}": t for n, t in tensors.items()}
    like = model.embed.weight
    made: Stack = with_parts(model.config, ffns).build()
    made.to(device=like.device, dtype=like.dtype)
    fill(made, state)
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    for name, parameter in made.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and name not in frozen)
    return made.train(model.training)


def _headed(model: Headed, layers: Mapping[str, Graft]) -> Headed:
    encoder = _stack(model.encoder, {p.removeprefix("encoder."): new for p, new in layers.items()})
    made: Headed = model.config.replace(encoder=encoder.config).build()
    made.to(device=encoder.embed.weight.device, dtype=encoder.embed.weight.dtype)
    rest = {n: t for n, t in model.state_dict().items() if not n.startswith("encoder.")}
    fill(made, {f"encoder.{n}": t for n, t in encoder.state_dict().items()} | rest)
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    for name, parameter in made.named_parameters():
        parameter.requires_grad_(name not in frozen)
    return made.train(model.training)


def _own(mlp: DenseMLP) -> tuple[FFN, dict[str, Tensor]]:
    """(config, tensors) of our dense layer."""
    tensors = mlp.tensors()
    if mlp.gate is not None:
        config = FeedForward(width=mlp.width, activation=mlp.activation)
        return config, {"gate_up": torch.cat([mlp.gate, mlp.up]), "down": mlp.down}
    bias = mlp.up_bias is not None or mlp.down_bias is not None
    if bias:
        tensors.setdefault("up_bias", mlp.up.new_zeros(mlp.width))
        tensors.setdefault("down_bias", mlp.down.new_zeros(mlp.dim))
    return PlainFeedForward(width=mlp.width, activation=mlp.activation, bias=bias), tensors


@torch.no_grad()
def fill(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy every tensor into the module; each of the module's gets exactly one, of its shape."""
    own = module.state_dict()
    missing, extra = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    wrong = [n for n in own.keys() & tensors.keys() if own[n].shape != tensors[n].shape]
    if missing or extra or wrong:
        raise ConversionError(f"tensors without a source: {missing}; without a target: {extra}; misshaped: {wrong}")
    for name, tensor in own.items():
        tensor.copy_(tensors[name])


def with_parts(
    config: StackConfig, ffns: Mapping[int, MoELayer | FFN], mixers: Mapping[int, Mixer] | None = None
) -> StackConfig:
    """The config with these feed-forward layers and mixers in these blocks, written with `attention`, `moe`, `layout`
    and `num_experts` where these can say it, else with `blocks`."""
    mixers = {} if mixers is None else mixers
    blocks = tuple(
        b.replace(ffn=ffns.get(i, b.ffn), mixer=mixers.get(i, b.mixer)) for i, b in enumerate(config.resolved())
    )
    routed = [b.ffn for b in blocks if isinstance(b.ffn, MoELayer)]
    dense = [b.ffn for b in blocks if isinstance(b.ffn, FFN)]
    counts = tuple(r.num_experts for r in routed)
    kinds = tuple("moe" if isinstance(b.ffn, MoELayer) else "dense" for b in blocks)
    if config.blocks is None:
        short = config.replace(
            attention=blocks[0].mixer if mixers else config.attention,
            moe=routed[0] if routed else None,
            ffn=dense[0] if dense else config.ffn,
            layout=kinds if routed and dense else None,
            num_experts=counts if len(set(counts)) > 1 else None,
        )
        if short.resolved() == blocks:
            return short
    # residual_scale is part of the blocks now
    return config.replace(blocks=blocks, moe=None, layout=None, num_experts=None, residual_scale=1.0)
