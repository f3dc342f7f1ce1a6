"""Heads by hand, and what the suite of encoders with heads rejects."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moestro.core.errors import UserError
from moestro.core.signals import Signals
from moestro.models import ClassHead, EmbeddingHead, Headed, encoders, with_heads
from moestro.models.heads import pooled
from moestro.models.twin import dense_twin
from moestro.moe.config import MoELayer
from moestro.nn import FeedForward
from moestro.testing.compare import assert_close
from moestro.testing.headed import check_headed

H = torch.tensor([[[1.0, 2.0], [3.0, 6.0], [9.0, 9.0]], [[5.0, 5.0], [7.0, 7.0], [1.0, 0.0]]])
VALID = torch.tensor([[True, True, False], [False, False, True]])


def test_pooling_by_hand() -> None:
    assert pooled(H, VALID, "mean").tolist() == [[2.0, 4.0], [1.0, 0.0]]
    assert pooled(H, VALID, "first").tolist() == [[1.0, 2.0], [1.0, 0.0]]
    assert pooled(H, None, "mean").tolist() == [
        [pytest.approx(13 / 3), pytest.approx(17 / 3)],
        [pytest.approx(13 / 3), 4],
    ]
    assert pooled(H, None, "first").tolist() == [[1.0, 2.0], [5.0, 5.0]]
    for how in ("mean", "first"):
        assert not pooled(H, torch.zeros_like(VALID), how).any(), "a text of padding only"


def test_the_pooler_of_brief_34() -> None:
    """Mean over tokens that are no padding, layer norm, linear, tanh, linear; a learned temperature divides scores."""
    head = EmbeddingHead(temperature=0.25).build(2)
    (z,) = pooled(H[:1], VALID[:1], "mean")
    normed = (z - 3) / (1 + 1e-5) ** 0.5
    want = head.second(torch.tanh(head.first(normed))) * 2
    assert_close("embedding", head(H[:1], VALID[:1])[0], want, 1e-6)
    assert float(head.log_temperature.detach().exp()) == pytest.approx(0.25)
    assert EmbeddingHead().build(2).log_temperature is None


def test_the_expert_layer_on_top_of_brief_13() -> None:
    """Variant A: the head reads the experts' output alone; a token whose choices are all lost is the zero vector."""
    config = with_heads()["spans"]
    model = config.build().eval()
    x, features = torch.randint(0, 37, (2, 6)), torch.ones(2, 6, 1)
    said, _, trail = model(x, Signals(seed=1), None, features)
    h, _, _ = model.encoder.run(model.encoder.embed(x) + features @ model.features.weight.T)
    assert_close("logits", said, model.head(model.top(h)[0]), 1e-6)
    assert {key.path for key in trail} == {"top"}
    with pytest.raises(UserError, match="1 features per token"):
        model(x)


def test_heads_cost_once_per_text() -> None:
    config = Headed(encoder=encoders()["dense"], head=ClassHead(num_classes=5))
    body = config.encoder.flops_per_token(8)
    assert config.flops_per_token(8) == body + 2 * 5 * config.encoder.dim // 8


@pytest.mark.parametrize("name", ["spans", "spans_dense"])
def test_the_dense_twin(name: str) -> None:
    config: Any = with_heads()[name]
    twin = dense_twin(config, 8)
    assert not isinstance(twin.top, MoELayer)
    assert twin.flops_per_token(8) == pytest.approx(config.flops_per_token(8), rel=0.05)
    assert isinstance(twin.top, FeedForward) == (name == "spans")
    with pytest.raises(UserError, match="its own twin"):
        dense_twin(twin, 8)


def broken(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    from moestro.models import heads

    monkeypatch.setattr(heads, "pooled", change)


def test_the_suite_rejects_pools_of_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    broken(monkeypatch, lambda h, valid, how: h.mean(1))
    with pytest.raises(AssertionError, match="padding on the left"):
        check_headed(with_heads()["classes"])


def test_the_suite_rejects_a_pool_that_cuts_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(h: Tensor, valid: Tensor | None, how: str) -> Tensor:
        return pooled(h, valid, how).detach()

    broken(monkeypatch, cut)
    with pytest.raises(AssertionError, match="gradient: encoder"):
        check_headed(with_heads()["embeddings"])


@pytest.mark.parametrize("fields", [{"num_classes": 0}, {"pooling": "first", "num_classes": -1}])
def test_impossible_heads(fields: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"ClassHead\.num_classes"):
        ClassHead(**fields)
    with pytest.raises(UserError, match=r"EmbeddingHead\.temperature"):
        EmbeddingHead(temperature=0.0)
