"""A whole small model decoding: ours by `serve.generate`, transformers' by `generate`, the same weights, greedily."""

from __future__ import annotations

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
from . import peers
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
NAMES = (  # theirs -> ours
    ("model.", ""),
    ("embed_tokens", "embed"),
    ("lm_head", "head"),
    ("input_layernorm", "mixer_norm"),
    ("post_attention_layernorm", "ffn_norm"),
    ("self_attn", "mixer"),
    ("mlp.", "ffn."),
    ("gate.weight", "router.score.weight"),
    ("_proj.weight", ".weight"),
    ("gate_up_proj", "gate_up"),
    ("down_proj", "down"),
)

Continue = Callable[[Tensor], list[int]]  # a prompt's ids [S] -> the new tokens


def measure(
    shape: Shape, layers: int, rounds: int, new: int, with_peers: bool, seed: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """Every round, every contender continues the same prompt by `new` tokens; seconds are per new token, the prompt's
    own pass included. A contender whose tokens are not ours is refused; "agree" says how many are."""
    ours = our_model(shape, layers, seed, PROMPT + new)
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randint(0, VOCABULARY, (rounds + 1, PROMPT), generator=generator)
    racing: dict[str, Continue] = {OURS: lambda prompt: generate(ours, prompt, new).tokens.tolist()}
    expected = racing[OURS](prompts[0])
    rows: dict[str, Any] = {OURS: {"agree": new, "of": new}}
    for name, (implementation, compiled) in (PEERS if with_peers else {}).items():
        say(f"whole model: checking {name}")
        try:
            run = _transformers(ours, shape, implementation, compiled, new)
            start = time.perf_counter()
            found = run(prompts[0])
        except Exception as error:
            rows[name] = {"absent": peers.why(error)}
            continue
        rows[name] = {"agree": sum(a == b for a, b in zip(found, expected)), "of": new}
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


def _check(tokens: list[int]) -> None:
    if not tokens:
        raise RuntimeError("a contender generated nothing")


def _renamed(name: str) -> str:
    for theirs, ours in NAMES:
        name = name.replace(theirs, ours)
    return name


def _transformers(ours: Any, shape: Shape, implementation: str, compiled: bool, new: int) -> Continue:
    """Their model on our tensors: nothing is copied."""
    configuration, modeling = peers.transformers_modules()
    attention = ours.config.attention
    config = configuration.Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=shape.dim,
        num_hidden_layers=ours.config.num_layers,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=attention.head_dim,
        moe_intermediate_size=shape.width,
        num_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
        norm_topk_prob=True,
        max_position_embeddings=ours.config.context,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    config._experts_implementation = implementation
    with torch.device("meta"):
        model: Any = modeling.Qwen3MoeForCausalLM(config)
    values = ours.state_dict()
    model.load_state_dict({name: values[_renamed(name)] for name in model.state_dict()}, assign=True)
    model.model.rotary_emb = modeling.Qwen3MoeRotaryEmbedding(config)  # it is in no state dict
    model.eval()
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
