"""How much a decoded token costs besides its weights, counted, not timed: calls of Python and operations of torch.

Bounds are per routed layer and about a fifth above what they are today. If one is passed, look for what is computed
for nobody before raising it.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from moestro.core.signals import Signals
from moestro.experts import Gated
from moestro.models import Decoder
from moestro.models.decoder import Decoder as DecoderModule
from moestro.moe import MoELayer
from moestro.nn import Attention
from moestro.ops.native import load
from moestro.routers import Router, TopK
from moestro.serve.generate import generate
from ops.native_cases import compiles

Step = Callable[[], object]


def model(layers: int) -> DecoderModule:
    moe = MoELayer(num_experts=8, router=Router(select=TopK(k=4)), experts=Gated(width=16))
    attention = Attention(num_heads=4)
    return Decoder(vocab_size=32, dim=32, num_layers=layers, attention=attention, moe=moe, context=64).build().eval()


def one_token(layers: int) -> Step:
    """Decodes the ninth token of a sequence, again and again, as `generate` does."""
    made = model(layers)
    _, carry, _ = made(torch.arange(8)[None], Signals(unit_id=torch.arange(8), quiet=True), made.new_cache(16))
    token, unit = torch.tensor([[3]]), torch.tensor([8])

    def step() -> None:
        made(token, Signals(unit_id=unit, quiet=True), carry)

    step()
    return step


def python_calls(step: Step) -> int:
    count = 0

    def watch(frame: Any, event: str, arg: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(watch)
    try:
        step()
    finally:
        sys.setprofile(None)
    return count


def operations(step: Step) -> int:
    """Operations of torch that are called from outside of torch."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        step()
    return sum(1 for event in seen.events() or () if event.cpu_parent is None and "::" in event.name)


def dispatched(step: Step) -> int:
    """Kernels below all composites, with torch alone: a mode that watches turns the C kernels off."""
    found: Counter[str] = Counter()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found[str(func)] += 1
            return func(*args, **(kwargs or {}))

    with Watch():
        step()
    return found.total()


def per_layer(count: Callable[[Step], int]) -> float:
    with torch.no_grad():
        return (count(one_token(3)) - count(one_token(1))) / 2


@compiles
@pytest.mark.parametrize(("count", "most"), [(python_calls, 430), (operations, 20)])
def test_a_layer_of_a_decoded_token(count: Callable[[Step], int], most: int) -> None:
    assert load() is not None
    found = per_layer(count)
    assert found <= most, f"{found} of {count.__name__}"
    assert found > most / 2, "the bound means something"


def test_a_layer_of_a_decoded_token_without_c_kernels() -> None:
    found = per_layer(dispatched)
    assert found <= 100, found
    assert found > 50, "the bound means something"


@compiles
def test_the_rest_of_a_token() -> None:
    """Embedding, head, sampling and the loop: what does not grow with layers."""
    made = model(1)
    generate(made, [1, 2, 3], 2)
    more = python_calls(lambda: generate(made, [1, 2, 3], 24)) - python_calls(lambda: generate(made, [1, 2, 3], 4))
    with torch.no_grad():
        assert more / 20 - per_layer(python_calls) <= 150


def test_a_quiet_pass_is_the_same_pass_without_a_trail() -> None:
    made, tokens = model(2), torch.arange(8)[None]
    loud, _, trail = made(tokens, Signals())
    quiet, _, none = made(tokens, Signals(quiet=True))
    assert torch.equal(loud, quiet)
    assert len(trail) == 2
    assert not len(none)
    assert len(made.train()(tokens, Signals(quiet=True))[2]) == 2, "losses of training are never left out"
