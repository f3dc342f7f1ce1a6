"""A whole small model decoding: ours by `serve.generate`, transformers' by `generate`, the same weights, greedily."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..experts.config import Gated
from ..models.config import Decoder
from ..moe.config import MoELayer
from ..nn.config import Attention
from ..routers.config import Router, TopK
from ..serve.generate import generate
from ..serve.weights import pack_model
from . import peers
from .counterpart import counterpart
from .decoders import KINDS
from .problem import Shape
from .timing import interleave

__all__ = ["HEADS", "OURS", "PROMPT", "VOCABULARY", "measure"]

OURS = "moestro"
HEADS, VOCABULARY, PROMPT = 8, 8192, 16
PEERS = {  # name -> (implementation of the experts, compiled with a static cache)
    "transformers grouped_mm": ("grouped_mm", False),
    "transformers eager": ("eager", False),
    "transformers batched_mm compiled": ("batched_mm", True),
}
Continue = Callable[[Tensor], list[int]]  # a prompt's ids [S] -> the new tokens


def measure(
    shape: Shape, layers: int, rounds: int, new: int, with_peers: bool, seed: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """Every round, every contender continues the same prompt by `new` tokens; seconds are per new token, the prompt's
    own pass included. A peer whose tokens are not ours is refused; "agree" says how many are. Ours with packed weights
    (other weights, so other tokens may come) are timed too."""
    ours = our_model(shape, layers, seed, PROMPT + new)
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randint(0, VOCABULARY, (rounds + 1, PROMPT), generator=generator)
    racing: dict[str, Continue] = {OURS: lambda prompt: generate(ours, prompt, new).tokens.tolist()}
    expected = racing[OURS](prompts[0])
    rows: dict[str, Any] = {OURS: {"agree": new, "of": new}}
    for kind in KINDS:
        say(f"whole model: packing {kind}")
        name = f"{OURS} {kind}"
        packed = copy.deepcopy(ours)
        pack_model(packed, kind)
        racing[name] = lambda prompt, model=packed: generate(model, prompt, new).tokens.tolist()
        rows[name] = {"agree": _agreeing(racing[name](prompts[0]), expected), "of": new}
    for name, (implementation, compiled) in (PEERS if with_peers else {}).items():
        say(f"whole model: checking {name}")
        try:
            run = _transformers(ours, implementation, compiled, new)
            start = time.perf_counter()
            found = run(prompts[0])
        except Exception as error:
            rows[name] = {"absent": peers.why(error)}
            continue
        rows[name] = {"agree": _agreeing(found, expected), "of": new}
        if compiled:
            rows[name]["compile_seconds"] = time.perf_counter() - start
        if found != expected:
            rows[name]["refused"] = f"{rows[name]['agree']} of {new} tokens are the same"
        else:
            racing[name] = run
    turns: dict[str, Callable[[], None]] = {}
    for name, run in racing.items():
        order = iter(prompts)
        turns[name] = lambda run=run, order=order: _check(run(next(order)))
    seconds = interleave(turns, rounds, each=lambda done, name: say(f"whole model: {done} turns, {name}"))
    for name, values in seconds.items():
        rows[name]["seconds"] = [v / new for v in values]
    return {"new_tokens": new, "prompt_tokens": PROMPT, "vocabulary": VOCABULARY, "heads": HEADS, "rows": rows}


def our_model(shape: Shape, layers: int, seed: int, context: int) -> nn.Module:
    """The decoder whose counterpart is transformers' Qwen3-MoE."""
    config = Decoder(
        vocab_size=VOCABULARY,
        dim=shape.dim,
        num_layers=layers,
        attention=Attention(num_heads=HEADS, num_kv_heads=HEADS, head_dim=shape.dim // HEADS, qk_norm="head"),
        moe=MoELayer(
            num_experts=shape.experts, router=Router(select=TopK(k=shape.top_k)), experts=Gated(width=shape.width)
        ),
        context=context,
        init_std=None,
        seed=seed,
    )
    return config.build().eval()


def _agreeing(found: list[int], expected: list[int]) -> int:
    return sum(a == b for a, b in zip(found, expected))


def _check(tokens: list[int]) -> None:
    if not tokens:
        raise RuntimeError("a contender generated nothing")


def _transformers(ours: Any, implementation: str, compiled: bool, new: int) -> Continue:
    """Their model on our tensors: nothing is copied."""
    model = counterpart(ours, implementation, share=True).eval()
    options: dict[str, Any] = {"max_new_tokens": new, "do_sample": False, "use_cache": True}
    if compiled:
        from transformers.generation.configuration_utils import CompileConfig

        how: Any = CompileConfig(mode="default", fullgraph=False)
        how._compile_all_devices = True
        options |= {"cache_implementation": "static", "compile_config": how, "disable_compile": False}

    def run(prompt: Tensor) -> list[int]:
        whole = prompt[None]
        return model.generate(whole, attention_mask=torch.ones_like(whole), **options)[0, len(prompt) :].tolist()

    return run
