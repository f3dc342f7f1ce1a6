"""Training speed: a sparse model against its dense twin, itself with transformers' experts, and transformers' model.

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
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..core.errors import UserError, did_you_mean
from ..models.decoder import Decoder
from ..models.twin import dense_twin
from ..moe.config import MoELayer as MoEConfig
from ..moe.layer import MoELayer
from ..tasks.batches import Batches
from ..tasks.config import Corpus
from ..tasks.corpus import cache_folder, prepare
from ..tasks.tokenizer_file import read_tokenizer
from ..train.config import TrainRun
from ..train.models import language_model
from ..train.ranks import joined
from . import peers
from .contender import Contender
from .counterpart import Trained, in_their_names
from .problem import distance
from .record import Regimes, begin, compared, finish
from .timing import interleave, spread

__all__ = ["AGREEMENT", "measure"]

SPARSE, TWIN, GROUPED, COMPILED = "sparse", "dense twin", "grouped_mm", "grouped_mm compiled"
WHOLE = "transformers model"  # all of it is theirs, and torch's optimiser; experts by grouped_mm
PEERS = {
    WHOLE: ("grouped_mm", False),
    GROUPED: ("grouped_mm", False),
    COMPILED: ("grouped_mm", True),
    "batched_mm": ("batched_mm", False),
    "eager": ("eager", False),
}
COMPARED = (TWIN, WHOLE, GROUPED, COMPILED)  # what ratios are taken to; the others are shown only
KINDS = ("experts", "attention")
AGREEMENT = 1e-4  # relative L2 per gradient tensor, fp32
LARGE = 20_000_000  # parameters from which a turn is one step
MOST_COPIED = 8 * 2**30  # bytes per step


def measure(
    run: TrainRun,
    rounds: int = 7,
    steps: int | None = None,
    say: Callable[[str], None] = lambda line: None,
    against: Sequence[str] = tuple(PEERS),
    name: str = "",
) -> dict[str, Any]:
    """Measure a run's model. Returns a JSON-able record: `rows` per contender, `ratios` of the sparse model's speed,
    and the whole step and its parts as regimes (see `record`), called `name` and the part.

    rounds: how often every contender has its turn. steps: optimiser steps of one turn; None = 3, or 1 of a model with
    over 20 million parameters. against: names in PEERS.
    """
    if rounds < 1 or (steps is not None and steps < 1):
        raise UserError("bench train: needs at least one round of at least one step")
    for peer in against:
        if peer not in PEERS:
            raise UserError(f"bench train: unknown peer {peer!r}{did_you_mean(peer, PEERS)}; known: {', '.join(PEERS)}")
    data, shape = run.data, language_model(run.model, "bench train")
    assert isinstance(data, Corpus)
    with joined(run.device) as ranks:
        if ranks.world > 1:
            raise UserError("bench train measures one process; start it without torchrun")
        if run.threads:
            torch.set_num_threads(run.threads)
        tokenizer = read_tokenizer(data.tokenizer)
        corpus = prepare(data.build(), tokenizer, cache_folder(data.cache), say)
        shape = shape.replace(vocab_size=tokenizer.vocab_size, seed=run.seed)
        run = run.replace(model=shape, micro_batch=0)
        if steps is None:
            steps = 1 if shape.num_params() > LARGE else 3
        record = begin("training speed of one process", ranks.device, run.seed, rounds)
        say(record.get("warning", ""))
        batches = Batches(corpus, run.seq_len, run.seed)

        def enter(shape: Any, change: Callable[[nn.Module], None] = lambda model: None) -> Contender:
            model = Decoder(shape)
            change(model)
            return Contender(run, model.to(ranks.device), batches, ranks)

        sparse = enter(shape)
        racing: dict[str, Contender | Trained] = {SPARSE: sparse}
        if not any(isinstance(m, MoELayer) for m in sparse.model.modules()):
            raise UserError("bench train: this model has no routed layer")
        racing[TWIN] = enter(dense_twin(shape, run.seq_len))
        rows: dict[str, dict[str, Any]] = {name: {} for name in (SPARSE, TWIN, *against)}
        expected = sparse.first()
        for peer in against:
            implementation, compiled = PEERS[peer]
            say(f"checking {peer}")
            try:
                _refuse_wasteful(shape, run.batch_size * run.seq_len, implementation)
                entered: Contender | Trained
                if peer == WHOLE:
                    entered = Trained(run, cast(Decoder, sparse.model), implementation, batches, ranks)
                    rows[peer] = agreement(_bare(enter, shape, entered), entered.first())
                else:
                    entered = enter(shape, lambda model, i=implementation, c=compiled: peers.install(model, i, c))
                    rows[peer] = agreement(expected, entered.first())
            except Exception as error:  # also a compiler that is not there, an op that this device lacks
                rows[peer] = {"absent": peers.why(error)}
                continue
            if rows[peer]["agrees"]:
                racing[peer] = entered
        taken = {who: steps if who in (SPARSE, *COMPARED) else 1 for who in racing}
        seconds = _race(racing, rounds, taken, say)
        tokens = run.batch_size * run.seq_len
        for who in racing:
            rows[who] |= _row(seconds, who, tokens, taken[who])
        record |= {
            "name": name,
            "steps_per_turn": steps,
            "tokens_per_step": tokens,
            "parameters": sum(p.numel() for p in sparse.model.parameters()),
            "config": run.to_dict(),
            "rows": rows,
            "ratios": {to: compared(seconds, SPARSE, to) for to in COMPARED if to in racing},
        }
        return finish(record, "train", _regimes(seconds, taken, rows, name), ranks.device)


def _regimes(
    seconds: dict[str, list[float]], taken: dict[str, int], all_rows: dict[str, dict[str, Any]], name: str
) -> Regimes:
    """The whole step, and all layers of one kind; what is shown only is left out."""
    racing = [who for who in taken if who in (SPARSE, *COMPARED)]
    found: Regimes = {}
    for part in ("step", *KINDS):
        if part == "step":
            times = {who: [s / taken[who] for s in seconds[who]] for who in racing}
        else:
            times = {who: seconds[f"{who}/{part}"] for who in racing if f"{who}/{part}" in seconds}
        rows: dict[str, Any] = {who: {"seconds": values} for who, values in times.items()}
        rows[TWIN]["bar"] = True
        for who, row in all_rows.items():
            if who in COMPARED and who not in racing:
                rows[who] = {"absent": row.get("absent", "its gradients differ")}
        found[f"{name}, {part}"] = {"kind": "train", "part": part, "ours": SPARSE, "rows": rows}
    return found


def _refuse_wasteful(shape: Any, tokens: int, implementation: str) -> None:
    """Raise `Absent` for what would need more memory or time than the measurement is worth."""
    copied = written = 0
    for block in shape.resolved():
        layer = block.ffn
        if isinstance(layer, MoEConfig) and isinstance(width := getattr(layer.experts, "width", None), int):
            expert = 12 * shape.dim * width
            choices = getattr(getattr(layer.router, "select", None), "k", 1)
            copied += 2 * expert * tokens * choices
            written += expert * layer.num_experts**2
    if implementation == "batched_mm" and copied > MOST_COPIED:
        raise peers.Absent(f"it copies the weights of every choice, here {copied / 2**30:.0f} GiB per step")
    if implementation == "eager" and written > MOST_COPIED:
        raise peers.Absent(f"it writes a full gradient for every expert, here {written / 2**30:.0f} GiB per step")


def agreement(expected: dict[str, Tensor], found: dict[str, Tensor]) -> dict[str, Any]:
    """Whether a peer computes the same step: relative L2 distance of every gradient, and of the loss."""
    expected, renamed = (
        {n.replace("gate_up_proj", "gate_up").replace("down_proj", "down"): t for n, t in these.items()}
        for these in (expected, found)
    )
    if renamed.keys() != expected.keys():
        return {"agrees": False, "worst": None, "where": "another set of gradients"}
    apart = {name: distance(renamed[name], expected[name]) for name in expected}
    where = max(apart, key=lambda name: apart[name])
    return {"agrees": apart[where] <= AGREEMENT, "worst": apart[where], "where": where}


def _bare(enter: Callable[[Any], Contender], shape: Any, theirs: Trained) -> dict[str, Tensor]:
    """What `theirs.first()` should be: our gradients without loss terms, under their names."""
    if shape.moe is None or shape.blocks is not None:
        raise peers.Absent("its layers of one kind are all alike")
    found = enter(shape.replace(moe=shape.moe.replace(losses=()))).first()
    names = [name for name, _ in theirs.model.named_parameters()]
    return in_their_names(found, names) | {"nats": found["nats"]}


def _race(
    racing: dict[str, Contender | Trained], rounds: int, steps: dict[str, int], say: Callable[[str], None]
) -> dict[str, list[float]]:
    turns: dict[str, Callable[[], None]] = {}
    for name, contender in racing.items():
        contender.steps(1)  # the optimiser's state exists from here on
        turns[name] = lambda c=contender, n=steps[name]: c.steps(n)
        if isinstance(contender, Trained):
            continue
        contender.listen()
        for kind in KINDS:
            turns[f"{name}/{kind}"] = lambda c=contender, k=kind: c.part(k)
    total = len(turns) * (rounds + 1)
    return interleave(
        turns,
        rounds,
        each=lambda done, name: say(f"round {(done - 1) // len(turns)} of {rounds}, {done}/{total}: {name}"),
    )


def _row(seconds: dict[str, list[float]], name: str, tokens: int, steps: int) -> dict[str, Any]:
    step = spread([s / steps for s in seconds[name]])
    speed = dataclasses.asdict(spread([tokens * steps / s for s in seconds[name]]))
    if f"{name}/{KINDS[0]}" not in seconds:
        return {"tokens_per_second": speed, "step_seconds": step.median}
    parts = {kind: spread(seconds[f"{name}/{kind}"]).median for kind in KINDS}
    return {
        "tokens_per_second": speed,
        "step_seconds": step.median,
        **{f"{kind}_seconds": value for kind, value in parts.items()},
        "rest_seconds": step.median - sum(parts.values()),
    }
