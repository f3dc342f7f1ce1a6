"""What routing methods cost in training: a step of each against a plain top-k layer of equal active FLOPs.

A method stands in the routed layers of one decoder; beside it stands the same decoder with a plain layer: a linear
score, softmax, as many experts per token, all with the same bank but for its width, which is set so that the whole
model's counted FLOPs per token agree. All take their turns in one process. Figures are the method's time over the plain
layer's, round by round; of two-pass training, half of a step's time: that of a pass.

Learning rates are next to nothing, so that routing stays what it is at first for as long as it is measured. The gate of
top-p starts so that tokens meet the plain layer's number of experts in the mean; what they met is in the record. A
schedule of the number of experts runs from its start to its end over the measured rounds, half of it either side of the
plain layer's number.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..core.errors import UserError, did_you_mean
from ..experts.config import Gated
from ..losses.config import PerUnitBalance, RoutingEntropy, SwitchBalance, ZLoss
from ..models.config import Decoder as DecoderConfig
from ..models.expert_places import gshard_layer
from ..moe.config import MoELayer
from ..routers.config import (
    AttentionMix,
    Constant,
    Frozen,
    Linear,
    Random,
    Raw,
    Renormalised,
    Router,
    SimilarityMix,
    SoftmaxKept,
    TopK,
    TopP,
    Uniform,
)
from ..tasks.batches import Batches
from ..tasks.config import Corpus, NextToken, Objective, TwoPass
from ..tasks.corpus import cache_folder, prepare
from ..tasks.tokenizer_file import read_tokenizer
from ..train.config import Knob, LinearRamp, TrainRun
from ..train.models import language_model
from ..train.ranks import joined
from .contender import Contender
from .goals import METHOD, PLAIN, ROUTING
from .record import Regimes, begin, finish
from .timing import interleave

__all__ = ["Method", "measure", "methods", "plain"]

EXPERTS, ACTIVE = 16, 384  # experts per layer, and the width of all that a token meets, as in the preset stdlib
TOLERANCE = 0.01  # of the model's forward FLOPs per token
STILL = 1e-7  # learning rate


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """A routed layer with what its training needs. k: experts of a token, in the mean. passes: over each batch."""

    layer: MoELayer
    k: int
    objective: Objective = NextToken()
    knobs: tuple[Knob, ...] = ()
    passes: int = 1


def methods() -> dict[str, Method]:
    """Name -> method, with the defaults of its own text, `as_released` off."""

    def layer(router: Router, k: int, losses: tuple[Any, ...] = ()) -> MoELayer:
        return MoELayer(num_experts=EXPERTS, router=router, experts=Gated(width=ACTIVE // k), losses=losses)

    def drawn(level: Any) -> MoELayer:
        return layer(Router(score=Uniform(), select=Random(level=level), weigh=Constant()), 1)

    def mixed(mix: Any) -> MoELayer:
        return layer(Router(mix=mix, select=TopK(k=2)), 2, (SwitchBalance(coefficient=0.01),))

    top_p = Router(score=Linear(init_std=0.17), select=TopP(p=0.4, expected=2.0), weigh=Raw())
    entropy = (PerUnitBalance(coefficient=0.01), RoutingEntropy(coefficient=1e-4))
    frozen = Router(score=Frozen(inner=Linear(bias=True)), select=TopK(k=12), weigh=SoftmaxKept())
    found = (
        Method(layer=drawn("batch"), k=1),
        Method(layer=drawn("sequence"), k=1),
        Method(layer=drawn("batch"), k=1, objective=TwoPass(inner=NextToken()), passes=2),
        Method(layer=mixed(SimilarityMix(scale="sqrt_dim", tau=0.25)), k=2),
        Method(layer=mixed(AttentionMix()), k=2),
        Method(layer=gshard_layer(EXPERTS).replace(experts=Gated(width=ACTIVE // 2)), k=2),
        Method(layer=layer(top_p, 2, entropy), k=2),
        Method(layer=layer(frozen, 12), k=12, knobs=(LinearRamp(start=8, end=16),)),
    )
    return dict(zip(ROUTING, found, strict=True))


def plain(shape: DecoderConfig, method: Method, seq_len: int) -> DecoderConfig:
    """The decoder with plain top-k layers whose experts are so wide that its FLOPs per token are those of `shape`.

    A multiple of 8, 4 or 2 where that is within 1 percent, else the nearest whole number.
    """
    weigh = Raw() if method.k == 1 else Renormalised()
    losses = (SwitchBalance(coefficient=0.01), ZLoss(coefficient=1e-4))
    router = Router(select=TopK(k=method.k), weigh=weigh)

    def wide(width: int) -> DecoderConfig:
        layer = MoELayer(num_experts=EXPERTS, router=router, experts=Gated(width=width), losses=losses)
        return shape.replace(moe=layer)

    want = shape.flops_per_token(seq_len)
    first, second = (wide(width).flops_per_token(seq_len) for width in (8, 16))
    exact = 8 + (want - first) * 8 / (second - first)
    for step in (8, 4, 2, 1):
        made = wide(max(step, step * round(exact / step)))
        if abs(made.flops_per_token(seq_len) - want) <= TOLERANCE * want:
            return made
    return wide(max(1, round(exact)))


def measure(
    run: TrainRun,
    rounds: int = 15,
    steps: int = 3,
    only: Sequence[str] = (),
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measure the methods in the routed layers of a run's decoder. Returns a JSON-able record with a regime per method,
    whose rows are the method and its plain layer.

    rounds: how often every contender has its turn. steps: optimiser steps of one turn. only: names in `methods`.
    """
    if rounds < 1 or steps < 1:
        raise UserError("bench train routing: needs at least one round of at least one step")
    known = methods()
    for name in only:
        if name not in known:
            raise UserError(f"bench train routing: no method {name!r}{did_you_mean(name, known)}; {', '.join(known)}")
    chosen = {name: known[name] for name in only or known}
    data, shape = run.data, language_model(run.model, "bench train routing")
    assert isinstance(data, Corpus)
    if shape.moe is None or shape.blocks is not None:
        raise UserError("bench train routing: needs a decoder with routed layers of one kind, such as stdlib")
    with joined(run.device) as ranks:
        if ranks.world > 1:
            raise UserError("bench train routing measures one process; start it without torchrun")
        if run.threads:
            torch.set_num_threads(run.threads)
        tokenizer = read_tokenizer(data.tokenizer)
        corpus = prepare(data.build(), tokenizer, cache_folder(data.cache), say)
        batches = Batches(corpus, run.seq_len, run.seed)
        shape = shape.replace(vocab_size=tokenizer.vocab_size, seed=run.seed, num_experts=None, allow_noncausal=True)
        still = run.optimizer.replace(lr=STILL)
        run = run.replace(optimizer=still, twin=False, micro_batch=0, steps=1 + (1 + rounds) * steps)
        record = begin("training steps of routing methods", ranks.device, run.seed, rounds)
        say(record.get("warning", ""))

        def enter(model: DecoderConfig, **changes: Any) -> Contender:
            own = run.replace(model=model, **changes)
            return Contender(own, model.build().to(ranks.device), batches, ranks)

        racing: dict[str, Contender] = {}
        beside: dict[str, str] = {}  # method -> the plain contender it is compared with
        shapes: dict[str, DecoderConfig] = {}
        for name, method in chosen.items():
            shapes[name] = shape.replace(moe=method.layer)
            other = plain(shapes[name], method, run.seq_len)
            beside[name] = f"top-{method.k} of {EXPERTS}, width {_width(other)}"
            racing[name] = enter(shapes[name], objective=method.objective, knobs=method.knobs)
            if beside[name] not in racing:
                shapes[beside[name]] = other
                racing[beside[name]] = enter(other)
        met = {name: [_met(contender)] for name, contender in racing.items()}
        seconds = _race(racing, rounds, steps, say)
        for name, contender in racing.items():
            met[name].append(_met(contender))

        def row(name: str, method: Method | None = None) -> dict[str, Any]:
            counted = sum(met[name]) / len(met[name])
            if method is not None and method.knobs:
                counted = method.knobs[0].mean(run.steps)
            passes = 1 if method is None else method.passes
            return {
                "seconds": [s / steps / passes for s in seconds[name]],
                "experts_per_token": counted,
                "flops_per_token": _flops(shapes[name], counted, run.seq_len),
                "width": _width(shapes[name]),
            }

        regimes: Regimes = {}
        for name, method in chosen.items():
            rows = {METHOD: row(name, method), PLAIN: row(beside[name]) | {"bar": True, "what": beside[name]}}
            regimes[name] = {"kind": "train", "ours": METHOD, "rows": rows}
        record |= {"methods": list(chosen), "steps_per_turn": steps, "config": run.to_dict()}
        return finish(record, "routing", regimes, ranks.device)


def _race(racing: dict[str, Contender], rounds: int, steps: int, say: Callable[[str], None]) -> dict[str, list[float]]:
    for contender in racing.values():
        contender.steps(1)  # the optimiser's state exists from here on
    turns: dict[str, Callable[[], None]] = {name: (lambda c=c: c.steps(steps)) for name, c in racing.items()}
    total = len(turns) * (rounds + 1)

    def each(done: int, name: str) -> None:
        say(f"round {(done - 1) // len(turns)} of {rounds}, {done}/{total}: {name}")

    return interleave(turns, rounds, each=each)


def _met(contender: Contender) -> float:
    """Experts per token in the next step, over all routed layers; no parameter moves."""
    found = contender.gradients(contender.number, contender.stop)
    contender.optimizer.clear()
    chosen = sum(float(count.sum()) for count in found.counts.values())
    units = sum(record.plan.expert.shape[0] for record in found.routing.values() if record.plan is not None)  # type: ignore[union-attr]
    return chosen / units


def _flops(shape: DecoderConfig, met: float, seq_len: int) -> int:
    """Forward FLOPs per token; of top-p, with the experts that tokens met."""
    layer = shape.moe
    assert layer is not None
    router = layer.router
    if isinstance(router, Router) and isinstance(router.select, TopP):
        layer = layer.replace(router=router.replace(select=router.select.replace(expected=met)))
    return shape.replace(moe=layer).flops_per_token(seq_len)


def _width(shape: DecoderConfig) -> int:
    assert shape.moe is not None
    return shape.moe.experts.width  # type: ignore[attr-defined]
