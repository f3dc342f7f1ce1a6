"""Training speed: a sparse model against its dense twin and against itself with transformers' experts.

All contenders train in one process on the same batches, with the same optimiser; those that share an architecture start
from the same weights and must first show the same loss and gradients. They then take turns: in every round each one
takes the same number of steps, and speeds are compared round by round. The parts of a step are timed apart, in the same
rounds: forward and backward of all feed-forward layers (router, rows, experts, combine) on the inputs they had in a
real step, then of all attention layers; "rest" is what remains of the step: embedding, norms, head, loss, clipping,
optimiser, counting. Contenders that are shown but not compared with take one step per turn: they are slow.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import UserError
from ..models.decoder import Decoder
from ..models.twin import dense_twin
from ..moe.layer import MoELayer
from ..tasks.batches import Batches
from ..tasks.corpus import cache_folder, prepare
from ..tasks.tokenizer_file import read_tokenizer
from ..train.config import TrainRun
from ..train.ranks import joined
from . import peers
from .contender import Contender
from .machine import describe_machine, peak_memory
from .problem import distance
from .timing import interleave, ratio, spread

__all__ = ["AGREEMENT", "measure"]

SPARSE, TWIN, GROUPED, COMPILED = "sparse", "dense twin", "grouped_mm", "grouped_mm compiled"
PEERS = {
    GROUPED: ("grouped_mm", False),
    COMPILED: ("grouped_mm", True),
    "batched_mm": ("batched_mm", False),
    "eager": ("eager", False),
}
COMPARED = (TWIN, GROUPED, COMPILED)  # what ratios are taken to; the others are shown only
KINDS = ("experts", "attention")
AGREEMENT = 1e-4  # relative L2 per gradient tensor, fp32


def measure(
    run: TrainRun,
    rounds: int = 7,
    steps: int = 3,
    say: Callable[[str], None] = lambda line: None,
    against: Sequence[str] = tuple(PEERS),
) -> dict[str, Any]:
    """Measure a run's model. Returns a JSON-able record: `rows` per contender, `ratios` of the sparse model's speed.

    rounds: how often every contender has its turn. steps: optimiser steps of one turn. against: names in PEERS.
    """
    if rounds < 1 or steps < 1:
        raise UserError("bench train: needs at least one round of at least one step")
    with joined(run.device) as ranks:
        if ranks.world > 1:
            raise UserError("bench train measures one process; start it without torchrun")
        if run.threads:
            torch.set_num_threads(run.threads)
        tokenizer = read_tokenizer(run.data.tokenizer)
        corpus = prepare(run.data.build(), tokenizer, cache_folder(run.data.cache), say)
        shape = run.model.replace(vocab_size=tokenizer.vocab_size, seed=run.seed)
        run = run.replace(model=shape, micro_batch=0)
        batches = Batches(corpus, run.seq_len, run.seed)

        def enter(shape: Any, change: Callable[[nn.Module], None] = lambda model: None) -> Contender:
            model = Decoder(shape)
            change(model)
            return Contender(run, model.to(ranks.device), batches, ranks)

        racing = {SPARSE: enter(shape)}
        if not any(isinstance(m, MoELayer) for m in racing[SPARSE].model.modules()):
            raise UserError("bench train: this model has no routed layer")
        racing[TWIN] = enter(dense_twin(shape, run.seq_len))
        rows: dict[str, dict[str, Any]] = {name: {} for name in (SPARSE, TWIN, *against)}
        expected = racing[SPARSE].first()
        for name in against:
            implementation, compiled = PEERS[name]
            say(f"checking {name}")
            try:
                peer = enter(shape, lambda model, i=implementation, c=compiled: peers.install(model, i, c))
                rows[name] = agreement(expected, peer.first())
            except Exception as error:  # also a compiler that is not there, an op that this device lacks
                rows[name] = {"absent": peers.why(error)}
                continue
            if rows[name]["agrees"]:
                racing[name] = peer
        taken = {name: steps if name in (SPARSE, *COMPARED) else 1 for name in racing}
        seconds = _race(racing, rounds, taken, say)
        tokens = run.batch_size * run.seq_len
        for name in racing:
            rows[name] |= _row(seconds, name, tokens, taken[name])
        return {
            "what": "training speed of one process",
            "machine": describe_machine(ranks.device),
            "seed": run.seed,
            "rounds": rounds,
            "steps_per_turn": steps,
            "tokens_per_step": tokens,
            "parameters": sum(p.numel() for p in racing[SPARSE].model.parameters()),
            "config": run.to_dict(),
            "rows": rows,
            "ratios": {to: _compared(seconds, to) for to in COMPARED if to in racing},
            "peak_memory": peak_memory(ranks.device),
        }


def agreement(expected: dict[str, Tensor], found: dict[str, Tensor]) -> dict[str, Any]:
    """Whether a peer computes the same step: relative L2 distance of every gradient, and of the loss."""
    renamed = {n.replace("gate_up_proj", "gate_up").replace("down_proj", "down"): t for n, t in found.items()}
    if renamed.keys() != expected.keys():
        return {"agrees": False, "worst": None, "where": "another set of gradients"}
    apart = {name: distance(renamed[name], expected[name]) for name in expected}
    where = max(apart, key=lambda name: apart[name])
    return {"agrees": apart[where] <= AGREEMENT, "worst": apart[where], "where": where}


def _race(
    racing: dict[str, Contender], rounds: int, steps: dict[str, int], say: Callable[[str], None]
) -> dict[str, list[float]]:
    turns: dict[str, Callable[[], None]] = {}
    for name, contender in racing.items():
        contender.steps(1)  # the optimiser's state exists from here on
        contender.listen()
        turns[name] = lambda c=contender, n=steps[name]: c.steps(n)
        for kind in KINDS:
            turns[f"{name}/{kind}"] = lambda c=contender, k=kind: c.part(k)
    total = len(turns) * (rounds + 1)
    return interleave(
        turns,
        rounds,
        each=lambda done, name: say(f"round {(done - 1) // len(turns)} of {rounds}, {done}/{total}: {name}"),
    )


def _compared(seconds: dict[str, list[float]], to: str) -> dict[str, float]:
    """Speed of the sparse model over another's: round by round, and that of the fastest turns of both."""
    return dataclasses.asdict(ratio(seconds, SPARSE, to)) | {"fastest": min(seconds[to]) / min(seconds[SPARSE])}


def _row(seconds: dict[str, list[float]], name: str, tokens: int, steps: int) -> dict[str, Any]:
    step = spread([s / steps for s in seconds[name]])
    parts = {kind: spread(seconds[f"{name}/{kind}"]).median for kind in KINDS}
    return {
        "tokens_per_second": dataclasses.asdict(spread([tokens * steps / s for s in seconds[name]])),
        "step_seconds": step.median,
        **{f"{kind}_seconds": value for kind, value in parts.items()},
        "rest_seconds": step.median - sum(parts.values()),
    }
