"""Checks of what a training step must get right: counts, gradient norm, loading."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

__all__ = ["Counting", "check_counts", "check_load", "check_norm"]


class Counting(Protocol):
    """`counts(...) -> {layer path: [E]}` of one optimiser step on one fixed batch of 4 sequences.

    micro_batches: in how many parts the batch is fed. checkpointing: whether blocks are recomputed. evaluations:
    forward passes in evaluation mode before the step's counts are read. cast: whether the model was cast to bf16.
    """

    def __call__(
        self, *, micro_batches: int = 1, checkpointing: bool = False, evaluations: int = 0, cast: bool = False
    ) -> Mapping[str, Tensor]: ...


def check_counts(counts: Counting, tokens: int) -> None:
    """Counts do not depend on how the batch is fed, on recomputation, on evaluation or on the model's dtype.

    tokens: choices that one step makes in each layer; the batch should be large enough for bf16 to miscount (over 256
    per expert).
    """
    want = counts()
    for path, count in want.items():
        if int(count.sum()) != tokens:
            raise AssertionError(f"counts of {path}: {int(count.sum())} choices, the step made {tokens}")
    ways: dict[str, dict[str, Any]] = {
        "four micro-batches": {"micro_batches": 4},
        "recomputation": {"checkpointing": True},
        "an evaluation before": {"evaluations": 1},
    }
    for way, kwargs in ways.items():
        _same_counts(way, counts(**kwargs), want)
    for path, count in counts(cast=True).items():
        if count.dtype != torch.int64 or int(count.sum()) != tokens:
            raise AssertionError(f"counts of {path} after a cast to bf16: {count.dtype}, {float(count.sum())} in all")


def _same_counts(way: str, got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> None:
    if got.keys() != want.keys():
        raise AssertionError(f"counts with {way}: other layers, {sorted(got)}")
    for path, count in want.items():
        if not torch.equal(got[path].to(count.dtype), count):
            raise AssertionError(f"counts of {path} change with {way}: {got[path].tolist()}, not {count.tolist()}")


def check_norm(norm: Callable[[list[Tensor]], float]) -> None:
    """The norm of one set of gradients depends neither on how they are cut into tensors nor on their order."""
    generator = torch.Generator().manual_seed(0)
    bank = torch.randn(4, 6, 5, generator=generator)
    router = torch.randn(4, 5, generator=generator) * 10
    want = float(torch.cat([bank.flatten(), router.flatten()]).double().norm())
    layouts = {
        "one bank and a router": [bank, router],
        "one tensor per expert": [*bank.unbind(0), router],
        "the router first": [router, bank],
        "a bank in halves, one of them without experts": [bank[:0], bank, router],
    }
    for layout, grads in layouts.items():
        got = float(norm([g.clone() for g in grads]))
        if abs(got - want) > 1e-5 * want:
            raise AssertionError(f"gradient norm with {layout}: {got:.6g}, not {want:.6g}")


def check_load(make: Callable[[], nn.Module], load: Callable[[nn.Module, dict[str, Tensor]], None]) -> None:
    """Loading either sets every tensor of the model or raises `ValueError`; it never leaves one as it was.

    load(model, tensors) is to put `tensors` into the model.
    """
    source = make()
    with torch.no_grad():
        for i, p in enumerate(source.parameters()):
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    tensors = {n: t.detach().clone() for n, t in source.state_dict().items()}
    whole = make()
    load(whole, dict(tensors))
    for name, tensor in whole.state_dict().items():
        if not torch.equal(tensor, tensors[name]):
            raise AssertionError(f"load: {name} is not what was saved")
    first = next(iter(tensors))
    rest = {n: t for n, t in tensors.items() if n != first}
    changed = {
        "a missing tensor": rest,
        "a renamed tensor": {**rest, first + "_renamed": tensors[first]},
        "a tensor too many": {**tensors, "stowaway": torch.zeros(1)},
        "a tensor of another shape": {**tensors, first: tensors[first][..., :-1].clone()},
    }
    for what, given in changed.items():
        try:
            load(make(), given)
        except ValueError:
            continue
        raise AssertionError(f"load: {what} was accepted without an error")
