"""`check_conversion`: what must hold for whatever turns one model into another and hands out a receipt."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..convert.receipt import Receipt, checksums
from ..core.account import cost

__all__ = ["check_conversion"]

Models = nn.Module | Sequence[nn.Module]
Convert = Callable[[Any], tuple[nn.Module, Receipt]]
SLACK = 1e-3  # relative, between a measured figure and the same figure computed here in float64


def check_conversion(
    convert: Convert, make: Callable[[], Models], run: Callable[[nn.Module], Tensor], *, exact: float | None = None
) -> None:
    """Run every check on fresh models from `make()`.

    convert: model -> (new model, receipt). run: model -> its output on the inputs that the receipt measured.
    exact: the relative difference that the conversion promises, if any; the receipt must claim it then.

    The old model keeps its values, modes and gradients, and shares no storage with the new one; two conversions of one
    model are equal whatever torch's own generators say; every tensor that is not listed as invented follows from the
    old model; the receipt's difference, counts and checksums are those of the model, and it survives JSON.

    A conversion of several models gets a list of them from `make()`: all of this holds for each of them, the difference
    is that from the mean of their outputs, counts are those of the first, and every tensor follows from every model
    (of experts, one from each at least). With `exact` they are made equal.
    """
    old = _fresh(make, 1, equal=exact is not None)
    olds = _each(old)
    before = [(copy.deepcopy(m.state_dict()), [part.training for part in m.modules()]) for m in olds]
    torch.manual_seed(11)
    new, receipt = convert(old)
    for model, (state, modes) in zip(olds, before, strict=True):
        _check_old(model, state, modes)
        _check_storage(model, new)
    _check_receipt(olds, new, receipt, run, exact)
    torch.manual_seed(12)
    again, second = convert(_fresh(make, 1, equal=exact is not None))
    _check_equal(new, again)
    if second.to_dict() != receipt.to_dict():
        raise AssertionError("two conversions of one model have different receipts")
    _check_follows(new, convert(_fresh(make, 2))[0], receipt, olds[0])
    if not isinstance(old, nn.Module):
        _check_each_counts(convert, make, convert(_fresh(make, 1)) if exact is not None else (new, receipt), len(olds))


def _each(models: Models) -> list[nn.Module]:
    return [models] if isinstance(models, nn.Module) else list(models)


def _fresh(make: Callable[[], Models], seed: int, equal: bool = False) -> Models:
    """A model whose every floating parameter has been moved at random, so that no two tensors are alike; or several,
    which are alike if `equal`."""
    made = make()
    if isinstance(made, nn.Module):
        return _moved(made, seed)
    return [_moved(m, seed if equal else 100 * seed + i) for i, m in enumerate(made)]


def _moved(model: nn.Module, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            parameter.add_(noise * (0.05 + 0.2 * float(parameter.float().std(correction=0))))
    return model.eval()


def _check_old(old: nn.Module, before: dict[str, Any], modes: list[bool]) -> None:
    for name, tensor in old.state_dict().items():
        if not torch.equal(tensor, before[name]):
            raise AssertionError(f"the old model has changed: {name}")
    if [m.training for m in old.modules()] != modes:
        raise AssertionError("the old model has changed: training modes")
    for name, parameter in old.named_parameters():
        if parameter.grad is not None:
            raise AssertionError(f"the old model has changed: {name} has a gradient")
    hooked = [n for n, m in old.named_modules() if m._forward_hooks or m._forward_pre_hooks]
    if hooked:
        raise AssertionError(f"the old model has changed: {hooked[0]} has a hook")


def _check_storage(old: nn.Module, new: nn.Module) -> None:
    mine = {t.untyped_storage().data_ptr(): n for n, t in _tensors(old) if t.numel()}
    for name, tensor in _tensors(new):
        if tensor.numel() and tensor.untyped_storage().data_ptr() in mine:
            other = mine[tensor.untyped_storage().data_ptr()]
            raise AssertionError(f"{name} of the new model is {other} of the old one: training one changes the other")
    seen: dict[int, str] = {}
    tied = {t.untyped_storage().data_ptr() for n, t in _tensors(old) if _twice(old, t)}
    for name, parameter in new.named_parameters(remove_duplicate=False):
        place = parameter.untyped_storage().data_ptr()
        if place in seen and place not in tied and not _tied(old, name, seen[place]):
            raise AssertionError(f"{name} and {seen[place]} of the new model are one tensor; copies must be copies")
        seen[place] = name


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [(n, t) for n, t in model.state_dict(keep_vars=True).items() if isinstance(t, Tensor)]


def _twice(model: nn.Module, tensor: Tensor) -> bool:
    return sum(t is tensor for _, t in _tensors(model)) > 1


def _tied(old: nn.Module, a: str, b: str) -> bool:
    """Whether the old model had these two names for one tensor already."""
    own = dict(old.named_parameters(remove_duplicate=False))
    return a in own and b in own and own[a] is own[b]


def _check_receipt(
    olds: list[nn.Module], new: nn.Module, receipt: Receipt, run: Callable[[nn.Module], Tensor], exact: float | None
) -> None:
    with torch.no_grad():
        outputs, second = [run(old) for old in olds], run(new.eval())
    first = outputs[0]
    want, got = torch.stack([y.double() for y in outputs]).mean(0), second.double()
    if not bool(torch.isfinite(got).all()):
        raise AssertionError("the new model's output is not finite")
    found = float((got - want).norm() / want.norm())
    said = receipt.measured.relative
    rounding = 1e-12 if first.dtype == torch.float64 else 1e-6
    if not math.isclose(found, said, rel_tol=SLACK, abs_tol=rounding):
        raise AssertionError(f"the receipt lies: it says the outputs differ by {said:.4g}, they differ by {found:.4g}")
    if exact is not None:
        if receipt.exact is None or receipt.bound is None:
            raise AssertionError("the conversion promises an unchanged output, but its receipt claims nothing")
        if not found <= exact:
            raise AssertionError(f"the conversion promises {exact:g}, but the outputs differ by {found:.4g}")
    elif receipt.exact is not None and not found <= max(receipt.bound or 0.0, 1e-6):
        raise AssertionError(f"the receipt lies: it claims {receipt.exact!r}, but the outputs differ by {found:.4g}")
    if dict(receipt.checksums) != checksums(new):
        raise AssertionError("the receipt lies: its checksums are not those of the new model")
    a, b = cost(olds[0]), cost(new)
    counts = (receipt.params_before, receipt.params_after, receipt.active_before, receipt.active_after)
    if counts != (a.params, b.params, a.active, b.active):
        raise AssertionError(f"the receipt lies: parameters and active ones are not {counts}")
    unknown = [n for n in receipt.invented if n not in new.state_dict()]
    if unknown:
        raise AssertionError(f"the receipt lies: the new model has no {unknown[0]!r} that could be invented")
    if receipt.exact is None and not receipt.layers:
        raise AssertionError("a conversion that changes the output must say how far each layer moved")
    if Receipt.from_dict(json.loads(json.dumps(receipt.to_dict()))) != receipt:
        raise AssertionError("the receipt does not survive JSON")


def _check_equal(new: nn.Module, again: nn.Module) -> None:
    a, b = new.state_dict(), again.state_dict()
    if a.keys() != b.keys():
        raise AssertionError("two conversions of one model have different tensors")
    for name, tensor in a.items():
        if not torch.equal(tensor, b[name]):
            raise AssertionError(f"left random: {name} differs between two conversions of one model")


def _check_follows(new: nn.Module, other: nn.Module, receipt: Receipt, old: nn.Module) -> None:
    """A tensor with a source changes with the source: every expert's slice of it. other: made of other models."""
    theirs = other.state_dict()
    first, second = checksums(new), checksums(other)
    own, parameters = old.state_dict(), dict(new.named_parameters())
    for name in new.state_dict():
        if name in receipt.invented or name not in theirs:
            continue
        constant = name in own and not own[name].is_floating_point()
        if constant or name not in parameters:
            continue
        for e, (a, b) in enumerate(zip(first[name], second[name])):
            if a == b:
                part = f"{name}[{e}]" if len(first[name]) > 1 else name
                raise AssertionError(f"left without a source: {part} is the same for two different models")


def _check_each_counts(
    convert: Convert, make: Callable[[], Models], made: tuple[nn.Module, Receipt], number: int
) -> None:
    """Exchanging one of several models changes every tensor that has a source, of experts at least one."""
    new, receipt = made
    first = checksums(new)
    for i in range(number):
        models = _each(_fresh(make, 1))
        models[i] = _each(_fresh(make, 2))[i]
        second = checksums(convert(models)[0])
        for name, parameter in new.named_parameters():
            if name not in receipt.invented and parameter.is_floating_point() and first[name] == second[name]:
                raise AssertionError(f"left without a source: {name} does not depend on model {i} of {number}")
