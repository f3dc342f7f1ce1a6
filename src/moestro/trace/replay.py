"""From a trace back into a model: the recorded choices as binding plans."""

from __future__ import annotations

from torch import Tensor, from_numpy, nn

from ..core.carry import Carry, Replay
from ..core.errors import UserError, did_you_mean
from ..core.plan import AnyPlan, Dense, ExpertChoice, Plan
from .tables import Array, Layer, Sample, Table, Trace

__all__ = ["plan_of", "replay"]


def replay(trace: Trace, sample: Sample, model: nn.Module | None = None, pass_: int = 0) -> Carry:
    """A carry that makes a model route as in `sample`: own = {path: Replay(plan)}; its routers recompute the weights.

    With a model, every path must be one of its modules, and its number of experts the recorded one; else `UserError`.
    The model must be given the same tokens in the same order (`sample.columns["token"]`).
    """
    own: dict[str, Replay] = {}
    for number, layer in enumerate(trace.layers):
        table = sample.table(number, pass_)
        if table is None:
            continue
        if model is not None:
            _check(model, layer)
        own[layer.path] = Replay(plan_of(table, layer))
    if not own:
        raise UserError(f"the sample of step {sample.step} has no table of pass {pass_}")
    return Carry(own=own)


def plan_of(table: Table, layer: Layer) -> AnyPlan:
    """The plan that a table records, without probabilities and logits; weights have the precision they were kept in."""
    weight = from_numpy(table.weight.astype("float32"))
    valid, meta = _flags(table.valid), {n: _whole(v) for n, v in table.meta.items()}
    if table.expert is not None:
        made: AnyPlan = Plan(
            expert=_whole(table.expert),
            weight=weight,
            num_experts=layer.num_experts,
            kept=_flags(table.kept),
            valid=valid,
            meta=meta,
            virtual=layer.virtual,
            kind=layer.kind,
            capacity=table.capacity,
            complete=table.complete,
        )
    elif table.unit is not None:
        made = ExpertChoice(
            unit=_whole(table.unit), weight=weight, num_units=table.units, valid=valid, meta=meta, kind=layer.kind
        )
    else:
        made = Dense(weight=weight, valid=valid, meta=meta, kind=layer.kind)
    return made.check()


def _check(model: nn.Module, layer: Layer) -> None:
    modules = dict(model.named_modules())
    if layer.path not in modules:
        raise UserError(
            f"the trace routes at {layer.path!r}, which is no module of this model{did_you_mean(layer.path, modules)}"
        )
    has = getattr(getattr(modules[layer.path], "router", modules[layer.path]), "num_experts", layer.num_experts)
    if has != layer.num_experts:
        raise UserError(f"{layer.path!r} has {has} experts, and the trace was recorded with {layer.num_experts}")


def _whole(values: Array) -> Tensor:
    return from_numpy(values.astype("int64"))


def _flags(values: Array | None) -> Tensor | None:
    return None if values is None else from_numpy(values.copy())
