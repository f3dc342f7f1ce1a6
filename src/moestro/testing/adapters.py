"""`check_adapters`: adapters reach every routed expert, leave the base alone, and never write out all updates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..core.plan import Plan
from ..dispatch.base import mixture
from ..experts.config import Gated
from ..models.config import Decoder
from ..models.examples import examples
from ..moe.layer import MoELayer
from .compare import relative_error

__all__ = ["Largest", "check_adapters"]


class Largest(TorchDispatchMode):
    """The largest memory that any operation inside makes. Memory of `known` tensors does not count.

    numel: its size in numbers of four bytes. where: the operation.
    """

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.known = {t.untyped_storage().data_ptr() for t in known}
        self.numel, self.where = 0, ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in self.known:
                numel = t.untyped_storage().nbytes() // 4
                if numel > self.numel:
                    self.numel, self.where = numel, str(func)
        return out


def check_adapters(attach: Callable[[nn.Module], Any]) -> None:
    """Run every check on small decoders that `attach(model)` puts adapters into.

    The model computes what it computed before; only new parameters train; changing them changes what every expert of
    every routed layer computes; frozen weights get no gradient; no operation of a training step makes a tensor as
    large as the updates of all experts of one matrix.
    """
    E, D = 16, 16
    config = _wide(E)
    model, tokens = config.build(), torch.randint(0, 37, (1, 7), generator=torch.Generator().manual_seed(0))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    want, rows = model(tokens)[0].detach(), torch.randn(3, D, generator=torch.Generator().manual_seed(1))
    experts = _each(model, rows)
    attach(model)
    if not relative_error(model(tokens)[0], want) <= 1e-5:
        raise AssertionError("start: the adapted model does not compute what the model computed")
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if not trained or set(trained) & set(before):
        raise AssertionError(f"frozen: {sorted(set(trained) & set(before))[:3] or 'nothing'} trains")
    with torch.no_grad():
        for i, p in enumerate(trained.values()):
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) * 0.3)
    for path, outputs in _each(model, rows).items():
        for e, (new, old) in enumerate(zip(outputs, experts[path])):
            if not relative_error(new, old) > 1e-3:
                raise AssertionError(f"reach: no adapter reaches expert {e} of {path}")
    largest = Largest(*model.parameters())
    with largest:
        nats, number, _, _ = model.loss(tokens, tokens)
        (nats / number).backward()
    if largest.numel >= E * D * D:
        raise AssertionError(
            f"size: {largest.where} makes {largest.numel} numbers, as many as an update of all experts"
        )
    for n, p in model.named_parameters():
        if n not in trained and p.grad is not None:
            raise AssertionError(f"frozen: {n} has a gradient")


def _wide(num_experts: int) -> Decoder:
    config = examples()["moe"]
    assert config.moe is not None
    return config.replace(moe=config.moe.replace(num_experts=num_experts, experts=Gated(width=16)))


@torch.no_grad()
def _each(model: nn.Module, rows: Tensor) -> dict[str, list[Tensor]]:
    """Path of a routed layer -> what each of its experts makes of the rows."""
    out: dict[str, list[Tensor]] = {}
    for path, layer in model.named_modules():
        if isinstance(layer, MoELayer):
            E, T = layer.config.num_experts, rows.shape[0]
            alone = [
                Plan(expert=torch.full((T, 1), e), weight=torch.ones(T, 1), num_experts=E, complete=True)
                for e in range(E)
            ]
            out[path] = [mixture(layer.exchange, rows, plan) for plan in alone]
    return out
