"""A drop-in layer inside a transformers model."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import moestro
from moestro.core.errors import RecomputationError
from moestro.core.trail import Key
from moestro.testing.compare import assert_close

transformers = importlib.import_module("transformers")


def llama() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
    )
    model = transformers.LlamaForCausalLM(config)
    for layer in model.model.layers:
        layer.mlp = moestro.MoE(16, num_experts=4, top_k=2, width=8)
    return model.train()


def batch() -> dict[str, Tensor]:
    ids = torch.randint(0, 32, (2, 10), generator=torch.Generator().manual_seed(3))
    return {"input_ids": ids, "labels": ids}


def save(model: Any, kwargs: dict[str, Any] | None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # its name changes in transformers 6
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)


def gradients(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(**batch(), use_cache=False).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_it_trains() -> None:
    model = llama()
    names = {n for n, _ in model.named_parameters() if ".mlp." in n}
    assert "model.layers.1.mlp.experts.gate_up" in names
    assert "model.layers.0.mlp.router.score.weight" in names
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(25):
        loss, grads = gradients(model)
        assert grads.keys() == dict(model.named_parameters()).keys()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.7 * losses[0]
    generated = model.eval().generate(batch()["input_ids"][:1, :4], max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert generated.shape == (1, 7)


def test_gradient_checkpointing_with_the_context_gives_equal_gradients() -> None:
    model = llama()
    with moestro.collect(model) as plain:
        loss, want = gradients(model)
    save(model, {"use_reentrant": False, "context_fn": moestro.checkpoint_context})
    assert model.model.layers[0].gradient_checkpointing
    with moestro.collect(model) as saved:
        again, got = gradients(model)
    assert torch.equal(loss, again)
    assert got.keys() == want.keys()
    for name, grad in want.items():
        assert_close(name, got[name], grad, tol=1e-6)
    assert set(saved.trail) == {Key(f"model.layers.{i}.mlp", 0) for i in (0, 1)}
    for path, count in plain.counts().items():
        assert torch.equal(saved.counts()[path], count)


@pytest.mark.parametrize("kwargs", [None, {"use_reentrant": False}, {"use_reentrant": True}])
def test_without_the_context_the_error_names_the_remedy(kwargs: dict[str, Any] | None) -> None:
    model = llama()
    save(model, kwargs)
    with pytest.raises(RecomputationError, match=r'"context_fn": moestro\.checkpoint_context'):
        gradients(model)


def test_balance_reaches_the_routers_of_a_foreign_model() -> None:
    model = llama()
    _, want = gradients(model)
    for layer in model.model.layers:
        layer.mlp.loss_scale = 100.0
    _, got = gradients(model)
    name = "model.layers.1.mlp.router.score.weight"
    assert float((got[name] - want[name]).norm()) > 0.1 * float(want[name].norm())
