"""Cold decoding: one token at a time through several layers of distinct weights, and a whole small model.

A hot single token measures the cache: what it touches stays there. Here the layers hold more than any cache, the tokens
rotate, each goes to experts of its own, and contenders, who take turns token by token, never follow each other with the
same token. Beside them runs the time to read once, from the same memory, the bytes that a token touches: nothing that
reads its weights can be faster.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.errors import UserError
from . import decoders, peers, whole
from .decoders import Step
from .problem import Shape, Weights, distance, plain_loop, weights
from .record import Regimes, begin, finish
from .routings import routing
from .timing import interleave

__all__ = ["LAYERS", "SHAPE", "TOKENS", "TOLERANCE", "measure"]

SHAPE = (512, 256, 32, 4)  # D, F, E, K
LAYERS, TOKENS = 8, 64
CHECKED = 8  # tokens whose outputs are compared with float64, through all layers
TOLERANCE = {"fp32": 1e-5, "bf16": 1e-2, "int8": 2e-2, "int4": 0.2}  # relative L2: what the kind of weights allows
STRIDE = 23  # tokens by which contenders are apart; in no order of 20 of them does one follow with the same token


def measure(
    shape: Sequence[int] = SHAPE,
    *,
    layers: int = LAYERS,
    tokens: int = TOKENS,
    passes: int = 3,
    model_rounds: int = 5,
    new_tokens: int = 64,
    peers: bool = False,
    seed: int = 0,
    threads: int = 0,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measure decoding on the CPU in fp32 and with packed weights. Returns a JSON-able record, see `record`.

    passes: how often every token comes round. model_rounds: prompts that the whole model continues by `new_tokens`; 0
    leaves that part out.
    """
    if min(layers, tokens, passes) < 1:
        raise UserError("bench decode: needs at least one layer, one token and one pass")
    if threads:
        torch.set_num_threads(threads)
    D, F, E, K = shape
    cpu = torch.device("cpu")
    record = begin("cold decoding, one token at a time", cpu, seed, passes * tokens)
    say(record.get("warning", ""))
    record |= {"layers": layers, "tokens": tokens, "tolerance": TOLERANCE}
    one = Shape(1, D, F, E, K)
    sizes = f"{layers} layers, D {D} F {F} E {E} K {K}"
    regimes: Regimes = {
        f"cold decode, {sizes}": {
            "kind": "cold decode",
            "layers": layers,
            **dataclasses.asdict(one),
            "ours": decoders.OURS,
            "rows": _cold(one, layers, tokens, passes, peers, seed, say),
        }
    }
    if model_rounds:
        regimes[f"whole model, {sizes}"] = {
            "kind": "whole model",
            "layers": layers,
            **dataclasses.asdict(one),
            "ours": whole.OURS,
            **whole.measure(one, layers, model_rounds, new_tokens, peers, seed, say),
        }
    return finish(record, "decode", regimes, cpu)


@dataclasses.dataclass(frozen=True)
class Token:
    """What one token brings to every layer: x [L, 1, D], expert [L, 1, K], weight [L, 1, K], taken apart."""

    x: tuple[Tensor, ...]
    expert: tuple[Tensor, ...]
    weight: tuple[Tensor, ...]


def _cold(
    shape: Shape, layers: int, tokens: int, passes: int, with_peers: bool, seed: int, say: Callable[[str], None]
) -> dict[str, Any]:
    cpu = torch.device("cpu")
    shared = [weights(shape, seed + i, cpu, torch.float32) for i in range(layers)]
    stream = _stream(shape, layers, tokens, seed)
    checked = stream[:: max(1, tokens // CHECKED)][:CHECKED]
    expected = torch.cat([_reference(token, shared) for token in checked])
    rows: dict[str, Any] = {}
    racing: dict[str, list[Step]] = {}
    for name, maker in decoders.makers(shape, shared, with_peers).items():
        say(f"checking {name}")
        try:
            made = maker.build()
            start = time.perf_counter()
            _through(made, stream[0])
            took = time.perf_counter() - start
            rows[name] = {"kind": maker.kind, "bytes": maker.bytes_per_layer()}
            if maker.compiled:
                rows[name]["compile_seconds"] = took
            if maker.reader:
                racing[name] = made
                continue
            apart = distance(torch.cat([torch.cat(_through(made, token)) for token in checked]), expected)
        except Exception as error:
            rows[name] = {"absent": peers.why(error)}
            continue
        rows[name]["errors"] = {"y": apart if math.isfinite(apart) else None}
        if apart > TOLERANCE[maker.kind]:
            rows[name]["refused"] = f"its output is {apart:.1e} away from float64"
        else:
            racing[name] = made
    seconds = interleave(
        {name: _turn(made, stream, i * STRIDE) for i, (name, made) in enumerate(racing.items())},
        passes * tokens,
        warmup=2,
        each=lambda done, name: say(f"cold decode: {done} of {len(racing) * (passes * tokens + 2)}: {name}"),
    )
    for name, values in seconds.items():
        rows[name]["seconds"] = [v / layers for v in values]
    return rows


def _stream(shape: Shape, layers: int, tokens: int, seed: int) -> list[Token]:
    """Tokens with a random routing in every layer."""
    generator = torch.Generator().manual_seed(seed + 1)
    made = []
    for _ in range(tokens):
        tables = [routing("balanced", 1, shape.experts, shape.top_k, generator) for _ in range(layers)]
        x = torch.randn(layers, 1, shape.dim, generator=generator)
        made.append(Token(x.unbind(0), tuple(e for e, _ in tables), tuple(w for _, w in tables)))
    return made


def _through(steps: Sequence[Step], token: Token) -> list[Tensor]:
    with torch.no_grad():
        return [step(x, e, w) for step, x, e, w in zip(steps, token.x, token.expert, token.weight)]


def _turn(steps: Sequence[Step], stream: Sequence[Token], start: int) -> Callable[[], None]:
    place = start

    def turn() -> None:
        nonlocal place
        _through(steps, stream[place % len(stream)])
        place += 1

    return turn


def _reference(token: Token, shared: Sequence[Weights]) -> Tensor:
    """[L, D] float64, from the touched experts alone."""
    out = []
    for x, expert, weight, w in zip(token.x, token.expert, token.weight, shared):
        touched = torch.arange(expert.shape[1])[None]
        gate_up, down = (t.index_select(0, expert[0]).double() for t in (w.gate_up, w.down))
        out.append(plain_loop(x.double(), touched, weight.double(), gate_up, down))
    return torch.cat(out)
