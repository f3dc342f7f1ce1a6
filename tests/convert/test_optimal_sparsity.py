"""The checkpoints of Optimal Sparsity (brief 39): Mixtral's format as the authors' converter writes it."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from convert.reference_cases import llama_like, swiglu
from moestro import convert
from moestro.convert.checkpoint.family import canonical, difference
from moestro.convert.loading import read_config
from moestro.core.errors import UserError
from moestro.models.decoder import Decoder
from moestro.models.sizes import optimal_sparsity, size_name
from moestro.testing.compare import assert_close


def config_json(dim: int, num_experts: int, top_k: int, **changes: Any) -> dict[str, Any]:
    """config.json of mcore_to_hf_mixtral: sizes from the saved arguments, a constant balance coefficient."""
    heads = max(1, dim // 64)
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": dim,
        "initializer_range": 0.02,
        "intermediate_size": 2 * dim,
        "max_position_embeddings": 4096,
        "num_attention_heads": heads,
        "num_experts_per_tok": top_k,
        "num_hidden_layers": 16,
        "num_key_value_heads": heads,
        "num_local_experts": num_experts,
        "output_router_logits": False,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "router_aux_loss_coef": 0.01,
        "router_jitter_noise": 0.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": 99_487,
        **changes,
    }


@pytest.mark.parametrize(
    ("sizes", "name"),
    [
        ((512, 8, 2), "d512-E8-k2-320M-A170M"),
        ((1024, 16, 2), "d1024-E16-k2-1.9B-A470M"),
        ((2048, 128, 2), "d2048-E128-k2-52B-A1.5B"),
    ],
)
def test_a_published_config_is_the_model_of_its_name(sizes, name):
    config = read_config(config_json(*sizes))
    assert size_name(config) == name
    assert difference(canonical(config), canonical(optimal_sparsity(*sizes))) is None


def test_a_checkpoint_in_their_keys_loads_and_routes_as_written(tmp_path):
    """Tiny random tensors under the published names, one expert computed by hand."""
    d, E, V, L = 16, 4, 23, 2
    fields = config_json(d, E, 2, vocab_size=V, num_hidden_layers=L, num_attention_heads=2, num_key_value_heads=2)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.3

    tensors = {"model.embed_tokens.weight": draw(V, d), "lm_head.weight": draw(V, d), "model.norm.weight": draw(d)}
    for i in range(L):
        at = f"model.layers.{i}."
        tensors |= {f"{at}self_attn.{n}_proj.weight": draw(d, d) for n in "qkvo"}
        tensors |= {f"{at}{n}.weight": 1 + draw(d) for n in ("input_layernorm", "post_attention_layernorm")}
        tensors[f"{at}block_sparse_moe.gate.weight"] = draw(E, d)
        for e in range(E):
            one = f"{at}block_sparse_moe.experts.{e}."
            tensors |= {f"{one}w1.weight": draw(2 * d, d), f"{one}w3.weight": draw(2 * d, d)}
            tensors[f"{one}w2.weight"] = draw(d, 2 * d)
    (tmp_path / "config.json").write_text(json.dumps(fields))
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = convert.load(tmp_path).model
    assert isinstance(model, Decoder)
    x = draw(5, d)
    one = "model.layers.1.block_sparse_moe."
    probs = (x @ tensors[f"{one}gate.weight"].T).softmax(-1)
    weight, expert = probs.topk(2)
    weight = weight / weight.sum(-1, keepdim=True)
    want = torch.zeros(5, d)
    for t in range(5):
        for k in range(2):
            w = {n: tensors[f"{one}experts.{int(expert[t, k])}.w{n}.weight"] for n in (1, 2, 3)}
            hidden = torch.nn.functional.silu(w[1] @ x[t]) * (w[3] @ x[t])
            want[t] += weight[t, k] * (w[2] @ hidden)
    layer: Any = model.layers[1]
    with torch.no_grad():
        assert_close("routed layer", layer.ffn(x)[0], want, 1e-5)
        assert bool(model(torch.arange(9)[None])[0].isfinite().all())
    tokens = torch.randint(0, V, (11,), generator=generator)
    norms = ("input_layernorm", "post_attention_layernorm")
    want = llama_like(tensors, tokens, layers=L, heads=2, eps=1e-5, norms=norms, ffn=top_two)
    wide = convert.load(tmp_path, dtype=torch.float64).model
    with torch.no_grad():
        assert_close("logits", wide(tokens[None])[0][0], want, 1e-6)
    assert not torch.equal(wide.head.weight, wide.embed.weight)  # the head is its own
    again = convert.save(model, tmp_path / "again", to="mixtral")
    back = load_file(again / "model.safetensors")
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[n], t) for n, t in tensors.items())
    del tensors["lm_head.weight"]
    tensors["model.layers.0.block_sparse_moe.experts.4.w1.weight"] = draw(2 * d, d)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"missing lm_head\.weight; left over .*experts\.4\.w1"):
        convert.load(tmp_path)


def top_two(w: dict[str, torch.Tensor], layer: int, x: torch.Tensor) -> torch.Tensor:
    """Softmax over the two highest logits; equal to softmax over all, restricted and renormalised."""
    at = f"model.layers.{layer}.block_sparse_moe."
    out = []
    for row in x:
        kept = (w[f"{at}gate.weight"] @ row).topk(2)
        parts = [[w[f"{at}experts.{int(e)}.w{n}.weight"] for n in (1, 3, 2)] for e in kept.indices]
        out.append(sum(p * swiglu(row, *part) for p, part in zip(kept.values.softmax(0), parts)))
    return torch.stack(out)
