"""What all conversions have in common: the inputs, the comparison of old and new, the check of claims, the receipt."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...core.account import cost
from ...core.errors import UserError
from ...core.plan import Dense, ExpertChoice, Plan
from ...moe.layer import MoELayer
from ..config import Conversion
from ..receipt import ConversionError, LayerChange, Measured, Receipt, checksums
from .mlp import DenseMLP
from .samples import Batch, Samples, evaluating, forward, labels_for, mean_output, measure

__all__ = [
    "BOUNDS",
    "Claim",
    "Made",
    "Seen",
    "by_expert",
    "choose",
    "conduct",
    "experts_in",
    "experts_of",
    "generator",
    "in_float64",
    "run_layer",
    "watch",
    "weight_of",
]

BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-6}


@dataclasses.dataclass(frozen=True)
class Claim:
    """What stays as it is. bitwise: also every bit, where the same matrix product computes dense layer and experts.

    dense: path -> the dense layer that each converted one must equal, for that comparison. proof: looks at the new
    model on the samples and says what it found, or raises `ConversionError`.
    """

    text: str
    bitwise: bool = False
    dense: Mapping[str, DenseMLP] = dataclasses.field(default_factory=dict)
    proof: Callable[[nn.Module, Samples], str] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Made:
    """A converted model, before it is measured. paths: of the converted layers, the same in old and new; changes: how
    far these moved, where that is not the comparison of two feed-forward layers."""

    model: nn.Module
    paths: Sequence[str] = ()
    changes: Callable[[Samples], Sequence[LayerChange]] | None = None
    claim: Claim | None = None
    invented: Mapping[str, str] = dataclasses.field(default_factory=dict)
    notes: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class Seen:
    """One layer in one pass: x [T, D] that it got, y [T, D'] that it gave; of routed ones also what the router was
    called with, and its plan."""

    x: Tensor
    y: Tensor
    call: tuple[Any, ...] = ()
    plan: Any = None


def generator(seed: int, name: str) -> torch.Generator:
    """A generator for the draws of one thing: a function of the seed and the name."""
    import hashlib

    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def choose(found: Sequence[Any], layers: tuple[int, ...] | None, what: str) -> list[Any]:
    """Those of the found layers that the options name. Raises `UserError` for none and for numbers out of range."""
    if not found:
        raise UserError(f"the model has no {what}")
    if layers is None:
        return list(found)
    wrong = [i for i in layers if not 0 <= i < len(found)]
    if wrong:
        raise UserError(
            f"layers: {wrong[0]} is none of the {len(found)} layers that can be converted (0 to {len(found) - 1})"
        )
    return [found[i] for i in sorted(layers)]


def experts_in(module: nn.Module) -> int:
    """Experts of a routed layer; 0 of a dense one."""
    return module.config.num_experts if isinstance(module, MoELayer) else 0


@torch.no_grad()
def watch(model: nn.Module, paths: Sequence[str], batch: Batch) -> dict[str, Seen]:
    """What the layers at these paths meet while the model runs one batch."""
    seen: dict[str, Any] = {p: {} for p in paths}
    with contextlib.ExitStack() as stack:
        for path in paths:
            module = model.get_submodule(path)
            stack.callback(module.register_forward_hook(_record(seen[path]), with_kwargs=True).remove)
            if isinstance(module, MoELayer):
                stack.callback(module.router.register_forward_hook(_record_plan(seen[path])).remove)
        forward(model, batch)
    for path, found in seen.items():
        if "x" not in found:
            raise UserError(f"{path} did not run on the given inputs, or not like a feed-forward layer")
    return {p: Seen(**found) for p, found in seen.items()}


def _record(found: dict[str, Any]) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        x = args[0] if args else next(v for v in kwargs.values() if isinstance(v, Tensor))
        y = out[0] if isinstance(out, tuple) else out
        found["x"], found["y"] = x.detach().flatten(0, -2), y.detach().flatten(0, -2)

    return hook


def _record_plan(found: dict[str, Any]) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, out: Any) -> None:
        found["call"], found["plan"] = args, out[0]

    return hook


@torch.no_grad()
def run_layer(module: nn.Module, seen: Seen) -> Tensor:
    """What a layer makes of what another one got in its place."""
    if isinstance(module, MoELayer) and seen.call:
        plan, _ = module.router(*seen.call)
        return module.run(seen.x, plan)
    told = labels_for(module, seen.x.shape[0]) if isinstance(module, MoELayer) else None
    out = module(seen.x) if told is None else module(seen.x, told)
    return out[0] if isinstance(out, tuple) else out


def conduct(
    options: Conversion,
    model: nn.Module,
    make: Callable[[Samples], Made],
    *,
    others: Sequence[nn.Module] = (),
    text: Any = None,
    num_bytes: int | None = None,
    sources: Sequence[str] = (),
) -> tuple[nn.Module, Receipt]:
    """Make the new model, measure it against the old one, check what is claimed. Returns (new model, receipt).

    others: further sources beside `model`; the new model is then compared with the mean of all outputs.
    text: tokens [B, S], other inputs, or a list of such; None = random tokens, and the receipt says so.
    Raises `UserError` where the conversion needs text, and `ConversionError` where a claim does not hold.
    """
    samples = Samples.of(model, text, options.seed, num_bytes)
    if getattr(options, "reads_text", False) and not samples.given:
        raise UserError(f"{type(options).__name__} looks at what the model does on text; give text")
    with evaluating(model, *others):
        made = make(samples)
        with evaluating(made.model):
            measured = measure(lambda b: mean_output((model, *others), b), lambda b: forward(made.model, b), samples)
            if others:
                measured = dataclasses.replace(
                    measured, against=f"the mean of the outputs of {1 + len(others)} sources"
                )
            layers = _changes(model, made, samples) if made.changes is None else tuple(made.changes(samples))
            if not math.isfinite(measured.relative):
                raise ConversionError("the converted model's output is not finite, or that of the given one is not")
            bound, notes = (None, []) if made.claim is None else _check(made, made.claim, model, measured, samples)
    before, after = cost(model), cost(made.model)
    receipt = Receipt(
        method=options.type_name(),
        options={k: v for k, v in options.to_dict().items() if k != "type"},
        seed=options.seed,
        exact=None if made.claim is None else made.claim.text,
        bound=bound,
        measured=measured,
        layers=layers,
        invented=dict(made.invented),
        checksums=checksums(made.model),
        params_before=before.params,
        params_after=after.params,
        active_before=before.active,
        active_after=after.active,
        sources=tuple(sources),
        notes=(*made.notes, *notes),
    )
    return made.model, receipt


@torch.no_grad()
def _changes(model: nn.Module, made: Made, samples: Samples) -> tuple[LayerChange, ...]:
    gap, size = dict.fromkeys(made.paths, 0.0), dict.fromkeys(made.paths, 0.0)
    for batch in samples.batches:
        for path, seen in watch(model, made.paths, batch).items():
            y = run_layer(made.model.get_submodule(path), seen)
            gap[path] += float((y.double() - seen.y.double()).square().sum())
            size[path] += float(seen.y.double().square().sum())
    rows = []
    for path in made.paths:
        counts = experts_in(model.get_submodule(path)), experts_in(made.model.get_submodule(path))
        distance = math.sqrt(gap[path] / size[path]) if size[path] else math.sqrt(gap[path])
        rows.append(LayerChange(path=path, distance=distance, experts_before=counts[0], experts_after=counts[1]))
    return tuple(rows)


def _check(made: Made, claim: Claim, model: nn.Module, measured: Measured, samples: Samples) -> tuple[float, list[str]]:
    """(the bound that holds, notes). Precisions other than fp32 and fp64, and depths at which fp32 rounds more, are
    checked in float64."""
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    notes: list[str] = []
    bound = BOUNDS.get(dtype)
    if bound is None or not measured.relative <= bound:
        if dtype == torch.float64:
            raise ConversionError(
                f"{claim.text}: not so, the outputs differ by {measured.relative:.3g} (over {bound:g})"
            )
        exact = in_float64(model, made.model, samples)
        bound = torch.finfo(dtype).eps
        if not exact <= bound:
            raise ConversionError(
                f"{claim.text}: not so, the outputs differ by {exact:.3g} in float64 (over {bound:g})"
            )
        notes.append(
            f"checked in float64: {exact:.3g}; in {str(dtype)[6:]}, rounding included: {measured.relative:.3g}"
        )
    if claim.bitwise:
        _check_bits(made, claim, model, samples)
        bound = 0.0
        notes.append(
            "every bit equal where one matrix product computes dense layers and experts; with the library's own "
            f"products: {measured.relative:.3g}"
        )
    if claim.proof is not None:
        notes.append(claim.proof(made.model, samples))
    return bound, notes


def in_float64(model: nn.Module, new: nn.Module, samples: Samples) -> float:
    """Relative difference of the outputs, both models in float64."""
    a, b = copy.deepcopy(model).double().eval(), copy.deepcopy(new).double().eval()

    def widened(batch: Batch) -> Batch:
        if isinstance(batch, Tensor):
            return batch.double() if batch.is_floating_point() else batch
        return {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}

    wide = dataclasses.replace(samples, batches=tuple(widened(x) for x in samples.batches))
    return measure(lambda x: forward(a, x), lambda x: forward(b, x), wide).relative


def _check_bits(made: Made, claim: Claim, model: nn.Module, samples: Samples) -> None:
    """Both models with their converted layers computed by plain products over all rows: equal in every bit."""

    def plain(path: str) -> Callable[..., Any]:
        return lambda module, args, out: _like(out, claim.dense[path](args[0].flatten(0, -2)))

    def routed(path: str) -> Callable[..., Any]:
        return lambda module, args, out: _like(out, by_expert(module, args[0].flatten(0, -2), plans[path]["plan"]))

    plans: dict[str, dict[str, Any]] = {p: {} for p in made.paths}
    with contextlib.ExitStack() as stack:
        for path in made.paths:
            old, new = model.get_submodule(path), made.model.get_submodule(path)
            stack.callback(old.register_forward_hook(plain(path)).remove)
            stack.callback(new.router.register_forward_hook(_record_plan(plans[path])).remove)  # type: ignore[union-attr]
            stack.callback(new.register_forward_hook(routed(path)).remove)
        found = measure(lambda b: forward(model, b), lambda b: forward(made.model, b), samples)
    if not found.bitwise:
        raise ConversionError(f"{claim.text}: not bit for bit, the outputs differ by {found.relative:.3g}")


def _like(out: Any, y: Tensor) -> Any:
    """`y` in the form in which a layer returned `out`."""
    if isinstance(out, tuple):
        return y.view_as(out[0]), *out[1:]
    return y.view_as(out)


@torch.no_grad()
def by_expert(layer: Any, x: Tensor, plan: Any) -> Tensor:
    """sum_k weight * expert(x), every expert run on all rows by plain matrix products; the layer's shared expert added.

    Shapes: x [T, D] -> [T, D].
    """
    y = torch.zeros_like(x)
    for e, mlp in enumerate(experts_of(layer.experts)):
        weight = weight_of(plan, e)
        y = torch.where((weight != 0)[:, None], y + (mlp(x) * weight[:, None]).to(y.dtype), y)
    if layer.shared is not None:
        y = y + experts_of(layer.shared)[0](x)
    return y


def weight_of(plan: Any, e: int) -> Tensor:
    """[T]: with which weight every unit takes expert e; 0 where it does not."""
    if isinstance(plan, Dense):
        return plan.weight[:, e]
    if isinstance(plan, ExpertChoice):
        out = plan.weight.new_zeros(plan.num_units)
        unit, weight = plan.unit[:, e].reshape(-1), plan.weight[:, e].reshape(-1)
        return out.index_add(0, unit.clamp_min(0), torch.where(unit >= 0, weight, 0.0))
    assert isinstance(plan, Plan)
    return torch.where(plan.routed() & (plan.expert == e), plan.weight, 0.0).sum(1)


def experts_of(bank: Any) -> list[DenseMLP]:
    """The experts of a stacked bank, as values that share its tensors. Raises `UserError` for other banks."""
    p, config = dict(bank.named_parameters()), getattr(bank, "config", None)
    activation = getattr(config, "activation", None)
    if set(p) == {"gate_up", "down"}:
        widths = getattr(bank, "widths", None)
        if widths is None:
            pairs = zip(p["gate_up"].unbind(0), p["down"].unbind(0), strict=True)
        else:
            blocks = p["gate_up"].split([2 * w for w in widths])
            pairs = ((g, d.t()) for g, d in zip(blocks, p["down"].split(list(widths)), strict=True))
        out = []
        for both, down in pairs:
            gate, up = both.chunk(2)
            out.append(DenseMLP(gate=gate, up=up, down=down, activation=activation))  # type: ignore[arg-type]
        return out
    if {"up", "down"} <= set(p) <= {"up", "down", "up_bias", "down_bias"}:
        rows = [{n: t[e] for n, t in p.items()} for e in range(bank.num_experts)]
        return [DenseMLP(activation=activation, **row) for row in rows]  # type: ignore[arg-type]
    raise UserError(f"experts of {type(bank).__name__} are no stacked MLPs; this conversion knows no others")
